"""Writing files so that a reader never sees half of one.

Every file of the project is written through `atomic_path`: to a temporary name in the same folder, then renamed.
An interrupted run leaves the old file as it was; what it left behind is cleared away by the next one.
"""

import errno
import os
import re
import shutil
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from helpers.io.paths import relative_to_root

try:
    import fcntl
except ImportError:  # on Windows what a killed run left behind stays
    fcntl = None


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
