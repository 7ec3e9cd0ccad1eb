"""The same run from Python, from the command, from YAML, and through Tune."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rllib_gtpo import record
from rllib_gtpo.report import build_report

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "tuned_examples"
SMALL = [
    "--stop=training_iteration=1",
    "--override=cold_start.steps=3",
    "--override=groups_per_step=2",
    "--override=group_size=2",
    "--override=evaluation_interval=1",
    "--override=evaluation_duration=4",
    "--num-cpus=2",
]


def run(command, out, **kwargs):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *command, *SMALL, "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
        env=environment,
        **kwargs,
    )


@pytest.mark.parametrize(
    "command",
    [
        [str(EXAMPLES / "gtpo_calculator.py")],
        ["-m", "rllib_gtpo.cli", "train", "file", str(EXAMPLES / "gtpo_calculator.yaml")],
        ["-m", "rllib_gtpo.cli", "train", "file", str(EXAMPLES / "grpo_calculator.py")],
        ["-m", "rllib_gtpo.cli", "train", "file", str(EXAMPLES / "grpo_calculator.yaml")],
    ],
    ids=lambda command: Path(command[-1]).name,
)
def test_a_tuned_example_runs(command, tmp_path):
    done = run(command, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-3:]
    assert re.fullmatch(r"held-out accuracy \d\.\d\d -> \d\.\d\d", last[0])
    assert Path(last[1]).is_absolute() and Path(last[1]).is_dir()
    assert last[2].startswith("rllib train file ") and "--resume" in last[2]
    (result,) = map(json.loads, (tmp_path / "run" / "result.json").read_text().splitlines())
    for group, name in [
        ("group", "zero_std_frac"),
        ("tool", "error_rate"),
        ("tool", "invalid_rate"),
        ("mismatch", "kl"),
        ("policy", "entropy"),
        ("turn", "per_trajectory"),
        ("reward", "format"),
        ("tokens", "per_s"),
        ("time", "rollout_s"),
        ("time", "update_s"),
    ]:
        assert isinstance(result[group][name], float), (group, name)
    assert len(record.load(tmp_path / "run")) == 2  # a quarter of the groups, hence one
    assert "Warning" not in done.stderr and "WARNING" not in done.stderr, done.stderr


def test_a_typo_in_yaml_is_refused_with_its_line(tmp_path):
    text = (EXAMPLES / "gtpo_calculator.yaml").read_text().replace("group_size", "group_sise")
    (tmp_path / "typo.yaml").write_text(text)
    command = ["-m", "rllib_gtpo.cli", "train", "file", str(tmp_path / "typo.yaml")]
    done = run(command, tmp_path / "run")
    assert done.returncode == 2
    line = text.splitlines().index("    group_sise: 8") + 1
    assert f"typo.yaml:{line}" in done.stderr
    assert "did you mean 'group_size'" in done.stderr
    assert "Traceback" not in done.stderr


def test_tensorboard_has_the_same_names(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = run([str(EXAMPLES / "gtpo_calculator.py")], tmp_path / "run")
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    tags = {tag.removeprefix("ray/tune/") for tag in events.Tags()["scalars"]}
    assert {"group/zero_std_frac", "tool/error_rate", "mismatch/kl", "accuracy"} <= tags


def test_ctrl_c_in_the_cold_start_saves_and_resumes(tmp_path):
    out = tmp_path / "run"
    command = ["-m", "rllib_gtpo.cli", "train", "file", str(EXAMPLES / "gtpo_calculator.py")]
    options = [o for o in SMALL if "steps=3" not in o]
    process = subprocess.Popen(
        [
            sys.executable,
            *command,
            *options,
            "--override=cold_start.steps=100000",
            "--out",
            str(out),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    deadline = time.monotonic() + 100
    while not (out / "params.json").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(5)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 130, stderr
    assert "finishing this step, then saving" in stderr
    assert "Traceback" not in stderr
    assert stdout.splitlines()[-1].startswith("rllib train file ")
    resumed = subprocess.run(
        [sys.executable, *command, "--resume", str(out), "--override=cold_start.steps=3"],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "held-out accuracy" in resumed.stdout.splitlines()[-3]


def test_tune_runs_it_by_name(adder_model, tmp_path):
    from ray import tune

    from rllib_gtpo import GTPOConfig
    from tests.tasks import Adder

    config = (
        GTPOConfig()
        .environment(Adder)
        .language_model(model=adder_model)
        .rollouts(max_turn_tokens=32)
        .training(lr=tune.grid_search([1e-3, 1e-4]), group_size=2, groups_per_step=2)
        .reporting(progress=False)
    )
    results = tune.Tuner(
        "GTPO",
        param_space=config,
        run_config=tune.RunConfig(
            stop={"training_iteration": 2},
            storage_path=str(tmp_path),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=True),
            verbose=0,
        ),
    ).fit()
    assert results.num_errors == 0
    assert sorted(r.metrics["config"]["lr"] for r in results) == [1e-4, 1e-3]
    for result in results:
        assert result.metrics["training_iteration"] == 2
        assert result.metrics["group"]["zero_std_frac"] >= 0
        assert result.checkpoint is not None
        assert len(record.load(result.path)) == 4
        assert "4 trajectories" in build_report(result.path)
