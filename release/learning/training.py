"""One training of the study, from a cold start that all arms of a task and seed share.

Everything is written at once, at the end, under a name of its own: what exists is complete, so a
stopped study goes on with what is missing.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from release.learning.study import EVALUATIONS, PROBLEMS, TASKS, Run, StudyTask
from rllib_gtpo import GTPOConfig, SFTConfig
from rllib_gtpo.models import build_tokenizer

_KEPT = ("accuracy", "turn", "tool", "group", "advantage", "shaping", "reward", "policy", "grad")
_KEPT += ("tokens", "mismatch")
FACTS = "cold_start.json"


def start_worker() -> None:
    """One thread and a Ray session of its own: two workers must not change each other's results."""
    import ray
    import torch

    from rllib_gtpo.command.quiet import silence

    silence()
    torch.set_num_threads(1)
    ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)


def make_cold_start(task_name: str, seed: int, models: Path) -> None:
    """Trains the model that every arm of a task and seed starts from, unless it is there."""
    target = cold_start_of(task_name, seed, models)
    if target.exists():
        return
    task = TASKS[task_name]
    config = configured(SFTConfig(), task, seed).language_model(cold_start=dict(task.cold_start))
    config.training(steps_per_iteration=task.cold_start["steps"])
    algorithm = config.build_algo()
    began = time.perf_counter()
    result = algorithm.train()
    held_out = _held_out(algorithm)
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    algorithm.env_runner.module.model.save_pretrained(partial)
    facts = {
        "held_out": held_out,
        "validation_loss": result["sft"]["validation_loss"],
        "seconds": time.perf_counter() - began,
    }
    (partial / FACTS).write_text(json.dumps(facts))
    algorithm.stop()
    partial.rename(target)


def train(run: Run, records: Path, models: Path) -> Path:
    """Trains one run and writes its record, unless it is there; returns the record's file."""
    file = record_of(run, records)
    if file.exists():
        return file
    task = TASKS[run.task]
    config = configured(GTPOConfig(), task, run.seed)
    start = cold_start_of(*run.start, models)
    config.language_model(model=str(start)).training(**task.training)
    config.update_from_dict(dict(run.settings))
    algorithm = config.build_algo()
    began = time.perf_counter()
    curve = [{"tokens": 0.0, **json.loads((start / FACTS).read_text())["held_out"]}]
    iterations: list[dict[str, float]] = []
    tokens = 0.0
    while tokens < task.budget:
        result = algorithm.train()
        tokens = result["tokens"]["sampled_lifetime"]
        iterations.append(_flat({k: result[k] for k in _KEPT if k in result}))
        due = task.budget * len(curve) / EVALUATIONS
        if tokens >= due:
            curve.append({"tokens": tokens, **_held_out(algorithm)})
    algorithm.stop()
    record = {
        **asdict(run),
        "settings": dict(run.settings),
        "budget": task.budget,
        "curve": curve,
        "iterations": {key: [row.get(key, 0.0) for row in iterations] for key in iterations[-1]},
        "seconds": time.perf_counter() - began,
    }
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(record))
    partial.rename(file)
    return file


def record_of(run: Run, records: Path) -> Path:
    """The file that holds a finished run."""
    return records / f"{run.name}.json"


def cold_start_of(task: str, seed: int, models: Path) -> Path:
    """The directory of the model that arms start from."""
    return models / f"cold-{task}-{seed}"


def configured(config: Any, task: StudyTask, seed: int) -> Any:
    return (
        config.environment(task.env, env_config={**task.env_config, "seed": seed})
        .language_model(tokenizer=build_tokenizer(task.extra_tokens), call_format="fenced")
        .rollouts(max_turn_tokens=task.max_turn_tokens)
        .evaluation(
            evaluation_interval=1_000_000,  # when it is due is decided here, by sampled tokens
            evaluation_duration=PROBLEMS,
            split="test",
        )
        .reporting(progress=False)
        .debugging(seed=seed, deterministic=True)
    )


def _held_out(algorithm: Any) -> dict[str, float]:
    result = algorithm.evaluate()
    return {
        "accuracy": result["accuracy"],
        "turns": result["turn"]["per_trajectory"],
        "invalid": result["tool"]["invalid_rate"],
        "truncated": result["trajectory"]["truncated_frac"],
    }


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}/"))
        else:
            flat[f"{prefix}{key}"] = round(float(value), 5)
    return flat
