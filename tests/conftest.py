"""Tiny random models of every supported family, and where shared real models and data lie if there are any."""

import os
from pathlib import Path

import pytest
import torch

# Triton decides when it is imported whether it compiles for a GPU or runs kernels in its interpreter, on the CPU.
os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))

from transformers import AutoConfig, AutoModelForCausalLM

from helpers.cache.attention.dispatch import use_packed_attention
from helpers.io.paths import ROOT
from helpers.training.tokenizer import train_tokenizer

SHARED = ROOT.parent / "shared"
COMMON = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_experts": 4}
LOCAL_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}

# What each family needs beside heads and head_dim; the first two are those on which every property is checked.
FAMILIES = {
    "llama": {},
    "gpt2": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "gpt_neox": {},
    "phi3": {},
    "opt": {"do_layer_norm_before": True, "dropout": 0.0},
    "apertus": {},
    "cohere": {},
    "ernie4_5": {},
    "gemma": {},
    "glm": {},
    "granite": {},
    "mixtral": {"sliding_window": None, **LOCAL_EXPERTS},
    "nemotron": {},
    "olmo2": {},
    "olmoe": EXPERTS,
    "phi": {},
    "qwen3_moe": EXPERTS,
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
}
WINDOW = 24  # tokens that a sliding or chunked layer sees
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16}

# Families with layers of other kinds beside those of full attention.
HYBRIDS = {
    "gemma2": {**SLIDING, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 32},
    "gemma3_text": {**SLIDING, "query_pre_attn_scalar": 32},
    "gemma3n_text": {
        "sliding_window": WINDOW, "layer_types": SLIDING["layer_types"] * 2, "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 97, "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gpt_oss": {**SLIDING, **LOCAL_EXPERTS},
    "olmo3": SLIDING,
    "cohere2": SLIDING,
    "exaone4": SLIDING,
    "vaultgemma": {**SLIDING, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 5.0},
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": WINDOW,
        "no_rope_layers": [1, 0], "intermediate_size_mlp": 64, **LOCAL_EXPERTS,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": {
        **LINEAR, **EXPERTS, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "shared_expert_intermediate_size": 32,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"], "shared_intermediate_size": 64, **MAMBA, **LOCAL_EXPERTS,
    },
    "bamba": {"attn_layer_indices": [1], **MAMBA},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8,
              "use_mamba_kernels": False},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 32, "ssm_state_size": 16,
                   "layers_block_type": ["mamba", "attention"]},
}  # fmt: skip
WITHOUT_HEAD_DIM = (
    "apertus", "bamba", "cohere", "cohere2", "exaone4", "gpt_neox", "granite", "granitemoehybrid", "jamba", "lfm2",
    "olmo2", "olmo3", "olmoe", "phi", "phi3", "qwen2", "stablelm",
)  # fmt: skip


def tiny_config(family: str, head_dim: int = 32, layers: int = 2):
    """Four query heads (two KV heads where the family groups them) of `head_dim`."""
    hidden = 4 * head_dim
    if family == "gpt2":
        sizes = {"n_embd": hidden, "n_head": 4, "n_layer": layers, "n_positions": 512, "n_inner": 64}
    elif family == "opt":
        sizes = {"hidden_size": hidden, "num_attention_heads": 4, "num_hidden_layers": layers, "ffn_dim": 64,
                 "max_position_embeddings": 512, "word_embed_proj_dim": hidden}  # fmt: skip
    else:
        sizes = {"hidden_size": hidden, "num_attention_heads": 4, "num_hidden_layers": layers,
                 "intermediate_size": 64, "max_position_embeddings": 512}  # fmt: skip
        if family != "gpt_neox":
            sizes |= {"num_key_value_heads": 2}
        if family not in WITHOUT_HEAD_DIM:
            sizes |= {"head_dim": head_dim}
    more = {**FAMILIES, **HYBRIDS}[family]
    if "layer_types" in more:
        sizes["num_hidden_layers"] = len(more["layer_types"])
    if "layers_block_type" in more:
        del sizes["num_hidden_layers"]
    return AutoConfig.for_model(family, **COMMON, **{**sizes, **more})


def tiny_model(
    family: str,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    packed: bool = True,
    seed: int = 0,
    layers: int = 2,
    attention: str | None = None,
):
    """A random model with weights large enough for attention to be far from even."""
    torch.manual_seed(seed)
    config = tiny_config(family, head_dim, layers)
    config.initializer_range = 0.9 / (4 * head_dim) ** 0.5
    # Experts one after another: grouped they are not computed in every dtype.
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, experts_implementation="eager")
    model = model.to(dtype).eval()
    model.generation_config.eos_token_id = None
    return use_packed_attention(model) if packed else model


@pytest.fixture(params=["llama", "gpt2"])
def family(request) -> str:
    return request.param


@pytest.fixture(params=[32, 64, 128])
def head_dim(request) -> int:
    return request.param


@pytest.fixture
def shared() -> Path:
    """The folder of real models and data; tests that use it are skipped where it is absent."""
    if not (SHARED / "models").is_dir():
        pytest.skip("real models and data (../shared) are not here")
    return SHARED


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A tiny model with a tokenizer, in Hugging Face format."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = train_tokenizer(["the cat sat on the mat"] * 3, vocab_size=300)
    model = tiny_model("llama", packed=False)
    model.resize_token_embeddings(len(tokenizer))
    model.config.bos_token_id = tokenizer.bos_token_id
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def random_ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random rows of the given lengths, padded on the left."""
    width = max(lengths)
    ids, mask = random_ids(len(lengths), width, seed), torch.ones(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, : width - length] = 0
        mask[row, : width - length] = 0
    return {"input_ids": ids, "attention_mask": mask}
