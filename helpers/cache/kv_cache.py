"""`PackedKVCache`: a `transformers.Cache` whose older tokens are really stored at 2, 4, 8 or 16 bits.

    cache = PackedKVCache(model.config, bits=4)
    model.generate(**inputs, cache=cache)

New tokens enter a full-precision tail. Once a block of them is complete it can be committed (quantized); with `bits`
the cache does that by itself, without it somebody calls `commit`, as `policies.PolicyDriver` does. Tokens committed as
pending can later be settled: moved to another width. The cache knows nothing of how widths are chosen.
"""

from copy import deepcopy
from functools import lru_cache
from itertools import count
from typing import Literal
from weakref import WeakValueDictionary

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from helpers.cache.accounting import Accounting, tensors_of
from helpers.cache.arguments import check_settings, check_settling, head_dim, token_widths
from helpers.cache.balance import Balance, key_balance_of
from helpers.cache.bucket import Stage
from helpers.cache.centre import CENTRE_TOKENS
from helpers.cache.codec import Coding
from helpers.cache.finite import FiniteChecks
from helpers.cache.kinds import describe_layers, kinds_of, other_layers, shares_states
from helpers.cache.layer import PackedLayer, PackedStates, UnreadStates
from helpers.cache.order import places
from helpers.cache.other_layers import KeepsOtherLayers
from helpers.cache.peak import PeakBytes
from helpers.cache.plan import Plan, Scores, Step
from helpers.cache.prompt import ReadsPrompts
from helpers.cache.quantization import Widths, width_pair
from helpers.cache.rotary import Rotary, rotary_of
from helpers.cache.store import PackedStore

NEVER = Step(10**9, 2)  # the step of blocks that wait until somebody settles them
PACKED_ATTENTION = "packed_kv"  # the name under which transformers knows packed attention


CACHES: "WeakValueDictionary[int, PackedKVCache]" = WeakValueDictionary()  # by the number in their handle
_NUMBERS = count()


@lru_cache(maxsize=64)
def _say_once(text: str) -> None:
    print(text)


class PackedKVCache(ReadsPrompts, KeepsOtherLayers, Accounting, Cache):
    """Key/value cache of decoder models, with packed, mixed-width storage in their layers of full attention.

    Layers of other kinds (sliding windows, chunks, linear attention) are the library's own, in full precision; which
    are packed is printed once a model that has such layers, and said by `describe`. Where tokens are committed,
    settled, counted or described, packed layers are meant.

    Args:
        config: the model's configuration.
        bits: width at which the cache commits by itself, or a pair (key bits, value bits); None leaves committing to
            the caller, and without one everything stays in full precision.
        block: tokens that are committed together, 1 to 254; a tail of up to `block` tokens stays in full precision.
        quantizer: "rotated" (keys centred and balanced, both rotated, 2-bit step searched) or "minmax" (plain per
            token).
        max_length: slots that a bucket reserves at once; without it buckets grow as needed.
        sinks: real tokens at the beginning of each row that stay at 16 bits, 0 to 8 (attention leans on them:
            StreamingLLM, arXiv 2309.17453).
        centre: what is taken from keys before they are coded: "rotary" (the mean of up to 64 un-rotated keys, turned to
            the middle of each block; gains little on models that rotate neighbouring numbers instead of halves, as GLM
            does) or "none".
        balance: linear maps under which errors of keys do least harm; "model" takes those that the model was given by
            `use_key_balance`, if any (`load_model` does it where there is a file of `calibrate-keys`).
        stretch: whether codes below 8 bits are stretched until they are as long as what they stand for (`quantize`).

    Packed attention tells the cache which tokens are padding; with any other attention, padding of left-padded rows
    enters the centring vectors unless `cache.visible` is set to the attention mask (as `PolicyDriver.prefill` does).

    Raises `ValueError` for widths, blocks or models that it cannot serve: encoder-decoder models, latent attention, and
    models without a layer of full attention.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        bits: Widths | None = None,
        block: int = 16,
        quantizer: str = "rotated",
        max_length: int | None = None,
        sinks: int = 4,
        centre: str = "rotary",
        balance: Balance | Literal["model"] | None = "model",
        stretch: bool = True,
    ):
        self.kinds = kinds_of(config)
        self.config = config.get_text_config(decoder=True)
        if balance == "model":
            balance = None if quantizer == "minmax" else key_balance_of(self.config)
        check_settings(block, quantizer, max_length, sinks, centre, balance, self.config)
        rotary = rotary_of(self.config, head_dim(self.config)) if centre == "rotary" else Rotary()
        self.coding = Coding(quantizer, block, sinks, centre, rotary, balance, stretch)
        self.plan = None if bits is None else Plan(width_pair(bits))  # what is done by itself, if anything
        self.holds = False  # whether the tokens of a prompt wait at 8 bits for somebody to choose their widths
        self.block, self.max_length = block, max_length
        self.rows_note = ""  # why rows cannot be reordered
        self.record_variance = self.record_received = self.record_errors = False
        others = other_layers(self.config)
        self.shares_states = shares_states(self.config)
        self.packed: list[PackedLayer] = []  # the layers that are packed; stores and attention count only these
        for number in range(len(self.kinds)):
            if number not in others:
                self.packed.append(PackedLayer(self, len(self.packed)))
        packed = iter(self.packed)
        super().__init__(layers=[others.get(number) or next(packed) for number in range(len(self.kinds))])
        self._register()
        self._clear()
        self.hands_out_packed = self.reads_packed
        if others:
            _say_once(f"{self.config.model_type}: {self.describe()}")

    def describe(self) -> str:
        """Which layers are packed, in one line."""
        return describe_layers(self.kinds)

    def _clear(self) -> None:
        self.stores: list[PackedStore] = []
        self.store_of: dict[int, tuple[PackedStore, int]] = {}  # of a layer: its store, and its place in there
        self.committed = self.held = 0  # tokens: packed at widths that were chosen; packed at 8 bits until they are
        self._clear_prompt()
        self.held_errors: list[torch.Tensor] = []  # of the held tokens, as of `tail_errors`, where they are recorded
        self.visible: torch.Tensor | None = None  # [B, tokens], False for padding; until the centre is fixed
        self.attention_variance: torch.Tensor | None = None  # [B, tokens of the last forward], if recorded
        self.checks = FiniteChecks()
        self.peak = PeakBytes()

    def _register(self) -> None:
        """Have compiled code find this cache by `handle`: a tensor, so that no code is compiled for one cache alone."""
        number = next(_NUMBERS)
        self.handle = torch.tensor(number)
        CACHES[number] = self

    def __deepcopy__(self, memo: dict) -> "PackedKVCache":
        """A cache that goes on by itself; the configuration stays the model's."""
        memo[id(self.config)] = self.config
        copied = memo[id(self)] = PackedKVCache.__new__(PackedKVCache)
        copied.__setstate__({name: deepcopy(value, memo) for name, value in self.__dict__.items()})
        return copied

    def __setstate__(self, state: dict[str, object]) -> None:
        """A copy's tensors lie elsewhere: its peak begins with them."""
        self.__dict__.update(state)
        self._register()
        self.peak.note(*self.tensors())

    @property
    def reads_packed(self) -> bool:
        """Whether the model's attention takes `PackedStates` (see `attention.use_packed_attention`)."""
        return self.config._attn_implementation == PACKED_ATTENTION and not self.shares_states

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Take the next tokens of one layer: see `PackedLayer.update`.

        Raises `ValueError` for a layer that the cache's model does not have, and after a forward that was interrupted.
        """
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"the cache was made for a model of {len(self.layers)} layers and got states of layer {layer_idx + 1}: "
                "use one cache per model"
            )
        layer = self.layers[layer_idx]
        if torch.compiler.is_compiling():
            if not isinstance(layer, PackedLayer):
                return layer.update(key_states, value_states, *args, **kwargs)
            if self.hands_out_packed:
                unread = UnreadStates(key_states, value_states, self.handle, layer_idx)
                return unread, unread
        if isinstance(layer, PackedLayer):
            return layer.update(key_states, value_states)
        return self.update_other(key_states, value_states, layer_idx, *args, **kwargs)

    def states(self, layer_idx: int) -> PackedStates:
        """What one of the packed layers holds."""
        store, layer = self.store_of.get(layer_idx, (None, 0))
        layout = None if store is None else store.layouts[layer]
        held = self.packed[layer_idx]
        if layout is not None and not held.packed_length:  # the store is there, but this layer is not in it yet
            store = layout = None
        return PackedStates(self, store, layout, layer, layer_idx, held.keys, held.values, held.tail_length)

    @property
    def tail_length(self) -> int:
        """Tokens in the full-precision tail."""
        return self.packed[0].tail_length

    @property
    def committable(self) -> int:
        """How many of the oldest tail tokens may be committed now: whole blocks, once the centre can be fixed."""
        ready = self.tail_length // self.block * self.block
        if not ready or self.stores or self.coding.needs_no_tokens:
            return ready
        # Counted in whole blocks, so that it does not matter in which portions the tokens came.
        real = ready if self.visible is None else int(self._real_tokens()[:, :ready].sum(-1).min())
        return ready if real >= CENTRE_TOKENS else 0

    @property
    def undecided(self) -> int:
        """How many tokens without a chosen width may get one now: those held at 8 bits, then the tail's."""
        self.end_forward()
        return self.held + self.committable

    def commit_ready(self) -> None:
        """Commit by the cache's plan what is complete."""
        self.end_forward()
        if ready := self.committable:
            self._commit(self.plan, None, ready)

    def _real_tokens(self) -> torch.Tensor:
        """Which tokens of the tail are no padding, `[B, tokens]`; those that came after the mask was seen are real."""
        visible = self.visible[:, : self.tail_length]
        return torch.nn.functional.pad(visible, (0, self.tail_length - visible.shape[1]), value=True)

    def commit(self, bits: Widths | torch.Tensor | np.ndarray, tokens: int | None = None, pending: bool = False):
        """Quantize the oldest `tokens` tokens without a chosen width (default: all that are `undecided`).

        `bits` is one width, a pair (key bits, value bits), or an integer array `[B, tokens]` with the width of each
        token. `pending` tokens, which must share one width, can be settled later. Tokens of a prompt that are held at
        8 bits stay so where 16 is chosen. Raises `ValueError` for widths outside 2, 4, 8, 16, for a number of tokens
        that is not a committable number of whole blocks, and for keys or values that cannot be stored: NaN, infinity,
        or numbers too large for half precision (the cache is then of no use until it is reset).
        """
        self.end_forward()
        if read := isinstance(bits, torch.Tensor):
            bits = self.checks.read(bits)
        rows = self.packed[0].keys.shape[0] if self.packed[0].is_initialized else 0
        widths, tokens = token_widths(bits, rows, tokens, pending)
        ready = self.undecided
        tokens = ready if tokens is None else tokens
        held = min(self.held, tokens)  # of which a crop may have left a part of a block
        if not 0 <= tokens <= ready or (tokens - held if held == self.held else tokens) % self.block:
            raise ValueError(f"tokens must be a multiple of block ({self.block}) up to {ready}, got {tokens}")
        if held:
            if pending:
                raise ValueError("pending blocks are committed from the tail; these tokens are held at 8 bits")
            each = widths[:, :held] if isinstance(widths, np.ndarray) else np.full((rows, held), widths[0])
            for store in self.stores:
                store.decide(each)
            self.held, self.committed = self.held - held, self.committed + held
            self.held_errors = [errors[:, held:] for errors in self.held_errors] if self.held else []
            widths = widths[:, held:] if isinstance(widths, np.ndarray) else widths
        if tokens - held:
            if isinstance(widths, np.ndarray):
                self._commit(None, widths, tokens - held)
            else:
                # Steps that no block is old enough for: it waits until somebody settles it.
                self._commit(Plan(widths, (NEVER,) if pending else ()), None, tokens - held)
        if not read:
            self.checks.read()

    def _commit(self, plan: Plan | None, widths: np.ndarray | None, tokens: int) -> None:
        """Commit the oldest `tokens` tokens of the tail, in all layers together."""
        for store in self._made_stores():
            received = None
            if plan is not None and plan.steps and self.record_received:
                received = torch.stack([self.packed[i].tail_received(tokens) for i in store.layers])
            keys, values = self._oldest(store.layers, tokens)
            total = store.commit(keys, values, self.committed, self.block, plan, widths, received)
            self._expect_finite(total, self.committed, tokens)
        for layer in self.packed:
            layer.drop_front(tokens)
        self.committed += tokens

    def _expect_finite(self, total: torch.Tensor, first: int, tokens: int) -> None:
        which = f"keys or values of tokens {first} to {first + tokens - 1}"
        self.checks.expect(
            total,
            f"{which} hold NaN or infinity: look for the first layer whose output is not finite",
            f"{which} are infinite or too large to be stored: centred and rotated they pass 65504, the end of float16",
        )

    def _oldest(self, layers: list[int], tokens: int) -> list[torch.Tensor]:
        """Keys and values of the oldest `tokens` tokens of the tails of `layers`, `[L, B, H, tokens, D]` each."""
        tails = [self.packed[i] for i in layers]
        states = [torch.stack([getattr(x, side)[:, :, :tokens] for x in tails]) for side in ("keys", "values")]
        self.peak.note(*states)
        return states

    def tail_errors(self, tokens: int, bits: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
        """How badly the oldest `tokens` undecided tokens would be stored at `bits`: for keys and for values `[B, n]`.

        Squared error over squared length, averaged over layers and heads (0: exact; 1: as bad as storing nothing). Of
        tokens that are held at 8 bits it is known for 2 bits, where `record_errors` was set before they came.
        """
        self.end_forward()
        if self.held >= tokens:
            return tuple(errors[:, :tokens] for errors in self.held_errors)
        if not self.stores and not self.committable:
            raise ValueError(f"errors are known once {CENTRE_TOKENS} tokens can be centred")
        parts, first = [], self.committed + self.held
        for store in self._made_stores():
            sides = zip((store.key, store.value), self._oldest(store.layers, tokens - self.held), strict=True)
            errors = [
                codec.relative_error(states, bits, places(states, first, self.block)[1]) for codec, states in sides
            ]
            parts.append([error.transpose(0, 1).flatten(1, 2) for error in errors])  # [B, L * H, n]
        tail = [torch.cat(side, dim=1).mean(1) for side in zip(*parts, strict=True)]
        return tuple(torch.cat(both, dim=1) for both in zip(self.held_errors, tail)) if self.held else tuple(tail)

    def settle(
        self,
        source: Widths,
        target: Widths,
        blocks: int = 1,
        keep: int = 0,
        scores: Scores | None = None,
        pending: bool = False,
    ) -> None:
        """Re-quantize the oldest `blocks` pending blocks of width `source` to `target`.

        With `keep`, every layer, row and head leaves the `keep` tokens of each block that have its highest `scores`
        as they are (settled), and the others move to `target`; `scores` gives `[L, B, H, slots]` for a
        `store.Demotion`. With `pending` instead, the whole blocks may be settled once more. Raises `ValueError` where
        there are fewer pending blocks, or where `keep` is not within the block or lacks scores.
        """
        self.end_forward()
        stage, goal = Stage(*width_pair(source, "source"), pending=True), width_pair(target, "target")
        check_settling(source, blocks, self.pending_blocks(source), self.block, keep, scores is not None, pending)
        for store in self.stores:
            store.settle(stage, goal, blocks, (keep, keep), scores, pending)

    def pending_blocks(self, bits: Widths) -> int:
        """Number of blocks that wait to be settled at width `bits`."""
        stage = Stage(*width_pair(bits), pending=True)
        return len(self.stores[0].layout.pending(stage)) if self.stores else 0

    def _made_stores(self) -> list[PackedStore]:
        """The stores, made and centred when the first tokens are committed: one for layers of a device and a shape."""
        if self.stores:
            return self.stores
        groups: dict[tuple, list[int]] = {}
        for i, layer in enumerate(self.packed):
            groups.setdefault(layer.kind, []).append(i)
        for members in groups.values():
            real = None if self.visible is None else self._real_tokens()
            store = self._make_store(members, real)
            if store.key.centre is not None:
                tokens = self.tail_length if real is not None else min(self.tail_length, store.key.centre.needed)
                store.fix_centre(self._oldest(members, tokens)[0], real, self.tail_length)
        self.visible = None
        return self.stores

    def _make_store(self, members: list[int], real: torch.Tensor | None) -> PackedStore:
        """A store for the layers `members`; `real` `[B, tokens of the tail]` is False for padding."""
        first = self.packed[members[0]]
        store = PackedStore(members, first.keys, first.values, self.coding, self.max_length, self.peak.note)
        if self.coding.sinks:
            sinks = np.ones((first.keys.shape[0], self.coding.sinks), dtype=bool)
            if real is not None:
                real = real.cpu().numpy()
                sinks = real & (real.cumsum(-1) <= self.coding.sinks)
            store.sinks = sinks
        self.stores.append(store)
        self.store_of |= {i: (store, at) for at, i in enumerate(members)}
        return store

    def reset(self) -> None:
        """Forget all tokens."""
        self.reset_others()
        for layer in self.packed:
            layer.reset()
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens (a non-positive count, as everywhere in transformers 5)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a non-positive number of tokens to remove, got {tokens_to_remove}")
        if not self.packed[0].is_initialized:
            return
        if tokens_to_remove:
            self.expect_croppable(tokens_to_remove)
        self.end_forward()
        length = max(0, self.get_seq_length() + tokens_to_remove)
        if length < self.committed + self.held:
            self.committed = min(self.committed, length)
            self.held = length - self.committed
            self.held_errors = [errors[:, : self.held] for errors in self.held_errors]
            for store in self.stores:
                store.crop(length)
        for layer in self.packed:
            layer.shorten(length)
        self.crop_others(tokens_to_remove)
        if not self.committed + self.held:
            self.stores, self.store_of = [], {}
        if self.visible is not None:
            self.visible = self.visible[:, :length].clone()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Replace the rows of the batch by the rows `beam_idx`; raises `ValueError` where a driver cannot follow."""
        if self.packed[0].is_initialized and self.rows_note:
            raise ValueError(f"the rows of this cache cannot be reordered{self.rows_note}")
        self.map_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch `repeats` times."""
        if self.packed[0].is_initialized:
            self.map_rows(torch.arange(self.packed[0].keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, numbers or a mask."""
        self.map_rows(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def map_rows(self, index: torch.Tensor) -> None:
        """Replace the rows of the batch by the rows `index`, in every tensor of the cache."""
        if not self.packed[0].is_initialized:
            return
        self.end_forward()
        for layer in self.layers:
            layer.reorder_cache(index)
        self.peak.note(*(x for layer in self.other_layers for x in tensors_of(layer)))
        self.held_errors = [errors.index_select(0, index.to(errors.device)) for errors in self.held_errors]
        for store in self.stores:
            store.map_rows(index.to(store.device))
        if self.visible is not None:
            self.visible = self.visible.index_select(0, index.to(self.visible.device))
