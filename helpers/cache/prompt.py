"""`ReadsPrompts`: the part of `PackedKVCache` that commits a prompt layer by layer, while a model reads it.

When a layer is updated, the attention of the one before it is done: what fills whole blocks there is committed before
the next layer's keys exist, so that one or two layers stand in full precision, never all of them.
"""

import torch

from helpers.cache.codec import Codec
from helpers.cache.layer import PackedLayer
from helpers.cache.order import places
from helpers.cache.plan import Plan
from helpers.cache.store import PORTION, PackedStore


class ReadsPrompts:
    """Follows a forward through the `packed` layers; the tokens that it commits are `coming` in each until its end."""

    packed: list[PackedLayer]
    store_of: dict[int, tuple[PackedStore, int]]
    plan: Plan | None

    def _clear_prompt(self) -> None:
        self.coming = 0  # tokens of the prompt that is being read that each layer commits; 0 where it is no prompt
        self._real: torch.Tensor | None = None  # [B, tokens], of that prompt: False for padding
        self._errors: list[torch.Tensor] = []  # of its tokens: sums over the heads of the layers that are done

    def before_update(self, layer_idx: int, tokens: int) -> None:
        """Called by each layer before it takes `tokens` new tokens: the moment to commit what is complete."""
        if layer_idx == 0:
            self._begin_forward(tokens)
        elif self.coming:
            self._commit_layer(layer_idx - 1)

    def _begin_forward(self, tokens: int) -> None:
        self.expect_whole()
        self.end_forward()
        for store in self.stores:
            store.reserve(self.packed[0].get_seq_length() + tokens)
        self.hands_out_packed = self.reads_packed  # asked once a forward: reading a configuration is slow
        if self.plan is not None:
            self.commit_ready()
        # A few tokens are committed by all layers together, which is faster.
        if tokens > 2 * self.block and (self.plan is not None or self.holds):
            self.coming = -1  # not counted yet: which tokens are padding is known once the first layer has attended

    @property
    def is_whole(self) -> bool:
        """Whether all layers hold equally many tokens: not while a forward runs, nor after one was interrupted."""
        length = self.packed[0].get_seq_length()
        return all(layer.get_seq_length() == length for layer in self.packed)

    def expect_whole(self) -> None:
        """Raise `ValueError` where `is_whole` is False."""
        if not self.is_whole:
            lengths = [layer.get_seq_length() for layer in self.packed]
            raise ValueError(
                f"layers of the cache hold between {min(lengths)} and {max(lengths)} tokens: a forward was "
                f"interrupted, or the model has fewer than {len(self.packed)} layers; reset the cache and use one per "
                "model"
            )

    def _commit_layer(self, layer_idx: int) -> None:
        """Commit what is complete in one layer of a prompt, whose attention is done: the next one has begun."""
        if self.coming < 0:
            self.coming = self.committable
            self._real = None if self.visible is None else self._real_tokens()
        if not self.coming:
            return
        layer, first = self.packed[layer_idx], self.committed + self.held
        store, at = self._store_with(layer_idx)
        keys, values = (x[None, :, :, : self.coming] for x in (layer.keys, layer.values))
        received = None
        if self.record_received and self.plan is not None and self.plan.steps:
            received = layer.tail_received(self.coming)[None]
        if self.plan is None and self.record_errors:
            self._note_errors((store.key, store.value), at, [keys, values], first)
        total = store.commit(keys, values, first, self.block, self.plan, received=received, layer=at)
        self._expect_finite(total, first, self.coming)
        layer.drop_front(self.coming)

    def end_forward(self) -> None:
        """Commit the last layer of a prompt, once its attention is done, or whoever comes next asks for it."""
        if not self.coming:
            return
        self.expect_whole()
        self._commit_layer(len(self.packed) - 1)
        coming, self.coming = self.coming, 0
        if not coming:
            return
        self.visible = self._real = None
        if self.plan is not None:
            self.committed += coming
        else:
            self.held += coming
            heads = sum(layer.keys.shape[1] for layer in self.packed)
            known = self.held_errors or [errors[:, :0] for errors in self._errors]
            self.held_errors = [torch.cat([x, y / heads], dim=1) for x, y in zip(known, self._errors, strict=True)]
            self._errors = []
        self.checks.read()

    def _note_errors(self, codecs: tuple[Codec, Codec], at: int, states: list[torch.Tensor], first: int) -> None:
        """Add what the tokens of one layer of a prompt would lose at 2 bits to the sums over its heads."""
        sums = []
        for codec, x in zip(codecs, states, strict=True):
            _, starts = places(x, first, self.block)
            portions = zip(x.split(PORTION, dim=3), starts.split(PORTION, dim=3), strict=True)
            parts = [codec.relative_error(part, 2, start, slice(at, at + 1))[0].sum(1) for part, start in portions]
            sums.append(torch.cat(parts, dim=1))
        self._errors = [x + y.to(x.device) for x, y in zip(self._errors, sums, strict=True)] if self._errors else sums

    def _store_with(self, layer_idx: int) -> tuple[PackedStore, int]:
        """The store of a layer of a prompt and its place in there; a layer's first tokens centre it.

        Later layers are not known yet when the first is committed: they are taken to be like it until one is not.
        """
        layer = self.packed[layer_idx]
        if layer_idx in self.store_of:
            store, at = self.store_of[layer_idx]
            if self.packed[store.layers[0]].kind != layer.kind:
                members = store.layers[at:]
                store.keep_layers(at)
                store, at = self._make_store(members, self._real), 0
        else:
            store, at = self._make_store(list(range(layer_idx, len(self.packed))), self._real), 0
        if store.key.centre is not None and not layer.packed_length:
            tail = layer.tail_length
            store.fix_centre(layer.keys[None, :, :, :tail], self._real, tail, slice(at, at + 1))
        return store, at
