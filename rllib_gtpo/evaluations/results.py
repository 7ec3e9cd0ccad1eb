"""The results of an evaluation, one row a task; docs/evaluation.md describes the columns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rllib_gtpo.at_k import SameAnswer, TaskScore, mean_scores, score_task
from rllib_gtpo.encodable import encodable
from rllib_gtpo.env import task_id
from rllib_gtpo.errors import ConfigError
from rllib_gtpo.intervals import compute_bootstrap
from rllib_gtpo.record.location import Location
from rllib_gtpo.types import Group, Message, ToolError

VERSION = 1
METADATA = b"rllib_gtpo.evaluation"  # key of the file's own metadata: JSON, with "version"
DIRECTORY = "evaluations"  # in a run's directory
SUFFIX = ".parquet"

_TEXT, _REAL, _WHOLE = pa.string(), pa.float64(), pa.int32()
SCHEMA = pa.schema(
    {
        "split": _TEXT,
        "position": _WHOLE,
        "task_id": _TEXT,
        "prompt": _TEXT,
        "samples": _WHOLE,
        "correct": _WHOLE,
        "avg": _REAL,
        "pass_at_k": pa.list_(_REAL),
        "maj": _REAL,
        "reward": _REAL,
        "turns": _REAL,
        "tokens": _REAL,
        "tool_calls": _WHOLE,
        "tool_errors": _WHOLE,
        "invalid_turns": _WHOLE,
        "answers": pa.list_(_TEXT),
        "solved": pa.list_(pa.bool_()),
        "stop_reasons": pa.list_(_TEXT),
    }
)


@dataclass(frozen=True)
class Results:
    """Rows of tasks, and what they are the results of.

    about: "source", "iteration", "algorithm", "environment", "splits", "settings", ...
    """

    about: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def samples(self) -> int:
        """Of each task."""
        return int(self.rows[0]["samples"])

    @property
    def splits(self) -> list[str]:
        """In the order of the rows."""
        return list(dict.fromkeys(row["split"] for row in self.rows))

    def of(self, split: str) -> list[dict[str, Any]]:
        """The rows of a split."""
        return [row for row in self.rows if row["split"] == split]

    def write(self, place: Location, name: str) -> str:
        """Writes NAME.parquet, which appears when it is complete; its address."""
        about = {"version": VERSION, "package": metadata.version("rllib-gtpo"), **self.about}
        header = {METADATA: json.dumps(about, default=str).encode()}
        table = pa.Table.from_pylist(self.rows, schema=SCHEMA.with_metadata(header))
        place.make()
        place.write(table, name + SUFFIX)
        return (place / (name + SUFFIX)).address

    @classmethod
    def read(cls, path: str | Path) -> Results:
        """What `write` wrote.

        Raises:
            ConfigError: The file is something else, or of another version.
        """
        try:
            table = pq.read_table(path)
            about = json.loads((table.schema.metadata or {})[METADATA])
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ConfigError(
                f"{path} is no file of results of `rllib evaluate`: {reason}."
            ) from error
        if about.pop("version", None) != VERSION or table.schema.names != SCHEMA.names:
            raise ConfigError(
                f"{path} was written by rllib-gtpo {about.get('package')}, whose results have "
                "other columns: evaluate again."
            )
        rows = table.to_pylist()
        if not rows:
            raise ConfigError(f"{path} has no rows: evaluate again.")
        return cls(about, rows)


def task_rows(
    split: str, groups: Iterable[Group], prompts: Mapping[int, str], same: SameAnswer
) -> list[dict[str, Any]]:
    """The rows of a split.

    Args:
        split: Its name.
        groups: Of rollouts, one a task.
        prompts: The prompt of each group, by its id.
        same: See `rllib_gtpo.at_k.score_task`.
    """
    return [
        _row(split, group, prompts.get(group.id, ""), score_task(group, same)) for group in groups
    ]


def prompt_text(messages: Sequence[Message]) -> str:
    """What a task says to the policy: its messages without the system's."""
    texts = [message.get("content") for message in messages if message["role"] != "system"]
    return "\n".join(text if isinstance(text, str) else json.dumps(text) for text in texts)


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The numbers of a split, under the names that evaluations during training have for them.

    `reward`, `turn/per_trajectory` and `tokens/per_trajectory` have intervals, too.
    """
    scores = [TaskScore(row["samples"], row["correct"], row["maj"]) for row in rows]
    metrics = mean_scores(scores)
    for name, column in (
        ("reward", "reward"),
        ("turn/per_trajectory", "turns"),
        ("tokens/per_trajectory", "tokens"),
    ):
        values = [row[column] for row in rows]
        metrics[name] = sum(values) / len(values)
        metrics[f"{name}_low"], metrics[f"{name}_high"] = compute_bootstrap(values)
    turns = sum(row["turns"] * row["samples"] for row in rows)
    calls = sum(row["tool_calls"] for row in rows)
    metrics["tool/error_rate"] = sum(row["tool_errors"] for row in rows) / max(calls, 1)
    metrics["tool/invalid_rate"] = sum(row["invalid_turns"] for row in rows) / max(turns, 1)
    reasons = [reason for row in rows for reason in row["stop_reasons"]]
    for reason in sorted(set(reasons)):
        metrics[f"stop/{reason}"] = reasons.count(reason) / len(reasons)
    return metrics


def _row(split: str, group: Group, prompt: str, score: TaskScore) -> dict[str, Any]:
    members = group.trajectories
    turns = [turn for t in members for turn in t.turns]
    errors = [result.error for turn in turns for result in turn.results]
    return {
        "split": split,
        "position": group.id,
        "task_id": task_id(group.task),
        "prompt": encodable(prompt),
        "samples": score.samples,
        "correct": score.correct,
        "avg": score.average,
        "pass_at_k": [score.pass_at(k) for k in range(1, score.samples + 1)],
        "maj": score.majority,
        "reward": _mean(t.reward for t in members),
        "turns": len(turns) / len(members),
        "tokens": _mean(t.num_trained_tokens for t in members),
        "tool_calls": sum(error is not ToolError.INVALID for error in errors),
        "tool_errors": sum(error in (ToolError.RAISED, ToolError.TIMEOUT) for error in errors),
        "invalid_turns": sum(turn.invalid for turn in turns),
        "answers": [None if t.answer is None else encodable(str(t.answer)) for t in members],
        "solved": [bool(t.correct) for t in members],
        "stop_reasons": [t.stop_reason.value if t.stop_reason else "" for t in members],
    }


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
