"""Task rows from wherever people keep them: a list, JSON lines, Parquet, Hugging Face, S3."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rllib_gtpo.columns import SPLITS, column_mapping
from rllib_gtpo.errors import DataError
from rllib_gtpo.types import Task

_FILES = (".jsonl", ".json", ".parquet")
_HUB_ID = re.compile(r"([^:\[\]]+)(?::([^\[\]]+))?")
_OWN_SPLIT = re.compile(r"(.+?)\[(.+)\]", re.DOTALL)

Rows = tuple[str, Iterable[Any]]  # what messages call the source, and its rows


class NoSuchSplit(DataError):
    """The source has no split of that name."""


def load_tasks(source: Any, split: str, columns: Any = None) -> list[Task]:
    """Reads the rows of a split.

    Args:
        source: A list of dicts (every split sees all of them), a dict from split to any source, a
            file (.jsonl, .json with a list, .parquet), a directory with one file per split
            ("train.jsonl"), an s3://bucket/key of a file, a directory written by `save_to_disk` or
            cloned from the hub, the id of a Hugging Face dataset ("name" or "name:config"), or a
            list of such texts, one after the other.  "name[split]" takes the rows of another split
            or of a part of one: "HuggingFaceH4/aime_2024[train]", "openai/gsm8k:main[train[:500]]".
        split: Usually "train", "validation" or "test".
        columns: Which columns become which fields; see `rllib_gtpo.columns`.  None: rows stay as
            they are.

    Raises:
        DataError: A row is unusable, or the source unreadable; the message names it.
    """
    tasks: list[Task] = []
    first_with: dict[Any, str] = {}
    for where, task in iter_tasks(source, split, columns):
        check_id(task, where, first_with)
        tasks.append(task)
    return tasks


def iter_tasks(source: Any, split: str, columns: Any = None) -> Iterator[tuple[str, Task]]:
    """Like `load_tasks`, one row at a time and with where it is; ids are not compared."""
    splits = source if isinstance(source, Mapping) else SPLITS
    mapping = column_mapping(columns, split, splits)
    for name, rows in _sources(source, split):
        number = 0
        for number, row in enumerate(rows, start=1):
            where = f"{name}, row {number}"
            if not isinstance(row, dict):
                raise DataError(f"{where}: expected an object, got {type(row).__name__}.")
            yield where, row if mapping is None else mapping(row, where)
        if not number:
            raise DataError(f"{name}: no rows.")


def check_id(task: Task, where: str, first_with: dict[Any, str]) -> None:
    """Refuses an id that another row has; `first_with` remembers them."""
    if "id" not in task:
        return
    other = first_with.setdefault(str(task["id"]), where)
    if other != where:
        raise DataError(
            f"{where}: id {task['id']!r} is taken by {_row_of(other, where)}; ids name a task, so "
            "make them unique or leave them out."
        )


def _row_of(other: str, where: str) -> str:
    """The other row, without the name of the source if it is the same."""
    name, comma, row = other.rpartition(", ")
    return row if where.startswith(name + comma) else other


def has_splits(source: Any) -> bool:
    """Whether splits may differ: a list of rows and a single file are the same for each."""
    if isinstance(source, Mapping):
        return True
    if not isinstance(source, str):
        return all(isinstance(part, str) and has_splits(part) for part in source)
    return not (source.startswith("s3://") or _own_split(source)[1] or Path(source).is_file())


def _sources(source: Any, split: str) -> Iterator[Rows]:
    if isinstance(source, Mapping):
        if split not in source:
            raise NoSuchSplit(f"tasks has no split {split!r}; it has {sorted(source)}.")
        yield from _sources(source[split], split)
    elif isinstance(source, str):
        yield _named(source, split)
    elif source and all(isinstance(part, str) for part in source):
        for part in source:
            yield _named(part, split)
    else:
        yield "tasks", source


def _named(source: str, split: str) -> Rows:
    if source.startswith("s3://"):
        return source, _s3_rows(source)
    name, own_split = _own_split(source)
    path = Path(name)
    if path.is_file() and own_split:
        raise DataError(f"{name}: a file has no splits: leave out [{own_split}].")
    if path.is_file():
        return name, _file_rows(path, name)
    split = own_split or split
    if path.is_dir():
        files = {file.stem: file for file in path.iterdir() if file.suffix in _FILES}
        if split in files:
            return str(files[split]), _file_rows(files[split], str(files[split]))
        if split.isidentifier() and not files.keys().isdisjoint(SPLITS):
            raise NoSuchSplit(_no_split(name, split, sorted(files)))
    elif path.suffix in _FILES or name.startswith((".", "/", "~")):
        raise DataError(f"{name}: no such file.")
    return f"{name} [{split}]", _dataset_rows(name, split)


def _own_split(source: str) -> tuple[str, str | None]:
    """What the source is called, and the split that it names itself, if it does."""
    match = None if Path(source).exists() else _OWN_SPLIT.fullmatch(source)
    return (source, None) if match is None else (match[1], match[2])


def _file_rows(path: Path, name: str) -> Iterable[Any]:
    """The rows of a file, which messages call `name`."""
    readers = {".jsonl": _json_lines, ".json": _json_list, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise DataError(f"{name}: unknown kind of file; use one of {', '.join(_FILES)}.")
    return readers[path.suffix](path, name)


def _parquet_rows(path: Path, name: str) -> Iterator[Any]:
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: not a readable Parquet file: {error}") from error


def _json_list(path: Path, name: str) -> Iterable[Any]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{name}: not JSON: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{name}: expected a list of objects; for one object a line use .jsonl.")
    return rows


def _json_lines(path: Path, name: str) -> Iterator[Any]:
    with path.open(encoding="utf-8", errors="strict") as lines:
        read = 0
        while True:
            try:
                line = next(lines, None)
                read += 1
                if line is None:
                    return
                row = json.loads(line) if line.strip() else None
            except UnicodeDecodeError as error:
                raise DataError(f"{name}, row {read + 1}: not UTF-8: {error}") from error
            except ValueError as error:
                raise DataError(f"{name}, row {read}: not JSON: {error}") from error
            if line.strip():
                yield row


def _s3_rows(address: str) -> Iterator[Any]:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, key = address.removeprefix("s3://").partition("/")
    if not bucket or Path(key).suffix not in _FILES:
        raise DataError(
            f"{address}: expected s3://bucket/key with a key ending in {', '.join(_FILES)}."
        )
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / f"rows{Path(key).suffix}"
        try:
            # A session of its own: boto3's default one keeps the credentials that it saw first.
            boto3.Session().client("s3").download_file(bucket, key, str(local))
        except (BotoCoreError, ClientError) as error:
            raise DataError(
                f"{address}: {error}. Check the address, and that credentials with the right to "
                "read it (s3:GetObject) reach the rollout workers (environment variables, an "
                "instance role, or ~/.aws)."
            ) from error
        yield from _file_rows(local, address)


def _dataset_rows(source: str, split: str) -> Iterator[Any]:
    import datasets

    try:
        if (Path(source) / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(source)
            if split not in splits:
                raise NoSuchSplit(_no_split(source, split, sorted(splits)))
            rows = splits[split]
        elif (Path(source) / "state.json").is_file():
            rows = datasets.load_from_disk(source)
        else:
            rows = _load(source, split)
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{source}: neither a file, nor a directory, nor a loadable Hugging Face dataset: "
            f"{error}"
        ) from error
    yield from rows


def _load(source: str, split: str) -> Any:
    """What `datasets` loads of the hub or of a directory."""
    import datasets

    match = None if Path(source).is_dir() else _HUB_ID.fullmatch(source)
    name, config = (source, None) if match is None else match.groups()
    try:
        return datasets.load_dataset(name, config, split=split)
    except ValueError as error:
        known = re.search(r"Unknown split.*Should be one of \[(.*)\]", str(error))
        if known is None:
            raise
        has = re.findall(r"['\"](.*?)['\"]", known[1])
        raise NoSuchSplit(_no_split(source, split, has)) from error


def _no_split(source: str, split: str, has: Sequence[str]) -> str:
    return (
        f"{source}: no split {split!r}; it has {list(has)}: write which rows to take, such as "
        f"'{source}[{has[0] if has else 'train'}]'."
    )
