"""Whether a call's arguments match a tool's JSON schema, in words that a policy can learn from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

JSON_TYPES: dict[Any, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
    list: "array",
    dict: "object",
}


def find_problem(
    tool: str, parameters: Mapping[str, Any], arguments: Mapping[str, Any]
) -> str | None:
    """Why `arguments` violate `parameters`, or None.  Only an int may stand for a float."""
    properties = parameters["properties"]
    missing = [n for n in parameters.get("required", ()) if n not in arguments]
    if missing:
        return f"missing argument{_s(missing)} {_quote(missing)} of tool '{tool}'"
    unknown = [n for n in arguments if n not in properties]
    if unknown and not parameters.get("additionalProperties"):
        known = _quote(properties) if properties else "none"
        return (
            f"unknown argument{_s(unknown)} {_quote(unknown)} of tool '{tool}', "
            f"which takes: {known}"
        )
    for key, value in arguments.items():
        problem = _check(value, properties.get(key, {}))
        if problem:
            return f"argument '{key}' of tool '{tool}' {problem}"
    return None


def convert_floats(parameters: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments without a problem, with each int that stands for a float made one."""
    properties = parameters["properties"]
    return {key: _convert(value, properties.get(key, {})) for key, value in arguments.items()}


def _s(items: list[str]) -> str:
    return "s" if len(items) > 1 else ""


def _quote(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _types(schema: Mapping[str, Any]) -> list[str]:
    kinds = schema.get("type", [])
    return [kinds] if isinstance(kinds, str) else list(kinds)


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "number":
        return isinstance(value, (int, float))
    return any(isinstance(value, t) for t, name in JSON_TYPES.items() if name == kind)


def _check(value: Any, schema: Any) -> str | None:
    """What is wrong with `value`, as the rest of a sentence."""
    if not isinstance(schema, Mapping) or (value is None and schema.get("nullable")):
        return None
    wrong = f"must be {_expected(schema)}, got {_describe(value)}"
    if "anyOf" in schema:
        return None if any(_check(value, o) is None for o in schema["anyOf"]) else wrong
    kinds = _types(schema)
    if kinds and not any(_is(value, kind) for kind in kinds):
        return wrong
    if "enum" in schema and not any(type(e) is type(value) and e == value for e in schema["enum"]):
        return wrong
    if isinstance(value, list):
        for index, item in enumerate(value):
            if problem := _check(item, schema.get("items")):
                return f"[{index}] {problem}"
    return _check_object(value, schema) if isinstance(value, dict) else None


def _check_object(value: dict[str, Any], schema: Mapping[str, Any]) -> str | None:
    for key in schema.get("required", ()):
        if key not in value:
            return f"lacks '{key}'"
    for key, item in value.items():
        own = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
        if problem := _check(item, own):
            return f"[{key!r}] {problem}"
    return None


def _expected(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        names = [_expected(option) for option in schema["anyOf"]]
    elif "enum" in schema:
        names = ["one of " + ", ".join(map(repr, schema["enum"]))]
    else:
        names = _types(schema) or ["anything"]
    return " or ".join([*names, "null"] if schema.get("nullable") else names)


def _describe(value: Any) -> str:
    kind = next((k for k in JSON_TYPES.values() if k != "number" and _is(value, k)), "")
    kind = "number" if isinstance(value, float) else kind or type(value).__name__
    text = repr(value)
    return f"{kind} {text if len(text) <= 40 else text[:37] + '...'}"


def _convert(value: Any, schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return value
    kinds = _types(schema)
    if "number" in kinds and "integer" not in kinds and _is(value, "integer"):
        try:
            return float(value)
        except OverflowError:
            return value
    if isinstance(value, list):
        return [_convert(item, schema.get("items")) for item in value]
    if isinstance(value, dict):
        return {k: _convert(item, schema.get("additionalProperties")) for k, item in value.items()}
    for option in schema.get("anyOf", ()):
        if _check(value, option) is None:
            return _convert(value, option)
    return value
