"""Any setting as values that YAML has, for people to read."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping, Set
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

from rllib_gtpo.command.search_spaces import as_yaml, is_space

_LONGEST = 120


def plain(value: Any, file: Path | None = None) -> Any:
    """Classes and functions by their names, search spaces as YAML writes them, other objects in a
    line.

    Args:
        value: What to show.
        file: The experiment's file, by whose name what it defines is called.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Enum):
        return plain(value.value, file)
    if is_space(value):
        return {key: plain(item, file) for key, item in as_yaml(value).items()}
    if isinstance(value, Mapping):
        return {_key(key): plain(item, file) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, file) for item in value]
    if isinstance(value, Set):
        return sorted((plain(item, file) for item in value), key=str)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, type) or inspect.isroutine(value):
        return _name(value, file)
    if dataclasses.is_dataclass(value):
        own = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {name: plain(item, file) for name, item in own}
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return plain(value.item(), file)  # a scalar of numpy or torch
    text = re.sub(r" at 0x[0-9a-f]+", "", " ".join(repr(value).split()))
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def _key(key: Any) -> Any:
    return key if isinstance(key, str | int) else str(key)


def _name(value: Any, file: Path | None) -> str:
    module, name = getattr(value, "__module__", ""), value.__qualname__
    code = getattr(value, "__code__", None)
    line = f":{code.co_firstlineno}" if code is not None and "<lambda>" in name else ""
    if str(module).startswith("rllib_file_") and file is not None:
        return f"{file.name}{line}:{name}"
    return f"{module}.{name}{line}"
