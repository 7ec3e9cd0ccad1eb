"""Rows of the record -> what the report shows of a group."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rllib_gtpo.ops.diagnostics import DEAD
from rllib_gtpo.record import IterationFile, groups_of_rows
from rllib_gtpo.record.schema import SHOWN_COLUMNS, TOKEN_FIELDS
from rllib_gtpo.report.comparison import compare_estimators

TEXT_LIMIT = 20_000  # characters of one text
TOKEN_LIMIT = 1_000_000  # tokens of all token views
TRAJECTORY_LIMIT = 20_000


@dataclass
class Budget:
    """How much is put into a report; spread evenly over the iterations.

    trajectories, tokens: What has been used.
    """

    files: int
    recorded: int
    trajectories: int = 0
    shown_tokens_of: int = 0
    tokens: int = 0

    def takes_group(self, index: int, size: int) -> bool:
        """Whether a group of the file at `index` is shown; counts it."""
        if self.recorded > TRAJECTORY_LIMIT:
            allowed = TRAJECTORY_LIMIT * (index + 1) / self.files
            if self.trajectories + size > allowed:
                return False
        self.trajectories += size
        return True

    def takes_tokens(self, index: int, count: int, size: int) -> bool:
        """Whether the group gets a token view; counts it."""
        if self.tokens + count > TOKEN_LIMIT * (index + 1) / self.files:
            return False
        self.tokens += count
        self.shown_tokens_of += size
        return True

    def notes(self) -> Iterator[str]:
        """What was left out, for people."""
        if self.trajectories < self.recorded:
            yield (
                f"{self.trajectories:,} of {self.recorded:,} recorded trajectories are shown: "
                "whole groups, drawn evenly over the iterations."
            )
        if self.shown_tokens_of < self.trajectories:
            yield (
                f"Token views are in the report for {self.shown_tokens_of:,} of the "
                f"{self.trajectories:,} trajectories; the record has them for all."
            )


def shown_groups(file: IterationFile, index: int, budget: Budget) -> list[dict[str, Any]]:
    """The groups of one iteration, as far as the budget goes."""
    table = file.read(SHOWN_COLUMNS)
    rows = table.to_pylist()
    members: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        members.setdefault(row["group_id"], []).append(number)
    drawn = list(members)
    random.Random(file.iteration).shuffle(drawn)
    chosen = {g for g in drawn if budget.takes_group(index, len(members[g]))}
    with_tokens = {
        g
        for g in drawn
        if g in chosen
        and budget.takes_tokens(
            index, sum(len(rows[n]["token_ids"]) for n in members[g]), len(members[g])
        )
    }
    others = _others(rows, file)
    tokens = _token_views(file, [n for g in members if g in with_tokens for n in members[g]])
    shown = []
    for group_id, numbers in members.items():
        if group_id in chosen:
            trajectories = [_trajectory(rows[n], others[n], tokens.get(n)) for n in numbers]
            shown.append(_group(file, rows[numbers[0]], trajectories))
    return shown


def summary(group: dict[str, Any]) -> dict[str, Any]:
    """A line of the table of groups."""
    members = group["trajectories"]
    turns = [turn for t in members for turn in t["turns"]]
    advantages = [turn["advantage"] for turn in turns if turn["advantage"] is not None]
    rewards = [t["reward"] for t in members]
    mean = sum(rewards) / len(rewards)
    return {
        "iteration": group["iteration"],
        "id": group["id"],
        "task": group["task"],
        "size": len(members),
        "solved": sum(t["correct"] for t in members) / len(members),
        "reward": mean,
        "spread": (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5,
        "signal": sum(map(abs, advantages)) / len(advantages) if advantages else 0.0,
        "dead": sum(abs(a) < DEAD for a in advantages) / len(advantages) if advantages else 1.0,
        "turns": len(turns) / len(members),
        "invalid": sum(turn["invalid"] for turn in turns),
        "shaped": sum(bool(t["similarities"]) for t in members),
        "stops": dict(Counter(t["stop"] or "none" for t in members)),
        "trained": any(t["in_batch"] for t in members),
        "tokens": any(t["tokens"] is not None for t in members),
    }


def _others(rows: list[dict[str, Any]], file: IterationFile) -> list[list[dict[str, Any]]]:
    """For each turn of each row, its advantage by estimator."""
    groups = groups_of_rows(rows)
    found = compare_estimators(groups, file.about)
    place = {(row["group_id"], row["member"]): number for number, row in enumerate(rows)}
    others: list[list[dict[str, Any]]] = [[] for _ in rows]
    flat = 0
    for t in (t for group in groups for t in group.trajectories):
        mine = others[place[t.group_id, t.member]]
        for _ in t.turns:
            mine.append({name: values[flat] for name, values in found.items()})
            flat += 1
    return others


def _group(
    file: IterationFile, first: dict[str, Any], trajectories: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "iteration": file.iteration,
        "id": first["group_id"],
        "task": first["task_id"],
        "row": _cut(first["task"]),
        "prompt": [_said(m) for m in _until_answer(first["messages"])],
        "trajectories": trajectories,
    }


def _trajectory(
    row: dict[str, Any], others: Sequence[dict[str, Any]], tokens: dict[str, Any] | None
) -> dict[str, Any]:
    seen = _seen_after_turns(row["messages"])
    turns = [
        {
            **{k: v for k, v in turn.items() if k not in ("index", "content", "text", "thinking")},
            "text": _cut(turn["text"]),
            "thinking": _cut(turn["thinking"]),
            "calls": [{k: _cut(v) for k, v in call.items()} for call in turn["calls"]],
            "results": [{**r, "content": _cut(r["content"])} for r in turn["results"]],
            "rewards": {reward["name"]: reward["value"] for reward in turn["rewards"]},
            "seen": [] if turn["results"] else seen[k] if k < len(seen) else [],
            "others": others[k],
        }
        for k, turn in enumerate(row["turns"])
    ]
    return {
        "member": row["member"],
        "stop": row["stop_reason"],
        "error": _cut(row["error"]),
        "answer": _cut(row["answer"]),
        "correct": row["correct"],
        "reward": row["reward"],
        "in_batch": row["in_batch"],
        "trained": row["trained"],
        "similarities": row["similarities"],
        "turns": turns,
        "tokens": tokens,
    }


def _token_views(file: IterationFile, rows: list[int]) -> dict[int, dict[str, Any]]:
    """Columns of the tokens of some rows."""
    if not rows:
        return {}
    table = file.read(list(TOKEN_FIELDS)).take(rows)
    return {
        number: {name: _rounded(row[name]) for name in row if name != "token_ids"}
        | {"ids": row["token_ids"]}
        for number, row in zip(rows, table.to_pylist(), strict=True)
    }


def _rounded(values: list[Any]) -> list[Any]:
    """To the seven digits that a float32 has."""
    return [float(f"{v:.7g}") if isinstance(v, float) else v for v in values]


def _until_answer(messages: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for message in messages:
        if message["role"] == "assistant":
            return
        yield message


def _seen_after_turns(messages: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """For each turn, what the environment said after it."""
    seen: list[list[dict[str, Any]]] = []
    for message in messages:
        if message["role"] == "assistant":
            seen.append([])
        elif seen:
            seen[-1].append(_said(message))
    return seen


def _said(message: dict[str, Any]) -> dict[str, Any]:
    return {"role": message["role"], "content": _cut(message["content"] or message["other"] or "")}


def _cut(text: str | None) -> str | None:
    if text is None or len(text) <= TEXT_LIMIT:
        return text
    return f"{text[:TEXT_LIMIT]}\n... {len(text) - TEXT_LIMIT:,} characters more in the record"


def encode(value: Any) -> bytes:
    """JSON in ASCII: no surrogate, no line separator, and no NaN."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")
