"""Large linear layers over a few tokens, on a CPU: what catching up with some pending tokens consists of.

MKL, which torch uses for float32, multiplies a large matrix with 2 to 16 rows in two to four times the time of one
row, although the time of one row is spent on reading the matrix; oneDNN, which is in torch as well, needs half of
that. Small matrices, which stay in the processor's caches, are left to MKL.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

LEAST_WEIGHTS = 500_000  # of a layer that gains
MOST_ROWS = 32  # above which MKL catches up


class ThinLinear(nn.Linear):
    """`nn.Linear` that gives few rows to oneDNN: the same numbers up to rounding, for inference in float32."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.numel() <= MOST_ROWS * self.in_features and not torch.is_grad_enabled():
            return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")
        return super().forward(input)


def use_thin_linear(model: PreTrainedModel) -> PreTrainedModel:
    """Let the large float32 layers of a model on the CPU read few tokens at a time as fast as they can."""
    if torch.backends.mkldnn.is_available() and model.dtype == torch.float32 and not hasattr(model, "hf_device_map"):
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if type(module) is nn.Linear and weight.device.type == "cpu" and weight.numel() >= LEAST_WEIGHTS:
                module.__class__ = ThinLinear
    return model
