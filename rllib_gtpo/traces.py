"""Rows of a trajectory file as demonstrations, in the very words that a rollout would use.

A row is one line of JSON in OpenAI's form (here on several lines to be read):

    {"messages": [
      {"role": "user", "content": "What is 2**10?"},
      {"role": "assistant", "content": "Let me see.", "tool_calls": [
        {"function": {"name": "python", "arguments": "{\\"code\\": \\"print(2**10)\\"}"}}]},
      {"role": "tool", "content": "1024"},
      {"role": "assistant", "content": "1024"}]}

Besides `messages` a row may have
    tools   JSON schemas for the prompt, [] for none; else the environment's, as in its rollouts.
    system  a system message; else the environment's.
    task    a row of the environment; its prompt goes before messages that begin with the assistant.
Other keys are for people.  An assistant message without `tool_calls` is taken as it is written.
Tool messages answer calls in the order of the calls, or by `tool_call_id` where all have one.
rllib_gtpo.trace_formats.recognise makes such rows of others.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rllib_gtpo.chat import CallFormat
from rllib_gtpo.env import ToolEnv
from rllib_gtpo.errors import DataError
from rllib_gtpo.types import Message, ToolCall

Tools = list[dict[str, Any]]
_Calls = list[tuple[str | None, ToolCall]]  # with their ids, where they have any
Demonstration = tuple[list[Message], list[Message], Tools]
"""Prompt, what came after it, and the tools that the prompt shows."""

_FORM = 'expected {"messages": [{"role": ..., "content": ...}, ...]}, one object a line'
_CONVERT = "`rllib convert` makes it of ShareGPT and OpenHands traces"
_THOUGHT = "\n</think>\n\n"
_ROLES = ("system", "user", "assistant", "tool")


class UnusableRow(DataError):
    """Why a row cannot be used, and in which of its messages (from 1) the reason lies."""

    def __init__(self, reason: str, message: int | None = None) -> None:
        super().__init__(reason if message is None else f"message {message}: {reason}")
        self.reason = reason


@dataclass
class _Said:
    """A message, its calls with the ids that they were given, and the tool messages behind it."""

    number: int
    role: str
    text: str
    calls: _Calls = field(default_factory=list)
    answers: list[Message] = field(default_factory=list)


def to_demonstration(
    row: Any, call_format: CallFormat, env: ToolEnv | None = None
) -> Demonstration:
    """What a row shows, with its calls written in `call_format`; UnusableRow says what is wrong.

    Without an environment, calls are checked against the row's own `tools`, if it has them.
    """
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise UnusableRow(f"{_FORM}; {_CONVERT}.")
    tools = _tools(row.get("tools"), [] if env is None else env.tool_schemas)
    said = _read(row["messages"])
    spoken = [index for index, one in enumerate(said) if one.role == "assistant"]
    if not spoken:
        raise UnusableRow("has no assistant message, so there is nothing to learn from.")
    first, last = spoken[0], spoken[-1]
    prompt = _prompt(row, [_plain(one) for one in said[:first]], env)
    shown: list[Message] = []
    for index, one in enumerate(said[first : last + 1], start=first):
        if one.role != "assistant":
            shown.append(_plain(one))
            continue
        text, calls = _written(one, call_format, tools)
        shown.append({"role": "assistant", "content": text})
        if index == last:
            break
        shown += _answers(one, calls, call_format)
        if shown[-1]["role"] == said[index + 1].role == "assistant":
            raise UnusableRow("another assistant message follows at once: join them.", one.number)
    return prompt, shown, tools


def text_of(content: Any, number: int | None = None) -> str:
    """The text of a message's content: a string, a list of text parts, or nothing."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "\n".join(part["text"] for part in content)
    raise UnusableRow("its content is not text.", number)


def _plain(one: _Said) -> Message:
    return {"role": one.role, "content": one.text}


def _read(messages: Sequence[Any]) -> list[_Said]:
    said: list[_Said] = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise UnusableRow(f"role {role!r}: use one of {', '.join(_ROLES)}.", number)
        if "content" not in message and not message.get("tool_calls"):
            raise UnusableRow(f"has no content: {_FORM}.", number)
        text = text_of(message.get("content"), number)
        if message["role"] == "tool":
            if not said or said[-1].role != "assistant":
                raise UnusableRow("a tool answers where no assistant message comes before.", number)
            said[-1].answers.append({**message, "content": text})
            continue
        one = _Said(number, message["role"], text)
        if message["role"] == "assistant":
            one.text = _thinking(message.get("reasoning_content")) + text
            calls = message.get("tool_calls") or []
            if not isinstance(calls, list):
                raise UnusableRow("tool_calls is not a list.", number)
            one.calls = [_call(call, number) for call in calls]
            if message.get("function_call"):
                raise UnusableRow("function_call is OpenAI's old form: use tool_calls.", number)
            if message.get("weight", 1) != 1:
                raise UnusableRow("has a weight, but all that it says is trained.", number)
            if not one.calls and not one.text.strip():
                raise UnusableRow("is empty: give it content or tool_calls.", number)
        said.append(one)
    return said


def _thinking(reasoning: Any) -> str:
    """As Qwen's and other templates write it."""
    if not isinstance(reasoning, str) or not reasoning.strip():
        return ""
    return f"<think>\n{reasoning.strip()}{_THOUGHT}"


def _call(call: Any, number: int) -> tuple[str | None, ToolCall]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        form = '{"id": ..., "function": {"name": ..., "arguments": ...}}'
        raise UnusableRow(f"a call is not of the form {form}.", number)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise UnusableRow("the arguments of a call are not a JSON object.", number)
    return _id(call.get("id")), ToolCall(function["name"], arguments)


def _id(given: Any) -> str | None:
    return None if given is None else str(given)


def _tools(given: Any, default: Tools) -> Tools:
    """The row's tools in the form that templates take."""
    if given is None:
        return default
    if not isinstance(given, list):
        raise UnusableRow(
            "tools must be a list of JSON schemas; where they are text, take what it encodes."
        )
    tools = [t if isinstance(t, dict) and "function" in t else {"function": t} for t in given]
    if not all(_is_schema(tool["function"]) for tool in tools):
        form = '{"function": {"name": ..., "parameters": a JSON schema of an object}}'
        raise UnusableRow(f"a tool is not of the form {form}.")
    return [{"type": "function", **tool} for tool in tools]


def _is_schema(function: Any) -> bool:
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return False
    parameters = function.get("parameters") or {}
    if not isinstance(parameters, dict):
        return False
    properties, required = parameters.get("properties") or {}, parameters.get("required") or []
    texts = isinstance(required, list) and all(isinstance(name, str) for name in required)
    return isinstance(properties, dict) and texts


def _prompt(row: dict[str, Any], before: list[Message], env: ToolEnv | None) -> list[Message]:
    system = row.get("system")
    if system is not None and (not isinstance(system, str) or not system):
        raise UnusableRow("system must be text.")
    if not before:
        if env is None or not isinstance(row.get("task"), dict):
            raise UnusableRow(
                "begins with the assistant: put the problem in front as a user message, or give "
                "the environment's row as 'task'."
            )
        if system is not None:
            raise UnusableRow("has 'system', but with 'task' the environment makes the prompt.")
        try:
            return env.first_messages(row["task"])
        except Exception as error:  # a task of another environment raises what it likes
            raise UnusableRow(
                f"the environment makes no prompt of its 'task': {error!r}"
            ) from error
    if before[0]["role"] == "system":
        if system is not None:
            raise UnusableRow("has 'system' and a system message: leave out one.")
        return before
    if system is None and env is not None:
        system = env.system
    return before if system is None else [{"role": "system", "content": system}, *before]


def _written(one: _Said, call_format: CallFormat, tools: Tools) -> tuple[str, _Calls]:
    """What the policy should have written, and its calls."""
    if not one.calls:
        return one.text, [(None, call) for call in call_format.parse(one.text, tools).calls]
    for _, call in one.calls:
        _check(call, tools, one.number)
    said = one.text if one.text.strip() else ""
    if said and not said.endswith(_THOUGHT):
        said += "\n"
    text = said + call_format.write_all([call for _, call in one.calls])
    read = call_format.parse(text, tools).calls
    if [(c.name, c.arguments) for c in read] != [(c.name, c.arguments) for _, c in one.calls]:
        raise UnusableRow(
            f"its calls cannot be written in the format {call_format.name!r}, which would read "
            f"something else in {_short(text)}: change or leave out the row"
            + (", or use call_format='hermes'." if call_format.name != "hermes" else "."),
            one.number,
        )
    return text, one.calls


def _check(call: ToolCall, tools: Tools, number: int) -> None:
    """Refuses a call that the environment would refuse, too."""
    if not tools:
        return
    by_name = {tool["function"]["name"]: tool["function"] for tool in tools}
    if call.name not in by_name:
        raise UnusableRow(
            f"calls {call.name!r}, but the tools are {', '.join(by_name)}: rename it, or give the "
            "row its own 'tools'.",
            number,
        )
    parameters = by_name[call.name].get("parameters") or {}
    known = parameters.get("properties") or {}
    wrong = [n for n in call.arguments if known and n not in known]
    wrong += [n for n in parameters.get("required") or () if n not in call.arguments]
    if wrong:
        raise UnusableRow(
            f"calls {call.name!r} with {', '.join(call.arguments) or 'nothing'}, but it takes "
            f"{', '.join(known)}: rename the arguments, or give the row its own 'tools'.",
            number,
        )


def _answers(one: _Said, calls: _Calls, call_format: CallFormat) -> list[Message]:
    """The tools' messages as rollouts write them: one for each call, in the order of the calls."""
    answers = one.answers
    if answers and not calls:
        raise UnusableRow(
            f"a tool answers, but there is no call in the format {call_format.name!r}: use "
            "'tool_calls', which are written in the run's format.",
            one.number,
        )
    if len(answers) != len(calls):
        raise UnusableRow(
            f"{len(calls)} calls, but {len(answers)} tool messages: each call needs one.",
            one.number,
        )
    ids = [name for name, _ in calls]
    by_id = {_id(answer.get("tool_call_id")): answer for answer in answers}
    if None not in by_id and None not in ids:
        if set(by_id) != set(ids) or len(by_id) != len(calls):
            raise UnusableRow(
                "tool_call_id of its answers are not the ids of its calls.", one.number
            )
        answers = [by_id[name] for name in ids]
    return [
        {"role": "tool", "name": call.name, "content": answer["content"]}
        for (_, call), answer in zip(calls, answers, strict=True)
    ]


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
