"""Chains of operations such as `12+7*3-5`, worked out strictly from left to right."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from rllib_gtpo.errors import ConfigError
from rllib_gtpo_envs.common import check_range, check_whole

_STEP = re.compile(r"(\d+)([+\-*])(\d+)(.*)")
_OPERATOR = re.compile(r"[+\-*]")


class ChainKnobs(Protocol):
    """What chains are drawn from; see `rllib_gtpo_envs.calculator.Knobs`."""

    @property
    def operations(self) -> tuple[int, int]: ...
    @property
    def numbers(self) -> tuple[int, int]: ...
    @property
    def factors(self) -> tuple[int, int]: ...
    @property
    def operators(self) -> str: ...
    @property
    def largest(self) -> int: ...


def check_chain_knobs(knobs: ChainKnobs) -> None:
    """Refuses knobs from which no chain can be drawn; ConfigError says what is valid."""
    check_range("operations", knobs.operations, 1, 8)
    check_range("numbers", knobs.numbers, 0, 99_999)
    check_range("factors", knobs.factors, 0, 99_999)
    check_whole("largest", knobs.largest, 1)
    operators = knobs.operators
    if not isinstance(operators, str) or not operators or not set(operators) <= set("+-*"):
        raise ConfigError(f"env_config: operators={operators!r}: one or more of '+-*'.")


def random_chain(knobs: ChainKnobs, rng: random.Random) -> tuple[str, int | None]:
    """A random chain and its value, or None if a result on the way is out of bounds."""
    value = rng.randint(*knobs.numbers)
    chain = str(value)
    for _ in range(rng.randint(*knobs.operations)):
        operator = rng.choice(knobs.operators)
        number = rng.randint(*(knobs.factors if operator == "*" else knobs.numbers))
        value = result_of(value, operator, number)
        chain += f"{operator}{number}"
        if not 0 <= value <= knobs.largest:
            return chain, None
    return chain, value


def first_step(chain: str) -> tuple[str, str, str, str] | None:
    """First number, operator, second number and the rest; None if no step is left."""
    match = _STEP.fullmatch(chain)
    return None if match is None else (match[1], match[2], match[3], match[4])


def count_operations(chain: str) -> int:
    """How many steps the chain takes."""
    return len(_OPERATOR.findall(chain))


class DemonstratedStep(NamedTuple):
    """One step of a demonstration, and the slip before it: a behaviour's name, or None."""

    number: int
    first: str
    operator: str
    second: str
    value: str
    chain: str  # what is left before the step
    slip: str | None


def guesses(chain: str, behaviour: str) -> bool:
    """Whether a demonstration answers at once; a single step leaves nothing to stop early at."""
    return behaviour == "guess" or (behaviour == "stop_early" and count_operations(chain) == 1)


def demonstrated_steps(
    chain: str, behaviour: str, rng: random.Random
) -> Iterator[DemonstratedStep]:
    """The steps that a demonstration takes, one of them with the slip that its behaviour makes."""
    operations = count_operations(chain)
    steps = rng.randint(1, operations - 1) if behaviour == "stop_early" else operations
    slip_at = rng.randrange(operations)
    slips = behaviour in ("retry", "ignore_error", "malformed")
    for number in range(steps):
        step = first_step(chain)
        assert step is not None, chain
        first, operator, second, rest = step
        value = str(result_of(int(first), operator, int(second)))
        slip = behaviour if slips and number == slip_at else None
        yield DemonstratedStep(number, first, operator, second, value, chain, slip)
        chain = value + rest


def result_of(first: int, operator: str, second: int) -> int:
    """The result of one step."""
    return {"+": first + second, "-": first - second, "*": first * second}[operator]
