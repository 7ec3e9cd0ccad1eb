"""A recorded trajectory as text for TensorBoard, which renders Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rllib_gtpo.report.terminal import plain

_MESSAGE_LIMIT = 4_000  # characters
_LIMIT = 40_000


def transcript(row: Mapping[str, Any]) -> str:
    """The conversation with each turn's reward and advantage, as one block of code.

    Whatever a model or a task says stays text: every line is indented, so that Markdown takes it
    for code, which it escapes; and characters that are not printable are shown by their numbers.
    """
    lines = [line for part in _parts(row) for line in part.expandtabs(4).splitlines() or [""]]
    text = "\n".join(f"    {plain(line)}" for line in lines)
    return text if len(text) <= _LIMIT else f"{text[:_LIMIT]}\n    ... (the record has the rest)"


def sampled_transcripts(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Of the group with the largest advantages, the members with most and with least reward."""
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group_id"], []).append(row)
    if not groups:
        return {}
    members = max(groups.values(), key=_signal)
    by_reward = sorted(members, key=lambda row: row["reward"])
    return {
        "transcript/highest_reward": transcript(by_reward[-1]),
        "transcript/lowest_reward": transcript(by_reward[0]),
    }


def _signal(members: Sequence[Mapping[str, Any]]) -> float:
    found = [abs(turn["advantage"] or 0.0) for row in members for turn in row["turns"]]
    return sum(found) / len(found) if found else 0.0


def _parts(row: Mapping[str, Any]) -> Iterator[str]:
    outcome = "solved" if row["correct"] else "not solved"
    yield (
        f"iteration {row['iteration']}, group {row['group_id']}, member {row['member']}: "
        f"{outcome}, reward {row['reward']:+.3f}, stopped by {row['stop_reason'] or 'nothing'}"
    )
    yield f"task {row['task_id']}"
    turns = iter(row["turns"])
    for message in row["messages"]:
        yield ""
        turn = next(turns, None) if message["role"] == "assistant" else None
        yield message["role"] if turn is None else f"assistant, {_credit(turn)}"
        content = message["content"] or message["other"] or ""
        yield content[:_MESSAGE_LIMIT]
        if len(content) > _MESSAGE_LIMIT:
            yield f"... ({len(content) - _MESSAGE_LIMIT:,} characters more)"


def _credit(turn: Mapping[str, Any]) -> str:
    rewards = ", ".join(f"{one['name']} {one['value']:+.3f}" for one in turn["rewards"])
    advantage = "none" if turn["advantage"] is None else f"{turn['advantage']:+.3f}"
    return (
        f"turn {turn['index']}: reward {turn['reward']:+.3f} ({rewards}), advantage {advantage}"
        + (", invalid call" if turn["invalid"] else "")
    )
