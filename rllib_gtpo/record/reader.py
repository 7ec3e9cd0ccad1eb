"""Reading a record, also one that is being written."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rllib_gtpo.errors import ConfigError, DataError
from rllib_gtpo.record.location import Location, record_of
from rllib_gtpo.record.schema import FILE_NAME, FILE_PATTERN, METADATA, SCHEMA, VERSION
from rllib_gtpo.types import Group, StopReason, ToolCall, ToolError, ToolResult, Trajectory, Turn

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class IterationFile:
    """One file of the record.

    about: What the run says of itself: "iteration", "estimator", "objective", ...
    """

    location: Location
    name: str
    about: dict[str, Any]
    trajectories: int

    @property
    def iteration(self) -> int:
        """Counted from 1."""
        return int(self.about["iteration"])

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows, or some columns of them."""
        with self.location.filesystem.open_input_file(f"{self.location.path}/{self.name}") as file:
            return pq.ParquetFile(file).read(None if columns is None else list(columns))


def record_files(
    run: str | Path | Location,
    problems: list[str] | None = None,
    last: int | None = None,
    first: int = 0,
) -> list[IterationFile]:
    """The readable files of a run's record, in order of iterations.

    Args:
        run: A run's directory or that of a record, on this machine or elsewhere (s3://...).
        problems: Gets a line for each file that is left out, and why; without it they are logged.
        last: The last iteration to take.
        first: The first one; earlier files are not opened.

    Raises:
        ConfigError: The place cannot be read, or does not exist.
    """
    location = record_of(run)
    if location.local is not None and not location.local.is_dir():
        raise ConfigError(f"{run}: no such directory.")
    found: list[IterationFile] = []
    for name in location.names():
        if not fnmatch(name, FILE_PATTERN) or name < FILE_NAME.format(first):
            continue
        try:
            file = _open(location, name)
        except DataError as error:
            _tell(str(error), problems)
            continue
        if last is None or file.iteration <= last:
            found.append(file)
    return sorted(found, key=lambda file: file.iteration)


def load(
    run: str | Path,
    *,
    columns: Sequence[str] | None = None,
    last: int | None = None,
) -> Any:
    """The record of a run as a `datasets.Dataset`, in memory; see docs/record.md for its columns.

    Args:
        run: A run's directory or that of a record, on this machine or elsewhere (s3://...).
        columns: The ones to read; those of tokens are by far the largest.
        last: The last iteration to take.

    Raises:
        ConfigError: The place cannot be read, or a column does not exist.
        DataError: There is no record.

    Example:
        ```python
        rows = rllib_gtpo.record.load("runs/calculator")
        rows.filter(lambda row: row["stop_reason"] == "max_turns")[0]["messages"]
        ```
    """
    import datasets

    unknown = [name for name in columns or () if name not in SCHEMA.names]
    if unknown:
        raise ConfigError(f"columns={unknown}: the record has {', '.join(SCHEMA.names)}.")
    files = record_files(run, last=last)
    if not files:
        raise DataError(
            f"{run} has no record: train with reporting(record=...) above 0, and at least one "
            "iteration."
        )
    tables = [file.read(columns).replace_schema_metadata(None) for file in files]
    return datasets.Dataset(pa.concat_tables(tables))


def groups_of_rows(rows: Sequence[dict[str, Any]]) -> list[Group]:
    """The groups of rows of one iteration; their tokens' ids, if the rows have `token_ids`."""
    groups: dict[int, Group] = {}
    for row in rows:
        trajectory = _trajectory(row)
        group = groups.setdefault(row["group_id"], Group(row["group_id"], trajectory.task, []))
        group.trajectories.append(trajectory)
    return list(groups.values())


def _open(location: Location, name: str) -> IterationFile:
    where = (location / name).address
    try:
        with location.filesystem.open_input_file(f"{location.path}/{name}") as file:
            parquet = pq.ParquetFile(file)
            raw, rows = parquet.schema_arrow.metadata or {}, parquet.metadata.num_rows
            names = parquet.schema_arrow.names
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{where} is left out: it is damaged or half-written: {error}") from error
    try:
        about = json.loads(raw[METADATA])
        version = about["version"]
    except (KeyError, ValueError, TypeError):
        raise DataError(f"{where} is left out: it is not a file of a record.") from None
    if version != VERSION:
        raise DataError(
            f"{where} is left out: version {version} of the record, and this package reads "
            f"{VERSION}: read it with rllib-gtpo {about.get('package', 'of another version')}."
        )
    if names != SCHEMA.names:
        raise DataError(f"{where} is left out: it has other columns than a record.")
    return IterationFile(location, name, about, rows)


def _tell(problem: str, problems: list[str] | None) -> None:
    if problems is None:
        logger.warning("%s", problem)
    else:
        problems.append(problem)


def _trajectory(row: dict[str, Any]) -> Trajectory:
    turns = [_turn(turn) for turn in row["turns"]]
    ids = iter(row.get("token_ids") or ())
    for turn, recorded in zip(turns, row["turns"], strict=True):
        turn.prompt_ids = list(islice(ids, recorded["prompt_tokens"]))
        turn.token_ids = list(islice(ids, recorded["sampled_tokens"]))
    return Trajectory(
        json.loads(row["task"]),
        row["group_id"],
        row["member"],
        turns,
        None if row["stop_reason"] is None else StopReason(row["stop_reason"]),
        row["answer"],
        row["correct"],
        row["error"],
        {one["member"]: one["similarity"] for one in row["similarities"]},
    )


def _turn(turn: dict[str, Any]) -> Turn:
    return Turn(
        index=turn["index"],
        finish=turn["finish"],
        weights_version=turn["weights_version"],
        last_version=turn["last_version"],
        text=turn["text"],
        content=turn["content"],
        thinking=turn["thinking"],
        calls=[
            ToolCall(c["name"], json.loads(c["arguments"]), c["raw"], c["error"])
            for c in turn["calls"]
        ],
        results=[
            ToolResult(
                r["name"],
                r["content"],
                None if r["error"] is None else ToolError(r["error"]),
                r["seconds"],
            )
            for r in turn["results"]
        ],
        rewards={reward["name"]: reward["value"] for reward in turn["rewards"]},
        seconds=turn["seconds"],
    )
