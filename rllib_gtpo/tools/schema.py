"""A plain typed function is a tool: its name, docstring and types become a JSON schema."""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rllib_gtpo.errors import ConfigError

JSON_TYPES: dict[Any, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
    list: "array",
    dict: "object",
}
SECTIONS = re.compile(r"^\s*(Args|Arguments|Returns|Raises|Yields|Examples?):\s*$", re.MULTILINE)


class ToolSchemaError(ConfigError):
    """A function cannot be a tool as it is; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the policy can call."""

    name: str
    description: str
    parameters: dict[str, Any]  # JSON schema of the arguments, an object
    fn: Callable[..., Any]
    is_async: bool = False
    timeout: float | None = None  # seconds; None: the environment's
    output_chars: int | None = None  # what the policy sees at most; None: the environment's

    @classmethod
    def from_function(
        cls,
        fn: Callable[..., Any],
        *,
        name: str | None = None,
        timeout: float | None = None,
        output_chars: int | None = None,
    ) -> Tool:
        """Make a tool of a function, bound method or callable object.

        Parameters need annotations made of str, int, float, bool, None, Any, Literal, list[...],
        dict[str, ...] and unions of these; one with a default is optional.  The docstring's text
        is the description.  `name: text` in it, inline after a sentence or under a Google-style
        `Args:`, describes a parameter.

        Raises:
            ToolSchemaError: The signature cannot be a schema.
        """
        name = name or getattr(fn, "__name__", None)
        if not name or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", name):
            raise ToolSchemaError(f"{fn!r} needs a name: Tool.from_function(fn, name=...).")
        call = fn.func if isinstance(fn, functools.partial) else fn
        if not inspect.isroutine(call):
            call = getattr(call, "__call__", call)  # noqa: B004
        description, texts = _split_docstring(inspect.getdoc(fn) or "", _names(name, fn))
        return cls(
            name=name,
            description=description,
            parameters=_parameters(name, fn, call, texts),
            fn=fn,
            is_async=inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(call),
            timeout=timeout,
            output_chars=output_chars,
        )

    @property
    def schema(self) -> dict[str, Any]:
        """The tool in the form that chat templates take."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": self.parameters,
            },
        }

    def check(self, arguments: Mapping[str, Any]) -> str | None:
        """Why `arguments` violate the schema, or None.  Only an int may stand for a float."""
        properties = self.parameters["properties"]
        missing = [n for n in self.parameters["required"] if n not in arguments]
        if missing:
            return f"missing argument{_s(missing)} {_quote(missing)} of tool '{self.name}'"
        unknown = [n for n in arguments if n not in properties]
        if unknown:
            known = _quote(properties) if properties else "none"
            return (
                f"unknown argument{_s(unknown)} {_quote(unknown)} of tool '{self.name}', "
                f"which takes: {known}"
            )
        for key, value in arguments.items():
            problem = _check(value, properties[key])
            if problem:
                return f"argument '{key}' of tool '{self.name}' {problem}"
        return None

    def convert(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments that passed `check`, with each int that stands for a float made one."""
        properties = self.parameters["properties"]
        return {key: _convert(value, properties.get(key, {})) for key, value in arguments.items()}


def _s(items: list[str]) -> str:
    return "s" if len(items) > 1 else ""


def _quote(names: Any) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _names(tool: str, fn: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(fn).parameters)
    except (TypeError, ValueError) as error:
        raise ToolSchemaError(f"Tool '{tool}': the signature cannot be read ({error}).") from error


def _split_docstring(doc: str, names: list[str]) -> tuple[str, dict[str, str]]:
    """The description of the tool, and the text of each parameter that has one."""
    texts: dict[str, str] = {}
    if not names:
        return _squeeze(SECTIONS.split(doc)[0]), texts
    # A marker begins a line or follows the end of a clause, so that prose with a colon is none.
    alternatives = "|".join(map(re.escape, names))
    marker = re.compile(
        rf"(?:^|(?<=\n)|(?<=[.,;!?)]\s)|(?<=\s\s))[ \t]*({alternatives})(?:\s*\([^)\n]*\))?:\s"
    )
    found = list(marker.finditer(doc))
    ends = [m.start() for m in found[1:]] + [len(doc)]
    for match, end in zip(found, ends, strict=False):
        text = SECTIONS.split(doc[match.end() : end])[0].split("\n\n")[0]
        texts.setdefault(match.group(1), _squeeze(text).rstrip(",;"))
    head = doc[: found[0].start()] if found else doc
    return _squeeze(SECTIONS.split(head)[0]), texts


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def _parameters(
    tool: str, fn: Callable[..., Any], call: Callable[..., Any], texts: dict[str, str]
) -> dict[str, Any]:
    """The JSON schema of the arguments."""
    try:
        hints = get_type_hints(call if hasattr(call, "__annotations__") else fn)
    except Exception as error:
        raise ToolSchemaError(
            f"Tool '{tool}': its annotations cannot be evaluated ({error}); import what they name "
            "at module level."
        ) from error
    properties: dict[str, Any] = {}
    required = []
    for name, parameter in inspect.signature(fn).parameters.items():
        where = f"Tool '{tool}', parameter '{name}'"
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ToolSchemaError(f"{where}: *args and **kwargs have no schema; name each one.")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ToolSchemaError(f"{where} is positional-only: tools are called by keyword.")
        if name not in hints:
            raise ToolSchemaError(f"{where} has no annotation: write {name}: str (or its type).")
        schema = _schema_of(hints[name], where)
        if name in texts:
            schema["description"] = texts[name]
        if parameter.default is parameter.empty:
            required.append(name)
        elif parameter.default is None or isinstance(parameter.default, (str, int, float, bool)):
            schema["default"] = parameter.default
        properties[name] = schema
    return {"type": "object", "properties": properties, "required": required}


def _schema_of(hint: Any, where: str) -> dict[str, Any]:
    """The JSON schema of a type."""
    if hint is Any:
        return {}
    if hint in JSON_TYPES:
        return {"type": JSON_TYPES[hint]}
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        kinds = list(dict.fromkeys(JSON_TYPES[type(a)] for a in args if type(a) in JSON_TYPES))
        if len(kinds) == 1:
            return {"type": kinds[0], "enum": list(args)}
        return {"enum": list(args)}
    if origin is list:
        return {"type": "array", "items": _schema_of(args[0], where)}
    if origin is dict and args[0] is str:
        return {"type": "object", "additionalProperties": _schema_of(args[1], where)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema_of(a, where) for a in args]}
    raise ToolSchemaError(
        f"{where}: {hint!r} has no JSON schema here; use str, int, float, bool, None, Any, "
        "Literal, list[...], dict[str, ...] or a union of these."
    )


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "number":
        return isinstance(value, (int, float))
    return any(isinstance(value, t) for t, name in JSON_TYPES.items() if name == kind)


def _check(value: Any, schema: Mapping[str, Any]) -> str | None:
    """What is wrong with `value`, as the rest of a sentence."""
    if "anyOf" in schema:
        if any(_check(value, option) is None for option in schema["anyOf"]):
            return None
        return f"must be {_expected(schema)}, got {_describe(value)}"
    if "type" in schema and not _is(value, schema["type"]):
        return f"must be {_expected(schema)}, got {_describe(value)}"
    if "enum" in schema and not any(type(e) is type(value) and e == value for e in schema["enum"]):
        return f"must be {_expected(schema)}, got {_describe(value)}"
    if isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            if problem := _check(item, schema["items"]):
                return f"[{index}] {problem}"
    if isinstance(value, dict) and "additionalProperties" in schema:
        for key, item in value.items():
            if problem := _check(item, schema["additionalProperties"]):
                return f"[{key!r}] {problem}"
    return None


def _expected(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_expected(option) for option in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(map(repr, schema["enum"]))
    return str(schema.get("type", "anything"))


def _describe(value: Any) -> str:
    kind = next((k for k in JSON_TYPES.values() if k != "number" and _is(value, k)), "")
    kind = "number" if isinstance(value, float) else kind or type(value).__name__
    text = repr(value)
    return f"{kind} {text if len(text) <= 40 else text[:37] + '...'}"


def _convert(value: Any, schema: Mapping[str, Any]) -> Any:
    if schema.get("type") == "number" and isinstance(value, int):
        try:
            return float(value)
        except OverflowError:
            return value
    if isinstance(value, list) and "items" in schema:
        return [_convert(item, schema["items"]) for item in value]
    if isinstance(value, dict) and "additionalProperties" in schema:
        return {k: _convert(item, schema["additionalProperties"]) for k, item in value.items()}
    for option in schema.get("anyOf", ()):
        if _check(value, option) is None:
            return _convert(value, option)
    return value
