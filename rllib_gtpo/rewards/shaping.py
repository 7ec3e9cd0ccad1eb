"""Partial credit for failed rollouts: how similar their code is to that of correct siblings.

Section 3 of the algorithm's description.  A failed trajectory of a group with correct ones gets

    shaping = alpha * mean over the correct ones of max(0, cosine(its code, their code))

on its last turn.  Groups without a correct member cannot be helped by this, correct trajectories
keep their 1, and a trajectory that wrote no code gets 0.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rllib_gtpo.errors import ConfigError, EmbedderError, did_you_mean
from rllib_gtpo.rewards.rubric import merge_components
from rllib_gtpo.types import Group, Trajectory

if TYPE_CHECKING:
    from rllib_gtpo.rewards.embedders import Embedder

SHAPING = "shaping"
MODES = ("none", "mean", "max", "constant", "shuffled")
INPUTS = ("code", "trajectory")
ON_FAILURE = ("stop", "skip")

_log = logging.getLogger(__name__)


@dataclass
class Shaping:
    """Adds the component "shaping" to the last turns of finished groups.

    mode: "mean" or "max" over the correct siblings.  Two controls show whether similarity itself
        teaches anything: "constant" gives every failed member that wrote something the mean of what
        they would have got, and "shuffled" deals the same values out to them at random.
    alpha: What a perfect copy of correct code is worth.
    compared: "code", or the whole "trajectory" with what the tools answered.
    on_failure: "stop" raises when a text cannot be embedded; "skip" leaves its whole group without
        the component, so that members are never compared on different terms.
    """

    embedder: Embedder
    mode: str = "mean"
    alpha: float = 0.5
    compared: str = "code"
    on_failure: str = "stop"

    def __post_init__(self) -> None:
        if self.mode == "none" or self.mode not in MODES:
            raise ConfigError(f"shaping mode {self.mode!r}{did_you_mean(self.mode, MODES[1:])}")

    def score_groups(self, groups: Sequence[Group]) -> int:
        """Shapes the groups; returns how many had to go without because embedding failed."""
        sides = [self._sides(group) for group in groups]
        embedded = self._embed(sides)
        failures = [e for e in embedded.values() if isinstance(e, Exception)]
        if failures and self.on_failure == "stop":
            raise EmbedderError(
                f"{len(failures)} of {len(embedded)} texts could not be embedded for shaping; the "
                f"first: {failures[0]}  Mend it, or set rewards(on_embedder_failure='skip') to go "
                "on without shaping in such groups."
            ) from failures[0]
        unshaped = 0
        for group, (failed, correct) in zip(groups, sides, strict=True):
            if any(isinstance(embedded.get(t), Exception) for t in (*failed.values(), *correct)):
                unshaped += 1
            else:
                self._score(group, failed, correct, embedded)
        if unshaped:
            _log.warning("%d groups are not shaped; the first cause: %s", unshaped, failures[0])
        return unshaped

    def _sides(self, group: Group) -> tuple[dict[int, str], list[str]]:
        """Texts of the failed members, by index, and of the correct ones they are compared with."""
        correct = [self._text(t) for t in group.trajectories if t.correct]
        failed = {
            index: self._text(t) for index, t in enumerate(group.trajectories) if can_be_shaped(t)
        }
        return (failed, correct) if correct else ({}, [])

    def _embed(self, sides: Sequence[tuple[dict[int, str], list[str]]]) -> dict[str, Any]:
        """The vector (or failure) of every text that has another to be compared with, each once."""
        texts = [
            text
            for failed, correct in sides
            if any(failed.values()) and any(correct)
            for text in (*failed.values(), *correct)
            if text
        ]
        unique = list(dict.fromkeys(texts))
        return dict(zip(unique, self.embedder.embed(unique), strict=True)) if unique else {}

    def _score(
        self, group: Group, failed: dict[int, str], correct: list[str], embedded: dict[str, Any]
    ) -> None:
        texts = list(failed.values())
        models = [embedded.get(text) for text in correct]
        similarity = np.array([[_cosine(embedded.get(f), m) for m in models] for f in texts])
        values = self._values(similarity, [embedded.get(f) is not None for f in texts], group.id)
        bonus = dict(zip(failed, values, strict=True))
        siblings = [t.member for t in group.trajectories if t.correct]
        compared = dict(zip(failed, similarity.tolist(), strict=True))
        for index, trajectory in enumerate(group.trajectories):
            trajectory.similarities = dict(zip(siblings, compared.get(index, ()), strict=False))
            if trajectory.turns:
                component = {SHAPING: self.alpha * bonus.get(index, 0.0)}
                merge_components(trajectory.turns[-1].rewards, component, SHAPING)

    def _values(self, similarity: Any, wrote_any: list[bool], seed: int) -> list[float]:
        """What each failed member gets: of its similarities, and of whether it wrote anything."""
        if not similarity.size:
            return []
        values = similarity.max(axis=1) if self.mode == "max" else similarity.mean(axis=1)
        wrote = [index for index, any_text in enumerate(wrote_any) if any_text]
        if self.mode == "constant" and wrote:
            values[wrote] = values[wrote].mean()
        if self.mode == "shuffled":
            values[wrote] = values[random.Random(seed).sample(wrote, len(wrote))]
        return [float(value) for value in values]

    def _text(self, trajectory: Trajectory) -> str:
        if self.compared == "code":
            return trajectory.code.strip()
        return "\n".join(
            part
            for turn in trajectory.turns
            for part in (turn.text, *(result.content for result in turn.results))
        ).strip()


def can_be_shaped(trajectory: Trajectory) -> bool:
    """Whether it failed with an accuracy of 0 (or below, where that is how a task says wrong).

    One with a partial accuracy of its own keeps that.
    """
    if trajectory.correct or not trajectory.turns:
        return False
    return trajectory.turns[-1].rewards.get("accuracy", 0.0) <= 0.0


def _cosine(one: Any, other: Any) -> float:
    """Of two unit vectors, not below 0; 0 if one of them wrote nothing."""
    if one is None or other is None:
        return 0.0
    return float(np.clip(np.dot(one.astype(float), other.astype(float)), 0.0, 1.0))
