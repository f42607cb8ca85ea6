"""Settings of pretraining: shape and training of a model, both embedded models', and the options of the command."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class TrainingSettings:
    """Shape of the model and of its training. A batch is counted in sequences of `context` over all processes."""

    layers: int = 6
    hidden: int = 192
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 512
    context: int = 512
    batch: int = 4
    steps: int = 5000
    warmup: int = 100
    muon_lr: float = 0.02
    adamw_lr: float = 4e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0


SIZES = {
    "large": TrainingSettings(),
    "small": TrainingSettings(layers=2, hidden=128, heads=2, kv_heads=1, intermediate=384),
}


@dataclass(frozen=True)
class PretrainOptions:
    """Train a story model from nothing, from text files to a folder in Hugging Face format."""

    out: Path  # folder of the finished model
    text: tuple[str, ...] = ("roneneldan/TinyStories",)  # training texts: story files (.txt, .txt.gz) or hub data sets
    holdout_text: str | None = None  # story file whose last tenth is held out and whose rest is trained on
    size: Literal["large", "small"] = "large"
    tokenizer: str | None = None  # folder with a tokenizer to reuse; without it one is trained
    vocab_size: int = 2048
    steps: int | None = None  # instead of those of the size, as the next two
    batch: int | None = None
    seed: int | None = None
    checkpoint_every: int = 500  # steps

    @property
    def settings(self) -> TrainingSettings:
        """Those of `size`, with what the options change."""
        changed = {name: getattr(self, name) for name in ("steps", "batch", "seed") if getattr(self, name) is not None}
        return TrainingSettings(**asdict(SIZES[self.size]) | changed)
