"""What the benchmark runs: the methods, caches filled without a model, and single measurements.

A run (`AttentionRun`, `DecodeRun`, `PrefillRun`) is one method on one case; `measure` gives the time of one round in
ms. How rounds are arranged, and what becomes of the numbers, is for `helpers.benchmark`.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from helpers.attention import packed_attention_forward
from helpers.attention.reference import packed_attention
from helpers.controller import QUALITY_SCHEDULE, LearnedController
from helpers.files import ROOT
from helpers.generation import PolicyDriver, synchronise
from helpers.kv_cache import PACKED_ATTENTION, PackedKVCache
from helpers.policies import FixedBits, RandomBits
from helpers.stores import AnyStore, FullPrecision, StockQuantized, Store, code_bits, live_bytes, stored_bytes

BLOCK = 16  # steps of a round: one commit of ours falls into each
FILL_BYTES = 2**27  # keys that are made and committed at once while a cache is filled


@dataclass(frozen=True)
class Method:
    """A way to store the cache and to attend to it, under the name that tables and figures give it."""

    name: str
    group: str  # of `plots.GROUP_STYLES`
    store: AnyStore
    attend: str = "dispatched"  # "reference": ours in plain PyTorch; "sdpa": no new token, only the attention
    static: bool = False  # StaticCache in place of what `store` opens

    @property
    def installed(self) -> bool:
        """Whether what it needs is there."""
        return getattr(self.store, "installed", True)

    def open(self, model: PreTrainedModel, capacity: int) -> tuple[Cache, PolicyDriver | None]:
        """An empty cache, with room for `capacity` tokens where room has to be given, and its driver."""
        if self.static:
            return StaticCache(config=model.config, max_cache_len=capacity), None
        return self.store.open(model)


def _learned() -> Store:
    commit, steps = QUALITY_SCHEDULE
    return Store(LearnedController.load(ROOT / "data" / "controllers", "settle", commit, steps))


def _packed(bits: int, attend: str = "dispatched") -> Callable[[], Method]:
    suffix = f" ({attend})" if attend != "dispatched" else ""
    return lambda: Method(f"static {bits}-bit{suffix}", "static", Store(FixedBits(bits)), attend)


def _stock(backend: str) -> Callable[[], Method]:
    return lambda: Method(f"stock {backend} 4-bit", "stock", StockQuantized(backend))


# What --methods names. The first is what every other is compared with.
METHODS: dict[str, Callable[[], Method]] = {
    "dynamic": lambda: Method("DynamicCache", "full precision", FullPrecision()),
    "static-cache": lambda: Method("StaticCache", "full precision", FullPrecision(), static=True),
    "sdpa": lambda: Method("SDPA alone", "full precision", FullPrecision(), "sdpa"),
    "2": _packed(2),
    "4": _packed(4),
    "8": _packed(8),
    "16": _packed(16),
    "mix": lambda: Method("2/4/8/16 mix", "rule", Store(RandomBits())),
    "learned": lambda: Method("learned 8-4-2", "learned at settle", _learned()),
    "reference": _packed(4, "reference"),
    "quanto": _stock("quanto"),
    "hqq": _stock("hqq"),
}


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Time of `work` in ms: by events on CUDA, so that the device's own time counts, else by the clock."""
    if device.type != "cuda":
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        return 1000 * (time.perf_counter() - started)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end)


def copy_bandwidth(device: torch.device, megabytes: int = 256, repeats: int = 7) -> float:
    """Bytes per second, read and written, of copying a buffer much larger than any cache of the processor."""
    source = torch.ones(megabytes * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    times = [timed(device, lambda: target.copy_(source)) for _ in range(repeats + 1)]
    return 2 * source.numel() * 4 / (np.median(times[1:]) / 1000)


@torch.no_grad()
def fill_cache(
    cache: Cache,
    driver: PolicyDriver | None,
    config: PreTrainedConfig,
    tokens: int,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
) -> None:
    """Put `tokens` tokens of normal random keys and values into every layer, committed as a prompt's would be.

    The packed cache takes portions of whole blocks, so that quantizing needs little room; any other cache takes
    everything at once.
    """
    heads, dim = config.num_key_value_heads, config.head_dim
    generator = torch.Generator(device=device).manual_seed(seed)
    portion = tokens
    if driver is not None:
        each = config.num_hidden_layers * batch * heads * dim * 4
        portion = max(BLOCK, FILL_BYTES // each // BLOCK * BLOCK)
    for at in range(0, tokens, portion):
        n = min(portion, tokens - at)
        for layer in range(config.num_hidden_layers):
            states = (torch.randn(batch, heads, n, dim, generator=generator, device=device, dtype=dtype) for _ in "kv")
            cache.update(*states, layer)
        if driver is not None:  # policies that read logits are not among the methods: these are never looked at
            driver.observe(torch.zeros(batch, n, dtype=torch.long, device=device), torch.zeros(batch, n, 1))


class AttentionRun:
    """The attention of one new token a row over `tokens` cached ones, in each of several layers.

    A sweep appends one new key and value to each layer's cache and attends; each layer has tokens of its own, as in a
    model, so that a sweep does not find them all in the processor's cache. After a round the new tokens are taken
    back. Commits are not part of this (see `DecodeRun`).
    """

    def __init__(
        self,
        method: Method,
        shape: LlamaConfig,
        tokens: int,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
        layers: int,
        sweeps: int = BLOCK,
        seed: int = 0,
    ):
        self.method, self.tokens, self.device, self.sweeps, self.layers = method, tokens, device, sweeps, layers
        config = copy.deepcopy(shape)
        config.num_hidden_layers, config._attn_implementation = layers, PACKED_ATTENTION
        self.cache, driver = method.open(SimpleNamespace(config=config), tokens + sweeps)
        fill_cache(self.cache, driver, config, tokens, batch, device, dtype, seed)
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.module = SimpleNamespace(num_key_value_groups=heads // kv_heads, is_causal=True, training=False)
        generator = torch.Generator(device=device).manual_seed(seed + 1)
        sizes = ((batch, heads, 1, dim), (batch, kv_heads, 1, dim), (batch, kv_heads, 1, dim))
        self.new = [torch.randn(size, generator=generator, device=device, dtype=dtype) for size in sizes]
        self.mask = None
        if method.static:  # its attention runs over all it has room for, so that a mask has to say what is real
            self.mask = torch.zeros(1, 1, 1, tokens + sweeps, dtype=torch.bool, device=device)

    @torch.no_grad()
    def sweep(self, step: int = 0) -> list[torch.Tensor]:
        """Attention `[B, 1, heads, D]` of each layer for the new token number `step`."""
        query, key, value = self.new
        if self.mask is not None:
            self.mask[..., : self.tokens + step + 1] = True
        outputs = []
        for layer in range(self.layers):
            if self.method.attend == "sdpa":
                held = self.cache.layers[layer]
                outputs.append(sdpa_attention_forward(self.module, query, held.keys, held.values, None)[0])
                continue
            keys, values = self.cache.update(key, value, layer)
            if self.method.attend == "reference":
                outputs.append(packed_attention(query, keys, None, query.shape[-1] ** -0.5)[0].transpose(1, 2))
            elif isinstance(self.cache, PackedKVCache):
                outputs.append(packed_attention_forward(self.module, query, keys, values, None)[0])
            else:
                outputs.append(sdpa_attention_forward(self.module, query, keys, values, self.mask)[0])
        return outputs

    def measure(self) -> float:
        """Median time of a sweep in ms, for one layer."""
        times = [timed(self.device, lambda step=step: self.sweep(step)) for step in range(self.sweeps)]
        if self.mask is not None:
            self.mask.zero_()
        if self.method.attend != "sdpa":
            self.cache.crop(-self.sweeps)
        return float(np.median(times)) / self.layers

    def facts(self) -> dict[str, float]:
        """Bytes of codes and scales (or plain numbers) that one layer's attention reads, and bytes held."""
        return {
            "read_bytes": read_bytes(self.cache),
            "stored_bytes": stored_bytes(self.cache) / self.layers,
            "code_bits": code_bits(self.cache),
        }


def read_bytes(cache: Cache) -> int:
    """Bytes that attention has to read of the first layer's cached tokens, tail left out: codes and scales, or keys
    and values as they are."""
    if not isinstance(cache, PackedKVCache):
        return sum(x.numel() * x.element_size() for x in (cache.layers[0].keys, cache.layers[0].values))
    parts = [b.side(side, 0) for b in cache.states(0).buckets for side in ("key", "value")]
    return sum(x.numel() * x.element_size() for part in parts for x in part.values())


class DecodeRun:
    """Whole decode steps of a model after `tokens` cached tokens; a round is a block of steps.

    One commit (and, under a schedule, one settling) of ours falls into a block, so that their cost is in every round.
    With `prompt` the cached tokens are read by the model itself, else they are made up. The cache grows by a block a
    round.
    """

    def __init__(
        self,
        method: Method,
        model: PreTrainedModel,
        tokens: int,
        batch: int,
        rounds: int = 1,
        prompt: bool = False,
        seed: int = 0,
    ):
        self.model, self.device = model, model.device
        self.before, self.peak = _allocated(self.device), None
        self.cache, self.driver = method.open(model, tokens + (1 + rounds) * BLOCK)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, model.config.vocab_size, (batch, tokens + BLOCK), generator=generator)
        self.ids = ids.to(self.device)
        if prompt:
            self._read(self.ids[:, :tokens])
        else:
            fill_cache(self.cache, self.driver, model.config, tokens, batch, self.device, model.dtype, seed)
        _reset_peak(self.device)
        self._decode()  # first-use costs, and buffers that grow for the first token, are not a step's

    @torch.no_grad()
    def _read(self, ids: torch.Tensor) -> None:
        logits = self.model(input_ids=ids, cache=self.cache, logits_to_keep=1).logits
        if self.driver is not None:
            self.driver.observe(ids, logits)

    def _decode(self) -> None:
        for step in range(BLOCK):
            self._read(self.ids[:, -1 - step, None])

    def measure(self) -> float:
        """Mean time of a step in ms over the round, commits included."""
        elapsed = timed(self.device, self._decode) / BLOCK
        if self.peak is None:  # later rounds would count what other runs hold
            self.peak = _peak(self.device) - self.before
        return elapsed

    def facts(self) -> dict[str, float]:
        """Bytes held, and the most that was held while decoding beyond the model (CUDA; elsewhere the bytes held)."""
        held = stored_bytes(self.cache)
        return {
            "stored_bytes": held,
            "peak_bytes": self.peak if self.device.type == "cuda" else held,
            "live_bytes": live_bytes(self.cache),
            "code_bits": code_bits(self.cache),
        }


class PrefillRun(DecodeRun):
    """Reading a prompt of `tokens` tokens in one forward, committed as far as the method does; a new cache a round."""

    def __init__(self, method: Method, model: PreTrainedModel, tokens: int, batch: int, seed: int = 0):
        self.method, self.model, self.device = method, model, model.device
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, model.config.vocab_size, (batch, tokens), generator=generator).to(self.device)

    def measure(self) -> float:
        """Time of the forward and of the commit, in ms."""
        self.cache = self.driver = None
        self.before = _allocated(self.device)
        _reset_peak(self.device)
        self.cache, self.driver = self.method.open(self.model, self.ids.shape[1] + 1)
        elapsed = timed(self.device, lambda: self._read(self.ids))
        self.peak = _peak(self.device) - self.before
        return elapsed


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
