"""Whom does each estimator blame?  Its advantages on the same rollouts, against what each turn was.

The tasks say exactly whether a turn was right, given what had been seen by then: a step of the
chain that was taken, the relation that was due, a submission that keeps what works and tries what
is new.  An estimator never sees this.  Over the turns of the model behind the cold start:

    AUC failed   how often a right turn of a failed rollout has a higher advantage than a wrong one
                 of the same rollout (ties count half: trajectory-level credit has 0.5)
    AUC solved   the same within solved rollouts
    AUC all      the same over all turns of all rollouts
    first error  mean advantage of the first wrong turn of failed rollouts, minus that of the right
                 turns before it: negative, if blame falls where things went wrong

    python release/learning/blame.py [--task NAME ...] [--json FILE] [--markdown PAGE]
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from release.learning import training
from release.learning.oracles import ORACLES
from release.learning.study import TASKS, Run
from release.results import Report, markdown, renewed
from rllib_gtpo import GTPOConfig
from rllib_gtpo.connectors.learner import credit_of
from rllib_gtpo.env_runner import GroupJob
from rllib_gtpo.episodes import groups_of
from rllib_gtpo.rewards.embedders import build_embedder
from rllib_gtpo.rewards.shaping import Shaping
from rllib_gtpo.types import Group, Trajectory

ROOT = Path(__file__).parents[2]
GROUPS = 64
ESTIMATORS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "gtpo": ("gtpo", {}, True),
    "gtpo_unshaped": ("gtpo", {}, False),
    "gtpo turn_index": ("gtpo", {"normalize": "turn_index"}, False),
    "gtpo leave_one_out": ("gtpo", {"normalize": "leave_one_out"}, False),
    "grpo": ("grpo", {}, False),
    "grpo_sum": ("grpo_sum", {}, False),
    "dr_grpo": ("dr_grpo", {}, False),
    "rloo": ("rloo", {}, False),
    "reinforce_pp": ("reinforce_pp", {}, False),
    "mt_grpo": ("mt_grpo", {}, False),
    "gigpo": ("gigpo", {}, False),
}
_COLUMNS = {
    "task": 13,
    "estimator": 20,
    "auc_failed": 10,
    "auc_solved": 10,
    "auc_all": 8,
    "first_error": 11,
}


def auc(values: np.ndarray, right: np.ndarray) -> float:
    """How often a right turn has a higher value than a wrong one; NaN without both kinds."""
    good, bad = values[right], values[~right]
    if not good.size or not bad.size:
        return float("nan")
    ordered = np.sort(bad)
    below = np.searchsorted(ordered, good, "left")
    ties = np.searchsorted(ordered, good, "right") - below
    return float((below + 0.5 * ties).mean() / bad.size)


def first_error_gap(advantages: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> float:
    """Mean over failed rollouts of the first wrong turn's advantage minus the earlier turns'."""
    gaps = []
    for values, good in zip(advantages, right, strict=True):
        first = int(np.argmin(good)) if not good.all() else 0
        if first > 0:
            gaps.append(values[first] - values[:first].mean())
    return float(np.mean(gaps)) if gaps else float("nan")


def blame(groups: list[Group], oracle: Callable[[Trajectory], list[bool]]) -> list[dict[str, Any]]:
    """The figures of every estimator on the same groups."""
    shaped = copy.deepcopy(groups)
    Shaping(build_embedder("python_tokens")).score_groups(shaped)
    trajectories = [t for g in groups for t in g.trajectories]
    right = [np.array(oracle(t), dtype=bool) for t in trajectories]
    cuts = np.cumsum([len(t.turns) for t in trajectories])[:-1]
    solved = np.array([t.correct for t in trajectories])
    rows = []
    for name, (estimator, options, with_shaping) in ESTIMATORS.items():
        credit = credit_of(shaped if with_shaping else groups, estimator, 0.9, options)
        advantages = np.split(credit.advantages.numpy(), cuts)
        row: dict[str, Any] = {"estimator": name}
        for label, which in (("failed", ~solved), ("solved", solved)):
            within = [auc(advantages[i], right[i]) for i in np.flatnonzero(which)]
            row[f"auc_{label}"] = float(np.nanmean(within))
        row["auc_all"] = auc(np.concatenate(advantages), np.concatenate(right))
        failed = np.flatnonzero(~solved)
        row["first_error"] = first_error_gap(
            [advantages[i] for i in failed], [right[i] for i in failed]
        )
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of the docs."""
    body = [[str(v) if isinstance(v, str) else f"{v:.2f}" for v in row.values()] for row in rows]
    head = ["task", "estimator", "AUC failed", "AUC solved", "AUC all", "first error"]
    return markdown(head, body)


def sample(task_name: str, seed: int, models: Path) -> list[Group]:
    """Groups of the model that the study's arms start from."""
    start = Run(task_name, (), seed).start
    training.make_cold_start(*start, models)
    algorithm = training.configured(GTPOConfig(), TASKS[task_name], seed)
    algorithm.language_model(model=str(training.cold_start_of(*start, models)))
    built = algorithm.build_algo()
    episodes = built.env_runner.sample_groups([GroupJob(p, 8, 0) for p in range(GROUPS)]).episodes
    built.stop()
    return groups_of(episodes)


def main() -> int:
    """Prints the table of every task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=ROOT / "runs" / "learning")
    parser.add_argument("--task", choices=ORACLES, nargs="+", default=list(ORACLES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="renew the table in FILE")
    args = parser.parse_args()
    args.models.mkdir(parents=True, exist_ok=True)
    training.start_worker()
    report = Report("blame", {}, [args.seed])
    for task_name in args.task:
        oracle = ORACLES[task_name]
        groups = sample(task_name, args.seed, args.models)
        turns = [r for g in groups for t in g.trajectories for r in oracle(t)]
        print(f"\n{task_name}: {len(turns)} turns, {np.mean(turns):.1%} of them right")
        for row in blame(groups, oracle):
            report.add({"task": task_name, **row}, show=_COLUMNS)
    if args.markdown:
        args.markdown.write_text(renewed(args.markdown.read_text(), {"blame": table(report.rows)}))
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
