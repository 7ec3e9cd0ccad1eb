"""Records of made-up trajectories, with the credit that the estimators give them."""

from __future__ import annotations

import json
import random

import numpy as np

from rllib_gtpo.connectors.learner import credit_of
from rllib_gtpo.record.credit import LearnedCredit, TokenTraining
from rllib_gtpo.record.location import Location
from rllib_gtpo.record.schema import DIRECTORY, FILE_NAME, METADATA, VERSION
from rllib_gtpo.record.table import Recorded, build_table
from rllib_gtpo.types import (
    Group,
    Observation,
    StopReason,
    ToolCall,
    ToolError,
    ToolResult,
    Trajectory,
    Turn,
)

ABOUT = {
    "version": VERSION,
    "package": "0.1.0",
    "algorithm": "GTPO",
    "estimator": "gtpo",
    "gamma": 0.9,
    "estimator_options": {},
    "objective": {"clip_low": 0.2, "clip_high": 0.28},
    "shaping": "mean",
    "shaping_alpha": 0.5,
}


def write_record(
    run,
    *,
    iterations=1,
    groups=2,
    members=4,
    turns=3,
    tokens=12,
    text="Let me compute it.",
    output="14",
    seed=0,
):
    """Writes `run`/record.  Members are right or wrong by chance; turn 1 of some is invalid."""
    rng = random.Random(seed)
    location = Location.of(run) / DIRECTORY
    location.make()
    for iteration in range(1, iterations + 1):
        sampled = [
            make_group(rng, 1000 * iteration + g, members, turns, tokens, text, output)
            for g in range(groups)
        ]
        header = {**ABOUT, "iteration": iteration, "sampled_groups": groups}
        table = build_table(
            credited(rng, sampled), iteration, _word, {METADATA: json.dumps(header).encode()}
        )
        location.write(table, FILE_NAME.format(iteration))


def make_group(rng, group_id, members, turns, tokens, text, output):
    """One group; failed members of a mixed one are shaped."""
    task = {"id": f"task-{group_id}", "question": f"What is {group_id} + 1?"}
    trajectories = []
    for member in range(members):
        correct = rng.random() < 0.4
        t = Trajectory(task, group_id, member, correct=correct, answer="14" if correct else "15")
        t.stop_reason = (
            StopReason.ANSWER
            if correct
            else rng.choice([StopReason.ANSWER, StopReason.MAX_TURNS, StopReason.TURN_TRUNCATED])
        )
        t.turns = [_turn(rng, k, turns, tokens, text, output, correct) for k in range(turns)]
        trajectories.append(t)
    right = [t.member for t in trajectories if t.correct]
    for t in trajectories:
        if right and not t.correct and t.turns:
            t.similarities = {member: rng.random() for member in right}
            t.turns[-1].rewards["shaping"] = 0.5 * sum(t.similarities.values()) / len(right)
    return Group(group_id, task, trajectories)


def _turn(rng, index, turns, tokens, text, output, correct):
    last = index == turns - 1
    invalid = index == 1 and rng.random() < 0.3
    call = ToolCall("python", {"code": "print(2 + 3 * 4)"}, "", "unclosed" if invalid else None)
    result = ToolResult("python", output, ToolError.INVALID if invalid else None, 0.01)
    rewards = {"format": -0.1 if invalid else 0.0}
    if last:
        rewards["accuracy"] = float(correct)
    return Turn(
        index,
        [rng.randrange(50) for _ in range(tokens // 2)],
        [rng.randrange(50) for _ in range(tokens)],
        [-rng.random() for _ in range(tokens)],
        text=text,
        content=text,
        calls=[] if last else [call],
        results=[] if last else [result],
        rewards=rewards,
        seconds=rng.random(),
    )


def credited(rng, groups):
    """What the recorder would have: each trajectory with its rows of the step's credit."""
    credit = credit_of(groups, "gtpo", 0.9, {})
    columns = {"return": credit.returns, "baseline": credit.baseline}
    columns |= {"scale": credit.scale, "advantage": credit.advantages}
    recorded, row = [], 0
    for t in (t for group in groups for t in group.trajectories):
        rows = slice(row, row := row + len(t.turns))
        turns = {name: column[rows].numpy() for name, column in columns.items()}
        count = t.num_trained_tokens
        ratios = np.array([rng.lognormvariate(0, 0.2) for _ in range(count)], np.float32)
        anchor = np.array([x for turn in t.turns for x in turn.logprobs], np.float32)
        tokens = TokenTraining(anchor, ratios, ratios > 1.28) if t.turns else None
        seen = [Observation([{"role": "user", "content": t.task["question"]}])]
        seen += [
            Observation([{"role": "tool", "content": r.content} for r in turn.results])
            for turn in t.turns
        ]
        recorded.append(Recorded(t, seen, LearnedCredit(t.group_id, t.member, turns, tokens)))
    return recorded


def _word(token):
    return " " + "abcdefghijklmnopqrstuvwxyz"[token % 26] * (1 + token % 5)
