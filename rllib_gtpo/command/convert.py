"""`rllib convert`: traces of other programs as a trajectory file, row by row."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rllib_gtpo.chat import call_format
from rllib_gtpo.encodable import encodable
from rllib_gtpo.errors import DataError
from rllib_gtpo.trace_formats import FORMATS, failure
from rllib_gtpo.traces import UnusableRow, to_demonstration

_SHOWN = 5  # rows that are named for each reason


@dataclass
class Conversion:
    """What became of the rows (numbered from 1): written, or left out for a reason."""

    written: int = 0
    left_out: dict[str, list[int]] = field(default_factory=dict)

    def __str__(self) -> str:
        total = sum(map(len, self.left_out.values()))
        lines = [f"converted {self.written} of {self.written + total} rows"]
        for reason, rows in sorted(self.left_out.items(), key=lambda item: -len(item[1])):
            named = ", ".join(map(str, rows[:_SHOWN])) + (", ..." if len(rows) > _SHOWN else "")
            which = "row" if len(rows) == 1 else "rows"
            lines.append(f"left out {len(rows)}: {reason.rstrip('.')} ({which} {named})")
        return "\n".join(lines)


def convert(source: Path, target: Path, kind: str, *, keep_failed: bool = False) -> Conversion:
    """Converts a file; `target` appears when all rows are through.

    Rows of .jsonl and .parquet files are read one after the other, a .json file as a whole.
    """
    if not source.is_file():
        raise DataError(f"{source}: no such file.")
    if target.exists():
        raise DataError(f"{target} exists: remove it, or name another file.")
    result = Conversion()
    unfinished = target.with_name(target.name + ".part")
    try:
        with unfinished.open("w", encoding="utf-8") as out:
            for number, row in _rows(source):
                try:
                    out.write(_line(row, kind, keep_failed))
                    result.written += 1
                except UnusableRow as error:
                    result.left_out.setdefault(error.reason, []).append(number)
        if not result.written:
            raise DataError(f"{source}: nothing to write to {target}: {result}")
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
    return result


def _line(row: Any, kind: str, keep_failed: bool) -> str:
    if isinstance(row, ValueError):
        raise UnusableRow("not JSON")
    reason = failure(row)
    if reason and not keep_failed:
        raise UnusableRow(f"failed ({reason}); --keep-failed keeps such rows")
    try:
        converted = FORMATS[kind](row)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UnusableRow(f"not as {kind} writes it ({error!r})") from error
    to_demonstration(converted, call_format("hermes"))  # so that a cold start can read it
    return encodable(json.dumps(converted, ensure_ascii=False)) + "\n"


def _rows(source: Path) -> Iterator[tuple[int, Any]]:
    """Numbered rows; one that is not JSON is its ValueError."""
    if source.suffix == ".parquet":
        import pyarrow.parquet as pq

        batches = pq.ParquetFile(source).iter_batches(batch_size=16)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    elif source.suffix == ".json":
        try:
            value = json.loads(source.read_bytes())
        except ValueError as error:
            hint = "for one object a line use the ending .jsonl"
            raise DataError(f"{source}: not JSON: {error}; {hint}.") from error
        events = isinstance(value, list) and value and not _is_row(value[0])
        yield from enumerate(value if isinstance(value, list) and not events else [value], start=1)
    else:
        with source.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except ValueError as error:
                        yield number, error


def _is_row(item: Any) -> bool:
    """Whether an item of a .json list is a row of its own, and not an event of one conversation."""
    return not (
        isinstance(item, dict) and any(k in item for k in ("action", "observation", "kind"))
    )
