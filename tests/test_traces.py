"""A trajectory file's rows: the tokens of a rollout, or an error that says what to change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rllib_gtpo import ToolEnv
from rllib_gtpo.chat import ChatCodec, call_format
from rllib_gtpo.cold_start import ColdStart, load_demonstrations
from rllib_gtpo.errors import DataError
from rllib_gtpo.models import build_tokenizer
from rllib_gtpo.packing import NOT_TRAINED
from rllib_gtpo.trace_formats.recognise import as_messages
from rllib_gtpo.traces import UnusableRow, to_demonstration
from tests.junk import with_junk

# As Qwen's: it shows the tools, and wraps what they answer.  It also shows the tool's name, which a
# trace may leave out.
TEMPLATE = """\
{%- if tools %}<|im_start|>system
# Tools{% for tool in tools %}
{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == "tool" %}<|im_start|>user
<tool_response name="{{ m.name }}">
{{ m.content }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def python(code: str) -> str:
    """Run Python.  code: the code."""
    return {"print(2**5)": "32", "print(32+1)": "33"}[code]


class Power(ToolEnv):
    tools = [python]
    system = "Use Python."

    def reward(self, trajectory, task):
        return {"accuracy": float(trajectory.answer == task["answer"])}


TASK = {"question": "2**5+1?", "answer": "33"}
CALLS = {
    "fenced": "```python\n%s\n```",
    "hermes": '<tool_call>\n{"name": "python", "arguments": {"code": "%s"}}\n</tool_call>',
}


def call(code, id=None, name="python"):
    ids = {} if id is None else {"id": id, "type": "function"}
    return {**ids, "function": {"name": name, "arguments": json.dumps({"code": code})}}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, *calls):
    return {"role": "assistant", "content": text, **({"tool_calls": list(calls)} if calls else {})}


def tool(text, id=None):
    return {"role": "tool", "content": text, **({} if id is None else {"tool_call_id": id})}


ROW = {
    "messages": [
        user(TASK["question"]),
        assistant("First the power.", call("print(2**5)")),
        tool("32"),
        assistant(None, call("print(32+1)")),
        tool("33"),
        assistant("33"),
    ]
}


def codec(name):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return ChatCodec(tokenizer, name)


def rollout_stream(codec, texts):
    """Ids of a rollout in which the policy says `texts`, and which of them it sampled."""
    env = Power()
    env.call_format = codec.call_format
    observation, _ = env.reset(options={"task": TASK})
    ids = codec.prompt_ids(observation.messages, observation.tools)
    trained = [False] * len(ids)
    for number, text in enumerate(texts):
        sampled = [*codec.tokenizer.encode(text, add_special_tokens=False), codec.end_of_turn_id]
        ids += sampled
        trained += [True] * len(sampled)
        observation, *_ = env.step(text)
        if number < len(texts) - 1:
            delta = codec.delta_ids(observation.messages)
            ids += delta
            trained += [False] * len(delta)
    assert env.trajectory.correct and not any(t.invalid for t in env.trajectory.turns)
    return ids, trained


@pytest.mark.parametrize("name", ["fenced", "hermes"])
@pytest.mark.parametrize(
    "row",
    [
        ROW,
        {"messages": ROW["messages"], "tools": Power().tool_schemas, "system": "Use Python."},
        {"messages": [{"role": "system", "content": "Use Python."}, *ROW["messages"]]},
        {"messages": ROW["messages"][1:], "task": TASK},
    ],
    ids=["plain", "own tools and system", "system message", "task"],
)
def test_a_row_is_the_token_stream_of_the_rollout_that_it_shows(tmp_path, name, row):
    path = tmp_path / "demos.jsonl"
    path.write_text(json.dumps(row) + "\n\n")
    one = codec(name)
    data = load_demonstrations(ColdStart(data=str(path)), Power(), one, 0, 10_000)
    (sequence,) = data.batch(0, 1)
    first, second = (CALLS[name] % code for code in ("print(2**5)", "print(32+1)"))
    ids, trained = rollout_stream(one, [f"First the power.\n{first}", second, "33"])
    assert sequence.token_ids == ids
    assert [turn != NOT_TRAINED for turn in sequence.turns] == trained


def shown(row, name="hermes", env=None):
    return to_demonstration(row, call_format(name), env or Power())


# An assistant's message as the template of Qwen2.5 has it.
QWEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role }}"
    "{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ '\n<tool_call>\n' }}"
    """{{ '{"name": "' + call.function.name + '", "arguments": ' }}"""
    "{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_hermes_calls_are_what_a_models_own_template_makes_of_them():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = QWEN
    one = ChatCodec(tokenizer, "hermes")
    for said in ("Two at once: π.", ""):
        calls = [call("print('ä')"), call("x = 1\nprint(x)")]
        row = {"messages": [user("?"), assistant(said, *calls)]}
        prompt, demonstration, _ = to_demonstration(row, call_format("hermes"))
        ids, _ = one.conversation_ids(prompt, demonstration)
        for made in calls:
            made["function"]["arguments"] = json.loads(made["function"]["arguments"])
        whole = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert one.tokenizer.decode(ids) + "\n" == whole


def test_answers_come_in_the_order_of_the_calls():
    calls = (call("print(1)", "a"), call("print(2)", "b"))
    row = {
        "messages": [user("?"), assistant("", *calls), tool("2", "b"), tool("1", "a"), user("!")]
    }
    row["messages"].append(assistant("done"))
    _, demonstration, _ = shown(row)
    assert demonstration == [
        assistant(CALLS["hermes"] % "print(1)" + "\n" + CALLS["hermes"] % "print(2)"),
        {"role": "tool", "name": "python", "content": "1"},
        {"role": "tool", "name": "python", "content": "2"},
        user("!"),
        assistant("done"),
    ]


def test_what_the_assistant_did_not_answer_to_is_dropped():
    row = {"messages": [*ROW["messages"], user("thanks"), tool("?") | {"role": "user"}]}
    assert shown(row)[1] == shown(ROW)[1]
    row = {"messages": ROW["messages"][:4]}  # ends in a call
    assert shown(row)[1][-1] == assistant(CALLS["hermes"] % "print(32+1)")


def test_reasoning_is_written_as_templates_write_it():
    said = assistant("", call("print(2**5)")) | {"reasoning_content": "Hm.\n"}
    text = shown({"messages": [user("?"), said]})[1][0]["content"]
    assert text == "<think>\nHm.\n</think>\n\n" + CALLS["hermes"] % "print(2**5)"


def test_text_parts_and_words_beyond_ascii():
    said = {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}
    assert shown({"messages": [user("?"), said]})[1] == [assistant("a\nb")]
    said = assistant("", call("print('π')"))
    assert "π" in shown({"messages": [user("?"), said]})[1][0]["content"]


def test_a_row_may_have_tools_that_the_environment_lacks():
    search = {"name": "search", "parameters": {"properties": {"code": {"type": "string"}}}}
    row = {"messages": [user("?"), assistant("", call("x", name="search"))], "tools": [search]}
    _, (said,), tools = shown(row, "fenced")
    assert tools == [{"type": "function", "function": search}]
    assert said["content"] == "```search\nx\n```"
    assert shown({**ROW, "tools": []})[2] == []


BAD = [
    ({"messages": [assistant("x")], "task": {"no": 1}}, "no prompt of its 'task': .*no 'prompt'"),
    ({"conversations": []}, "expected .*`rllib convert`"),
    ({"messages": [{"role": "gpt", "content": "x"}]}, "message 1: role 'gpt': use one of system"),
    ({"messages": [user("?"), {"role": "assistant"}]}, "message 2: has no content"),
    ({"messages": [user([{"type": "image_url"}]), assistant("x")]}, "message 1: .* not text"),
    ({"messages": [user("?")]}, "nothing to learn"),
    ({"messages": [assistant("x")]}, "begins with the assistant: put the problem in front"),
    ({"messages": [assistant("x")], "task": TASK, "system": "s"}, "the environment makes the"),
    (
        {
            "messages": [{"role": "system", "content": "s"}, user("?"), assistant("x")],
            "system": "t",
        },
        "leave out one",
    ),
    ({**ROW, "tools": '[{"name": "python"}]'}, "tools must be a list"),
    ({**ROW, "tools": [{"python": {}}]}, "a tool is not of the form"),
    ({"messages": [user("?"), tool("x"), assistant("y")]}, "message 2: a tool answers where no"),
    ({"messages": [user("?"), assistant("x"), assistant("y")]}, "message 2: .*join them"),
    ({"messages": [user("?"), assistant(" ")]}, "message 2: is empty"),
    ({"messages": [user("?"), assistant("", call("x")), assistant("y")]}, "1 calls, but 0 tool"),
    ({"messages": [user("?"), assistant("", call("x")), user("!"), assistant("y")]}, "but 0 tool"),
    (
        {"messages": [user("?"), assistant("", call("x")), tool("a"), tool("b"), assistant("y")]},
        "message 2: 1 calls, but 2 tool messages",
    ),
    (
        {"messages": [user("?"), assistant("", call("x", "a")), tool("1", "b"), assistant("y")]},
        "tool_call_id",
    ),
    (
        {"messages": [user("?"), assistant("```python\nx\n```"), tool("1"), assistant("y")]},
        "no call in the format 'hermes': use 'tool_calls'",
    ),
    ({"messages": [user("?"), assistant("", call("x", name="bash"))]}, "the tools are python"),
    (
        {"messages": [user("?"), assistant("", {"function": {"name": "python", "arguments": {}}})]},
        "calls 'python' with nothing, but it takes code",
    ),
    ({"messages": [user("?"), assistant("", {"name": "python"})]}, "a call is not of the form"),
    (
        {"messages": [user("?"), assistant("", {"function": {"name": "f", "arguments": "{"}})]},
        "not a JSON object",
    ),
    (
        {"messages": [user("?"), assistant("") | {"function_call": {"name": "f"}}]},
        "use tool_calls",
    ),
]


@pytest.mark.parametrize(("row", "message"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_row_says_what_to_change(row, message):
    with pytest.raises(UnusableRow, match=message):
        shown(row)


def test_whatever_stands_in_a_rows_place_is_used_or_refused():
    tooled = {**ROW, "tools": Power().tool_schemas, "system": "s"}
    refused = 0
    for row in with_junk(tooled):
        try:
            shown(row)
        except UnusableRow:
            refused += 1
    assert refused > 200


def test_hermes_calls_may_speak_of_calls():
    (said,) = shown({"messages": [user("?"), assistant("", call("print('</tool_call>')"))]})[1]
    (read,) = call_format("hermes").parse(said["content"], []).calls
    assert read.arguments == {"code": "print('</tool_call>')"}


@pytest.mark.parametrize(
    "arguments", [{"code": "print('```')"}, {"code": 5}, {"code": "x", "more": "y"}], ids=str
)
def test_what_fenced_calls_cannot_say_is_refused(arguments):
    row = {
        "messages": [
            user("?"),
            assistant("", {"function": {"name": "f", "arguments": arguments}}),
        ],
        "tools": [{"name": "f", "parameters": {"properties": {"code": {}, "more": {}}}}],
    }
    with pytest.raises(UnusableRow, match="or use call_format='hermes'"):
        shown(row, "fenced")
    assert shown(row)[1]


ASKED = [user("1+1"), assistant("2")]
FORMS = [
    {"conversations": [{"from": "human", "value": "1+1"}, {"from": "gpt", "value": "2"}]},
    {"messages": [{"from": "user", "value": "1+1"}, {"from": "assistant", "value": "2"}]},
    {"conversations": ASKED},
    {"prompt": "1+1", "completion": "2"},
    {"prompt": ASKED[:1], "completion": ASKED[1:]},
    {"prompt": "1+1", "response": "2"},
    {"instruction": "1+1", "output": "2", "input": ""},
]


@pytest.mark.parametrize("row", FORMS, ids=lambda row: "-".join(row))
def test_rows_of_other_forms_are_taken_for_what_they_mean(row):
    prompt, said, _ = to_demonstration(as_messages(row), call_format("hermes"))
    assert (prompt, said) == (ASKED[:1], ASKED[1:])


def test_what_stands_beside_a_prompt_counts():
    tools = Power().tool_schemas
    row = {
        "prompt": "1+1",
        "completion": [assistant("", call("print(2**5)")), tool("32"), assistant("32")],
        "system": "Use Python.",
        "tools": json.dumps(tools),
    }
    prompt, said, shown_tools = to_demonstration(as_messages(row), call_format("hermes"))
    assert prompt == [{"role": "system", "content": "Use Python."}, user("1+1")]
    assert said[0]["content"] == CALLS["hermes"] % "print(2**5)" and shown_tools == tools
    row = {"instruction": "Add.", "input": "1+1", "output": "2"}
    assert to_demonstration(as_messages(row), call_format("hermes"))[0] == [user("Add.\n\n1+1")]


UNKNOWN = [
    (
        {"text": "<|im_start|>user"},
        "one text, .*: expected messages",
    ),
    ({"prompt": "x", "chosen": "a", "rejected": "b"}, "compares two answers"),
    ({"a": 1, "b": 2}, "has 'a', 'b': expected messages, conversations"),
    ({"prompt": "x"}, "has 'prompt': expected"),
    ([1], "no object with messages"),
    ({"conversations": [{"from": "narrator", "value": "x"}]}, "unknown speaker 'narrator'"),
    ({"conversations": [{"from": "human"}, {"from": ["x"]}]}, "not as ShareGPT writes it"),
    ({**ROW, "tools": "["}, "tools is not JSON"),
    ({"messages": [user("?"), assistant("x") | {"weight": 0}]}, "message 2: has a weight"),
]


@pytest.mark.parametrize(("row", "message"), UNKNOWN, ids=lambda value: str(value)[:40])
def test_what_is_of_no_known_form_is_refused(tmp_path, row, message):
    path = tmp_path / "demos.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(row))
    with pytest.raises(DataError, match=f"row 2: .*{message}"):
        load_demonstrations(ColdStart(data=str(path)), Power(), codec("hermes"), 0, 10_000)


def test_whatever_stands_in_the_place_of_other_forms_is_used_or_refused():
    refused = 0
    for form in FORMS:
        for row in with_junk({**form, "system": "s", "tools": "[]"}):
            try:
                shown(as_messages(row))
            except UnusableRow:
                refused += 1
    assert refused > 200


class TestFiles:
    def load(self, path: Path, *lines: str):
        path.write_text("\n".join(lines))
        return load_demonstrations(ColdStart(data=str(path)), Power(), codec("hermes"), 0, 10_000)

    def test_file_and_row_are_named(self, tmp_path):
        path = tmp_path / "demos.jsonl"
        bad = {"messages": [user("?"), assistant("x"), assistant("y")]}
        with pytest.raises(DataError, match=r"demos.jsonl, row 3: message 2: another assistant"):
            self.load(path, json.dumps(ROW), "", json.dumps(bad))
        with pytest.raises(DataError, match=r"demos.jsonl, row 1: not JSON"):
            self.load(path, "[", json.dumps(ROW))

    def test_a_turn_that_ends_twice_is_refused(self, tmp_path):
        row = {"messages": [user("?"), assistant("x<|im_end|>")]}
        with pytest.raises(DataError, match=r"row 1: .* contains '<\|im_end\|>'"):
            self.load(tmp_path / "demos.jsonl", json.dumps(row))

    def test_what_the_template_refuses_names_the_row(self, tmp_path):
        one = codec("hermes")
        one.tokenizer.chat_template = TEMPLATE + "{{ raise_exception('too odd') if tools else '' }}"
        path = tmp_path / "demos.jsonl"
        path.write_text(json.dumps(ROW))
        with pytest.raises(DataError, match=r"row 1: the chat template cannot .* too odd"):
            load_demonstrations(ColdStart(data=str(path)), Power(), one, 0, 10_000)
