"""Models in GGUF files, as Ollama and llama.cpp have them: read by transformers once, then kept in its own format.

Reading takes from seconds to minutes, most of it for the tokenizer; what was read is kept in the user's cache folder,
under the file's checksum, as safetensors in float32, so that nothing is rounded. Nothing in a file is run.
"""

import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.io import atomic_path
from helpers.models.cached_files import cache_folder, one_process_at_a_time, sha256

MAGIC = b"GGUF"
ROTARY_SCALES = "rope_freqs.weight"  # of Llama 3.1 and later; transformers does not read them


def find_gguf(source: str | Path) -> Path | None:
    """The GGUF file that `source` is, or that a folder without safetensors holds; None for any other source.

    Raises `ValueError` for a folder with several.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"model '{source}': there is no such file")
        return path
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(
            f"model '{source}': holds {len(files)} GGUF files, name one: {', '.join(f.name for f in files)}"
        )
    return files[0] if files else None


def read_gguf(path: Path, quiet: bool = False) -> Path:
    """Folder in Hugging Face format with the model of a GGUF file and its tokenizer, made if it is not there yet.

    Raises `ValueError` where the file is no whole causal language model with a tokenizer that transformers can read.
    """
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"model '{path}': is not a GGUF file")
    folder = cache_folder() / "gguf" / sha256(path)
    with one_process_at_a_time(folder):
        if not folder.is_dir():
            if not quiet:
                size = path.stat().st_size / 1e6
                print(f"reading {path.name} ({size:.0f} MB), which is done once; kept in {folder}", flush=True)
            _convert(path, folder)
    return folder


def _convert(path: Path, folder: Path) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        model, found = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except MemoryError:
        raise
    except Exception as error:  # a broken file makes the readers raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"model '{path}': no causal language model with a tokenizer that transformers can read there ({reason})"
        ) from error
    missing = sorted([*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])])
    if missing:
        raise ValueError(f"model '{path}': lacks {len(missing)} weights, {missing[0]} among them: is the file whole?")
    if _has_tensor(path, ROTARY_SCALES):
        print(f"{path.name}: transformers does not read {ROTARY_SCALES}; positions far into a text are not those meant")
    # An ordinary model from here on: as one that "was quantized" it could not be halved or saved.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    with atomic_path(folder, directory=True) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _has_tensor(path: Path, name: str) -> bool:
    from gguf import GGUFReader

    return any(tensor.name == name for tensor in GGUFReader(os.fspath(path)).tensors)
