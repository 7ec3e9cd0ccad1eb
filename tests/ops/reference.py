"""Every estimator again, in plain floats and loops, from the formulas and not from the code.

Slow on purpose: each set is spelled out as a list of row numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Floats = list[float]
Ints = Sequence[int]


def returns(rewards: Sequence[float], trajectory: Ints, gamma: float) -> Floats:
    result = []
    for i in range(len(rewards)):
        later = [m for m in range(i, len(rewards)) if trajectory[m] == trajectory[i]]
        result.append(sum(gamma ** (m - i) * rewards[m] for m in later))
    return result


def normalise(
    x: float, values: Sequence[float], weights: Sequence[float] | None = None, use_std: bool = True
) -> float:
    """x standardised by the mean and the population std of `values`; 0 where they do not spread."""
    weights = weights or [1.0] * len(values)
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    variance = sum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True)) / sum(weights)
    std = variance**0.5
    if std < 1e-6:
        return 0.0
    return (x - mean) / (std + 1e-6) if use_std else x - mean


def position(trajectory: Ints, i: int) -> int:
    return sum(1 for m in range(i) if trajectory[m] == trajectory[i])


def is_last(trajectory: Ints, i: int) -> bool:
    return all(trajectory[m] != trajectory[i] for m in range(i + 1, len(trajectory)))


def first_rows(trajectory: Ints, rows: Sequence[int]) -> list[int]:
    return [i for i in rows if position(trajectory, i) == 0]


def sums(rewards: Sequence[float], trajectory: Ints) -> Floats:
    return [
        sum(r for r, t in zip(rewards, trajectory, strict=True) if t == trajectory[i])
        for i in range(len(rewards))
    ]


def same(ids: Ints, i: int) -> list[int]:
    """The rows that have the id of row `i`, itself among them."""
    return [j for j in range(len(ids)) if ids[j] == ids[i]]


def gtpo(
    rewards: Sequence[float],
    trajectory: Ints,
    group: Ints,
    gamma: float = 0.9,
    normalize: str = "group",
    use_std: bool = True,
    weight_trajectories: bool = False,
) -> Floats:
    n, R = len(rewards), returns(rewards, trajectory, gamma)
    result = []
    for i in range(n):
        prompt = same(group, i)
        if normalize == "none":
            result.append(R[i])
            continue
        if normalize == "group":
            rows = prompt
        elif normalize == "turn_index":
            rows = [j for j in prompt if position(trajectory, j) == position(trajectory, i)]
        elif normalize == "batch":
            rows = list(range(n))
        elif normalize == "first_return":
            rows = first_rows(trajectory, prompt)
        else:
            rows = [j for j in prompt if trajectory[j] != trajectory[i]]
        weights = [1.0 for _ in rows]
        if weight_trajectories:
            weights = [1.0 / sum(trajectory[m] == trajectory[j] for m in rows) for j in rows]
        if normalize == "leave_one_out":
            pairs = zip(weights, rows, strict=True)
            mean = sum(w * R[j] for w, j in pairs) / sum(weights) if rows else R[i]
            result.append(R[i] - mean)
        else:
            result.append(normalise(R[i], [R[j] for j in rows], weights, use_std))
    return result


def among_members(o: Sequence[float], trajectory: Ints, group: Ints, use_std: bool) -> Floats:
    n = len(o)
    members = [first_rows(trajectory, same(group, i)) for i in range(n)]
    return [normalise(o[i], [o[j] for j in members[i]], use_std=use_std) for i in range(n)]


def grpo(rewards: object, trajectory: Ints, group: Ints, outcome: Sequence[float]) -> Floats:
    return among_members(outcome, trajectory, group, True)


def grpo_sum(rewards: Sequence[float], trajectory: Ints, group: Ints) -> Floats:
    return among_members(sums(rewards, trajectory), trajectory, group, True)


def dr_grpo(rewards: Sequence[float], trajectory: Ints, group: Ints) -> Floats:
    return among_members(sums(rewards, trajectory), trajectory, group, False)


def rloo(rewards: Sequence[float], trajectory: Ints, group: Ints) -> Floats:
    n, o, result = len(rewards), sums(rewards, trajectory), []
    for i in range(n):
        members = first_rows(trajectory, same(group, i))
        others = [o[j] for j in members if trajectory[j] != trajectory[i]]
        result.append(o[i] - sum(others) / len(others) if others else 0.0)
    return result


def reinforce_pp(rewards: Sequence[float], trajectory: Ints, group: Ints) -> Floats:
    n, o = len(rewards), sums(rewards, trajectory)
    centred = []
    for i in range(n):
        members = first_rows(trajectory, same(group, i))
        centred.append(o[i] - sum(o[j] for j in members) / len(members))
    step = [centred[j] for j in first_rows(trajectory, range(n))]
    return [normalise(c, step) for c in centred]


def mt_grpo(
    rewards: Sequence[float],
    trajectory: Ints,
    group: Ints,
    outcome: Sequence[float],
    lambda_: float = 1.0,
) -> Floats:
    n, result = len(rewards), grpo(rewards, trajectory, group, outcome)
    for i in range(n):
        if not is_last(trajectory, i):
            k = position(trajectory, i)
            turn = [j for j in same(group, i) if position(trajectory, j) == k]
            result[i] += lambda_ * normalise(rewards[i], [rewards[j] for j in turn])
    return result


def gigpo(
    rewards: Sequence[float],
    trajectory: Ints,
    group: Ints,
    anchor: Ints,
    gamma: float = 0.9,
    omega: float = 1.0,
    use_std: bool = False,
) -> Floats:
    n, result = len(rewards), grpo_sum(rewards, trajectory, group)
    R = returns(rewards, trajectory, gamma)
    for i in range(n):
        state = [j for j in same(group, i) if anchor[j] == anchor[i]]
        result[i] += omega * normalise(R[i], [R[j] for j in state], use_std=use_std)
    return result


ESTIMATORS: dict[str, Callable[..., Floats]] = {
    "gtpo": gtpo,
    "grpo": grpo,
    "grpo_sum": grpo_sum,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "mt_grpo": mt_grpo,
    "gigpo": gigpo,
}
