"""What a run leaves behind per iteration: result.json, progress.csv and TensorBoard events."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rllib_gtpo.command.directory import replace_text
from rllib_gtpo.command.stopping import flatten, numbers
from rllib_gtpo.record.location import Location
from rllib_gtpo.report.tensorboard import TensorBoardLog

ITERATION = "training_iteration"


class ResultLog:
    """Appends results to a run directory, in the formats of Ray Tune's loggers.

    Rows after `last_iteration` (left by a run that was killed after its last checkpoint) are
    dropped first, so that a resumed run counts without gaps or repeats.  A write that fails, for
    instance on a full disk, is reported once and does not end the training: the row waits until
    there is room, and a file never ends in half a row.
    """

    def __init__(
        self, directory: Path, last_iteration: int = 0, home: Location | None = None
    ) -> None:
        """`home` is where the run's record is, if not in the same directory."""
        self._json = directory / "result.json"
        self._csv = directory / "progress.csv"
        self._directory = directory
        self._last_iteration = last_iteration
        self._columns: list[str] = []
        self._board = TensorBoardLog(directory, home or Location.of(directory), last_iteration)
        self._warned = False
        self._waiting: dict[str, list[dict[str, Any]]] = {"json": [], "csv": [], "events": []}
        self._drop_later_rows()

    def write_params(self, config: Mapping[str, Any]) -> None:
        """Writes the whole configuration to params.json."""
        from ray.tune.utils.util import SafeFallbackEncoder

        text = json.dumps(config, indent=2, sort_keys=True, cls=SafeFallbackEncoder)
        try:
            replace_text(self._directory / "params.json", text + "\n")
        except OSError as error:
            self._warn(error)

    def write(self, result: Mapping[str, Any]) -> None:
        """Appends one iteration to the three files."""
        row = {k: v for k, v in result.items() if k != "config"}
        for rows in self._waiting.values():
            rows.append(row)
        try:
            self._write_waiting("json", self._write_json)
            self._write_waiting("csv", self._write_csv)
            self._write_waiting("events", self._write_events)
        except OSError as error:
            self._warn(error)

    def close(self) -> None:
        """Shows the rest of the record in TensorBoard; call it when that is complete."""
        try:
            self._board.close()
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            print(f"warning: results are not being written: {error}", file=sys.stderr)
        self._warned = True

    def _write_waiting(self, name: str, write: Callable[[dict[str, Any]], None]) -> None:
        rows = self._waiting[name]
        while rows:
            write(rows[0])
            rows.pop(0)

    def _write_json(self, row: dict[str, Any]) -> None:
        from ray.tune.utils.util import SafeFallbackEncoder

        _append(self._json, json.dumps(row, cls=SafeFallbackEncoder) + "\n")

    def _write_csv(self, row: dict[str, Any]) -> None:
        """Appends a row; a metric that appears later widens the table instead of being lost."""
        row = {ITERATION: row[ITERATION], **flatten(row)}
        new = [key for key in row if key not in self._columns]
        if new:
            rows = self._read_csv()
            self._rewrite_csv(rows, [*self._columns, *new])
        line = io.StringIO(newline="")
        csv.DictWriter(line, self._columns).writerow(row)
        _append(self._csv, line.getvalue())

    def _write_events(self, row: dict[str, Any]) -> None:
        self._board.write(numbers(row), int(row[ITERATION]))

    def _read_csv(self) -> list[dict[str, Any]]:
        if not self._csv.exists():
            return []
        with self._csv.open(newline="") as file:
            return list(csv.DictReader(file))

    def _rewrite_csv(self, rows: list[dict[str, Any]], columns: list[str]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        replace_text(self._csv, text.getvalue(), newline="")
        self._columns = columns

    def _drop_later_rows(self) -> None:
        if self._json.exists():
            lines = self._json.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if self._keeps_json(line)]
            if len(kept) < len(lines):
                replace_text(self._json, b"".join(kept).decode())
        rows = self._read_csv()
        if rows:
            columns = [key for key in rows[0] if key]
            whole = [row for row in rows if None not in row.values()]  # the last may be torn
            self._rewrite_csv([r for r in whole if self._keeps(r.get(ITERATION))], columns)

    def _keeps_json(self, line: bytes) -> bool:
        try:
            return line.endswith(b"\n") and self._keeps(json.loads(line).get(ITERATION))
        except ValueError:  # the torn last line of a run that was killed
            return False

    def _keeps(self, iteration: Any) -> bool:
        try:
            return int(iteration) <= self._last_iteration
        except (TypeError, ValueError):
            return False


def _append(path: Path, text: str) -> None:
    """Appends all of a text, or nothing."""
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        rest = memoryview(text.encode())
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            os.truncate(path, size)
            raise
