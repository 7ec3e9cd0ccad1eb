"""Every call format: what it reads, what it writes, and what only looks like a call."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rllib_gtpo.chat import CallFormat, ParsedTurn, call_format, register_call_format
from rllib_gtpo.errors import ConfigError
from rllib_gtpo.types import ToolCall

SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "",
        "parameters": {
            "type": "object",
            "properties": {
                "query": {"type": "string"},
                "k": {"type": "integer"},
                "exact": {"type": "boolean"},
                "near": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "note": {"type": "string", "nullable": True},
                "weights": {"type": "array", "items": {"type": "number"}},
                "more": {"type": "object"},
                "how": {"enum": ["a", 1]},
            },
            "required": ["query"],
        },
    },
}
PYTHON = {
    "type": "function",
    "function": {
        "name": "python",
        "description": "",
        "parameters": {"type": "object", "properties": {"code": {"type": "string"}}},
    },
}
TOOLS = [SEARCH, PYTHON]
JSON_FORMATS = ("hermes", "llama3_json", "mistral", "mistral_args")
XML_FORMATS = ("qwen3_coder", "glm")
# A call of search(query="q", k=2) as each family writes it.
CALLS = {
    "hermes": '<tool_call>\n{"name": "search", "arguments": {"query": "q", "k": 2}}\n</tool_call>',
    "llama3_json": '{"name": "search", "parameters": {"query": "q", "k": 2}}',
    "mistral": '[TOOL_CALLS] [{"name": "search", "arguments": {"query": "q", "k": 2}}]',
    "mistral_args": '[TOOL_CALLS]search[ARGS]{"query": "q", "k": 2}',
    "qwen3_coder": (
        "<tool_call>\n<function=search>\n<parameter=query>\nq\n</parameter>\n"
        "<parameter=k>\n2\n</parameter>\n</function>\n</tool_call>"
    ),
    "glm": (
        "<tool_call>search\n<arg_key>query</arg_key>\n<arg_value>q</arg_value>\n"
        "<arg_key>k</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
    ),
}
ALL = pytest.mark.parametrize("name", CALLS)


def parse(name: str, text: str, **how: bool) -> ParsedTurn:
    return call_format(name).parse(text, TOOLS, **how)


def calls_of(turn: ParsedTurn) -> list[tuple[str, dict]]:
    assert all(call.error is None for call in turn.calls), turn.calls
    return [(call.name, call.arguments) for call in turn.calls]


class TestEveryFormat:
    @ALL
    def test_a_call_behind_text(self, name):
        turn = parse(name, "Let me see.\n" + CALLS[name])
        assert calls_of(turn) == [("search", {"query": "q", "k": 2})]
        assert turn.content == "Let me see."
        assert turn.calls[0].raw.strip() == CALLS[name]

    @ALL
    def test_several_calls_keep_their_order(self, name):
        first = ToolCall("search", {"query": "one"})
        second = ToolCall("python", {"code": "print(2)\n"})
        turn = parse(name, call_format(name).write_all([first, second]))
        assert calls_of(turn) == [("search", {"query": "one"}), ("python", {"code": "print(2)\n"})]
        assert turn.content == ""

    @ALL
    def test_thinking_holds_no_calls(self, name):
        turn = parse(name, f"<think>\nPerhaps\n{CALLS[name]}\n</think>\n\n{CALLS[name]}")
        assert len(calls_of(turn)) == 1
        assert CALLS[name] in turn.thinking and "think" not in turn.content
        assert len(calls_of(parse(name, f"[THINK]\n{CALLS[name]}\n[/THINK]{CALLS[name]}"))) == 1

    @ALL
    def test_unclosed_thinking_holds_no_calls_either(self, name):
        turn = parse(name, f"<think>\nPerhaps\n{CALLS[name]}")
        assert (turn.calls, turn.content) == ([], "")

    @ALL
    def test_a_prompt_may_have_opened_the_thinking(self, name):
        text = f"hm\n{CALLS[name]}\n</think>\n\n{CALLS[name]}"
        turn = parse(name, text, thinking=True)
        assert len(calls_of(turn)) == 1 and turn.thinking.startswith("hm\n")
        assert parse(name, f"hm\n{CALLS[name]}", thinking=True).calls == []

    @ALL
    @pytest.mark.parametrize(
        "quoted", ["Write\n```xml\n{}\n```\nto search.", "Say `{}` to search.", "They said:\n> {}"]
    )
    def test_a_quotation_is_no_call(self, name, quoted):
        text = quoted.format(CALLS[name].replace("\n", "" if "```" not in quoted else "\n"))
        turn = parse(name, text)
        assert (turn.calls, turn.content) == ([], text.strip())

    @ALL
    def test_a_fence_that_is_never_closed_quotes_nothing(self, name):
        assert len(calls_of(parse(name, f"```python\nx = 1\n{CALLS[name]}"))) == 1

    @ALL
    def test_a_call_in_an_argument_stays_there(self, name):
        inner = [CALLS[name], "<think>x", "```\n`>", "a\n> b"]
        if name in XML_FORMATS:  # which cannot say their own closing tags
            inner = inner[1:]
        for code in inner:
            written = call_format(name).write(ToolCall("python", {"code": code}))
            turn = parse(name, written)
            assert calls_of(turn) == [("python", {"code": code})]
            assert (turn.content, turn.thinking) == ("", "")

    @ALL
    @pytest.mark.parametrize("cut", [0.4, 0.7, 0.85])
    def test_a_truncated_call_is_invalid_and_says_how_it_should_end(self, name, cut):
        text = CALLS[name][: int(len(CALLS[name]) * cut)]
        (call,) = parse(name, "So:\n" + text if name != "llama3_json" else text).calls
        assert call.error and call.arguments == {} and call.raw.strip() == text.strip()
        if name != "llama3_json":
            assert "close" in call.error or "JSON" in call.error

    @ALL
    def test_text_is_an_answer(self, name):
        for text in ("42", 'The answer is {"x": 1}.', "a < b and [1, 2] > c", "", "{}"):
            turn = parse(name, text)
            assert (turn.calls, turn.content) == ([], text)


class TestJson:
    @pytest.mark.parametrize("name", JSON_FORMATS)
    @settings(max_examples=100, deadline=None)
    @given(
        st.lists(
            st.tuples(
                st.text("abcxyz_-09", min_size=1, max_size=8),
                st.dictionaries(
                    st.text(max_size=6),
                    st.recursive(
                        st.none()
                        | st.booleans()
                        | st.integers()
                        | st.floats(allow_nan=False)
                        | st.text(max_size=8)
                        | st.sampled_from(
                            ["</tool_call>", "<tool_call>", "[TOOL_CALLS]", "<think>", "```", '"}']
                        ),
                        lambda inner: (
                            st.lists(inner, max_size=3)
                            | st.dictionaries(st.text(max_size=4), inner, max_size=3)
                        ),
                        max_leaves=6,
                    ),
                    max_size=3,
                ),
            ),
            min_size=1,
            max_size=3,
        )
    )
    def test_what_is_written_is_read(self, name, calls):
        form = call_format(name)
        text = form.write_all([ToolCall(n, arguments) for n, arguments in calls])
        turn = form.parse("<think>t</think>Well.\n" + text, TOOLS)
        assert calls_of(turn) == calls
        assert (turn.content, turn.thinking) == ("Well.", "t")

    def test_llama_calls_may_stand_behind_the_tag_with_either_key(self):
        one = CALLS["llama3_json"]
        two = one.replace("parameters", "arguments")
        assert len(calls_of(parse("llama3_json", f"Well. <|python_tag|>{one}; {two}"))) == 2
        assert len(calls_of(parse("llama3_json", f"{one}\n{two}"))) == 2

    @pytest.mark.parametrize(
        "text",
        ['{"name": "Bob", "age": 3}', '[{"name": "a", "parameters": {}}]', '{"parameters": {}}'],
    )
    def test_llama_objects_that_are_no_calls_are_text(self, text):
        assert parse("llama3_json", text).calls == []
        (call,) = parse("llama3_json", f"<|python_tag|>{text}").calls
        assert "must be" in call.error

    def test_llama_code_behind_the_tag_is_an_invalid_call(self):
        (call,) = parse("llama3_json", "<|python_tag|>print(1)").calls
        assert "not JSON" in call.error

    def test_mistral_ids_are_kept(self):
        listed = '[TOOL_CALLS][{"name": "f", "arguments": {}, "id": "abcdefghi"}]'
        named = "[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{}"
        for name, text in (("mistral", listed), ("mistral_args", named)):
            (call,) = parse(name, text).calls
            assert (call.name, call.id) == ("f", "abcdefghi")
            assert call_format(name).write(call).replace(" ", "") == text.replace(" ", "")

    @pytest.mark.parametrize("text", ["[]", "[1]", '["a"]', '[{"arguments": {}}]'])
    def test_mistral_lists_of_something_else_are_invalid(self, text):
        (call,) = parse("mistral", "[TOOL_CALLS]" + text).calls
        assert "must be" in call.error


class TestXml:
    VALUES = st.fixed_dictionaries(
        {"query": st.text(max_size=12)},
        optional={
            "k": st.integers(),
            "exact": st.booleans(),
            "near": st.none() | st.text("ab \n<>", max_size=5),
            "weights": st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=3),
            "more": st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2),
            "how": st.sampled_from(["a", 1]),
        },
    )

    @pytest.mark.parametrize("name", XML_FORMATS)
    @settings(max_examples=150, deadline=None)
    @given(st.lists(VALUES, min_size=1, max_size=3))
    def test_what_is_written_is_read_by_the_schema(self, name, calls):
        form = call_format(name)
        text = form.write_all([ToolCall("search", arguments) for arguments in calls])
        if any(mark in json.dumps(calls) for mark in ("</parameter>", "</arg_value>")):
            return
        turn = form.parse("<think>t</think>Well.\n" + text, TOOLS)
        assert calls_of(turn) == [("search", arguments) for arguments in calls]
        assert (turn.content, turn.thinking) == ("Well.", "t")

    @pytest.mark.parametrize("name", XML_FORMATS)
    @pytest.mark.parametrize(
        ("key", "text", "value"),
        [
            ("k", "5", 5),
            ("query", "5", "5"),
            ("query", '{"a": 1}', '{"a": 1}'),
            ("exact", "True", True),
            ("exact", "false", False),
            ("near", "null", None),
            ("near", "5", "5"),
            ("note", "null", None),
            ("weights", "[1, 2.5]", [1, 2.5]),
            ("how", "1", 1),
            ("how", "a", "a"),
            ("k", "five", "five"),
            ("unknown", "5", "5"),
        ],
    )
    def test_the_schema_says_what_a_text_stands_for(self, name, key, text, value):
        written = call_format(name).write(ToolCall("search", {key: text}))
        assert calls_of(parse(name, written)) == [("search", {key: value})]

    def test_a_closing_tag_inside_a_value_is_text_where_nothing_follows_that_could(self):
        for name, tag in (("qwen3_coder", "</parameter>"), ("glm", "</arg_value>")):
            code = f"print('{tag}')"
            written = call_format(name).write(ToolCall("python", {"code": code}))
            assert calls_of(parse(name, written)) == [("python", {"code": code})]

    def test_qwen_calls_need_no_outer_tag(self):
        inner = CALLS["qwen3_coder"].removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
        assert len(calls_of(parse("qwen3_coder", inner))) == 1

    @pytest.mark.parametrize("name", XML_FORMATS)
    def test_a_call_of_another_form_says_which_is_right(self, name):
        (call,) = parse(name, "<tool_call>{}</function></tool_call>").calls
        assert "must be" in call.error


HOSTILE = [
    "<tool_call>",
    "<tool_call>{",
    '<tool_call>{"a": "</tool_call>',
    "<tool_call>[</tool_call>",
    "<tool_call><function=f>",
    "<tool_call><function=f><parameter=x></function>",
    "<function=f><parameter=x></parameter>",
    "<tool_call>f<arg_key>k</arg_key><arg_value></tool_call>",
    "<tool_call>f<arg_key>",
    "<tool_call>f <arg_key>k</arg_key><arg_value></arg_value>",
    "[TOOL_CALLS]",
    "[TOOL_CALLS][",
    '[TOOL_CALLS]["',
    "[TOOL_CALLS]f[ARGS]{",
    "[TOOL_CALLS]f   ",
    '\n{"a":[',
    '\n{"name": "f", "parameters": [',
    "<|python_tag|>{",
    "<|python_tag|>",
    '{"name": "f", "parameters": {}};',
    "\n```x\n",
    "\n> ",
    "`",
    "<think>",
    "[THINK]</think>",
]


def seconds(parse) -> float:
    """The least processor time of up to three runs: the collector of garbage takes some, too."""
    taken: list[float] = []
    while len(taken) < 3 and min(taken, default=1.0) > 0.5:
        began = time.process_time()
        parse()
        taken.append(time.process_time() - began)
    return min(taken)


@pytest.mark.parametrize("name", [*CALLS, "fenced"])
def test_hostile_texts_take_time_in_proportion(name):
    """100,000 characters of whatever could make a parser look far ahead again and again."""
    spaced = [piece + " " * 50_000 for piece in ("[TOOL_CALLS]f", "<tool_call>f", "{", "\n")]
    slow = {}
    for piece in [*HOSTILE, *spaced]:
        text = piece * (100_000 // len(piece) + 1)
        for closing in ("", "</arg_value></parameter></function></tool_call>]}\n```"):
            taken = seconds(lambda text=text + closing: call_format(name).parse(text, TOOLS))
            if taken > 0.5:
                slow[piece[:40], closing] = taken
    assert not slow


class TestRegistry:
    def test_a_format_of_ones_own(self):
        @register_call_format("shouted")
        class Shouted(CallFormat):
            explained = False

            def parse(self, text, tools, *, thinking=False):
                said, _, name = text.partition("!")
                return ParsedTurn(said, calls=[ToolCall(name, raw="!" + name)] if name else [])

            def write(self, call):
                return f"!{call.name}"

        form = call_format("shouted")
        assert form.name == "shouted"
        assert form.write_all([ToolCall("a"), ToolCall("b")]) == "!a\n!b"
        assert call_format("shouted").parse("x!go", []).calls[0].name == "go"

    def test_a_taken_name_is_refused(self):
        with pytest.raises(ConfigError, match="'hermes' is taken by HermesFormat"):

            @register_call_format("hermes")
            class Mine(CallFormat):
                def parse(self, text, tools, *, thinking=False):
                    return ParsedTurn(text)

                def write(self, call):
                    return ""
