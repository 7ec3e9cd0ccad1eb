"""Cold start: supervised training on demonstrations.

The same module, learner, packing and token streams as RL: a demonstration is built from the prompts
and deltas that rollouts are built from, and only what the assistant wrote is trained.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rllib_gtpo.chat import ChatCodec
from rllib_gtpo.env import ToolEnv
from rllib_gtpo.errors import ConfigError, DataError, refuse_unknown_keys
from rllib_gtpo.packing import NOT_TRAINED, TokenSequence
from rllib_gtpo.shuffling import EndlessOrder
from rllib_gtpo.trace_formats.recognise import read_demonstrations
from rllib_gtpo.types import Message, Task

_VALIDATION = 64  # demonstrations held out for the validation loss, at most a tenth of all


@dataclass(frozen=True)
class ColdStart:
    """Settings of supervised training.

    data: "expert" (the environment's `expert(task)` on training tasks) or a JSON-lines file of
        conversations; see rllib_gtpo.traces and rllib_gtpo.trace_formats.recognise.
    steps, batch_size: optimizer steps, demonstrations per step.
    lr: peak learning rate, after `warmup` (a fraction of the steps), decaying linearly to
        `final_lr_frac`.
    demonstrations: most demonstrations to draw from the data.
    validate_every: steps between two looks at demonstrations that were held out; None: a tenth of
        all steps.  What follows goes on with the weights of the lowest loss on them.
    patience: looks in a row without a lower loss after which training ends early; None: never.
    """

    data: str = "expert"
    steps: int = 500
    batch_size: int = 48
    lr: float = 1e-3
    warmup: float = 0.05
    final_lr_frac: float = 0.05
    grad_clip: float = 1.0
    demonstrations: int = 20_000
    validate_every: int | None = None
    patience: int | None = None

    @staticmethod
    def of(settings: dict[str, Any] | None) -> ColdStart | None:
        """From a config's dict; unknown keys and impossible values raise ConfigError."""
        if settings is None:
            return None
        refuse_unknown_keys("cold_start", settings, [f.name for f in fields(ColdStart)])
        start = ColdStart(**settings)
        optional = [n for n in ("validate_every", "patience") if getattr(start, n) is not None]
        for name in ("steps", "batch_size", "demonstrations", *optional):
            if not isinstance(getattr(start, name), int) or getattr(start, name) < 1:
                raise ConfigError(f"cold_start.{name}={getattr(start, name)!r}: at least 1.")
        for name in ("lr", "warmup", "final_lr_frac", "grad_clip"):
            if type(getattr(start, name)) not in (int, float):
                raise ConfigError(f"cold_start.{name}={getattr(start, name)!r}: must be a number.")
        if not isinstance(start.data, str):
            raise ConfigError(f"cold_start.data={start.data!r}: 'expert', or the path of a file.")
        if not start.grad_clip > 0.0:
            raise ConfigError(f"cold_start.grad_clip={start.grad_clip!r}: must be above 0.")
        if not start.lr > 0.0:
            raise ConfigError(f"cold_start.lr={start.lr!r}: must be above 0.")
        return start

    def validates_after(self, step: int) -> bool:
        """Whether held-out demonstrations are looked at after this step, counted from 0."""
        if step + 1 == self.steps:
            return True
        if self.validate_every is not None:
            return (step + 1) % self.validate_every == 0
        return (step + 1) * 10 // self.steps > step * 10 // self.steps

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then linear decay."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        left = (self.steps - step) / max(1, self.steps - warm)
        return self.lr * (self.final_lr_frac + (1.0 - self.final_lr_frac) * left)


class Demonstrations:
    """Token sequences in an endless order that is a function of the seed and the position alone."""

    def __init__(self, sequences: Sequence[TokenSequence], seed: int) -> None:
        held_out = min(_VALIDATION, len(sequences) // 10)
        self.validation = list(sequences[:held_out])
        self._train = list(sequences[held_out:])
        self._order = EndlessOrder(len(self._train), seed)

    def __len__(self) -> int:
        return len(self._train)

    def batch(self, step: int, size: int) -> list[TokenSequence]:
        """The demonstrations of a step."""
        positions = range(step * size, (step + 1) * size)
        return [self._train[self._order[position]] for position in positions]


def load_demonstrations(
    start: ColdStart, env: ToolEnv, codec: ChatCodec, seed: int, max_context: int
) -> Demonstrations:
    """Reads and encodes the demonstrations; every error names the row."""
    source = (
        _expert(env)
        if start.data == "expert"
        else read_demonstrations(Path(start.data), env, codec.call_format)
    )
    sequences = []
    too_long = 0
    for where, prompt, demonstration, tools in itertools.islice(source, start.demonstrations):
        ids, trained = _encoded(where, codec, prompt, demonstration, tools)
        if len(ids) > max_context:
            too_long += 1
            continue
        turns = [0 if t else NOT_TRAINED for t in trained]
        sequences.append(TokenSequence(ids, turns, [0.0] * len(ids)))
    if not sequences:
        why = (
            f"all {too_long} are longer than the context of {max_context} tokens"
            if too_long
            else "override expert(self, task), or set cold_start.data to a JSON-lines file"
        )
        raise DataError(f"cold_start: no demonstrations in {start.data!r}: {why}.")
    if too_long:
        print(f"cold start: left out {too_long} demonstrations longer than {max_context} tokens")
    return Demonstrations(sequences, seed)


_Source = Iterator[tuple[str, list[Message], list[Message], list[dict[str, Any]]]]


def _encoded(
    where: str,
    codec: ChatCodec,
    prompt: list[Message],
    demonstration: list[Message],
    tools: list[dict[str, Any]],
) -> tuple[list[int], list[bool]]:
    """Ids, and which of them are trained; DataError names the place."""
    turns = sum(message["role"] == "assistant" for message in demonstration)
    if not turns:
        raise DataError(f"{where}: has no assistant message, so there is nothing to learn from.")
    try:
        ids, trained = codec.conversation_ids(prompt, demonstration, tools)
    except Exception as error:  # templates raise what they like
        raise DataError(f"{where}: the chat template cannot render it: {error}") from error
    ends = [i for i, t in zip(ids, trained, strict=True) if t and i in codec.stop_token_ids]
    if len(ends) != turns:
        marks = " or ".join(repr(codec.tokenizer.decode([end])) for end in codec.stop_token_ids)
        raise DataError(
            f"{where}: an assistant message contains {marks}, which ends a turn: take it out."
        )
    return ids, trained


def _expert(env: ToolEnv) -> _Source:
    for number, task in enumerate(env.tasks("train"), start=1):
        prompt = env.first_messages(task)
        for demonstration in env.expert(task):
            where = f"expert, task {number}"
            texts = [turn for turn in demonstration if isinstance(turn, str)]
            messages = [turn for turn in demonstration if not isinstance(turn, str)]
            if texts and messages:
                raise DataError(f"{where}: a demonstration is all texts, or all messages.")
            if texts:
                messages = _acted_out(where, env, task, texts)
            yield where, prompt, messages, env.tool_schemas


def _acted_out(where: str, env: ToolEnv, task: Task, texts: list[str]) -> list[Message]:
    """The messages of a demonstration that says what the policy does: the environment answers."""
    env.reset(options={"task": task})
    assert env.trajectory is not None
    messages: list[Message] = []
    answers: list[Message] = []
    for number, text in enumerate(texts):
        if (reason := env.trajectory.stop_reason) is not None:
            raise DataError(
                f"{where}: the trajectory is over ({reason}) before its text {number}: a text "
                "without a call is the answer, and max_turns and done() end it, too."
            )
        messages += [*answers, {"role": "assistant", "content": text}]
        answers = env.step(text)[0].messages
    return messages
