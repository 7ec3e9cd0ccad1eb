"""`Calculator`: a chain of operations, worked out strictly from left to right, one call per step.

    user       12+7*3-5
    assistant  ```python          tool  19
               print(12+7)              left: 19*3-5
               ```
    assistant  ```python          tool  57
               print(19*3)              left: 57-5
               ```
    assistant  ```python          tool  52
               print(57-5)              left: none
               ```
    assistant  52

There is no precedence: `12+7*3-5` is ((12+7)*3)-5 = 52.  Every step depends on the result of the
one before.  The environment takes a step off the chain when a call prints that step's result; any
other output, an error included, is shown above the same rest.  The tool is a Python session in a
process of its own.

A demonstration (`expert`) behaves in one of six ways, drawn by the task's id from the weights
`env_config["demonstrations"]`; together they are a model that has the skill and uses it unreliably:

    solve         each step with a call, then the answer
    retry         the same, but one call first uses a name that does not exist, and is written again
    malformed     the same, but one call is first left unclosed, and is written again
    guess         a wrong number at once, without a call
    stop_early    an intermediate result as the answer
    ignore_error  a call fails, and a wrong number is the answer
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any

from rllib_gtpo import ToolEnv
from rllib_gtpo.chat import call_format
from rllib_gtpo.errors import ConfigError, did_you_mean
from rllib_gtpo.sandbox import Limits, Status
from rllib_gtpo.tools.python import PythonSession
from rllib_gtpo.types import Message, Observation, Task, ToolError, ToolResult, Trajectory

DEMONSTRATIONS = {
    "solve": 0.24,
    "retry": 0.11,
    "malformed": 0.05,
    "guess": 0.20,
    "stop_early": 0.22,
    "ignore_error": 0.18,
}
"""Default weights of the behaviours in demonstrations: two in five solve the task."""

_STEP = re.compile(r"(\d+)([+\-*])(\d+)(.*)")
_LIMITS = Limits(cpu_seconds=2.0, memory_mb=256, output_chars=512)
_SHARES = {
    "train": range(80),
    "validation": range(80, 90),
    "test": range(90, 100),
}  # of the hash, %


@dataclass(frozen=True)
class Knobs:
    """What `env_config` may hold.

    seed: Tasks are a function of it and of the split's name.
    operations: Fewest and most operations of a chain, within 1 to 8.
    numbers: Smallest and largest number of a chain, within 0 to 99999.
    factors: The same for a number that multiplies.
    operators: Those to choose from; any of "+-*".
    largest: No intermediate result is above it, and none is below 0.
    train, validation, test: Tasks in each split.
    demonstrations: Weight of each behaviour in demonstrations; one that is left out is 0.
    instructions: Whether the prompt explains the task, for a model that was not made for it.
    """

    seed: int = 0
    operations: tuple[int, int] = (2, 3)
    numbers: tuple[int, int] = (2, 99)
    factors: tuple[int, int] = (2, 9)
    operators: str = "+-*"
    largest: int = 9999
    train: int = 8000
    validation: int = 256
    test: int = 256
    demonstrations: tuple[tuple[str, float], ...] = field(default=tuple(DEMONSTRATIONS.items()))
    instructions: bool = False

    @staticmethod
    def of(env_config: Mapping[str, Any]) -> Knobs:
        """Checked knobs; ConfigError says what is valid."""
        _check_names(env_config, [f.name for f in fields(Knobs)], "env_config")
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in env_config.items()
        }
        if "demonstrations" in values:
            values["demonstrations"] = _weights(values["demonstrations"])
        knobs = Knobs(**values)
        for name, low, high in (
            ("operations", 1, 8),
            ("numbers", 0, 99_999),
            ("factors", 0, 99_999),
        ):
            _check_range(name, getattr(knobs, name), low, high)
        for name, low in (
            ("seed", 0),
            ("largest", 1),
            ("train", 1),
            ("validation", 1),
            ("test", 1),
        ):
            _check_whole(name, getattr(knobs, name), low)
        operators = knobs.operators
        if not isinstance(operators, str) or not operators or not set(operators) <= set("+-*"):
            raise ConfigError(f"env_config: operators={operators!r}: one or more of '+-*'.")
        if not isinstance(knobs.instructions, bool):
            raise ConfigError(f"env_config: instructions={knobs.instructions!r}: true or false.")
        return knobs


class Calculator(ToolEnv):
    """Chains of operations from left to right.  `env_config`: see `Knobs`."""

    def __init__(self, env_config: Mapping[str, Any] | None = None) -> None:
        super().__init__(env_config)
        self.knobs = Knobs.of(self.env_config)
        self.call_format = call_format("fenced")  # a runner sets its own
        self.turn_limit = self.knobs.operations[1] + 3
        self._left = ""
        self._session: PythonSession | None = None

    def tasks(self, split: str) -> Iterable[Task]:
        """Rows {"id", "question", "answer", "operations"}; all problems of all splits differ."""
        if split not in _SHARES:
            raise ConfigError(f"split={split!r}: use one of {', '.join(_SHARES)}.")
        return [dict(row) for row in _rows(self.knobs, split)]

    def prompt(self, task: Task) -> str:
        """The chain, by itself or (`instructions`) with an explanation."""
        if not self.knobs.instructions:
            return str(task["question"])
        return (
            f"Work out {task['question']} strictly from left to right, without precedence. "
            "Call the python tool once for each operation; its answer shows what is left. "
            f"For example:\n{self._call('print(12+7)')}\nIn the end reply with the number alone."
        )

    def reward(self, trajectory: Trajectory, task: Task) -> dict[str, float]:
        """1 for the right number as the whole answer."""
        return {"accuracy": float(trajectory.answer == task["answer"])}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """See ToolEnv; the chain is whole again and the Python session new."""
        self.close()
        first = super().reset(seed=seed, options=options)
        assert self.trajectory is not None
        self._left = str(self.trajectory.task["question"])
        self._session = PythonSession(_LIMITS)
        return first

    async def python(self, code: str) -> ToolResult:
        """Run Python and see what it prints and what is left of the chain.  code: the code."""
        assert self._session is not None, "reset() first"
        result = await self._session.arun(code)
        failed = result.status is not Status.OK
        output = result.output.strip()
        if failed:  # the last line of a traceback says it all
            output = output.rpartition("\n")[2]
        self._left, content = _feedback(output, self._left)
        return ToolResult("python", content, ToolError.RAISED if failed else None)

    tools = (python,)

    def close(self) -> None:
        """Ends the trajectory's Python session."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def expert(self, task: Task) -> Iterable[list[Message]]:
        """One demonstration; its behaviour is a function of the task's id."""
        rng = random.Random(f"{self.knobs.seed}-{task['id']}")
        names, weights = zip(*self.knobs.demonstrations, strict=True)
        yield self.demonstrate(task, rng.choices(names, weights)[0], rng)

    def demonstrate(self, task: Task, behaviour: str, rng: random.Random) -> list[Message]:
        """A demonstration of a named behaviour: what the model says and what it is answered."""
        left, answer = str(task["question"]), str(task["answer"])
        operations = len(re.findall(r"[+\-*]", left))
        if behaviour == "guess" or (behaviour == "stop_early" and operations == 1):
            return [_said(_wrong(answer, rng))]
        steps = rng.randint(1, operations - 1) if behaviour == "stop_early" else operations
        slip_at = rng.randrange(operations)
        messages: list[Message] = []
        value = ""
        for number in range(steps):
            first, operator, second, _ = _parts(left)
            if number == slip_at and behaviour in ("retry", "ignore_error"):
                messages.append(_said(self._call(f"print(x{operator}{second})")))
                messages.append(_answered(_feedback("NameError: name 'x' is not defined", left)[1]))
                if behaviour == "ignore_error":
                    return [*messages, _said(_wrong(answer, rng))]
            code = f"print({first}{operator}{second})"
            if number == slip_at and behaviour == "malformed":
                messages += self._unclosed(code)
            value = str(_value(int(first), operator, int(second)))
            left, content = _feedback(value, left)
            messages += [_said(self._call(code)), _answered(content)]
        return [*messages, _said(value)]

    def _call(self, code: str) -> str:
        if self.call_format.name == "fenced":
            return f"```python\n{code}\n```"
        call = json.dumps({"name": "python", "arguments": {"code": code}})
        return f"<tool_call>{call}</tool_call>"

    def _unclosed(self, code: str) -> list[Message]:
        """A call without its end, and what the environment says to it."""
        text = self._call(code).removesuffix("\n```").removesuffix("</tool_call>")
        call = self.call_format.parse(text, self.tool_schemas).calls[0]
        return [_said(text), _answered(f"Error: {call.error}")]


def _parts(left: str) -> tuple[str, str, str, str]:
    """First number, operator, second number and the rest of a chain that has a step left."""
    match = _STEP.fullmatch(left)
    assert match is not None, left
    return match.group(1), match.group(2), match.group(3), match.group(4)


def _value(first: int, operator: str, second: int) -> int:
    return {"+": first + second, "-": first - second, "*": first * second}[operator]


def _feedback(output: str, left: str) -> tuple[str, str]:
    """What is left once a call printed `output`, and what the model sees of both."""
    if _STEP.fullmatch(left):
        first, operator, second, rest = _parts(left)
        if output == str(_value(int(first), operator, int(second))):
            left = output + rest
    return left, f"{output or '(no output)'}\nleft: {left if _STEP.fullmatch(left) else 'none'}"


def _wrong(answer: str, rng: random.Random) -> str:
    """A number of about the size of the answer, which it is not."""
    off = rng.randint(1, max(9, int(answer) // 5))
    return str(int(answer) + (off if off > int(answer) or rng.random() < 0.5 else -off))


def _said(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _answered(content: str) -> Message:
    return {"role": "tool", "content": content}


@lru_cache(maxsize=8)
def _rows(knobs: Knobs, split: str) -> tuple[Task, ...]:
    """The tasks of a split.  A hash of the chain decides which split it can be in."""
    rng = random.Random(f"{knobs.seed}-{split}")
    wanted: int = getattr(knobs, split)
    rows: dict[str, Task] = {}
    misses = 0
    while len(rows) < wanted:
        question, answer = _chain(knobs, rng)
        share = int.from_bytes(hashlib.sha256(question.encode()).digest()[:4]) % 100
        if answer is None or question in rows or share not in _SHARES[split]:
            misses += 1
            if misses > 50_000:
                raise ConfigError(
                    f"env_config: {split}={wanted}: there are not that many different problems "
                    f"({len(rows)} found): ask for fewer, or widen numbers or operations."
                )
            continue
        misses = 0
        number = len(rows)
        operations = len(re.findall(r"[+\-*]", question))
        rows[question] = {
            "id": f"{split}-{number}",
            "question": question,
            "answer": str(answer),
            "operations": operations,
        }
    return tuple(rows.values())


def _chain(knobs: Knobs, rng: random.Random) -> tuple[str, int | None]:
    """A random chain and its value, or None if a result on the way is out of bounds."""
    value = rng.randint(*knobs.numbers)
    question = str(value)
    for _ in range(rng.randint(*knobs.operations)):
        operator = rng.choice(knobs.operators)
        number = rng.randint(*(knobs.factors if operator == "*" else knobs.numbers))
        value = _value(value, operator, number)
        question += f"{operator}{number}"
        if not 0 <= value <= knobs.largest:
            return question, None
    return question, value


def _check_names(given: Iterable[str], known: list[str], where: str) -> None:
    for name in given:
        if name not in known:
            raise ConfigError(f"{where} has an unknown key {name!r}{did_you_mean(name, known)}")


def _check_whole(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"env_config: {name}={value!r}: a whole number, at least {low}.")


def _check_range(name: str, value: Any, low: int, high: int) -> None:
    pair = isinstance(value, tuple) and len(value) == 2
    whole = pair and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    if not whole or not low <= value[0] <= value[1] <= high:
        raise ConfigError(
            f"env_config: {name}={value!r}: two whole numbers [least, most], {low} to {high}."
        )


def _weights(given: Any) -> tuple[tuple[str, float], ...]:
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"env_config: demonstrations={given!r}: a weight for each behaviour, by name."
        )
    _check_names(given, list(DEMONSTRATIONS), "env_config: demonstrations")
    for name, weight in given.items():
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight < 0:
            raise ConfigError(f"env_config: demonstrations: {name}={weight!r}: at least 0.")
    if not sum(given.values()) > 0:
        raise ConfigError("env_config: demonstrations: at least one weight must be above 0.")
    return tuple((name, float(given.get(name, 0.0))) for name in DEMONSTRATIONS)
