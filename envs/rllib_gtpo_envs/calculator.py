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

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from rllib_gtpo.sandbox import Status
from rllib_gtpo.tools.python import to_tool_result
from rllib_gtpo.types import Message, Observation, Task, ToolResult, Trajectory
from rllib_gtpo_envs.chains import (
    check_chain_knobs,
    count_operations,
    demonstrated_steps,
    first_step,
    guesses,
    random_chain,
    result_of,
)
from rllib_gtpo_envs.common import (
    PythonToolEnv,
    ScriptedEnv,
    answered,
    assistant,
    checked_knobs,
    distinct_tasks,
    wrong_number,
)

DEMONSTRATIONS = {
    "solve": 0.24,
    "retry": 0.11,
    "malformed": 0.05,
    "guess": 0.20,
    "stop_early": 0.22,
    "ignore_error": 0.18,
}
"""Default weights of the behaviours in demonstrations: two in five solve the task."""


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
        knobs = checked_knobs(Knobs, env_config, DEMONSTRATIONS)
        check_chain_knobs(knobs)
        return knobs


class Calculator(PythonToolEnv, ScriptedEnv):
    """Chains of operations from left to right.  `env_config`: see `Knobs`."""

    knobs: Knobs

    def __init__(self, env_config: Mapping[str, Any] | None = None) -> None:
        super().__init__(env_config)
        self.knobs = Knobs.of(self.env_config)
        self.turn_limit = self.knobs.operations[1] + 3
        self._left = ""

    def tasks(self, split: str) -> Iterable[Task]:
        """Rows {"id", "question", "answer", "operations"}; all problems of all splits differ."""
        return [dict(row) for row in _rows(self.knobs, split)]

    def prompt(self, task: Task) -> str:
        """The chain, by itself or (`instructions`) with an explanation."""
        if not self.knobs.instructions:
            return str(task["question"])
        return (
            f"Work out {task['question']} strictly from left to right, without precedence. "
            "Call the python tool once for each operation; its answer shows what is left. "
            f"For example:\n{self.call('print(12+7)')}\nIn the end reply with the number alone."
        )

    def reward(self, trajectory: Trajectory, task: Task) -> dict[str, float]:
        """1 for the right number as the whole answer."""
        return {"accuracy": float(trajectory.answer == task["answer"])}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """See ToolEnv; the chain is whole again and the Python session new."""
        first = super().reset(seed=seed, options=options)
        assert self.trajectory is not None
        self._left = str(self.trajectory.task["question"])
        return first

    async def python(self, code: str) -> ToolResult:
        """Run Python and see what it prints and what is left of the chain.  code: the code."""
        result = await self.run_python(code)
        failed = result.status is not Status.OK
        output = result.output.strip()
        if failed:  # the last line of a traceback says it all
            output = output.rpartition("\n")[2]
        self._left, content = _feedback(output, self._left)
        return ToolResult("python", content, to_tool_result(result).error)

    tools = (python,)

    def demonstrate(self, task: Task, behaviour: str, rng: random.Random) -> list[Message]:
        """A demonstration of a named behaviour: what the model says and what it is answered."""
        chain, answer = str(task["question"]), str(task["answer"])
        if guesses(chain, behaviour):
            return [assistant(wrong_number(answer, rng))]
        messages: list[Message] = []
        for step in demonstrated_steps(chain, behaviour, rng):
            if step.slip in ("retry", "ignore_error"):
                slip, error = f"print(x{step.operator}{step.second})", "name 'x' is not defined"
                messages.append(assistant(self.call(slip)))
                messages.append(answered(_feedback(f"NameError: {error}", step.chain)[1]))
                if step.slip == "ignore_error":
                    return [*messages, assistant(wrong_number(answer, rng))]
            code = f"print({step.first}{step.operator}{step.second})"
            if step.slip == "malformed":
                messages += self.unclosed(code)
            shown = _feedback(step.value, step.chain)[1]
            messages += [assistant(self.call(code)), answered(shown)]
        return [*messages, assistant(step.value)]


def _feedback(output: str, left: str) -> tuple[str, str]:
    """What is left once a call printed `output`, and what the model sees of both."""
    step = first_step(left)
    if step is not None:
        first, operator, second, rest = step
        if output == str(result_of(int(first), operator, int(second))):
            left = output + rest
    return left, f"{output or '(no output)'}\nleft: {left if first_step(left) else 'none'}"


@lru_cache(maxsize=8)
def _rows(knobs: Knobs, split: str) -> tuple[Task, ...]:
    return distinct_tasks(
        lambda rng: _task(knobs, rng), split, getattr(knobs, split, 0), knobs.seed
    )


def _task(knobs: Knobs, rng: random.Random) -> Task | None:
    question, answer = random_chain(knobs, rng)
    if answer is None:
        return None
    operations = count_operations(question)
    return {"question": question, "answer": str(answer), "operations": operations}
