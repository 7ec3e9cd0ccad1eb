"""What an estimator of turn advantages is, and the registry of them.

An estimator is a pure function of `Turns`, registered by a decorator.  Its keyword-only parameters
are its whole contract: those without a default are data that it needs (`outcome`, `anchor`), those
with one are its options.

Shape suffixes: `_N` flat turns (rows).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, TypeVar, get_args, get_origin

from torch import Tensor

from rllib_gtpo.errors import ConfigError, did_you_mean
from rllib_gtpo.ops.segments import Segments, TrajectoryRows

INPUTS = ("outcome", "anchor")
AllReduce = Callable[[Tensor], Tensor | None]
F = TypeVar("F", bound="Callable[..., TurnCredit]")


@dataclass(frozen=True)
class TurnCredit:
    """What every turn is trained on, all [N].  Where a set has no spread, advantages are 0.

    advantages = (returns - baseline) / scale, but for the two estimators that add a second term
    (mt_grpo, gigpo): there the three describe the first term, the trajectory's.
    """

    returns: Tensor
    baseline: Tensor
    scale: Tensor
    advantages: Tensor


@dataclass(frozen=True)
class Turns:
    """What an estimator sees: checked float64 rewards and who belongs to whom."""

    rewards_N: Tensor
    rows: TrajectoryRows
    group: Segments
    all_reduce: AllReduce | None = None

    @property
    def first_N(self) -> Tensor:
        """1.0 on the first row of each trajectory: the weight that counts trajectories once."""
        return (self.rows.position_N == 0).double()

    def sums(self) -> Tensor:
        """For each row, the undiscounted reward of its whole trajectory."""
        return self.rows.segments.total(self.rewards_N)

    def sum_over_learners(self, sums: Tensor) -> Tensor:
        """`sums` over all learners; every learner must call it equally often, also without rows."""
        if self.all_reduce is None:
            return sums
        reduced = self.all_reduce(sums)
        return sums if reduced is None else reduced


@dataclass(frozen=True)
class Estimator:
    """A registered function and what its signature says about it."""

    name: str
    compute: Callable[..., TurnCredit]
    inputs: tuple[str, ...]
    options: Mapping[str, Any]  # name -> default
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    no_effect: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)

    def resolve(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options to call with; ConfigError for any that is unknown, unused or mistyped."""
        for name, value in given.items():
            if name not in self.options:
                known = {o for e in ESTIMATORS.values() for o in e.options}
                why = (
                    f"is not used by it (it takes: {', '.join(self.options) or 'none'})"
                    if name in known
                    else f"is unknown{did_you_mean(name, self.options)}"
                )
                raise ConfigError(f"estimator {self.name!r}: option {name!r} {why}")
            check_option(self.name, name, value, self.options[name], self.choices.get(name))
        resolved = {**self.options, **given}
        for option, unused in self.no_effect.items():
            for name in sorted(set(unused.get(resolved[option], ())) & set(given)):
                raise ConfigError(
                    f"estimator {self.name!r}: option {name!r} is not used with "
                    f"{option}={resolved[option]!r}; leave it out"
                )
        return resolved


ESTIMATORS: dict[str, Estimator] = {}


def check_option(
    estimator: str, name: str, value: Any, default: Any, choices: tuple[str, ...] | None
) -> None:
    """Raise ConfigError unless `value` is one of `choices`, or of the kind of `default`."""
    told = f"estimator {estimator!r}: option {name!r}"
    if choices is not None:
        if value not in choices:
            raise ConfigError(f"{told} is {value!r}{did_you_mean(value, choices)}")
    elif isinstance(default, bool):
        if not isinstance(value, bool):
            raise ConfigError(f"{told} must be True or False, got {value!r}")
    elif isinstance(default, float):
        ok = isinstance(value, Real) and not isinstance(value, bool)
        if not ok or not math.isfinite(value):
            raise ConfigError(f"{told} must be a finite number, got {value!r}")


def register_estimator(
    name: str, *, no_effect: Mapping[str, Mapping[str, tuple[str, ...]]] | None = None
) -> Callable[[F], F]:
    """Register `f(turns, *, needed_input, option=default, ...) -> TurnCredit` as `estimator=name`.

    Args:
        name: What `estimator=` selects.  A taken name raises ConfigError.
        no_effect: `{option: {value: (other options, ...)}}`: passing one of the others together
            with that value raises, instead of silently doing nothing.

    Example:
        ```python
        @register_estimator("outcome_only")
        def outcome_only(turns: Turns, *, outcome: Tensor, shift: float = 0.0) -> TurnCredit:
            one = torch.ones_like(outcome)
            return TurnCredit(outcome, shift * one, one, outcome - shift)
        ```
    """
    if not isinstance(name, str):
        raise TypeError('register_estimator needs a name: @register_estimator("my_estimator")')

    def register(function: F) -> F:
        if name in ESTIMATORS:
            raise ConfigError(f"estimator {name!r} is already registered")
        try:
            signature = inspect.signature(function, eval_str=True)
        except NameError:  # annotations imported for type checkers only: no Literal to read
            signature = inspect.signature(function)
        inputs, options, choices = [], {}, {}
        for parameter in list(signature.parameters.values())[1:]:
            if parameter.kind is not parameter.KEYWORD_ONLY:
                raise TypeError(f"estimator {name!r}: {parameter} must be keyword-only")
            if parameter.default is not parameter.empty:
                options[parameter.name] = parameter.default
            elif parameter.name in INPUTS:
                inputs.append(parameter.name)
            else:
                raise TypeError(
                    f"estimator {name!r}: {parameter} needs a default; inputs: {INPUTS}"
                )
            if get_origin(parameter.annotation) is Literal:
                choices[parameter.name] = get_args(parameter.annotation)
        ESTIMATORS[name] = Estimator(
            name, function, tuple(inputs), options, choices, no_effect or {}
        )
        return function

    return register
