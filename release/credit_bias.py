"""Which credit points along the gradient, which is noisy: exact on small decision processes.

    python release/credit_bias.py                  # about two minutes on one core
    python release/credit_bias.py --full           # sampled figures from ten times as much
    python release/credit_bias.py --json FILE --markdown docs/credit_bias.md
    python release/credit_bias.py --process solved --estimator "gtpo group"

A tabular softmax policy acts in processes small enough to know the gradient of the expected total
reward exactly.  Every estimator's expected update, and its variance, is computed over all groups of
4 (method "exact") or from a sample ("sampled", with standard errors `_se`), with the package's own
`turn_credit`.  Columns, all against the gradient of the total reward unless they say otherwise:

    angle         degrees between the expected update and the gradient
    bias          length of their difference, as a share of the gradient's length
    bias_scaled   the same after the best positive scale, which a learning rate could mend
    trajectories  how many make the mean update as long as its noise
    gain_64       what a step of fixed length gains with a batch of 64 trajectories, at most 1

The thresholds are theorems: see `bias/variants.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from bias.estimates import Control, Moments, Problem, angle, exact, figures, sample_groups, sampled
from bias.paths import enumerate_paths, sample_paths
from bias.process import Process, accuracy, gradient, total, trained
from bias.processes import PROCESSES, errand, shaping
from bias.shaping import GROUP_SIZE as SHAPING_GROUP_SIZE
from bias.shaping import Shaped, shaped_figures, shaped_groups, trained_without_noise
from bias.tables import SHOWN, tables
from bias.variants import MODES, Variant, all_variants, gtpo
from results import Report, renewed

Row = dict[str, Any]
GROUP_SIZE = 4
GROUPS_PER_STEP = 16
BATCHES = (64, 1024)
GAMMAS = (0.0, 0.5, 0.7, 0.9, 1.0)
LIMITS = (4, 8, 16)
SHAPING_MODES = ("none", "mean", "constant", "shuffled")
SEED = 0
THRESHOLDS = {
    "direction_error": {"max": 1e-6},  # degrees
    "scale_error": {"max": 1e-9},
    "theorem_z": {"max": 4.5},  # sampled: distance to what is proved, in standard errors
}
COLUMNS = {
    "process": 19,
    "policy": 8,
    "estimator": 37,
    "method": 7,
    **dict.fromkeys(("angle", "angle_se", "bias", "bias_scaled"), 11),
    **dict.fromkeys(("trajectories", "gain_64", "gain_1024"), 12),
}


def problems(process: Process) -> Iterator[Problem]:
    """The process under the uniform policy, and under one that is halfway to the best."""
    paths = enumerate_paths(process)
    yield Problem(process, "uniform", process.uniform(), paths)
    yield Problem(process, "trained", trained(process, 0.5), paths)


def measured(problem: Problem, variant: Variant, moments: Moments, group_size: int) -> Row:
    """A row of the report; figures with six significant digits, None for infinity."""
    process, logits_D = problem.process, problem.logits_D
    target_D = gradient(process, logits_D)
    found = figures(moments, target_D, BATCHES)
    against = {}
    if problem.paths.format_R.any():
        against["angle_accuracy"] = gradient(process, logits_D, accuracy)
    if variant.gamma < 1.0:
        against["angle_discounted"] = gradient(process, logits_D, total, variant.gamma)
    for name, other_D in against.items():
        if other_D.any():
            found[name] = angle(moments.mean_D, other_D)
    found |= theorem(problem, variant, moments, target_D, group_size)
    return {
        "process": process.name,
        "policy": problem.policy,
        "estimator": variant.label,
        "method": "sampled" if moments.blocks else "exact",
        "group_size": group_size,
        **rounded(found),
    }


def rounded(found: dict[str, float]) -> Row:
    """Six significant digits; None for infinity, which JSON lacks."""
    return {k: None if v == float("inf") else float(f"{v:.6g}") for k, v in found.items()}


def theorem(
    problem: Problem, variant: Variant, moments: Moments, target_D: torch.Tensor, group_size: int
) -> dict[str, float]:
    """How far the expected update is from what is proved about it; empty if nothing is."""
    kind = variant.theorem
    at_end = not bool(problem.paths.format_R.any())
    one_prompt = len(problem.process.prompts) == 1
    holds = {"shrunk_at_end": at_end, "direction_at_end": at_end and one_prompt}
    if not holds.get(kind, bool(kind)):
        return {}
    scale = float(moments.mean_D @ target_D / target_D.norm() ** 2)
    proved = scale
    if kind == "unbiased":
        proved = 1.0
    elif kind.startswith("shrunk"):
        proved = 1.0 - 1.0 / group_size
    if moments.blocks:
        distance = float((moments.mean_D - proved * target_D).norm())
        return {"theorem_z": distance / moments.noise}
    errors = {"direction_error": angle(moments.mean_D, target_D)}
    if not kind.startswith("direction"):
        errors["scale_error"] = abs(scale - proved)
    return errors


def control_of(problem: Problem, gamma: float) -> Control:
    """Leaving one out with this discount: its mean is the same for every group size."""
    variant = gtpo("leave_one_out", gamma)
    return Control(variant, exact(problem, variant, 2).mean_D)


def estimator_rows(process: Process, variants: list[Variant], groups: int) -> Iterator[Row]:
    """Every estimator with groups of 4; exact unless it depends on the whole step."""
    for problem in problems(process):
        members_CG = sample_groups(problem, groups, GROUP_SIZE, SEED)
        for variant in variants:
            if variant.whole_step:
                control = control_of(problem, variant.gamma)
                moments = sampled(problem, members_CG, variant, GROUPS_PER_STEP, control=control)
            else:
                moments = exact(problem, variant, GROUP_SIZE)
            row = measured(problem, variant, moments, GROUP_SIZE)
            yield {"table": "estimators", **row}


def larger_group_rows(process: Process, variants: list[Variant], groups: int) -> Iterator[Row]:
    """The estimators of the docs with groups of 8, sampled."""
    chosen = [v for v in variants if v.label in SHOWN and not v.whole_step]
    for problem in problems(process):
        members_CG = sample_groups(problem, groups // 2, 8, SEED)
        for variant in chosen:
            control = None if variant.theorem else control_of(problem, variant.gamma)
            moments = sampled(problem, members_CG, variant, 1, control=control)
            yield {"table": "larger_groups", **measured(problem, variant, moments, 8)}


def gamma_rows(limit: int, groups: int) -> Iterator[Row]:
    """Every `normalize` with every discount, on a process that grows with its turn limit."""
    process = errand(limit)
    for policy, logits_D in (("uniform", process.uniform()), ("trained", trained(process, 0.5))):
        paths = sample_paths(process, logits_D, groups * GROUP_SIZE, SEED)
        problem = Problem(process, policy, logits_D, paths)
        members_CG = torch.arange(groups * GROUP_SIZE).view(groups, GROUP_SIZE)
        for normalize in MODES:
            for gamma in GAMMAS:
                variant = gtpo(normalize, gamma)
                moments = sampled(problem, members_CG, variant, GROUPS_PER_STEP)
                row = measured(problem, variant, moments, GROUP_SIZE)
                where = {"limit": limit, "normalize": normalize, "gamma": gamma}
                yield {"table": "gamma", **row, **where}


def shaping_rows(process: Process, variants: list[Variant], samples: int) -> Iterator[Row]:
    """Similarity shaping and its controls, against the gradient of the accuracy."""
    enumerated: dict[str, Shaped] = {}
    for problem in problems(process) if variants else ():
        for mode in SHAPING_MODES:
            shaped = enumerated.get(mode) or shaped_groups(problem, mode, samples, SEED)
            if mode != "shuffled":
                enumerated[mode] = shaped
            for variant in variants:
                found = shaped_figures(problem, variant, shaped, BATCHES)
                if problem.policy == "uniform" and mode in ("none", "mean"):
                    found |= trained_without_noise(problem, variant, shaped.bonus_CG)
                where = {"table": "shaping", "process": process.name, "policy": problem.policy}
                method = "sampled" if mode == "shuffled" else "exact"
                label = {"estimator": variant.label, "shaping": mode, "method": method}
                yield {**where, **label, "group_size": SHAPING_GROUP_SIZE, **rounded(found)}


def all_rows(process: str, estimator: str, groups: int) -> Iterator[Row]:
    """Every row, or those of the processes and estimators whose names contain these words."""
    variants = [v for v in all_variants() if estimator in v.label]
    for one in PROCESSES:
        if process in one.name:
            yield from estimator_rows(one, variants, groups)
    for one in PROCESSES:
        if process in one.name:
            yield from larger_group_rows(one, variants, groups)
    pair = [v for v in (gtpo("group", 0.9), gtpo("leave_one_out", 1.0)) if estimator in v.label]
    for one in (shaping(False), shaping(True)):
        if process in one.name:
            yield from shaping_rows(one, pair, groups)
    for limit in LIMITS:
        if process in f"errand_{limit}" and estimator in "gtpo":
            yield from gamma_rows(limit, groups)


def main() -> int:
    """Computes the tables and checks what is proved."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="ten times the sample")
    parser.add_argument("--process", default="", metavar="NAME", help="names that contain NAME")
    parser.add_argument("--estimator", default="", metavar="NAME", help="names that contain NAME")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="renew the tables in FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = Report("credit_bias", THRESHOLDS, [SEED])
    extra = {"leak": 8, "toward_copy": 11, "accuracy_after": 14, "copies_after": 12}
    for row in all_rows(args.process, args.estimator, 32_000 if args.full else 3_200):
        shaped = row["table"] == "shaping"
        report.add(row, {**COLUMNS, "shaping": 8, **extra} if shaped else COLUMNS)
    if not report.rows:
        names = [p.name for p in (*PROCESSES, shaping(False), shaping(True), errand(4))]
        print(f"nothing has such a name; processes: {', '.join(names)}", file=sys.stderr)
        return 2
    if args.process or args.estimator:
        measured_here = {metric for row in report.rows for metric in row}
        report.thresholds = {m: b for m, b in THRESHOLDS.items() if m in measured_here}
    if args.markdown:
        text = args.markdown.read_text()
        args.markdown.write_text(renewed(text, tables(report.rows)))
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
