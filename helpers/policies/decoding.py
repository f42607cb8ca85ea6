"""Decoding token by token, each step timed."""

import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from helpers.cache.memory_errors import explain_out_of_memory
from helpers.models.tokens import check_context, check_not_empty
from helpers.policies.driver import PolicyDriver
from helpers.policies.features import TokenFeatures


@dataclass
class DecodeResult:
    """What decoding gave: `token_ids` `[B, tokens]` read and written, and per decoded step its time in ms."""

    token_ids: torch.Tensor
    latency_ms: list[float]
    correct: torch.Tensor | None  # [B, steps]: was the next token of the forced text the most probable one?
    features: TokenFeatures  # of the tokens read in the loop, as far as the driver computes them


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    cache: Cache,
    driver: PolicyDriver | None = None,
    max_new_tokens: int = 0,
    forced: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
) -> DecodeResult:
    """Decode one token a step, each step timed with everything that it causes (policy and commit included).

    With `forced`, `input_ids` `[B, tokens]` is a whole text that is read token by token, every step predicting the
    next token; else it is a prompt, read in one forward, after which `max_new_tokens` are written, greedily or
    sampled at `temperature`, until all rows have ended. Times are taken after the device has finished. Raises
    `ValueError` for what is to be written beyond the model's context.
    """
    if forced == bool(max_new_tokens):
        raise ValueError("decode either reads a text (forced=True) or writes max_new_tokens > 0, not both")
    check_not_empty(input_ids)
    if not forced:
        check_context(model, input_ids.shape[1], max_new_tokens)
    with explain_out_of_memory("reading a text" if forced else "writing", (model, cache)):
        return _decode(model, input_ids, cache, driver, max_new_tokens, forced, temperature, seed)


def _decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    cache: Cache,
    driver: PolicyDriver | None,
    max_new_tokens: int,
    forced: bool,
    temperature: float,
    seed: int,
) -> DecodeResult:
    generator = torch.Generator(device=input_ids.device).manual_seed(seed)
    latencies, hits, collected = [], [], []
    text, logits = input_ids, None
    if not forced:
        logits = model(input_ids=input_ids, cache=cache).logits
        if driver is not None:
            driver.observe(input_ids, logits)
        logits = logits[:, -1]
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([] if ends is None else ends, device=input_ids.device).reshape(-1)
    finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    for step in range(input_ids.shape[1] if forced else max_new_tokens):
        if forced:
            token = input_ids[:, step : step + 1]
        else:
            token = _next_token(logits, temperature, generator)
            text = torch.cat([text, token], dim=1)
            finished |= torch.isin(token[:, 0], ends)
            if bool(finished.all()):
                break
        synchronise(input_ids.device)
        started = time.perf_counter()
        logits = model(input_ids=token, cache=cache).logits
        if driver is not None:
            driver.observe(token, logits)
        synchronise(input_ids.device)
        latencies.append((time.perf_counter() - started) * 1000)
        if driver is not None:
            collected.append(driver.latest)
        logits = logits[:, -1]
        if forced and step + 1 < input_ids.shape[1]:
            hits.append(logits.argmax(-1) == input_ids[:, step + 1])
    correct = torch.stack(hits, dim=1) if hits else None
    return DecodeResult(text, latencies, correct, TokenFeatures.join(collected))


def _next_token(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    if temperature <= 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished, so that a clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
