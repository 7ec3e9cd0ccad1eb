"""OpenHands: messages with calls, or lists of events.

Messages are found under "messages" or "trajectory", with calls as `tool_calls` or written as
<function=...>.  Events, with "action" or "observation" (since version 1 of a "kind"), are found
under "history", "trajectory" or "events", or are the row itself.

What tells the model of <function=...> is taken out of the prompt, and the tools it describes become
`tools`.  A call of `finish` becomes the final answer.
"""

from __future__ import annotations

import re
from typing import Any

from rllib_gtpo.trace_formats.common import decoded, say, tool_call, trajectory_row
from rllib_gtpo.traces import UnusableRow, text_of
from rllib_gtpo.types import Message

_FINISH = "finish"
_BEFORE_FUNCTIONS = re.compile(r"<execute_(?:bash|ipython|browse)>")
_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)(?:</function>|(?:</(?:function)?)?\Z)", re.S)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>(.*?)</parameter>", re.S)
_RESULT = re.compile(r"EXECUTION RESULT of \[(.*?)\]:\n?(.*)", re.S)
_TOOL_PROMPT = re.compile(
    r"\n?You have access to the following functions:\n(.*?)</IMPORTANT>\n?", re.S
)
_EXAMPLE = re.compile(r"Here's a running example .*?-{5,} NEW TASK DESCRIPTION -{5,}\n", re.S)
_AFTER_TASK = re.compile(r"\n?-{5,} END OF NEW TASK DESCRIPTION -{5,}\n.*", re.S)
_DESCRIBED = re.compile(
    r"---- BEGIN FUNCTION #\d+: (.+?) ----\nDescription: (.*?)\n"
    r"(?:Parameters:\n(.*?)|No parameters are required for this function\.\n)"
    r"---- END FUNCTION #\d+ ----",
    re.S,
)
_DESCRIBED_PARAMETER = re.compile(
    r"^  \(\d+\) (\S+) \((\w+), (required|optional)\): (.*?)(?=^  \(\d+\) |\Z)", re.S | re.M
)
_BOOKKEEPING = {"agent_state_changed", "change_agent_state", "null", "recall", "condensation"}
_SDK_BOOKKEEPING = {"ConversationStateUpdateEvent", "TokenEvent", "PauseEvent"}
_TOOL_OF_ACTION = {
    "run": ("execute_bash", "command"),
    "run_ipython": ("execute_ipython_cell", "code"),
}


def from_openhands(row: Any) -> dict[str, Any]:
    """A row of an OpenHands dataset or evaluation output, or the events of one conversation."""
    own = row if isinstance(row, dict) else {}
    found = [own.get(key) for key in ("messages", "history", "trajectory", "events")]
    items = next((f for f in found if isinstance(f, list) and f), None)
    items = row if isinstance(row, list) else items
    if not items:
        raise UnusableRow("has no list 'messages', 'history', 'trajectory' or 'events'.")
    if isinstance(items[0], list):  # OpenHands before 0.9 kept pairs of action and observation
        items = [event for pair in items for event in pair]
    if not all(isinstance(item, dict) for item in items):
        raise UnusableRow("an item of its list is not an object.")
    tools = decoded(own.get("tools") or None, "tools")
    if "role" in items[0]:
        return trajectory_row(own, *_of_messages(items, tools))
    if str(items[0].get("kind", "")).endswith("Event"):
        return trajectory_row(own, _of_sdk_events(items), tools)
    if "action" in items[0] or "observation" in items[0]:
        messages, shown = _of_events(items)
        return trajectory_row(own, messages, tools or shown)
    raise UnusableRow(f"unknown kind of item with the keys {', '.join(sorted(items[0]))}.")


def _of_messages(items: list[dict[str, Any]], tools: Any) -> tuple[list[Message], Any]:
    messages: list[Message] = []
    for number, item in enumerate(items, start=1):
        role, text = item.get("role"), text_of(item.get("content"), number)
        if role == "system":
            described = _TOOL_PROMPT.search(text)
            if described:
                tools = tools or _described_tools(described.group(1))
                text = text.replace(described.group(0), "")
            messages.append({"role": role, "content": text})
        elif role == "user":
            result = _RESULT.match(text)
            if result and messages and messages[-1]["role"] in ("assistant", "tool"):
                messages.append({"role": "tool", "name": result[1], "content": result[2]})
            else:
                text = _AFTER_TASK.sub("", _EXAMPLE.sub("", text, count=1))
                messages.append({"role": role, "content": text})
        elif role == "tool":
            kept = {k: item[k] for k in ("name", "tool_call_id") if item.get(k) is not None}
            messages.append({"role": role, **kept, "content": text})
        elif role == "assistant":
            _assistant(messages, item, text, tools, number)
        else:
            raise UnusableRow(f"unknown role {role!r}.", number)
    return messages, _without_finish(tools)


def _assistant(
    messages: list[Message], item: dict[str, Any], text: str, tools: Any, number: int
) -> None:
    if _BEFORE_FUNCTIONS.search(text):
        raise UnusableRow("its calls are in the form of OpenHands before 0.14.", number)
    calls = [
        tool_call(c["function"]["name"], c["function"]["arguments"], c.get("id"))
        for c in item.get("tool_calls") or ()
    ]
    written = list(_FUNCTION.finditer(text))
    if written and _FUNCTION.sub("", text[written[0].start() :]).strip():
        raise UnusableRow("has text behind its call.", number)
    for match in written:
        calls.append(tool_call(match[1], _arguments(match, tools, number)))
    if written:
        text = text[: written[0].start()].strip()
    _say_or_finish(messages, text, calls, number)


def _say_or_finish(
    messages: list[Message], text: str, calls: list[dict[str, Any]], number: int
) -> None:
    last = calls[-1]["function"] if calls else {}
    if last.get("name") == _FINISH:
        if len(calls) > 1:
            raise UnusableRow("calls finish together with something else.", number)
        message = (decoded(last["arguments"], "the call of finish", number) or {}).get("message")
        text, calls = "\n\n".join(t for t in (text, message) if t and t.strip()), []
    say(messages, text, calls)


def _arguments(match: re.Match[str], tools: Any, number: int) -> dict[str, Any]:
    schemas: dict[str, Any] = {}
    for tool in tools or ():
        function = tool.get("function", tool)
        if function.get("name") == match[1]:
            schemas = (function.get("parameters") or {}).get("properties") or {}
    arguments = {}
    for name, value in _PARAMETER.findall(match[2]):
        if len(value) > 1 and value[0] == value[-1] == "\n":  # how OpenHands sets off several lines
            value = value[1:-1]
        kind = (schemas.get(name) or {}).get("type", "string")
        if kind != "string":
            text = value.strip().lower() if kind == "boolean" else value
            value = decoded(text, f"parameter {name!r}, of type {kind},", number)
        arguments[name] = value
    return arguments


def _described_tools(text: str) -> list[dict[str, Any]]:
    """The tools of a system prompt that describes them in OpenHands' words."""
    tools = []
    for name, description, parameters in _DESCRIBED.findall(text):
        found = _DESCRIBED_PARAMETER.findall(parameters)
        schema = {
            "type": "object",
            "properties": {n: {"type": t, "description": d.strip()} for n, t, _, d in found},
            "required": [n for n, _, need, _ in found if need == "required"],
        }
        function = {"name": name, "description": description.strip(), "parameters": schema}
        tools.append({"type": "function", "function": function})
    return tools


def _without_finish(tools: Any) -> Any:
    return [t for t in tools or () if t.get("function", t).get("name") != _FINISH]


def _of_events(events: list[dict[str, Any]]) -> tuple[list[Message], Any]:
    messages: list[Message] = []
    tools: Any = None
    calls: dict[Any, tuple[str, Any]] = {}  # of the events that called: name and id of the call
    responses: set[Any] = set()
    for number, event in enumerate(events, start=1):
        kind = event.get("action") or event.get("observation")
        arguments = event.get("args") or {}
        if kind in _BOOKKEEPING:
            continue
        if "observation" in event:
            if event.get("cause") not in calls:
                raise UnusableRow(f"the observation {kind!r} answers no call.", number)
            name, id = calls[event["cause"]]
            ids = {} if id is None else {"tool_call_id": id}
            content = text_of(event.get("content"), number)
            messages.append({"role": "tool", "name": name, **ids, "content": content})
        elif kind == "system":
            tools = arguments.get("tools")
            messages.append({"role": "system", "content": arguments.get("content", "")})
        elif kind == "message" and event.get("source") == "user":
            messages.append({"role": "user", "content": arguments.get("content", "")})
        elif kind == "message":
            say(messages, arguments.get("content", ""), ())
        else:
            calls[event.get("id")] = _action(messages, event, responses, number)
    return messages, _without_finish(tools)


def _action(
    messages: list[Message], event: dict[str, Any], responses: set[Any], number: int
) -> tuple[str, Any]:
    """Adds the turn that an action belongs to, once; returns name and id of the action's call."""
    kind, arguments = event["action"], event.get("args") or {}
    made_by = event.get("tool_call_metadata")
    if made_by:
        response = made_by["model_response"]
        said = response["choices"][0]["message"]
        if response.get("id") is None or response["id"] not in responses:
            made = [
                tool_call(c["function"]["name"], c["function"]["arguments"], c.get("id"))
                for c in said.get("tool_calls") or ()
            ]
            _say_or_finish(messages, text_of(said.get("content"), number), made, number)
        responses.add(response.get("id"))
        return made_by["function_name"], made_by["tool_call_id"]
    thought = str(arguments.get("thought") or "")
    if kind == _FINISH:
        final = arguments.get("final_thought") or thought
        say(messages, str(final), ())
        return _FINISH, None
    if kind not in _TOOL_OF_ACTION:
        raise UnusableRow(f"the action {kind!r} has no tool_call_metadata.", number)
    tool, parameter = _TOOL_OF_ACTION[kind]
    say(messages, thought, [tool_call(tool, {parameter: arguments.get(parameter, "")})])
    return tool, None


def _of_sdk_events(events: list[dict[str, Any]]) -> list[Message]:
    """Messages of the SDK's events; the tools that it records are no JSON schemas."""
    messages: list[Message] = []
    for number, event in enumerate(events, start=1):
        kind = event.get("kind")
        if kind == "SystemPromptEvent":
            messages.append(
                {"role": "system", "content": text_of([event["system_prompt"]], number)}
            )
        elif kind == "MessageEvent":
            text = text_of(event["llm_message"]["content"], number)
            if event["source"] == "agent":
                say(messages, text, ())
            else:
                messages.append({"role": "user", "content": text})
        elif kind == "ActionEvent":
            made = event["tool_call"]
            call = tool_call(made["name"], made["arguments"], event["tool_call_id"])
            _say_or_finish(messages, text_of(event.get("thought"), number), [call], number)
        elif kind in ("ObservationEvent", "AgentErrorEvent"):
            found = event["observation"]["content"] if "observation" in event else event["error"]
            ids = {"name": event["tool_name"], "tool_call_id": event["tool_call_id"]}
            messages.append({"role": "tool", **ids, "content": text_of(found, number)})
        elif kind not in _SDK_BOOKKEEPING:
            raise UnusableRow(f"unknown event {kind!r}.", number)
    return messages
