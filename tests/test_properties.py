"""Random operation sequences on the cache against a model of plain tensors, and random vectors for the quantizer.

The model knows what was sent, at which width each token of each head must now be stored, and by how much what comes
back may differ: half a step a number in the rotated domain, as derived in `step_bound`. Examples are the same in every
run; `PROPERTY_EXAMPLES=20000 python -m pytest tests/test_properties.py` tries as many others.
"""

import os
from dataclasses import dataclass, field

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from test_kv_cache import all_tensors
from transformers import LlamaConfig

from helpers.cache.attention.reference import packed_attention
from helpers.cache.centre import CENTRE_TOKENS, MEAN_TOKENS
from helpers.cache.kv_cache import PACKED_ATTENTION, PackedKVCache
from helpers.cache.quantization import WIDTHS, dequantize, quantize, rotation_matrix
from helpers.cache.rotary import rotary_of
from helpers.cache.tokens import EMPTY

EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "0"))
SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


def examples(count: int):
    """The settings of a property: the same `count` examples in every run, or as many others as were asked for."""
    return settings(
        max_examples=EXAMPLES or count,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=SLOW_IS_FINE,
    )


def step_bound(x: torch.Tensor, bits: int, refine: bool) -> torch.Tensor:
    """How far (Euclidean, `[...]`) quantizing `x` `[..., n]` may move it.

    A grid from minimum to maximum has steps of range / (2^bits - 1), of which rounding loses half a number. Scale and
    zero are float16: each is off by 2^-11 of itself (or half of its smallest number), which moves the ends of the grid
    by at most (|minimum| + range) 2^-11. The search at 2 bits takes another grid only where the whole error is less.
    Below 8 bits what comes back is then stretched until it is as long along `x` as `x`: an error of sine s (over the
    length of `x`) becomes one of tangent s / sqrt(1 - s^2); by no more than a factor of 2, and rounded once more.
    """
    x = x.double()
    low, high = x.amin(-1), x.amax(-1)
    levels = 2**bits - 1
    rounding = (low.abs() + (high - low)) * 2.0**-11 + (levels + 1) * 2.0**-25
    bound = ((high - low) / (2 * levels) + rounding) * x.shape[-1] ** 0.5
    if bits == 8 or not refine:
        return bound
    length = x.norm(dim=-1)
    sine = (bound / length.clamp(min=1e-300)).clamp(max=1)
    tangent = bound / (1 - sine.square()).sqrt()
    return torch.minimum(tangent.nan_to_num(torch.inf), 2 * length + 3 * bound) + 2 * rounding * x.shape[-1] ** 0.5


VECTORS = st.tuples(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 3), min_size=0, max_size=3),  # leading dimensions
    st.integers(1, 32).map(lambda n: 4 * n),
    st.floats(-3, 3),  # power of ten of the spread
    st.floats(-2, 2),  # mean, in units of the spread
    st.sampled_from(["normal", "constant", "outlier", "two values"]),
)


def vectors(seed: int, leading: list[int], n: int, power: float, mean: float, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*leading, n, generator=generator)
    if kind == "constant":
        x = x[..., :1].expand_as(x).clone()
    elif kind == "outlier":
        x[..., seed % n] *= 30
    elif kind == "two values":
        x = x.sign()
    return (x + mean) * 10**power


@examples(300)
@given(VECTORS, st.sampled_from([2, 4, 8]), st.booleans())
def test_what_is_quantized_comes_back_within_half_a_step(drawn, bits, refine):
    x = vectors(*drawn)
    codes, scales = quantize(x, bits, refine, refine)
    assert codes.shape == (*x.shape[:-1], x.shape[-1] * bits // 8)
    assert (codes.dtype, scales.dtype, scales.shape) == (torch.uint8, torch.float16, (*x.shape[:-1], 2))
    back = dequantize(codes, scales, bits, torch.float32)
    error = (back.double() - x.double()).norm(dim=-1)
    noise = 1e-5 * x.double().norm(dim=-1)  # of float32 arithmetic
    assert (error <= step_bound(x, bits, refine) + noise).all()
    if bits > 4 or not refine:
        step = scales[..., :1].double()
        within = (back.double() - x.double()).abs() <= step / 2 + x.abs().amax(-1, keepdim=True).double() * 2**-9 + 1e-6
        assert within.all()
    # The same numbers in any other place of a batch give the same codes.
    again = quantize(x.reshape(-1, x.shape[-1])[-1:], bits, refine, refine)[0]
    assert torch.equal(again[0], codes.reshape(-1, codes.shape[-1])[-1])


@dataclass
class Shape:
    layers: int
    rows: int
    heads: int
    head_dim: int
    block: int
    quantizer: str
    dtype: torch.dtype
    max_length: int | None
    sinks: int
    centre: str

    @property
    def centred(self) -> bool:
        return self.quantizer == "rotated" and self.centre == "rotary"

    @property
    def waits(self) -> bool:
        """Whether nothing can be committed before there are some tokens."""
        return self.sinks > 0 or self.centred

    def config(self) -> LlamaConfig:
        config = LlamaConfig(
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.heads,
            hidden_size=self.heads * self.head_dim, head_dim=self.head_dim, vocab_size=8, intermediate_size=8,
        )  # fmt: skip
        config._attn_implementation = PACKED_ATTENTION
        return config


SHAPES = st.builds(
    Shape,
    layers=st.integers(1, 3),
    rows=st.integers(1, 3),
    heads=st.integers(1, 2),
    head_dim=st.sampled_from([4, 8, 12, 16, 20, 32]),
    block=st.sampled_from([1, 2, 3, 4, 5, 8, 16]),
    quantizer=st.sampled_from(["rotated", "minmax"]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16]),
    max_length=st.sampled_from([None, None, 24, 100]),
    sinks=st.sampled_from([0, 1, 4, 4, 8]),
    centre=st.sampled_from(["rotary", "rotary", "none"]),
)


@dataclass
class DenseCache:
    """What a cache must hold, in plain tensors `[L, B, H, tokens, ...]`."""

    shape: Shape
    states: dict[str, torch.Tensor] = field(default_factory=dict)  # "key", "value" as they were sent
    bits: dict[str, torch.Tensor] = field(default_factory=dict)  # width now, 0 in the tail
    bound: dict[str, torch.Tensor] = field(default_factory=dict)  # how far it may be from what was sent
    pending: dict[tuple[int, int], list[tuple[int, int]]] = field(default_factory=dict)  # widths -> (start, tokens)
    committed: int = 0
    centre: torch.Tensor | None = None

    @property
    def length(self) -> int:
        return self.states["key"].shape[3] if self.states else 0

    @property
    def committable(self) -> int:
        ready = (self.length - self.committed) // self.shape.block * self.shape.block
        return ready if ready >= CENTRE_TOKENS or self.committed or not self.shape.waits else 0

    def update(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        for side, new in (("key", keys), ("value", values)):
            parts = [new] if side not in self.states else [self.states[side], new]
            self.states[side] = torch.cat(parts, dim=3)
            blank = torch.zeros(new.shape[:4])
            for record in (self.bits, self.bound):
                record[side] = torch.cat([record[side], blank.double()] if side in record else [blank.double()], dim=3)

    def coded(self, x: torch.Tensor, side: str, first: int) -> torch.Tensor:
        """`x` `[L, B, H, n, D]`, from position `first` on, as the quantizer sees it: keys centred, both rotated."""
        x = x.double()
        if self.shape.quantizer == "minmax":
            return x
        if side == "key" and self.shape.centred:
            block = self.shape.block
            middles = torch.arange(first, first + x.shape[3]) // block * block + (block - 1) / 2
            x = x - self.turned(self.centre[:, :, :, None], middles)
        return x @ rotation_matrix(x.shape[-1])

    def turned(self, x: torch.Tensor, positions: torch.Tensor, back: bool = False) -> torch.Tensor:
        rotary, dim = rotary_of(self.shape.config(), self.shape.head_dim), self.shape.head_dim
        return rotary.turn(x, rotary.phases(positions, dim, torch.float64), back=back)

    def commit(self, widths: torch.Tensor, pending: bool) -> None:
        """`widths` `[B, n, 2]`: of keys and of values."""
        n = widths.shape[1]
        at = slice(self.committed, self.committed + n)
        if not self.committed and self.shape.centred:
            keys = self.turned(self.states["key"].double(), torch.arange(self.length), back=True)
            self.centre = keys[:, :, :, self.shape.sinks : self.shape.sinks + MEAN_TOKENS].mean(3)
        sinks = torch.arange(self.committed, self.committed + n) < self.shape.sinks
        widths = torch.where(sinks[:, None], 16, widths)
        for number, side in enumerate(("key", "value")):
            wide = widths[None, :, None, :, number].expand(self.shape.layers, -1, self.shape.heads, -1)
            self.bits[side][:, :, :, at] = wide.double()
            self._widen_bound(side, at, self.states[side][:, :, :, at], wide)
        if pending:
            pair, block = tuple(widths[0, -1].tolist()), self.shape.block
            for start in range(self.committed, self.committed + n, block):
                gone = min(max(self.shape.sinks - start, 0), block)
                if gone < block:
                    self.pending.setdefault(pair, []).append((start + gone, block - gone))
        self.committed += n

    def _widen_bound(self, side: str, at: slice, x: torch.Tensor, wide: torch.Tensor) -> None:
        y = self.coded(x, side, at.start)
        for bits in (2, 4, 8):
            self.bound[side][:, :, :, at] += torch.where(
                wide == bits, step_bound(y, bits, self.shape.quantizer == "rotated"), 0.0
            )
        half = x.double().abs().amax(-1) * 2.0**-11 * x.shape[-1] ** 0.5 + 2.0**-24 * x.shape[-1]
        self.bound[side][:, :, :, at] += torch.where(wide == 16, half, 0.0)

    def settle(self, source, target, blocks: int, keep: int, scores, pending: bool, held: dict) -> None:
        """`held` is what the cache gave back before, from which it must now quantize again."""
        taken, at = self.pending[source][:blocks], 0
        del self.pending[source][:blocks]
        if pending:
            self.pending.setdefault(target, []).extend(taken)
        for start, size in taken:
            moves = torch.ones(self.shape.layers, len(self.bits["key"][0]), self.shape.heads, size, dtype=torch.bool)
            if keep:
                best = scores[..., at : at + size].topk(min(keep, size), dim=-1).indices
                moves.scatter_(-1, best, False)
            at += size
            span = slice(start, start + size)
            for number, side in enumerate(("key", "value")):
                if source[number] == target[number]:
                    continue
                wide = torch.where(moves, target[number], 0)
                self._widen_bound(side, span, held[side][:, :, :, span], wide)
                self.bits[side][:, :, :, span][moves] = target[number]

    def crop(self, removed: int) -> None:
        length = max(0, self.length - removed)
        for record in (self.states, self.bits, self.bound):
            for side, value in record.items():
                record[side] = value[:, :, :, :length]
        self.committed = min(self.committed, length)
        for pair, blocks in self.pending.items():
            cut = [(start, min(size, length - start)) for start, size in blocks]
            self.pending[pair] = [(start, size) for start, size in cut if size > 0]

    def rows(self, index: list[int]) -> None:
        for record in (self.states, self.bits, self.bound):
            for side, value in record.items():
                record[side] = value[:, index]
        self.centre = None if self.centre is None else self.centre[:, index]


def held(cache: PackedKVCache) -> dict[str, torch.Tensor]:
    """What the cache gives back, `[L, B, H, tokens, D]`, in its own precision."""
    result = {"key": [], "value": []}
    for number, layer in enumerate(cache.layers):
        states = cache.states(number)
        tails = {"key": states.tail_keys.double(), "value": states.tail_values.double()}
        if states.store is not None:
            committed = states.store.dense(states.layer, cache.committed)
            tails = {side: torch.cat([next(committed).double(), tail], dim=2) for side, tail in tails.items()}
        for side, whole in tails.items():
            result[side].append(whole)
        assert layer.get_seq_length() == cache.get_seq_length()
    return {side: torch.stack(parts) for side, parts in result.items()}


def check(cache: PackedKVCache, model: DenseCache) -> None:
    """The cache holds what the model holds: lengths, widths, order, numbers within their bounds, bytes."""
    assert (cache.get_seq_length(), cache.committed) == (model.length, model.committed)
    assert cache.committable == model.committable
    walk = {name: value for name, value in vars(cache).items() if name != "config"}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in all_tensors(walk)}
    del storages[cache.handle.untyped_storage().data_ptr()]  # a number by which compiled code finds the cache
    assert cache.stored_bytes() == sum(storages.values())
    assert 0 <= cache.live_bytes() <= cache.stored_bytes()
    if not model.length:
        return
    now, committed = held(cache), model.committed
    for side in ("key", "value"):
        sent = model.states[side].double()
        assert torch.equal(now[side][:, :, :, committed:], sent[:, :, :, committed:])
        distance = (now[side] - sent).norm(dim=-1)[:, :, :, :committed]
        arithmetic = 1e-5 * (sent.norm(dim=-1) + sent[:, :, :, :CENTRE_TOKENS].norm(dim=-1).amax(-1, keepdim=True))
        assert (distance <= model.bound[side][:, :, :, :committed] + arithmetic[:, :, :, :committed]).all(), side
        full = (model.bits[side] == 16)[:, :, :, :committed]
        if model.shape.dtype != torch.float32:  # 16 bits keep half precision as it is
            assert torch.equal(now[side][:, :, :, :committed][full], sent[:, :, :, :committed][full])
    average = (model.bits["key"] + model.bits["value"])[:, :, :, :committed].mean((0, 2)) / 2
    assert torch.allclose(cache.token_bits()[:, :committed].double(), average, atol=1e-4)
    for pair in [(k, v) for k in WIDTHS for v in WIDTHS]:
        assert cache.pending_blocks(pair) == len(model.pending.get(pair, []))
    check_slots(cache, model)


def check_slots(cache: PackedKVCache, model: DenseCache) -> None:
    """Every committed token is in exactly one slot of every head, in the bucket of its widths."""
    if not model.committed:
        assert not cache.stores
        return
    (store,) = cache.stores
    seen = torch.zeros(model.bits["key"][:, :, :, : model.committed].shape, dtype=torch.long)
    for stage, segment in store.layout.segments():
        used = segment.used().token != EMPTY
        at = segment.used().positions().masked_fill(~used, 0)
        assert (at < model.committed).all()
        seen.scatter_add_(3, at, used.long())
        for side, bits in (("key", stage.key_bits), ("value", stage.value_bits)):
            assert (model.bits[side].gather(3, at)[used] == bits).all()
        assert segment.ragged or bool(used.all())  # attention looks for empty slots only where it is told to
    for stage, bucket in store.layout.buckets.items():
        if stage.pending:
            assert bucket.blocks == model.pending.get((stage.key_bits, stage.value_bits), [])
    assert (seen == 1).all()


def check_attention(cache: PackedKVCache, model: DenseCache, generator: torch.Generator) -> None:
    """Attention over the packed tokens is attention over what comes back."""
    if not model.committed or model.shape.dtype != torch.float32:
        return
    layer = model.shape.layers - 1
    query = torch.randn(len(model.states["key"][0]), model.shape.heads, 1, model.shape.head_dim, generator=generator)
    keys, values = (x[layer] for x in held(cache).values())
    scale = float(keys.norm(dim=-1).max().clamp(min=1e-3)) ** -1
    if model.length == model.committed:
        return  # a query is always the newest token, which is in the tail
    output, _ = packed_attention(query, cache.states(layer), None, scale)
    weights = (query.double() @ keys.mT * scale).softmax(-1)
    assert torch.allclose(output.double(), weights @ values, atol=1e-4 * float(values.abs().max()) + 1e-6)


@st.composite
def widths_of(draw, rows: int, tokens: int):
    """What `commit` takes, the same as a tensor `[B, tokens, 2]`, and whether the tokens may be settled later."""
    kind = draw(st.sampled_from(["pending", "pending pair", "mixed", "one", "pair"]))
    if kind == "mixed":
        each = draw(st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=7))
        seed = draw(st.integers(0, 99))
        chosen = torch.from_numpy(np.random.default_rng(seed).choice(each, size=(rows, tokens)))
        return chosen, chosen[..., None].expand(rows, tokens, 2), False
    pair = draw(st.tuples(*[st.sampled_from(WIDTHS)] * 2)) if "pair" in kind else (draw(st.sampled_from(WIDTHS)),) * 2
    told = pair if "pair" in kind else pair[0]
    return told, torch.tensor(pair).expand(rows, tokens, 2), kind.startswith("pending")


def in_turn(scores: torch.Tensor):
    """What `settle` takes: it asks for the scores of blocks of one size at a time, the oldest first."""
    at = 0

    def next_scores(demotion):
        nonlocal at
        at += demotion.key_error.shape[-1]
        return scores[..., at - demotion.key_error.shape[-1] : at]

    return next_scores


OPERATIONS = ("update", "commit", "settle", "crop", "reorder", "repeat", "select", "offload", "reset")
OFTEN = ("settle", "settle", "settle", "commit", "commit", "update")
COUNTS: dict[str, int] = dict.fromkeys([*OPERATIONS, "sequences"], 0)


@examples(600)
@given(SHAPES, st.data())
def test_a_cache_holds_what_a_plain_list_of_tensors_holds(shape, data):
    more = shape.sinks, shape.centre, None
    cache = PackedKVCache(shape.config(), None, shape.block, shape.quantizer, shape.max_length, *more)
    cache.record_received = data.draw(st.booleans(), label="record received attention")
    model = DenseCache(shape)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    magnitude = 10 ** data.draw(st.sampled_from([-2.0, 0.0, 0.0, 2.0]), label="magnitude")
    rows = shape.rows
    COUNTS["sequences"] += 1
    for _ in range(data.draw(st.integers(4, 14), label="operations")):
        waiting = [(pair, len(blocks)) for pair, blocks in model.pending.items() if blocks]
        possible = {"commit": model.committable > 0, "settle": bool(waiting)}
        choice = [name for name in (*OFTEN, *OPERATIONS) if model.length and possible.get(name, True)] or ["update"]
        operation = data.draw(st.sampled_from(choice), label="operation")
        if operation == "update":
            tokens = data.draw(st.integers(1, 40) if model.length else st.integers(8, 60), label="tokens")
            size = (2, shape.layers, rows, shape.heads, tokens, shape.head_dim)
            keys, values = (torch.randn(size, generator=generator) * magnitude).to(shape.dtype)
            for layer in range(shape.layers):
                cache.update(keys[layer], values[layer], layer)
            model.update(keys, values)
        elif operation == "commit":
            blocks = data.draw(st.integers(1, model.committable // shape.block), label="blocks")
            tokens = blocks * shape.block
            if not model.committed and shape.waits:
                tokens = max(tokens, -(-CENTRE_TOKENS // shape.block) * shape.block)
                tokens = min(tokens, model.committable)
            told, widths, pending = data.draw(widths_of(rows, tokens), label="widths")
            cache.commit(told, tokens, pending)
            model.commit(widths, pending)
        elif operation == "settle":
            source, most = data.draw(st.sampled_from(waiting), label="source")
            lower = [[w for w in WIDTHS if w <= bits] for bits in source]
            target = data.draw(st.tuples(*map(st.sampled_from, lower)), label="target")
            again = data.draw(st.booleans(), label="pending again") and target != source
            blocks = data.draw(st.integers(1, most), label="blocks")
            keep = 0 if again else data.draw(st.integers(0, shape.block), label="keep")
            slots = sum(size for _, size in model.pending[source][:blocks])
            scores = torch.rand(shape.layers, rows, shape.heads, slots, generator=generator)
            before = held(cache)
            cache.settle(source, target, blocks, keep, in_turn(scores) if keep else None, again)
            model.settle(source, target, blocks, keep, scores, again, before)
        elif operation == "crop":
            removed = data.draw(st.integers(0, model.length + 2), label="removed")
            cache.crop(-removed)
            model.crop(removed)
        elif operation == "reset":
            cache.reset()
            model = DenseCache(shape)
            rows = shape.rows
        elif operation == "offload":
            for layer in cache.layers:
                layer.offload()
            for layer in cache.layers:
                layer.prefetch()
        else:
            index = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=3), label="rows")
            if operation == "repeat":
                index = [row for row in range(rows) for _ in range(2 if rows < 3 else 1)]
                cache.batch_repeat_interleave(len(index) // rows)
            elif operation == "reorder":
                cache.reorder_cache(torch.tensor(index))
            elif data.draw(st.booleans(), label="by mask"):
                index = sorted(set(index))
                cache.batch_select_indices(torch.tensor([row in index for row in range(rows)]))
            else:
                cache.batch_select_indices(torch.tensor(index))
            rows = len(index)
            model.rows(index)
        COUNTS[operation] += 1
        check(cache, model)
    check_attention(cache, model, generator)


def test_every_operation_was_among_them():
    """Runs after the property above: sequences in which nothing happens would prove nothing."""
    if not COUNTS["sequences"]:
        pytest.skip("the property did not run")
    assert COUNTS["sequences"] >= 500
    assert min(COUNTS[operation] for operation in OPERATIONS) >= 100, COUNTS
