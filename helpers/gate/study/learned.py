"""What the learned signal knows: which share of the tokens that matter it finds, and from which of its inputs."""

import numpy as np
import pandas as pd
import torch

from helpers.evaluation import bootstrap_groups
from helpers.gate.learned import ABOUT_PREDICTION, BY_HAND, LearnedSignal
from helpers.gate.training import SignalExamples

GROUPS = {
    "the prediction (entropy, probabilities)": slice(0, len(ABOUT_PREDICTION)),
    "repetition": slice(len(ABOUT_PREDICTION), BY_HAND),
    "the hidden state": slice(BY_HAND, None),
}


def caught(values: np.ndarray, weights: np.ndarray, usage: float = 0.2) -> float:
    """The share of `weights` `[n]` on the `usage` of all tokens where `values` `[n]` are highest."""
    fired = np.argsort(-values, kind="stable")[: round(usage * len(values))]
    return float(weights[fired].sum() / weights.sum())


def caught_by_signal(examples: SignalExamples, signal: LearnedSignal, usage: float = 0.2) -> pd.DataFrame:
    """One row a signal: which share of the tokens on which the models `differ`, and of the `bits`, it calls for.

    The signals that a network's inputs hold, the network, and the oracle, which goes by the bits.
    """
    values = {name: examples.inputs[:, i].numpy() for i, name in enumerate(ABOUT_PREDICTION[:3])}
    values |= {signal.name: signal.expects(examples.inputs)[0].numpy(), "oracle": examples.bits.numpy()}
    differs, bits = examples.differs.numpy(), examples.bits.numpy()
    rows = {name: [caught(each, differs, usage), caught(each, bits, usage)] for name, each in values.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["differ", "bits"]).rename_axis("signal")


def input_importance(
    examples: SignalExamples, signal: LearnedSignal, usage: float = 0.2, seed: int = 0
) -> pd.DataFrame:
    """One row a group of inputs: how many points of the differing tokens are `lost` when it is shuffled among tokens.

    With 95% intervals over texts.
    """
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(examples.inputs)))
    before, differs, rows = signal.expects(examples.inputs)[0].numpy(), examples.differs.numpy(), {}
    for name, group in GROUPS.items():
        shuffled = examples.inputs.clone()
        shuffled[:, group] = examples.inputs[order][:, group]
        after = signal.expects(shuffled)[0].numpy()
        rows[name] = bootstrap_groups(
            lambda i, after=after: 100 * (caught(before[i], differs[i], usage) - caught(after[i], differs[i], usage)),
            examples.text_ids,
            200,
        )
    return pd.DataFrame.from_dict(rows, orient="index", columns=["lost", "low", "high"]).rename_axis("inputs")
