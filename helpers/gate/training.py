"""Training the learned signal of a pair, `python main.py train-gate`, on texts as a gate makes them.

Openings are sampled from the large model, or taken from texts; a gate that fires at random goes on from them, so that
the network learns from what it will meet; then both models read every text in one forward each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from helpers.gate.batch import gated_texts
from helpers.gate.gate import EntropyGate
from helpers.gate.hidden import noting_hidden
from helpers.gate.learned import BY_HAND, FILE, OUTPUTS, LearnedSignal, feature_names, signal_inputs
from helpers.gate.pairs import Pair
from helpers.gate.prompts import prompt_ids
from helpers.models.fingerprint import weights_fingerprint
from helpers.policies import CachedModel, decode
from helpers.policies.network import Network
from helpers.training.fitting import History, fit_network, split_texts

OPENINGS = (20, 100)  # tokens of an opening that was sampled
BITS_WEIGHT = 0.3  # of the squared error, in the loss
LABEL = "whether the large model chooses another token, and by how many bits it prefers it"


@dataclass
class SignalExamples:
    """One row a prediction of the small model."""

    inputs: torch.Tensor  # [n, features]
    differs: torch.Tensor  # [n], 1 where the large model chooses another token
    bits: torch.Tensor  # [n], by how many bits it prefers its own; 0 where it chooses alike
    text_ids: np.ndarray  # [n]


def sample_openings(pair: Pair, count: int, seed: int = 0, batch: int = 64) -> list[str]:
    """Beginnings of texts as the large model writes them at temperature 1, of `OPENINGS` tokens.

    Raises `ValueError` where the tokenizer has no token that begins a text.
    """
    _, large, tokenizer = pair
    if tokenizer.bos_token_id is None:
        raise ValueError("the tokenizer has no token to begin a text with: give texts whose openings are to be used")
    random, openings = np.random.default_rng(seed), []
    start = torch.full((batch, 1), tokenizer.bos_token_id, device=large.device)
    with tqdm(total=count, desc="openings", leave=False) as bar:
        while len(openings) < count:
            written = decode(CachedModel(large), start, OPENINGS[1], temperature=1.0, seed=int(random.integers(2**31)))
            for ids in written.token_ids[:, 1:].tolist():
                ids = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
                text = tokenizer.decode(ids[: random.integers(*OPENINGS)])
                if text.strip() and len(openings) < count:
                    openings.append(text)
            bar.update(len(openings) - bar.n)
    return openings


@torch.inference_mode()
def signal_examples(
    pair: Pair, openings: Sequence[str], usage: float = 0.2, new_tokens: int = 50, batch: int = 32, seed: int = 0
) -> SignalExamples:
    """What the network learns from: every token that a gate wrote that fires at random on a share `usage`."""
    small, large, tokenizer = pair
    gate = EntropyGate(1 - usage, "random", seed=seed)
    columns: list[list[torch.Tensor]] = [[], [], [], []]
    for start in tqdm(range(0, len(openings), batch), desc="texts", leave=False):
        prompts = openings[start : start + batch]
        results = gated_texts(*pair, prompts, gate, new_tokens, batch)
        read = [prompt_ids(tokenizer, prompt) for prompt in prompts]
        texts = [ids + result.token_ids[:-1] for ids, result in zip(read, results, strict=True)]
        longest = max(map(len, texts))
        # Padded on the right: causal attention leaves what stands before the padding as it is.
        given = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=small.device)
        with noting_hidden(small) as hidden:
            logits = small(input_ids=given, use_cache=False).logits
        verdicts = large(input_ids=given, use_cache=False).logits
        for row, (ids, text) in enumerate(zip(read, texts, strict=True)):
            at = slice(len(ids) - 1, len(text))
            prefixes = [text[: i + 1] for i in range(at.start, at.stop)]
            differs, bits = preferences(logits[row, at], verdicts[row, at])
            inputs = signal_inputs(logits[row, at], hidden.states[row, at], prefixes)
            parts = inputs, differs, bits, torch.full_like(differs, start + row)
            for column, part in zip(columns, parts, strict=True):
                column.append(part.cpu())
    inputs, differs, bits, text_ids = (torch.cat(column).clone() for column in columns)
    return SignalExamples(inputs, differs, bits, text_ids.long().numpy())


def preferences(small: torch.Tensor, large: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether the large model chooses another token, and by how many bits it prefers that; float32 `[n]` both.

    From the logits `[n, vocabulary]` of both models.
    """
    chosen = small.argmax(-1, keepdim=True)
    log_p = large.float().log_softmax(-1) / np.log(2)
    bits = log_p.amax(-1) - log_p.gather(-1, chosen)[:, 0]
    return (large.argmax(-1) != chosen[:, 0]).float(), bits


def signal_loss(outputs: torch.Tensor, differs: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (nats) of the first of `outputs` `[n, 2]`, and a share of the squared error of the second (bits).

    The second is not what the gate goes by, but what is learned for it serves the first: of few examples, tokens that
    matter weigh more.
    """
    log_odds, expected = outputs[:, 0], nn.functional.softplus(outputs[:, 1])
    choice = nn.functional.binary_cross_entropy_with_logits(log_odds, differs)
    return choice + BITS_WEIGHT * nn.functional.mse_loss(expected, bits)


def train_signal(
    examples: SignalExamples, hidden: tuple[int, int] = (128, 64), seed: int = 0, epochs: int = 30, patience: int = 3
) -> tuple[Network, History]:
    """Fit the network of a `LearnedSignal`, stopped early on a twentieth of the texts, held out as wholes."""
    held = torch.tensor(split_texts(examples.text_ids, 0.05, seed))
    columns = examples.inputs, examples.differs, examples.bits
    parts = [tuple(column[rows] for column in columns) for rows in (~held, held)]
    torch.manual_seed(seed)
    names = feature_names(examples.inputs.shape[1] - BY_HAND)
    network = Network.create(names, parts[0][0], hidden, len(OUTPUTS))
    return network, fit_network(network, signal_loss, *parts, epochs, patience, batch=1024, rate=1e-3)


def save_signal(network: Network, pair: Pair, folder: str | Path, about: dict[str, object]) -> LearnedSignal:
    """Write the signal of a pair into `folder`, with `about` it, and return it."""
    fingerprints = [weights_fingerprint(model) for model in pair[:2]]
    network.save(folder, FILE, {"label": LABEL, "pair": fingerprints, **about})
    return LearnedSignal.load(folder, *pair[:2])
