"""What every script here reports: a table, a JSON file, and an exit code."""

from __future__ import annotations

import json
import os
import platform
import sys
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

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row and prints it."""
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float))}
        if not self.rows:
            print("  ".join(f"{k:>{max(8, len(k))}}" for k in numbers), flush=True)
        self.rows.append(row)
        print("  ".join(f"{_short(v):>{max(8, len(k))}}" for k, v in numbers.items()), flush=True)

    def misses(self) -> list[str]:
        """What is outside of its threshold."""
        found = []
        for row in self.rows:
            for metric, bounds in self.thresholds.items():
                value = row[metric]
                if value < bounds.get("min", value) or value > bounds.get("max", value):
                    found.append(f"{metric} is {_short(value)}, wanted {bounds}")
        return found

    def finish(self, file: Path | None = None) -> int:
        """Prints the verdict and writes the file."""
        misses = self.misses()
        print("passed" if not misses else "\n".join(["FAILED", *misses]))
        if file is not None:
            result = {
                "name": self.name,
                "metrics": self.rows,
                "thresholds": self.thresholds,
                "passed": not misses,
                "versions": _versions(),
                "cpus": os.cpu_count(),
                "seeds": self.seeds,
                "command": " ".join(["python", *sys.argv]),
            }
            file.write_text(json.dumps(result, indent=1) + "\n")
        return 1 if misses else 0


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _versions() -> dict[str, str]:
    packages = ("rllib-gtpo", "ray", "torch", "transformers")
    return {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}}
