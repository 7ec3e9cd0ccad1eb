"""Charts as SVG text, for pages that have no script.  All text is escaped here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

COLOURS = (
    *("#1f6f8b", "#c45a1c", "#3f8f4f", "#8a4fbf", "#b8860b", "#c2407a", "#4a6fd4", "#6b7a2a"),
    *("#8c564b", "#5d6b75"),
)
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 680, 300, 58, 34, 12, 28
_SMALL = (330, 220)
_TICKS = 5

Point = tuple[float, float]


class Axes:
    """Maps values to places in a chart, and draws its frame.

    xs, ys: All values that are to be seen; logarithmic: whether x is.
    """

    def __init__(
        self,
        xs: Iterable[float],
        ys: Iterable[float],
        *,
        width: int = _WIDTH,
        height: int = _HEIGHT,
        logarithmic: bool = False,
    ) -> None:
        self._log = logarithmic
        self._x = _range(math.log10(x) if logarithmic else x for x in xs)
        self._y = _range(ys)
        self.width, self.height = width, height

    def x(self, value: float) -> float:
        """Where a value is from the left."""
        low, high = self._x
        part = ((math.log10(value) if self._log else value) - low) / (high - low)
        return _LEFT + part * (self.width - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Where a value is from the top."""
        low, high = self._y
        return self.height - _BOTTOM - (value - low) / (high - low) * (self.height - _BOTTOM - _TOP)

    def draw(
        self, inside: Iterable[str], label: str, names: Mapping[float, str] | None = None
    ) -> str:
        """The chart; `names` are the marks of the x axis, by their values."""
        marks = names or {t: show(t) for t in self._ticks(self._x, whole=not self._log)}
        parts = [
            _text(_LEFT - 8, self.y(t) + 4, show(t), "end")
            + _line((_LEFT, self.y(t)), (self.width - _RIGHT, self.y(t)), "grid")
            for t in self._ticks(self._y)
        ]
        floor = self.height - _BOTTOM
        for value, name in marks.items():
            x = self.x(10**value if self._log and names is None else value)
            shown = f"{10**value:.1e}" if self._log and names is None else name
            parts.append(_text(x, floor + 15, shown, "middle"))
        parts.append(_text((self.width + _LEFT) / 2, self.height - 4, label, "middle"))
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{escape(label)}">{"".join(parts)}{"".join(inside)}</svg>'
        )

    @staticmethod
    def _ticks(between: Point, whole: bool = False) -> list[float]:
        low, high = between
        ticks = [low + (high - low) * k / (_TICKS - 1) for k in range(_TICKS)]
        if whole and high - low >= _TICKS - 1:
            ticks = sorted({float(round(t)) for t in ticks})
        return ticks


def lines(curves: Sequence[tuple[str, str, Sequence[Point]]], label: str) -> str:
    """Curves of (name, colour, points); the name shows under the pointer."""
    points = [point for _, _, curve in curves for point in curve]
    axes = Axes((x for x, _ in points), (y for _, y in points))
    drawn = []
    for name, colour, curve in curves:
        places = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in curve)
        title = f"<title>{escape(name)}</title>"
        drawn.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="1.8" points="{places}">'
            f"{title}</polyline>"
        )
        drawn += [_dot(axes, point, colour, title, 2.4) for point in curve]
    return axes.draw(drawn, label)


def strip(values: Sequence[tuple[object, float, str, str]], label: str) -> str:
    """One dot for each (value of a setting, result, colour, name).

    Many different numbers make an axis, logarithmic where they span much; other values have places
    side by side, with the mean of their results as a bar.
    """
    kinds = sorted({v for v, *_ in values}, key=_order)
    numbers = [float(k) for k in kinds if isinstance(k, int | float) and not isinstance(k, bool)]
    continuous = len(numbers) == len(kinds) > 5
    ys = [y for _, y, *_ in values]
    if continuous:
        wide = min(numbers) > 0 and max(numbers) / min(numbers) >= 20
        axes = Axes(numbers, ys, width=_SMALL[0], height=_SMALL[1], logarithmic=wide)
        places = {kind: float(kind) for kind in kinds}  # type: ignore[arg-type]
    else:
        axes = Axes([-0.5, len(kinds) - 0.5], ys, width=_SMALL[0], height=_SMALL[1])
        places = {kind: float(number) for number, kind in enumerate(kinds)}
    drawn = []
    for kind in () if continuous else kinds:
        found = [y for v, y, *_ in values if v == kind]
        middle, mean = axes.x(places[kind]), axes.y(sum(found) / len(found))
        drawn.append(_line((middle - 16, mean), (middle + 16, mean), "mean"))
    for value, y, colour, name in values:
        drawn.append(_dot(axes, (places[value], y), colour, f"<title>{escape(name)}</title>", 4))
    names = None if continuous else {p: show(kind) for kind, p in places.items()}
    return axes.draw(drawn, label, names)


def heat_map(
    cells: Mapping[tuple[object, object], float], row_name: str, column_name: str, mode: str
) -> str:
    """A table of means by (row, column), the better the darker."""
    rows = sorted({row for row, _ in cells}, key=_order)
    columns = sorted({column for _, column in cells}, key=_order)
    low, high = min(cells.values()), max(cells.values())
    head = "".join(f"<th>{escape(show(column))}</th>" for column in columns)
    corner = f"<th class='text'>{escape(row_name)} \\ {escape(column_name)}</th>"
    body = []
    for row in rows:
        body.append(f"<tr><th class='text'>{escape(show(row))}</th>")
        for column in columns:
            value = cells.get((row, column))
            if value is None:
                body.append("<td></td>")
                continue
            part = (value - low) / (high - low) if high > low else 0.5
            shade = round(9 * (part if mode == "max" else 1 - part))
            body.append(f'<td class="heat{shade}">{show(value)}</td>')
        body.append("</tr>")
    return f"<table class='heat'><tr>{corner}{head}</tr>{''.join(body)}</table>"


def show(value: object) -> str:
    """A number short, anything else as it is."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def _order(value: object) -> tuple[int, float, str]:
    number = isinstance(value, int | float)
    return (0, float(value), "") if number else (1, 0.0, str(value))  # type: ignore[arg-type]


def _range(values: Iterable[float]) -> Point:
    listed = list(values)
    low, high = min(listed), max(listed)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(start: Point, end: Point, kind: str) -> str:
    (x1, y1), (x2, y2) = start, end
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _dot(axes: Axes, point: Point, colour: str, title: str, radius: float) -> str:
    x, y = axes.x(point[0]), axes.y(point[1])
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}">{title}</circle>'
