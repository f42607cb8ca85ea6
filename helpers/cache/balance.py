"""Balanced keys: linear maps of queries and keys under which their scores stay and quantizing keys does least harm.

With `S_q` and `S_k` the second moments of queries and keys of a key/value head, keys are stored as `k A` and met by
`q A^-1`, A the symmetric root of `M = S_k^-1/2 (S_k^1/2 S_q S_k^1/2)^1/2 S_k^-1/2`. Among all linear maps this makes
the product of the traces of both moments least, and with it what an error of keys does to scores. `M S_k M = S_q`: both
have the same moments afterwards. The idea of rotating keys by what queries look at is OSCAR's (arXiv 2605.17757).
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from helpers.cache.quantization import rotation_matrix

SHRINK = 0.1  # share of their diagonal that moments are moved towards


@dataclass(frozen=True, eq=False)
class Balance:
    """A of every packed layer and key/value head of one model, float32 `[packed layers, H, D, D]`.

    It belongs to the model, like its weights: caches share it, and their bytes do not count it.
    """

    matrices: torch.Tensor
    _made: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of_moments(cls, query: torch.Tensor, key: torch.Tensor) -> "Balance":
        """From second moments `[layers, H, D, D]`, of queries the mean over the heads that share a key head."""
        query, key = (_shrunk(x.double()) for x in (query, key))
        root = _power(key, 0.5)
        inverse = _power(key, -0.5)
        balance = _power(inverse @ _power(root @ query @ root, 0.5) @ inverse, 0.5)
        # Keys stay as long as they are, so that half precision holds their scales.
        before, after = (x.diagonal(dim1=-2, dim2=-1).sum(-1) for x in (key, balance @ key @ balance))
        balance = (balance * (before / after).sqrt()[..., None, None]).float()
        if not balance.isfinite().all():
            raise ValueError("moments must be finite and of keys and queries that are not all zero")
        return cls(balance)

    def __deepcopy__(self, memo: dict) -> "Balance":
        return self  # it belongs to the model, of which a copy of a cache is a copy no more

    def turns(
        self, layers: Sequence[int], device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the keys and what the queries of `layers` are multiplied by, rotation included: `[L, 1, H, D, D]` each.

        Made once for each choice of layers, device and dtype, and shared by all caches from then on.
        """
        key = tuple(layers), torch.device(device), dtype
        if key not in self._made:
            chosen = self.matrices[list(layers)].double()
            rotation = rotation_matrix(chosen.shape[-1]).to(chosen.device)
            both = chosen @ rotation, torch.linalg.inv(chosen).mT @ rotation
            self._made[key] = tuple(x.unsqueeze(1).to(device, dtype).contiguous() for x in both)
        return self._made[key]


_OF_MODELS: dict[int, tuple[weakref.ref, Balance]] = {}  # by the identity of the model's configuration


def use_key_balance(model: PreTrainedModel, balance: Balance | None) -> PreTrainedModel:
    """Have every packed cache made from `model.config` from now on balance its keys by `balance` (None: by none)."""
    config = model.config.get_text_config(decoder=True)
    key = id(config)
    _OF_MODELS.pop(key, None)
    if balance is not None:
        _OF_MODELS[key] = weakref.ref(config, lambda _: _OF_MODELS.pop(key, None)), balance
    return model


def key_balance_of(config: PreTrainedConfig) -> Balance | None:
    """What `use_key_balance` gave the model of this configuration; a copy of a configuration has none."""
    known = _OF_MODELS.get(id(config.get_text_config(decoder=True)))
    return None if known is None else known[1]


def _shrunk(moments: torch.Tensor) -> torch.Tensor:
    diagonal = torch.diag_embed(moments.diagonal(dim1=-2, dim2=-1))
    least = 1e-6 * diagonal.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return (1 - SHRINK) * moments + SHRINK * diagonal + least * torch.eye(moments.shape[-1]).to(moments)


def _power(matrices: torch.Tensor, exponent: float) -> torch.Tensor:
    """Symmetric positive matrices to a power."""
    values, vectors = torch.linalg.eigh(matrices)
    return (vectors * values.clamp(min=1e-12).pow(exponent)[..., None, :]) @ vectors.mT
