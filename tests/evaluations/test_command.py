"""`rllib evaluate` on one trained run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rllib_gtpo import record
from rllib_gtpo.cli import main
from rllib_gtpo.evaluations import Results

ROOT = Path(__file__).parents[2]
FILE = """\
from rllib_gtpo import GTPOConfig
from tests.tasks import Adder

class Sums(Adder):
    def tasks(self, split):
        return [] if split == "empty" else super().tasks(split)[:6]

config = (
    GTPOConfig()
    .environment(Sums)
    .language_model(model={model!r})
    .rollouts(max_turn_tokens=64)
    .training(lr=3e-3, group_size=4, groups_per_step=4)
    .evaluation(split="validation", samples_per_task=4, evaluation_duration=16)
    .reporting(progress=False, record="none")
    .debugging(seed=3)
)
stop = {{"training_iteration": 2}}
"""


@pytest.fixture(scope="module")
def run(adder_model, tmp_path_factory):
    """A run of two iterations whose environment is defined in its file, which then is gone."""
    folder = tmp_path_factory.mktemp("evaluate")
    file = folder / "sums.py"
    file.write_text(FILE.format(model=adder_model))
    command = ["train", "file", str(file), "--checkpoint-freq", "1", "--out", str(folder / "run")]
    assert main(command) == 0
    file.unlink()
    return folder / "run"


def evaluated(capsys, *args):
    """What the command says as JSON."""
    assert main(["evaluate", *map(str, args), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *args):
    """Its message, of bad input."""
    assert main(["evaluate", *map(str, args)]) == 2
    return capsys.readouterr().err


def test_a_run_by_its_directory_alone(run, capsys):
    [found] = evaluated(capsys, run)["evaluations"]
    assert Path(found["results"]) == run / "evaluations" / "checkpoint_000002-validation.parquet"
    assert (found["iteration"], found["algorithm"], found["environment"]) == (2, "GTPO", "Sums")
    results = Results.read(found["results"])
    assert [row["task_id"] for row in results.rows] == [f"validation-{i}" for i in range(6)]
    assert all(len(row["answers"]) == row["samples"] == 4 for row in results.rows)
    numbers = found["numbers"]["validation"]
    assert numbers["avg@4"] == pytest.approx(sum(row["avg"] for row in results.rows) / 6)
    assert numbers["tasks"] == 6 and numbers["turn/per_trajectory"] > 1
    [again] = evaluated(capsys, run)["evaluations"]
    assert again["results"].endswith("-validation-2.parquet")
    assert Results.read(again["results"]).rows == results.rows  # the same keys of the sampler


def test_the_numbers_are_those_of_an_evaluation_during_training(run, capsys):
    from rllib_gtpo.command.checkpoint import load_config

    checkpoint = run / "checkpoint_000001"
    [found] = evaluated(capsys, checkpoint, "--tasks", 4)["evaluations"]
    config = load_config(checkpoint).copy(copy_frozen=False)
    algorithm = config.evaluation(evaluation_interval=1).build_algo()
    algorithm.restore_from_path(str(checkpoint))
    expected = algorithm.evaluate()
    algorithm.stop()
    for name in ("tasks", "avg@4", "maj@4", "pass@2"):
        assert found["numbers"]["validation"][name] == pytest.approx(expected[name])


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.language_model(lora={"rank": 4, "alpha": 8}),
        pytest.param(
            lambda c: c.learners(num_learners=2, strategy="fsdp2"), marks=pytest.mark.slow
        ),
    ],
    ids=["lora", "fsdp2"],
)
def test_it_does_not_matter_what_it_was_trained_with(adder_config, capsys, tmp_path, change):
    """Results are those that the training run's own evaluation had of the same weights."""
    config = adder_config(group_size=2, groups_per_step=2).evaluation(
        evaluation_interval=1, samples_per_task=4, evaluation_duration=24
    )
    change(config)
    algorithm = config.build_algo()
    expected = algorithm.train()["evaluation"]
    checkpoint = tmp_path / "checkpoint_000001"
    algorithm.save_to_path(str(checkpoint))
    algorithm.stop()
    [found] = evaluated(capsys, checkpoint, "--tasks", 6)["evaluations"]
    numbers = found["numbers"]["validation"]
    assert 0 < numbers["avg@4"] == pytest.approx(expected["avg@4"])
    for name in ("maj@4", "pass@2", "tasks"):
        assert numbers[name] == pytest.approx(expected[name])
    assert numbers["turn/per_trajectory"] == pytest.approx(expected["turn"]["per_trajectory"])


def test_other_splits_samples_environments_and_places(run, capsys, tmp_path):
    options = ["--split", "test", "--split", "train", "--samples-per-task", 2, "--tasks", 3]
    options += ["--env", "tests.tasks.Adder", "--override", "env_config.count=2"]
    options += ["--override", "max_turns=1", "--temperature", 0.5, "--seed", 9]
    options += ["--out", tmp_path, "--record"]
    [found] = evaluated(capsys, run, *options)["evaluations"]
    assert found["results"] == str(tmp_path / "checkpoint_000002-test+train.parquet")
    results = Results.read(found["results"])
    assert [(row["split"], row["samples"]) for row in results.rows] == [
        ("test", 2),
        ("test", 2),
        ("train", 2),
        ("train", 2),
    ]
    assert {row["turns"] for row in results.rows} == {1.0}
    settings = found["settings"]
    assert (settings["temperature"], settings["seed"], settings["max_turns"]) == (0.5, 9, 1)
    assert found["environment"] == "Adder" and settings["env_config"] == {"count": 2}
    rows = record.load(found["records"][0])
    assert len(rows) == 4 and set(rows["split"]) == {"test"} and set(rows["iteration"]) == {2}
    assert rows[0]["messages"][1]["role"] == "assistant" and rows[0]["token_ids"]
    answers = [answer for row in results.of("test") for answer in row["answers"]]
    assert rows["answer"] == answers
    assert main(["report", found["records"][0], "--terminal"]) == 0
    assert "test-0" in capsys.readouterr().out


def test_two_checkpoints_against_each_other(run, capsys, tmp_path):
    first, second = run / "checkpoint_000001", run / "checkpoint_000002"
    said = evaluated(capsys, second, "--compare", first, "--split", "test", "--out", tmp_path)
    [comparison] = said["comparisons"]
    files = [each["results"] for each in said["evaluations"]]
    ours, theirs = (Results.read(file) for file in files)
    gaps = [a["avg"] - b["avg"] for a, b in zip(ours.rows, theirs.rows, strict=True)]
    assert comparison["difference"]["estimate"] == pytest.approx(sum(gaps) / 6)
    assert comparison["worse"] == sum(gap < 0 for gap in gaps) and any(gaps)
    # The files say the same, and a file against a policy is evaluated as the file was.
    assert evaluated(capsys, files[0], "--compare", files[1])["comparisons"] == [comparison]
    mixed = evaluated(capsys, second, "--compare", files[1], "--out", tmp_path)
    assert mixed["comparisons"] == [comparison]
    assert main(["evaluate", *files[:1], "--compare", files[1], "--metric", "pass@2"]) == 0
    shown = capsys.readouterr().out
    assert "pass@2 on test, 6 tasks" in shown and "A - B" in shown
    assert "avg@4" in shown and "ended by: " in shown and "test-" in shown


def test_what_is_refused(run, capsys, tmp_path):
    assert "Sums.tasks('nope') raised KeyError" in refused(capsys, run, "--split", "nope")
    assert "tasks('empty') has no rows" in refused(capsys, run, "--split", "empty")
    message = refused(capsys, run, "--compare", run, "--metric", "pass@8")
    assert "pass@8 needs 8 samples of each task, and there are 4" in message
    assert "no such directory" in refused(capsys, tmp_path / "none")
    assert "no such file" in refused(capsys, tmp_path / "none.parquet")
    assert "is not a run" in refused(capsys, tmp_path)
    message = refused(capsys, run, "--temperature", 0)
    assert "4 samples of each task at temperature 0 are all the same" in message
    assert "unknown environment 'Nope'" in refused(capsys, run, "--env", "Nope")
    message = refused(capsys, run, "--override", "max_turnz=3")
    assert "did you mean 'max_turns'" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["class_and_ctor_args.pkl", "learner_group/learner/rl_module"])
def test_a_checkpoint_that_is_not_complete(run, capsys, tmp_path, missing):
    checkpoint = tmp_path / "checkpoint_000002"
    shutil.copytree(run / checkpoint.name, checkpoint)
    lost = checkpoint / missing
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    message = refused(capsys, checkpoint)
    assert Path(missing).name in message and str(checkpoint) in message


def test_a_file_that_has_changed_is_told(run, capsys):
    file = run.parent / "sums.py"
    file.write_text("something else")
    try:
        assert main(["evaluate", str(run), "--tasks", "1"]) == 0
    finally:
        file.unlink()
    told = capsys.readouterr()
    assert "sums.py has changed since the run" in told.err
    assert "1 task, 4 samples each" in told.out


def test_another_algorithm_is_evaluated_on_episodes(ray_session, capsys, tmp_path):
    from ray.rllib.algorithms.ppo import PPOConfig

    settings = {"train_batch_size_per_learner": 64, "minibatch_size": 32, "num_epochs": 1}
    config = PPOConfig().environment("CartPole-v1").env_runners(num_env_runners=0)
    algorithm = config.training(**settings).build_algo()
    algorithm.save_to_path(str(tmp_path / "checkpoint"))
    algorithm.stop()
    [found] = evaluated(capsys, tmp_path / "checkpoint", "--tasks", 3)["evaluations"]
    assert found["numbers"]["num_episodes"] == 3
    assert 8 <= found["numbers"]["episode_return_mean"] <= 500
    assert found["results"] is None
    assert main(["evaluate", str(tmp_path / "checkpoint"), "--tasks", "2"]) == 0
    assert "return mean" in capsys.readouterr().out
    source = tmp_path / "checkpoint"
    assert "--split has no effect on PPO" in refused(capsys, source, "--split", "test")
    assert "leave --compare out" in refused(capsys, source, "--compare", source)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_in_order(run, tmp_path, number, code):
    """Within rollouts that would take minutes; nothing is written, and no traceback printed."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "envs")))
    options = ["--samples-per-task", "20000", "--out", str(tmp_path / "out"), "--num-cpus", "2"]
    errors = tmp_path / "errors"
    with errors.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "rllib_gtpo.cli", "evaluate", str(run), *options],
            env={**os.environ, "PYTHONPATH": path, "RAY_ADDRESS": "local"},
            stdout=subprocess.PIPE,
            stderr=file,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        began = time.monotonic()
        while "Loading weights" not in errors.read_text() and time.monotonic() - began < 120:
            time.sleep(0.2)
        time.sleep(3)
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert "stopping" in errors.read_text() and "Traceback" not in errors.read_text()
    assert out == b"" and not (tmp_path / "out").exists()
