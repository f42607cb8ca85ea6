"""Bytes of caches: peak, held and live, of every way to store a cache alike. `python main.py memory`.

Three words, in bytes: *peak*, the largest sum of tensors that the cache owns, makes or hands to attention at any
moment, reading of the prompt included; *held*, every tensor that the cache owns at one moment, spare room included;
*live*, what its tokens need.

`drive_cache` feeds a cache random keys and values, layer by layer, as a model does: bytes do not depend on weights. For
policies that look at logits they do, and `deployment_peak` runs a model.
"""

from collections.abc import Iterable, Sequence
from types import SimpleNamespace

import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from helpers.cache import PackedKVCache, live_bytes, stored_bytes
from helpers.cache.arguments import head_dim
from helpers.cache.kv_cache import PACKED_ATTENTION
from helpers.evaluation.methods import FullPrecision, Group, Method, PackedMethod, stock_methods
from helpers.evaluation.tracing import trace_cache
from helpers.io import ROOT
from helpers.models import SHAPES, shape_config
from helpers.policies import COMPACT_SCHEDULE, MIDDLE_SCHEDULE, FixedBits, LearnedController, RandomBits

EMBEDDED = "embedded large"
DECODED = 64  # tokens that are decoded after a prompt, whole blocks
STOCK_LIMIT = 16384  # tokens beyond which the library's quantized caches are left out: they take minutes
PADDED = 16  # tokens of padding on the left of each row of a batch more than of the row before it
COLUMNS = ("shape", "tokens", "batch", "method", "group", "peak_bytes", "held_bytes", "live_bytes", "counted_peak",
           "full_bytes", "layer_bytes", "peak_share", "held_share", "live_share")  # fmt: skip


def memory_config(shape: str) -> PreTrainedConfig:
    """Configuration of the embedded large model, or of one of `SHAPES`; packed attention is switched on.

    Raises `ValueError` for other names.
    """
    if shape == EMBEDDED:
        config = AutoConfig.from_pretrained(ROOT / "data" / "models" / "large")
    elif shape in SHAPES:
        config = shape_config(shape)
    else:
        raise ValueError(f"shape must be {EMBEDDED!r} or one of {', '.join(SHAPES)}, got {shape!r}")
    config._attn_implementation = PACKED_ATTENTION
    return config


def memory_methods() -> list[Group]:
    """Full precision, fixed widths, learned schedules, widths token by token, and the library's quantized caches."""
    folder = ROOT / "data" / "controllers"
    learned = [LearnedController.load(folder, "settle", *steps) for steps in (COMPACT_SCHEDULE, MIDDLE_SCHEDULE)]
    return [
        Group("full precision", [FullPrecision()]),
        Group("static", [PackedMethod(FixedBits(bits)) for bits in (4, 2)]),
        Group("learned at settle", [PackedMethod(policy) for policy in learned]),
        Group("rule", [PackedMethod(RandomBits(name="widths token by token"))]),
        Group("stock", stock_methods()),
    ]


def full_bytes(config: PreTrainedConfig, tokens: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of the keys and values of `tokens` tokens in all layers, as the model computes them."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim(config) * dtype.itemsize * tokens * batch


@torch.no_grad()
def drive_cache(
    method: Method,
    config: PreTrainedConfig,
    tokens: int,
    batch: int = 1,
    decoded: int = DECODED,
    seed: int = 0,
) -> dict[str, float]:
    """Read a prompt of `tokens` tokens and decode `decoded` more, of random keys and values in float32 on the CPU.

    Rows of a batch are padded on the left, each by `PADDED` tokens more than the one before it. Returns bytes of the
    whole batch: `peak_bytes` (traced), `counted_peak` (what the cache itself says; NaN for the library's), and
    `held_bytes` and `live_bytes` as the last token sees the cache, before its block is committed: the tail is full.
    Raises `ValueError` unless both counts of tokens are 1 or more and the padding leaves half of the prompt.
    """
    if tokens < 1 or decoded < 1 or batch < 1:
        raise ValueError(f"tokens, decoded and batch must be 1 or more, got {tokens}, {decoded} and {batch}")
    if 2 * PADDED * (batch - 1) > tokens:
        raise ValueError(f"a prompt of {tokens} tokens is too short for {batch} rows that are padded by {PADDED} each")
    model = SimpleNamespace(config=config, device=torch.device("cpu"), dtype=torch.float32)
    cached = method.open(model)
    cache, own = cached.cache, isinstance(cached.cache, PackedKVCache)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    generator = torch.Generator().manual_seed(seed)

    def forward(count: int) -> None:
        for layer in range(config.num_hidden_layers):
            keys, values = (torch.randn(batch, heads, count, head_dim(config), generator=generator) for _ in "kv")
            cache.update(keys, values, layer)
            held = cache.layers[layer]
            if own and cache.record_received and held.tail_length > cache.block:  # what attention would say
                held.add_received(torch.ones(batch, heads, held.tail_length))

    def observe(count: int) -> None:
        cached.observe(torch.zeros(batch, count, dtype=torch.long), torch.zeros(batch, count, 1))

    with trace_cache(cache) as trace:
        if own and batch > 1:
            cache.visible = torch.arange(tokens) >= PADDED * torch.arange(batch)[:, None]
        forward(tokens)
        observe(tokens)
        for step in range(decoded):
            forward(1)
            if step + 1 == decoded:
                held, live = stored_bytes(cache), live_bytes(cache)
            observe(1)
    counted = cache.peak_bytes() if own else float("nan")
    return {"peak_bytes": trace.peak_bytes, "held_bytes": held, "live_bytes": live, "counted_peak": counted}


def deployment_peak(
    model: PreTrainedModel, ids: torch.Tensor, method: Method, prompt: int = 256, decoded: int = DECODED
) -> int:
    """Peak bytes of a method's cache while `model` reads a prompt and decodes: tokens of `ids` `[B, tokens]` in turn.

    The text is taken as it is, and may be shorter than `prompt + decoded`.
    """
    cached = method.open(model)
    with trace_cache(cached.cache) as trace:
        cached.read(ids[:, :prompt], keep=1)
        for token in ids[:, prompt : prompt + decoded].split(1, dim=1):
            cached.read(token, keep=1)
    return trace.peak_bytes


def memory_table(
    cases: Iterable[tuple[str, int, int]],
    groups: Sequence[Group],
    stock_limit: int = STOCK_LIMIT,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """`drive_cache` for each case (shape, tokens of the prompt, batch) and method: a row each, columns `COLUMNS`.

    `full_bytes` is what full precision holds at the end, `layer_bytes` one layer of it at the end of the prompt; the
    shares are of `full_bytes`. The library's quantized caches are left out beyond `stock_limit` tokens.
    """
    runs = [
        (case, method, group.name)
        for case in cases
        for group in groups
        for method in group.methods
        if group.name != "stock" or case[1] <= stock_limit
    ]
    rows = []
    for (shape, tokens, batch), method, group in tqdm(runs, desc="memory", disable=not progress, leave=False):
        config = memory_config(shape)
        measured = drive_cache(method, config, tokens, batch, seed=seed)
        full = full_bytes(config, tokens + DECODED, batch)
        row = {"shape": shape, "tokens": tokens, "batch": batch, "method": method.name, "group": group, **measured}
        row |= {"full_bytes": full, "layer_bytes": full_bytes(config, tokens, batch) // config.num_hidden_layers}
        rows.append(row | {f"{name}_share": measured[f"{name}_bytes"] / full for name in ("peak", "held", "live")})
    return pd.DataFrame(rows, columns=COLUMNS)
