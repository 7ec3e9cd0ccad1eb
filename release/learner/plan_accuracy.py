"""`rllib plan` against what its workers really take: peak memory of each process, for three sizes.

    python release/learner/plan_accuracy.py                       # about 5 minutes on two cores
    python release/learner/plan_accuracy.py --sizes tiny          # seconds
    python release/learner/plan_accuracy.py --json release/results/plan.json

For each size a process plans the run, and another one does it: two iterations on the CPU with a
learner and an env runner in processes of their own, whose high-water marks the kernel keeps.  Every
trajectory is as long as the settings allow, which is what a plan is for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "envs")]
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # see rllib_gtpo.subcommands.options

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256},
    "small": {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1536},
    "medium": {"hidden_size": 768, "num_hidden_layers": 8, "intermediate_size": 2304},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072},
}
DEFAULT_SIZES = ("small", "medium", "base")
VOCABULARY = 16_384
CONTEXT = 192
WORKERS = ("learner", "env runner")
THRESHOLDS = {"error": {"max": 0.25}}


def config(size: str) -> Any:
    """A run in which every trajectory fills the context: a random model hardly ever ends a turn."""
    from rllib_gtpo import GTPOConfig, ToolEnv
    from rllib_gtpo.models import TINY_QWEN2

    class Anything(ToolEnv):
        max_turns = 1

        def tasks(self, split: str) -> list[dict[str, str]]:
            return [{"prompt": "Say something."}] * 8

        def reward(self, trajectory: Any, task: Any) -> dict[str, float]:
            return {"accuracy": float(trajectory.member % 2)}

    shape = SIZES[size]
    heads = shape["hidden_size"] // 64
    return (
        GTPOConfig()
        .environment(Anything)
        .language_model(
            model={
                **TINY_QWEN2,
                **shape,
                "num_attention_heads": heads,
                "num_key_value_heads": heads // 2 if heads % 2 == 0 else heads,
                "vocab_size": VOCABULARY,
            }
        )
        .env_runners(num_env_runners=1)
        .learners(num_learners=1)
        .rollouts(max_tokens=CONTEXT, max_turn_tokens=CONTEXT)
        .training(group_size=4, groups_per_step=2, token_budget=4 * CONTEXT)
        .reporting(progress=False)
    )


def plan(size: str) -> dict[str, Any]:
    """What `rllib plan --json` says."""
    from ray.rllib.algorithms.algorithm import Algorithm  # noqa: F401  what a worker loads, too

    from rllib_gtpo.planning.plan import make_plan

    made = config(size)
    made.validate()
    return make_plan(made).to_dict()


def run(size: str) -> dict[str, float]:
    """Trains for two iterations; the high-water mark of each kind of worker, in bytes."""
    import ray

    def high_water(_: Any) -> int:
        with open("/proc/self/status", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["VmHWM"].split()[0]) << 10

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        algorithm = config(size).build_algo()
        for _ in range(2):
            result = algorithm.train()
        (learner,) = algorithm.learner_group.foreach_learner(high_water)
        (runner,) = algorithm.env_runner_group.foreach_env_runner(
            high_water, local_env_runner=False
        )
        tokens = result["tokens"]["sampled"] / 8
        algorithm.stop()
    finally:
        ray.shutdown()
    return {"learner": learner.get(), "env runner": runner, "tokens": tokens}


def in_a_process(task: str, size: str) -> dict[str, Any]:
    """What a function here returns in a process of its own; what it prints goes to stderr."""
    command = [sys.executable, str(Path(__file__).resolve()), "--task", task, "--sizes", size]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def rows_of(size: str) -> list[dict[str, Any]]:
    """For each worker of a size: GiB as planned and as measured, and the relative error."""
    planned, measured = in_a_process("plan", size), in_a_process("run", size)
    rows = []
    for worker in planned["workers"]:
        name = worker["name"]
        if name in WORKERS:
            said, took = sum(worker["host"].values()), measured[name]
            rows.append(
                {
                    "size": size,
                    "worker": name,
                    "parameters_m": planned["model"]["parameters"] / 1e6,
                    "planned_gib": said / 2**30,
                    "measured_gib": took / 2**30,
                    "process_gib": worker["host"]["process"] / 2**30,
                    "signed_error": said / took - 1.0,
                    "error": abs(said / took - 1.0),
                    "parts_gib": {k: v / 2**30 for k, v in worker["host"].items()},
                }
            )
    return rows


def main(argv: list[str] | None = None) -> int:
    """Prints a row for each worker and size."""
    from release.results import Report

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default=",".join(DEFAULT_SIZES), help="of " + ", ".join(SIZES))
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--task", choices=("plan", "run"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    sizes = args.sizes.split(",")
    if unknown := set(sizes) - SIZES.keys():
        parser.error(f"unknown sizes {', '.join(sorted(unknown))}; known: {', '.join(SIZES)}")
    if args.task:
        print(json.dumps((plan if args.task == "plan" else run)(sizes[0])))
        return 0
    report = Report("plan", THRESHOLDS, seeds=[0])
    columns = {
        **{"size": 8, "worker": 10, "parameters_m": 12, "planned_gib": 11, "measured_gib": 12},
        "signed_error": 12,
    }
    for size in sizes:
        for row in rows_of(size):
            report.add(row, columns)
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
