"""Rows in which something else stands in the place of each value in turn."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

JUNK: tuple[Any, ...] = (None, True, 5, "", "x", "{", [], [5], ["x"], [[]], {}, {"x": 1})


def with_junk(row: Any) -> Iterator[Any]:
    """Copies of a row with one value replaced, for every value and everything in JUNK."""
    for path in _paths(row, ()):
        for junk in JUNK:
            changed = copy.deepcopy({"row": row})
            holder: Any = changed
            for key in ("row", *path)[:-1]:
                holder = holder[key]
            holder[("row", *path)[-1]] = junk
            yield changed["row"]


def _paths(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, (dict, list)):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _paths(child, (*path, key))
