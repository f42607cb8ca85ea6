"""Settings of pretraining, and those of the two embedded models."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingSettings:
    """Shape of the model and of its training. Batch sizes count rows of `context` tokens over all processes."""

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
