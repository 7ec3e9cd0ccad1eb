"""Mending a program: some operators are wrong, and every submission says in which lines.

    user       a+=3
               b*=a
               c-=7
               a+= wrong
               b*= ok
               c-= wrong
    assistant  ```submit         tool  a*= ok
               a*=3                    b*= ok
               b*=a                    c&= wrong
               c&=7
               ```
    assistant  ```submit         tool  passed
               a*=3
               b*=a
               c+=7
               ```

A submission is run on test values of its variables in a Python session of its own process.  What
comes back is judged here, and the right program never goes there.  A line is judged by the values
that came into it, so that a wrong line does not make a later one wrong: `b` above is right if it
was multiplied by the submitted `a`.  The task ends when all values are right; an answer without a
call gives up.

Nothing tells which operator is right but trying, so the skill is to keep what works and never to
try again what was seen to be wrong.  A demonstration (`expert`) behaves in one of three ways, drawn
by the task's id from the weights `env_config["demonstrations"]`:

    careful   changes exactly the wrong lines, to operators that were not tried there
    careless  the same, but each line of a submission may break that rule (`carelessness`): a right
              line is changed, or a wrong one gets an operator that was tried before
    give_up   is careful for a while, then gives up

Whatever it does, each of its calls may come after a slip, with the chances `env_config["slips"]`:

    repeat     the last submission again (at first: the program as it was given)
    malformed  the call, left unclosed

Slips are independent of the outcome, so that none of them is a sign of success.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from rllib_gtpo.errors import ConfigError
from rllib_gtpo.sandbox import Limits, Status
from rllib_gtpo.tools.python import to_tool_result
from rllib_gtpo.types import Message, Observation, Task, ToolResult, Trajectory
from rllib_gtpo_envs.common import (
    UNCLOSED,
    PythonToolEnv,
    ScriptedEnv,
    answered,
    assistant,
    check_range,
    check_whole,
    checked_knobs,
    distinct_tasks,
    drawn_slip,
)

OPERATORS = "+-*&|^"
DEMONSTRATIONS = {"careful": 0.1, "careless": 0.5, "give_up": 0.4}
"""Default weights of the behaviours in demonstrations."""
SLIPS = {"repeat": 0.06, "malformed": 0.06}
"""Default chances of a slip before a call."""
GIVE_UP = "give up"
PASSED = "passed"
VARIABLES = "abcd"
MARKUP = (
    "```submit\n",
    *(f"a{operator}=" for operator in OPERATORS),
    *(f"\n{variable}{operator}=" for variable in VARIABLES[1:] for operator in OPERATORS),
    " wrong",
    " ok",
    PASSED,
    GIVE_UP,
    UNCLOSED,
)
"""Tokens for `build_tokenizer(MARKUP)`: with one for each variable and operator, turns are short
and two layers can tell what was tried."""

# What a, b, c and d are at first: no two operators agree on all of them.
_INPUTS = ((5, 23, 14, 9), (38, 6, 61, 27), (9, 97, 35, 120), (14, 75, 8, 43), (61, 10, 90, 7))
# The bits of these overlap, so that +, | and ^ differ even on small values.
_DIGITS = "3567"
_LINE = re.compile(r"(\w)(\W)=(\w)")
_RUN = """\
_results = []
for _row in {inputs}:
    _values = dict(zip({names!r}, _row))
    exec({code!r}, _values)
    _results.append([_values.get(name) for name in {names!r}])
for _row in _results:
    print(*_row)
"""


@dataclass(frozen=True)
class Knobs:
    """What `env_config` may hold.

    seed: Tasks are a function of it and of the split's name.
    lines: Fewest and most lines of a program, within 1 to 4.
    wrong: Fewest and most lines that are wrong at first, within 1 to 4.
    operators: Those to choose from, two or more of "+-*&|^".
    spare_turns: Turns beyond what trying every operator takes.
    carelessness: Chance that a careless demonstration breaks the rule in a line.
    train, validation, test: Tasks in each split.
    demonstrations: Weight of each behaviour in demonstrations; one that is left out is 0.
    slips: Chance of each slip before a call of a demonstration; one that is left out is 0.
    instructions: Whether the prompt explains the task, for a model that was not made for it.
    """

    seed: int = 0
    lines: tuple[int, int] = (4, 4)
    wrong: tuple[int, int] = (2, 2)
    operators: str = "+-*"
    spare_turns: int = 4
    carelessness: float = 0.25
    train: int = 8000
    validation: int = 256
    test: int = 256
    demonstrations: tuple[tuple[str, float], ...] = field(default=tuple(DEMONSTRATIONS.items()))
    slips: tuple[tuple[str, float], ...] = field(default=tuple(SLIPS.items()))
    instructions: bool = False

    @staticmethod
    def of(env_config: Mapping[str, Any]) -> Knobs:
        """Checked knobs; ConfigError says what is valid."""
        knobs = checked_knobs(Knobs, env_config, DEMONSTRATIONS, SLIPS)
        for name in ("lines", "wrong"):
            check_range(name, getattr(knobs, name), 1, len(VARIABLES))
        if knobs.wrong[1] > knobs.lines[0]:
            raise ConfigError(
                f"env_config: wrong={knobs.wrong}, lines={knobs.lines}: the shortest program has "
                "fewer lines than may be wrong."
            )
        check_whole("spare_turns", knobs.spare_turns, 0)
        operators = knobs.operators
        if (
            not isinstance(operators, str)
            or len(set(operators)) < max(2, len(operators))
            or not set(operators) <= set(OPERATORS)
        ):
            raise ConfigError(
                f"env_config: operators={operators!r}: two or more of {OPERATORS!r}, each once."
            )
        chance = knobs.carelessness
        if isinstance(chance, bool) or not isinstance(chance, (int, float)) or not 0 <= chance < 1:
            raise ConfigError(f"env_config: carelessness={chance!r}: at least 0 and below 1.")
        return knobs


class Repair(PythonToolEnv, ScriptedEnv):
    """Programs to mend.  `env_config`: see `Knobs`."""

    python_limits = Limits(cpu_seconds=2.0, memory_mb=256, output_chars=4096)
    knobs: Knobs

    def __init__(self, env_config: Mapping[str, Any] | None = None) -> None:
        super().__init__(env_config)
        self.knobs = Knobs.of(self.env_config)
        self.turn_limit = len(self.knobs.operators) - 1 + self.knobs.spare_turns
        self._passed = False

    def tasks(self, split: str) -> Iterable[Task]:
        """Rows {"id", "question", "answer", "wrong"}; no two of all splits are equal.

        The answer is the right program.
        """
        return [dict(row) for row in _rows(self.knobs, split)]

    def prompt(self, task: Task) -> str:
        """The program and its wrong lines, by themselves or (`instructions`) with an
        explanation."""
        if not self.knobs.instructions:
            return str(task["question"])
        program, report = _halves(task)
        return (
            f"Some operators of this program are wrong:\n{program}\nIts tests say:\n{report}\n"
            f"The right operators are among {' '.join(self.knobs.operators)}. Submit the whole "
            f"program with other operators in the wrong lines:\n{self.call(program)}\nThe submit "
            "tool runs it and says which lines are still wrong. Never try what was wrong before."
        )

    def reward(self, trajectory: Trajectory, task: Task) -> dict[str, float]:
        """1 if a submission passed."""
        return {"accuracy": float(self._passed)}

    def done(self, trajectory: Trajectory, task: Task) -> bool:
        """Whether the program is mended."""
        return self._passed

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """See ToolEnv; nothing has been submitted, and the Python session is new."""
        first = super().reset(seed=seed, options=options)
        self._passed = False
        return first

    async def submit(self, code: str) -> ToolResult:
        """Run a program on the tests and see which lines are wrong.  code: the whole program."""
        assert self.trajectory is not None, "reset() first"
        right = _program(str(self.trajectory.task["answer"]))
        names = "".join(line.variable for line in right)
        result = await self.run_python(_RUN.format(inputs=_INPUTS, code=code, names=names))
        failed = result.status is not Status.OK
        wrong = list(names) if failed else _judged(right, _values(result.output, len(names)))
        self._passed = self._passed or not wrong
        content = _report(code, names, wrong)
        if failed:  # the last line of a traceback says it all
            content += "\n" + result.output.strip().rpartition("\n")[2]
        return ToolResult("submit", content, to_tool_result(result).error)

    tools = (submit,)

    def demonstrate(self, task: Task, behaviour: str, rng: random.Random) -> list[Message]:
        """A demonstration of a named behaviour: what the model says and what it is answered.

        It ends when the program passes, with the last turn there is, or by giving up.
        """
        right = _program(str(task["answer"]))
        program = _program(_halves(task)[0])
        notes = Notes(self.knobs.operators)
        wrong = notes.take(program, _judged(right, _run(program)))
        carelessness = self.knobs.carelessness if behaviour == "careless" else 0.0
        patience = rng.randrange(5) if behaviour == "give_up" else self.turn_limit
        messages: list[Message] = []
        for _ in range(self.turn_limit):
            slip = drawn_slip(self.knobs.slips, rng)
            if slip == "repeat":
                messages += self._submitted(program, wrong)
                continue
            if patience <= 0:
                return [*messages, assistant(GIVE_UP)]
            changed = [notes.mended(line, carelessness, rng) for line in program]
            if slip == "malformed":
                messages += self.unclosed(_text(changed))
                continue
            program, patience = changed, patience - 1
            wrong = notes.take(program, _judged(right, _run(program)))
            messages += self._submitted(program, wrong)
            if not wrong:
                break
        return messages

    def _submitted(self, program: Sequence[Line], wrong: Sequence[str]) -> list[Message]:
        code, names = _text(program), [line.variable for line in program]
        return [assistant(self.call(code)), answered(_report(code, names, wrong))]


class Notes:
    """What a demonstration has seen: the right operator of a line, and wrong ones."""

    def __init__(self, operators: str) -> None:
        self._operators = operators
        self._right: dict[str, str] = {}
        self._wrong: dict[str, set[str]] = {}

    def take(self, program: Sequence[Line], wrong: list[str]) -> list[str]:
        """Notes what is wrong in a program, and returns it."""
        for line in program:
            if line.variable in wrong:
                self._wrong.setdefault(line.variable, set()).add(line.operator)
                self._right.pop(line.variable, None)  # seemed right, on other values
            else:
                self._right[line.variable] = line.operator
        return wrong

    def mended(self, line: Line, carelessness: float, rng: random.Random) -> Line:
        """The line as it should be or may be, or, by carelessness, as it cannot be."""
        right, wrong = self._right.get(line.variable), self._wrong.get(line.variable, set())
        if rng.random() < carelessness:
            choice = [o for o in self._operators if (o != right if right else o in wrong)]
        else:
            choice = [right] if right else [o for o in self._operators if o not in wrong]
        return replace(line, operator=rng.choice(choice or self._operators))


@dataclass(frozen=True)
class Line:
    """`variable operator= operand`; the operand is another variable or a digit."""

    variable: str
    operator: str
    operand: str

    def value(self, values: Mapping[str, int]) -> int:
        """What the line makes of its variable."""
        operand = int(self.operand) if self.operand.isdigit() else values[self.operand]
        return _OPERATIONS[self.operator](values[self.variable], operand)


_OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "&": lambda a, b: a & b,
    "|": lambda a, b: a | b,
    "^": lambda a, b: a ^ b,
}


def _program(text: str) -> list[Line]:
    return [Line(*match.groups()) for match in map(_LINE.fullmatch, text.split("\n")) if match]


def _text(program: Sequence[Line]) -> str:
    return "\n".join(f"{line.variable}{line.operator}={line.operand}" for line in program)


def _run(program: Sequence[Line]) -> list[list[int]]:
    """The variables' values on each test, worked out here."""
    rows = []
    for inputs in _INPUTS:
        values = dict(zip(VARIABLES, inputs, strict=True))
        for line in program:
            values[line.variable] = line.value(values)
        rows.append([values[line.variable] for line in program])
    return rows


def _values(output: str, count: int) -> list[list[int | None]]:
    """What a submission's run printed last: its variables' values on each test."""
    rows = [
        [int(v) if re.fullmatch(r"-?\d{1,18}", v) else None for v in line.split(" ")]
        for line in output.rstrip("\n").split("\n")[-len(_INPUTS) :]
    ]
    fits = len(rows) == len(_INPUTS) and all(len(row) == count for row in rows)
    return rows if fits else [[None] * count] * len(_INPUTS)


def _judged(right: Sequence[Line], rows: Sequence[Sequence[int | None]]) -> list[str]:
    """The variables whose values do not follow from the values before them."""
    wrong = []
    for index, line in enumerate(right):
        for inputs, row in zip(_INPUTS, rows, strict=True):
            values = dict(zip(VARIABLES, inputs, strict=True))
            values |= {r.variable: v or 0 for r, v in zip(right[:index], row[:index], strict=True)}
            if row[index] != line.value(values):
                wrong.append(line.variable)
                break
    return wrong


def _report(code: str, names: Iterable[str], wrong: Sequence[str]) -> str:
    """What the model sees; as long as the program, so that everything has its place."""
    if not wrong:
        return PASSED
    heads = {match[1]: match[0] for match in re.finditer(r"^(\w)\W*=", code, re.MULTILINE)}
    return "\n".join(f"{heads.get(n, n)} {'wrong' if n in wrong else 'ok'}" for n in names)


def _halves(task: Task) -> tuple[str, str]:
    """The program as it is given, and the report on it."""
    lines = str(task["question"]).split("\n")
    return "\n".join(lines[: len(lines) // 2]), "\n".join(lines[len(lines) // 2 :])


@lru_cache(maxsize=8)
def _rows(knobs: Knobs, split: str) -> tuple[Task, ...]:
    return distinct_tasks(
        lambda rng: _task(knobs, rng), split, getattr(knobs, split, 0), knobs.seed
    )


def _task(knobs: Knobs, rng: random.Random) -> Task | None:
    names = VARIABLES[: rng.randint(*knobs.lines)]
    right = [
        Line(name, rng.choice(knobs.operators), rng.choice([*_DIGITS, *names.replace(name, "")]))
        for name in names
    ]
    wrong = rng.sample(range(len(right)), rng.randint(*knobs.wrong))
    given = list(right)
    for index in wrong:
        others = knobs.operators.replace(right[index].operator, "")
        given[index] = replace(right[index], operator=rng.choice(others))
    judged = _judged(right, _run(given))
    if judged != [right[index].variable for index in sorted(wrong)]:
        return None
    return {
        "question": f"{_text(given)}\n{_report(_text(given), names, judged)}",
        "answer": _text(right),
        "wrong": len(wrong),
    }
