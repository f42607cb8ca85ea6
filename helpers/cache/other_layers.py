"""`KeepsOtherLayers`: the part of `PackedKVCache` that looks after layers which are not packed (see `kinds`).

They are the library's own, in full precision: sliding windows, chunks, states of linear attention.
"""

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from helpers.cache.accounting import tensors_of
from helpers.cache.kinds import other_layers
from helpers.cache.layer import PackedLayer
from helpers.cache.peak import PeakBytes


class KeepsOtherLayers:
    """Updates, crops and resets the layers that are not packed."""

    config: PreTrainedConfig
    kinds: list[str]
    layers: list[CacheLayerMixin]
    packed: list[PackedLayer]
    peak: PeakBytes

    @property
    def other_layers(self) -> list[CacheLayerMixin]:
        """The layers that are not packed."""
        return [layer for layer in self.layers if not isinstance(layer, PackedLayer)]

    def expect_croppable(self, tokens_to_remove: int) -> None:
        """Raise `ValueError` where a layer that is not packed cannot give tokens back, before anything is changed."""
        for number, layer in enumerate(self.layers):
            if isinstance(layer, PackedLayer | DummyLayer) or getattr(layer, "record_past", False):
                continue
            full = isinstance(layer, DynamicSlidingWindowLayer) and layer.get_seq_length() >= layer.sliding_window
            if full or isinstance(layer, LinearAttentionCacheLayerMixin):
                raise ValueError(
                    f"crop({tokens_to_remove}): layer {number} ({self.kinds[number]}) has let go of what came before "
                    "its newest tokens; call cache.activate_past_recording() before the tokens are read that may be "
                    "taken back"
                )

    def _expect_in_step(self, layer_idx: int, tokens: int) -> None:
        """Raise `ValueError` where a layer that is not packed holds other tokens than the packed ones.

        A forward that was interrupted leaves them so.
        """
        layer = self.layers[layer_idx]
        if not isinstance(layer, CacheLayerMixin) or isinstance(layer, DummyLayer):
            return
        first = self.layers.index(self.packed[0])
        length = self.packed[0].get_seq_length() - (tokens if layer_idx > first else 0)
        if layer.get_seq_length() != length:
            raise ValueError(
                f"layer {layer_idx} of the cache holds {layer.get_seq_length()} tokens and layer {first} {length}: a "
                "forward was interrupted; reset the cache"
            )

    def update_other(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the next tokens of a layer that is not packed; raises `ValueError` after an interrupted forward."""
        layer = self.layers[layer_idx]
        self._expect_in_step(layer_idx, key_states.shape[2])
        states = layer.update(key_states, value_states, *args, **kwargs)
        self.peak.note(*states, *tensors_of(layer))
        if isinstance(layer, DynamicSlidingWindowLayer) and states[0].shape[2] > 2 * layer.keys.shape[2]:
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()  # or views keep a whole prompt
        return states

    def crop_others(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens from the layers that are not packed."""
        for layer in self.other_layers:
            if tokens_to_remove or getattr(layer, "record_past", False):
                layer.crop(tokens_to_remove)

    def reset_others(self) -> None:
        """Make the layers that are not packed anew: the library only zeroes them, and they stay as long as they are."""
        fresh = other_layers(self.config)
        self.layers = [fresh.get(number, layer) for number, layer in enumerate(self.layers)]
