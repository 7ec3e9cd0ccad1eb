"""What is run: tasks, arms, and the studies made of them.  Fixed before any outcome was seen.

Nothing is tuned per arm: learning rate, batch, budget and model are the task's, the same for all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from release.learning.oracles import StepwiseChain, StepwiseLookup
from rllib_gtpo import ToolEnv
from rllib_gtpo_envs import Calculator, Lookup, Repair
from rllib_gtpo_envs.lookup import MARKUP as LOOKUP_TOKENS
from rllib_gtpo_envs.repair import MARKUP as REPAIR_TOKENS

SEEDS = (0, 1, 2, 3, 4)
EVALUATIONS = 3  # held-out evaluations after the one at the start, evenly spaced in sampled tokens
PROBLEMS = 256  # of the test split, one sample each, the same ones at every evaluation of a seed


@dataclass(frozen=True)
class StudyTask:
    """A task with everything that is the same for all arms.

    budget: sampled tokens after which training stops.
    starts_as: the task whose cold start it shares, if not its own.
    """

    env: type[ToolEnv]
    env_config: Mapping[str, Any]
    max_turn_tokens: int
    budget: int
    cold_start: Mapping[str, Any]
    training: Mapping[str, Any] = field(
        default_factory=lambda: {"lr": 2e-4, "group_size": 8, "groups_per_step": 8}
    )
    extra_tokens: tuple[str, ...] = ()  # of the tokenizer
    starts_as: str | None = None


@dataclass(frozen=True)
class Run:
    """One training: a task, settings by their flat names, and a seed."""

    task: str
    settings: tuple[tuple[str, Any], ...]
    seed: int

    @property
    def name(self) -> str:
        """What its record is called: the same run of two studies is made once."""
        text = json.dumps(self.settings, sort_keys=True)
        return f"{self.task}-{hashlib.sha256(text.encode()).hexdigest()[:10]}-{self.seed}"

    @property
    def start(self) -> tuple[str, int]:
        """Task and seed of its cold start."""
        return TASKS[self.task].starts_as or self.task, self.seed


@dataclass(frozen=True)
class Study:
    """Arms that are compared on tasks over seeds."""

    question: str
    tasks: tuple[str, ...]
    arms: Mapping[str, Mapping[str, Any]]
    baselines: tuple[str, ...]
    seeds: tuple[int, ...] = SEEDS

    def run(self, task: str, arm: str, seed: int) -> Run:
        """The run of an arm."""
        return Run(task, tuple(sorted(self.arms[arm].items())), seed)

    def runs(self) -> list[Run]:
        """All of them; a seed is complete before the next begins."""
        return [self.run(t, a, s) for s in self.seeds for t in self.tasks for a in self.arms]


_RARE_CHAINS = {
    "solve": 0.08,
    "retry": 0.08,
    "malformed": 0.10,
    "guess": 0.18,
    "stop_early": 0.30,
    "ignore_error": 0.26,
}
TASKS = {
    # Six calls that depend on each other and an answer; one demonstration in four gets there.
    "chain": StudyTask(
        Calculator,
        {
            "operations": [4, 6],
            "demonstrations": _RARE_CHAINS,
        },
        max_turn_tokens=24,
        budget=40_000,
        cold_start={"data": "expert", "steps": 900, "batch_size": 24, "lr": 2e-3},
    ),
    # A wrong turn shows only in the value that it ends with.
    "lookup": StudyTask(
        Lookup,
        {
            "hops": [4, 6],
            "decoys": 2,
            "demonstrations": {
                "solve": 0.25,
                "wrong_turn": 0.35,
                "stop_early": 0.25,
                "guess": 0.15,
            },
            "slips": {"typo": 0.08, "malformed": 0.06},
        },
        max_turn_tokens=16,
        budget=40_000,
        cold_start={"data": "expert", "steps": 1000, "batch_size": 32, "lr": 2e-3},
        extra_tokens=LOOKUP_TOKENS,
    ),
    # What was seen to be wrong must not be tried again, and what is right must stay.
    "repair": StudyTask(
        Repair,
        {"operators": "+-*", "lines": [4, 4], "wrong": [2, 2], "spare_turns": 4},
        max_turn_tokens=24,
        budget=100_000,
        cold_start={"data": "expert", "steps": 1800, "batch_size": 32, "lr": 2e-3},
        extra_tokens=REPAIR_TOKENS,
    ),
    # Short enough for a limit of 4 turns, with none to spare there.
    "short_chain": StudyTask(
        Calculator,
        {"operations": [2, 3], "demonstrations": _RARE_CHAINS},
        max_turn_tokens=24,
        budget=25_000,
        cold_start={"data": "expert", "steps": 700, "batch_size": 24, "lr": 2e-3},
    ),
}
# The same problems and the same models, paid by the turn.
TASKS["chain_steps"] = replace(TASKS["chain"], env=StepwiseChain, starts_as="chain")
TASKS["lookup_steps"] = replace(TASKS["lookup"], env=StepwiseLookup, starts_as="lookup")

GTPO = {"estimator": "gtpo", "shaping": "mean"}
UNSHAPED = {"estimator": "gtpo"}
GAMMAS = (0.0, 0.5, 0.7, 0.9, 1.0)
LIMITS = (4, 8, 16)
NORMALIZE = ("group", "turn_index", "batch", "first_return", "leave_one_out", "none")


def _gamma(gamma: float) -> dict[str, Any]:
    return {} if gamma == 0.9 else {"gamma": gamma}  # so that the default is one and the same run


def _normalize(mode: str) -> dict[str, Any]:
    return {} if mode == "group" else {"estimator_options": {"normalize": mode}}


STUDIES = {
    "credit": Study(
        "Does turn credit pay against trajectory credit?",
        ("chain", "lookup", "repair"),
        {
            "gtpo": GTPO,
            "gtpo_unshaped": UNSHAPED,
            "grpo": {"estimator": "grpo"},
            "grpo_sum": {"estimator": "grpo_sum"},
            "mt_grpo": {"estimator": "mt_grpo"},
        },
        baselines=("grpo", "grpo_sum"),
    ),
    "turn_rewards": Study(
        "Does turn credit pay where turns have rewards?",
        ("chain_steps", "lookup_steps"),
        {
            "gtpo_unshaped": UNSHAPED,
            "grpo_sum": {"estimator": "grpo_sum"},
            "mt_grpo": {"estimator": "mt_grpo"},
        },
        baselines=("grpo_sum",),
    ),
    "shaping": Study(
        "What does similarity shaping teach, and what do its controls?",
        ("chain",),
        {
            "none": UNSHAPED,
            "code": GTPO,
            "trajectory": {**GTPO, "shaping_input": "trajectory"},
            "constant": {**GTPO, "shaping": "constant"},
            "shuffled": {**GTPO, "shaping": "shuffled"},
        },
        baselines=("none",),
    ),
    "normalize": Study(
        "Over which set should returns be normalised?",
        ("chain",),
        {mode: {**UNSHAPED, **_normalize(mode)} for mode in NORMALIZE},
        baselines=("group",),
        seeds=SEEDS[:3],
    ),
    "groups": Study(
        "Should groups without a contrast be trained on?",
        ("chain",),
        {
            "keep": UNSHAPED,
            "drop_solved": {**UNSHAPED, "uniform_groups": "drop_solved"},
            "drop": {**UNSHAPED, "uniform_groups": "drop"},
        },
        baselines=("keep",),
        seeds=SEEDS[:3],
    ),
    **{
        f"gamma_within_{limit}_turns": Study(
            f"Which discount is best within {limit} turns?",
            ("short_chain",),
            {
                f"gamma {gamma}": {**UNSHAPED, **_gamma(gamma), "max_turns": limit}
                for gamma in GAMMAS
            },
            baselines=("gamma 0.9",),
            seeds=SEEDS[:3],
        )
        for limit in LIMITS
    },
}
