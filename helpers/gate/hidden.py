"""The last hidden state of a model, noted where its head reads it: what a learned signal sees besides predictions."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel


@dataclass
class Hidden:
    """`states` `[B, n, hidden]`: those from which the model made its latest predictions, if they are `wanted`."""

    wanted: bool
    states: torch.Tensor | None = None

    def note(self, head: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """The hook before the head."""
        self.states = args[0]


@contextmanager
def noting_hidden(model: PreTrainedModel, wanted: bool = True) -> Iterator[Hidden]:
    """While open, what stands for the hidden states of each forward of `model`; nothing is noted unless `wanted`.

    Raises `ValueError` for a model without a head that predicts tokens.
    """
    hidden = Hidden(wanted)
    if not wanted:
        yield hidden
        return
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"model {type(model).__name__} has no head whose input could be read")
    handle = head.register_forward_pre_hook(hidden.note)
    try:
        yield hidden
    finally:
        handle.remove()
