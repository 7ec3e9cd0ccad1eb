"""Sampling that depends on a request's key and the token's position, never on batch composition.

Each (key, position) hashes to one uniform number, and the token is found by inverting the
cumulative distribution.  The distribution is held in integers, so that the sums are exact: a token
of zero probability has zero width and cannot be returned, on any device and in any order of
summation.

Shape suffixes: _B row of the batch, _BV row and vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_TICKS = 2.0**46  # probability 1 in integers; a sum over any vocabulary stays exact in a double


def _mix(x: int) -> int:
    """The finaliser of splitmix64 on a Python integer."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def compute_stream(key: tuple[int, ...]) -> int:
    """Hashes a request's key to the 64-bit state of its random stream."""
    state = _mix(len(key) + _GOLDEN)
    for part in key:
        part = int(part)
        while True:  # integers of more than 64 bits count with all their bits
            state = _mix((state + _GOLDEN) & _MASK64 ^ (part & _MASK64))
            part >>= 64
            if part in (0, -1):
                break
    return state


def compute_uniforms(streams: list[int], positions: list[int]) -> torch.Tensor:
    """One number in [0, 1 - 2**-48] for each (stream, position)."""
    with np.errstate(over="ignore"):
        x_B = np.array(streams, dtype=np.uint64)
        x_B = x_B + (np.array(positions, dtype=np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
        x_B = (x_B ^ (x_B >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x_B = (x_B ^ (x_B >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x_B = x_B ^ (x_B >> np.uint64(31))
    return torch.from_numpy((x_B >> np.uint64(16)).astype(np.float64) * 2.0**-48)


def _nucleus(ticks_BV: torch.Tensor, top_p_B: torch.Tensor) -> torch.Tensor:
    """Zeroes all but the fewest most probable tokens that together reach `top_p`."""
    sorted_BV, order_BV = ticks_BV.sort(dim=-1, descending=True, stable=True)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    limit_B = torch.where(top_p_B < 1, top_p_B, torch.inf) * ticks_BV.sum(-1)
    kept_BV = torch.where(before_BV < limit_B[:, None], sorted_BV, 0)
    return torch.zeros_like(ticks_BV).scatter_(-1, order_BV, kept_BV)


def sample_tokens(
    logits_BV: torch.Tensor,
    temperature: list[float],
    top_p: list[float],
    uniform_B: torch.Tensor,
) -> tuple[list[int], list[float]]:
    """Draws one token per row.

    Args:
        logits_BV: the model's logits, any floating dtype.
        temperature: per row; 0 is greedy.
        top_p: per row, in (0, 1].
        uniform_B: per row, from `compute_uniforms`.

    Returns:
        The tokens, and the log-probability of each under softmax(logits / temperature) before top-p
        truncation (greedy: temperature 1).

    Raises:
        FloatingPointError: a row's logits have NaN or +inf, or are all -inf.
    """
    logits_BV = logits_BV.float()
    scaled_BV = logits_BV
    if any(t not in (0.0, 1.0) for t in temperature):
        divisors = torch.tensor([t or 1.0 for t in temperature], device=logits_BV.device)
        scaled_BV = logits_BV / divisors[:, None]
    logp_BV = scaled_BV.log_softmax(-1)
    if bool(logp_BV[:, 0].isnan().any()):  # one bad logit makes the whole row NaN
        raise FloatingPointError("the model's logits are not finite: its weights have diverged")
    if all(t == 0 for t in temperature):
        token_B = logits_BV.argmax(-1)
    else:
        ticks_BV = (logp_BV.exp().double() * _TICKS).long()
        if min(top_p) < 1:
            top_p_B = torch.tensor(top_p, dtype=torch.float64, device=logits_BV.device)
            ticks_BV = _nucleus(ticks_BV, top_p_B)
        cdf_BV = ticks_BV.cumsum(-1)
        target_B = (uniform_B.to(cdf_BV.device) * cdf_BV[:, -1]).long()
        token_B = torch.searchsorted(cdf_BV, target_B[:, None], right=True).squeeze(-1)
        if min(temperature) == 0:
            greedy_B = torch.tensor([t == 0 for t in temperature], device=cdf_BV.device)
            token_B = torch.where(greedy_B, logits_BV.argmax(-1), token_B)
    logp_B = logp_BV.gather(-1, token_B[:, None]).squeeze(-1)
    return token_B.tolist(), logp_B.tolist()
