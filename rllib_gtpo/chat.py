"""Messages to token ids and back, exactly and incrementally.

What the policy sampled is never tokenised again: the prompt of turn k+1 is the prompt of turn k,
plus the ids sampled in turn k, plus the ids of what the template puts between the end of an
assistant turn and the next generation ("the delta").  The delta is derived from the template
itself, and the template is checked once, at start, for being one for which that is possible.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rllib_gtpo.errors import ChatTemplateError, ConfigError
from rllib_gtpo.types import Message, ToolCall

_THINKING = re.compile(r"<think>(.*?)(?:</think>|\Z)", re.DOTALL)
_PROBE = "zxqv probe zxqv"  # an assistant text that no template changes and no other part contains


@dataclass(slots=True)
class ParsedTurn:
    """A turn's text taken apart."""

    content: str
    thinking: str = ""
    calls: list[ToolCall] = field(default_factory=list)


class CallFormat(Protocol):
    """How the policy writes tool calls."""

    name: str

    def parse(self, text: str, tools: Sequence[dict[str, Any]]) -> ParsedTurn:
        """Finds the calls; a call that cannot be read is returned with its `error` set."""
        ...

    def write(self, call: ToolCall) -> str:
        """The call as the policy should write it; what the format cannot say parses to another."""
        ...


class HermesFormat:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as Qwen and Hermes models write
    it."""

    name = "hermes"
    _CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)

    def parse(self, text: str, tools: Sequence[dict[str, Any]]) -> ParsedTurn:
        """See CallFormat."""
        body, thinking = _without_thinking(text)
        calls = [
            self._call(m.group(1), m.group(0), bool(m.group(2))) for m in self._CALL.finditer(body)
        ]
        return ParsedTurn(self._CALL.sub("", body).strip(), thinking, calls)

    def write(self, call: ToolCall) -> str:
        """See CallFormat."""
        data = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
        return f"<tool_call>\n{data}\n</tool_call>"

    def _call(self, inner: str, raw: str, closed: bool) -> ToolCall:
        if not closed:
            return ToolCall("", raw=raw, error="the call is not closed; end it with </tool_call>")
        try:
            data = json.loads(inner)
        except (ValueError, RecursionError) as error:
            return ToolCall("", raw=raw, error=f"the call is not JSON: {error}")
        if not isinstance(data, dict) or not isinstance(data.get("name"), str):
            return ToolCall("", raw=raw, error='the call must be {"name": ..., "arguments": {...}}')
        arguments = data.get("arguments", {})
        if not isinstance(arguments, dict):
            return ToolCall(data["name"], raw=raw, error='"arguments" must be an object')
        return ToolCall(data["name"], arguments, raw)


class FencedFormat:
    """A fenced code block whose language is a tool's name; its text is the tool's first parameter.

    A block in another language is a call only by mistake: it counts (as invalid) where it ends the
    turn and no valid call is there.  A fence of a tool that is never closed is invalid.
    """

    name = "fenced"
    _FENCE = re.compile(r"```([^\n`]*)\n(.*?)(?:\n?```|(\Z))", re.DOTALL)

    def parse(self, text: str, tools: Sequence[dict[str, Any]]) -> ParsedTurn:
        """See CallFormat."""
        body, thinking = _without_thinking(text)
        parameters = {t["function"]["name"]: _first_parameter(t) for t in tools}
        found: list[tuple[re.Match[str], ToolCall]] = []
        stray: tuple[re.Match[str], ToolCall] | None = None
        end = len(body.rstrip())
        for match in self._FENCE.finditer(body):
            language, code, unclosed = (
                match.group(1).strip(),
                match.group(2),
                match.group(3) is not None,
            )
            if language in parameters and not unclosed:
                call = ToolCall(language, {parameters[language]: code}, match.group(0))
                found.append((match, call))
            elif language in parameters:
                error = "the block is not closed with ```"
                found.append((match, ToolCall(language, raw=match.group(0), error=error)))
            elif match.end() >= end:
                known = ", ".join(f"```{name}" for name in parameters)
                error = f"{language!r} is not a tool; start the block with {known}"
                stray = match, ToolCall(language, raw=match.group(0), error=error)
        if not found and stray is not None and parameters:
            found.append(stray)
        starts = [0, *(match.end() for match, _ in found)]
        ends = [*(match.start() for match, _ in found), len(body)]
        content = "".join(body[start:end] for start, end in zip(starts, ends, strict=True))
        return ParsedTurn(content.strip(), thinking, [call for _, call in found])

    def write(self, call: ToolCall) -> str:
        """See CallFormat."""
        return f"```{call.name}\n{next(iter(call.arguments.values()), '')}\n```"


_FORMATS: dict[str, CallFormat] = {f.name: f for f in (HermesFormat(), FencedFormat())}


def call_format(name: str) -> CallFormat:
    """The call format of that name."""
    if name not in _FORMATS:
        raise ConfigError(f"call_format={name!r} is unknown; use one of {', '.join(_FORMATS)}.")
    return _FORMATS[name]


def _without_thinking(text: str) -> tuple[str, str]:
    thinking = "".join(m.group(1) for m in _THINKING.finditer(text))
    return _THINKING.sub("", text), thinking


def _first_parameter(tool: dict[str, Any]) -> str:
    properties = tool["function"].get("parameters", {}).get("properties", {})
    return next(iter(properties), "")


class ChatCodec:
    """A tokenizer and its template, as incremental prompts.

    Raises ChatTemplateError when made if the template cannot be continued exactly, with the reason.
    """

    def __init__(self, tokenizer: Any, call_format_name: str = "hermes") -> None:
        self.tokenizer = tokenizer
        self.call_format = call_format(call_format_name)
        if not getattr(tokenizer, "chat_template", None):
            raise ChatTemplateError(
                f"The tokenizer {tokenizer.name_or_path!r} has no chat template: use an "
                "instruction-tuned "
                "model, or set chat_template= to a template's text or file."
            )
        self.end_of_turn_id = self._end_of_turn()
        stop = {self.end_of_turn_id, tokenizer.eos_token_id} - {None}
        self.stop_token_ids: tuple[int, ...] = tuple(sorted(stop))
        self._delta_ids: dict[str, list[int]] = {}
        self._verify()

    def prompt_ids(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()
    ) -> list[int]:
        """The ids of a whole conversation, ready for the policy's next turn.

        Templates explain tools in the hermes format: in another one the task's own messages must.
        """
        shown = tools if self.call_format.name == "hermes" else ()
        return self._encode(self._render(messages, shown, generate=True))

    def delta_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids between the end of a turn and the next one, with `messages` in between."""
        key = json.dumps(messages, sort_keys=True, default=str)
        if key not in self._delta_ids:
            if len(self._delta_ids) > 4096:
                self._delta_ids.clear()
            self._delta_ids[key] = self._encode(self._delta_text(messages))
        return list(self._delta_ids[key])

    def conversation_ids(
        self,
        messages: Sequence[Message],
        demonstration: Sequence[Message],
        tools: Sequence[dict[str, Any]] = (),
    ) -> tuple[list[int], list[bool]]:
        """A demonstration as ids, and for each id whether an assistant wrote it.

        Built from prompts and deltas just as a rollout is, so that supervised training sees the
        very token stream that rollouts produce.
        """
        ids = self.prompt_ids(messages, tools)
        trained = [False] * len(ids)
        between: list[Message] = []
        started = False
        for message in demonstration:
            if message["role"] != "assistant":
                between.append(message)
                continue
            if started:
                delta = self.delta_ids(between)
                ids += delta
                trained += [False] * len(delta)
            elif between:
                raise ChatTemplateError("A demonstration starts with an assistant message.")
            sampled = [*self._encode(message["content"]), self.end_of_turn_id]
            ids += sampled
            trained += [True] * len(sampled)
            started, between = True, []
        return ids, trained

    def decode(self, token_ids: Sequence[int]) -> str:
        """A turn's text without its stop token."""
        if token_ids and token_ids[-1] in self.stop_token_ids:
            token_ids = token_ids[:-1]
        text: str = self.tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _render(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), *, generate: bool
    ) -> str:
        text: str = self.tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            add_generation_prompt=generate,
            tokenize=False,
        )
        return text

    def _end_of_turn(self) -> int:
        """The special token that the template puts right behind an assistant's text."""
        conversation = [_user("probe"), _assistant(_PROBE)]
        _, found, after = self._render(conversation, generate=False).partition(_PROBE)
        ids = self._encode(after)
        if not found or not ids:
            raise ChatTemplateError(
                "The chat template does not close an assistant's message verbatim."
            )
        if ids[0] not in self._special_ids():
            raise ChatTemplateError(
                f"The chat template closes an assistant's message with {after!r}, which does "
                "not start with a "
                "special token, so the end of a turn cannot be sampled as one token."
            )
        return ids[0]

    def _special_ids(self) -> set[int]:
        added = self.tokenizer.added_tokens_decoder
        return set(self.tokenizer.all_special_ids) | {i for i, t in added.items() if t.special}

    def _delta_text(self, messages: Sequence[Message]) -> str:
        text = self._render([_user("probe"), _assistant(_PROBE), *messages], generate=True)
        _, found, after = text.partition(_PROBE)
        end = self.tokenizer.decode([self.end_of_turn_id])
        if not found or not after.startswith(end):
            raise ChatTemplateError(
                "The chat template changes an assistant's message when others follow."
            )
        return after[len(end) :]

    def _verify(self) -> None:
        """Refuses a template that rewrites what came before (strips, trims, merges or
        re-orders)."""
        first = [_user("one"), _assistant("two")]
        answer = [{"role": "tool", "name": "probe", "content": "three"}]
        try:
            whole = self._render([*first, *answer, _assistant("four"), *answer], generate=True)
            end = self.tokenizer.decode([self.end_of_turn_id])
            delta = self._delta_text(answer)
            pieces = (
                self._render(first[:1], generate=True) + "two" + end + delta + "four" + end + delta
            )
        except ChatTemplateError:
            raise
        except Exception as error:
            raise ChatTemplateError(
                f"The chat template cannot render a conversation with tool messages: {error}"
            ) from error
        if whole != pieces:
            at = next(
                (i for i, (a, b) in enumerate(zip(whole, pieces, strict=False)) if a != b),
                min(len(whole), len(pieces)),
            )
            raise ChatTemplateError(
                "The chat template cannot be continued exactly: rendered as a whole it has "
                f"{whole[at : at + 40]!r} where turn by turn it has {pieces[at : at + 40]!r}. "
                "Set chat_template= to one that leaves earlier messages alone."
            )


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}
