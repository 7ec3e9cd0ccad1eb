"""The tables of docs/credit_bias.md, written from the rows so that they cannot drift."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from results import markdown

Row = dict[str, Any]
POLICIES = ("uniform", "trained")
SHOWN = (
    "gtpo none gamma=1",
    "gtpo leave_one_out gamma=1",
    "gtpo first_return gamma=1",
    "gtpo group gamma=1",
    "gtpo group centred gamma=1",
    "gtpo turn_index gamma=1",
    "gtpo batch gamma=1",
    "gtpo leave_one_out gamma=0.9",
    "gtpo first_return gamma=0.9",
    "gtpo group gamma=0.9",
    "gtpo group weighted gamma=0.9",
    "gtpo group centred gamma=0.9",
    "gtpo turn_index gamma=0.9",
    "gtpo batch gamma=0.9",
    "gtpo group gamma=0.9 drop_solved",
    "gtpo group gamma=0.9 drop",
    "grpo",
    "grpo_sum",
    "dr_grpo",
    "rloo",
    "reinforce_pp",
    "mt_grpo",
    "gigpo gamma=0.9",
)


def number(value: float | None, digits: int = 0) -> str:
    """For a cell; "-" for infinity, which the results hold as nothing."""
    return "-" if value is None else f"{value:.{digits}f}"


def told(row: Row, name: str, digits: int = 0, error: str = "") -> str:
    """A figure, with its standard error (`error`, else that of its own name) if sampled."""
    shown, error = number(row[name], digits), error or f"{name}_se"
    return f"{shown} ± {number(row[error], digits)}" if error in row else shown


def degrees(row: Row, name: str = "angle") -> str:
    """An angle; the standard error is the same to whatever target."""
    return told(row, name, 1, "angle_se")


def trajectories(row: Row) -> str:
    """How many make signal as large as noise."""
    return told(row, "trajectories")


def by_process(rows: Sequence[Row], table: str, cell: Callable[[Row], str]) -> str:
    """Estimators down, processes across; each cell is "uniform / trained"."""
    chosen = [row for row in rows if row["table"] == table]
    names = list(dict.fromkeys(row["process"] for row in chosen))
    found = {(row["estimator"], row["process"], row["policy"]): cell(row) for row in chosen}
    known = {row["estimator"] for row in chosen}
    body = [
        [f"`{label}`"]
        + [" / ".join(found[label, name, policy] for policy in POLICIES) for name in names]
        for label in SHOWN
        if label in known
    ]
    return markdown(["estimator", *names], body)


def two_targets(rows: Sequence[Row]) -> str:
    """`solved`: the angle to the undiscounted and to the discounted gradient."""
    body = [
        [f"`{row['estimator']}`", row["policy"], degrees(row), degrees(row, "angle_discounted")]
        for policy in POLICIES
        for row in rows
        if row["table"] == "estimators" and row["process"] == "solved" and row["policy"] == policy
        if row["estimator"] in SHOWN and "gamma=0.9" in row["estimator"]
    ]
    return markdown(["estimator", "policy", "to the total", "to the discounted total"], body)


def gamma_table(rows: Sequence[Row]) -> str:
    """The trained policy: gain with 64 and with 1024 trajectories, and the angle."""
    chosen = [row for row in rows if row["table"] == "gamma" and row["policy"] == "trained"]
    found: dict[tuple[str, int], list[str]] = {}
    for row in chosen:
        gains = f"{number(row['gain_64'], 2)} {number(row['gain_1024'], 2)}"
        cell = f"{gains} ({told(row, 'angle')}°)" if row["trajectories"] else "no update"
        found.setdefault((row["normalize"], row["limit"]), []).append(cell)
    modes = list(dict.fromkeys(mode for mode, _ in found))
    order = sorted(found, key=lambda line: (modes.index(line[0]), line[1]))
    gammas = dict.fromkeys(f"gamma {row['gamma']:g}" for row in chosen)
    body = [[f"`{mode}`", str(limit), *found[mode, limit]] for mode, limit in order]
    errors = [number(max(row[f"gain_{n}_se"] for row in chosen), 2) for n in (64, 1024)]
    note = f"Standard errors of the gains are at most {errors[0]} and {errors[1]}."
    return markdown(["normalize", "limit", *gammas], body) + f"\n\n{note}"


def best_gamma(rows: Sequence[Row]) -> str:
    """The discounts that gain most, or within two standard errors of the most."""
    chosen = [row for row in rows if row["table"] == "gamma"]
    columns = [(batch, limit) for batch in (64, 1024) for limit in (4, 8, 16)]

    def cell(mode: str, policy: str, batch: int, limit: int) -> str:
        where, key = (mode, policy, limit), f"gain_{batch}"
        here = [r for r in chosen if (r["normalize"], r["policy"], r["limit"]) == where]
        top = max(here, key=lambda row: row[key])
        close = [
            f"{row['gamma']:g}"
            for row in here
            if top[key] - row[key] <= 2.0 * math.hypot(top[f"{key}_se"], row[f"{key}_se"])
        ]
        return ", ".join(close)

    body = [
        [f"`{mode}`", policy, *(cell(mode, policy, *column) for column in columns)]
        for mode in dict.fromkeys(row["normalize"] for row in chosen)
        for policy in POLICIES
    ]
    head = [f"batch {batch}, limit {limit}" for batch, limit in columns]
    return markdown(["normalize", "policy", *head], body)


def shaping_table(rows: Sequence[Row]) -> str:
    """Angle to the accuracy's gradient, leak, and what training on the expected update ends in."""
    body = [
        [
            row["process"].removeprefix("shaping_"),
            row["policy"],
            f"`{row['estimator']}`",
            row["shaping"],
            degrees(row),
            trajectories(row),
            f"{number(100 * row['leak'])}%",
            number(row["toward_copy"], 2),
            *(number(row.get(key), 3) for key in ("accuracy_after", "copies_after")),
        ]
        for row in rows
        if row["table"] == "shaping"
    ]
    head = "code,policy,estimator,shaping,angle,trajectories,leak,toward copy"
    return markdown([*head.split(","), "accuracy after", "failed copies after"], body)


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """Every table by its name in the docs."""
    return {
        "angles": by_process(rows, "estimators", degrees),
        "trajectories": by_process(rows, "estimators", trajectories),
        "two targets": two_targets(rows),
        "groups of 8": by_process(rows, "larger_groups", degrees),
        "best gamma": best_gamma(rows),
        "gamma": gamma_table(rows),
        "shaping": shaping_table(rows),
    }
