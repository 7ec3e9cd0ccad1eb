"""The report's main things in a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = "_.-=+*#@"
_TOP = 10
_COLUMNS = ("iter", "group", "task", "solved", "reward", "signal", "dead", "invalid")


class PipeConsole(Console):
    """Leaves a closed pipe to the command, which has an exit code for it."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def open_console(**options: Any) -> PipeConsole:
    """A console on standard output."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows ASCII only
    return PipeConsole(file=sys.stdout, **options)


def print_overview(overview: dict[str, Any], group: dict[str, Any] | None) -> None:
    """Prints curves, the groups with most signal, and one of them turn by turn."""
    console = open_console()
    settings = "  ".join(f"{name} {value}" for name, value in overview["settings"].items())
    console.print(Panel(Text(plain(settings)), title=Text(plain(overview["name"])), expand=False))
    for note in overview["notes"]:
        console.print(Text(f"note: {plain(note)}", style="yellow"))
    console.print(_curves(overview["curves"], ascii_only=console.options.ascii_only))
    if overview["groups"]:
        console.print(_groups(overview["groups"]))
    if group is not None:
        _print_group(console, group)


def _curves(curves: Sequence[dict[str, Any]], ascii_only: bool) -> Table:
    table = Table(title="Curves", box=SIMPLE_HEAD)
    for name in ("", "first", "last", "course"):
        table.add_column(name, justify="left" if name in ("", "course") else "right")
    for curve in curves:
        values = [point[1] for point in curve["points"]]
        line = _spark(values, _ASCII_BARS if ascii_only else _BARS)
        table.add_row(curve["title"], short(values[0]), short(values[-1]), line)
    return table


def _groups(groups: Sequence[dict[str, Any]]) -> Table:
    best = sorted(groups, key=lambda group: -group["signal"])[:_TOP]
    title = f"Groups with most signal ({len(best)} of {len(groups):,})"
    table = Table(title=title, box=SIMPLE_HEAD)
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "task" else "right", no_wrap=True)
    for group in best:
        table.add_row(
            str(group["iteration"]),
            str(group["id"]),
            Text(plain(group["task"])[:24]),
            f"{group['solved']:.0%}",
            short(group["reward"]),
            short(group["signal"]),
            f"{group['dead']:.0%}",
            str(group["invalid"]),
        )
    return table


def _print_group(console: Console, group: dict[str, Any]) -> None:
    table = Table(
        title=Text(f"Iteration {group['iteration']}, group {group['id']}: {plain(group['task'])}"),
        caption="advantage of each turn; ! invalid call, s shaped",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    turns = max((len(t["turns"]) for t in group["trajectories"]), default=0)
    for name in ("member", "reward", *map(str, range(turns))):
        table.add_column(name, justify="right", no_wrap=True)
    for t in group["trajectories"]:
        cells = [_advantage(turn) for turn in t["turns"]]
        mark = Text(f"{t['member']} {'right' if t['correct'] else 'wrong'}")
        table.add_row(mark, short(t["reward"]), *cells)
    console.print(table)


def _advantage(turn: dict[str, Any]) -> Text:
    value = turn["advantage"]
    if value is None:
        return Text("none", style="dim")
    text = f"{value:+.1f}" + "!" * turn["invalid"] + "s" * bool(turn["rewards"].get("shaping"))
    return Text(text, style="green" if value > 0 else "red" if value < 0 else "dim")


def _spark(values: Sequence[float], bars: str, width: int = 32) -> str:
    step = max(1, -(-len(values) // width))
    parts = [values[start : start + step] for start in range(0, len(values), step)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(bars[min(len(bars) - 1, int((v - low) / span * len(bars)))] for v in means)


def short(value: float) -> str:
    """With three digits."""
    return f"{value:.3g}"


def plain(text: object) -> str:
    """Without what would move the cursor, or worse: models write anything."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in str(text))
