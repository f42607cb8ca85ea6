"""Killed, full, out of memory: the next run goes on or starts clean, and what was finished before stays whole.

What a hub does wrong (unreachable, silent, garbage) is in `test_sources`. `FAULT_ROUNDS=10 python -m pytest
tests/test_faults.py` kills ten times as often, at other moments.
"""

import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import fault_jobs
import nbformat
import pandas as pd
import pytest
import torch
from conftest import left_padded, random_ids, tiny_model
from safetensors.torch import load_file
from test_gate import PROMPTS, make_model, make_tokenizer
from test_pretrain import STORIES
from transformers import DynamicCache

import main
from helpers.cache.kv_cache import PackedKVCache
from helpers.gate.gate import EntropyGate
from helpers.gate.generation import gated_generate
from helpers.gate.study.baselines import plain_generate
from helpers.io.atomic import atomic_path
from helpers.io.paths import ROOT
from helpers.io.results import write_json
from helpers.policies.cached_model import CachedModel, score_blocks
from helpers.policies.decoding import decode
from helpers.policies.driver import PolicyDriver
from helpers.policies.learned import LearnedController
from helpers.policies.rules import EntropyRule, FixedBits
from helpers.training.collection import collect, collect_text
from helpers.training.pretraining import train
from helpers.training.table import COLUMNS, read_training_data
from helpers.training.tokenizer import train_tokenizer

ROUNDS = int(os.environ.get("FAULT_ROUNDS", "1"))
KILLS = 5 * ROUNDS  # of each job
FINISH_SECONDS = 120


# Killed


@pytest.fixture(scope="module")
def start(request):
    """Starts a job in a process of its own; they are forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fault_jobs"])

    def start(job: str, folder: Path, die_at: int | None = None):
        process = context.Process(target=fault_jobs.run, args=(job, str(folder), die_at))
        process.start()
        return process

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv(
            "PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        )  # the server finds them there only
        yield start


def finish(process) -> None:
    process.join(FINISH_SECONDS)
    assert process.exitcode == 0


class Collecting:
    """A table of another policy is there already; texts that were collected stay collected."""

    @staticmethod
    def before(folder: Path) -> None:
        texts = [random_ids(1, 30, seed=1)[0].tolist()]
        collect(tiny_model("llama"), texts, folder / "t.csv", FixedBits(8), block=8)

    def __init__(self, folder: Path, reference: Path, before: Path):
        self.path, self.before_bytes = folder / "t.csv", (before / "t.csv").read_bytes()
        self.reference = read_training_data(reference / "t.csv").drop(columns="latency")
        self.texts_done = 0

    def check(self) -> None:
        if self.over():
            self.finished()
        partial = self.path.with_name(".t.partial.csv")
        if partial.exists():
            rows = [line.split(",") for line in partial.read_text().splitlines(keepends=True)[1:]]
            ids = [int(row[COLUMNS.index("text_id")]) for row in rows if len(row) == len(COLUMNS)]
            complete = len(set(ids)) - 1 if ids else 0  # of the last one we cannot tell
            assert complete >= self.texts_done
            self.texts_done = complete

    def over(self) -> bool:
        return self.path.read_bytes() != self.before_bytes

    def finished(self) -> None:
        pd.testing.assert_frame_equal(read_training_data(self.path).drop(columns="latency"), self.reference)


class Training:
    """The controllers of another model are there already; each is at any time the old one or the new one, whole."""

    @staticmethod
    def before(folder: Path) -> None:
        shutil.copytree(ROOT / "data" / "controllers", folder, dirs_exist_ok=True)

    def __init__(self, folder: Path, reference: Path, before: Path):
        self.folder = folder
        self.wanted = {True: self._load(reference), False: self._load(before)}

    @staticmethod
    def _load(folder: Path) -> dict:
        loaded = {name: LearnedController.load(folder, name) for name in ("imitation", "commit", "settle")}
        return {
            name: (each.network.layers.state_dict(), getattr(each, "rates", None), each.start_counts)
            for name, each in loaded.items()
        }

    def check(self) -> None:
        self._compare((True, False))

    def over(self) -> bool:
        return False  # each run trains again

    def finished(self) -> None:
        self._compare((True,))
        assert len(pd.read_csv(self.folder / "costs.csv")) == len(read_training_data(self.folder / "collected.csv"))

    def _compare(self, allowed: tuple[bool, ...]) -> None:
        for name, (weights, rates, counts) in self._load(self.folder).items():
            matches = [
                all(torch.equal(weights[k], other[k]) for k in other if weights[k].shape == other[k].shape)
                and rates == other_rates
                and (counts and counts.counts) == (other_counts and other_counts.counts)
                for other, other_rates, other_counts in (self.wanted[new][name] for new in allowed)
            ]
            assert any(matches), name


class Pretraining:
    """A finished model of another seed is there already; checkpoints only ever move forward."""

    @staticmethod
    def before(folder: Path) -> None:
        tokenizer = train_tokenizer(STORIES, vocab_size=320, context=32)
        settings = replace(fault_jobs.PRETRAINING, steps=3, seed=9)
        train(tokenizer, STORIES, STORIES[:4], folder, settings)

    def __init__(self, folder: Path, reference: Path, before: Path):
        self.folder = folder
        self.weights = [(path / "model.safetensors").read_bytes() for path in (reference, before)]
        self.log = [line.rsplit(",", 1)[0] for line in (reference / "training_log.csv").read_text().splitlines()]
        self.step = 0

    def check(self) -> None:
        assert (self.folder / "model.safetensors").read_bytes() in self.weights
        json.loads((self.folder / "training.json").read_text())
        checkpoint = self.folder / "checkpoint"
        if not checkpoint.exists():  # not yet, already over, or moved aside for the moment
            moved = list(self.folder.glob(".checkpoint.old.*/checkpoint"))
            assert moved or not self.step or self.over()
            checkpoint = moved[0] if moved else checkpoint
        if checkpoint.exists():
            step = json.loads((checkpoint / "state.json").read_text())["step"]
            assert step >= self.step
            self.step = step
            load_file(checkpoint / "weights.safetensors")
            load_file(checkpoint / "optimizer.safetensors")

    def over(self) -> bool:
        new = (self.folder / "model.safetensors").read_bytes() == self.weights[0]
        return new and not any(self.folder.rglob("checkpoint"))

    def finished(self) -> None:
        assert (self.folder / "model.safetensors").read_bytes() == self.weights[0]
        assert json.loads((self.folder / "training.json").read_text())["settings"]["steps"] == 40
        log = [line.rsplit(",", 1)[0] for line in (self.folder / "training_log.csv").read_text().splitlines()]
        assert [line.split(",")[0] for line in log] == [line.split(",")[0] for line in self.log]
        assert not (self.folder / "checkpoint").exists()


class Publishing:
    """The notebook is at any time the one that was there or the published one."""

    CELLS = (
        "import os, pathlib\nwith open('kernels.txt', 'a') as file:\n    file.write(f'{os.getpid()}\\n')",
        "import time\nfor i in range(4):\n    time.sleep(0.1)\n    print(i)",
        "pathlib.Path('result.txt').write_text('done')\n1 + 1",
    )

    @classmethod
    def before(cls, folder: Path) -> None:
        cells = [nbformat.v4.new_code_cell(source, id=f"cell-{i}") for i, source in enumerate(cls.CELLS)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "01_tiny.ipynb")

    def __init__(self, folder: Path, reference: Path, before: Path):
        self.folder = folder
        self.allowed = [(path / "01_tiny.ipynb").read_bytes() for path in (reference, before)]
        assert self.allowed[0] != self.allowed[1]

    def check(self) -> None:
        assert (self.folder / "01_tiny.ipynb").read_bytes() in self.allowed

    def over(self) -> bool:
        return (self.folder / "01_tiny.ipynb").read_bytes() == self.allowed[0]

    def finished(self) -> None:
        assert self.over()
        kernels = self.folder / "kernels.txt"
        for line in kernels.read_text().split() if kernels.exists() else []:
            with suppress(ProcessLookupError):
                os.kill(int(line), signal.SIGKILL)  # a kernel notices the death of its parent only after a while
        kernels.unlink()


JOBS = {job.__name__.lower(): job for job in (Collecting, Training, Pretraining, Publishing)}


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    """Of each job, once: the folder as it is before, as it is in the end, and the seconds in between."""
    known = {}

    def run(job: str):
        if job not in known:
            before, reference = (tmp_path_factory.mktemp(f"{job}-{name}") for name in ("before", "reference"))
            JOBS[job].before(before)
            shutil.copytree(before, reference, dirs_exist_ok=True)
            finish(start("collecting", tmp_path_factory.mktemp("warm")))  # the server's imports are no part of it
            started = time.monotonic()
            finish(start(job, reference))
            known[job] = before, reference, time.monotonic() - started
        return known[job]

    return run


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("job", JOBS)
def test_killed_at_any_moment(job, start, uninterrupted, tmp_path):
    """Killed again and again, each time taken up where it was; in the end as if nothing had happened."""
    before, reference, seconds = uninterrupted(job)
    folder = tmp_path / "run"
    shutil.copytree(before, folder)
    state = JOBS[job](folder, reference, before)
    moments = random.Random(f"{job} {ROUNDS}")
    kills = 0
    while kills < KILLS:
        process = start(job, folder)
        time.sleep(moments.uniform(0, seconds))
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0)
        kills += process.exitcode != 0
        state.check()
        if process.exitcode == 0 or state.over():  # a run after this one would begin anew: so does the folder
            shutil.rmtree(folder)
            shutil.copytree(before, folder)
            state = JOBS[job](folder, reference, before)
    time.sleep(1.1)  # what the last one left is then old enough to be cleared away
    finish(start(job, folder))
    state.finished()
    assert left_over(folder) == []


RENAMINGS = {"collecting": 3, "training": 12, "pretraining": 22}


@pytest.mark.parametrize(
    ("job", "number"),
    [
        (job, side * (number + (side < 0)))
        for job, count in RENAMINGS.items()
        for number in range(count)
        for side in (1, -1)
        if ROUNDS > 1 or (number + (side < 0)) % 4 == 0 or (job == "pretraining" and number > 17)
    ],
)
def test_killed_between_two_files(job, number, start, uninterrupted, tmp_path):
    """Where several files change together, just before or just after each of them: no mixture is ever read."""
    before, reference, _ = uninterrupted(job)
    folder = tmp_path / "run"
    shutil.copytree(before, folder)
    state = JOBS[job](folder, reference, before)
    process = start(job, folder, number)
    process.join(FINISH_SECONDS)
    assert process.exitcode == -signal.SIGKILL
    state.check()
    finish(start(job, folder))
    state.finished()


def test_what_a_killed_run_left_is_cleared_away_and_what_a_living_one_uses_is_not(tmp_path):
    old, young, other = (tmp_path / f".r.json{name}" for name in (".abcdefgh", ".abcdefgi", ".backup"))
    for folder in (old, young, other):
        folder.mkdir()
        (folder / "r.json").write_text("{half")
    os.utime(old, (0, 0))
    os.utime(other, (0, 0))
    with atomic_path(tmp_path / "r.json") as mine:
        os.utime(mine.parent, (0, 0))
        write_json(tmp_path / "r.json", {"a": 1})  # meets the folder above, which is locked
        assert mine.parent.is_dir()
        mine.write_text("{}")
    assert left_over(tmp_path) == [young.name, other.name]


def test_a_folder_that_was_moved_aside_comes_back(tmp_path):
    aside = tmp_path / ".d.old.abcdefgh" / "d"
    aside.mkdir(parents=True)
    (aside / "one.txt").write_text("one")
    os.utime(aside.parent, (0, 0))
    with pytest.raises(KeyError), atomic_path(tmp_path / "d", directory=True):
        raise KeyError
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["one.txt"]
    assert left_over(tmp_path) == []


def test_damaged_partial_files_are_begun_anew(tmp_path):
    model, texts = tiny_model("llama"), [random_ids(1, 20, seed=i)[0].tolist() for i in range(2)]
    whole = collect(model, texts, tmp_path / "whole.csv", FixedBits(4), block=8)
    partial = tmp_path / ".t.partial.csv"
    for damage in (b"\xff\xfe\x00", b"# another run\n1,2,3\n", b""):
        partial.write_bytes(damage)
        table = collect(model, texts, tmp_path / "t.csv", FixedBits(4), block=8)
        pd.testing.assert_frame_equal(table.drop(columns="latency"), whole.drop(columns="latency"))


# A full disk


@pytest.fixture(params=["small tmpfs", "limit on files"])
def full_disk(request, tmp_path):
    """A folder and what to run a command with, so that files of more than a few kilobytes do not fit."""
    if request.param == "limit on files":
        yield tmp_path, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384)), "File too large"
        return
    folder = tmp_path / "full"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a file system here")
    yield folder, None, "No space left on device"
    subprocess.run(["umount", str(folder)], check=True)


WRITERS = {
    "table": "import pandas as pd; pd.DataFrame({'a': range(20000)}).to_csv(temporary, index=False)",
    "weights": "import torch, safetensors.torch as s; s.save_file({'a': torch.zeros(40000)}, temporary)",
    "figure": "from matplotlib.figure import Figure; import numpy as np; f = Figure((8, 8));"
    "f.add_subplot().imshow(np.random.default_rng(0).random((400, 400))); f.savefig(temporary, format='png')",
    "notebook": "from nbformat import v4, write;"
    "write(v4.new_notebook(cells=[v4.new_raw_cell('x' * 99999)]), temporary)",
    "text": "temporary.write_text('x' * 99999)",
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_told_and_leaves_the_old_file(full_disk, kind):
    folder, limit, reason = full_disk
    path = folder / "old"
    path.write_bytes(b"finished before")
    script = (
        "import sys, pathlib\nfrom helpers.io.atomic import atomic_path\n"
        f"with atomic_path(sys.argv[1]) as temporary:\n    {WRITERS[kind]}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], preexec_fn=limit, capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1
    assert f"{reason}: not written, what was there before is untouched; make room and run again" in done.stderr
    assert "old" in done.stderr.splitlines()[-1]
    assert path.read_bytes() == b"finished before"
    assert [p.name for p in folder.iterdir()] == ["old"]


def test_collecting_on_a_full_disk_goes_on_when_there_is_room(tiny_folder, tmp_path, monkeypatch, capsys):
    """The command says in one line what is full; texts that were collected stay collected."""
    out = tmp_path / "t.csv"
    command = ["collect", "--model", str(tiny_folder), "--count", "3", "--max-tokens", "60", "--out", str(out)]
    to_csv, calls = pd.DataFrame.to_csv, []

    def full(self, *args, **settings):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return to_csv(self, *args, **settings)

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    assert main.main(command) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "collect: [Errno 28] No space left on device: not written" in told
    assert ".t.partial.csv" in told
    monkeypatch.setattr(pd.DataFrame, "to_csv", to_csv)
    read = []

    def watched(model, ids, rarities, text_id, *settings):
        read.append(text_id)
        return collect_text(model, ids, rarities, text_id, *settings)

    monkeypatch.setattr("helpers.training.collection.collect_text", watched)
    assert main.main(command) == 0
    assert read == [2]
    assert len(read_training_data(out)["text_id"].unique()) == 3


# Memory that runs out


class Greedy(torch.nn.Module):
    """Stands before a model's last layer and runs out of memory at its n-th call, as a CUDA device would."""

    def __init__(self, head, last: int):
        super().__init__()
        self.head, self.calls, self.last = head, 0, last

    def forward(self, x):
        self.calls += 1
        if self.calls > self.last:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total of 8 GiB.")
        return self.head(x)


def hungry(last: int, model=None):
    model = model or tiny_model("llama")
    model.lm_head = Greedy(model.lm_head, last)
    return model


LOWER = r"Lower the cache's bits or its policy's, max_new_tokens, the length of the prompt, or the number of rows"
TORCH = r"\(CUDA out of memory\. Tried to allocate 2\.00 GiB\.\)"


def in_full(number: int) -> str:
    return rf"the cache of llama holds {number:,} bytes \([\d.]+ MiB\)"


def test_out_of_memory_names_the_bytes_of_the_cache_and_what_to_lower():
    model, batch = hungry(2), left_padded([40, 31])
    cache = PackedKVCache(model.config, block=8)
    with pytest.raises(torch.OutOfMemoryError, match=rf"reading a text: .* for 3 tokens a row .*{LOWER}.*{TORCH}"):
        decode(CachedModel(model, cache), batch["input_ids"], forced=True)
    ids = batch["input_ids"]
    for last, run in (
        (0, lambda model, cache: PolicyDriver(model, cache, EntropyRule()).prefill(batch)),
        (5, lambda model, cache: decode(CachedModel(model, cache), ids, max_new_tokens=20)),
        (2, lambda model, cache: list(score_blocks(CachedModel(model, cache), ids, block=8))),
    ):
        model = hungry(last)
        cache = PackedKVCache(model.config, bits=4, block=8)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            run(model, cache)
        assert cache.stored_bytes() > 0
        assert caught.match(in_full(cache.stored_bytes()))
        assert caught.match(rf"{LOWER}.*{TORCH}")


def test_out_of_memory_beside_an_unpacked_cache_offers_the_packed_one():
    model = hungry(3)
    cache = DynamicCache(config=model.config)
    with pytest.raises(torch.OutOfMemoryError, match="while writing: ") as caught:
        decode(CachedModel(model, cache), random_ids(1, 20), max_new_tokens=9)
    bytes_held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    assert caught.match(in_full(bytes_held))
    assert caught.match(r"or store keys and values at 4 bits with PackedKVCache\(model.config, bits=4\)")


def test_out_of_memory_in_the_gate(capsys, tiny_folder):
    tokenizer = make_tokenizer()
    small, large = make_model(tokenizer, 0), hungry(2, make_model(tokenizer, 1))
    message = r"out of memory while reading \d+ token\(s\): the cache of llama holds [\d,]+ bytes"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        gated_generate(small, large, tokenizer, PROMPTS[0], EntropyGate(-1.0), 20)
    with pytest.raises(torch.OutOfMemoryError, match="max_new_tokens, the length of the prompt"):
        plain_generate(large, tokenizer, PROMPTS[0], 20)


def test_out_of_memory_on_the_command_line_is_one_line(tiny_folder, tmp_path, monkeypatch, capsys):
    from helpers.training import commands

    real = commands.load_model

    def load(*args, **settings):
        model, tokenizer = real(*args, **settings)
        return hungry(30, model), tokenizer

    monkeypatch.setattr(commands, "load_model", load)
    command = ["collect", "--model", str(tiny_folder), "--count", "3", "--max-tokens", "60"]
    assert main.main([*command, "--out", str(tmp_path / "t.csv")]) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("collect: out of memory while reading a text: the cache of llama holds ")
