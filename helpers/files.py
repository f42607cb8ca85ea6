"""Writing results so that a reader never sees half a file, and saying where a result came from.

Every file of the project is written through `atomic_path`: to a temporary name in the same folder, then renamed.
An interrupted run leaves the old file as it was; what it left behind is cleared away by the next one.
"""

import errno
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows what a killed run left behind stays
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent
FAST = "HELPERS_FAST"  # variable set by `publish --fast`: the folder that takes what such a run writes


def results_root() -> Path:
    """The folder above `data/` and `figures/` that results go to: the project, or what a fast run was given."""
    return Path(os.environ.get(FAST) or ROOT)


def require(path: str | Path, notebook: str) -> Path:
    """`path`, or a `FileNotFoundError` that names the notebook (`02_controller_training`) which writes it."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{relative_to_root(path)} is not there yet: run notebooks/{notebook}.ipynb first")
    return path


def read_result(path: str | Path, notebook: str, columns: tuple[str, ...] = (), rows: int = 1):
    """The CSV that `notebook` wrote, as a data frame; `ValueError` where columns are missing or rows are too few."""
    import pandas as pd

    table = pd.read_csv(require(path, notebook))
    missing = [name for name in columns if name not in table]
    if missing or len(table) < rows:
        fault = f"lacks column(s) {', '.join(missing)}" if missing else f"has {len(table)} row(s), fewer than {rows}"
        raise ValueError(f"{relative_to_root(path)} {fault}: run notebooks/{notebook}.ipynb again")
    return table


FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
YOUNG_SECONDS = 1.0  # a folder younger than this may not be locked yet by the process that made it


@contextmanager
def atomic_path(path: str | Path, directory: bool = False):
    """Yield a temporary path beside `path`; on success rename it to `path`, on failure remove it.

    With `directory=True` the temporary path is an empty folder that replaces a folder at `path`. A full disk is an
    `OSError` that names the file and says that the old one is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    with explain_full_disk(path), _temporary_folder(path) as temporary:
        target = temporary if directory else temporary / path.name
        yield target
        if directory and path.exists():
            with _temporary_folder(path, ".old") as old:
                os.replace(path, old / path.name)
                try:
                    os.replace(target, path)
                except OSError:
                    os.replace(old / path.name, path)
                    raise
        else:
            os.replace(target, path)


@contextmanager
def atomic_files(folder: str | Path):
    """Yield a temporary folder inside `folder`; on success every file in it replaces its namesake in `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    recover(folder / "files")
    with explain_full_disk(folder), _temporary_folder(folder / "files") as temporary:
        yield temporary
        for path in sorted(temporary.iterdir()):
            os.replace(path, folder / path.name)


def remove_folder(path: str | Path) -> None:
    """Remove a folder so that it is there as a whole or not at all, whenever the run is interrupted."""
    with _temporary_folder(Path(path)) as temporary:
        os.replace(path, temporary / "removed")


def recover(path: str | Path) -> None:
    """Undo what a killed run left of replacing `path`: put back a folder that was moved aside, remove temporary ones.

    Folders of runs that are alive are told by their lock and left alone.
    """
    path = Path(path)
    name = re.compile(rf"\.{re.escape(path.name)}(\.old)?\.[a-z0-9_]{{8}}")
    for left in [p for p in path.parent.iterdir() if name.fullmatch(p.name)] if path.parent.is_dir() else []:
        if not _abandoned(left):
            continue
        if ".old." in left.name and (left / path.name).exists() and not path.exists():
            os.replace(left / path.name, path)
        shutil.rmtree(left, ignore_errors=True)


def _abandoned(folder: Path) -> bool:
    try:
        if fcntl is None or time.time() - folder.stat().st_mtime < YOUNG_SECONDS:
            return False
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


@contextmanager
def _temporary_folder(path: Path, suffix: str = ""):
    """A folder beside `path`, locked as long as this process lives, and removed in the end."""
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}{suffix}.", dir=path.parent))
    handle = None
    if fcntl is not None:
        handle = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield folder
    finally:
        if handle is not None:
            os.close(handle)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def explain_full_disk(path: str | Path):
    """Let an error that means a full disk name the file that was being written."""
    try:
        yield
    except Exception as error:
        # Libraries that write by themselves wrap the system's error into one of their own.
        told = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        if number not in FULL_DISK:
            raise
        reason = f"{os.strerror(number)}: not written, what was there before is untouched; make room and run again"
        raise OSError(number, reason, relative_to_root(path)) from error


def inside(folder: str | Path, name: str) -> Path:
    """The path of the file `name` directly inside `folder`; `ValueError` for a name that would lead elsewhere."""
    if not name or name in (".", "..") or any(sign in name for sign in "/\\:\0"):
        raise ValueError(f"name must be that of a file in {relative_to_root(folder)}, without a path, got {name!r}")
    return Path(folder) / name


def write_json(path: str | Path, content: object) -> None:
    """Write `content` as indented JSON, atomically; a result that is the same but for its `date` keeps the old date."""
    path = Path(path)
    if isinstance(content, dict) and "date" in content and path.is_file():
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            old = None
        if (
            isinstance(old, dict)
            and "date" in old
            and {**old, "date": ""} == json.loads(json.dumps({**content, "date": ""}))
        ):
            content = {**content, "date": old["date"]}
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


def peak_memory_bytes() -> int:
    """The largest resident memory that this process has had."""
    try:  # Linux: ru_maxrss would count what the parent held when it started this process
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


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
        **({"fast": True} if os.environ.get(FAST) else {}),
        **extra,
    }


def environment_table(**extra: object):
    """`provenance` as a table for the head of a notebook, without the date, which would change at every run."""
    import pandas as pd

    entries = {name: str(value) for name, value in provenance(**extra).items() if name != "date"}
    return pd.DataFrame({"value": entries}).rename_axis("environment")
