"""sweep.html: curves of all trials, what each setting did, and the table; no script, no network."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rllib_gtpo.command.tuning import show_settings
from rllib_gtpo.report.charts import COLOURS, heat_map, lines, show, strip
from rllib_gtpo.report.page import asset, source_hash

if TYPE_CHECKING:
    from rllib_gtpo.report.sweep import SweepSummary, TrialSummary

_MOST_VALUES = 12  # of a setting in a heat map


def write_page(path: Path, summary: SweepSummary) -> None:
    """Writes the page; it appears when it is complete."""
    style = asset("report.css") + b"\n" + asset("sweep.css")
    policy = f"default-src 'none'; img-src data:; style-src '{source_hash(style)}'"
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(summary.name)}</title>\n"
        '<link rel="icon" href="data:,">\n'
        f"<style>{style.decode()}</style>\n</head>\n<body>\n"
        f"{''.join(_body(summary))}\n</body>\n</html>\n"
    )
    partial = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    partial.write_text(page)
    os.replace(partial, path)


def _body(summary: SweepSummary) -> Iterator[str]:
    counts = Counter(trial.status for trial in summary.trials)
    states = ", ".join(f"{count} {status}" for status, count in counts.items())
    yield (
        f"<header><h1>{escape(summary.name)}</h1><div class='facts'>"
        f"<span>{escape(summary.algorithm)}</span>"
        f"<span><b>{escape(summary.goal.metric)}</b> ({summary.goal.mode})</span>"
        f"<span>{escape(states)}</span></div></header><main>"
    )
    measured = [t for t in summary.trials if t.best is not None]
    if measured:
        yield f"<h2>{escape(summary.goal.metric)} by iteration</h2><div class='charts'>"
        curves = [(_name(t), _colour(t), t.curve) for t in reversed(measured)]
        yield f"<div class='card wide'>{lines(curves, 'iteration')}</div></div>"
        yield from _settings(summary, measured)
    yield "<h2>Trials</h2><div class='scroll'>"
    yield from _table(summary)
    yield "</div></main>"


def _settings(summary: SweepSummary, measured: list[TrialSummary]) -> Iterator[str]:
    """What each varied setting did to the best value."""
    names = list(dict.fromkeys(name for trial in measured for name in trial.settings))
    values = {name: {_key(t.settings.get(name)) for t in measured} for name in names}
    names = [name for name in names if len(values[name]) > 1]
    if not names:
        return
    yield f"<h2>Best {escape(summary.goal.metric)} by setting</h2><div class='charts'>"
    if len(names) == 2 and all(len(values[name]) <= _MOST_VALUES for name in names):
        cells: dict[Any, list[float]] = {}
        for t in measured:
            where = (_key(t.settings.get(names[0])), _key(t.settings.get(names[1])))
            cells.setdefault(where, []).append(t.best or 0.0)
        if 2 * len(cells) > len(values[names[0]]) * len(values[names[1]]):  # a grid
            means = {where: sum(found) / len(found) for where, found in cells.items()}
            chart = heat_map(means, names[0], names[1], summary.goal.mode)
            yield f"<div class='card'><b>Means</b>{chart}</div>"
    for name in names:
        points = [
            (_key(t.settings.get(name)), t.best or 0.0, _colour(t), _name(t)) for t in measured
        ]
        yield f"<div class='card small'>{strip(points, name)}</div>"
    yield "</div>"


def _table(summary: SweepSummary) -> Iterator[str]:
    names = list(dict.fromkeys(name for trial in summary.trials for name in trial.settings))
    heads = ["", "trial", *names, "status", "iterations", "best", "at", "last", "seconds"]
    yield "<table><tr>" + "".join(f"<th>{escape(h)}</th>" for h in heads) + "</tr>"
    for t in summary.trials:
        swatch = f"<svg viewBox='0 0 12 12'><circle cx='6' cy='6' r='5' fill='{_colour(t)}'/></svg>"
        cells = [show(t.settings.get(name, "")) for name in names]
        rest = [
            t.iterations,
            *("-" if v is None else v for v in (t.best, t.best_iteration, t.last)),
        ]
        yield f"<tr><td>{swatch}</td><td>{t.number}</td>"
        yield "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        yield f"<td class='{escape(t.status)}'>{escape(t.status)}</td>"
        yield "".join(f"<td>{escape(show(cell))}</td>" for cell in rest)
        yield f"<td>{t.seconds:.0f}</td></tr>"
        if t.error is not None:
            yield f"<tr><td></td><td class='error' colspan='{len(heads) - 1}'>"
            yield f"{escape(t.error)}</td></tr>"
    yield "</table>"


def _name(trial: TrialSummary) -> str:
    return f"trial {trial.number}  {show_settings(trial.settings)}"


def _colour(trial: TrialSummary) -> str:
    return COLOURS[(trial.number - 1) % len(COLOURS)]


def _key(value: Any) -> Any:
    """The value of a setting, or its text if it cannot be looked up."""
    return value if isinstance(value, bool | int | float | str) else str(value)
