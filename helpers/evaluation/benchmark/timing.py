"""Clocks and counters of devices."""

import time
from collections.abc import Callable

import numpy as np
import torch

from helpers.policies.decoding import synchronise


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Time of `work` in ms: by events on CUDA, so that the device's own time counts, else by the clock."""
    if device.type != "cuda":
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        return 1000 * (time.perf_counter() - started)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end)


def copy_bandwidth(device: torch.device, megabytes: int = 256, repeats: int = 7) -> float:
    """Bytes per second, read and written, of copying a buffer much larger than any cache of the processor."""
    source = torch.ones(megabytes * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    times = [timed(device, lambda: target.copy_(source)) for _ in range(repeats + 1)]
    return 2 * source.numel() * 4 / (np.median(times[1:]) / 1000)


def allocated_bytes(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_allocated(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
