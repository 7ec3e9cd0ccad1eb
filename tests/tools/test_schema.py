"""A typed function's schema, and what violates it."""

import functools
from typing import Any, Literal, Optional

import pytest

from rllib_gtpo.errors import ConfigError
from rllib_gtpo.tools import Tool, ToolSchemaError


def search(query: str, limit: int = 3) -> str:
    """Search the handbook.  query: what to look for.  limit: how many."""
    return query * limit


def everything(
    text: str,
    number: float,
    flag: bool,
    mode: Literal["fast", "slow"],
    level: Literal[1, 2],
    items: list[int],
    table: dict[str, list[float]],
    either: int | str,
    anything: Any,
    maybe: Optional[float] = None,  # noqa: UP045
) -> None:
    """Take everything."""


GOOD = {
    "text": "a",
    "number": 1.5,
    "flag": True,
    "mode": "fast",
    "level": 2,
    "items": [1, 2],
    "table": {"a": [1.0]},
    "either": "x",
    "anything": {"deep": [None]},
}


def test_inline_docstring():
    assert Tool.from_function(search).schema == {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Search the handbook.",
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string", "description": "what to look for."},
                    "limit": {"type": "integer", "description": "how many.", "default": 3},
                },
                "required": ["query"],
            },
        },
    }


def test_google_docstring():
    def fetch(url: str, depth: int) -> str:
        """Fetch a page.

        Note: this follows links.

        Args:
            url: Where it is,
                as a full address: with its scheme.
            depth (int): How far to follow.

        Returns:
            The text.
        """
        return url * depth

    tool = Tool.from_function(fetch)
    assert tool.description == "Fetch a page. Note: this follows links."
    properties = tool.parameters["properties"]
    assert properties["url"]["description"] == "Where it is, as a full address: with its scheme."
    assert properties["depth"]["description"] == "How far to follow."


def test_descriptions_may_be_missing():
    def bare(a: str, b: str) -> str:
        return a + b

    def half(a: str, b: str) -> str:
        """Join; prose that mentions a: nothing.  b: the second."""
        return a + b

    def none() -> str:
        """Ping."""
        return ""

    tool = Tool.from_function(bare)
    assert tool.description == "" and tool.parameters["properties"]["a"] == {"type": "string"}
    tool = Tool.from_function(half)
    assert tool.description == "Join; prose that mentions a: nothing."
    assert tool.parameters["properties"]["a"] == {"type": "string"}
    assert tool.parameters["properties"]["b"] == {"type": "string", "description": "the second."}
    tool = Tool.from_function(none)
    assert tool.parameters == {"type": "object", "properties": {}, "required": []}
    assert tool.check({}) is None


def test_types():
    tool = Tool.from_function(everything)
    assert tool.parameters["required"] == list(GOOD)
    assert tool.parameters["properties"] == {
        "text": {"type": "string"},
        "number": {"type": "number"},
        "flag": {"type": "boolean"},
        "mode": {"type": "string", "enum": ["fast", "slow"]},
        "level": {"type": "integer", "enum": [1, 2]},
        "items": {"type": "array", "items": {"type": "integer"}},
        "table": {
            "type": "object",
            "additionalProperties": {"type": "array", "items": {"type": "number"}},
        },
        "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        "anything": {},
        "maybe": {"anyOf": [{"type": "number"}, {"type": "null"}], "default": None},
    }


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"number": 1}, None),
        ({"maybe": 1}, None),
        ({"maybe": None}, None),
        ({"either": 1}, None),
        ({"text": 1}, "argument 'text' of tool 'everything' must be string, got integer 1"),
        ({"text": None}, "must be string, got null None"),
        ({"number": "1"}, "must be number, got string '1'"),
        ({"number": True}, "must be number, got boolean True"),
        ({"flag": 1}, "must be boolean, got integer 1"),
        ({"mode": "medium"}, "must be one of 'fast', 'slow', got string 'medium'"),
        ({"level": 3}, "must be one of 1, 2, got integer 3"),
        ({"level": True}, "must be one of 1, 2, got boolean True"),
        ({"items": "12"}, "must be array, got string '12'"),
        (
            {"items": [1, 2.0]},
            "argument 'items' of tool 'everything' [1] must be integer, got number",
        ),
        ({"items": [True]}, "[0] must be integer, got boolean True"),
        ({"table": {"k": ["x"]}}, "['k'] [0] must be number, got string 'x'"),
        ({"either": 1.5}, "must be integer or string, got number 1.5"),
        ({"either": True}, "must be integer or string, got boolean True"),
        ({"extra": 1}, "unknown argument 'extra' of tool 'everything', which takes: 'text', "),
    ],
)
def test_check(change, problem):
    found = Tool.from_function(everything).check({**GOOD, **change})
    assert found is problem if problem is None else found is not None and problem in found


def test_literals_of_several_types():
    def pick(one: Literal[1, "a"]) -> None:
        """Pick."""

    tool = Tool.from_function(pick)
    assert tool.parameters["properties"]["one"] == {"enum": [1, "a"]}
    assert tool.check({"one": 1}) is tool.check({"one": "a"}) is None
    assert tool.check({"one": True}) and tool.check({"one": 1.0}) and tool.check({"one": "1"})


def test_missing_arguments():
    assert Tool.from_function(search).check({}) == "missing argument 'query' of tool 'search'"
    assert "missing arguments 'text', 'number'" in Tool.from_function(everything).check({})


def test_convert_makes_floats_of_ints_and_nothing_else():
    tool = Tool.from_function(everything)
    arguments = tool.convert({**GOOD, "number": 2, "table": {"a": [1, 2]}, "maybe": 3, "either": 4})
    assert repr(arguments["number"]) == "2.0" and repr(arguments["table"]) == "{'a': [1.0, 2.0]}"
    assert repr(arguments["maybe"]) == "3.0" and repr(arguments["either"]) == "4"
    assert repr(arguments["items"]) == "[1, 2]" and arguments["flag"] is True


def test_methods_coroutines_and_callables():
    class Box:
        def look(self, where: str) -> str:
            """Look.  where: at what."""
            return where

        async def __call__(self, what: int) -> int:
            """Call it."""
            return what

    box = Box()
    tool = Tool.from_function(box.look, timeout=2, output_chars=9)
    assert list(tool.parameters["properties"]) == ["where"] and not tool.is_async
    assert (tool.timeout, tool.output_chars, tool.fn("x")) == (2, 9, "x")
    tool = Tool.from_function(box, name="box")
    assert tool.is_async and tool.parameters["properties"] == {"what": {"type": "integer"}}
    tool = Tool.from_function(functools.partial(search, limit=2), name="two")
    assert tool.parameters["required"] == ["query"]


def unannotated(a):
    """No."""


def variadic(*args: int):
    """No."""


def keywords(**kwargs: int):
    """No."""


def positional(a: int, /):
    """No."""


def exotic(a: set[int]):
    """No."""


def intkeys(a: dict[int, str]):
    """No."""


def dangling(a: "NoSuchType"):  # noqa: F821
    """No."""


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (unannotated, "'unannotated', parameter 'a' has no annotation: write a: str"),
        (variadic, "parameter 'args': \\*args and \\*\\*kwargs"),
        (keywords, "parameter 'kwargs'"),
        (positional, "positional-only"),
        (exotic, "set\\[int\\] has no JSON schema"),
        (intkeys, "dict\\[int, str\\] has no JSON schema"),
        (dangling, "NoSuchType"),
        (lambda: "", "needs a name"),
        (functools.partial(search), "needs a name"),
    ],
)
def test_unsupported_signatures(fn, message):
    with pytest.raises(ToolSchemaError, match=message) as info:
        Tool.from_function(fn)
    assert isinstance(info.value, ConfigError)
