"""A small MLP with standardised inputs, saved as safetensors with a description."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from helpers.io import provenance, write_json
from helpers.io.atomic import atomic_path, inside


@dataclass
class Network:
    """An MLP with the standardisation of its inputs; `features` names them in order."""

    features: tuple[str, ...]
    mean: torch.Tensor  # [features]
    scale: torch.Tensor
    layers: nn.Sequential

    @classmethod
    def create(cls, features: Sequence[str], inputs: torch.Tensor, hidden: Sequence[int], outputs: int) -> "Network":
        """A fresh network for `inputs` `[rows, features]`; `hidden` may be empty, which makes it linear."""
        sizes = [len(features), *hidden]
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(sizes):
            layers += [nn.Linear(wide, narrow), nn.ReLU()]
        layers.append(nn.Linear(sizes[-1], outputs))
        return cls(tuple(features), inputs.mean(0), inputs.std(0).clamp(min=1e-6), nn.Sequential(*layers))

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[..., features]` to `[..., outputs]`, on the device of the inputs, to which the network moves."""
        if self.mean.device != inputs.device:
            self.mean, self.scale = self.mean.to(inputs.device), self.scale.to(inputs.device)
            self.layers.to(inputs.device)
        return self.layers((inputs - self.mean) / self.scale)

    @property
    def hidden(self) -> tuple[int, ...]:
        return tuple(layer.out_features for layer in self.layers if isinstance(layer, nn.Linear))[:-1]

    def save(self, folder: str | Path, name: str, about: dict[str, object]) -> None:
        """Write `name`.safetensors and `name`.json (features, sizes, `about`, provenance) into `folder`.

        The description is inside the first file too, so that weights and description are replaced as one.
        """
        tensors = {f"layers.{key}": value.contiguous() for key, value in self.layers.state_dict().items()}
        content = {"features": list(self.features), "hidden": list(self.hidden), **about}
        path = inside(folder, f"{name}.safetensors")
        with atomic_path(path) as temporary:
            tensors |= {"mean": self.mean, "scale": self.scale}
            save_file(tensors, temporary, metadata={"about": json.dumps(content)})
        write_json(path.with_suffix(".json"), content | provenance())

    @classmethod
    def load(cls, folder: str | Path, name: str, known: Sequence[str], outputs: int) -> tuple["Network", dict]:
        """Read a network and its description: that in the safetensors file, else that of the JSON beside it.

        `known` are the features that the caller can supply, `outputs` how many numbers the network must give. Nothing
        is allocated before the shapes in the file fit the description. Raises `ValueError` for a file that is not a
        network, that reads other features, or whose numbers no network can have.
        """
        path = inside(folder, f"{name}.safetensors")
        if not path.is_file():
            raise FileNotFoundError(
                f"no controller {name!r} in {folder}: run notebook 02_controller_training.ipynb first"
            )
        try:
            with safe_open(path, "pt") as file:
                about = (file.metadata() or {}).get("about") or path.with_suffix(".json").read_text(encoding="utf-8")
                about = json.loads(about)
                features, hidden = tuple(map(str, about["features"])), tuple(map(int, about["hidden"]))
                if foreign := sorted(set(features) - set(known)):
                    raise _Foreign(f"reads unknown feature(s) {foreign}; known are {list(known)}")
                _check_shapes(file, features, hidden, outputs)
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
        except _Foreign as error:
            raise ValueError(f"controller {path.name}: {error}") from None
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, SafetensorError) as error:
            raise ValueError(f"controller {path.name}: cannot be read ({type(error).__name__}: {error})") from error
        if not all(torch.isfinite(value).all() for value in tensors.values()):
            raise ValueError(f"controller {path.name}: holds NaN or infinity")
        if not (tensors["scale"] > 0).all():
            raise ValueError(f"controller {path.name}: scales of its inputs must be positive")
        network = cls.create(features, torch.zeros(2, len(features)), hidden, outputs)
        network.mean, network.scale = tensors.pop("mean"), tensors.pop("scale")
        network.layers.load_state_dict({key.removeprefix("layers."): value for key, value in tensors.items()})
        network.layers.eval().requires_grad_(False)
        return network, about


class _Foreign(Exception):
    """A file that can be read, and is not what it should be."""


def _check_shapes(file: safe_open, features: tuple[str, ...], hidden: tuple[int, ...], outputs: int) -> None:
    """Raise `_Foreign` unless an open file holds exactly the float32 tensors of a network of these sizes."""
    found = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
    sizes = [len(features), *hidden, outputs][: len(found) + 2]  # more layers than tensors do not fit in any case
    expected = {"mean": [len(features)], "scale": [len(features)]}
    for number, (wide, narrow) in enumerate(pairwise(sizes)):
        expected |= {f"layers.{2 * number}.weight": [narrow, wide], f"layers.{2 * number}.bias": [narrow]}
    for key in sorted(expected.keys() | found.keys()):
        there = [found[key].get_dtype(), found[key].get_shape()] if key in found else "nothing"
        wanted = ["F32", expected[key]] if key in expected else "nothing"
        if there != wanted:
            raise _Foreign(
                f"its weights do not fit its description: {key} is {there}, expected {wanted} for {len(features)} "
                f"features, hidden layers {list(hidden)[:8]} and {outputs} output(s)"
            )
