"""Time per decoded token: methods against each other, and what a policy itself costs."""

import random
import time
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from helpers.evaluation.bootstrap import bootstrap_median
from helpers.evaluation.methods import Method
from helpers.policies.decoding import decode, synchronise


def time_decoding(
    model: PreTrainedModel,
    ids: torch.Tensor,
    stores: Sequence[Method],
    rounds: int = 3,
    prompt: int = 256,
    steps: int = 48,
    seed: int = 0,
) -> pd.DataFrame:
    """Time per decoded token of each store after a prompt of `prompt` tokens: `ids` `[tokens]` are read step by step.

    Columns `method`, `latency_ms` (median) with `latency_low`, `latency_high` (95% interval over rounds of the
    median), `latency_ratio` (to the first store, median of the ratios within a round) and `cuda_peak_bytes`. One
    warm-up round; the order of the stores is drawn anew in each round, so that slow moments hit all alike.
    """
    order = list(range(len(stores)))
    times: list[list[list[float]]] = [[] for _ in stores]
    peaks = [0] * len(stores)
    shuffle = random.Random(seed)
    ids = ids[: prompt + steps]
    for turn in tqdm(range(rounds + 1), desc="latency", leave=False):
        for number in order:
            cache, driver = stores[number].open(model)
            if model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with torch.no_grad():
                logits = model(input_ids=ids[None, :prompt], cache=cache).logits
                if driver is not None:
                    driver.observe(ids[None, :prompt], logits)
            result = decode(model, ids[None, prompt:], cache, driver, forced=True)
            if model.device.type == "cuda":
                peaks[number] = max(peaks[number], torch.cuda.max_memory_allocated())
            if turn:
                times[number].append(result.latency_ms)
        shuffle.shuffle(order)
    rows = []
    base = [float(np.mean(turn)) for turn in times[0]]
    for store, turns, peak in zip(stores, times, peaks, strict=True):
        median, low, high = bootstrap_median(np.concatenate(turns))
        ratio = float(np.median([np.mean(turn) / b for turn, b in zip(turns, base, strict=True)]))
        row = {"method": store.name, "latency_ms": median, "latency_low": low, "latency_high": high}
        # A median leaves out the steps that commit a block; the ratio is of means, which count them.
        rows.append({**row, "latency_ratio": ratio, "cuda_peak_bytes": peak})
    return pd.DataFrame(rows)


@torch.no_grad()
def controller_share(
    model: PreTrainedModel, ids: torch.Tensor, store: Method, prompt: int = 256, steps: int = 64, rounds: int = 3
) -> dict[str, float]:
    """What the policy costs in decoding: ms per token in the model and in the driver, and the driver's `share`.

    The driver's time is everything but the forward: features, networks, commit and settle. Medians over `rounds` of
    means over `steps` tokens (whole blocks), after one round of warm-up.
    """
    forward, driving = [], []
    for turn in range(rounds + 1):
        cache, driver = store.open(model)
        logits = model(input_ids=ids[None, :prompt], cache=cache).logits
        driver.observe(ids[None, :prompt], logits)
        spent = np.zeros((steps, 2))
        for step in range(steps):
            token = ids[None, prompt + step : prompt + step + 1]
            started = time.perf_counter()
            logits = model(input_ids=token, cache=cache).logits
            synchronise(ids.device)
            read = time.perf_counter()
            driver.observe(token, logits)
            synchronise(ids.device)
            spent[step] = read - started, time.perf_counter() - read
        if turn:
            forward.append(1000 * spent[:, 0].mean())
            driving.append(1000 * spent[:, 1].mean())
    model_ms, driver_ms = float(np.median(forward)), float(np.median(driving))
    return {
        "method": store.name,
        "model_ms": model_ms,
        "driver_ms": driver_ms,
        "share": driver_ms / (model_ms + driver_ms),
    }
