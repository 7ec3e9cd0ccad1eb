"""The quickstart over several seeds: does it learn, every time, and from what start?

    python release/quickstart.py                   # 2 seeds, at most 10 minutes on two cores
    python release/quickstart.py --full            # 5 seeds
    python release/quickstart.py --json FILE       # also writes the results

Each seed is the quickstart's own command in a process of its own, with another seed for the model,
the tasks and the sampler.  "skill" is the share of turns in which the model behind the cold start,
decoding greedily after a solving demonstration's own history, writes exactly the next call: near 1,
since the demonstrations' imperfection is one of behaviour.  "loss" is that of held-out
demonstrations after 80% and after 100% of the cold start: flat, since it has converged.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from results import Report

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "tuned_examples" / "gtpo_calculator.py"
THRESHOLDS = {
    "before": {"max": 0.60},
    "after": {"min": 0.90},
    "tool_used_frac_solved": {"min": 0.95},
    "skill": {"min": 0.95},
    "seconds": {"max": 360.0},
}


def run(seed: int, folder: Path) -> dict[str, float]:
    """One quickstart; its figures."""
    out = folder / f"seed{seed}"
    overrides = ["--override", f"seed={seed}", "--override", f"env_config.seed={seed}"]
    command = [sys.executable, "-m", "rllib_gtpo.cli", "train", "file", str(EXAMPLE), *overrides]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, "--out", str(out), "--keep", "99"], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - began
    if done.returncode != 0:
        sys.exit(f"seed {seed} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    match = re.search(r"held-out accuracy (\S+) -> (\S+)", done.stdout)
    losses = re.search(r"held-out loss ([\d. ]+)", done.stdout)
    assert match and losses, done.stdout
    rows = [json.loads(line) for line in (out / "result.json").read_text().splitlines()]
    curve = [float(loss) for loss in losses.group(1).split()]
    return {
        "seed": seed,
        "before": float(match.group(1)),
        "after": float(match.group(2)),
        "tool_used_frac_solved": rows[-1]["evaluation"]["tool"]["used_frac_solved"],
        "skill": skill(seed, out / "checkpoint_000000"),
        "loss_80": curve[-3],
        "loss_100": curve[-1],
        "seconds": seconds,
        "rollout_s": sum(row["time"]["rollout_s"] for row in rows),
        "update_s": sum(row["time"]["update_s"] for row in rows),
        "training_accuracy": [round(row["accuracy"], 3) for row in rows],
    }


def skill(seed: int, checkpoint: Path) -> float:
    """How often the model writes the next call of a solving demonstration, exactly."""
    import ray

    from rllib_gtpo.command.files import load_experiment
    from rllib_gtpo.command.quiet import silence
    from rllib_gtpo.command.settings import apply_overrides

    silence()
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", ignore_reinit_error=True)
    config = load_experiment(EXAMPLE).config
    apply_overrides(config, [f"seed={seed}", f"env_config.seed={seed}"])
    algorithm = config.build_algo()
    algorithm.load_checkpoint(str(checkpoint))
    share = asyncio.run(next_calls(algorithm.env_runner))
    algorithm.stop()
    return share


async def next_calls(runner: Any) -> float:
    """Share of right calls over the turns of 64 test problems."""
    from rllib_gtpo.engines.base import Request, SamplingParams

    sampling = SamplingParams(32, temperature=0.0, stop_token_ids=runner.codec.stop_token_ids)
    wanted, asked = [], []
    for task in runner.env.tasks("test")[:64]:
        told = runner.env.demonstrate(task, "solve", random.Random(0))
        for turn, message in enumerate(told):
            if message["role"] != "assistant" or turn == len(told) - 1:
                continue
            ids, _ = runner.codec.conversation_ids(
                runner.env.first_messages(task), told[: turn + 1], runner.env.tool_schemas
            )
            said = runner.codec.tokenizer.encode(message["content"], add_special_tokens=False)
            context = ids[: len(ids) - len(said) - 1]
            name = f"{task['id']}-{turn}"
            asked.append(runner.engine.generate(Request(name, context, sampling, (0,))))
            wanted.append(message["content"])
    completions = await asyncio.gather(*asked)
    right = [
        runner.codec.decode(c.token_ids) == w for c, w in zip(completions, wanted, strict=True)
    ]
    return sum(right) / len(right)


def main() -> int:
    """Runs the seeds and checks the thresholds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="5 seeds instead of 2")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    seeds = range(5 if args.full else 2)
    report = Report("quickstart", THRESHOLDS, list(seeds))
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            report.add(run(seed, Path(folder)))
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
