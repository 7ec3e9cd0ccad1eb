"""Messages to token ids and back, exactly and incrementally.

What the policy sampled is never tokenised again: the prompt of turn k+1 is the prompt of turn k,
plus the ids sampled in turn k, plus the ids of what the template puts between the end of an
assistant turn and the next generation ("the delta").  The delta is derived from the template
itself, and the template is checked once, at start, for being one for which that is possible.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rllib_gtpo.chat.formats import THINKING, ParsedTurn, call_format, native_format
from rllib_gtpo.chat.template import ChatTemplate, assistant
from rllib_gtpo.chat.verify import find_deviations
from rllib_gtpo.encodable import encodable
from rllib_gtpo.errors import ChatTemplateError
from rllib_gtpo.types import Message

_REMEMBERED = 4096  # deltas
_LATELY = 512  # prompts and texts that are asked for again at once: of a group's members, of a turn
_TAIL = 64  # tokens that surely hold the header of a turn


class ChatCodec:
    """A tokenizer and its template, as incremental prompts.

    Raises ChatTemplateError when made if the template cannot be continued exactly, with the reason.
    `deviations` holds in what its rendering of a whole conversation differs from what a rollout
    builds (see rllib_gtpo.chat.verify): what was sampled is trained on as it was sampled.
    """

    def __init__(self, tokenizer: Any, call_format_name: str = "hermes") -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ChatTemplateError(
                f"The tokenizer {tokenizer.name_or_path!r} has no chat template: use an "
                "instruction-tuned model, or set chat_template= to a template's text or file."
            )
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)
        self.deviations = find_deviations(self.template)
        self.call_format = call_format(call_format_name).bind(self.template)
        self._check_format()
        self.end_of_turn_id = self._id(self.template.ends[0])
        self.stop_token_ids = self._stop_token_ids()
        closed = self.template.closing_end(assistant("")) is not None
        self._opening_ends = {self._id(end) for end in self.template.ends[int(closed) :]}
        self._deltas: dict[str, tuple[int, list[int]]] = {}
        self._prompts: dict[str, list[int]] = {}
        self._texts: dict[tuple[int, ...], str] = {}

    def prompt_ids(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()
    ) -> list[int]:
        """The ids of a whole conversation, ready for the policy's next turn.

        Templates explain tools in formats of their own: in another one the task's messages must.
        """
        shown = tools if self.call_format.explained else ()
        key = json.dumps([messages, shown], sort_keys=True, default=str)
        if key not in self._prompts:
            if len(self._prompts) >= _LATELY:
                self._prompts.clear()
            text = self.template.render(messages, shown, generate=True)
            self._prompts[key] = self._encode(text)
        return list(self._prompts[key])

    def delta_ids(self, messages: Sequence[Message], ended_by: int | None = None) -> list[int]:
        """The ids between the end of a turn and the next one, with `messages` in between.

        `ended_by`: the stop token that was sampled.  Where the template begins what follows with
        the token that should have been, the delta does so if another one was sampled.
        """
        end, ids = self._delta(messages)
        other = ended_by is not None and ended_by != end
        return [end, *ids] if other and end in self._opening_ends else list(ids)

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
        said, between = _turns(demonstration)
        for index, text in enumerate(said):
            end = self.end_of_turn_id
            delta: list[int] = []
            if index + 1 < len(said):
                end, delta = self._delta(between[index])
            sampled = [*self._encode(self._begun(text, ids)), end]
            ids += [*sampled, *delta]
            trained += [True] * len(sampled) + [False] * len(delta)
        return ids, trained

    def decode(self, token_ids: Sequence[int]) -> str:
        """A turn's text without its stop token."""
        if token_ids and token_ids[-1] in self.stop_token_ids:
            token_ids = token_ids[:-1]
        return self._text(token_ids)

    def parse(
        self,
        token_ids: Sequence[int],
        tools: Sequence[dict[str, Any]] = (),
        prompt_ids: Sequence[int] = (),
    ) -> ParsedTurn:
        """A sampled turn taken apart; `prompt_ids` may have opened a thinking block for it."""
        stopped = token_ids and token_ids[-1] in self.stop_token_ids
        return self.call_format.parse_sampled(
            self.decode(token_ids),
            tools,
            prompt=self._tail(prompt_ids),
            end=self._text(token_ids[-1:]) if stopped else "",
        )

    def _check_format(self) -> None:
        """Refuses a format in which the template would ask for other calls than are read."""
        if not self.call_format.explained or not self.template.writes_calls:
            return
        native = native_format(self.template)
        if native is not None and not native.same(self.call_format):
            raise ChatTemplateError(
                f"call_format={self.call_format.name!r}, but the chat template explains and writes "
                f"calls as {native.name!r} does: set call_format={native.name!r} or 'auto', or set "
                "chat_template= to one that fits."
            )

    def _tail(self, prompt_ids: Sequence[int]) -> str:
        return self._text(prompt_ids[-_TAIL:])

    def _text(self, token_ids: Sequence[int]) -> str:
        key = tuple(token_ids)
        if key not in self._texts:
            if len(self._texts) >= _LATELY:
                self._texts.clear()
            text = self.tokenizer.decode(list(key), clean_up_tokenization_spaces=False)
            self._texts[key] = text
        return self._texts[key]

    def _begun(self, text: str, prompt_ids: Sequence[int]) -> str:
        """A demonstration's text as it goes on behind a prompt that may have opened thinking."""
        tail = self._tail(prompt_ids).rstrip()
        for opening, closing in THINKING:
            if tail.endswith(opening):
                if text.startswith(opening):
                    return text.removeprefix(opening).removeprefix("\n")
                return text if closing in text else f"\n{closing}\n\n{text}"
        return text

    def _delta(self, messages: Sequence[Message]) -> tuple[int, list[int]]:
        key = json.dumps(messages, sort_keys=True, default=str)
        if key not in self._deltas:
            if len(self._deltas) >= _REMEMBERED:
                self._deltas.clear()
            delta = self.template.delta(messages)
            end = self._id(delta.end)
            # With the end in front, as in a whole conversation: some tokenizers treat what stands
            # behind a special token, or at the start of a text, in a way of its own.
            ids = self._encode(delta.end + delta.rest)
            self._deltas[key] = end, ids[ids.index(end) + 1 :]
        return self._deltas[key]

    def _stop_token_ids(self) -> tuple[int, ...]:
        known = self.tokenizer.get_added_vocab()
        more = [known[end] for end in self.call_format.ends if end in known]
        ends = {*map(self._id, self.template.ends), *more, self.tokenizer.eos_token_id}
        return tuple(sorted(ends - {None}))

    def _id(self, special: str) -> int:
        index: int = self.tokenizer.convert_tokens_to_ids(special)
        return index

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(encodable(text), add_special_tokens=False)
        return ids


def _turns(demonstration: Sequence[Message]) -> tuple[list[str], list[list[Message]]]:
    """What the assistant says in each turn, and the messages behind each."""
    said: list[str] = []
    between: list[list[Message]] = []
    for message in demonstration:
        if message["role"] == "assistant":
            said.append(message["content"])
            between.append([])
        elif said:
            between[-1].append(message)
        else:
            raise ChatTemplateError("A demonstration starts with an assistant message.")
    return said, between
