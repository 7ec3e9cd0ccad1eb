"""How good is the learner?  Whole updates, waste, and the memory of the log-probabilities.

    python release/learner/bench.py                 # under six minutes on two cores
    python release/learner/bench.py --full          # three times as many rounds, TRL's head, too
    python release/learner/bench.py --json FILE --markdown docs/speed.md   # results, tables
    python release/learner/bench.py --parts lengths --device cuda          # on a GPU; needs no ray

updates  `GTPOLearner.update`, from episodes to metrics, against the tightest plain loop over the
         same packed tokens, whose packing, credit and batches are ready before it starts; and
         against TRL's loss, forward and backward without an optimizer, on the same trajectories.
         Round by round, so that other load meets all; ratios are medians over rounds.  All three
         compute the same gradient: `norm` is checked.  waste: computed positions that are no token
         of a trajectory, by a hook on the model.
heads    log-probabilities of 8,192 tokens over a vocabulary of 151,936, each way in a fresh
         process; `of_allowed` is the peak over (hidden states and their gradient, the head's
         float32 gradient, two chunks of 1,024).  liger-kernel only where it is installed.
lengths  see lengths.py: tokens per second, memory, and the fraction of the measured matrix peak.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as `rllib` does

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from release.learner import heads, lengths
from release.learner.batches import SIZES, log_normal_lengths, ragged_groups, trajectories_of
from release.learner.updates import SEED, Learner, Plain, Side, make_model
from release.results import Report, markdown, renewed
from rllib_gtpo.models import load_model

PARTS = ("updates", "heads", "lengths")
THRESHOLDS = {
    "updates": {"of_plain": {"min": 0.95}, "waste": {"max": 0.03}, "times_trl": {"min": 1.5}},
    "heads": {"of_allowed": {"max": 1.2}, "of_full": {"max": 0.15}},
    "lengths": {},
}
ON_CUDA = {"ours_of_matrix_peak": {"min": 0.45}}
RUNS = {"tiny": (32, 16_384, 8), "small": (8, 16_384, 3)}  # trajectories, token budget, rounds
TRL_ROWS = 8  # of a micro-batch
HEADS = (8192, 151_936, 128)  # tokens, vocabulary, width
VOCABULARY = 256
SHOWN = {
    "updates": ("model", "tokens", "ours_per_s", "plain_per_s", "of_plain", "times_trl", "waste"),
    "heads": ("way", "peak_mib", "of_allowed", "of_full", "seconds"),
    "lengths": ("model", "length", "side", "tokens_per_s", "peak_bytes", "of_matrix_peak"),
}


class Positions:
    """Counts what goes through a model's decoder."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        model.get_decoder().register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, module: Any, args: Any, kwargs: Any) -> None:
        self.count += kwargs["input_ids"].numel()


def updates(size: str, trajectories: int, budget: int, rounds: int) -> dict[str, Any]:
    """One size of model: our update, the plain loop's, and TRL's loss, in turns."""
    from release.learner.trl_loss import TRLLoss

    settings, groups = SIZES[size], ragged_groups(log_normal_lengths(trajectories), VOCABULARY)
    tokens = sum(t.num_tokens for t in trajectories_of(groups))
    ours = Learner(settings, groups, budget)
    plain = Plain(make_model(settings, "cpu", "float32", False), groups, budget)
    with tempfile.TemporaryDirectory() as scratch:
        trl = TRLLoss(load_model(settings, seed=SEED), groups, TRL_ROWS, Path(scratch))
        sides: dict[str, Side] = {"ours": ours, "plain": plain, "trl": trl}
        positions = Positions(ours.model)
        norms = {name: side.update() for name, side in sides.items()}
        computed = positions.count
        seconds, cpu = timed_rounds(sides, rounds)
    if max(norms.values()) > 1.001 * min(norms.values()):
        raise RuntimeError(f"the sides compute different gradients: {norms}")
    return {
        "model": size,
        "parameters": sum(p.numel() for p in ours.model.parameters()),
        "trajectories": trajectories,
        "tokens": tokens,
        "trl_positions": trl.positions,
        "waste": 1.0 - tokens / computed,
        **{f"{name}_per_s": tokens / median(taken) for name, taken in seconds.items()},
        "of_plain": ratio(seconds["plain"], seconds["ours"]),
        "of_plain_cpu": ratio(cpu["plain"], cpu["ours"]),
        "times_trl": ratio(seconds["trl"], seconds["ours"]),
        "times_trl_cpu": ratio(cpu["trl"], cpu["ours"]),
    }


def timed_rounds(
    sides: Mapping[str, Side], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds and processor seconds of each side in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in sorted(sides, reverse=bool(number % 2)):
            began, cpu_began = time.perf_counter(), time.process_time()
            sides[name].update()
            seconds[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - cpu_began)
    return seconds, cpu


def ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """The median over rounds of the ratio."""
    return median(a / b for a, b in zip(one, other, strict=True))


def head_rows(ways: Sequence[str], sizes: tuple[int, int, int]) -> list[dict[str, Any]]:
    """Every way that is installed; what has a threshold is ours."""
    measured = {way: heads.measured(way, *sizes) for way in ways if heads.is_there(way)}
    allowed, full = heads.allowed_bytes(*sizes), measured["full"]["peak_bytes"]
    rows = []
    for way, figures in measured.items():
        peak = figures["peak_bytes"]
        row = {"way": way, "tokens": sizes[0], "vocabulary": sizes[1], "width": sizes[2], **figures}
        row |= {"peak_mib": peak / 2**20, "allowed_mib": allowed / 2**20}
        shares = {"of_allowed": peak / allowed, "of_full": peak / full}
        rows.append(
            row | (shares if way == "ours" else {f"{k}_here": v for k, v in shares.items()})
        )
    return rows


def length_rows(device: str, rounds: int) -> list[dict[str, Any]]:
    """Rows of lengths.py; ours have a threshold on a GPU."""
    rows = lengths.rows(device, rounds)
    for row in rows:
        if device == "cuda" and row["side"] == "ours" and "of_matrix_peak" in row:
            row["ours_of_matrix_peak"] = row["of_matrix_peak"]
    return rows


def tables(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The tables of the docs."""
    found = {}
    if made := [row for row in rows if "of_plain" in row]:
        head = ["model, parameters", "update, tokens/s", "plain loop", "of it", "TRL's loss"]
        head += ["times it", "waste"]
        found["learner updates"] = markdown(
            head,
            [
                [
                    f"{row['model']}, {row['parameters'] / 1e6:.1f} M",
                    *(f"{row[f'{name}_per_s']:,.0f}" for name in ("ours", "plain")),
                    f"{row['of_plain']:.2f}",
                    f"{row['trl_per_s']:,.0f}",
                    f"{row['times_trl']:.1f}",
                    f"{100 * row['waste']:.1f}%",
                ]
                for row in made
            ],
        )
    if made := [row for row in rows if "way" in row]:
        found["learner heads"] = markdown(
            ["", "peak, MiB", "of the allowance", "of all logits at once", "s"],
            [
                [
                    row["way"],
                    f"{row['peak_mib']:,.0f}",
                    *(f"{row.get(k, row.get(k + '_here')):.2f}" for k in ("of_allowed", "of_full")),
                    f"{row['seconds']:.1f}",
                ]
                for row in made
            ],
        )
    if made := [row for row in rows if "side" in row]:
        found["learner lengths"] = markdown(
            ["model", "length", "", "tokens/s", "of the matrix peak", "peak, GiB"],
            [
                [
                    f"{row['model']}, {row['device']}",
                    str(row["length"]),
                    row["side"],
                    f"{row['tokens_per_s']:,.0f}" if "tokens" in row else "out of memory",
                    f"{row['of_matrix_peak']:.2f}" if "tokens" in row else "",
                    f"{row['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in row else "",
                ]
                for row in made
            ],
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the parts and checks the thresholds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all; lengths on CUDA")
    parser.add_argument("--sizes", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--trajectories", type=int, help="of an update, for all sizes")
    parser.add_argument("--rounds", type=int, help="for all parts")
    parser.add_argument("--head", nargs=3, type=int, default=HEADS, metavar=("TOKENS", "V", "H"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="renew the tables in FILE")
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available() if args.device == "auto" else args.device == "cuda"
    parts = args.parts or (("lengths",) if cuda else PARTS)
    thresholds = {k: v for part in parts for k, v in THRESHOLDS[part].items()}
    report = Report("learner", thresholds | (ON_CUDA if cuda else {}), [SEED])
    more = 3 if args.full else 1
    show = {part: {name: max(len(name), 8) for name in SHOWN[part]} for part in parts}
    if "updates" in parts:
        from rllib_gtpo.command.quiet import silence

        silence()
        for size in args.sizes:
            trajectories, budget, rounds = RUNS[size]
            rounds = (args.rounds or rounds) * more
            row = updates(size, args.trajectories or trajectories, budget, rounds)
            report.add(row, show["updates"])
    if "heads" in parts:
        ways = ("ours", "full", "liger", *(("trl",) if args.full else ()))
        for row in head_rows(ways, tuple(args.head)):
            report.add(row, show["heads"])
    if "lengths" in parts:
        for row in length_rows("cuda" if cuda else "cpu", (args.rounds or 3) * more):
            report.add(row, show["lengths"])
    if args.markdown:
        args.markdown.write_text(renewed(args.markdown.read_text(), tables(report.rows)))
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
