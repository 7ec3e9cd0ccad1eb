"""What came of a sweep: a table, summary.csv, summary.json and the page sweep.html.

Everything is read from the sweep's directory, so that a sweep that goes on, or that was killed, has
a summary, too.
"""

from __future__ import annotations

import csv
import json
import math
import pickle
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from rllib_gtpo.command.directory import RunDirectory
from rllib_gtpo.command.quiet import silence
from rllib_gtpo.command.sweep_callbacks import STOPPED_BY
from rllib_gtpo.command.tuning import Goal, show_settings, show_value, trial_number
from rllib_gtpo.errors import DataError
from rllib_gtpo.report.curves import ITERATION
from rllib_gtpo.report.source import read_results
from rllib_gtpo.report.sweep_page import write_page
from rllib_gtpo.report.terminal import open_console, plain, short

_PIPE_WIDTH = 200
_COLOUR_CODE = re.compile(r"\x1b\[[0-9;]*m")
DONE, STOPPED, FAILED = "done", "stopped early", "failed"


@dataclass(frozen=True)
class TrialSummary:
    """One trial.

    number: In order of creation, from 1.
    settings: What the sweep varied.
    status: "done" (a stop criterion was met), "stopped early" (by the scheduler), "failed",
        "interrupted", "not started".
    best, best_iteration, last: Of the metric; None if it was never reported.
    curve: Iteration and value of the metric.
    checkpoint, error: The last one, and what a failed trial died of.
    """

    number: int
    trial: str
    settings: dict[str, Any]
    status: str
    iterations: int
    best: float | None
    best_iteration: int | None
    last: float | None
    seconds: float
    path: str
    checkpoint: str | None
    error: str | None
    curve: list[tuple[int, float]] = field(repr=False)

    @property
    def complete(self) -> bool:
        """Whether it ended as it should."""
        return self.status in (DONE, STOPPED)


@dataclass(frozen=True)
class SweepSummary:
    """The trials, best first; those without the metric last."""

    name: str
    algorithm: str
    goal: Goal
    path: Path
    trials: list[TrialSummary]

    def show(self) -> None:
        """Prints the table, errors, and where the files are."""
        console = open_console()
        if not console.is_terminal:
            console.width = _PIPE_WIDTH  # rows stay rows
        console.print(self._table())
        for trial in self.trials:
            if trial.error is not None:
                line = f"trial {trial.number} ({show_settings(trial.settings)}): {trial.error}"
                console.print(Text(plain(line), style="red"), soft_wrap=True)
        best = next((t.checkpoint for t in self.trials if t.checkpoint), None)
        if best is not None:
            console.print(Text(f"best: {best}"), soft_wrap=True)
        console.print(Text(f"{self.path / 'sweep.html'}"), soft_wrap=True)

    def write(self) -> None:
        """Writes the files."""
        rows = [_row(trial) for trial in self.trials]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        with (self.path / "summary.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        tree = {"name": self.name, "algorithm": self.algorithm, **asdict(self.goal)}
        tree["trials"] = [asdict(trial) for trial in self.trials]
        text = json.dumps(tree, indent=1, default=str)
        (self.path / "summary.json").write_text(text + "\n")
        write_page(self.path / "sweep.html", self)

    def _table(self) -> Table:
        names = list(dict.fromkeys(name for trial in self.trials for name in trial.settings))
        title = f"{self.name}: {self.goal.metric} ({self.goal.mode})"
        table = Table(title=Text(plain(title)), box=SIMPLE_HEAD, title_justify="left")
        table.add_column("trial", justify="right")
        for name in names:
            table.add_column(Text(plain(name)))
        for name in ("status", "iter", "best", "at", "last", "seconds"):
            table.add_column(name, justify="left" if name == "status" else "right")
        for trial in self.trials:
            table.add_row(
                str(trial.number),
                *(Text(plain(show_value(trial.settings.get(name, "")))) for name in names),
                Text(trial.status, style="red" if trial.status == FAILED else ""),
                str(trial.iterations),
                *("-" if v is None else short(v) for v in (trial.best, trial.best_iteration)),
                "-" if trial.last is None else short(trial.last),
                f"{trial.seconds:.0f}",
            )
        return table


def is_sweep_directory(target: str) -> bool:
    """Whether `rllib report` is asked about a sweep as a whole."""
    try:
        return json.loads((Path(target) / "run.json").read_text())["kind"] == "sweep"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def summarise(path: Path) -> SweepSummary:
    """Reads a sweep's directory and writes the summary's files there.

    Raises:
        DataError: No trial has been made yet.
    """
    record = RunDirectory.open(path)[0].record
    goal = Goal(record.metric or "env_runners/episode_return_mean", record.mode)
    trials = [_trial(trial, goal) for trial in _trials(path.absolute())]
    sign = -1.0 if goal.mode == "max" else 1.0
    trials.sort(key=lambda t: (math.inf if t.best is None else sign * t.best, t.number))
    summary = SweepSummary(record.name, record.algorithm, goal, path.absolute(), trials)
    summary.write()
    return summary


def _trials(path: Path) -> list[Any]:
    from ray.tune import ExperimentAnalysis

    silence()
    try:
        return list(ExperimentAnalysis(str(path / "tune")).trials)
    except ValueError as error:
        raise DataError(f"{path} has no trials yet.") from error


def _trial(trial: Any, goal: Goal) -> TrialSummary:
    rows = read_results(Path(trial.path) / "result.json")
    curve = list(_curve(rows, goal.metric))
    best = None
    for point in curve:
        if best is None or goal.better(point[1], best[1]):
            best = point
    last = rows[-1] if rows else {}
    return TrialSummary(
        number=trial_number(trial),
        trial=trial.trial_id,
        settings=dict(trial.evaluated_params),
        status=_status(trial, bool(rows)),
        iterations=int(last.get(ITERATION, 0)),
        best=None if best is None else best[1],
        best_iteration=None if best is None else best[0],
        last=curve[-1][1] if curve else None,
        seconds=last.get("time_total_s", 0.0),
        path=trial.path,
        checkpoint=None if trial.checkpoint is None else trial.checkpoint.path,
        error=_cause(trial) if trial.status == "ERROR" else None,
        curve=curve,
    )


def _status(trial: Any, began: bool) -> str:
    if trial.status == "TERMINATED":
        return DONE if STOPPED_BY in trial.last_result else STOPPED
    if trial.status == "ERROR":
        return FAILED
    return "interrupted" if began else "not started"


def _curve(rows: list[dict[str, float]], metric: str) -> Iterator[tuple[int, float]]:
    for row in rows:
        if math.isfinite(row.get(metric, math.nan)):
            yield int(row[ITERATION]), row[metric]


def _cause(trial: Any) -> str | None:
    """What a trial died of, in one line."""
    text = trial.get_error()
    if text is None:
        return None
    try:
        cause = getattr(trial.get_pickled_error(), "cause", None)
    except (ImportError, AttributeError, EOFError, pickle.UnpicklingError):
        cause = None  # its class was only the trial's
    if isinstance(cause, Exception):
        line = f"{type(cause).__name__}: {cause}".splitlines()[0]
    else:
        line = _COLOUR_CODE.sub("", str(text)).strip().rpartition("\n")[2]
    return f"{line}  ({trial.path}/error.txt)"


def _row(trial: TrialSummary) -> dict[str, Any]:
    settings = {f"config/{name}": value for name, value in trial.settings.items()}
    rest = {k: v for k, v in asdict(trial).items() if k not in ("settings", "curve")}
    return {"number": rest.pop("number"), "trial": rest.pop("trial"), **settings, **rest}
