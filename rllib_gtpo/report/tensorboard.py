"""TensorBoard events of a run: metrics under their own names, and what its record shows.

From the record (a share of the groups, see docs/record.md) come histograms of the advantages by
turn, two transcripts an iteration, and how far the other estimators agree on the same turns.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rllib_gtpo.errors import GTPOError
from rllib_gtpo.ops.diagnostics import BY_TURN
from rllib_gtpo.record import IterationFile, groups_of_rows, record_files
from rllib_gtpo.record.location import Location
from rllib_gtpo.record.schema import SHOWN_COLUMNS
from rllib_gtpo.report.comparison import compare_estimators
from rllib_gtpo.report.transcript import sampled_transcripts

HISTOGRAM = "advantage_histogram/turn_{}"
CORRELATION = "estimators/correlation/{}"
COMPARED = 32  # trajectories of an iteration, at most
_BINS = 40
_NARROWEST = 1e-3  # a histogram, all in all

_LAYOUT: dict[str, dict[str, list[str]]] = {
    "Learning": {
        "accuracy": [r"accuracy$", r"evaluation/accuracy$"],
        "held out, with interval": [r"evaluation/avg@\d+$"],
        "reward by component": [r"reward/"],
        "return of an episode": [r"(evaluation/)?env_runners/episode_return_mean$"],
    },
    "Credit": {
        "advantage by turn": [r"advantage/by_turn/"],
        "groups": [r"group/(signal|zero_std|solved|failed)_frac$"],
        "what advantages follow": [r"advantage/\w+_corr$"],
        "other estimators: correlation of advantages": [r"estimators/correlation/"],
        "turns that teach nothing": [r"advantage/dead_frac$"],
    },
    "Rollouts": {
        "turns": [r"turn/per_trajectory$"],
        "tools": [r"tool/(error|invalid|timeout)_rate$"],
        "why trajectories end": [r"stop/"],
        "tokens of a trajectory": [r"trajectory/tokens$"],
    },
    "Update": {
        "entropy": [r"policy/entropy$"],
        "sampler and learner: KL": [r"mismatch/kl$"],
        "clipped tokens": [r"clip/"],
        "gradient norm": [r"grad/norm$"],
    },
    "Speed": {
        "tokens a second": [r"tokens/(sampled_)?per_s$"],
        "seconds": [r"time/(rollout|update|sync)_s$", r"time_this_iter_s$"],
    },
}


class TensorBoardLog:
    """The events of one run.

    The record is read beside the training, an iteration later than it is written; `close` takes
    what is left.  A record that cannot be read is reported once.

    Args:
        directory: Where the events go.
        home: The run's directory, in which its record is or is named.
        last_iteration: Where a resumed run stands; later events are taken back.
    """

    def __init__(self, directory: Path, home: Location, last_iteration: int = 0) -> None:
        self._directory, self._home = directory, home
        self._resumed = self._shown = last_iteration
        self._names: set[str] = set()
        self._charts: list[str] = []
        self._writer: Any = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tensorboard")
        self._pending: Future[None] | None = None
        self._warned = False

    def write(self, metrics: Mapping[str, float], step: int) -> None:
        """One iteration's metrics, under their names."""
        found = {name: value for name, value in metrics.items() if math.isfinite(value)}
        try:
            self._write(found, step)
        except OSError:
            self._writer = None  # it never writes again; its successor has a file of its own
            raise
        if self._pending is None or self._pending.done():
            self._pending = self._thread.submit(self._show_record)

    def close(self) -> None:
        """Shows what has been recorded since, and flushes."""
        if self._writer is not None:
            self._thread.submit(self._show_record).result()
            self._writer.close()
            self._writer = None
        self._thread.shutdown()

    def _write(self, metrics: Mapping[str, float], step: int) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(
                str(self._directory), purge_step=step if self._resumed else None
            )
        self._arrange(metrics)
        self._add([_scalars(metrics)], step)
        self._writer.flush()

    def _add(self, summaries: Sequence[Any], step: int) -> None:
        """As one event: one for each would take several times as long."""
        merged = _scalars({})
        for summary in summaries:
            merged.MergeFrom(summary)
        self._writer.file_writer.add_summary(merged, step)

    def _arrange(self, metrics: Mapping[str, float]) -> None:
        """Writes the layout of the tab Custom Scalars again when there is more to show."""
        if metrics.keys() <= self._names:
            return
        self._names |= metrics.keys()
        layout, charts = arrange([*self._names, CORRELATION.format("any")])
        if len(charts) > len(self._charts):
            self._charts = charts
            self._writer.add_custom_scalars(layout)

    def _show_record(self) -> None:
        try:
            problems: list[str] = []
            for file in record_files(self._home, problems, first=self._shown + 1):
                self._shown = file.iteration  # whatever comes of it
                self._add(list(record_summaries(file)), file.iteration)
            self._writer.flush()
        except (OSError, ValueError, KeyError, pa.ArrowException, GTPOError) as error:
            if not self._warned:
                print(f"warning: TensorBoard shows no record: {error}", file=sys.stderr)
            self._warned = True


def arrange(names: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The charts that there are metrics for, as SummaryWriter takes them; and their names."""
    layout: dict[str, Any] = {}
    for category, charts in _LAYOUT.items():
        for title, patterns in charts.items():
            matching = [n for n in names if any(re.match(p, n) for p in patterns)]
            if not matching:
                continue
            interval = [f"{matching[0]}{end}" for end in ("", "_low", "_high")]
            kind = "Margin" if set(interval) <= set(names) else "Multiline"
            tags = interval if kind == "Margin" else patterns
            layout.setdefault(category, {})[title] = [kind, tags]
    return layout, [title for charts in layout.values() for title in charts]


def record_summaries(file: IterationFile) -> Iterator[Any]:
    """What one iteration's record shows, as summaries of TensorBoard."""
    from torch.utils.tensorboard.summary import histogram, text

    table = file.read(SHOWN_COLUMNS)
    for name, values in advantages_by_turn(table).items():
        yield histogram(HISTOGRAM.format(name), values, _edges(values))
    rows = table.slice(0, COMPARED).to_pylist()
    found = estimator_correlations(rows, file.about)
    yield _scalars({CORRELATION.format(name): value for name, value in found.items()})
    for name, shown in sampled_transcripts(rows).items():
        yield text(name, shown)


def _scalars(metrics: Mapping[str, float]) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary(value=[Summary.Value(tag=n, simple_value=v) for n, v in metrics.items()])


def _edges(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Of bins that are not narrower than what advantages are worth telling apart by."""
    middle, span = (values.max() + values.min()) / 2, values.max() - values.min()
    half = max(span, _NARROWEST) / 2
    return np.linspace(middle - half, middle + half, _BINS + 1)


def advantages_by_turn(table: pa.Table) -> dict[str, np.ndarray[Any, Any]]:
    """The advantages of trained turns by their index; the late ones are "rest"."""
    turns = pc.list_flatten(table["turns"].combine_chunks())
    advantages = pc.struct_field(turns, "advantage").to_numpy(zero_copy_only=False)
    index = np.minimum(pc.struct_field(turns, "index").to_numpy(), BY_TURN)
    finite = np.isfinite(advantages)
    parts = {
        "rest" if k == BY_TURN else str(k): advantages[finite & (index == k)]
        for k in range(BY_TURN + 1)
    }
    return {name: values for name, values in parts.items() if len(values)}


def estimator_correlations(
    rows: Sequence[dict[str, Any]], about: Mapping[str, Any]
) -> dict[str, float]:
    """Pearson's, of each estimator's advantages with those that were used, turn by turn.

    Estimators whose advantages do not vary, or are not known, are left out.
    """
    groups = groups_of_rows(rows)
    used_by = {(row["group_id"], row["member"]): row["turns"] for row in rows}
    used = [
        turn["advantage"]
        for group in groups
        for t in group.trajectories
        for turn in used_by[t.group_id, t.member]
    ]
    found = {}
    for name, values in compare_estimators(groups, about).items():
        pairs = [(u, v) for u, v in zip(used, values, strict=True) if None not in (u, v)]
        one, other = np.array(pairs, dtype=float).reshape(-1, 2).T
        if len(pairs) > 1 and one.std() > 1e-9 and other.std() > 1e-9:
            found[name] = float(np.corrcoef(one, other)[0, 1])
    return found
