"""Tool traces of other programs as rows of a trajectory file; see rllib_gtpo.traces.

A row that cannot be converted raises UnusableRow; nothing is mended by guessing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rllib_gtpo.trace_formats.openhands import from_openhands
from rllib_gtpo.trace_formats.sharegpt import from_sharegpt

FORMATS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "openhands": from_openhands,
    "sharegpt": from_sharegpt,
}


def failure(row: Any) -> str | None:
    """Why a trace counts as failed, if it says so."""
    if not isinstance(row, dict):
        return None
    if row.get("error"):
        return "has an error"
    result = row.get("test_result")
    inner = result.get("report") if isinstance(result, dict) else None
    for place in (row, row.get("report"), result, inner):
        for key in ("resolved", "success", "correct"):
            verdict = place.get(key) if isinstance(place, dict) else None
            if verdict is not None and verdict in (False, "false", "False"):
                return f"{key} is false"
    return None
