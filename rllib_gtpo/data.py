"""Task rows from wherever people keep them: a list, JSON lines, Parquet, Hugging Face, S3."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rllib_gtpo.errors import DataError
from rllib_gtpo.types import Task

_FILES = (".jsonl", ".json", ".parquet")


def load_tasks(source: str | Sequence[Task] | dict[str, Any], split: str) -> list[Task]:
    """Reads the rows of a split.

    source: a list of dicts (every split sees all of them), a dict from split to any source, a file
        (.jsonl, .json with a list, .parquet), a directory with one file per split
        ("train.jsonl"), an s3://bucket/key of a file, a directory written by `save_to_disk`, or the
        id of a Hugging Face dataset ("name" or "name:config").

    Every error names the file and the row.
    """
    if isinstance(source, dict):
        if split not in source:
            raise DataError(f"tasks has no split {split!r}; it has {sorted(source)}.")
        return load_tasks(source[split], split)
    if not isinstance(source, str):
        return check_rows(source, "tasks")
    if source.startswith("s3://"):
        return _from_s3(source, split)
    path = Path(source)
    if path.is_file():
        return _from_file(path)
    if path.is_dir():
        for suffix in _FILES:
            if (path / f"{split}{suffix}").is_file():
                return _from_file(path / f"{split}{suffix}")
    elif path.suffix in _FILES or source.startswith((".", "/", "~")):
        raise DataError(f"{source}: no such file.")
    return _from_datasets(source, split)


def check_rows(rows: Iterable[Any], where: str) -> list[Task]:
    """Checks that rows are dicts, that there are some, and that ids do not repeat."""
    checked: list[Task] = []
    first_with: dict[Any, int] = {}
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{where}, row {number}: expected an object, got {type(row).__name__}.")
        if "id" in row:
            other = first_with.setdefault(row["id"], number)
            if other != number:
                raise DataError(
                    f"{where}, row {number}: id {row['id']!r} is taken by row {other}; ids name "
                    "a task, "
                    "so make them unique or leave them out."
                )
        checked.append(row)
    if not checked:
        raise DataError(f"{where}: no rows.")
    return checked


def _from_file(path: Path) -> list[Task]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        try:
            return check_rows(pq.read_table(path).to_pylist(), str(path))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not a readable Parquet file: {error}") from error
    if path.suffix == ".json":
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: not JSON: {error}") from error
        if not isinstance(rows, list):
            raise DataError(
                f"{path}: expected a list of objects; for one object a line use .jsonl."
            )
        return check_rows(rows, str(path))
    if path.suffix != ".jsonl":
        raise DataError(f"{path}: unknown kind of file; use one of {', '.join(_FILES)}.")
    return check_rows(_lines(path), str(path))


def _lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8", errors="strict") as lines:
        read = 0
        try:
            for line in lines:
                read += 1
                if line.strip():
                    yield json.loads(line)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, row {read + 1}: not UTF-8: {error}") from error
        except ValueError as error:
            raise DataError(f"{path}, row {read}: not JSON: {error}") from error


def _from_s3(address: str, split: str) -> list[Task]:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, key = address.removeprefix("s3://").partition("/")
    if not bucket or Path(key).suffix not in _FILES:
        raise DataError(
            f"{address}: expected s3://bucket/key with a key ending in {', '.join(_FILES)}."
        )
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / Path(key).name
        try:
            boto3.client("s3").download_file(bucket, key, str(local))
        except (BotoCoreError, ClientError) as error:
            raise DataError(
                f"{address}: {error}. Check the address, and that credentials reach the rollout "
                "workers "
                "(environment variables, an instance role, or ~/.aws)."
            ) from error
        return _from_file(local)


def _from_datasets(source: str, split: str) -> list[Task]:
    import datasets

    try:
        if Path(source).is_dir():
            loaded = datasets.load_from_disk(source)
            rows = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            name, _, config = source.partition(":")
            rows = datasets.load_dataset(name, config or None, split=split)
    except KeyError as error:
        raise DataError(f"{source}: no split {split!r}; it has {sorted(loaded)}.") from error
    except Exception as error:
        raise DataError(
            f"{source}: neither a file, nor a directory, nor a loadable Hugging Face dataset: "
            f"{error}"
        ) from error
    return check_rows(rows, f"{source} [{split}]")
