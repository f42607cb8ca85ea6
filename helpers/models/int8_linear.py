"""Weights of linear layers at 8 bits, on a CPU: a quarter of the memory to read, which is what a decode step waits for.

Weights `[out, in]` are rounded by output channel, activations by token as they come, and integers are multiplied by
integers (`torch._int_mm`). The scheme is that of `Int8DynamicActivationInt8WeightConfig` in torchao, whose eager
modules were slower than full precision on a CPU: a dozen tensor operations around each product. Here rounding is
compiled.
"""

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from helpers.cache.compiling import compilers

_compiled, _ = compilers({"reassoc", "nsz", "contract", "arcp"})


class Int8Linear(nn.Module):
    """What stands for an `nn.Linear` of weights `[out, in]`: integers with a `scale` for each output channel."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale[:, 0].contiguous())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        codes, scales = round_rows(input.reshape(-1, self.in_features).float())
        output = torch._int_mm(codes, self.weight.t()) * self.scale
        output *= scales[:, None]
        if self.bias is not None:
            output += self.bias
        return output.to(input.dtype).reshape(*input.shape[:-1], self.out_features)


def round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 `[n, in]` as int8 `[n, in]` and a scale for each row `[n]`, of which they are multiples.

    The scale of a row with NaN or infinity is NaN.
    """
    codes, scales = np.empty(x.shape, np.int8), np.empty(len(x), np.float32)
    _round_rows(x.detach().contiguous().numpy(), codes, scales)
    return torch.from_numpy(codes), torch.from_numpy(scales)


@_compiled
def _round_rows(x, codes, scales):
    for i in range(len(x)):
        row, most, total = x[i], np.float32(0), np.float32(0)
        for j in range(len(row)):
            most = max(most, abs(row[j]))
            total += row[j] * np.float32(0)  # NaN where one is NaN or infinite
        scale = most / np.float32(127)
        inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
        for j in range(len(row)):
            codes[i, j] = np.int8(np.rint(row[j] * inverse))
        scales[i] = scale + total


def use_int8_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Keep the weights of all linear layers of a model on the CPU at 8 bits; embeddings, norms and biases stay.

    Raises `ValueError` for a model on another device.
    """
    if model.device.type != "cpu" or hasattr(model, "hf_device_map"):
        raise ValueError(f"weights='int8' is for models on the CPU, and this one is on {model.device}")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
    return model
