"""What a step's credit looks like, as sums that add up over learners.

    finish_diagnostics(merge_sums([diagnostic_sums(a), diagnostic_sums(b)]))

is exactly what one learner with the turns of both would report: no average is ever averaged.  A
quantity that is undefined (no turn at that index, nothing to correlate) is 0, and the set of names
never changes.

Shape suffixes: `_N` flat turns, `_S` trajectories with turns, `_G` groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rllib_gtpo.ops.segments import Segments

BY_TURN = 8  # turns with an index of their own in advantage/by_turn; the later ones are "rest"
DEAD = 1e-6  # an advantage smaller than this teaches nothing
_SAME = 1e-12  # a variance below this part of the mean square is rounding


@dataclass(frozen=True)
class CreditedTurns:
    """The turns of the groups that are trained on, and what their credit is compared with.

    A trajectory's turns are adjacent and in order; trajectories and groups count from 0.

    advantages_N, unshaped_N: Float64 advantages, and what they would be without shaping.
    trajectory_N: Which trajectory.  tokens_N: Sampled tokens.
    trained_N: False for turns that the loss leaves out.
    group_S: Which group.  correct_S: Whether it solved its task.
    shaping_S: The shaping term.  shaped_S: Whether the trajectory can have one at all.
    dropped: Groups that are not here because they are not trained on.
    """

    advantages_N: Tensor
    unshaped_N: Tensor
    trajectory_N: Tensor
    tokens_N: Tensor
    trained_N: Tensor
    group_S: Tensor
    correct_S: Tensor
    shaping_S: Tensor
    shaped_S: Tensor
    groups: int
    dropped: int = 0


def diagnostic_sums(rows: CreditedTurns) -> dict[str, Tensor]:
    """Float64 sums for `merge_sums` (or an all-reduce of each) and `finish_diagnostics`."""
    trained = rows.trained_N
    trajectory = Segments(rows.trajectory_N, len(rows.group_S))
    advantages, owner = rows.advantages_N[trained], rows.trajectory_N[trained]
    tokens_N = rows.tokens_N.double()
    turns_S = _sums(torch.ones_like(tokens_N), rows.trajectory_N, len(rows.group_S))
    index_N = _position(rows.trajectory_N, turns_S).clamp_max(BY_TURN)
    group_N = rows.group_S[owner]
    shaped = rows.shaped_S

    def signal(advantages_N: Tensor) -> Tensor:
        loud = (advantages_N[trained].abs() >= DEAD).double()
        return (_sums(loud, group_N, rows.groups) > 0).sum()

    def correlation(other_N: Tensor) -> Tensor:
        return _moments(advantages, other_N[trained].double())

    return {
        "groups": _vector(
            rows.groups + rows.dropped,
            rows.dropped,
            signal(rows.advantages_N),
            signal(rows.unshaped_N),
            like=tokens_N,
        ),
        "turns": _vector(
            len(advantages),
            advantages.abs().sum(),
            (advantages.abs() < DEAD).sum(),
            like=tokens_N,
        ),
        "by_turn": torch.stack(
            [
                _sums(advantages, index_N[trained], BY_TURN + 1),
                _sums(torch.ones_like(advantages), index_N[trained], BY_TURN + 1),
            ]
        ),
        "outcome_corr": correlation(rows.correct_S[rows.trajectory_N]),
        "turn_tokens_corr": correlation(tokens_N),
        "trajectory_tokens_corr": correlation(trajectory.total(tokens_N)),
        "turns_corr": correlation(turns_S[rows.trajectory_N]),
        "shaping": _within_groups(rows.shaping_S[shaped].double(), rows.group_S[shaped], rows),
        "shaping_turns_corr": _moments(rows.shaping_S[shaped].double(), turns_S[shaped]),
        "masked": _vector(
            len(turns_S),
            (_sums(trained.double(), rows.trajectory_N, len(turns_S)) == 0).sum(),
            tokens_N.sum(),
            tokens_N[~trained].sum(),
            like=tokens_N,
        ),
    }


def merge_sums(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The sums of several learners as one learner's."""
    merged: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            merged[name] = merged[name] + value if name in merged else value
    return merged


def finish_diagnostics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """The metrics of merged sums.

    group/...: shares of all sampled groups; a dropped one has no signal.
    advantage/...: over trained turns.  Correlations are Pearson's, turn by turn, with whether the
        trajectory is correct, the tokens of the turn and of the trajectory, and its turn count.
    shaping/...: over trajectories that can have the term.  variance is that within a group, as the
        mean over the groups with at least two of them.
    overlong/...: shares of trajectories, and of sampled tokens, that the loss leaves out.
    """
    groups, dropped, signal, unshaped = sums["groups"].tolist()
    turns, magnitude, dead = sums["turns"].tolist()
    members, shaping, varying, variance = sums["shaping"].tolist()
    trajectories, masked, tokens, masked_tokens = sums["masked"].tolist()
    by_turn = [_ratio(total, count) for total, count in zip(*sums["by_turn"].tolist(), strict=True)]
    names = [str(index) for index in range(BY_TURN)] + ["rest"]
    return {
        "group/zero_std_frac": _ratio(groups - signal, groups),
        "group/dropped_frac": _ratio(dropped, groups),
        "group/signal_frac": _ratio(signal, groups),
        "group/signal_frac_unshaped": _ratio(unshaped, groups),
        "advantage/abs_mean": _ratio(magnitude, turns),
        "advantage/dead_frac": _ratio(dead, turns),
        "advantage/outcome_corr": _correlation(sums["outcome_corr"]),
        "advantage/turn_tokens_corr": _correlation(sums["turn_tokens_corr"]),
        "advantage/trajectory_tokens_corr": _correlation(sums["trajectory_tokens_corr"]),
        "advantage/turns_corr": _correlation(sums["turns_corr"]),
        **{f"advantage/by_turn/{n}": mean for n, mean in zip(names, by_turn, strict=True)},
        "shaping/mean": _ratio(shaping, members),
        "shaping/variance": _ratio(variance, varying),
        "shaping/turns_corr": _correlation(sums["shaping_turns_corr"]),
        "overlong/masked_frac": _ratio(masked, trajectories),
        "overlong/masked_tokens_frac": _ratio(masked_tokens, tokens),
    }


def _within_groups(shaping: Tensor, group: Tensor, rows: CreditedTurns) -> Tensor:
    """Members, their sum, groups with at least two members, and the sum of those' variances."""
    count_G = _sums(torch.ones_like(shaping), group, rows.groups)
    mean_G = _sums(shaping, group, rows.groups) / count_G.clamp_min(1.0)
    variance_G = _sums((shaping - mean_G[group]) ** 2, group, rows.groups) / count_G.clamp_min(1.0)
    several = count_G >= 2
    return _vector(
        len(shaping), shaping.sum(), several.sum(), variance_G[several].sum(), like=shaping
    )


def _position(trajectory_N: Tensor, turns_S: Tensor) -> Tensor:
    """The index of each turn in its trajectory."""
    first_S = (turns_S.cumsum(0) - turns_S).long()
    return torch.arange(len(trajectory_N), device=trajectory_N.device) - first_S[trajectory_N]


def _moments(one: Tensor, other: Tensor) -> Tensor:
    """What a correlation needs: count, sums, squares, product."""
    pair = torch.stack([torch.ones_like(one), one, other])
    return torch.stack(
        [*pair.sum(1), (one * one).sum(), (other * other).sum(), (one * other).sum()]
    )


def _correlation(moments: Tensor) -> float:
    count, x, y, xx, yy, xy = moments.tolist()
    if not count:
        return 0.0
    variance_x, variance_y = xx / count - (x / count) ** 2, yy / count - (y / count) ** 2
    if variance_x <= _SAME * xx / count or variance_y <= _SAME * yy / count:
        return 0.0
    covariance = xy / count - x * y / count**2
    return float(max(-1.0, min(1.0, covariance / (variance_x * variance_y) ** 0.5)))


def _sums(values: Tensor, index: Tensor, size: int) -> Tensor:
    return values.new_zeros(size).index_add(0, index, values)


def _vector(*values: float | Tensor, like: Tensor) -> Tensor:
    return torch.stack([torch.as_tensor(v, dtype=like.dtype, device=like.device) for v in values])


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
