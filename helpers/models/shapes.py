"""Shapes of published models, and models of these shapes with random weights.

For timing, which neither weights nor text change. Nothing here loads a trained model.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from helpers.cache import use_packed_attention

SMOLLM = {"vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 2048}

# As in the models' published configurations.
SHAPES: dict[str, dict[str, object]] = {
    "SmolLM-135M": {**SMOLLM, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                    "num_attention_heads": 9, "num_key_value_heads": 3},
    "SmolLM-360M": {**SMOLLM, "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
                    "num_attention_heads": 15, "num_key_value_heads": 5},
    "SmolLM-1.7B": {**SMOLLM, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
                    "num_attention_heads": 32, "num_key_value_heads": 32},
    "Llama-2-7B": {"vocab_size": 32000, "tie_word_embeddings": False, "max_position_embeddings": 4096,
                   "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 32},
}  # fmt: skip


def shape_config(shape: str, **changes: object) -> LlamaConfig:
    """Configuration of one of `SHAPES`, entries replaced by `changes`. Raises `ValueError` for other names."""
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    return LlamaConfig(**{**SHAPES[shape], **changes})


def weight_count(config: PreTrainedConfig) -> int:
    """Number of weights of a model of this shape, found without allocating it."""
    with torch.device("meta"), no_init_weights():
        model = LlamaForCausalLM(config)
    model.tie_weights()
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def random_model(
    shape: str | LlamaConfig,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LlamaForCausalLM:
    """A model of one of `SHAPES` (or of a configuration) with normal random weights, ready for packed attention.

    Made on the device itself, in the order of its parameters: the same seed gives the same weights on one device.
    """
    config = shape_config(shape) if isinstance(shape, str) else shape
    with torch.device(device), no_init_weights():
        model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    model.tie_weights()
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, config.initializer_range, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    model.generation_config.eos_token_id = None
    return use_packed_attention(model)
