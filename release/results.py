"""What every script here reports: a table, a JSON file, and an exit code; and tables in the docs,
which are written by the scripts so that they cannot drift from the results."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

Thresholds = dict[str, dict[str, float]]


class Report:
    """Rows of figures, checked against thresholds on each row.

    finish() returns 0, or 1 if a row misses a threshold.
    """

    def __init__(self, name: str, thresholds: Thresholds, seeds: list[int]) -> None:
        self.name, self.thresholds, self.seeds = name, thresholds, seeds
        self.rows: list[dict[str, Any]] = []
        self._columns: list[str] = []

    def add(self, row: dict[str, Any], show: dict[str, int] | None = None) -> None:
        """Adds a row and prints its cells, or the columns `show`: {column: width}."""
        cells = [column for column, value in row.items() if isinstance(value, (int, float))]
        columns = show or {column: max(8, len(column)) for column in cells}
        if list(columns) != self._columns:
            print("  ".join(f"{column:>{width}}" for column, width in columns.items()), flush=True)
        self._columns = list(columns)
        self.rows.append(row)
        cells = [f"{_short(row.get(column)):>{width}}" for column, width in columns.items()]
        print("  ".join(cells), flush=True)

    def misses(self) -> list[str]:
        """What is outside of its threshold.  A threshold applies to the rows that have its metric,
        and some row must have it."""
        found = []
        for metric, bounds in self.thresholds.items():
            values = [row[metric] for row in self.rows if metric in row]
            if not values:
                found.append(f"no row has {metric}, wanted {bounds}")
            for value in values:
                if not bounds.get("min", value) <= value <= bounds.get("max", value):
                    found.append(f"{metric} is {_short(value)}, wanted {bounds}")
        return found

    def finish(self, file: Path | None = None) -> int:
        """Prints the verdict and writes the file."""
        misses = self.misses()
        print("passed" if not misses else "\n".join(["FAILED", *misses]))
        if file is not None:
            result = {
                "name": self.name,
                "metrics": [],
                "thresholds": self.thresholds,
                "passed": not misses,
                "versions": _versions(),
                "cpus": os.cpu_count(),
                "seeds": self.seeds,
                "command": " ".join(["python", *sys.argv]),
            }
            rows = ",\n".join("  " + json.dumps(row) for row in self.rows)
            text = json.dumps(result, indent=1)
            file.write_text(text.replace('"metrics": []', f'"metrics": [\n{rows}\n ]', 1) + "\n")
        return 1 if misses else 0


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def renewed(text: str, tables: Mapping[str, str]) -> str:
    """`text` with each of the tables between its `<!-- table: NAME -->` and `<!-- end -->` written
    anew; those of other scripts stay."""
    for name, table in tables.items():
        marker = re.compile(rf"<!-- table: {re.escape(name)} -->\n.*?<!-- end -->", flags=re.DOTALL)
        if not marker.search(text):
            raise ValueError(f"the page has no place for the table {name!r}")
        block = f"<!-- table: {name} -->\n{table}\n<!-- end -->"
        text = marker.sub(lambda _, block=block: block, text)
    return text


def _short(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _versions() -> dict[str, str]:
    packages = ("rllib-gtpo", "ray", "torch", "transformers")
    return {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}}
