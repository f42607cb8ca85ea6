"""Where a gated token's time goes."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import pandas as pd
from transformers import PreTrainedModel

from helpers.gate.gate import EntropyGate
from helpers.gate.generation import gated_generate
from helpers.gate.pairs import Pair
from helpers.gate.study.baselines import plain_generate
from helpers.gate.study.evaluation import GATED
from helpers.gate.text import LARGE, SMALL
from helpers.policies.decoding import synchronise


@contextmanager
def forward_times(**models: PreTrainedModel) -> Iterator[dict[str, list[float]]]:
    """While open, the seconds of every forward of some models, in order, by name."""
    seconds, handles, started = {name: [] for name in models}, [], {}
    for name, model in models.items():

        def start(module, args, name=name):
            synchronise(module.device)
            started[name] = time.perf_counter()

        def stop(module, args, output, name=name):
            synchronise(module.device)
            seconds[name].append(time.perf_counter() - started[name])

        handles += [model.register_forward_pre_hook(start), model.register_forward_hook(stop)]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def time_parts(
    pair: Pair, prompts: Sequence[str], gate: EntropyGate, max_new_tokens: int = 50, rounds: int = 3
) -> dict[str, float]:
    """Where a gated token's time goes, in units of the large model's time per token: the parts add up to 1 / speed-up.

    `small`: its forwards; `large_prompt`: the large model's first forward of each text; `large_later`: its others;
    `loop`: all outside the models. For comparison, from each model alone: `small_alone`, `large_prompt_alone` (its
    prompts) and `large_step_alone` (one token, all in the same unit); `catch_up` is the mean surcharge e of a later
    forward over one token alone, so that `large_later` is about usage x (1 + e).
    """
    small, large, tokenizer = pair
    plain = partial(plain_generate, max_new_tokens=max_new_tokens, ends=set())
    runs = {
        GATED: partial(gated_generate, *pair, gate=gate, max_new_tokens=max_new_tokens, stop_at_end=False),
        LARGE: partial(plain, large, tokenizer),
        SMALL: partial(plain, small, tokenizer, author=SMALL),
    }
    rows = []
    for i, prompt in enumerate(prompts):
        for turn in range(rounds):
            names = list(runs)
            for name in (*names[turn % 3 :], *names[: turn % 3]):
                with forward_times(small=small, large=large) as times:
                    seconds = runs[name](prompt=prompt).seconds
                first, later = times["large"][:1], times["large"][1:]
                row = {"run": name, "prompt": i, "all": seconds, "small": sum(times["small"])}
                rows.append(row | {"first": sum(first), "later": sum(later), "calls": len(later)})
    total = pd.DataFrame(rows).groupby(["run", "prompt"]).median().groupby("run").sum()
    gated, alone = total.loc[GATED], total.loc[LARGE]
    unit, step = alone["all"], alone["later"] / alone["calls"]
    return {
        "small": gated["small"] / unit,
        "large_prompt": gated["first"] / unit,
        "large_later": gated["later"] / unit,
        "loop": (gated["all"] - gated["small"] - gated["first"] - gated["later"]) / unit,
        "small_alone": total.loc[SMALL, "all"] / unit,
        "large_prompt_alone": alone["first"] / unit,
        "large_step_alone": step * max_new_tokens * len(prompts) / unit,
        "catch_up": gated["later"] / gated["calls"] / step - 1 if gated["calls"] else float("nan"),
    }


def ideal_with_prompt(speed: dict[str, float], parts: dict[str, float]) -> float:
    """The best speed-up of a gate whose large model must read each prompt whole, however little it then writes.

    From `speed_against_ideal` and `time_parts`: 1 / (c + p + (1 - p) q), with q the share of the prompt in the large
    model's time alone.
    """
    return 1 / (speed["cost_ratio"] + speed["usage"] + (1 - speed["usage"]) * parts["large_prompt_alone"])


def parts_against_ideal(speed: dict[str, float], parts: dict[str, float]) -> pd.DataFrame:
    """Where a gated token's time goes and where the ideal's would, in units of the large model's time per token.

    Rows: the small model, the large model's prompts and later forwards, the rest, and their sum (1 / speed-up);
    columns `gated` and `ideal`. Takes what `speed_against_ideal` and `time_parts` return.
    """
    prompt = speed["usage"] * parts["large_prompt_alone"]
    rows = {
        "small model": (parts["small"], speed["cost_ratio"]),
        "large model, prompt": (parts["large_prompt"], prompt),
        "large model, later": (parts["large_later"], speed["usage"] - prompt),
        "loop, signal, choice": (parts["loop"], 0.0),
    }
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["gated", "ideal"])
    table.loc["sum"] = table.sum()
    return table.rename_axis("part")
