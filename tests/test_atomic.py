"""What a killed or a failing run leaves of a file or a folder that was being replaced."""

import fcntl
import os
import time

import pytest

from helpers.io import atomic
from helpers.io.atomic import atomic_files, atomic_path, recover, remove_folder


def left_behind(path, suffix=""):
    """A temporary folder beside `path` as a run leaves it that was killed a minute ago."""
    folder = path.parent / f".{path.name}{suffix}.abcdefgh"
    folder.mkdir()
    os.utime(folder, (time.time() - 60,) * 2)
    return folder


def test_what_killed_runs_left_is_cleared_away(tmp_path):
    path = tmp_path / "model"
    old = left_behind(path, ".old")
    (old / "model").mkdir()
    (old / "model" / "weights").write_text("kept")
    os.utime(old, (time.time() - 60,) * 2)
    temporary = left_behind(path)
    recover(path)
    assert (path / "weights").read_text() == "kept"
    assert not old.exists()
    assert not temporary.exists()


def test_what_a_living_run_works_in_is_left_alone(tmp_path):
    path = tmp_path / "table.csv"
    folder = left_behind(path)
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    recover(path)
    assert folder.exists()
    os.close(handle)
    recover(path)
    assert not folder.exists()


def test_a_folder_too_young_to_be_locked_is_left_alone(tmp_path):
    folder = tmp_path / ".table.csv.abcdefgh"
    folder.mkdir()
    recover(tmp_path / "table.csv")
    assert folder.exists()


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.mkdir()
    (path / "weights").write_text("old")
    real, calls = os.replace, []

    def second_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError("no")
        real(source, target)

    with pytest.raises(OSError, match="no"), atomic_path(path, directory=True):
        monkeypatch.setattr(atomic.os, "replace", second_fails)
    assert (path / "weights").read_text() == "old"


def test_folders_are_replaced_and_removed_whole(tmp_path):
    path = tmp_path / "model"
    for content in ("first", "second"):
        with atomic_path(path, directory=True) as temporary:
            (temporary / "weights").write_text(content)
    assert (path / "weights").read_text() == "second"
    with atomic_files(path) as temporary:
        (temporary / "weights").write_text("third")
    assert (path / "weights").read_text() == "third"
    remove_folder(path)
    assert list(tmp_path.iterdir()) == []
