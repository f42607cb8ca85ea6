"""What a device is called, how much memory it has and has given out, and how fast it copies."""

import gc

import numpy as np
import psutil
import torch

from helpers.io.provenance import cpu_name
from helpers.policies.decoding import timed


def device_name(device: torch.device) -> str:
    """What the machine calls the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def copy_bandwidth(device: torch.device, megabytes: int = 256, repeats: int = 7) -> float:
    """Bytes per second, read and written, of copying a buffer much larger than any cache of the processor."""
    source = torch.ones(megabytes * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    times = [timed(device, target.copy_, source)[1] for _ in range(repeats + 1)]
    return 2 * source.numel() * 4 / (np.median(times[1:]) / 1000)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def allocated_bytes(device: torch.device) -> int:
    """Bytes of all tensors on a CUDA device; 0 elsewhere, where nobody counts."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_allocated(device: torch.device) -> int:
    """The most that `allocated_bytes` was since `reset_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def reset_peak(device: torch.device) -> None:
    """Begin anew with `peak_allocated`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def release_memory() -> None:
    """Give back what is held no more, so that others find it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
