"""The tables of docs/credit_bias.md, written from the rows so that they cannot drift."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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


def degrees(row: Row) -> str:
    """The angle, with its standard error if sampled."""
    told = number(row["angle"], 1)
    return f"{told} ± {number(row['angle_se'], 1)}" if "angle_se" in row else told


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
        [f"`{row['estimator']}`", row["policy"], degrees(row), number(row["angle_discounted"], 1)]
        for policy in POLICIES
        for row in rows
        if row["table"] == "estimators" and row["process"] == "solved" and row["policy"] == policy
        if row["estimator"] in SHOWN and "angle_discounted" in row
    ]
    return markdown(["estimator", "policy", "to the total", "to the discounted total"], body)


def gamma_table(rows: Sequence[Row], policy: str) -> str:
    """Gain with 64 and 1024 trajectories, and the angle, for each discount."""
    chosen = [row for row in rows if row["table"] == "gamma" and row["policy"] == policy]
    gammas = sorted({row["gamma"] for row in chosen})
    lines = dict.fromkeys((row["normalize"], row["limit"]) for row in chosen)
    found = {(row["normalize"], row["limit"], row["gamma"]): row for row in chosen}

    def cell(row: Row) -> str:
        if row["trajectories"] is None:
            return "no update"
        gains = f"{number(row['gain_64'], 2)} {number(row['gain_1024'], 2)}"
        return f"{gains} ({number(row['angle'])}°)"

    body = [
        [f"`{mode}`", str(limit), *(cell(found[mode, limit, gamma]) for gamma in gammas)]
        for mode, limit in sorted(lines, key=lambda line: list(lines).index((line[0], 4)))
    ]
    return markdown(["normalize", "limit", *(f"gamma {gamma:g}" for gamma in gammas)], body)


def best_gamma(rows: Sequence[Row]) -> str:
    """The discounts that are best, or within two standard errors of the best."""
    chosen = [row for row in rows if row["table"] == "gamma"]
    columns = [
        (limit, policy, batch)
        for batch in (64, 1024)
        for limit in (4, 8, 16)
        for policy in POLICIES
    ]

    def cell(mode: str, limit: int, policy: str, batch: int) -> str:
        key = f"gain_{batch}"
        here = [
            row
            for row in chosen
            if (row["normalize"], row["limit"], row["policy"]) == (mode, limit, policy)
        ]
        top = max(here, key=lambda row: row[key])
        close = [
            f"{row['gamma']:g}"
            for row in here
            if top[key] - row[key] <= 2.0 * (top[f"{key}_se"] ** 2 + row[f"{key}_se"] ** 2) ** 0.5
        ]
        return ", ".join(close)

    head = ["normalize", *(f"batch {b}, limit {n}: uniform / trained" for b, n in _pairs(columns))]
    body = [
        [f"`{mode}`"]
        + [
            " / ".join(cell(mode, limit, p, batch) for p in POLICIES)
            for batch, limit in _pairs(columns)
        ]
        for mode in dict.fromkeys(row["normalize"] for row in chosen)
    ]
    return markdown(head, body)


def _pairs(columns: Sequence[tuple[int, str, int]]) -> list[tuple[int, int]]:
    return list(dict.fromkeys((batch, limit) for limit, _, batch in columns))


def shaping_table(rows: Sequence[Row]) -> str:
    """Angle to the accuracy's gradient, leak, and what training on the expected update ends in."""
    body = [
        [
            row["process"].removeprefix("shaping_"),
            row["policy"],
            f"`{row['estimator']}`",
            row["shaping"],
            degrees(row),
            number(row["trajectories"]),
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
        "trajectories": by_process(rows, "estimators", lambda row: number(row["trajectories"])),
        "two targets": two_targets(rows),
        "groups of 8": by_process(rows, "larger_groups", degrees),
        "best gamma": best_gamma(rows),
        "gamma trained": gamma_table(rows, "trained"),
        "gamma uniform": gamma_table(rows, "uniform"),
        "shaping": shaping_table(rows),
    }


def renewed(text: str, rows: Sequence[Row]) -> str:
    """`text` with each table between `<!-- table: NAME -->` and `<!-- end -->` written anew."""
    made = tables(rows)

    def block(match: re.Match[str]) -> str:
        if match[1] not in made:
            raise ValueError(f"no table is called {match[1]!r}; there are: {', '.join(made)}")
        return f"<!-- table: {match[1]} -->\n{made[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- table: (.+?) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def write_tables(file: Path, rows: Sequence[Row]) -> None:
    """Renews the tables in a file."""
    file.write_text(renewed(file.read_text(), rows))
