"""Which layers of a model are packed: those of full attention. The others keep the library's own, bounded layers.

A configuration says by `layer_types` what each layer is: sliding windows and chunks hold few tokens however long the
text, states of linear attention and convolutions hold none. Nothing here goes by a model's name.
"""

from collections import Counter

from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    CacheLayerMixin,
    DynamicLayer,
    get_layer_types_and_kwargs,
)

LATENT = "kv_lora_rank"  # a configuration with it keeps keys and values in one latent vector


def kinds_of(config: PreTrainedConfig) -> list[str]:
    """The kind of each layer, in the library's words ("full_attention", "sliding_attention", ...).

    Raises `ValueError` for encoder-decoder models, for latent attention, for kinds that the installed transformers
    has no cache for, and where no layer is of full attention: nothing would be packed.
    """
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"PackedKVCache serves decoder-only models; {name} is an encoder-decoder model")
    text = config.get_text_config(decoder=True)
    if getattr(text, LATENT, None):
        raise ValueError(
            f"PackedKVCache packs keys and values of one size; {name} has latent attention ({LATENT}="
            f"{getattr(text, LATENT)}), whose keys and values are of different sizes and come from one small vector"
        )
    kinds, _ = get_layer_types_and_kwargs(text)
    if unknown := sorted(set(kinds) - set(DYNAMIC_LAYER_TYPE_MAPPING)):
        raise ValueError(f"PackedKVCache does not know layers of type {', '.join(unknown)}, which {name} has")
    if not any(map(is_packed, kinds)):
        window = getattr(text, "sliding_window", None)
        hint = f"; it has sliding_window={window}: set it to None if texts stay shorter" if window else ""
        raise ValueError(
            f"PackedKVCache packs layers of full attention; {name} has only {', '.join(sorted(set(kinds)))}, so "
            f"nothing would be packed{hint}"
        )
    return kinds


def is_packed(kind: str) -> bool:
    """Whether layers of this kind are packed."""
    return DYNAMIC_LAYER_TYPE_MAPPING[kind] is DynamicLayer


def packed_layers(config: PreTrainedConfig) -> list[int]:
    """The numbers of the layers that are packed; raises as `kinds_of`."""
    return [number for number, kind in enumerate(kinds_of(config)) if is_packed(kind)]


def other_layers(config: PreTrainedConfig) -> dict[int, CacheLayerMixin]:
    """New layers of the library for all that are not packed, by number."""
    kinds, arguments = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    made = zip(kinds, arguments, strict=True)
    return {
        number: DYNAMIC_LAYER_TYPE_MAPPING[kind](**settings)
        for number, (kind, settings) in enumerate(made)
        if not is_packed(kind)
    }


def shares_states(config: PreTrainedConfig) -> bool:
    """Whether some layers read the keys and values of others: they are then handed out as plain tensors."""
    return "reuse" in (getattr(config.get_text_config(decoder=True), "kv_sharing_modes", None) or ())


def describe_layers(kinds: list[str]) -> str:
    """Which layers of a model with layers of these kinds are packed, in one line."""
    packed = [number for number, kind in enumerate(kinds) if is_packed(kind)]
    others = Counter(kind for kind in kinds if not is_packed(kind))
    if not others:
        return f"all {len(packed)} layers packed"
    plural = "s" if len(packed) > 1 else ""
    shown = ", ".join(map(str, packed)) if len(packed) <= 12 else f"{len(packed)} of full attention"
    rest = ", ".join(f"{count} of type {kind}" for kind, count in sorted(others.items()))
    return f"packed: layer{plural} {shown} of {len(kinds)}; as the library keeps them: {rest}"
