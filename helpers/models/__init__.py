"""Models and the texts that they read: presets, where both come from, tokens, shapes of published models.

Models come from the hub (`hub`), a folder (`loading`), a GGUF file (`gguf_files`) or a package (`packaged`); texts from
the hub, a file, or a folder of files (`text_files`), and `splits` says which of them are for training.
Knows nothing of policies or measurements. Models are loaded ready for packed attention (`helpers.cache`).
"""

from helpers.models.fingerprint import fingerprint
from helpers.models.hub import HubError
from helpers.models.items import MultipleChoice, load_multiple_choice, sample_items, sample_texts
from helpers.models.key_balance import KEY_BALANCE, balance_path, load_balance, save_balance
from helpers.models.loading import choose_device, load_model, model_name, placement
from helpers.models.onednn_linear import use_onednn_linear
from helpers.models.presets import PRESETS, Preset, get_preset
from helpers.models.sequences import take_sequences
from helpers.models.shapes import SHAPES, random_model, shape_config, weight_count
from helpers.models.splits import Part, split_holdout
from helpers.models.stories import Article, load_articles, load_last, load_paragraphs, load_stories, read_stories
from helpers.models.text_files import TEXT_FILES, in_folder
from helpers.models.tokens import check_context, check_not_empty, encode, pack_tokens

__all__ = [
    "KEY_BALANCE", "PRESETS", "SHAPES", "TEXT_FILES", "Article", "HubError", "MultipleChoice", "Part", "Preset",
    "balance_path", "check_context", "check_not_empty", "choose_device", "encode", "fingerprint", "get_preset",
    "in_folder", "load_articles", "load_balance", "load_last", "load_model", "load_multiple_choice", "load_paragraphs",
    "load_stories", "model_name", "pack_tokens", "placement", "random_model", "read_stories", "sample_items",
    "sample_texts", "save_balance", "shape_config", "split_holdout", "take_sequences", "use_onednn_linear",
    "weight_count",
]  # fmt: skip
