"""What `test_faults` kills: small runs of everything that writes files, each in a process of its own."""

import os
import runpy
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from conftest import random_ids, tiny_model
from test_pretrain import STORIES, TOY

from helpers.cache.plan import Step
from helpers.policies.rules import EntropyRule
from helpers.policies.schedules import AgeSchedule
from helpers.training.collection import collect
from helpers.training.controllers import train_controllers
from helpers.training.pretraining import train
from helpers.training.tokenizer import train_tokenizer

RULE = EntropyRule((3.9, 4.1, 4.25))
TEXTS = [random_ids(1, tokens, seed=tokens)[0].tolist() for tokens in (60, 42, 71, 35, 50, 64)]
PRETRAINING = replace(TOY, steps=40)
SCHEDULES = (AgeSchedule(4, (Step(1, 2, keep=0.25),)),)


def collecting(folder: Path) -> None:
    collect(tiny_model("llama"), TEXTS, folder / "t.csv", RULE, block=8, source={"model": "tiny"})


def training(folder: Path) -> None:
    model = tiny_model("llama")
    table = collect(model, [text[:30] for text in TEXTS], folder / "collected.csv", RULE, block=8)
    rows = [random_ids(1, 112, seed=seed)[0].tolist() for seed in range(3)]
    train_controllers(model, table, rows, folder, "tiny", schedules=SCHEDULES)


def pretraining(folder: Path) -> None:
    tokenizer = train_tokenizer(STORIES, vocab_size=320, context=32)
    train(tokenizer, STORIES, STORIES[:4], folder, PRETRAINING, checkpoint_every=8)


def publishing(folder: Path) -> None:
    """`python -m helpers.publishing NOTEBOOK`."""
    sys.argv = ["publish", str(folder / "01_tiny.ipynb")]
    runpy.run_module("helpers.publishing", run_name="__main__", alter_sys=True)


JOBS = {job.__name__: job for job in (collecting, training, publishing, pretraining)}


def run(job: str, folder: str, die_at: int | None = None) -> None:
    """Run a job quietly; with `die_at`, the process kills itself just before the n-th renaming of a file.

    `-n - 1` means just after the n-th.
    """
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)
    if die_at is not None:
        _die_at_renaming(die_at)
    JOBS[job](Path(folder))


def _die_at_renaming(number: int) -> None:
    rename, done = os.replace, 0

    def replace(*paths, **settings):
        nonlocal done
        if done == number:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*paths, **settings)
        done += 1
        if -number == done:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace
