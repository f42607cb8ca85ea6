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
from helpers.cache.codec import make_codecs
from helpers.cache.layout import Layout, Run, pop_runs
from helpers.cache.order import by_width, in_text_order, places
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
        quantizer: str,
        reserved: int | None = None,
        note: Callable[..., None] = lambda *tensors: None,
    ):
        """`keys`, `values` `[B, H, n, D]` are those of any of the layers, for shapes, dtype and device.

        `reserved`: slots that each bucket allocates at once. `note` is told of every tensor that is made.
        """
        self.layers, self.reserved, self.device, self.note = layers, reserved or 0, keys.device, note
        self.key, self.value = make_codecs(keys, values, quantizer, note)
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
        if plan is not None:
            self._expect(layout, plan, n // block, block)
        portion = n if layer is None else max(1, PORTION // block) * block
        total, coming = 0, []
        for at in range(0, n, portion):
            part = slice(at, min(at + portion, n))
            states = keys[:, :, :, part], values[:, :, :, part]
            seen = None if received is None else received[:, :, :, part].half()  # sums of at most some thousand shares
            if widths is not None:
                total = total + self._commit_mixed(layout, layers, *states, first + at, block, widths[:, part])
                continue
            bits = (HELD.key_bits, HELD.value_bits) if plan is None else plan.pair
            key, value = self.key.encode(states[0], bits[0], layers), self.value.encode(states[1], bits[1], layers)
            total = total + (self.key.magnitude(key) + self.value.magnitude(value))
            token, start = places(states[0], first + at, block)
            tokens = PackedTokens(key, value, token, start, seen if plan is not None and plan.steps else None)
            if plan is None:
                layout.bucket(HELD).append_block(tokens, layers, self._allocate, first + at)
            else:
                coming.append(tokens)
        if coming:
            self._advance(layout, layers, Run(joined(coming), first, block), plan, block)
        self._close(layout, layer)
        return total

    def _expect(self, layout: Layout, plan: Plan, blocks: int, block: int) -> None:
        """Tell the buckets that nothing leaves how many slots are coming, so that they are allocated in one piece."""
        if not plan.steps:
            layout.bucket(Stage(*plan.pair), self.reserved).expected = blocks * block
            return
        stages = [Stage(*bits, True) for bits in (plan.pair, *(step.pair for step in plan.steps[:-1]))]
        waiting = sum(len(layout.buckets[stage].blocks) for stage in stages if stage in layout.buckets)
        settled, keep = max(0, waiting + blocks - plan.steps[-1].after), round(plan.steps[-1].keep * block)
        for stage, slots in ((stages[-1], keep), (Stage(*plan.steps[-1].pair), block - keep)):
            if settled * slots:
                layout.bucket(replace(stage, pending=False), self.reserved).expected += settled * slots

    def _commit_mixed(
        self,
        layout: Layout,
        layers: slice,
        keys: torch.Tensor,
        values: torch.Tensor,
        first: int,
        block: int,
        widths: np.ndarray,
    ) -> torch.Tensor:
        """Commit tokens at the width that `widths` `[B, n]` has for each."""
        token, start = places(keys, first, block)
        total = 0
        for bits, counts, slots, valid in by_width(widths, keys.device):
            key, value = (
                codec.encode(take(states, slots), bits, layers)
                for codec, states in ((self.key, keys), (self.value, values))
            )
            tokens = PackedTokens(key, value, take(token, slots).masked_fill(~valid, EMPTY), take(start, slots))
            layout.bucket(Stage(bits, bits), self.reserved).append(tokens, layers, self._allocate, counts)
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
            for bits, counts, slots, valid in by_width(part, self.device):
                tokens = run.tokens.take(slots)
                self.note(*tokens.named().values())
                key, _ = self.key.requantize(tokens.key, bits)
                value, _ = self.value.requantize(tokens.value, bits)
                tokens = PackedTokens(key, value, tokens.token.masked_fill(~valid, EMPTY), tokens.block_start)
                layout.bucket(Stage(bits, bits), self.reserved).append(
                    tokens, layers, self._allocate, counts, run.ragged
                )
            at += run.size

    def settle(
        self, source: Stage, target: tuple[int, int], blocks: int, keep: int, scores: Scores | None, pending: bool
    ) -> None:
        """Re-quantize the oldest `blocks` of the pending bucket `source` to `target` (key bits, value bits).

        With `keep`, each layer, row and head leaves the `keep` tokens of a block that `scores` puts highest at the
        widths they have; all are then settled.
        """
        layout, layers = self._open(None)
        for run in pop_runs(layout.bucket(source), layers, blocks):
            moved = self._demote(layout, layers, run, source, target, keep, scores, pending)
            if moved is not None:
                self._store(layout, layers, moved, Stage(*target, pending))

    def _advance(self, layout: Layout, layers: slice, coming: Run, plan: Plan, block: int) -> None:
        """Let blocks enter the first stage of `plan`, and all that are old enough move on."""
        runs, bits, waited = [coming], plan.pair, 0
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
            keep, runs = round(step.keep * block), []
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
        keep: int,
        scores: Scores | None,
        pending: bool,
    ) -> Run | None:
        """Move blocks to the widths `target`, but for the best `keep` tokens of each, which settle as they are."""
        keep, at_once = min(keep, run.size), max(1, PORTION // run.size)
        if run.blocks > at_once:
            starts = range(0, run.blocks, at_once)
            parts = [run.part(at, min(at + at_once, run.blocks)) for at in starts]
            moved = [self._demote(layout, layers, part, source, target, keep, scores, pending) for part in parts]
            if moved[0] is None:
                return None
            return replace(moved[0], tokens=joined([part.tokens for part in moved]))
        key, key_error = self.key.requantize(run.tokens.key, target[0], keep > 0, layers)
        value, value_error = self.value.requantize(run.tokens.value, target[1], keep > 0, layers)
        tokens = replace(run.tokens, received=run.tokens.received if pending else None)
        moved = replace(tokens, key=key, value=value)
        if not keep:
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
        kept, rest = (part.sort(-1).values.flatten(-2) for part in order.split([keep, run.size - keep], dim=-1))
        stay = tokens.take(kept)
        self.note(key_error, value_error, rank, order, kept, rest, *stay.named().values())
        self._store(layout, layers, replace(run, tokens=stay), replace(source, pending=False))
        if keep == run.size:
            return None
        moved = moved.take(rest)
        self.note(*moved.named().values())
        return replace(run, tokens=moved, size=run.size - keep)

    def keep_layers(self, count: int) -> None:
        """Let go of all but the first `count` layers, which are those that a prompt has been committed in so far."""
        layout = self.layouts[count - 1]
        layout.changed()
        for _, segment in layout.segments():
            segment.buffers = segment.buffers.map(lambda x: x[:count].clone())
            self.note(*segment.buffers.named().values())
        self.layers, self.layouts, self._made = self.layers[:count], [layout] * count, []
        if self.key.centre is not None:
            self.key.centre = self.key.centre[:count].clone()

    def dense(self, layer: int, length: int) -> Iterator[torch.Tensor]:
        """Keys, then values of one layer's packed tokens in text order, dequantized: `[B, H, length, D]` each."""
        held = [segment.used(layer) for _, segment in self.layouts[layer].segments()]
        at = [tokens.positions().masked_fill_(tokens.token == EMPTY, length) for tokens in held]
        self.note(*at)
        yield in_text_order(self.key, [tokens.key for tokens in held], at, layer, length)
        yield in_text_order(self.value, [tokens.value for tokens in held], at, layer, length)

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
            self.key.centre = self.key.centre.index_select(1, index)

    def to(self, device: torch.device | str) -> None:
        """Move every tensor to another device."""
        self.layout.changed()
        self.device = torch.device(device)
        for _, segment in self.layout.segments():
            segment.buffers = segment.buffers.map(lambda x: x.to(device))
        shared = self.value.rotation is self.key.rotation
        for codec in (self.key, self.value):
            codec.rotation = None if codec.rotation is None else codec.rotation.to(device)
            codec.centre = None if codec.centre is None else codec.centre.to(device)
        if shared:
            self.value.rotation = self.key.rotation
        self.note(*self.tensors())

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor that this store owns; one that is shared may come more than once."""
        for layout in {id(layout): layout for layout in self.layouts}.values():
            for _, segment in layout.segments():
                yield from segment.buffers.named().values()
        yield from (x for x in (self.key.rotation, self.key.centre, self.value.rotation) if x is not None)
