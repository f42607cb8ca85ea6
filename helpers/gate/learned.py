"""The learned signal: a small network that says how likely the large model would choose another token.

    signal = LearnedSignal.load("data/controllers", small, large)
    gate = EntropyGate.calibrate(small, tokenizer, texts, signal=signal, target_usage=0.2)

It reads what the small model knows for nothing at each step: its last hidden state, its prediction, and whether the
text repeats itself. How it is trained is in `training`; it knows one pair, and is refused on others.
"""

import hashlib
import math
import weakref
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from helpers.cache.compiling import compilers
from helpers.gate.signals import Signal, find_signal
from helpers.io import relative_to_root
from helpers.models.fingerprint import weights_fingerprint
from helpers.policies.features import entropy_of, log_probabilities
from helpers.policies.network import Network

FILE = "gate"  # its name among the controllers
BEST = 8  # tokens whose probabilities it reads
WINDOW = 128  # tokens in which repetition is looked for
ABOUT_PREDICTION = ("entropy", "max_prob", "margin", *(f"log_p_{i + 1}" for i in range(BEST)))
ABOUT_TEXT = ("recency", "seen_pair")
BY_HAND = len(ABOUT_PREDICTION) + len(ABOUT_TEXT)  # features before the hidden state
OUTPUTS = ("differs", "bits")  # log-odds of another choice; softplus of it: by how many bits that is preferred
_compiled, _inlined = compilers({"reassoc", "nsz", "contract", "arcp"})


def feature_names(hidden_size: int) -> tuple[str, ...]:
    """What the network reads, in order, for a small model whose hidden states have `hidden_size` numbers.

    Of the prediction its entropy (bits), the signals of these names and the logarithms of its largest probabilities;
    of the text how it would go on repeating itself (`repetition`); the hidden state.
    """
    return (*ABOUT_PREDICTION, *ABOUT_TEXT, *(f"hidden_{i}" for i in range(hidden_size)))


def repetition(token: int, read: Sequence[int]) -> tuple[float, float]:
    """How a text `read` would repeat itself by `token`: its `recency`, and 1 if that pair of tokens was there.

    Recency is 1 / n for a token that stood n tokens ago, 0 for none of the last `WINDOW`.
    """
    return _repetition(token, _window(read))


def _window(read: Sequence[int]) -> np.ndarray:
    """The tokens in which repetition is looked for, in the fewest operations."""
    return np.frombuffer(array("q", read[-WINDOW:]), np.int64)


def signal_inputs(logits: torch.Tensor, hidden: torch.Tensor, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """What the network reads of n predictions, float32 `[n, features]`.

    `logits` `[n, vocabulary]` and `hidden` `[n, hidden]` are the small model's; `texts` the tokens that it had read,
    one list a prediction.
    """
    log_p = log_probabilities(logits.float())
    best = log_p.topk(BEST, dim=-1)
    first, second = best.values[:, :2].exp().unbind(-1)
    entropy = entropy_of(log_p) / math.log(2)
    pairs = zip(best.indices[:, 0].tolist(), texts, strict=True)
    about_text = torch.tensor([repetition(token, read) for token, read in pairs], device=log_p.device).reshape(-1, 2)
    about_prediction = torch.stack([entropy, 1 - first, 1 - (first - second)], dim=-1)
    return torch.cat([about_prediction, best.values, about_text, hidden.float()], dim=-1)


class LearnedSignal(Signal):
    """The probability, by a network, that the large model would choose another token than the small one.

    `pair` are the fingerprints (`weights_fingerprint`) of the small and the large model that it was trained on.
    """

    name = "learned"
    needs_hidden = True

    def __init__(self, network: Network, pair: tuple[str, str]):
        self.network, self.pair = network, pair
        self._checked: tuple[Callable[[], object], ...] = ()
        self._layers = _arrays(network)

    @classmethod
    def load(cls, folder: str | Path, small: PreTrainedModel, large: PreTrainedModel) -> "LearnedSignal":
        """The signal of a pair, from `gate.safetensors` in `folder`.

        Raises `FileNotFoundError` where there is none, and `ValueError` for a file that is none or another pair's.
        """
        if not Path(folder, f"{FILE}.safetensors").is_file():
            raise FileNotFoundError(
                f"no learned signal of a gate ({FILE}.safetensors) in {relative_to_root(folder)}: python main.py "
                "train-gate writes one"
            )
        names = feature_names(small.config.get_text_config(decoder=True).hidden_size)
        network, about = Network.load(folder, FILE, names, len(OUTPUTS))
        pair = about.get("pair")
        if network.features != names or not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"controller {FILE}: it is no signal of a gate for a small model of this width")
        signal = cls(network, tuple(map(str, pair)))
        signal.check_pair(small, large)
        return signal

    @property
    def identity(self) -> str:
        digest = hashlib.sha256(b"".join(layer.tobytes() for layer in self._layers))
        return f"{self.name} {digest.hexdigest()}"

    def check_pair(self, small: PreTrainedModel, large: PreTrainedModel) -> None:
        if tuple(each() for each in self._checked) == (small, large):
            return
        for model, known, name in ((small, self.pair[0], "small"), (large, self.pair[1], "large")):
            if weights_fingerprint(model) != known:
                raise ValueError(
                    f"signal {self.name}: it was trained on another pair, and the {name} model is not that of it; "
                    "train one for this pair with python main.py train-gate"
                )
        self._checked = weakref.ref(small), weakref.ref(large)

    def of_text(self, logits: torch.Tensor, hidden: torch.Tensor, ids: list[int]) -> torch.Tensor:
        texts = [ids[: i + 1] for i in range(len(ids))]
        return self.expects(signal_inputs(logits, hidden, texts))[0]

    @torch.no_grad()
    def expects(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of `signal_inputs` `[n, features]`: how probable another choice is, and by how many bits, both `[n]`.

        The bits are 0 where both choose alike, as they are in the expectation.
        """
        log_odds, bits = self.network(inputs).unbind(-1)
        return log_odds.sigmoid(), torch.nn.functional.softplus(bits)

    def value(self, small, large=None, draw=None, hidden=None, read=()) -> float:
        if small.device.type != "cpu":
            return float(self.expects(signal_inputs(small[None], hidden[None], [read]))[0])
        # Compiled, and in one call: right after a forward every operation, however small, takes microseconds.
        log_p = small.log_softmax(-1, dtype=torch.float32)
        given = log_p.numpy(), log_p.exp().numpy(), hidden.float().numpy(), _window(read)
        return float(_probability(*given, *self._layers))


def signal_of_pair(name: str, folder: str | Path, small: PreTrainedModel, large: PreTrainedModel) -> Signal:
    """The signal `name` for a pair: "learned" is read from `folder`, the others need nothing."""
    return LearnedSignal.load(folder, small, large) if name == LearnedSignal.name else find_signal(name)


def _arrays(network: Network) -> list[np.ndarray]:
    """Means of the inputs and what they are multiplied by, weights `[out, in]` and biases of the layers in turn."""
    tensors = [network.mean, 1 / network.scale]
    for layer in network.layers:
        if isinstance(layer, torch.nn.Linear):
            tensors += [layer.weight.detach(), layer.bias.detach()]
    return [np.ascontiguousarray(tensor.float().cpu().numpy()) for tensor in tensors]


@_inlined
def _about_prediction(log_p, p, inputs):
    """Write `ABOUT_PREDICTION` into the first of `inputs`; the most probable token."""
    values = np.full(BEST, np.float32(-np.inf))
    token, entropy = 0, np.float32(0)
    for i in range(len(p)):
        entropy -= p[i] * max(log_p[i], np.float32(-1e30))
        if log_p[i] > values[BEST - 1]:
            if log_p[i] > values[0]:
                token = i
            j = BEST - 1
            while j > 0 and values[j - 1] < log_p[i]:
                values[j] = values[j - 1]
                j -= 1
            values[j] = log_p[i]
    first, second = np.exp(values[0]), np.exp(values[1])
    inputs[0], inputs[1], inputs[2] = entropy / np.float32(np.log(2.0)), 1 - first, 1 - (first - second)
    inputs[3 : 3 + BEST] = values
    return token


@_compiled
def _repetition(token, window):
    recency, seen_pair, n = 0.0, 0.0, len(window)
    for i in range(n):
        if window[i] == token:
            recency = 1 / (n - i)
            if i and window[i - 1] == window[n - 1]:
                seen_pair = 1.0
    return recency, seen_pair


@_compiled
def _layer(x, weight, bias):
    out = np.empty_like(bias)
    for i in range(len(out)):
        total = bias[i]
        for j in range(len(x)):
            total += weight[i, j] * x[j]
        out[i] = total
    return out


@_compiled
def _probability(log_p, p, hidden, window, mean, factor, weight_1, bias_1, weight_2, bias_2, weight_3, bias_3):
    """The probability that the first output of a network with two hidden layers stands for."""
    inputs, zero = np.empty_like(mean), np.float32(0)
    token = _about_prediction(log_p, p, inputs)
    inputs[BY_HAND - 2], inputs[BY_HAND - 1] = _repetition(token, window)
    inputs[BY_HAND:] = hidden
    first = np.maximum(_layer((inputs - mean) * factor, weight_1, bias_1), zero)
    second = np.maximum(_layer(first, weight_2, bias_2), zero)
    return 1 / (1 + np.exp(-_layer(second, weight_3, bias_3)[0]))
