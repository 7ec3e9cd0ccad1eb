"""Results and comparisons in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rllib_gtpo.evaluations.comparison import Comparison
from rllib_gtpo.evaluations.results import Results, summarise
from rllib_gtpo.report.terminal import plain

_MEANS = {
    "reward": "reward",
    "turn/per_trajectory": "turns",
    "tokens/per_trajectory": "sampled tokens",
}
_RATES = {"tool/error_rate": "tool errors per call", "tool/invalid_rate": "invalid calls per turn"}
_CHANGED = 10


def print_results(console: Console, results: Results) -> None:
    """A table for each split."""
    about, settings = results.about, results.about.get("settings", {})
    for split in results.splits:
        rows = results.of(split)
        numbers = summarise(rows)
        tasks = "1 task" if len(rows) == 1 else f"{len(rows)} tasks"
        samples = "1 sample" if results.samples == 1 else f"{results.samples} samples"
        console.print(
            Text(
                f"{plain(about.get('source'))} on {plain(split)}: {tasks}, {samples} each, "
                f"temperature {settings.get('temperature')}"
            ),
            soft_wrap=True,
        )
        table = Table(box=SIMPLE_HEAD)
        _columns(table, "", "mean", "95% interval")
        for name in numbers:
            if "@" in name and not name.endswith(("_low", "_high")):
                table.add_row(name, f"{numbers[name]:.3f}", _interval(numbers, name, 3))
        for name, title in _MEANS.items():
            table.add_row(title, f"{numbers[name]:.2f}", _interval(numbers, name, 2))
        for name, title in _RATES.items():
            table.add_row(title, f"{numbers[name]:.3f}", "")
        console.print(table)
        reasons = {k.removeprefix("stop/"): v for k, v in numbers.items() if k.startswith("stop/")}
        ended = sorted(reasons.items(), key=lambda item: -item[1])
        console.print(
            Text("ended by: " + ", ".join(f"{plain(name)} {share:.1%}" for name, share in ended)),
            soft_wrap=True,
        )


def print_episodes(console: Console, source: str, numbers: Mapping[str, float]) -> None:
    """What RLlib's own evaluation says."""
    console.print(
        Text(f"{plain(source)}: {numbers.get('num_episodes', 0):.0f} episodes"), soft_wrap=True
    )
    table = Table(box=SIMPLE_HEAD)
    _columns(table, "", "value")
    for name, value in numbers.items():
        if name.startswith("episode_"):
            table.add_row(plain(name.removeprefix("episode_").replace("_", " ")), f"{value:.2f}")
    console.print(table)


def print_comparison(
    console: Console, comparison: Comparison, ours: Results, theirs: Results
) -> None:
    """The difference, and the tasks that changed most."""
    c = comparison
    names = [plain(results.about.get("source")) for results in (ours, theirs)]
    console.print(
        Text(
            f"\nA = {names[0]}\nB = {names[1]}\n"
            f"{c.metric} on {plain(c.split)}, {c.tasks} tasks: A {c.ours:.3f}, B {c.theirs:.3f}, "
            f"A - B {c.difference}, p {_p(c.p)}\n"
            f"A is better on {c.better} tasks, worse on {c.worse}, equal on {c.equal}"
        ),
        soft_wrap=True,
    )
    if not c.changed:
        return
    shown = c.changed[:_CHANGED]
    console.print(Text(f"tasks that changed most ({len(shown)} of {len(c.changed)}):"))
    table = Table(box=SIMPLE_HEAD)
    _columns(table, "task", "A", "B")
    table.add_column("prompt", no_wrap=True, overflow="ellipsis")
    for change in shown:
        cells = [f"{value:.2f}" for value in (change.ours, change.theirs)]
        prompt = plain(change.prompt.replace("\n", " "))
        table.add_row(Text(plain(change.task_id)[:24]), *cells, Text(prompt))
    console.print(table)


def numbers_of(results: Results) -> dict[str, Any]:
    """The numbers of each split."""
    return {**results.about, "numbers": {s: summarise(results.of(s)) for s in results.splits}}


def _columns(table: Table, first: str, *names: str) -> None:
    table.add_column(first)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)


def _interval(numbers: Mapping[str, float], name: str, digits: int) -> str:
    low, high = numbers[f"{name}_low"], numbers[f"{name}_high"]
    return f"{low:.{digits}f} to {high:.{digits}f}"


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"
