"""The card of the embedded pair: what `training.json` says of each model, and what can be measured again.

python main.py card [--holdout-text REAL_STORIES]
"""

import json
import statistics
import time
from pathlib import Path

import pandas as pd
import torch
from transformers import DynamicCache

from helpers.evaluation.bootstrap import bootstrap_mean
from helpers.evaluation.multiple_choice import score_items
from helpers.io.atomic import atomic_path
from helpers.io.provenance import provenance
from helpers.io.results import write_json
from helpers.models.items import MultipleChoice
from helpers.models.loading import load_model
from helpers.models.stories import read_stories, split_holdout
from helpers.policies.cached_model import CachedModel
from helpers.policies.decoding import decode
from helpers.training.pretraining import bits_per_byte

PAIR = ("large", "small")


SAMPLE_SEEDS = range(10)


SAMPLE_TOKENS = 120


TEMPERATURE = 0.8


@torch.no_grad()
def time_per_token(models: list, tokens: int = 64, rounds: int = 15) -> list[float]:
    """Median milliseconds of a decode step at about `tokens` tokens of context, the models taking turns."""
    times: list[list[float]] = [[] for _ in models]
    for round_ in range(rounds + 2):
        for model, into in zip(models, times, strict=True):
            ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
            cache = DynamicCache(config=model.config)
            model(input_ids=ids, cache=cache)
            started = time.perf_counter()
            for _ in range(8):
                model(input_ids=ids[:, :1], cache=cache)
            if round_ >= 2:
                into.append((time.perf_counter() - started) / 8 * 1000)
    return [statistics.median(each) for each in times]


def sample_stories(model, tokenizer) -> list[str]:
    """One text for each seed, from the beginning-of-text token, unpicked."""
    start = torch.tensor([[tokenizer.bos_token_id]], device=model.device)
    texts = []
    for seed in SAMPLE_SEEDS:
        cached = CachedModel(model)
        ids = decode(cached, start, max_new_tokens=SAMPLE_TOKENS, temperature=TEMPERATURE, seed=seed).token_ids
        texts.append(tokenizer.decode(ids[0], skip_special_tokens=True).strip())
    return texts


def measure_pair(folder: Path, items: list[MultipleChoice], holdout_text: str | None) -> dict[str, object]:
    """Everything on the card that can be measured: accuracy, time, samples and, given the text, bits per byte."""
    loaded = {name: load_model(folder / name, quiet=True) for name in PAIR}
    held_out = split_holdout(read_stories(holdout_text))[1] if holdout_text else []
    result: dict[str, object] = {}
    all_scores = {}
    for name, (model, tokenizer) in loaded.items():
        scores = all_scores[name] = score_items(model, tokenizer, items)
        entry = {measure: bootstrap_mean(scores[measure]) for measure in scores}
        if held_out:
            entry["bits_per_byte"] = bits_per_byte(model, tokenizer, held_out)
        result[name] = entry
    advantage = all_scores["large"] - all_scores["small"]
    result["large_minus_small"] = {measure: bootstrap_mean(advantage[measure]) for measure in advantage}
    times = time_per_token([loaded[name][0] for name in PAIR])
    result["ms_per_token"] = dict(zip(PAIR, times, strict=True))
    result["time_ratio"] = times[1] / times[0]
    result["samples"] = sample_stories(*loaded["large"])
    result["items"] = len(items)
    return result | {"provenance": provenance()}


def write_card(folder: Path, measured: dict[str, object]) -> None:
    """Write `folder/README.md` and `folder/measured.json`."""
    told = {name: json.loads((folder / name / "training.json").read_text(encoding="utf-8")) for name in PAIR}
    rows = []
    for name in PAIR:
        settings, entry = told[name]["settings"], measured[name]
        low_high = {m: "{:.1%} [{:.1%}, {:.1%}]".format(*entry[m]) for m in ("acc", "acc_norm")}
        rows.append(
            {
                "model": name,
                "parameters": f"{told[name]['parameters'] / 1e6:.2f} M",
                "shape": f"{settings['layers']} layers of {settings['hidden']}, {settings['heads']} query / "
                f"{settings['kv_heads']} KV heads of {settings['head_dim']}",
                "steps": settings["steps"],
                "tokens seen": f"{told[name]['tokens_seen'] / 1e6:.1f} M",
                "time": f"{told[name]['seconds'] / 60:.0f} min",
                "held-out bits per byte": told[name]["holdout_bits_per_byte"],
                "multiple choice (sum)": low_high["acc"],
                "multiple choice (per byte)": low_high["acc_norm"],
                "ms per token": f"{measured['ms_per_token'][name]:.2f}",
            }
        )
    table = pd.DataFrame(rows).set_index("model").T.rename_axis("")
    lines = ["| | " + " | ".join(table.columns) + " |", "|---|" + "---|" * len(table.columns)]
    lines += [f"| {name} | " + " | ".join(map(str, row)) + " |" for name, row in table.iterrows()]
    shown = (" ".join(text.split()) for text in measured["samples"])
    samples = "\n\n".join(f"**Seed {seed}.** {text}" for seed, text in zip(SAMPLE_SEEDS, shown, strict=True))
    large = told["large"]
    gain = {
        m: "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in v)) for m, v in measured["large_minus_small"].items()
    }
    content = CARD.format(
        table="\n".join(lines),
        samples=samples,
        gain=gain,
        device=large["device"],
        threads=large["threads"],
        train_tokens=f"{large['train_tokens'] / 1e6:.2f} million",
        holdout=large["holdout_stories"],
        ratio=f"{measured['time_ratio']:.2f}",
        items=measured["items"],
        temperature=TEMPERATURE,
        sample_tokens=SAMPLE_TOKENS,
    )
    with atomic_path(folder / "README.md") as temporary:
        temporary.write_text(content, encoding="utf-8")
    write_json(folder / "measured.json", measured)


CARD = """# The embedded story models

Two small Llama models and the byte-level BPE tokenizer that they share, trained from nothing by `helpers.pretrain`
for this project. They write simple children's stories in English and nothing else. `large` is the model of the
KV-cache notebooks; `small` writes where a large model is only asked when needed.

{table}

![Training loss of both models](../../figures/00_training_curves.png)

**Data.** {train_tokens} tokens of simple stories: most were sampled from a public 3M-parameter model trained on
TinyStories, the rest are the first nine tenths of a 2 MB sample of TinyStories itself (Eldan and Li, arXiv
2305.07759). Held out: the last tenth of that sample, {holdout} stories. No text of either is in this repository.

**Training.** On {device}, {threads} threads, beside other work (so the times are upper bounds): rows of 512 tokens,
Muon for the hidden matrices, AdamW for the rest, warm-up and cosine decay; all settings and versions are in
`*/training.json`, the loss in `*/training_log.csv`.

```bash
python -m helpers.pretrain --text SAMPLED.txt.gz --holdout-text TINYSTORIES.txt --out data/models/large
python -m helpers.pretrain --text SAMPLED.txt.gz --holdout-text TINYSTORIES.txt --out data/models/small \\
    --size small --tokenizer data/models/large
```

Without files, `python -m helpers.pretrain --out DIR` trains on roneneldan/TinyStories from the hub.

**Evaluation.** `python main.py card [--holdout-text TINYSTORIES.txt]` measures again and rewrites this card. Bits per
byte: negative log2-likelihood over bytes, each held-out story read from its beginning. Multiple choice: the {items}
stories in `data/samples/`, four endings each (chance is 25%), 95% bootstrap intervals over stories; by the sum of
an ending's log-probabilities, and by that sum over its bytes. Large minus small, paired over the same stories, in
points: {gain[acc]} by the sum, {gain[acc_norm]} per byte. The wrong endings are natural last sentences of other
stories with the same characters. The small model's time per token is {ratio} of the large one's (one process, taking
turns).

**Limits.** A vocabulary of four-year-olds, 512 tokens of context, no chat, no facts, no other language. Names and
objects drift within a story. Not for any use beyond showing how generation can be made cheaper.

**Licence.** MIT, as the project. TinyStories is published under CDLA-Sharing-1.0.

## Ten samples of the large model, unpicked

Temperature {temperature}, at most {sample_tokens} tokens, seeds 0-9.

{samples}
"""
