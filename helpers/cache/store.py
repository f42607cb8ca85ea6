"""`PackedStore`: the packed tokens of all layers that share a device and a shape.

It has a codec for keys, one for values, and for each layer a `Layout`. Here tokens are committed, settled and read
back; nothing is known of models, policies or attention. Between forwards all layers share one layout. While a prompt
is read, each layer is committed as soon as the next one begins (`layer=`): the layers that are done are then ahead of
the others, in buffers that the first of them made for all.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch

from helpers.cache.bucket import Stage
from helpers.cache.codec import Coding
from helpers.cache.layout import Layout, Run, leading, pop_runs
from helpers.cache.order import NONE, by_width, in_text_order, places
from helpers.cache.plan import Demotion, Plan, Scores
from helpers.cache.quantization import FULL_WIDTH
from helpers.cache.tokens import EMPTY, SLOT_DIM, PackedTokens, joined, take

PORTION = 512  # tokens of one layer that are coded at once, so that what is made on the way stays small
HELD = Stage(8, 8, pending=True)  # tokens of a prompt whose width is not chosen yet


class PackedStore:
    """The packed tokens of the layers `layers`, which share a device, `kv_heads` and head dimensions."""

    def __init__(
        self,
        layers: list[int],
        keys: torch.Tensor,
        values: torch.Tensor,
        coding: Coding,
        reserved: int | None = None,
        note: Callable[..., None] = lambda *tensors: None,
    ):
        """`keys`, `values` `[B, H, n, D]` are those of any of the layers, for shapes, dtype and device.

        `reserved`: slots that each bucket allocates at once. `note` is told of every tensor that is made.
        """
        self.layers, self.reserved, self.device, self.note = layers, reserved or 0, keys.device, note
        self.key, self.value = coding.codecs(keys, values, layers, note)
        self.sinks: np.ndarray | None = None  # [B, first tokens]: which of them stay at 16 bits, if any
        self.dtype = self.key.dtype
        self.layouts = [Layout()] * len(layers)  # of each layer; one object for layers that agree
        self._made: list[PackedTokens] = []  # for a prompt: buffers in the order in which the first layer made them
        self._taken: int | None = None  # of these, how many the present layer took; None: all layers go together

    @property
    def layout(self) -> Layout:
        """The layout of all layers between forwards, else of those that are least ahead."""
        return self.layouts[-1]

    def _open(self, layer: int | None) -> tuple[Layout, slice]:
        """The layout that is about to change, and the layers that it stands for."""
        if layer is None:
            self.layout.changed()
            return self.layout, slice(None)
        self._taken = 0
        self.layouts[layer] = self.layouts[layer].copy()
        return self.layouts[layer], slice(layer, layer + 1)

    def _close(self, layout: Layout, layer: int | None) -> None:
        self._taken = None
        for bucket in layout.buckets.values():
            bucket.expected = 0
        if layer is not None and layer == len(self.layers) - 1:
            self.layouts = [self.layouts[layer]] * len(self.layers)
            self._made = []

    def _allocate(self, example: PackedTokens, slots: int) -> PackedTokens:
        """Buffers of `slots` slots for all layers: what an earlier layer of this prompt made, or new ones."""
        if self._taken is not None:
            self._taken += 1
            if self._taken <= len(self._made):
                return self._made[self._taken - 1]

        def empty(x: torch.Tensor) -> torch.Tensor:
            layers = 1 if x is example.block_start else len(self.layers)
            return x.new_zeros(layers, *x.shape[1:SLOT_DIM], slots, *x.shape[SLOT_DIM + 1 :])

        buffers = example.map(empty)
        buffers.token.fill_(EMPTY)
        self.note(*buffers.named().values())
        if self._taken is not None:
            self._made.append(buffers)
        return buffers

    def commit(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        first: int,
        block: int,
        plan: Plan | None,
        widths: np.ndarray | None = None,
        received: torch.Tensor | None = None,
        layer: int | None = None,
    ) -> torch.Tensor:
        """Quantize `keys`, `values` `[L, B, H, n, D]`, the tokens at positions `first, first + 1, ...`.

        By `plan`, under which blocks that are old enough move on, or at `widths` `[B, n]`, or with neither at 8 bits
        until `decide`. `received` `[L, B, H, n]` is the attention that they got in the tail. `layer` says that they
        are of one layer alone, the next of a prompt. Returns one number: finite if everything that was stored is, see
        `Codec.magnitude`.
        """
        layout, layers = self._open(layer)
        n = keys.shape[3]
        total, sinks = 0, self._sinks(first, n)
        if sinks is not None and widths is not None:
            widths = widths.copy()
            widths[:, : sinks.shape[1]][sinks] = FULL_WIDTH
        elif sinks is not None:
            some = slice(0, sinks.shape[1])
            only = np.where(sinks, FULL_WIDTH, NONE)
            total = self._commit_mixed(
                layout, layers, keys[:, :, :, some], values[:, :, :, some], first, block, only, exact=True
            )
        if plan is not None:
            self._expect(layout, plan, n // block, block, 0 if sinks is None else leading(sinks))
        portion = n if layer is None else max(1, PORTION // block) * block
        coming = []
        for at in range(0, n, portion):
            part = slice(at, min(at + portion, n))
            states = keys[:, :, :, part], values[:, :, :, part]
            seen = None if received is None else received[:, :, :, part].half()  # sums of at most some thousand shares
            if widths is not None:
                total = total + self._commit_mixed(layout, layers, *states, first + at, block, widths[:, part])
                continue
            bits = (HELD.key_bits, HELD.value_bits) if plan is None else plan.pair
            token, start = places(states[0], first + at, block)
            key, value = (
                codec.encode(x, width, start, layers)
                for codec, x, width in zip((self.key, self.value), states, bits, strict=True)
            )
            total = total + (self.key.magnitude(key) + self.value.magnitude(value))
            tokens = PackedTokens(key, value, token, start, seen if plan is not None and plan.steps else None)
            if plan is None:
                run = Run(tokens, first + at, tokens.token.shape[SLOT_DIM])
                run = run if sinks is None else run.without(sinks[:, part])
                layout.bucket(HELD).append_block(run.tokens, layers, self._allocate, run.first, run.ragged)
            else:
                coming.append(tokens)
        if coming:
            runs = [Run(joined(coming), first, block)]
            self._advance(layout, layers, runs if sinks is None else runs[0].parted(sinks), plan, block)
        self._close(layout, layer)
        return total

    def fix_centre(
        self, keys: torch.Tensor, real: torch.Tensor | None, length: int, layers: slice = slice(None)
    ) -> None:
        """Centre the keys of some layers by the first of them, `keys` `[L, B, H, n, D]`, before `length` are coded.

        `real` `[B, n]` is False for padding, None where there is none.
        """
        real = None if real is None else real.to(self.device)
        self.key.centre.fix(keys, real, layers, len(self.layers))
        self.reserve(length)

    def reserve(self, length: int) -> None:
        """Be ready for `length` tokens, before any of them is read or coded."""
        if self.key.centre is not None and self.key.centre.reserve(length):
            for layout in self.layouts:
                layout.changed()

    def _sinks(self, first: int, n: int) -> np.ndarray | None:
        """Which of the tokens `first` to `first + n - 1` are sinks: `[B, up to n]`, None where none is."""
        sinks = None if self.sinks is None else self.sinks[:, first : first + n]
        return sinks if sinks is not None and sinks.any() else None

    def _expect(self, layout: Layout, plan: Plan, blocks: int, block: int, sinks: int) -> None:
        """Tell the buckets that nothing leaves how many slots are coming, so that they are allocated in one piece."""
        if not plan.steps:
            layout.bucket(Stage(*plan.pair), self.reserved).expected = blocks * block - sinks
            return
        stages = [Stage(*bits, True) for bits in (plan.pair, *(step.pair for step in plan.steps[:-1]))]
        waiting = sum(len(layout.buckets[stage].blocks) for stage in stages if stage in layout.buckets)
        settled = max(0, waiting + blocks - plan.steps[-1].after)
        source, target = (stages[-1].key_bits, stages[-1].value_bits), plan.steps[-1].pair
        for bits, slots in _shares(source, target, plan.steps[-1].kept(block), block):
            stage = Stage(*bits)
            if settled * slots:
                layout.bucket(stage, self.reserved).expected += settled * slots

    def _commit_mixed(
        self,
        layout: Layout,
        layers: slice,
        keys: torch.Tensor,
        values: torch.Tensor,
        first: int,
        block: int,
        widths: np.ndarray,
        exact: bool = False,
    ) -> torch.Tensor:
        """Commit tokens at the width that `widths` `[B, n]` has for each; `exact` leaves no room for more."""
        token, start = places(keys, first, block)
        total = 0
        for bits, counts, slots, valid in by_width(widths, keys.device):
            starts = take(start, slots)
            key, value = (
                codec.encode(take(states, slots), bits, starts, layers)
                for codec, states in ((self.key, keys), (self.value, values))
            )
            tokens = PackedTokens(key, value, take(token, slots).masked_fill(~valid, EMPTY), starts)
            bucket = layout.bucket(Stage(bits, bits), self.reserved)
            bucket.append(tokens, layers, self._allocate, counts, exact=exact)
            total = total + (self.key.magnitude(key) + self.value.magnitude(value))
        return total

    def decide(self, widths: np.ndarray) -> None:
        """Move the oldest tokens that are held at 8 bits to their `widths` `[B, n]`; 16 bits stay at 8."""
        layout, layers = self._open(None)
        bucket, at = layout.bucket(HELD), 0
        while at < widths.shape[1]:
            (run,) = pop_runs(bucket, layers, 1)
            if at + run.size > widths.shape[1]:  # only a part is decided: the rest waits on
                ready = widths.shape[1] - at
                rest = run.tokens.map(lambda x, ready=ready: x[:, :, :, ready:].clone())
                bucket.put_back(rest, layers, self._allocate, run.first + ready, run.ragged)
                run = Run(run.tokens.map(lambda x, ready=ready: x[:, :, :, :ready]), run.first, ready, run.ragged)
            part = np.where(widths[:, at : at + run.size] == FULL_WIDTH, HELD.key_bits, widths[:, at : at + run.size])
            ragged = run.ragged
            if (sinks := self._sinks(run.first, run.size)) is not None:
                part[:, : sinks.shape[1]][sinks] = NONE
                ragged = bool(((run.tokens.token[0, :, 0] == EMPTY).cpu().numpy() & (part != NONE)).any())
            for bits, counts, slots, valid in by_width(part, self.device):
                tokens = run.tokens.take(slots)
                self.note(*tokens.named().values())
                key, _ = self.key.requantize(tokens.key, bits, tokens.block_start)
                value, _ = self.value.requantize(tokens.value, bits, tokens.block_start)
                tokens = PackedTokens(key, value, tokens.token.masked_fill(~valid, EMPTY), tokens.block_start)
                layout.bucket(Stage(bits, bits), self.reserved).append(tokens, layers, self._allocate, counts, ragged)
            at += run.size

    def settle(
        self,
        source: Stage,
        target: tuple[int, int],
        blocks: int,
        keep: tuple[int, int],
        scores: Scores | None,
        pending: bool,
    ) -> None:
        """Re-quantize the oldest `blocks` of the pending bucket `source` to `target` (key bits, value bits).

        With `keep`, each layer, row and head leaves so many keys and so many values of a block, those that `scores`
        puts highest, at the widths they have; all are then settled.
        """
        layout, layers = self._open(None)
        for run in pop_runs(layout.bucket(source), layers, blocks):
            moved = self._demote(layout, layers, run, source, target, keep, scores, pending)
            if moved is not None:
                self._store(layout, layers, moved, Stage(*target, pending))

    def _advance(self, layout: Layout, layers: slice, coming: list[Run], plan: Plan, block: int) -> None:
        """Let blocks enter the first stage of `plan`, and all that are old enough move on."""
        runs, bits, waited = coming, plan.pair, 0
        for step in plan.steps:
            source, bucket = Stage(*bits, True), layout.bucket(Stage(*bits, True))
            excess = len(bucket.blocks) + sum(run.blocks for run in runs) - (step.after - waited)
            moving = pop_runs(bucket, layers, max(0, min(excess, len(bucket.blocks))))
            excess -= sum(run.blocks for run in moving)
            for run in runs:
                go = max(0, min(excess, run.blocks))
                excess -= go
                moving += [run.part(0, go)] if go else []
                if go < run.blocks:
                    self._store(layout, layers, run.part(go, run.blocks), source)
            pending = step is not plan.steps[-1]
            keep, runs = step.kept(block), []
            for run in moving:
                moved = self._demote(layout, layers, run, source, step.pair, keep, plan.scores, pending)
                runs += [] if moved is None else [moved]
            bits, waited = step.pair, step.after
        for run in runs:
            self._store(layout, layers, run, Stage(*bits))

    def _store(self, layout: Layout, layers: slice, run: Run, stage: Stage) -> None:
        """Put tokens into the bucket of a stage."""
        bucket = layout.bucket(stage, self.reserved)
        if not stage.pending:
            bucket.append(run.tokens, layers, self._allocate, ragged=run.ragged)
            return
        for number in range(run.blocks):
            block = run.part(number, number + 1)
            bucket.append_block(block.tokens, layers, self._allocate, block.first, run.ragged)

    def _demote(
        self,
        layout: Layout,
        layers: slice,
        run: Run,
        source: Stage,
        target: tuple[int, int],
        keep: tuple[int, int],
        scores: Scores | None,
        pending: bool,
    ) -> Run | None:
        """Move blocks to the widths `target`, but for the best `keep` keys and values of each, which settle as they
        are."""
        most, at_once = min(max(keep), run.size), max(1, PORTION // run.size)
        if run.blocks > at_once:
            starts = range(0, run.blocks, at_once)
            parts = [run.part(at, min(at + at_once, run.blocks)) for at in starts]
            moved = [self._demote(layout, layers, part, source, target, keep, scores, pending) for part in parts]
            if moved[0] is None:
                return None
            return replace(moved[0], tokens=joined([part.tokens for part in moved]))
        (key, key_error), (value, value_error) = (
            codec.requantize(codes, bits, run.tokens.block_start, most > 0, layers)
            for codec, codes, bits in zip(
                (self.key, self.value), (run.tokens.key, run.tokens.value), target, strict=True
            )
        )
        tokens = replace(run.tokens, received=run.tokens.received if pending else None)
        moved = replace(tokens, key=key, value=value)
        if not most:
            return replace(run, tokens=moved)
        received = None if run.tokens.received is None else run.tokens.received.float()
        every = range(len(self.layers))
        rank = scores(Demotion(every[layers], len(every), run.first, run.size, key_error, value_error, received))
        if rank.shape != tokens.token.shape:
            shapes = f"{list(tokens.token.shape)} (layers, rows, heads, tokens of the blocks), got {list(rank.shape)}"
            raise ValueError(f"scores must have shape {shapes}")
        rank = rank.masked_fill(tokens.token == EMPTY, -torch.inf).unflatten(-1, (-1, run.size))
        order = rank.argsort(dim=-1, descending=True, stable=True)
        order = order + torch.arange(0, run.blocks * run.size, run.size, device=order.device)[:, None]
        self.note(key_error, value_error, rank, order)
        at = 0
        for bits, slots in _shares((source.key_bits, source.value_bits), target, keep, run.size):
            chosen = order[..., at : at + slots].sort(-1).values.flatten(-2)
            at += slots
            key, value = (
                (old if width == was else new)
                for width, was, old, new in zip(
                    bits, (source.key_bits, source.value_bits), (tokens.key, tokens.value), (moved.key, moved.value)
                )
            )
            part = replace(tokens, key=key, value=value).take(chosen)
            self.note(chosen, *part.named().values())
            if at == run.size > most:
                return replace(run, tokens=part, size=slots)
            self._store(layout, layers, replace(run, tokens=part, size=slots), Stage(*bits))
        return None

    def keep_layers(self, count: int) -> None:
        """Let go of all but the first `count` layers, which are those that a prompt has been committed in so far."""
        layout = self.layouts[count - 1]
        layout.changed()
        for _, segment in layout.segments():
            segment.buffers = segment.buffers.map(lambda x: x[:count].clone())
            self.note(*segment.buffers.named().values())
        self.layers, self.layouts, self._made = self.layers[:count], [layout] * count, []
        self.key.keep_layers(count)

    def dense(self, layer: int, length: int) -> Iterator[torch.Tensor]:
        """Keys, then values of one layer's packed tokens in text order, dequantized: `[B, H, length, D]` each."""
        held = [segment.used(layer) for _, segment in self.layouts[layer].segments()]
        at = [tokens.positions().masked_fill_(tokens.token == EMPTY, length) for tokens in held]
        self.note(*at)
        starts = [tokens.block_start for tokens in held]
        yield in_text_order(self.key, [tokens.key for tokens in held], at, starts, layer, length)
        yield in_text_order(self.value, [tokens.value for tokens in held], at, starts, layer, length)

    def crop(self, length: int) -> None:
        """Drop the tokens at positions `length` and later."""
        self.layout.changed()
        for bucket in self.layout.buckets.values():
            bucket.crop(length)

    def map_rows(self, index: torch.Tensor) -> None:
        """Replace the rows of the batch by the rows `index`."""
        self.layout.changed()
        for bucket in self.layout.buckets.values():
            bucket.map_rows(index)
            self.note(*(x for segment in bucket.segments for x in segment.buffers.named().values()))
        if self.key.centre is not None:
            self.key.centre.map(lambda mean: mean.index_select(1, index))
        if self.sinks is not None:
            self.sinks = self.sinks[index.cpu().numpy()]

    def to(self, device: torch.device | str) -> None:
        """Move every tensor to another device."""
        self.layout.changed()
        self.device = torch.device(device)
        for _, segment in self.layout.segments():
            segment.buffers = segment.buffers.map(lambda x: x.to(device))
        shared = self.value.basis is self.key.basis
        for codec in (self.key, self.value):
            codec.to(device)
        if shared:
            self.value.basis = self.value.dual = self.key.basis
        self.note(*self.tensors())

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor that this store owns; one that is shared may come more than once."""
        for layout in {id(layout): layout for layout in self.layouts}.values():
            for _, segment in layout.segments():
                yield from segment.buffers.named().values()
        yield from (*self.key.tensors(), *self.value.tensors())


def _shares(
    source: tuple[int, int], target: tuple[int, int], keep: tuple[int, int], size: int
) -> list[tuple[tuple[int, int], int]]:
    """Widths of keys and values, and how many tokens of a block of `size` get them, the best first.

    Of `keep` (keys, values) the smaller number leaves both sides at the widths `source`, and what the larger has more
    leaves its own side; the rest moves to `target`.
    """
    keys, values = (min(number, size) for number in keep)
    one_side = (source[0], target[1]) if keys > values else (target[0], source[1])
    most, least = max(keys, values), min(keys, values)
    parts = [(source, least), (one_side, most - least), (target, size - most)]
    return [(bits, slots) for bits, slots in parts if slots]
