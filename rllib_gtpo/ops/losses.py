"""The clipped objective on generated tokens, as sums that add up over micro-batches and learners.

    loss = sum over all micro-batches and learners of objective_sum(...)[0]  /  normaliser(...)

is exact for any split into micro-batches of *whole trajectories*: a token's weight depends only on
its own trajectory, and the normaliser on all of them.  Everything is flat over trained tokens.

Shape suffixes: `_T` trained tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from rllib_gtpo.errors import ConfigError, did_you_mean
from rllib_gtpo.ops.segments import Segments, check_rows

Level = Literal["token", "turn", "sequence"]
Correction = Literal["off", "token", "turn", "sequence"]
Aggregation = Literal["token_mean", "sequence_mean", "turn_mean", "constant"]
KL = Literal["k1", "k2", "k3"]

MAX_LOG_RATIO = 20.0  # bounds exp; a ratio of e^20 carries no information


@dataclass(frozen=True)
class Objective:
    """What is minimised.  A value that is unknown or has no effect raises ConfigError.

    ratio_level: "turn" and "sequence" use exp of the *mean* log-ratio of the segment (GSPO, arXiv
        2507.18071), with gradient through the mean.
    clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
    dual_clip: bounds the loss of tokens with negative advantage at -dual_clip * advantage.
    kl_coeff, kl_estimator: k1 = log p/q, k2 = k1^2 / 2, k3 = q/p - 1 + k1, differentiated as they
        stand.  Averaged over samples of p, the gradient of k1 is 0: it only adds noise.
    aggregation: what is averaged; "constant" divides the plain sum by `constant` (Dr. GRPO).
    importance_sampling: weighs the surrogate (not KL, not entropy) with the truncated ratio of
        learner to sampler before the update; "turn" and "sequence" take the *product* over the
        segment, as an importance weight is, hence many weights near 0 on long segments.
    """

    ratio_level: Level = "token"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    kl_coeff: float = 0.0
    kl_estimator: KL = "k3"
    aggregation: Aggregation = "token_mean"
    constant: float | None = None
    importance_sampling: Correction = "off"
    importance_cap: float = 2.0
    entropy_coeff: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what would silently train something else."""
        for name, kind in [
            ("ratio_level", Level),
            ("kl_estimator", KL),
            ("aggregation", Aggregation),
            ("importance_sampling", Correction),
        ]:
            value, valid = getattr(self, name), get_args(kind)
            if value not in valid:
                raise ConfigError(f"{name} is {value!r}{did_you_mean(value, valid)}")
        number = {
            "clip_low": (self.clip_low, 0.0 <= self.clip_low <= 1.0, "in [0, 1]"),
            "clip_high": (self.clip_high, self.clip_high >= 0.0, "at least 0"),
            "kl_coeff": (self.kl_coeff, self.kl_coeff >= 0.0, "at least 0"),
            "importance_cap": (self.importance_cap, self.importance_cap > 0.0, "above 0"),
            "entropy_coeff": (self.entropy_coeff, True, "finite"),
        }
        if self.dual_clip is not None:
            number["dual_clip"] = (self.dual_clip, self.dual_clip > 1.0, "None or above 1")
        if self.constant is not None:
            number["constant"] = (self.constant, self.constant > 0.0, "None or above 0")
        for name, (number_value, ok, rule) in number.items():
            if not ok or not math.isfinite(number_value):
                raise ConfigError(f"{name} must be {rule}, got {number_value}")
        if (self.aggregation == "constant") != (self.constant is not None):
            raise ConfigError(
                f"constant is {self.constant} with aggregation {self.aggregation!r}: set it "
                "exactly when aggregation is 'constant'"
            )


def token_weights(aggregation: Aggregation, turn: Tensor, trajectory: Tensor) -> Tensor:
    """The weight [T] float64 of each trained token in the loss sum.

    Args:
        aggregation: "token_mean" and "constant" give 1; "sequence_mean" 1 / trained tokens of the
            trajectory; "turn_mean" 1 / trained tokens of the turn.
        turn: Int [T], unique over the whole batch, not an index within the trajectory.
        trajectory: Int [T], unique over the whole batch.
    """
    if aggregation == "sequence_mean":
        return 1.0 / Segments.of(trajectory).size()
    if aggregation == "turn_mean":
        return 1.0 / Segments.of(turn).size()
    return torch.ones(turn.shape, dtype=torch.float64, device=turn.device)


def normaliser(
    objective: Objective,
    turn: Tensor,
    trajectory: Tensor,
    all_reduce: Callable[[Tensor], Tensor | None] | None = None,
) -> Tensor:
    """What the loss sums are divided by: a float64 scalar, the same on every learner.

    It is the number of trained tokens, of trajectories or of turns with one, or the constant.

    Args:
        objective: Its aggregation decides.
        turn: Int [T] over *all* trained tokens of this learner, not of one micro-batch.
        trajectory: Like `turn`.
        all_reduce: Sums a tensor over learners, in place or by returning it; called once by every
            aggregation but "constant", also without tokens.
    """
    if objective.constant is not None:
        return torch.tensor(objective.constant, dtype=torch.float64, device=turn.device)
    count = {"token_mean": turn, "sequence_mean": trajectory, "turn_mean": turn}
    ids_T = count[objective.aggregation]
    units = ids_T.numel() if objective.aggregation == "token_mean" else Segments.of(ids_T).count
    total = torch.tensor(float(units), dtype=torch.float64, device=turn.device)
    reduced = all_reduce(total) if all_reduce is not None else None
    return (total if reduced is None else reduced).clamp_min(1.0)


def objective_sum(
    objective: Objective,
    *,
    learner_logprobs: Tensor,
    sampling_logprobs: Tensor,
    advantages: Tensor,
    turn: Tensor,
    trajectory: Tensor,
    anchor_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted loss *sum* over the given tokens, to be divided by `normaliser`, and metric sums.

    Args:
        objective: What to compute.
        learner_logprobs: [T] of the weights being trained, with gradient.
        sampling_logprobs: [T] as the sampler reported them.
        advantages: [T], the turn's advantage on each of its tokens.
        turn: Int [T], unique over the whole batch.
        trajectory: Int [T], unique over the whole batch; all its trained tokens must be here.
        anchor_logprobs: [T] of the learner before this step's first update, the denominators of the
            ratio.  None means that this is the first update: the current ones, detached.
        ref_logprobs: [T]; needed exactly if kl_coeff is not 0.
        entropy: [T]; needed if entropy_coeff is not 0, then with gradient; else only reported.

    Raises:
        ValueError: For bad shapes, a missing or useless input, and NaN or infinity in `advantages`
            or `sampling_logprobs`, naming the row.

    Returns:
        The scalar loss sum, with a gradient path also for T = 0, and detached float64 sums for
        `merge_metrics` and `finish_metrics`.
    """
    tensors = {
        "learner_logprobs": learner_logprobs,
        "sampling_logprobs": sampling_logprobs,
        "advantages": advantages,
        "turn": turn,
        "trajectory": trajectory,
        "anchor_logprobs": anchor_logprobs,
        "ref_logprobs": ref_logprobs,
        "entropy": entropy,
    }
    _check(objective, tensors)
    dtype = torch.float64 if learner_logprobs.dtype == torch.float64 else torch.float32
    now_T = learner_logprobs.to(dtype)
    anchor_T = now_T.detach() if anchor_logprobs is None else anchor_logprobs.detach().to(dtype)
    gap_T = anchor_T - sampling_logprobs.detach().to(dtype)
    advantages_T = advantages.detach().to(dtype)

    log_ratio_T = _pooled(now_T - anchor_T, objective.ratio_level, turn, trajectory, mean=True)
    surrogate_T, metrics = clipped_surrogate(objective, log_ratio_T, advantages_T)
    if objective.importance_sampling != "off":
        level = objective.importance_sampling
        ratio_T = _exp(_pooled(gap_T, level, turn, trajectory, mean=False))
        surrogate_T = surrogate_T * ratio_T.clamp(max=objective.importance_cap)
        metrics["mismatch/truncated_frac"] = (ratio_T > objective.importance_cap).sum()
    loss_T = surrogate_T
    if ref_logprobs is not None:
        kl_T = kl_penalty(objective.kl_estimator, now_T, ref_logprobs.detach().to(dtype))
        loss_T = loss_T + objective.kl_coeff * kl_T
        metrics["ref/kl"] = kl_T.sum()
    if entropy is not None:
        loss_T = loss_T - objective.entropy_coeff * entropy.to(dtype)
        metrics["policy/entropy"] = entropy.sum()
    metrics["tokens"] = torch.tensor(now_T.numel(), device=now_T.device)
    metrics["mismatch/kl"] = (_exp(gap_T) - 1.0 - gap_T).sum()
    metrics["mismatch/max_abs_log_ratio"] = _max_abs(gap_T)
    weights_T = token_weights(objective.aggregation, turn, trajectory).to(dtype)
    return (weights_T * loss_T).sum(), {k: v.detach().double() for k, v in metrics.items()}


def clipped_surrogate(
    objective: Objective, log_ratio_T: Tensor, advantages_T: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's pessimistic surrogate per token as a loss, and counts of the tokens it stops.

    A token counts as clipped only where the clip takes the gradient away: above 1 + clip_high with
    a positive advantage, below 1 - clip_low with a negative one.
    """
    ratio_T = _exp(log_ratio_T)
    clipped_T = ratio_T.clamp(1.0 - objective.clip_low, 1.0 + objective.clip_high)
    loss_T = torch.maximum(-ratio_T * advantages_T, -clipped_T * advantages_T)
    stopped = _stopped(objective, ratio_T, advantages_T)
    metrics = {
        **{f"clip/{name}_frac": stopped_T.sum() for name, stopped_T in stopped.items()},
        "ratio/mean": ratio_T.sum(),
        "ratio/max_abs_log": _max_abs(log_ratio_T),
    }
    if objective.dual_clip is not None:
        loss_T = torch.where(stopped["dual"], -objective.dual_clip * advantages_T, loss_T)
    return loss_T, metrics


def token_ratios(
    objective: Objective,
    *,
    learner_logprobs: Tensor,
    anchor_logprobs: Tensor,
    advantages: Tensor,
    turn: Tensor,
    trajectory: Tensor,
) -> tuple[Tensor, Tensor]:
    """The ratio [T] of each token as the objective takes it, and whether a clip stops its gradient.

    Args: See `objective_sum`.
    """
    gap_T = learner_logprobs - anchor_logprobs
    ratio_T = _exp(_pooled(gap_T, objective.ratio_level, turn, trajectory, mean=True))
    stopped = torch.stack(list(_stopped(objective, ratio_T, advantages).values()))
    return ratio_T, stopped.any(0)


def _stopped(objective: Objective, ratio_T: Tensor, advantages_T: Tensor) -> dict[str, Tensor]:
    """Which tokens' gradient is taken away, by the clip that does it."""
    clipped_T = ratio_T.clamp(1.0 - objective.clip_low, 1.0 + objective.clip_high)
    stopped = {
        "low": (ratio_T < clipped_T) & (advantages_T < 0),
        "high": (ratio_T > clipped_T) & (advantages_T > 0),
    }
    if objective.dual_clip is not None:
        loss_T = torch.maximum(-ratio_T * advantages_T, -clipped_T * advantages_T)
        stopped["dual"] = (advantages_T < 0) & (loss_T > -objective.dual_clip * advantages_T)
    return stopped


def kl_penalty(kind: KL, learner_T: Tensor, ref_T: Tensor) -> Tensor:
    """Estimate per token of KL(learner || reference) from the learner's own samples (Schulman)."""
    log_ratio_T = learner_T - ref_T
    if kind == "k1":
        return log_ratio_T
    if kind == "k2":
        return 0.5 * log_ratio_T**2
    return _exp(-log_ratio_T) - 1.0 + log_ratio_T


def merge_metrics(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One dict of sums from those of several micro-batches or learners: `max` takes the maximum."""
    merged: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            if name not in merged:
                merged[name] = value
            else:
                both = torch.stack([merged[name], value])
                merged[name] = both.amax() if "max_" in name else both.sum()
    return merged


def finish_metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Means per trained token from merged sums; maxima and the token count as they are."""
    tokens = max(float(sums["tokens"]), 1.0)
    keep = {name: "max_" in name or name == "tokens" for name in sums}
    return {name: float(v) if keep[name] else float(v) / tokens for name, v in sums.items()}


def _pooled(log_T: Tensor, level: str, turn: Tensor, trajectory: Tensor, *, mean: bool) -> Tensor:
    if level == "token":
        return log_T
    segments = Segments.of(turn if level == "turn" else trajectory)
    return segments.mean(log_T) if mean else segments.total(log_T)


def _exp(log_T: Tensor) -> Tensor:
    return log_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _max_abs(values_T: Tensor) -> Tensor:
    return torch.cat([values_T.detach().abs(), values_T.new_zeros(1)]).amax()


def _check(objective: Objective, tensors: Mapping[str, Tensor | None]) -> None:
    """Shapes, NaN, and that each part of the objective has its input and each input has a use."""
    learner = tensors["learner_logprobs"]
    if learner is None or learner.dim() != 1:
        raise ValueError("learner_logprobs must have shape [T]")
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != learner.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(learner.shape)}")
        if tensor is not None and name in ("advantages", "sampling_logprobs"):
            check_rows(name, tensor, integer=False)  # the model's own may diverge: see the learner
    if (tensors["ref_logprobs"] is None) != (objective.kl_coeff == 0.0):
        raise ValueError(
            f"kl_coeff is {objective.kl_coeff}: ref_logprobs must be given exactly if it is not 0"
        )
    entropy = tensors["entropy"]
    if objective.entropy_coeff != 0.0 and (
        entropy is None or (learner.requires_grad and not entropy.requires_grad)
    ):
        raise ValueError("entropy_coeff is not 0: entropy must be given, with gradient")
