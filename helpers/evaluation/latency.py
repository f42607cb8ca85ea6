"""Time per decoded token: methods against each other, and what a policy itself costs."""

import random
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from helpers.evaluation.bootstrap import bootstrap_mean, bootstrap_median
from helpers.evaluation.device import peak_allocated, reset_peak
from helpers.evaluation.methods import Method
from helpers.policies.decoding import decode, timed

# What `time_decoding` measures.
LATENCY = ["latency_ms", "latency_low", "latency_high", "latency_ratio", "latency_ratio_low", "latency_ratio_high"]


def time_decoding(
    model: PreTrainedModel,
    ids: torch.Tensor,
    methods: Sequence[Method],
    rounds: int = 3,
    prompt: int = 256,
    steps: int = 48,
    seed: int = 0,
) -> pd.DataFrame:
    """Time per decoded token of each method after a prompt of `prompt` tokens: `ids` `[tokens]` are read step by step.

    A round's time is the mean over its `steps`, so that steps that commit a block count. Columns `method`;
    `latency_ms` with `latency_low`, `latency_high` (mean over rounds, 95% interval); `latency_ratio` with `_low`,
    `_high` (to the first method, median of the ratios within a round, 95% interval); `cuda_peak_bytes`. One warm-up
    round; the order of the methods is drawn anew in each round, so that slow moments hit all alike.
    """
    ids = ids[None, : prompt + steps]
    order, shuffle = list(range(len(methods))), random.Random(seed)
    times = np.zeros((len(methods), rounds + 1, ids.shape[1] - prompt))
    peaks = [0] * len(methods)
    for turn in tqdm(range(rounds + 1), desc="latency", leave=False):
        for number in order:
            cached = methods[number].open(model)
            reset_peak(model.device)
            cached.read(ids[:, :prompt])
            times[number, turn] = decode(cached, ids[:, prompt:], forced=True).latency_ms
            peaks[number] = max(peaks[number], peak_allocated(model.device))
        shuffle.shuffle(order)
    means = times[:, 1:].mean(-1)
    table = pd.DataFrame({"method": [method.name for method in methods]})
    table[LATENCY[:3]] = [bootstrap_mean(turns) for turns in means]
    table[LATENCY[3:]] = [bootstrap_median(turns) for turns in means / means[0]]
    return table.assign(cuda_peak_bytes=peaks)


def controller_share(
    model: PreTrainedModel, ids: torch.Tensor, method: Method, prompt: int = 256, steps: int = 64, rounds: int = 3
) -> dict[str, float]:
    """What the policy costs in decoding: ms per token in the model and in the driver, and the driver's `share`.

    The driver's time is everything but the forward: features, networks, commit and settle. Medians over `rounds` of
    means over `steps` tokens (whole blocks), after one round of warm-up.
    """
    spent = np.zeros((rounds + 1, steps, 2))
    for turn in spent:
        cached = method.open(model)
        cached.read(ids[None, :prompt])
        for step, token in enumerate(ids[None, prompt : prompt + steps].split(1, dim=1)):
            logits, turn[step, 0] = timed(ids.device, cached.forward, token)
            _, turn[step, 1] = timed(ids.device, cached.observe, token, logits)
    model_ms, driver_ms = map(float, np.median(spent[1:].mean(1), axis=0))
    share = driver_ms / (model_ms + driver_ms)
    return {"method": method.name, "model_ms": model_ms, "driver_ms": driver_ms, "share": share}
