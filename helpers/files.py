"""Writing results so that a reader never sees half a file, and saying where a result came from.

Every file of the project is written through `atomic_path`: to a temporary name in the same folder, then renamed.
An interrupted run leaves the old file as it was.
"""

import json
import os
import platform
import shutil
import tempfile
from contextlib import contextmanager
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def atomic_path(path: str | Path, directory: bool = False):
    """Yield a temporary path beside `path`; on success rename it to `path`, on failure remove it.

    With `directory=True` the temporary path is an empty folder that replaces a folder at `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    target = temporary if directory else temporary / path.name
    try:
        yield target
        if directory and path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            os.replace(path, old / path.name)
            try:
                os.replace(target, path)
            except OSError:
                os.replace(old / path.name, path)
                raise
            finally:
                shutil.rmtree(old)
        else:
            os.replace(target, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def inside(folder: str | Path, name: str) -> Path:
    """The path of the file `name` directly inside `folder`; `ValueError` for a name that would lead elsewhere."""
    if not name or name in (".", "..") or any(sign in name for sign in "/\\:\0"):
        raise ValueError(f"name must be that of a file in {relative_to_root(folder)}, without a path, got {name!r}")
    return Path(folder) / name


def write_json(path: str | Path, content: object) -> None:
    """Write `content` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def relative_to_root(path: str | Path) -> str:
    """A path as shown in results: relative to the project where it lies inside it, else only its last two parts."""
    if not Path(path).is_absolute() and not Path(path).exists():
        return str(path)  # the name of a hub repository
    path = Path(path).resolve()
    if path.is_relative_to(ROOT):
        return path.relative_to(ROOT).as_posix()
    return "/".join(path.parts[-2:])


def cpu_name() -> str:
    """The processor's marketing name where the system tells it, else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def provenance(**extra: object) -> dict[str, object]:
    """What a result file carries beside its numbers: versions, device, date and the caller's own entries."""
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        **extra,
    }


def environment_table(**extra: object):
    """`provenance` as a table for the head of a notebook, without the date, which would change at every run."""
    import pandas as pd

    entries = {name: str(value) for name, value in provenance(**extra).items() if name != "date"}
    return pd.DataFrame({"value": entries}).rename_axis("environment")
