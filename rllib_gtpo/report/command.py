"""Builds and prints reports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rllib_gtpo.errors import ConfigError
from rllib_gtpo.report.curves import group_values, learning_curves
from rllib_gtpo.report.groups import Budget, shown_groups, summary
from rllib_gtpo.report.page import Page
from rllib_gtpo.report.source import Source, open_source
from rllib_gtpo.report.terminal import print_overview

FILE_NAME = "report.html"


def build_report(target: str, out: Path | None = None) -> str:
    """Writes the HTML report of a run, a checkpoint or a record.

    Args:
        target: A directory, or an address such as s3://bucket/records/run.
        out: The file; None: report.html in the run's directory.

    Returns:
        What was done, in one line.

    Raises:
        ConfigError: `target` is nothing to report, or `out` cannot be written.
        DataError: It is, and there is nothing in it yet.
    """
    source = open_source(target)
    path = out or _default_path(target)
    try:
        with Page(path) as page:
            overview = _overview(source)
            for group in _groups(source, overview):
                chunk, place = page.add(group)
                overview["groups"].append({**summary(group), "chunk": chunk, "place": place})
            page.finish(overview)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error}. Name another file with --out."
        ) from error
    size = path.stat().st_size / 1e6
    count = sum(group["size"] for group in overview["groups"])
    return f"{path} ({size:.1f} MB, {count:,} trajectories in {len(overview['groups']):,} groups)"


def print_report(target: str) -> None:
    """Prints the main things; arguments and errors as those of `build_report`."""
    source = open_source(target)
    overview = _overview(source)
    best, most = None, -1.0
    for group in _groups(source, overview):
        line = summary(group)
        if line["signal"] > most:
            best, most = group, line["signal"]
        overview["groups"].append(line)
    print_overview(overview, best)


def _default_path(target: str) -> Path:
    if "://" in target:
        return Path(FILE_NAME)
    path = Path(target)
    return (path.absolute().parent if path.name.startswith("checkpoint_") else path) / FILE_NAME


def _overview(source: Source) -> dict[str, Any]:
    about = source.about
    settings = {
        name: about[name]
        for name in ("algorithm", "estimator", "gamma", "estimator_options", "shaping", "overlong")
        if name in about
    }
    settings = {"algorithm": source.facts.get("algorithm"), **settings}
    return {
        "name": source.name,
        "settings": {name: value for name, value in settings.items() if value not in (None, {})},
        "status": source.facts.get("status"),
        "held_out": source.facts.get("held_out_accuracy"),
        "notes": list(source.notes),
        "estimator": about.get("estimator"),
        "shaping": {key: about.get(key) for key in ("shaping", "shaping_alpha", "shaping_input")},
        "objective": about.get("objective", {}),
        "groups": [],
        "curves": learning_curves(source.results, {}),
    }


def _groups(source: Source, overview: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All groups that are shown; at the end, curves and notes know of them."""
    budget = Budget(len(source.files), sum(file.trajectories for file in source.files))
    by_iteration: dict[int, tuple[int, list[dict[str, float]]]] = {}
    for index, file in enumerate(source.files):
        values: list[dict[str, float]] = []
        for group in shown_groups(file, index, budget):
            values.append(group_values(group))
            yield group
        by_iteration[file.iteration] = (int(file.about.get("sampled_groups", 0)), values)
    overview["curves"] = learning_curves(source.results, by_iteration)
    overview["notes"] += budget.notes()
