"""Large float32 linear layers on a CPU through oneDNN instead of MKL, which torch would take.

Reading a few pending tokens at once is what a large model does when a gate fires, or when it checks a draft. One row
costs the reading of the matrix, and a few more rows should cost little more; with MKL they cost two to four times as
much, with oneDNN about half of that, and long prompts are read faster too. Small matrices, which stay in the
processor's caches, are left to MKL.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

LEAST_WEIGHTS = 500_000  # of a layer that gains


class OneDNNLinear(nn.Linear):
    """`nn.Linear` with the same numbers up to rounding; `nn.Linear` itself for gradients, or once moved or halved."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or input.dtype != torch.float32 or input.device.type != "cpu":
            return super().forward(input)
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")


def use_onednn_linear(model: PreTrainedModel) -> PreTrainedModel:
    """Let the large linear layers of a float32 model on the CPU use oneDNN; other models stay as they are."""
    if torch.backends.mkldnn.is_available() and model.dtype == torch.float32 and not hasattr(model, "hf_device_map"):
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if type(module) is nn.Linear and weight.device.type == "cpu" and weight.numel() >= LEAST_WEIGHTS:
                module.__class__ = OneDNNLinear
    return model
