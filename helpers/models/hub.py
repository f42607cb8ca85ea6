"""Models and data sets from the Hugging Face hub, without ever hanging on it.

A child process downloads, and this one watches the files: as long as they grow the download goes on, after 15 s
without a byte it is ended and an error says what was missing. (`HF_HUB_DOWNLOAD_TIMEOUT` would not do: `datasets`
and the hub's Xet client wait and retry by clocks of their own.) Local folders never come here.
"""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

SILENCE_SECONDS = 15.0
MODEL_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]


class HubError(RuntimeError):
    """A model or data set could not be had from the hub."""


def fetch_model(name: str, silence: float = SILENCE_SECONDS) -> Path:
    """Folder of the model `name`: the local folder of that path, else the hub's, downloaded if it must be.

    Raises `HubError` that names the model and says how to run offline.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=MODEL_FILES, local_files_only=True))
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            return folder
    except LocalEntryNotFoundError:
        pass
    except HFValidationError as error:
        raise _error("model", name, "it is neither a folder here nor the name of a hub repository") from error
    _download("model", [name], silence)
    return Path(snapshot_download(name, allow_patterns=MODEL_FILES, local_files_only=True))


def fetch_dataset(source: str, split: str, silence: float = SILENCE_SECONDS):
    """Split `split` of the hub data set `name` or `name:configuration` as a `datasets.Dataset`.

    Raises `HubError` as `fetch_model` does.
    """
    from datasets import load_dataset
    from huggingface_hub.constants import is_offline_mode

    name, _, config = source.partition(":")
    if not is_offline_mode():
        _download("dataset", [name, split, config], silence)
    try:
        return load_dataset(name, config or None, split=split)
    except Exception as error:  # datasets raises a dozen unrelated types here
        raise _error("data set", name, str(error).strip().splitlines()[-1]) from error


def _error(kind: str, name: str, reason: str) -> HubError:
    download = "hf download --repo-type dataset" if kind == "data set" else "hf download"
    kept = "JSONL or story file" if kind == "data set" else "folder"
    folder = ", or set TEXTS_DIR to a folder of the files that data/README.md lists" if kind == "data set" else ""
    return HubError(
        f"{kind} '{name}' could not be had from the Hugging Face hub: {reason.rstrip('.')}. To run offline, use "
        f"PRESET=embedded, which needs no network, or fetch it where there is one ({download} {name}) and give the "
        f"path of the local {kept} instead of the name{folder}."
    )


def _download(kind: str, arguments: list[str], silence: float) -> None:
    """Run the download in a child process until it ends or no byte has arrived for `silence` seconds."""
    label, name = "data set" if kind == "dataset" else kind, arguments[0]
    # As a script (-P keeps this folder off its path): as a module it would load all of `helpers.models` first.
    command = [sys.executable, "-P", __file__, kind, *arguments]
    # The child's own time-outs are longer than ours, so that it is the arrival of data that decides.
    environment = {**os.environ, "HF_HUB_DOWNLOAD_TIMEOUT": "60", "HF_HUB_ETAG_TIMEOUT": "60"}
    # Its progress bars go where ours would; what it has to say to us comes through its standard output.
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        child.stdout.readline()  # "ready": its imports are done, and the clock may start
        size, moved = _bytes_here(kind, name), time.monotonic()
        while child.poll() is None:
            time.sleep(0.2)
            now = _bytes_here(kind, name)
            if now != size:
                size, moved = now, time.monotonic()
            elif time.monotonic() - moved > silence:
                raise _error(label, name, f"no data arrived for {silence:g} s")
        if child.returncode:
            raise _error(label, name, child.stdout.read().strip() or f"exit code {child.returncode}")
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def _bytes_here(kind: str, name: str) -> int:
    """Bytes on disk of what a download of `name` writes to."""
    from huggingface_hub import constants

    folders = [Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}", Path(constants.HF_XET_CACHE)]
    if kind == "dataset":
        from datasets import config

        folders.append(Path(config.HF_DATASETS_CACHE))
    total = 0
    for path in (path for folder in folders for path in folder.rglob("*")):
        with suppress(OSError):  # renamed since it was listed
            total += path.lstat().st_size
    return total


def _child(kind: str, name: str, split: str = "", config: str = "") -> None:
    from huggingface_hub import constants, snapshot_download

    # The file must grow as bytes arrive, or a slow line would look like a dead one.
    constants.DOWNLOAD_CHUNK_SIZE = 2**16
    if kind == "dataset":
        from datasets import load_dataset

    print("ready", flush=True)
    try:
        if kind == "model":
            snapshot_download(name, allow_patterns=MODEL_FILES)
        else:
            load_dataset(name, config or None, split=split)
    except Exception as error:  # whatever it is, the parent tells the user
        print(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__))
        sys.exit(1)


if __name__ == "__main__":
    _child(*sys.argv[1:])
