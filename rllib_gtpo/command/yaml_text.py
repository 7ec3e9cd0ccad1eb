"""YAML with the line of every key; `KEY=VALUE` options, whose values are YAML."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

from rllib_gtpo.errors import ConfigError

Path = tuple[str, ...]
"""Where a value is: its keys from the root, and positions in lists."""

_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-4 is a number (YAML 1.1 wants 1.0e-4), keys do not repeat."""


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if "\n" in data else None  # on one line
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)

for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def dump_inline(value: Any) -> str:
    """A value on one line, as `parse_yaml` reads it."""
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, width=math.inf, sort_keys=False
    )
    return text.removesuffix("...\n").strip()


def parse_yaml(text: str, name: str) -> tuple[Any, dict[Path, int]]:
    """Parses `text`; also the line (from 1) of each key and list item by its path.

    Raises:
        ConfigError: It is no YAML, repeats a key, or contains itself; with the line.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
        lines = dict(_lines(root, (), (), name)) if root is not None else {}
        return yaml.load(text, Loader=_Loader), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{name}{line}: not valid YAML: {getattr(error, 'problem', None) or error}"
        ) from error


def _lines(
    node: yaml.Node, path: Path, above: tuple[int, ...], name: str
) -> Iterator[tuple[Path, int]]:
    if id(node) in above:
        raise ConfigError(f"{name}:{node.start_mark.line + 1}: this mapping contains itself")
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*path, str(index)), item.start_mark.line + 1
            yield from _lines(item, (*path, str(index)), above, name)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            if key.tag == _MERGE:  # `<<: *base`: keys of `base`, which the mapping's own ones hide
                for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    yield from _lines(source, path, above, name)
        for key, value in node.value:
            if key.tag == _MERGE:
                continue
            word, line = str(key.value), key.start_mark.line + 1
            if word in seen:
                raise ConfigError(f"{name}:{line}: {word!r} is also set on line {seen[word]}")
            seen[word] = line
            yield (*path, word), line
            yield from _lines(value, (*path, word), above, name)


def parse_assignment(text: str, option: str) -> tuple[str, Any]:
    """ "a.b=4" -> ("a.b", 4); the value is YAML."""
    key, separator, value = text.partition("=")
    if not separator or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f"{option} takes KEY=VALUE, not {text!r}")
    return key.strip(), parse_yaml(value, f"{option} {text}")[0]
