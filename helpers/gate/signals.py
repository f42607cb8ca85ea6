"""How unsure a model is: the signals that a gate can read."""

import math

import torch

SIGNALS = ("entropy", "max_prob", "margin", "random", "oracle")


def uncertainty(logits: torch.Tensor, signal: str = "entropy") -> torch.Tensor:
    """How unsure a next-token distribution is: `[..., vocabulary]` to `[...]`, in float32 at least; higher: less sure.

    "entropy" in bits; "max_prob" is 1 - the largest probability; "margin" is 1 - (the largest - the second).

    >>> uncertainty(torch.zeros(4)).item()  # uniform over 4: two bits
    2.0
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    p = logits.softmax(-1, dtype=dtype)
    if signal == "entropy":
        return torch.special.entr(p).sum(-1) / math.log(2)
    if signal == "max_prob":
        return 1 - p.amax(-1)
    if signal == "margin":
        best = p.topk(2, dim=-1).values
        return 1 - (best[..., 0] - best[..., 1])
    raise ValueError(f"signal must be one of entropy, max_prob, margin to be read from logits, got {signal!r}")


def entropy_bits(logits: torch.Tensor) -> float:
    """`uncertainty(logits)` of one distribution `[vocabulary]`, in the fewest operations.

    Right after a model's forward each operation takes several times as long as alone, since the processor's caches
    are full of weights.
    """
    log_p = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    bits = float(log_p.exp().dot(log_p)) / -math.log(2)
    return float(uncertainty(logits)) if math.isnan(bits) else bits  # 0 * -inf, where a token is ruled out


def check_signal(value: float, written: int) -> None:
    """Raise `ValueError` where the signal of the token after `written` ones is NaN: its logits were no numbers."""
    if math.isnan(value):
        raise ValueError(
            f"logits hold NaN or infinity after {written} written token(s), so that there is no entropy to gate by: "
            "run the models in float32 or bfloat16, or look for the first layer whose output is not finite"
        )


def regret(large_logits: torch.Tensor, small_logits: torch.Tensor) -> float:
    """By how many bits the large model prefers its own choice to the small one's."""
    token = int(small_logits.argmax(-1))
    large_logits = large_logits.to(torch.promote_types(large_logits.dtype, torch.float32))
    if int(large_logits.argmax(-1)) == token:
        return 0.0
    # Of two choices that are equally probable one is taken: that is a difference, however small.
    return max(float(large_logits.max() - large_logits[token]) / math.log(2), 1e-9)
