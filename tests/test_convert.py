"""`rllib convert`: small files of each kind, what becomes of their rows, and that none is lost."""

from __future__ import annotations

import json

import pytest

from rllib_gtpo.chat import call_format
from rllib_gtpo.cli import main
from rllib_gtpo.command.convert import convert
from rllib_gtpo.errors import DataError
from rllib_gtpo.traces import to_demonstration
from tests.junk import with_junk

BASH = {
    "type": "function",
    "function": {
        "name": "execute_bash",
        "description": "Run a command.",
        "parameters": {
            "type": "object",
            "properties": {"command": {"type": "string", "description": "The command."}},
            "required": ["command"],
        },
    },
}


def call(name, arguments, id=None):
    own = {} if id is None else {"id": id}
    return {**own, "type": "function", "function": {"name": name, "arguments": arguments}}


def converted(tmp_path, kind, *rows, keep_failed=False, name="in.jsonl"):
    """What a file of these rows becomes: the rows, and the report."""
    source, target = tmp_path / name, tmp_path / "out.jsonl"
    target.unlink(missing_ok=True)
    if name.endswith(".jsonl"):
        source.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    else:
        source.write_text(json.dumps(rows[0]))
    report = convert(source, target, kind, keep_failed=keep_failed)
    return [json.loads(line) for line in target.read_text().splitlines()], str(report)


class TestShareGPT:
    # As LLaMA-Factory's glaive_toolcall: tools are text, calls and answers are entries.
    TOOL = {"name": "add", "description": "Add.", "parameters": {"properties": {"a": {}, "b": {}}}}
    ROW = {
        "conversations": [
            {"from": "human", "value": "2+3?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 3}}'},
            {"from": "observation", "value": '{"sum": 5}'},
            {"from": "gpt", "value": "It is 5."},
        ],
        "system": "You calculate.",
        "tools": json.dumps([TOOL]),
    }

    def test_calls_as_entries(self, tmp_path):
        ((row,), report) = converted(tmp_path, "sharegpt", self.ROW)
        assert row == {
            "system": "You calculate.",
            "tools": [self.TOOL],
            "messages": [
                {"role": "user", "content": "2+3?"},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [call("add", {"a": 2, "b": 3})],
                },
                {"role": "tool", "content": '{"sum": 5}'},
                {"role": "assistant", "content": "It is 5."},
            ],
        }
        assert report == "converted 1 of 1 rows"

    def test_a_list_of_calls_and_calls_one_after_the_other_are_one_turn(self, tmp_path):
        one = {"name": "add", "arguments": {"a": 1, "b": 1}}
        two = {"name": "add", "arguments": {"a": 2, "b": 2}}
        answers = [{"from": "observation", "value": v} for v in ("2", "4")]
        human, end = self.ROW["conversations"][0], self.ROW["conversations"][-1]
        listed = [{"from": "function_call", "value": json.dumps([one, two])}]
        split = [
            {"from": "gpt", "value": "Both."},
            *({"from": "function_call", "value": json.dumps(c)} for c in (one, two)),
        ]
        rows = [{"id": 7, "conversations": [human, *c, *answers, end]} for c in (listed, split)]
        out, _ = converted(tmp_path, "sharegpt", *rows)
        calls = [call("add", c["arguments"]) for c in (one, two)]
        assert [row["messages"][1]["tool_calls"] for row in out] == [calls, calls]
        assert [row["messages"][1]["content"] for row in out] == ["", "Both."]
        assert out[0]["id"] == 7

    def test_calls_in_the_text_as_hermes_writes_them(self, tmp_path):
        said = (
            "<think>\nAdd.\n</think>\nSure.\n<tool_call>\n"
            '{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
        )
        row = {
            "conversations": [
                {"from": "system", "value": "You calculate."},
                {"from": "human", "value": "2+3?"},
                {"from": "gpt", "value": said},
                {"from": "tool", "value": "<tool_response>\n5\n</tool_response>"},
                {"from": "gpt", "value": "5"},
            ]
        }
        ((row,), _) = converted(tmp_path, "sharegpt", row)
        assert row["messages"][2:4] == [
            {
                "role": "assistant",
                "content": "Sure.",
                "tool_calls": [call("add", {"a": 2, "b": 3})],
                "reasoning_content": "\nAdd.\n",
            },
            {"role": "tool", "content": "5"},
        ]
        _, shown, _ = to_demonstration(row, call_format("hermes"))
        assert shown[0]["content"] == said.replace("</think>\n", "</think>\n\n")

    def test_every_row_is_written_or_counted_with_its_number_and_reason(self, tmp_path, capsys):
        human, call_, _, end = self.ROW["conversations"]
        bad = [
            "{",
            {"messages": []},
            {"conversations": [human, {"from": "function", "value": "x"}, end]},
            {"conversations": [human, {"from": "function_call", "value": "add(2)"}, end]},
            {"conversations": [human, call_, end]},
            {"conversations": [human]},
            {**self.ROW, "tools": json.dumps([{"name": "sub"}])},
            {**self.ROW, "correct": False},
            {**self.ROW, "correct": False},
            {"conversations": [human, {"from": "gpt", "value": "<tool_call>{"}]},
            {"conversations": [human, {"value": "x"}]},
            {"conversations": [{"from": "gpt", "value": "Hello."}]},
        ]
        source = tmp_path / "in.jsonl"
        lines = [r if isinstance(r, str) else json.dumps(r) for r in (self.ROW, *bad)]
        source.write_text("\n".join(lines))
        target = tmp_path / "out.jsonl"
        assert main(["convert", str(source), str(target), "--from", "sharegpt"]) == 0
        out = capsys.readouterr().out
        assert out.startswith(
            "converted 1 of 13 rows\nleft out 2: failed (correct is false); --keep"
        )
        for row, reason in enumerate(
            [
                ": not JSON",
                "has no list 'conversations'",
                "unknown speaker 'function'",
                "a function_call is not JSON",
                "1 calls, but 0 tool messages",
                "has no assistant message",
                "calls 'add', but the tools are sub",
                "failed",
                "failed",
                "the call is not closed",
                "unknown speaker None",
                "begins with the assistant",
            ],
            start=2,
        ):
            (line,) = [at for at in out.splitlines() if reason in at]
            assert f"(row {row})" in line or (reason == "failed" and "(rows 9, 10)" in line)
        assert len(target.read_text().splitlines()) == 1
        target.unlink()
        arguments = [str(source), str(target), "--from", "sharegpt", "--keep-failed"]
        assert main(["convert", *arguments]) == 0
        assert capsys.readouterr().out.startswith("converted 3 of 13 rows")


# What OpenHands adds to the prompt of a model without function calling, shortened.
SYSTEM = """\
You are an agent.
You have access to the following functions:

---- BEGIN FUNCTION #1: execute_bash ----
Description: Run a command.
Parameters:
  (1) command (string, required): The command.
---- END FUNCTION #1 ----

---- BEGIN FUNCTION #2: finish ----
Description: End.
No parameters are required for this function.
---- END FUNCTION #2 ----

---- BEGIN FUNCTION #3: view ----
Description: View a file.
Parameters:
  (1) path (string, required): Where.
It is absolute.
  (2) view_range (array, optional): First and last line.
Allowed values: [`any`]
---- END FUNCTION #3 ----


If you choose to call a function ONLY reply in the following format with NO suffix:

<function=example_function_name>
<parameter=example_parameter_1>value_1</parameter>
</function>

<IMPORTANT>
Reminder: ...
</IMPORTANT>
"""
TASK = """\
Here's a running example of how to perform a task with the provided tools.

--------------------- START OF EXAMPLE ---------------------

USER: EXECUTION RESULT of [execute_bash]:
x

--------------------- END OF EXAMPLE ---------------------

--------------------- NEW TASK DESCRIPTION ---------------------
Mend the bug.
--------------------- END OF NEW TASK DESCRIPTION ---------------------

PLEASE follow the format strictly! PLEASE EMIT ONE AND ONLY ONE FUNCTION CALL PER MESSAGE.
"""


class TestOpenHandsMessages:
    ROW = {
        "instance_id": "repo-1",
        "resolved": True,
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": [{"type": "text", "text": TASK}]},
            {
                "role": "assistant",
                "content": "I look.\n\n<function=view>\n<parameter=path>/a.py</parameter>\n"
                "<parameter=view_range>[1, 9]</parameter>\n</function>",
            },
            {"role": "user", "content": "EXECUTION RESULT of [view]:\n1\tx = 1\n"},
            {
                "role": "assistant",
                "content": "<function=execute_bash>\n<parameter=command>\n    cat <<E\nx\nE\n"
                "</parameter>\n</function",
            },
            {"role": "user", "content": "EXECUTION RESULT of [execute_bash]:\nx"},
            {
                "role": "assistant",
                "content": "Done.\n\n<function=finish>\n<parameter=message>It is mended."
                "</parameter>\n</function>",
            },
        ],
    }

    def test_calls_written_as_functions(self, tmp_path):
        ((row,), _) = converted(tmp_path, "openhands", self.ROW)
        view = {
            "name": "view",
            "description": "View a file.",
            "parameters": {
                "type": "object",
                "properties": {
                    "path": {"type": "string", "description": "Where.\nIt is absolute."},
                    "view_range": {
                        "type": "array",
                        "description": "First and last line.\nAllowed values: [`any`]",
                    },
                },
                "required": ["path"],
            },
        }
        assert row == {
            "id": "repo-1",
            "tools": [BASH, {"type": "function", "function": view}],
            "messages": [
                {"role": "system", "content": "You are an agent."},
                {"role": "user", "content": "Mend the bug."},
                {
                    "role": "assistant",
                    "content": "I look.",
                    "tool_calls": [call("view", {"path": "/a.py", "view_range": [1, 9]})],
                },
                {"role": "tool", "name": "view", "content": "1\tx = 1\n"},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [call("execute_bash", {"command": "    cat <<E\nx\nE"})],
                },
                {"role": "tool", "name": "execute_bash", "content": "x"},
                {"role": "assistant", "content": "Done.\n\nIt is mended."},
            ],
        }

    def test_calls_as_tool_calls(self, tmp_path):
        """As in SWE-rebench's trajectories, which Parquet fills with nulls."""
        null = {"content": None, "name": None, "tool_call_id": None, "tool_calls": None}
        tool = json.loads(json.dumps(BASH))
        tool["function"]["parameters"]["properties"]["path"] = None
        finish = {"type": "function", "function": {"name": "finish", "description": ""}}
        row = {
            "instance_id": "repo-2",
            "trajectory": [
                {**null, "role": "system", "content": "You are an agent."},
                {**null, "role": "user", "content": "Mend it."},
                {
                    **null,
                    "role": "assistant",
                    "tool_calls": [call("execute_bash", '{"command": "ls"}', "c1")],
                },
                {**null, "role": "tool", "tool_call_id": "c1", "name": "execute_bash"}
                | {"content": "a.py"},
                {
                    **null,
                    "role": "assistant",
                    "content": "Done.",
                    "tool_calls": [call("finish", '{"message": "Mended."}', "c2")],
                },
            ],
            "tools": [tool, finish],
            "resolved": 1,
        }
        out, report = converted(tmp_path, "openhands", row, {**row, "resolved": 0})
        assert report.splitlines()[0] == "converted 1 of 2 rows"
        assert "failed (resolved is false)" in report
        assert out[0]["tools"] == [BASH]
        assert out[0]["messages"][2:] == [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [call("execute_bash", '{"command": "ls"}', "c1")],
            },
            {
                "role": "tool",
                "name": "execute_bash",
                "tool_call_id": "c1",
                "content": "a.py",
            },
            {"role": "assistant", "content": "Done.\n\nMended."},
        ]

    @pytest.mark.parametrize(
        ("said", "reason"),
        [
            ("<execute_bash>\nls\n</execute_bash>", "before 0.14"),
            ("<function=execute_bash>\n</function>\nand then", "text behind its call"),
            ("<function=execute_bash>\n</function>", "calls 'execute_bash' with nothing"),
            ("<function=rm>\n</function>", "calls 'rm', but the tools are execute_bash, view"),
            (
                "<function=view>\n<parameter=path>a</parameter>\n<parameter=view_range>1 to 9"
                "</parameter>\n</function>",
                "parameter 'view_range', of type array, is not JSON",
            ),
        ],
    )
    def test_what_cannot_be_converted_is_counted(self, tmp_path, said, reason):
        messages = [*self.ROW["messages"][:2], {"role": "assistant", "content": said}]
        out, report = converted(tmp_path, "openhands", self.ROW, {"messages": messages})
        assert len(out) == 1 and reason in report and "(row 2)" in report


def action(id, kind, name=None, arguments=None, text="", response=None, calls=(), **args):
    """An event of the agent; with a name, as a model with function calling made it."""
    event = {"id": id, "source": "agent", "action": kind, "args": args}
    if name is not None:
        made = list(calls) or [call(name, json.dumps(arguments), f"c{id}")]
        event["tool_call_metadata"] = {
            "function_name": name,
            "tool_call_id": f"c{id}",
            "model_response": {
                "id": response or f"r{id}",
                "choices": [
                    {"message": {"role": "assistant", "content": text, "tool_calls": made}}
                ],
            },
            "total_calls_in_response": len(made),
        }
    return event


def observation(cause, kind, content):
    return {"id": 99, "source": "agent", "observation": kind, "content": content, "cause": cause}


USER = {"id": 1, "source": "user", "action": "message", "args": {"content": "Mend it."}}
STATE = {"id": 0, "source": "environment", "observation": "agent_state_changed", "content": ""}


class TestOpenHandsEvents:
    EVENTS = [
        {"id": 0, "action": "system", "args": {"content": "You are an agent.", "tools": [BASH]}},
        STATE,
        USER,
        action(3, "run", "execute_bash", {"command": "ls"}, "I look.", command="ls", thought="?"),
        observation(3, "run", "a.py"),
        action(5, "finish", "finish", {"message": "Mended."}, "Done.", final_thought="Mended."),
    ]
    MESSAGES = [
        {"role": "system", "content": "You are an agent."},
        {"role": "user", "content": "Mend it."},
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [call("execute_bash", '{"command": "ls"}', "c3")],
        },
        {"role": "tool", "name": "execute_bash", "tool_call_id": "c3", "content": "a.py"},
        {"role": "assistant", "content": "Done.\n\nMended."},
    ]

    @pytest.mark.parametrize("shape", ["history", "row", "file"])
    def test_wherever_they_are(self, tmp_path, shape):
        if shape == "file":
            ((row,), _) = converted(tmp_path, "openhands", self.EVENTS, name="events.json")
        else:
            source = {"instance_id": "x", "history": self.EVENTS}
            ((row,), _) = converted(
                tmp_path, "openhands", source if shape == "history" else self.EVENTS
            )
        assert row["messages"] == self.MESSAGES
        assert row["tools"] == [BASH]

    def test_calls_of_one_response_are_one_turn(self, tmp_path):
        calls = [
            call("execute_bash", json.dumps({"command": c}), i)
            for c, i in (("a", "c2"), ("b", "c3"))
        ]
        events = [
            USER,
            action(2, "run", "execute_bash", response="r", calls=calls, command="a"),
            action(3, "run", "execute_bash", response="r", calls=calls, command="b"),
            observation(3, "run", "B"),
            observation(2, "error", "A"),
            {"id": 6, "source": "agent", "action": "message", "args": {"content": "Done."}},
        ]
        ((row,), _) = converted(tmp_path, "openhands", events)
        _, shown, _ = to_demonstration(row, call_format("hermes"))
        assert [m["content"] for m in shown[1:]] == ["A", "B", "Done."]
        assert len(shown) == 4

    def test_pairs_of_before_function_calling(self, tmp_path):
        pairs = [
            [USER, {"id": -1, "observation": "null", "content": "", "extras": {}}],
            [
                action(5, "run_ipython", code="1+1", thought="I add."),
                observation(5, "run_ipython", "2"),
            ],
            [action(7, "finish", thought="Done.", outputs={}), STATE],
        ]
        ((row,), _) = converted(tmp_path, "openhands", {"instance_id": "old", "history": pairs})
        assert row["messages"][1:] == [
            {
                "role": "assistant",
                "content": "I add.",
                "tool_calls": [call("execute_ipython_cell", {"code": "1+1"})],
            },
            {"role": "tool", "name": "execute_ipython_cell", "content": "2"},
            {"role": "assistant", "content": "Done."},
        ]

    def test_what_cannot_be_converted_is_counted(self, tmp_path):
        rows = [
            {"history": self.EVENTS},
            {"history": self.EVENTS, "error": "ran out of steps"},
            {"history": self.EVENTS, "test_result": {"report": {"resolved": False}}},
            {"history": [USER, action(2, "browse", url="x")]},
            {"history": [USER, observation(2, "run", "x")]},
            {"history": self.EVENTS[:3]},
            {"history": [{"kinds": "MessageEvent"}]},
            {"history": [USER, {**self.EVENTS[3], "tool_call_metadata": {"model_response": {}}}]},
            {"history": []},
        ]
        out, report = converted(tmp_path, "openhands", *rows)
        assert len(out) == 1
        for row, reason in enumerate(
            [
                "has an error",
                "resolved is false",
                "the action 'browse' has no tool_call_metadata",
                "the observation 'run' answers no call",
                "has no assistant message",
                "unknown kind of item with the keys kinds",
                "not as openhands writes it (KeyError('choices'))",
                "has no list 'messages', 'history'",
            ],
            start=2,
        ):
            assert any(reason in line and f"(row {row})" in line for line in report.splitlines())


def text(text):
    return [{"type": "text", "text": text}]


def sdk_action(id, command, thought=()):
    made = {"id": id, "name": "terminal", "arguments": json.dumps({"command": command})}
    event = {"kind": "ActionEvent", "source": "agent", "tool_name": "terminal", "tool_call": made}
    return {**event, "tool_call_id": id, "thought": list(thought), "action": {"command": command}}


class TestOpenHandsSDKEvents:
    """As its SDK writes them since 1.0."""

    FINISH = {"id": "c4", "name": "finish", "arguments": '{"message": "Mended."}'}
    EVENTS = [
        {"kind": "SystemPromptEvent", "source": "agent", "system_prompt": text("You help.")[0]},
        {"kind": "MessageEvent", "source": "user", "llm_message": {"content": text("Mend it.")}},
        {"kind": "ConversationStateUpdateEvent", "key": "full_state", "value": {}},
        sdk_action("c1", "ls", text("I look.")),
        sdk_action("c2", "rm x"),
        {"kind": "AgentErrorEvent", "tool_name": "terminal", "tool_call_id": "c2", "error": "No."},
        {
            "kind": "ObservationEvent",
            "tool_name": "terminal",
            "tool_call_id": "c1",
            "observation": {"content": text("a.py"), "is_error": False},
        },
        {
            "kind": "ActionEvent",
            "tool_call": FINISH,
            "tool_call_id": "c4",
            "thought": text("Done."),
        },
    ]

    def test_calls_of_one_response_are_one_turn(self, tmp_path):
        ((row,), _) = converted(tmp_path, "openhands", {"history": self.EVENTS})
        ((same,), _) = converted(tmp_path, "openhands", self.EVENTS, name="events.json")
        assert row == same
        assert row["messages"][:3] == [
            {"role": "system", "content": "You help."},
            {"role": "user", "content": "Mend it."},
            {
                "role": "assistant",
                "content": "I look.",
                "tool_calls": [
                    call("terminal", '{"command": "ls"}', "c1"),
                    call("terminal", '{"command": "rm x"}', "c2"),
                ],
            },
        ]
        _, shown, _ = to_demonstration(row, call_format("hermes"))
        assert [m["content"] for m in shown[1:]] == ["a.py", "No.", "Done.\n\nMended."]

    def test_an_unknown_event_is_counted(self, tmp_path):
        rows = [{"history": [*self.EVENTS, {"kind": kind}]} for kind in ("TokenEvent", "NewEvent")]
        out, report = converted(tmp_path, "openhands", *rows)
        assert len(out) == 1 and "unknown event 'NewEvent' (row 2)" in report


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("openhands", {"history": TestOpenHandsSDKEvents.EVENTS}),
        ("sharegpt", TestShareGPT.ROW),
        ("openhands", TestOpenHandsMessages.ROW),
        ("openhands", {"history": TestOpenHandsEvents.EVENTS, "report": {"resolved": True}}),
    ],
    ids=["sdk", "sharegpt", "messages", "events"],
)
def test_whatever_stands_in_a_rows_place_is_written_or_counted(tmp_path, kind, row):
    rows = [row, *with_junk(row)]
    out, report = converted(tmp_path, kind, *map(json.dumps, rows))
    assert report.startswith(f"converted {len(out)} of {len(rows)} rows")
    assert 10 < len(out) < len(rows) / 2


class TestFiles:
    def test_json_lists_and_parquet(self, tmp_path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [TestShareGPT.ROW, {**TestShareGPT.ROW, "system": ""}]
        listed, _ = converted(tmp_path, "sharegpt", rows, name="in.json")
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
        convert(tmp_path / "in.parquet", tmp_path / "p.jsonl", "sharegpt")
        lines = (tmp_path / "p.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == listed and len(listed) == 2

    def test_what_is_refused_leaves_no_file(self, tmp_path, capsys):
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        assert main(["convert", str(source), str(target), "--from", "sharegpt"]) == 2
        assert f"{source}: no such file" in capsys.readouterr().err
        source.write_text("{}\n")
        with pytest.raises(DataError, match=r"nothing to write .*\n.*\n?.*left out 1: has no list"):
            convert(source, target, "sharegpt")
        assert list(tmp_path.iterdir()) == [source]
        target.write_text("mine")
        with pytest.raises(DataError, match="exists: remove it"):
            convert(source, target, "sharegpt")
        assert target.read_text() == "mine"
        (tmp_path / "in.json").write_text("{}\n{}")
        with pytest.raises(DataError, match=r"use the ending \.jsonl"):
            convert(tmp_path / "in.json", tmp_path / "other.jsonl", "sharegpt")


def test_text_that_utf8_does_not_have_is_kept_as_escapes(tmp_path):
    row = json.loads(json.dumps(TestShareGPT.ROW))
    row["conversations"][-1]["value"] = "bad \ud800"
    (made,), _ = converted(tmp_path, "sharegpt", row)
    assert "bad \ud800" in json.dumps(made, ensure_ascii=False)
