"""Decoding token by token, each step timed; the clock for it, which every measurement of time uses."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from helpers.cache import explain_out_of_memory
from helpers.models import check_context, check_not_empty
from helpers.policies.cached_model import CachedModel
from helpers.policies.features import TokenFeatures

Result = TypeVar("Result")


@dataclass
class DecodeResult:
    """What decoding gave: `token_ids` `[B, tokens]` read and written, and per decoded step its time in ms."""

    token_ids: torch.Tensor
    latency_ms: list[float]
    correct: torch.Tensor | None  # [B, steps]: was the next token of the forced text the most probable one?
    features: TokenFeatures  # of the tokens read in the loop, as far as the driver computes them


@torch.no_grad()
def decode(
    cached: CachedModel,
    input_ids: torch.Tensor,
    max_new_tokens: int = 0,
    forced: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
) -> DecodeResult:
    """Decode one token a step, each step timed with everything that it causes (policy and commit included).

    With `forced`, `input_ids` `[B, tokens]` is a whole text that is read token by token, every step predicting the
    next token; else it is a prompt, read in one forward, after which `max_new_tokens` are written, greedily or
    sampled at `temperature`, until all rows have ended. Raises `ValueError` for what is to be written beyond the
    model's context.
    """
    if forced == bool(max_new_tokens):
        raise ValueError("decode either reads a text (forced=True) or writes max_new_tokens > 0, not both")
    check_not_empty(input_ids)
    if not forced:
        check_context(cached.model, input_ids.shape[1], max_new_tokens)
    generator = torch.Generator(device=input_ids.device).manual_seed(seed)
    ends = cached.model.generation_config.eos_token_id
    ends = torch.tensor([] if ends is None else ends, device=input_ids.device).reshape(-1)
    finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    text, latencies, hits, features = input_ids, [], [], []
    with explain_out_of_memory("reading a text" if forced else "writing", (cached.model, cached.cache)):
        logits = None if forced else cached.read(input_ids)[:, -1]
        for step in range(input_ids.shape[1] if forced else max_new_tokens):
            if forced:
                token = input_ids[:, step : step + 1]
            else:
                token = _next_token(logits, temperature, generator)
                text = torch.cat([text, token], dim=1)
                finished |= torch.isin(token[:, 0], ends)
                if bool(finished.all()):
                    break
            logits, ms = timed(input_ids.device, cached.read, token)
            logits = logits[:, -1]
            latencies.append(ms)
            if cached.driver is not None:
                features.append(cached.driver.latest)
            if forced and step + 1 < input_ids.shape[1]:
                hits.append(logits.argmax(-1) == input_ids[:, step + 1])
    correct = torch.stack(hits, dim=1) if hits else None
    return DecodeResult(text, latencies, correct, TokenFeatures.join(features))


def _next_token(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    if temperature <= 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)


def timed(device: torch.device, work: Callable[..., Result], *arguments) -> tuple[Result, float]:
    """What `work(*arguments)` returns, and the ms until the device had finished it.

    By events on CUDA, so that the device's own time counts and not that of waiting for it, else by the clock.
    """
    synchronise(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = work(*arguments)
            end.record()
            synchronise(device)
            return result, begin.elapsed_time(end)
    started = time.perf_counter()
    result = work(*arguments)
    synchronise(device)
    return result, (time.perf_counter() - started) * 1000


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished, so that a clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
