"""Does turn credit pay, and when?  Trains every arm of every study at equal sampled tokens.

    python release/learning/run.py --quick              # at most 10 minutes on two cores
    python release/learning/run.py --full               # all studies, hours; stop and go on at will
    python release/learning/run.py --study credit shaping
    python release/learning/run.py --tables             # no training: tables of what is there
    python release/learning/run.py --full --json FILE --markdown PAGE  # results, plots, tables

Every finished run is a file of its own in `--records`, so a stopped study goes on with what is
missing.  `--quick` trains a stated part of the credit study (see `QUICK`) and compares it with the
recorded results.  What the arms, tasks and budgets are is in study.py, and was fixed first.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from release.learning import tables, training
from release.learning.study import STUDIES, Run
from release.results import Report, renewed

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "release" / "results" / "learning"  # a file for each run
RUNS = ROOT / "runs" / "learning"
QUICK = ("credit", "lookup", ("gtpo", "gtpo_unshaped", "grpo", "grpo_sum"), (0,))
TOLERANCE = 0.12  # of a final accuracy: three standard errors of a difference of 256 problems each


def train_all(runs: Sequence[Run], records: Path, models: Path, workers: int) -> list[str]:
    """Cold starts, then the runs; what failed, by name."""
    missing = [run for run in runs if not training.record_of(run, records).exists()]
    if not missing:
        return []
    for folder in (records, models):
        folder.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers: one computes the same beside another
    starts = dict.fromkeys(run.start for run in missing)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, training.start_worker) as pool:
        failed = _each(
            pool,
            {
                f"cold start {task} {seed}": partial(training.make_cold_start, task, seed, models)
                for task, seed in starts
            },
        )
        return failed or _each(
            pool,
            {_described(run): partial(training.train, run, records, models) for run in missing},
        )


def _each(pool: ProcessPoolExecutor, jobs: Mapping[str, Callable[[], Any]]) -> list[str]:
    waiting = {pool.submit(job): name for name, job in jobs.items()}
    failed = []
    for number, done in enumerate(as_completed(waiting), start=1):
        error = done.exception()
        outcome = "done" if error is None else f"FAILED: {error!r}"
        print(f"[{number}/{len(waiting)}] {waiting[done]}: {outcome}", flush=True)
        if error is not None:
            failed.append(f"{waiting[done]}: {error!r}")
    return failed


def _described(run: Run) -> str:
    settings = " ".join(f"{key}={value}" for key, value in run.settings)
    return f"{run.task} seed {run.seed} {settings}"


def report_studies(
    names: Sequence[str], records: Path, results: Path | None, docs: Path | None
) -> int:
    """Tables of what is there; with `results` a JSON file and plots; with `docs` the tables of that
    page."""
    report = Report("learning", {"runs_missing": {"max": 0}}, [])
    shown: dict[str, str] = {}
    for name in names:
        study = STUDIES[name]
        values, rows = tables.read(study, records)
        compared = tables.compare(study, values)
        shown[name] = tables.table(study, compared)
        shown[f"{name} by turn"] = tables.by_turn_table(study, values)
        print(f"\n## {name}: {study.question}\n\n{shown[name]}\n")
        if results is not None and rows:
            tables.plot(values, results.with_name(f"{results.stem}_{name}.png"))
        missing = len(study.runs()) - len(rows)
        report.add({"study": name, "runs": len(rows), "runs_missing": missing})
        report.rows += [{"study": name, **row} for row in compared]
        report.seeds = sorted({*report.seeds, *study.seeds})
    if docs is not None:
        page = docs.read_text()
        wanted = {name: table for name, table in shown.items() if f"table: {name} -->" in page}
        docs.write_text(renewed(page, wanted))
    return report.finish(results)


def report_quick(runs: Sequence[Run], records: Path, results: Path | None) -> int:
    """The stated part, against the recorded results."""
    report = Report("learning_quick", {"difference": {"max": TOLERANCE}}, list(QUICK[3]))
    for run in runs:
        now, recorded = (
            tables.summary(json.loads(training.record_of(run, folder).read_text()))
            for folder in (records, RECORDED)
        )
        print(_described(run))
        report.add(
            {
                "start": now["start"],
                "final": now["final"],
                "recorded": recorded["final"],
                "difference": abs(now["final"] - recorded["final"]),
                "area": now["area"],
                "area_recorded": recorded["area"],
            }
        )
    return report.finish(results)


def main() -> int:
    """Trains what is missing and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="a stated part, at most 10 minutes")
    what.add_argument("--full", action="store_true", help="all studies")
    what.add_argument("--study", nargs="+", choices=STUDIES, help="some of the studies")
    parser.add_argument("--tables", action="store_true", help="train nothing, report what is there")
    parser.add_argument("--records", type=Path, default=RECORDED, help="a file for each run")
    parser.add_argument("--models", type=Path, default=RUNS, help="the models behind cold starts")
    parser.add_argument("--workers", type=int, default=2, help="one core each (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="renew the tables in FILE")
    args = parser.parse_args()
    quick = args.quick or not (args.full or args.study or args.tables)
    names = list(args.study or STUDIES)
    if quick:
        name, task, arms, seeds = QUICK
        runs = [STUDIES[name].run(task, arm, seed) for seed in seeds for arm in arms]
    else:
        runs = list({run.name: run for name in names for run in STUDIES[name].runs()}.values())
    records = RUNS / "quick" if quick else args.records
    failed = [] if args.tables else train_all(runs, records, args.models, args.workers)
    if failed:
        print("\n".join(["these runs failed; start again to go on:", *failed]))
        return 2
    if quick:
        status = report_quick(runs, records, args.json)
        shutil.rmtree(records)  # the next --quick trains again
        return status
    return report_studies(names, records, args.json, args.markdown)


if __name__ == "__main__":
    sys.exit(main())
