"""Word problems made from a seed, and demonstrations of solving them with a Python tool.

    user       Ann has 23 pens. Monday: gets 17 more. Tuesday: loses 8. How many pens has Ann now?
    assistant  ```python          tool  40
               a=23+17
               print(a)
               ```
    assistant  ```python          tool  32
               b=a-8
               print(b)
               ```
    assistant  \\boxed{32}

One call for each day, and a name for each result, which the next day's call uses: that is what the
session is for.  (Without one, the call writes the number.)

A demonstration behaves in one of six ways:

    solve         one call for each day, then the answer
    retry         the same, but one call first uses a name that does not exist, and is written again
    malformed     the same, but one call is first left unclosed, and is written again
    guess         a wrong number at once, without a call
    stop_early    an intermediate result as the answer
    ignore_error  a call fails, and a wrong number is the answer
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

from rllib_gtpo.types import Message, Task
from rllib_gtpo_envs.chains import demonstrated_steps, guesses, random_chain
from rllib_gtpo_envs.common import UNCLOSED, answered, assistant, distinct_tasks, wrong_number

DEMONSTRATIONS = {
    "solve": 0.24,
    "retry": 0.11,
    "malformed": 0.05,
    "guess": 0.20,
    "stop_early": 0.22,
    "ignore_error": 0.18,
}
"""Default weights of the behaviours in demonstrations: two in five solve the task."""
NAMES = ("Ann", "Bob", "Eve", "Kim", "Tom", "Zoe")
THINGS = ("pens", "cups", "nuts", "eggs", "maps", "keys")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
EVENTS = {
    "+": (" gets {} more", " finds {} more"),
    "-": (" loses {}", " gives away {}"),
    "*": (" then has {} times as many", " makes it {} times as many"),
}
RESULTS = "abcdefg"  # the name of each day's result
NO_NAME = "NameError: name 'z' is not defined"
MARKUP = (
    *(f"{name} has " for name in NAMES),
    *(f" {thing}" for thing in THINGS),
    *(part for events in EVENTS.values() for event in events for part in event.split("{}") if part),
    *(f". {day}:" for day in DAYS),
    ". How many",
    *(f" has {name} now?" for name in NAMES),
    *(
        f"{result}={first}"
        for result, before in zip(RESULTS, "a" + RESULTS, strict=False)
        for first in ("", before, "z")
    ),
    *(f"\nprint({result})" for result in RESULTS),
    "\\boxed{",
    NO_NAME,
    UNCLOSED,
)
"""Tokens for `build_tokenizer(MARKUP)`, which keep the turns of a model made from scratch short."""


@dataclass(frozen=True)
class WordProblems:
    """What problems and demonstrations are made from; documented in `python_math.Knobs`."""

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


@lru_cache(maxsize=8)
def word_problems(problems: WordProblems, split: str) -> tuple[Task, ...]:
    """Rows {"id", "question", "answer", "chain"}; no problem is in two splits."""
    wanted = getattr(problems, split, 0)
    return distinct_tasks(lambda rng: _problem(problems, rng), split, wanted, problems.seed)


def _problem(problems: WordProblems, rng: random.Random) -> Task | None:
    chain, answer = random_chain(problems, rng)
    if answer is None:
        return None
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    start, *steps = re.findall(r"[+\-*]?\d+", chain)
    text = f"{name} has {start} {thing}"
    for day, step in zip(DAYS, steps, strict=False):
        text += f". {day}:" + rng.choice(EVENTS[step[0]]).format(step[1:])
    question = f"{text}. How many {thing} has {name} now?"
    return {"question": question, "answer": str(answer), "chain": chain}


def demonstrate(
    task: Task,
    behaviour: str,
    rng: random.Random,
    *,
    session: bool,
    call: Callable[[str], str],
    unclosed: Callable[[str], list[Message]],
) -> list[Message]:
    """A demonstration of a named behaviour.

    session: Whether a call sees the variables of those before it.
    call, unclosed: How a call is written, and one without its end with what is answered to it.
    """
    chain, answer = str(task["chain"]), str(task["answer"])
    if guesses(chain, behaviour):
        return [_boxed(wrong_number(answer, rng))]
    messages: list[Message] = []
    for step in demonstrated_steps(chain, behaviour, rng):
        result = RESULTS[step.number]
        what = f"{step.operator}{step.second}\nprint({result})"
        if step.slip in ("retry", "ignore_error"):
            messages += [assistant(call(f"{result}=z{what}")), answered(NO_NAME)]
            if step.slip == "ignore_error":
                return [*messages, _boxed(wrong_number(answer, rng))]
        known = RESULTS[step.number - 1] if session and step.number else step.first
        code = f"{result}={known}{what}"
        if step.slip == "malformed":
            messages += unclosed(code)
        messages += [assistant(call(code)), answered(step.value)]
    return [*messages, _boxed(step.value)]


def _boxed(answer: str) -> Message:
    return assistant(f"\\boxed{{{answer}}}")
