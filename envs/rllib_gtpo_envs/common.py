"""What the ready-made tasks share: knobs, disjoint splits, demonstrations, a Python session."""

from __future__ import annotations

import hashlib
import math
import random
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, Protocol, TypeVar

from rllib_gtpo import ToolEnv
from rllib_gtpo.chat import call_format
from rllib_gtpo.errors import ConfigError, refuse_unknown_keys
from rllib_gtpo.sandbox import Limits, SandboxResult
from rllib_gtpo.tools.python import PythonSession, Service
from rllib_gtpo.types import Message, Observation, Task, ToolCall

K = TypeVar("K", bound=Any)
UNCLOSED = "Error: the block is not closed with ```"
"""What is answered to a fenced call without its end; as one token it keeps turns short."""

SPLITS = {
    "train": range(80),
    "validation": range(80, 90),
    "test": range(90, 100),
}
"""The split of a problem: its hash, in percent."""


class ExpertKnobs(Protocol):
    """What a `ScriptedEnv` needs of its knobs."""

    @property
    def seed(self) -> int: ...
    @property
    def demonstrations(self) -> tuple[tuple[str, float], ...]: ...


class ScriptedEnv(ToolEnv):
    """A task with one tool, which takes one text, and demonstrations of named behaviours."""

    knobs: ExpertKnobs

    def __init__(self, env_config: Mapping[str, Any] | None = None) -> None:
        super().__init__(env_config)
        self.call_format = call_format("fenced")  # a runner sets its own

    @abstractmethod
    def demonstrate(self, task: Task, behaviour: str, rng: random.Random) -> list[Message]:
        """A demonstration of a named behaviour: what the model says and what it is answered."""

    def expert(self, task: Task) -> Iterable[list[Message]]:
        """One demonstration; its behaviour is a function of the task's id."""
        rng = random.Random(f"{self.knobs.seed}-{task['id']}")
        names, weights = zip(*self.knobs.demonstrations, strict=True)
        yield self.demonstrate(task, rng.choices(names, weights)[0], rng)

    def call(self, text: str) -> str:
        """A call of the tool, as the model writes it."""
        function = self.tool_schemas[0]["function"]
        parameter = next(iter(function["parameters"]["properties"]))
        return self.call_format.write(ToolCall(function["name"], {parameter: text}))

    def unclosed(self, text: str) -> list[Message]:
        """A call without its end, and what the environment says to it."""
        written = self.call(text).removesuffix("\n```").removesuffix("\n</tool_call>")
        call = self.call_format.parse(written, self.tool_schemas).calls[0]
        return [assistant(written), answered(f"Error: {call.error}")]


class PythonToolEnv(ToolEnv):
    """A task whose tool runs Python: a session for each trajectory, which ends with it."""

    python_limits: Limits = Limits(cpu_seconds=2.0, memory_mb=256, output_chars=512)
    python_preload: tuple[str, ...] = ()
    python_stateful: bool = True  # whether names stay from one call to the next
    python_service: Service | None = None  # None: this machine's own sandbox

    def __init__(self, env_config: Mapping[str, Any] | None = None) -> None:
        super().__init__(env_config)
        self._session: PythonSession | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """See ToolEnv; the Python session is new."""
        self.close()
        first = super().reset(seed=seed, options=options)
        self._session = PythonSession(
            self.python_limits,
            self.python_preload,
            sandbox=self.python_service,
            stateful=self.python_stateful,
        )
        return first

    async def run_python(self, code: str) -> SandboxResult:
        """Runs code in the trajectory's session."""
        assert self._session is not None, "reset() first"
        return await self._session.arun(code)

    def close(self) -> None:
        """Ends the trajectory's Python session."""
        super().close()
        if self._session is not None:
            self._session.close()
            self._session = None


def distinct_tasks(
    draw: Callable[[random.Random], Task | None], split: str, wanted: int, seed: int
) -> tuple[Task, ...]:
    """`wanted` tasks with distinct questions; a hash of the question decides its split.

    So no task is in two splits, whatever the seed.  `draw` returns a task without its id, or None
    for one that is not wanted.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split!r}: use one of {', '.join(SPLITS)}.")
    rng = random.Random(f"{seed}-{split}")
    found: dict[str, Task] = {}
    misses = 0
    while len(found) < wanted:
        task = draw(rng)
        question = "" if task is None else str(task["question"])
        share = int.from_bytes(hashlib.sha256(question.encode()).digest()[:4]) % 100
        if task is None or question in found or share not in SPLITS[split]:
            misses += 1
            if misses > 50_000:
                raise ConfigError(
                    f"env_config: {split}={wanted}: there are not that many different problems "
                    f"({len(found)} found): ask for fewer, or widen what they are drawn from."
                )
            continue
        misses = 0
        found[question] = {"id": f"{split}-{len(found)}", **task}
    return tuple(found.values())


def assistant(content: str) -> Message:
    """What the model says."""
    return {"role": "assistant", "content": content}


def answered(content: str) -> Message:
    """What a tool says."""
    return {"role": "tool", "content": content}


def wrong_number(answer: str, rng: random.Random) -> str:
    """A number of about the size of the answer, which it is not."""
    off = rng.randint(1, max(9, int(answer) // 5))
    return str(int(answer) + (off if off > int(answer) or rng.random() < 0.5 else -off))


def checked_knobs(
    kind: type[K],
    env_config: Mapping[str, Any],
    demonstrations: Mapping[str, float],
    slips: Mapping[str, float] | None = None,
) -> K:
    """The knobs of a task from its `env_config`, with what all tasks have in common checked.

    demonstrations, slips: The task's behaviours and slips, by name.
    """
    refuse_unknown_keys("env_config", env_config, [f.name for f in fields(kind)])
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in env_config.items()
    }
    if "demonstrations" in values:
        values["demonstrations"] = checked_weights(values["demonstrations"], demonstrations)
    if slips is not None and "slips" in values:
        values["slips"] = checked_rates(values["slips"], slips)
    knobs = kind(**values)
    for name, low in (("seed", 0), ("train", 1), ("validation", 1), ("test", 1)):
        check_whole(name, getattr(knobs, name), low)
    check_flag("instructions", knobs.instructions)
    return knobs


def check_whole(name: str, value: Any, low: int) -> None:
    """Refuses what is not a whole number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"env_config: {name}={value!r}: a whole number, at least {low}.")


def check_range(name: str, value: Any, low: int, high: int) -> None:
    """Refuses what is not a pair of whole numbers in order, within the bounds."""
    pair = isinstance(value, tuple) and len(value) == 2
    whole = pair and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    if not whole or not low <= value[0] <= value[1] <= high:
        raise ConfigError(
            f"env_config: {name}={value!r}: two whole numbers [least, most], {low} to {high}."
        )


def check_flag(name: str, value: Any) -> None:
    """Refuses what is neither true nor false."""
    if not isinstance(value, bool):
        raise ConfigError(f"env_config: {name}={value!r}: true or false.")


def drawn_slip(rates: Iterable[tuple[str, float]], rng: random.Random) -> str | None:
    """The slip that comes before a call, if one does; `rates` are chances by name."""
    chance = rng.random()
    for name, rate in rates:
        chance -= rate
        if chance < 0.0:
            return name
    return None


def checked_rates(given: Any, defaults: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """Chances of slips by name, together below 1; one that is left out is 0."""
    rates = _checked_numbers("slips", given, defaults)
    if not sum(rate for _, rate in rates) < 1.0:
        raise ConfigError(f"env_config: slips={given!r}: together they must stay below 1.")
    return rates


def checked_weights(given: Any, defaults: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """Weights of behaviours by name; one that is left out is 0."""
    weights = _checked_numbers("demonstrations", given, defaults)
    if not sum(weight for _, weight in weights) > 0:
        raise ConfigError("env_config: demonstrations: at least one weight must be above 0.")
    return weights


def _checked_numbers(
    knob: str, given: Any, known: Mapping[str, float]
) -> tuple[tuple[str, float], ...]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"env_config: {knob}={given!r}: a number for each behaviour, by name.")
    refuse_unknown_keys(f"env_config: {knob}", given, known)
    for name, number in given.items():
        numeric = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not numeric or not math.isfinite(number) or number < 0:
            raise ConfigError(f"env_config: {knob}: {name}={number!r}: at least 0.")
    return tuple((name, float(given.get(name, 0.0))) for name in known)
