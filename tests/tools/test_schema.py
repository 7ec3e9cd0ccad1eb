"""A typed function's schema, and what violates it."""

import functools
import sys
from typing import Any, Literal, Optional

import pytest
from transformers.utils import get_json_schema

from rllib_gtpo.errors import ConfigError
from rllib_gtpo.tools import Tool, ToolSchemaError, tool


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
    assert tool.description == "Fetch a page.\n\nNote: this follows links."
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
    assert tool.parameters == {"type": "object", "properties": {}}
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
        "either": {"type": ["integer", "string"]},
        "anything": {},
        "maybe": {"type": "number", "nullable": True, "default": None},
    }


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"number": 1}, None),
        ({"maybe": 1}, None),
        ({"maybe": None}, None),
        ({"either": 1}, None),
        ({"maybe": "1"}, "must be number or null, got string '1'"),
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
    assert tool.parameters["properties"]["one"] == {"type": ["integer", "string"], "enum": [1, "a"]}
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


def weather(city: str, unit: str, days: int | None, at: list[float] | None) -> str:
    """Tell the weather.

    It is often right.

    Args:
        city: Where; as a name,
            or a code.
        unit: Of the temperature (choices: ["celsius", "kelvin"])
        days: How many.
        at: The hours
            of the day.

    Returns:
        The weather.
    """


def mix(
    a: Literal["x", 1],
    b: dict[str, list[int]],
    c: int | str | None,
    d: list[int] | str,
    e: Any,
    f: Literal["only"] | None,
    g: list,
    h: bool,
):
    """Mix.

    Args:
        a: One.
        b: Two.
        c: Three.
        d: Four.
        e: Five.
        f: Six.
        g: Seven.
        h: Eight.
    """


def nothing() -> str:
    """Do nothing."""


@pytest.mark.parametrize("fn", [weather, mix, nothing])
def test_google_docstrings_give_what_transformers_gives(fn):
    theirs = get_json_schema(fn)
    theirs["function"].pop("return", None)  # no part of a call, and seldom shown by a template
    assert Tool.from_function(fn).schema == theirs


def test_defaults_are_told_beyond_what_transformers_tells():
    def pick(n: int = 3, names: list[str] | None = None) -> str:
        """Pick.

        Args:
            n: How many.
            names: Of whom.
        """
        return ""

    ours = Tool.from_function(pick).parameters
    theirs = get_json_schema(pick)["function"]["parameters"]
    assert {n: p.pop("default") for n, p in ours["properties"].items()} == {"n": 3, "names": None}
    assert ours == theirs


def test_null_and_the_items_of_unions_are_checked():
    made = Tool.from_function(mix)
    good = {"a": 1, "b": {}, "c": None, "d": [1], "e": None, "f": None, "g": [1, "a"], "h": True}
    assert made.check(good) is None
    assert "'f' of tool 'mix' must be one of 'only' or null" in made.check({**good, "f": "other"})
    assert "'d' of tool 'mix' must be array or string, got array" in made.check(
        {**good, "d": ["x"]}
    )
    assert "'h' of tool 'mix' must be boolean, got null" in made.check({**good, "h": None})


def test_choices_that_are_not_json_are_refused():
    def drink(what: str):
        """Drink.  what: it (choices: [tea)"""

    with pytest.raises(ToolSchemaError, match="'drink' has no schema"):
        Tool.from_function(drink)


class TestDecorator:
    def test_limits_and_name_are_the_tools_and_the_function_stays_one(self):
        @tool(name="look_up", timeout=5, output_chars=20_000)
        def search(query: str) -> str:
            """Search."""
            return query

        made = Tool.from_function(search)
        assert (made.name, made.timeout, made.output_chars) == ("look_up", 5, 20_000)
        assert search("x") == "x"
        assert Tool.from_function(search, timeout=1).timeout == 1

    def test_methods_keep_it(self):
        class Box:
            @tool(timeout=0.5)
            async def look(self, where: str) -> str:
                """Look."""
                return where

        made = Tool.from_function(Box().look)
        assert made.timeout == 0.5 and made.is_async and list(made.parameters["properties"])

    @pytest.mark.parametrize(
        "limits", [{"timeout": 0}, {"timeout": "5"}, {"output_chars": 2.5}, {"output_chars": True}]
    )
    def test_bad_limits_are_refused(self, limits):
        with pytest.raises(ToolSchemaError, match=rf"'search': {next(iter(limits))}=.* above 0"):
            Tool.from_function(search, **limits)


class TestPaths:
    @pytest.fixture
    def module(self, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)

        def write(text):
            (tmp_path / "shop_tools.py").write_text(text)
            sys.modules.pop("shop_tools", None)

        yield write
        sys.modules.pop("shop_tools", None)

    def test_a_function_of_a_module(self, module):
        module("def price(item: str) -> int:\n    'Price.'\n    return len(item)\n")
        made = Tool.from_path("shop_tools:price")
        assert made.name == "price" and made.fn("abc") == 3

    @pytest.mark.parametrize(
        ("text", "path", "message"),
        [
            ("1 / 0", "shop_tools:price", "'shop_tools:price': importing shop_tools raised Zero"),
            (
                "raise SystemExit(3)",
                "shop_tools:price",
                "importing shop_tools raised SystemExit: 3",
            ),
            ("", "shop_tools:price", "shop_tools has no 'price'"),
            ("", "no_such_shop:price", "importing no_such_shop raised ModuleNotFoundError"),
            ("", "shop_tools.price", "write 'package.module:function'"),
        ],
    )
    def test_what_cannot_be_imported_names_the_tool(self, module, text, path, message):
        module(text)
        with pytest.raises(ToolSchemaError, match=message):
            Tool.from_path(path)
