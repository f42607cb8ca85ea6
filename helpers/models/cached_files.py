"""The user's cache folder: what was read from a GGUF file or fetched with pip is there the next time.

The system's usual place (`~/.cache/adaptive-generation` on Linux); the variable ADAPTIVE_GENERATION_CACHE moves it.
"""

import hashlib
import os
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from filelock import FileLock

VARIABLE = "ADAPTIVE_GENERATION_CACHE"


def cache_folder() -> Path:
    """Where files are kept between runs."""
    return Path(os.environ.get(VARIABLE) or platformdirs.user_cache_path("adaptive-generation"))


def sha256(path: Path) -> str:
    """Checksum of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def one_process_at_a_time(path: Path):
    """Of several processes that make `path`, let one work and the others wait; they then find it made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{path.name}.lock")):
        yield
