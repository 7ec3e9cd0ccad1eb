"""What a run leaves behind per iteration: result.json, progress.csv and TensorBoard events."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rllib_gtpo.command.stopping import flatten, numbers
from rllib_gtpo.record.location import Location
from rllib_gtpo.report.tensorboard import TensorBoardLog

ITERATION = "training_iteration"


class ResultLog:
    """Appends results to a run directory, in the formats of Ray Tune's loggers.

    Rows after `last_iteration` (left by a run that was killed after its last checkpoint) are
    dropped first, so that a resumed run counts without gaps or repeats.  A write that fails, for
    instance on a full disk, is reported once and does not end the training.
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
        self._drop_later_rows()

    def write_params(self, config: Mapping[str, Any]) -> None:
        """Writes the whole configuration to params.json."""
        from ray.tune.utils.util import SafeFallbackEncoder

        text = json.dumps(config, indent=2, sort_keys=True, cls=SafeFallbackEncoder)
        (self._directory / "params.json").write_text(text + "\n")

    def write(self, result: Mapping[str, Any]) -> None:
        """Appends one iteration to the three files."""
        result = {k: v for k, v in result.items() if k != "config"}
        try:
            self._write_json(result)
            self._write_csv({ITERATION: result[ITERATION], **flatten(result)})
            self._board.write(numbers(result), int(result[ITERATION]))
        except OSError as error:
            if not self._warned:
                print(f"warning: results are not being written: {error}", file=sys.stderr)
            self._warned = True

    def close(self) -> None:
        """Shows the rest of the record in TensorBoard; call it when that is complete."""
        try:
            self._board.close()
        except OSError as error:
            print(f"warning: TensorBoard events are incomplete: {error}", file=sys.stderr)

    def _write_json(self, result: Mapping[str, Any]) -> None:
        from ray.tune.utils.util import SafeFallbackEncoder

        with self._json.open("a") as file:
            file.write(json.dumps(result, cls=SafeFallbackEncoder) + "\n")

    def _write_csv(self, row: Mapping[str, Any]) -> None:
        """Appends a row; a metric that appears later widens the table instead of being lost."""
        new = [key for key in row if key not in self._columns]
        if new:
            rows = self._read_csv()
            self._columns += new
            self._rewrite_csv(rows)
        with self._csv.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(dict(row))

    def _read_csv(self) -> list[dict[str, Any]]:
        if not self._csv.exists():
            return []
        with self._csv.open(newline="") as file:
            return list(csv.DictReader(file))

    def _rewrite_csv(self, rows: list[dict[str, Any]]) -> None:
        partial = self._csv.with_suffix(".tmp")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, self._csv)

    def _drop_later_rows(self) -> None:
        if self._json.exists():
            kept = [line for line in self._json.read_text().splitlines() if self._keeps_json(line)]
            partial = self._json.with_suffix(".tmp")
            partial.write_text("".join(line + "\n" for line in kept))
            os.replace(partial, self._json)
        rows = self._read_csv()
        if rows:
            self._columns = [key for key in rows[0] if key]
            self._rewrite_csv([row for row in rows if self._keeps(row.get(ITERATION))])

    def _keeps_json(self, line: str) -> bool:
        try:
            return self._keeps(json.loads(line).get(ITERATION))
        except ValueError:  # the torn last line of a run that was killed
            return False

    def _keeps(self, iteration: Any) -> bool:
        try:
            return int(iteration) <= self._last_iteration
        except (TypeError, ValueError):
            return False
