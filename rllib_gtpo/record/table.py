"""Trajectories and their credit -> the table of the record."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rllib_gtpo.encodable import encodable
from rllib_gtpo.env import task_id
from rllib_gtpo.record.credit import LearnedCredit
from rllib_gtpo.record.schema import SCHEMA, TOKEN_FIELDS, TRAJECTORY_FIELDS
from rllib_gtpo.types import Message, Observation, Trajectory, Turn

_CREDIT = ("return", "baseline", "scale", "advantage")


@dataclass(frozen=True)
class Recorded:
    """A trajectory with what it saw and what the learner made of it.

    credit: None if its group was not trained on.
    """

    trajectory: Trajectory
    observations: Sequence[Observation]
    credit: LearnedCredit | None


def build_table(
    recorded: Sequence[Recorded],
    iteration: int,
    decode: Callable[[int], str],
    metadata: Mapping[bytes, bytes],
    split: str = "train",
) -> pa.Table:
    """One row a trajectory.

    decode: The text of a token.
    """
    rows = [_row(one, iteration, split) for one in recorded]
    columns = {
        name: _column([row[name] for row in rows], kind) for name, kind in TRAJECTORY_FIELDS.items()
    }
    columns |= _token_columns(recorded, decode)
    schema = SCHEMA.with_metadata(dict(metadata))
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:  # lone surrogates, of a tool that made text out of bytes
        return pa.array(_encodable(values), kind)


def _encodable(value: Any) -> Any:
    """The value with escapes in the place of what UTF-8 does not have."""
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, dict):
        return {key: _encodable(each) for key, each in value.items()}
    return [_encodable(each) for each in value] if isinstance(value, list) else value


def _row(one: Recorded, iteration: int, split: str) -> dict[str, Any]:
    t = one.trajectory
    return {
        "iteration": iteration,
        "split": split,
        "group_id": t.group_id,
        "member": t.member,
        "task_id": task_id(t.task),
        "task": _json(t.task),
        "tools": _json(one.observations[0].tools) if one.observations else None,
        "messages": [_message(m) for m in _messages(one)],
        "stop_reason": None if t.stop_reason is None else t.stop_reason.value,
        "error": t.error,
        "answer": None if t.answer is None else str(t.answer),
        "correct": bool(t.correct),
        "reward": float(t.reward),
        "in_batch": one.credit is not None,
        "trained": one.credit is not None and one.credit.tokens is not None,
        "turns": [_turn(turn, k, one.credit) for k, turn in enumerate(t.turns)],
        "similarities": [
            {"member": member, "similarity": value} for member, value in t.similarities.items()
        ],
    }


def _messages(one: Recorded) -> Iterable[Message]:
    """The conversation; what the policy said is its text as it was sampled, calls included."""
    for k, observation in enumerate(one.observations):
        yield from observation.messages
        if k < len(one.trajectory.turns):
            yield {"role": "assistant", "content": one.trajectory.turns[k].text}


def _message(message: Message) -> dict[str, Any]:
    content = message.get("content")
    other = {key: value for key, value in message.items() if key not in ("role", "content")}
    return {
        "role": message["role"],
        "content": content if content is None or isinstance(content, str) else _json(content),
        "other": _json(other) if other else None,
    }


def _turn(turn: Turn, index: int, credit: LearnedCredit | None) -> dict[str, Any]:
    return {
        "index": turn.index,
        "text": turn.text,
        "content": turn.content,
        "thinking": turn.thinking,
        "finish": turn.finish,
        "calls": [
            {"name": c.name, "arguments": _json(c.arguments), "raw": c.raw, "error": c.error}
            for c in turn.calls
        ],
        "results": [
            {
                "name": r.name,
                "content": r.content,
                "error": None if r.error is None else r.error.value,
                "seconds": r.seconds,
            }
            for r in turn.results
        ],
        "invalid": turn.invalid,
        "prompt_tokens": len(turn.prompt_ids),
        "sampled_tokens": len(turn.token_ids),
        "rewards": [{"name": name, "value": float(v)} for name, v in turn.rewards.items()],
        "reward": float(turn.reward),
        **{name: None if credit is None else float(credit.turns[name][index]) for name in _CREDIT},
        "weights_version": turn.weights_version,
        "last_version": turn.last_version,
        "seconds": turn.seconds,
    }


def _json(value: Any) -> str:
    try:
        return json.dumps(value, default=str)
    except (TypeError, ValueError):  # keys that are no text, or a value inside itself
        return json.dumps(repr(value))


def _token_columns(
    recorded: Sequence[Recorded], decode: Callable[[int], str]
) -> dict[str, pa.Array]:
    """Lists aligned with the tokens; null where a value does not exist for a token."""
    parts = [p for one in recorded for turn in one.trajectory.turns for p in _parts(turn)]
    counts = np.array([len(ids) for ids, _, _ in parts], dtype=np.int64)
    ids = np.concatenate([np.asarray(p[0], np.int32) for p in parts] or [np.empty(0, np.int32)])
    logprobs = np.concatenate(
        [np.asarray(p[1], np.float32) for p in parts] or [np.empty(0, np.float32)]
    )
    turns = np.repeat(np.array([p[2] for p in parts], dtype=np.int16), counts)
    sampled = turns >= 0
    lengths = np.array([one.trajectory.num_tokens for one in recorded], dtype=np.int64)
    trained = sampled & np.repeat(
        [one.credit is not None and one.credit.tokens is not None for one in recorded], lengths
    )
    unique, inverse = np.unique(ids, return_inverse=True)
    texts = _column([decode(int(i)) for i in unique], pa.string())
    columns = {
        "tokens": texts.take(pa.array(inverse.astype(np.int32))),
        "token_ids": pa.array(ids),
        "turn_ids": pa.array(turns),
        "mask": pa.array(trained),
        "logprobs": pa.array(logprobs, mask=~sampled),
    }
    learned = [one.credit.tokens for one in recorded if one.credit and one.credit.tokens]
    for name, attribute in (
        ("learner_logprobs", "anchor_logprobs"),
        ("ratios", "ratios"),
        ("clipped", "clipped"),
    ):
        values = np.zeros(len(ids), dtype=TOKEN_FIELDS[name].to_pandas_dtype())
        if learned:
            values[trained] = np.concatenate([getattr(tokens, attribute) for tokens in learned])
        columns[name] = pa.array(values, mask=~trained)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    return {name: pa.ListArray.from_arrays(offsets, columns[name]) for name in TOKEN_FIELDS}


def _parts(turn: Turn) -> tuple[tuple[list[int], list[float], int], ...]:
    """(ids, log-probabilities, turn or -1) of what came before a turn, and of the turn."""
    before = (turn.prompt_ids, [0.0] * len(turn.prompt_ids), -1)
    return before, (turn.token_ids, turn.logprobs, turn.index)
