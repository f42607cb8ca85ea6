"""What the benchmark runs: caches filled without a model, and one method on one case.

`measure` of a run (`AttentionRun`, `DecodeRun`, `PrefillRun`) gives the time of one round in ms. How rounds are
arranged, and what becomes of the numbers, is in `measuring.py`.
"""

import copy
from types import SimpleNamespace

import numpy as np
import torch
from transformers import LlamaConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from helpers.cache import code_bits, live_bytes, stored_bytes
from helpers.cache.attention.dispatch import packed_attention_forward
from helpers.cache.attention.reference import packed_attention
from helpers.cache.kv_cache import PACKED_ATTENTION, PackedKVCache
from helpers.evaluation.benchmark.methods import BenchmarkMethod
from helpers.evaluation.device import allocated_bytes, peak_allocated, reset_peak
from helpers.policies import CachedModel
from helpers.policies.decoding import timed

BLOCK = 16  # steps of a round: one commit of ours falls into each
FILL_BYTES = 2**27  # keys that are made and committed at once while a cache is filled


@torch.no_grad()
def fill_cache(cached: CachedModel, tokens: int, batch: int, seed: int = 0) -> None:
    """Put `tokens` tokens of normal random keys and values into every layer, committed as a prompt's would be.

    The packed cache takes portions of whole blocks, so that quantizing needs little room; any other cache takes
    everything at once. Of the model only configuration, device and dtype are needed.
    """
    model, config, portion = cached.model, cached.model.config, tokens
    heads, dim = config.num_key_value_heads, config.head_dim
    generator = torch.Generator(device=model.device).manual_seed(seed)
    if isinstance(cached.cache, PackedKVCache):
        each = config.num_hidden_layers * batch * heads * dim * 4
        portion = max(BLOCK, FILL_BYTES // each // BLOCK * BLOCK)
    kind = {"generator": generator, "device": model.device, "dtype": model.dtype}
    for at in range(0, tokens, portion):
        n = min(portion, tokens - at)
        for layer in range(config.num_hidden_layers):
            cached.cache.update(*(torch.randn(batch, heads, n, dim, **kind) for _ in "kv"), layer)
        # Policies that read logits are not among the methods: these are never looked at.
        cached.observe(torch.zeros(batch, n, dtype=torch.long, device=model.device), torch.zeros(batch, n, 1))


class AttentionRun:
    """The attention of one new token a row over `tokens` cached ones, in each of several layers.

    A sweep appends one new key and value to each layer's cache and attends; each layer has tokens of its own, as in a
    model, so that a sweep does not find them all in the processor's cache. After a round the new tokens are taken
    back. Commits are not part of this (see `DecodeRun`).
    """

    def __init__(
        self,
        method: BenchmarkMethod,
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
        cached = method.open(SimpleNamespace(config=config, device=device, dtype=dtype), tokens + sweeps)
        fill_cache(cached, tokens, batch, seed)
        self.cache = cached.cache
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
        times = [timed(self.device, self.sweep, step)[1] for step in range(self.sweeps)]
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
    held = [segment.used(0) for _, segment in cache.states(0).segments]
    parts = [x for tokens in held for side in (tokens.key, tokens.value) for x in (side.codes, side.scales)]
    return sum(x.numel() * x.element_size() for x in parts if x is not None)


class DecodeRun:
    """Whole decode steps of a model after `tokens` cached tokens; a round is a block of steps.

    One commit (and, under a schedule, one settling) of ours falls into a block, so that their cost is in every round.
    With `prompt` the cached tokens are read by the model itself, else they are made up. The cache grows by a block a
    round.
    """

    def __init__(
        self,
        method: BenchmarkMethod,
        model: PreTrainedModel,
        tokens: int,
        batch: int,
        rounds: int = 1,
        prompt: bool = False,
        seed: int = 0,
    ):
        self.device = model.device
        self.before, self.peak = allocated_bytes(self.device), None
        self.cached = method.open(model, tokens + (1 + rounds) * BLOCK)
        self.ids = _random_ids(model, batch, tokens + BLOCK, seed)
        if prompt:
            self.cached.read(self.ids[:, :tokens], keep=1)
        else:
            fill_cache(self.cached, tokens, batch, seed)
        reset_peak(self.device)
        self._decode()  # first-use costs, and buffers that grow for the first token, are not a step's

    def _decode(self) -> None:
        for step in range(BLOCK):
            self.cached.read(self.ids[:, -1 - step, None], keep=1)

    def measure(self) -> float:
        """Mean time of a step in ms over the round, commits included."""
        elapsed = timed(self.device, self._decode)[1] / BLOCK
        if self.peak is None:  # later rounds would count what other runs hold
            self.peak = peak_allocated(self.device) - self.before
        return elapsed

    def facts(self) -> dict[str, float]:
        """Bytes held, and the most that was held while decoding beyond the model (CUDA; elsewhere the bytes held)."""
        cache, held = self.cached.cache, stored_bytes(self.cached.cache)
        peak = self.peak if self.device.type == "cuda" else held
        return {
            "stored_bytes": held,
            "peak_bytes": peak,
            "live_bytes": live_bytes(cache),
            "code_bits": code_bits(cache),
        }


class PrefillRun(DecodeRun):
    """Reading a prompt of `tokens` tokens in one forward, committed as far as the method does; a new cache a round."""

    def __init__(self, method: BenchmarkMethod, model: PreTrainedModel, tokens: int, batch: int, seed: int = 0):
        self.method, self.model, self.device = method, model, model.device
        self.ids = _random_ids(model, batch, tokens, seed)

    def measure(self) -> float:
        """Time of the forward and of the commit, in ms."""
        self.cached = None
        self.before = allocated_bytes(self.device)
        reset_peak(self.device)
        self.cached = self.method.open(self.model, self.ids.shape[1] + 1)
        elapsed = timed(self.device, self.cached.read, self.ids, 1)[1]
        self.peak = peak_allocated(self.device) - self.before
        return elapsed


def _random_ids(model: PreTrainedModel, batch: int, tokens: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (batch, tokens), generator=generator).to(model.device)
