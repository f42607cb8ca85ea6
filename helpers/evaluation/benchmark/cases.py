"""What is measured: settings, and the cases that follow from them."""

from dataclasses import dataclass

import torch

from helpers.evaluation.benchmark.methods import METHODS
from helpers.models import SHAPES, shape_config

KINDS = ("attention", "decode", "prefill", "embedded")
SWEEP_BYTES = 2**28  # plain keys and values of the layers that an attention sweep goes through
LONG, LONG_SWEEPS = 4096, 4  # from this context on a round has fewer sweeps
STOCK = ("quanto", "hqq")
STOCK_LIMIT = 8192  # tokens beyond which these take minutes a round on a CPU
ATTENTION_METHODS = ("dynamic", "static-cache", "sdpa", "2", "4", "8", "16", "mix", "learned", "reference")
DECODE_METHODS = ("dynamic", "static-cache", "2", "4", "8", "16", "mix", "learned", *STOCK)
CPU_DECODE_METHODS = ("dynamic", "static-cache", "4", "balanced", "learned", *STOCK)
PROMPT_METHODS = ("dynamic", "4", "balanced", "learned")


@dataclass(frozen=True)
class Settings:
    """What is measured; an empty tuple leaves the choice to the device (see `plan`)."""

    kinds: tuple[str, ...] = KINDS
    shapes: tuple[str, ...] = ()
    contexts: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    methods: tuple[str, ...] = ()
    rounds: int = 5
    seed: int = 0
    quick: bool = False

    def __post_init__(self):
        for name, known in (("kinds", KINDS), ("shapes", SHAPES), ("methods", METHODS)):
            if unknown := [value for value in getattr(self, name) if value not in known]:
                raise ValueError(f"{name} must be of {', '.join(known)}; got {', '.join(unknown)}")
        for name in ("contexts", "batches"):
            if any(value < 1 for value in getattr(self, name)):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be 1 or more, got {self.rounds}")


@dataclass(frozen=True)
class Case:
    """One comparison: a kind, a shape and a size, and the keys of the methods that take part."""

    kind: str
    shape: str
    context: int
    batch: int
    methods: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind}, {self.shape}, {self.context:,} tokens x {self.batch}"


def plan(settings: Settings, device: torch.device) -> list[Case]:
    """The cases of a run. Without choices: on a CPU what its targets need, on CUDA all shapes, contexts and batches."""
    cuda = device.type == "cuda"
    large = ("SmolLM-360M", "SmolLM-1.7B", "Llama-2-7B")
    models = tuple(SHAPES) if cuda else ("SmolLM-135M",)
    batches = (1, 8) if cuda else (1,)
    defaults = {
        "attention": (
            large if cuda else ("SmolLM-360M",),
            (512, 4096, 32768) if cuda else (128, 512, 4096, 32768),
            batches,
            ATTENTION_METHODS,
        ),
        "decode": (
            models,
            (512, 1024, 4096, 32768) if cuda else (512, 4096, 16384),
            batches,
            DECODE_METHODS if cuda else CPU_DECODE_METHODS,
        ),
        "prefill": (models, (2048,), (1,), PROMPT_METHODS),
    }
    cases = []
    for kind in settings.kinds:
        allowed = [key for key in METHODS if key not in (STOCK if kind == "attention" else ("sdpa", "reference"))]
        if kind == "embedded":
            methods = tuple(key for key in settings.methods or PROMPT_METHODS if key in allowed)
            cases.append(Case(kind, "large", 256, 1, methods))
            continue
        shapes, contexts, batches, methods = defaults[kind]
        if settings.quick:
            shapes, contexts = shapes[:1], contexts[:2]
        methods = [key for key in settings.methods or methods if key in allowed]
        for shape in settings.shapes or shapes:
            for batch in settings.batches or batches:
                for context in (() if kind == "prefill" else settings.contexts) or contexts:
                    slow = () if cuda or settings.methods or context <= STOCK_LIMIT else STOCK
                    cases.append(Case(kind, shape, context, batch, tuple(k for k in methods if k not in slow)))
    return cases


def layer_bytes(case: Case, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one layer in full precision."""
    config = shape_config(case.shape)
    return 2 * case.batch * case.context * config.num_key_value_heads * config.head_dim * dtype.itemsize


def sweep_layers(case: Case, dtype: torch.dtype) -> int:
    """Layers that an attention sweep goes through: as many as fill `SWEEP_BYTES`, two at least."""
    return min(shape_config(case.shape).num_hidden_layers, max(2, SWEEP_BYTES // layer_bytes(case, dtype)))


def plain_bytes(case: Case, dtype: torch.dtype) -> int:
    """Bytes of the full-precision cache of a case, of the layers that are there."""
    if case.kind == "embedded":
        return 0
    layers = sweep_layers(case, dtype) if case.kind == "attention" else shape_config(case.shape).num_hidden_layers
    return layers * layer_bytes(case, dtype)
