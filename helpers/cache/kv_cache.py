"""`PackedKVCache`: a `transformers.Cache` whose older tokens are really stored at 2, 4, 8 or 16 bits.

    cache = PackedKVCache(model.config, bits=4)
    model.generate(**inputs, cache=cache)

New tokens enter a full-precision tail. Once a block of them is complete it can be committed (quantized); with `bits`
the cache does that by itself, without it somebody calls `commit`, as `generation.PolicyDriver` does. Tokens
committed as pending can later be settled at another width. The cache knows nothing of how widths are chosen.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from helpers.cache.bucket import EMPTY, Stage
from helpers.cache.layer import PackedLayer, PackedStates
from helpers.cache.quantization import FULL_WIDTH, Widths, check_width, width_pair
from helpers.cache.store import CENTRE_TOKENS, PackedStore, Scores

PACKED_ATTENTION = "packed_kv"


QUANTIZERS = ("rotated", "minmax")


class PackedKVCache(Cache):
    """Key/value cache with packed, mixed-width storage for full-attention decoder models.

    Args:
        config: the model's configuration.
        bits: width at which the cache commits by itself, or a pair (key bits, value bits); None leaves committing to
            the caller, and without one everything stays in full precision.
        block: tokens that are committed together, 1 to 255; a tail of up to `block` tokens stays in full precision.
        quantizer: "rotated" (keys centred, both rotated, 2-bit step searched) or "minmax" (plain per token).
        max_length: slots that a bucket reserves at once; without it buckets grow as needed.

    Packed attention tells the cache which tokens are padding; with any other attention, padding of left-padded rows
    enters the centring vectors unless `cache.visible` is set to the attention mask (as `PolicyDriver.prefill` does).

    Raises `ValueError` for widths, blocks or models that it cannot serve: encoder-decoder and sliding-window models.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        bits: Widths | None = None,
        block: int = 16,
        quantizer: str = "rotated",
        max_length: int | None = None,
    ):
        _refuse_unsupported(config)
        if not isinstance(block, int) or not 1 <= block < EMPTY:
            raise ValueError(f"block must lie between 1 and {EMPTY - 1} tokens, got {block!r}")
        if quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer must be one of {QUANTIZERS}, got {quantizer!r}")
        if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
            raise ValueError(f"max_length must be a number of tokens, 1 or more, got {max_length!r}")
        self.config = config.get_text_config(decoder=True)
        self.bits = None if bits is None else width_pair(bits)
        self.block, self.quantizer, self.max_length = block, quantizer, max_length
        self.stores: list[PackedStore] = []
        self.store_of: dict[int, tuple[PackedStore, int]] = {}
        self.committed = 0
        self.visible: torch.Tensor | None = None
        self.rows_note = ""
        self.record_variance = False
        self.record_received = False
        self.attention_variance: torch.Tensor | None = None
        self.doubts: list[tuple[torch.Tensor, str, str]] = []  # see `doubt`
        self.hands_out_packed = self.reads_packed
        super().__init__(layers=[PackedLayer(self, i) for i in range(self.config.num_hidden_layers)])

    @property
    def reads_packed(self) -> bool:
        """Whether the model's attention takes `PackedStates` (see `attention.use_packed_attention`)."""
        return self.config._attn_implementation == PACKED_ATTENTION

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """See `PackedLayer.update`; raises `ValueError` for a layer that the cache's model does not have."""
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"the cache was made for a model of {len(self.layers)} layers and got states of layer {layer_idx + 1}: "
                "use one cache per model"
            )
        if self.offloading:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return self.layers[layer_idx].update(key_states, value_states)

    def states(self, layer_idx: int) -> PackedStates:
        store, layer = self.store_of.get(layer_idx, (None, 0))
        held = self.layers[layer_idx]
        return PackedStates(self, store, layer, layer_idx, held.keys, held.values, held.tail_length)

    def dense(self, states: PackedStates) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer in text order, dequantized, `[B, H, tokens, D]` each, in the model's dtype."""
        if states.store is None:
            return states.tail_keys, states.tail_values
        tails = {"key": states.tail_keys, "value": states.tail_values}
        return tuple(
            torch.cat([states.store.dense(side, states.layer, self.committed).to(tail.dtype), tail], dim=2)
            for side, tail in tails.items()
        )

    def begin_forward(self) -> None:
        """Called by the first layer before it takes new tokens: the moment to commit what is complete."""
        uneven = {layer.tail_length for layer in self.layers}
        if len(uneven) > 1:
            raise ValueError(
                f"layers of the cache hold between {min(uneven)} and {max(uneven)} tokens: a forward was interrupted, "
                f"or the model has fewer than {len(self.layers)} layers; reset the cache and use one per model"
            )
        self.hands_out_packed = self.reads_packed  # asked once a forward: reading a configuration is slow
        if self.bits is not None and (ready := self.committable):
            self.commit(self.bits, ready)

    @property
    def tail_length(self) -> int:
        """Tokens in the full-precision tail."""
        return self.layers[0].tail_length

    @property
    def committable(self) -> int:
        """How many of the oldest tail tokens may be committed now: whole blocks, once the centre can be fixed."""
        ready = self.tail_length // self.block * self.block
        if not ready or self.stores or self.quantizer == "minmax":
            return ready
        # Counted in whole blocks, so that it does not matter in which portions the tokens came.
        real = ready if self.visible is None else int(self._real_tokens()[:, :ready].sum(-1).min())
        return ready if real >= CENTRE_TOKENS else 0

    def _real_tokens(self) -> torch.Tensor:
        """Which tokens of the tail are no padding, `[B, tokens]`; those that came after the mask was seen are real."""
        visible = self.visible[:, : self.tail_length]
        return torch.nn.functional.pad(visible, (0, self.tail_length - visible.shape[1]), value=True)

    def commit(self, bits: Widths | torch.Tensor | np.ndarray, tokens: int | None = None, pending: bool = False):
        """Quantize the oldest `tokens` tokens of the tail (default: all that are `committable`).

        `bits` is one width, a pair (key bits, value bits), or an integer array `[B, tokens]` with the width of each
        token. `pending` tokens, which must share one width, can be settled later. Raises `ValueError` for widths
        outside 2, 4, 8, 16, for a number of tokens that is not a committable number of whole blocks, and for keys or
        values that cannot be stored: NaN, infinity, or numbers too large for half precision (the cache is then of no
        use until it is reset).
        """
        if read := isinstance(bits, torch.Tensor):
            bits = self._read(bits)
        if isinstance(bits, np.ndarray):
            rows = self.layers[0].keys.shape[0] if self.layers[0].is_initialized else 0
            if bits.ndim != 2 or bits.shape[0] != rows:
                raise ValueError(f"bits must have shape [{rows}, tokens], one row a sequence; got {list(bits.shape)}")
            if tokens not in (None, bits.shape[1]):
                raise ValueError(f"bits holds {bits.shape[1]} tokens a row, but tokens is {tokens}")
            tokens = bits.shape[1]
            used = np.unique(bits)
            for width in used.tolist():
                check_width(width)
            if len(used) == 1:
                bits = int(used[0])
            elif pending:
                raise ValueError(f"pending tokens must share one width, got {used.tolist()}")
        if not isinstance(bits, np.ndarray):
            bits = width_pair(bits)
        ready = self.committable
        tokens = ready if tokens is None else tokens
        if not 0 <= tokens <= ready or tokens % self.block:
            raise ValueError(f"tokens must be a multiple of block ({self.block}) up to {ready}, got {tokens}")
        if not tokens:
            return
        if not self.stores:
            self._make_stores()
        for store in self.stores:
            keys, values = (
                torch.stack([getattr(self.layers[i], name)[:, :, :tokens] for i in store.layers])
                for name in ("keys", "values")
            )
            received = None
            if pending and self.record_received:
                received = torch.stack([self.layers[i].tail_received(tokens) for i in store.layers])
            total = store.commit(keys, values, bits, self.committed, self.block, pending, received)
            which = f"keys or values of tokens {self.committed} to {self.committed + tokens - 1}"
            self.doubt(
                total,
                f"{which} hold NaN or infinity: look for the first layer whose output is not finite",
                f"{which} are infinite or too large to be stored: centred and rotated they pass 65504, the end of "
                "float16",
            )
        for layer in self.layers:
            layer.drop_front(tokens)
        self.committed += tokens
        if self.doubts and not read:
            self._read()

    def doubt(self, total: torch.Tensor, if_nan: str, if_infinite: str) -> None:
        """Raise `ValueError` with one of the messages unless the number `total` is finite.

        At once on the CPU. On other devices together with the next widths that are read from there, or at the end of
        a commit that reads none: one host read a block, whatever there is to check.
        """
        self.doubts.append((total, if_nan, if_infinite))
        if total.device.type == "cpu":
            self._read()

    def _read(self, bits: torch.Tensor | None = None) -> np.ndarray | None:
        """The one host read of a block: the widths `bits`, and everything that is in doubt."""
        doubts, self.doubts = self.doubts, []
        if not doubts:
            return bits.cpu().numpy()
        device = doubts[0][0].device
        parts = [total.detach().reshape(1).to(device, torch.float32) for total, *_ in doubts]
        if bits is not None:
            parts.append(bits.reshape(-1).to(device, torch.float32))
        numbers = torch.cat(parts).cpu().numpy()
        for total, (_, if_nan, if_infinite) in zip(numbers, doubts):
            if not math.isfinite(total):
                raise ValueError(if_nan if math.isnan(total) else if_infinite)
        return None if bits is None else numbers[len(doubts) :].reshape(bits.shape)

    def tail_errors(self, tokens: int, bits: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
        """How badly the oldest `tokens` tokens of the tail would be stored at `bits`: for keys and for values `[B, n]`.

        Squared error over squared length, averaged over layers and heads (0: exact; 1: as bad as storing nothing).
        """
        if not self.stores:
            if not self.committable:
                raise ValueError(f"errors are known once {CENTRE_TOKENS} tokens can be centred")
            self._make_stores()
        result = []
        for name, side in (("keys", "key"), ("values", "value")):
            parts = []
            for store in self.stores:
                states = torch.stack([getattr(self.layers[i], name)[:, :, :tokens] for i in store.layers])
                parts.append(store.relative_error(states, side, bits).transpose(0, 1).flatten(1, 2))
            result.append(torch.cat(parts, dim=1).mean(1))  # over the heads of all layers
        return tuple(result)

    def settle(
        self,
        source: Widths,
        target: Widths,
        blocks: int = 1,
        keep: int = 0,
        scores: list[torch.Tensor] | Scores | None = None,
        pending: bool = False,
    ) -> None:
        """Re-quantize the oldest `blocks` pending blocks of width `source` to `target`.

        With `keep`, every layer, row and head leaves the `keep` tokens of each block that have its highest `scores`
        as they are (settled), and the others move to `target`. `scores` is `[L, B, H, blocks * block]`, or a list of
        such tensors, one a store, or a function that gives them for a `packed_store.Demotion`. With `pending`
        instead, the whole blocks may be settled once more. Raises `ValueError` where there are fewer pending blocks,
        or where `keep` is not within the block or lacks scores.
        """
        stage = Stage(*width_pair(source, "source"), pending=True)
        goal = width_pair(target, "target")
        if not self.stores or blocks < 1 or blocks > self.pending_blocks(source):
            raise ValueError(
                f"blocks must lie between 1 and the number of pending blocks at {source} bits "
                f"({self.pending_blocks(source)}), got {blocks}"
            )
        if not 0 <= keep <= self.block:
            raise ValueError(f"keep must lie between 0 and block ({self.block}), got {keep}")
        if keep and pending:
            raise ValueError("keep settles a block for good: it cannot be combined with pending")
        if keep and scores is None:
            raise ValueError(f"keep={keep} needs scores to choose by")
        if not isinstance(scores, list):
            scores = [scores] * len(self.stores)
        for store, part in zip(self.stores, scores, strict=True):
            oldest = store.buckets[stage].blocks[:blocks]
            if keep and isinstance(part, torch.Tensor) and part.shape[-1] != sum(slots for _, slots in oldest):
                raise ValueError(f"scores must cover {blocks} blocks of {self.block}, got {list(part.shape)}")
            store.settle(stage, goal, blocks, keep, part, pending)

    def pending_blocks(self, bits: Widths) -> int:
        """Number of blocks that wait to be settled at width `bits`."""
        bucket = self.stores[0].buckets.get(Stage(*width_pair(bits), pending=True)) if self.stores else None
        return len(bucket.blocks) if bucket else 0

    def pending_tokens(self, bits: Widths, blocks: int) -> int:
        """Number of tokens in the oldest `blocks` blocks that wait at width `bits` (a crop may leave short ones)."""
        bucket = self.stores[0].buckets[Stage(*width_pair(bits), pending=True)]
        return sum(slots for _, slots in bucket.blocks[:blocks])

    def _make_stores(self) -> None:
        groups: dict[tuple, list[int]] = {}
        for i, layer in enumerate(self.layers):
            shape = (layer.device, layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1])
            groups.setdefault(shape, []).append(i)
        for members in groups.values():
            first = self.layers[members[0]]
            store = PackedStore(members, first.keys, first.values, self.quantizer, self.max_length)
            if self.quantizer == "rotated":
                weights = self._centre_weights(first.device)
                keys = torch.stack([self.layers[i].keys[:, :, : weights.shape[1]] for i in members])
                store.set_centre(keys, weights)
            self.stores.append(store)
            self.store_of |= {i: (store, at) for at, i in enumerate(members)}
        self.visible = None

    def _centre_weights(self, device: torch.device) -> torch.Tensor:
        """1 for the first real tokens of each row, 0 for padding and for all later ones, `[B, tokens]`."""
        if self.visible is None:
            return torch.ones(self.layers[0].keys.shape[0], CENTRE_TOKENS, device=device)
        visible = self._real_tokens().to(device)
        return (visible & (visible.cumsum(-1) <= CENTRE_TOKENS)).float()

    def clear_stores(self) -> None:
        self.stores, self.store_of, self.committed = [], {}, 0
        self.visible = self.attention_variance = None
        self.doubts = []

    def crop_all(self, tokens: int) -> None:
        length = max(0, self.get_seq_length() - tokens)
        for layer in self.layers:
            layer.tail_length = max(0, length - self.committed)
            layer.received = None if layer.received is None else layer.received[:, :, : layer.tail_length].clone()
        if length < self.committed:
            self.committed = length
            for store in self.stores:
                store.crop(length)
        if not self.committed:
            self.stores, self.store_of = [], {}
        if self.visible is not None:
            self.visible = self.visible[:, :length].clone()

    def map_rows(self, index: torch.Tensor) -> None:
        """Replace the rows of the batch by the rows `index`, in every tensor of the cache."""
        for layer in self.layers:
            at = index.to(layer.keys.device)
            layer.keys, layer.values = layer.keys.index_select(0, at), layer.values.index_select(0, at)
            layer.received = None if layer.received is None else layer.received.index_select(0, at)
        for store in self.stores:
            store.map_rows(index.to(self.layers[store.layers[0]].keys.device))
        if self.visible is not None:
            self.visible = self.visible.index_select(0, index.to(self.visible.device))

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor that the cache owns, spare capacity included."""
        for layer in self.layers:
            if layer.is_initialized:
                yield from (x for x in (layer.keys, layer.values, layer.received) if x is not None)
        for store in self.stores:
            yield from store.tensors()
        yield from (x for x in (self.visible, self.attention_variance) if x is not None)
        yield from (total for total, *_ in self.doubts)

    def stored_bytes(self) -> int:
        """Bytes of every tensor the cache owns: codes, scales, tail, centring, bookkeeping, spare capacity."""
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self.tensors()}
        return sum(storages.values())

    def live_bytes(self) -> int:
        """`stored_bytes` without spare capacity: what the tokens now in the cache need, all metadata included."""
        spare = 0
        for layer in self.layers:
            if layer.is_initialized:
                for states in (layer.keys, layer.values):
                    spare += states[:, :, self.tail_length :].numel() * states.element_size()
        for store in self.stores:
            for bucket in store.buckets.values():
                for name, value in bucket.fields.items():
                    spare += (value.numel() - bucket.view(name).numel()) * value.element_size()
        return self.stored_bytes() - spare

    def _elements(self) -> int:
        layers = [layer for layer in self.layers if layer.is_initialized]
        each = [x.shape[0] * x.shape[1] * x.shape[3] for layer in layers for x in (layer.keys, layer.values)]
        return sum(each) * self.get_seq_length()

    def bits_per_element(self) -> float:
        """Live bits per cached number, scales, bookkeeping and tail included; 16 would be plain half precision."""
        elements = self._elements()
        return 8 * self.live_bytes() / elements if elements else 0.0

    def code_bits(self) -> float:
        """Average width of the stored codes, tail counted at 16, scales and bookkeeping left out."""
        total, tokens = 0.0, 0
        for store in self.stores:
            for stage, bucket in store.buckets.items():
                held = int((bucket.view("token") != EMPTY).sum())
                total += held * (stage.key_bits + stage.value_bits) / 2
                tokens += held
        tail = sum(x.keys.shape[0] * x.keys.shape[1] * x.tail_length for x in self.layers if x.is_initialized)
        return (total + FULL_WIDTH * tail) / (tokens + tail) if tokens + tail else 0.0

    def token_bits(self) -> torch.Tensor:
        """Width at which each token is stored now, averaged over layers, heads and sides; 16 in the tail.

        float32 `[B, tokens]`, on the CPU.
        """
        rows = self.layers[0].keys.shape[0]
        bits = torch.full((rows, self.get_seq_length()), float(FULL_WIDTH))
        heads = {id(s): len(s.layers) * self.layers[s.layers[0]].keys.shape[1] for s in self.stores}
        if self.committed:
            parts = [store.token_bits(self.committed).cpu() * heads[id(store)] for store in self.stores]
            bits[:, : self.committed] = sum(parts) / sum(heads.values())
        return bits


def _refuse_unsupported(config: PreTrainedConfig) -> None:
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"PackedKVCache serves decoder-only models; {name} is an encoder-decoder model")
    text = config.get_text_config(decoder=True)
    other = sorted(set(getattr(text, "layer_types", None) or []) - {"full_attention"})
    if other:
        raise ValueError(f"PackedKVCache serves full attention only; {name} has layers of type {', '.join(other)}")
    if getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
        raise ValueError(
            f"PackedKVCache serves full attention only; {name} has sliding_window={text.sliding_window} "
            "(set it to None if texts stay shorter)"
        )
