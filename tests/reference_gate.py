"""What `gated_generate` must write, told as plainly as possible: both models read the whole text at every step."""

import torch

from helpers.gate.generation import standing
from helpers.gate.prompts import end_tokens, prompt_ids
from helpers.gate.signals import random_stream
from helpers.gate.text import LARGE, SMALL, Generated
from helpers.gate.writing import Sampler


@torch.inference_mode()
def reference_gated_generate(
    small, large, tokenizer, prompt, gate, max_new_tokens=50, temperature=0.0, seed=0, large_tokenizer=None
):
    """As `gated_generate`, without caches and times."""
    choose = Sampler(temperature, seed)
    small_ids, large_ids = (prompt_ids(each, prompt) for each in (tokenizer, large_tokenizer or tokenizer))
    draw, ends, result = random_stream(gate.seed, small_ids), end_tokens(small, large), Generated()
    judged = 0  # tokens before this one have been read by the large model in full
    while len(result.token_ids) < max_new_tokens and not set(result.token_ids[-1:]) & ends:
        written = result.token_ids
        logits = read_all(small, small_ids + written)[0]
        verdicts = read_all(large, large_ids + written, len(written) + 1)
        if gate.signal.needs_large or gate.signal.uniform:
            value = gate.signal.value(logits, verdicts[-1], draw)
        else:
            value = float(gate.signal.of(logits))
        if gate.fires(value):
            stands = standing(verdicts[judged:], written, gate.rollback)
            result.rollbacks += stands < len(written)
            result.discarded += len(written) - stands
            result.token_ids = [*written[:stands], choose(verdicts[stands])]
            result.authors = [*result.authors[:stands], LARGE]
            result.signal = [*result.signal, value][: stands + 1]
            result.large_calls += 1
            judged = stands + 1
        else:
            result.token_ids = [*written, choose(logits)]
            result.authors.append(SMALL)
            result.signal.append(value)
    result.text = tokenizer.decode(result.token_ids, skip_special_tokens=True)
    return result


def read_all(model, ids, keep=1):
    """The last `keep` predictions after a whole text, read without a cache: `[keep, vocabulary]`."""
    given = torch.tensor([ids], device=model.device)
    return model(input_ids=given, use_cache=False, logits_to_keep=keep).logits[0]
