"""The objective again, its gradient and its metrics, in plain floats and loops over tokens.

Written from the formulas and not from the code: minima where the code has maxima of losses, means
of means where the code has weights and a normaliser, and the gradient by hand, not by autograd.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rllib_gtpo.ops.losses import Objective


@dataclass
class Tokens:
    """One list entry per trained token."""

    learner: list[float]
    anchor: list[float]
    sampling: list[float]
    ref: list[float]
    entropy: list[float]
    advantage: list[float]
    turn: list[int]
    trajectory: list[int]

    def segment(self, level: str, t: int) -> list[int]:
        """The tokens that share a ratio with token `t`, itself among them."""
        if level == "token":
            return [t]
        ids = self.turn if level == "turn" else self.trajectory
        return [j for j in range(len(ids)) if ids[j] == ids[t]]


def ratio(objective: Objective, tokens: Tokens, t: int) -> float:
    segment = tokens.segment(objective.ratio_level, t)
    total = 0.0
    for j in segment:
        total += tokens.learner[j] - tokens.anchor[j]
    return math.exp(total / len(segment))


def importance(objective: Objective, tokens: Tokens, t: int) -> float:
    """The product of the segment's ratios before truncation."""
    product = 1.0
    for j in tokens.segment(objective.importance_sampling, t):
        product *= math.exp(tokens.anchor[j]) / math.exp(tokens.sampling[j])
    return product


def truncated(objective: Objective, tokens: Tokens, t: int) -> float:
    if objective.importance_sampling == "off":
        return 1.0
    return min(importance(objective, tokens, t), objective.importance_cap)


def stopped_by(objective: Objective, r: float, advantage: float) -> str | None:
    """Which bound holds a ratio, if any: there the surrogate does not depend on it."""
    if advantage > 0 and r > 1 + objective.clip_high:
        return "high"
    if advantage < 0 and r < 1 - objective.clip_low:
        return "low"
    if advantage < 0 and objective.dual_clip is not None and r > objective.dual_clip:
        return "dual"
    return None


def surrogate(objective: Objective, r: float, advantage: float) -> float:
    """What is maximised."""
    inside = min(max(r, 1 - objective.clip_low), 1 + objective.clip_high)
    value = min(r * advantage, inside * advantage)
    if objective.dual_clip is not None and advantage < 0:
        value = max(value, objective.dual_clip * advantage)
    return value


def kl(objective: Objective, log_ratio: float) -> tuple[float, float]:
    """Its value and its derivative by the learner's log-probability."""
    if objective.kl_estimator == "k1":
        return log_ratio, 1.0
    if objective.kl_estimator == "k2":
        return log_ratio * log_ratio / 2, log_ratio
    return math.exp(-log_ratio) - (1 - log_ratio), 1 - math.exp(-log_ratio)


def share(objective: Objective, tokens: Tokens, t: int) -> float:
    """What one token counts for in the final scalar: a mean, or a mean of means."""
    if objective.aggregation == "constant":
        assert objective.constant is not None
        return 1 / objective.constant
    if objective.aggregation == "token_mean":
        return 1 / len(tokens.turn)
    ids = tokens.trajectory if objective.aggregation == "sequence_mean" else tokens.turn
    return 1 / len(set(ids)) / sum(other == ids[t] for other in ids)


def loss(objective: Objective, tokens: Tokens) -> float:
    total = 0.0
    for t, advantage in enumerate(tokens.advantage):
        value = -surrogate(objective, ratio(objective, tokens, t), advantage)
        value *= truncated(objective, tokens, t)
        value += objective.kl_coeff * kl(objective, tokens.learner[t] - tokens.ref[t])[0]
        value -= objective.entropy_coeff * tokens.entropy[t]
        total += share(objective, tokens, t) * value
    return total


def gradient(objective: Objective, tokens: Tokens) -> list[float]:
    """d loss / d learner log-probability of each token."""
    result = [0.0] * len(tokens.turn)
    for t, advantage in enumerate(tokens.advantage):
        r, part = ratio(objective, tokens, t), share(objective, tokens, t)
        if stopped_by(objective, r, advantage) is None:
            segment = tokens.segment(objective.ratio_level, t)
            for j in segment:
                pull = -advantage * r * truncated(objective, tokens, t) / len(segment)
                result[j] += part * pull
        slope = kl(objective, tokens.learner[t] - tokens.ref[t])[1]
        result[t] += part * objective.kl_coeff * slope
    return result


def metrics(objective: Objective, tokens: Tokens) -> dict[str, float]:
    """Means over tokens (maxima and the count as they are), by the names that training logs."""
    n = len(tokens.turn)
    ratios = [ratio(objective, tokens, t) for t in range(n)]
    stops = [stopped_by(objective, r, a) for r, a in zip(ratios, tokens.advantage, strict=True)]
    gaps = [a - s for a, s in zip(tokens.anchor, tokens.sampling, strict=True)]
    found = {
        "tokens": float(n),
        "clip/low_frac": stops.count("low") / n,
        "clip/high_frac": stops.count("high") / n,
        "ratio/mean": sum(ratios) / n,
        "ratio/max_abs_log": max(abs(math.log(r)) for r in ratios),
        "mismatch/kl": sum(math.exp(g) - 1 - g for g in gaps) / n,
        "mismatch/max_abs_log_ratio": max(abs(g) for g in gaps),
        "policy/entropy": sum(tokens.entropy) / n,
    }
    if objective.dual_clip is not None:
        found["clip/dual_frac"] = stops.count("dual") / n
    if objective.importance_sampling != "off":
        weights = [importance(objective, tokens, t) for t in range(n)]
        found["mismatch/truncated_frac"] = sum(w > objective.importance_cap for w in weights) / n
    if objective.kl_coeff:
        pairs = zip(tokens.learner, tokens.ref, strict=True)
        found["ref/kl"] = sum(kl(objective, p - q)[0] for p, q in pairs) / n
    return found
