"""Where settings come from, so that messages and `--dry-run` can say it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from rllib_gtpo.command.yaml_text import Path


class Places(dict[Path, str]):
    """The place of each setting that somebody set, by its path: "task.yaml:12", "--override lr=1".

    Paths are those of an experiment in YAML: ("config", "lr"), ("stop", "training_iteration").
    """

    def __init__(self, file: str = "", places: Mapping[Path, str] | None = None) -> None:
        super().__init__(places or {})
        self.file = file

    def of(self, path: Path) -> str | None:
        """The place of a value: its own, or that of the list or mapping that was set with it."""
        while path:
            if path in self:
                return self[path]
            path = path[:-1]
        return None

    def prefix(self, path: Path) -> str:
        """ "task.yaml:12: ", or the file alone, for the start of a message."""
        place = self.of(path) or self.file
        return f"{place}: " if place else ""

    def prefix_of(self, message: str, root: Path = ()) -> str:
        """The same for the setting below `root` that a message is about.

        That is the one of whose path it names most, and of several the one that it names first.
        """
        best: tuple[int, int] | None = None
        chosen: Path = ()
        for path in self:
            if path[: len(root)] != root or len(path) == len(root):
                continue
            found = [_mention(key, message) for key in path[len(root) :]]
            if found[-1] is None:
                continue
            rank = (-sum(where is not None for where in found), found[-1])
            if best is None or rank < best:
                best, chosen = rank, path
        return self.prefix(chosen)

    def set_value(self, path: Path, value: Any, place: str) -> None:
        """Notes that `value` was set at `path` as a whole."""
        self[path] = place
        for below in list(self):
            if len(below) > len(path) and below[: len(path)] == path:
                del self[below]
        for below in _paths(value, path):
            self[below] = place


def _paths(value: Any, path: Path) -> Iterable[Path]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield (*path, str(key))
            yield from _paths(item, (*path, str(key)))


def _mention(key: str, message: str) -> int | None:
    """Where a message names a setting; a short word counts only if it is written as a name."""
    words = re.escape(key).replace("_", "[_ ]")
    pattern = rf"(?<![\w]){words}(?!\w)"
    if "_" not in key:
        pattern = rf"(?<=['\"`]){words}(?=['\"`])|(?<!\w){words}(?=\s?[=:(])|^{words}(?!\w)"
    found = re.search(pattern, message)
    return found.start() if found else None
