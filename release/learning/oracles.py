"""Which turns of a rollout were right, given what had been seen by then: the tasks know, exactly.

`blame.py` compares advantages with it, which no estimator sees.  `Stepwise` tasks pay for it.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping

from rllib_gtpo import ToolEnv
from rllib_gtpo.types import Task, Trajectory, Turn
from rllib_gtpo_envs import Calculator, Lookup

STEP_REWARD = 0.1  # as much as an invalid call costs

_LEFT = re.compile(r"left: (\S+)\Z")


def chain_turns(trajectory: Trajectory) -> list[bool]:
    """A call that takes a step off the chain; the right answer when none is left."""
    left = str(trajectory.task["question"])
    right = []
    for turn in trajectory.turns:
        match = _LEFT.search(turn.results[0].content) if turn.results else None
        after = match.group(1) if match else left
        right.append(trajectory.correct if not turn.calls else not turn.invalid and after != left)
        left = after
    return right


def lookup_turns(trajectory: Trajectory) -> list[bool]:
    """The entry of the relation that is due, wherever the rollout is; the value found there."""
    due = _due(str(trajectory.task["question"]))
    right = []
    for turn in trajectory.turns:
        said = turn.content if not turn.calls else str(turn.calls[0].arguments.get("entry", ""))
        right.append(not turn.invalid and said.strip() == due)
        if turn.results:
            due = _due(turn.results[0].content) or due
    return right


def _due(shown: str) -> str:
    """What follows from the newest message: "boss:m", or the value if no relation is left."""
    match = re.search(r"left: (\S+)\n(.*)", shown)
    if match is None:
        return ""
    if match[1] == "none":
        return match[2].removeprefix("value=")
    relation = match[1].split(":")[-2]
    return next(e for e in match[2].split(" ") if e.startswith(f"{relation}:"))


def repair_turns(trajectory: Trajectory) -> list[bool]:
    """A submission that keeps the right lines and tries what is new in the wrong ones."""
    told = str(trajectory.task["question"]).split("\n")
    lines, wrong = told[: len(told) // 2], _wrong("\n".join(told))
    tried = [{line} for line in lines]
    right = []
    for turn in trajectory.turns:
        submitted = [] if turn.invalid or not turn.calls else _lines(turn)
        if len(submitted) != len(lines):
            right.append(False)
            continue
        right.append(
            all(
                new not in seen if old[0] in wrong else new == old
                for new, old, seen in zip(submitted, lines, tried, strict=True)
            )
        )
        for new, seen in zip(submitted, tried, strict=True):
            seen.add(new)
        lines, wrong = submitted, _wrong(turn.results[0].content)
    return right


def _wrong(report: str) -> set[str]:
    return {line[0] for line in report.split("\n") if line.endswith(" wrong")}


def _lines(turn: Turn) -> list[str]:
    return str(turn.calls[0].arguments["code"]).strip().split("\n")


ORACLES: dict[str, Callable[[Trajectory], list[bool]]] = {
    "chain": chain_turns,
    "chain_steps": chain_turns,
    "lookup": lookup_turns,
    "lookup_steps": lookup_turns,
    "repair": repair_turns,
}


class Stepwise(ToolEnv):
    """A task that pays for every call that was right, besides the outcome."""

    def turn_reward(self, turn: Turn, task: Task) -> Mapping[str, float]:
        """The newest turn's pay; an answer gets its own in the end."""
        assert self.trajectory is not None
        right = bool(turn.calls) and self.judged(self.trajectory)[-1]
        return {"step": STEP_REWARD if right else 0.0}

    @staticmethod
    @abstractmethod
    def judged(trajectory: Trajectory) -> list[bool]:
        """Which turns were right."""


class StepwiseChain(Stepwise, Calculator):
    """The chain with rewards of turns."""

    judged = staticmethod(chain_turns)


class StepwiseLookup(Stepwise, Lookup):
    """The look-up with rewards of turns."""

    judged = staticmethod(lookup_turns)
