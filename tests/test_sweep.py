"""Sweeps: what a file may ask of Tune, the table and its files, failures, resuming, sharing."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rllib_gtpo import record
from rllib_gtpo.cli import main
from rllib_gtpo.command.files import load_experiment
from rllib_gtpo.command.resolve import check
from rllib_gtpo.command.sweep import is_sweep
from rllib_gtpo.command.tuning import Goal, goal_of
from rllib_gtpo.errors import ConfigError
from rllib_gtpo.report.charts import heat_map, lines, strip
from rllib_gtpo.report.sweep import SweepSummary, TrialSummary

ROOT = Path(__file__).resolve().parent.parent

# Trials of one iteration's worth of work: the metric says which of them a scheduler keeps.
SWEEP = """\
from ray import tune
from ray.rllib.algorithms.ppo import PPO, PPOConfig
from ray.tune.schedulers import ASHAScheduler

class Task(PPO):
    def training_step(self):
        super().training_step()
        if self.config.lr == 1e-5:
            raise ValueError("<script>alert(1)</script>")
        self.metrics.log_value("score", self.config.lr, window=1)

class Told(tune.Callback):
    def on_trial_result(self, iteration, trials, trial, result, **info):
        with open("told", "a") as file:
            print(trial.evaluated_params["lr"], result["training_iteration"], file=file)

config = (
    PPOConfig(algo_class=Task)
    .environment("CartPole-v1")
    .env_runners(num_env_runners=0)
    .resources(num_cpus_for_main_process=0.5)
    .learners(num_cpus_per_learner=0.5)
    .training(
        lr=tune.grid_search([1e-3, 1e-4, 1e-5]),
        train_batch_size_per_learner=40, minibatch_size=20, num_epochs=1,
    )
    .rl_module(model_config={"fcnet_hiddens": [8]})
)
stop = {"training_iteration": 2}
tune_config = tune.TuneConfig(
    metric="score",
    mode="max",
    max_concurrent_trials=1,
    scheduler=ASHAScheduler(max_t=2, grace_period=1, reduction_factor=2),
)
callbacks = [Told()]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.py").write_text(SWEEP)
    return tmp_path


def load(folder, old="", new=""):
    assert old in SWEEP
    (folder / "sweep.py").write_text(SWEEP.replace(old, new) if old else SWEEP)
    return load_experiment(folder / "sweep.py")


def rows_of(output):
    """The table's, each as its words."""
    return [line.split() for line in output.splitlines() if line.startswith("  ") and line.strip()]


@pytest.mark.slow
def test_a_sweep_ends_with_a_table_also_when_it_is_resumed(folder, ray_session, capsys):
    assert main(["train", "file", "sweep.py", "--out", "s"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("run directory: s\neach trial takes 0.5 CPU: 1 at a time\ntrial 1  lr=")
    table = rows_of(out)
    assert table == [
        ["trial", "lr", "status", "iter", "best", "at", "last", "seconds"],
        ["1", "0.001", "done", "2", "0.001", "1", "0.001", table[1][-1]],
        ["2", "0.0001", "stopped", "early", "1", "0.0001", "1", "0.0001", table[2][-1]],
        ["3", "1e-05", "failed", "0", "-", "-", "-", "0"],
    ]
    assert "trial 3 (lr=1e-05): ValueError: <script>alert(1)</script>  (" in out
    assert out.splitlines()[-1] == "rllib train file sweep.py --resume s"
    assert "Trial" not in out and "Tune" not in out  # of Tune's own output
    assert (folder / "told").read_text().split() == ["0.001", "1", "0.001", "2", "0.0001", "1"]

    run = folder / "s"
    with (run / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["number"], r["config/lr"], r["status"]) for r in rows] == [
        ("1", "0.001", "done"),
        ("2", "0.0001", "stopped early"),
        ("3", "1e-05", "failed"),
    ]
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["metric"], summary["mode"]) == ("score", "max")
    assert summary["trials"][0]["curve"] == [[1, 0.001], [2, 0.001]]
    assert Path(summary["trials"][0]["checkpoint"]).is_dir()
    page = (run / "sweep.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.count("<svg") >= 2 and "default-src 'none'" in page
    results = [p.read_text() for p in run.glob("tune/*/result.json")]
    assert sorted(len(text.splitlines()) for text in results) == [1, 2]
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"

    # Settings of a sweep that has begun stay as they are; stop criteria may change.
    assert main(["train", "file", "sweep.py", "--resume", "s", "--override", "gamma=0.5"]) == 2
    assert "leave out --override" in capsys.readouterr().err
    # Only what failed runs again, for a scheduler that has forgotten; the table is the whole one.
    (folder / "sweep.py").write_text(SWEEP.replace("self.config.lr == 1e-5", "False"))
    assert main(["train", "file", "sweep.py", "--resume", "s"]) == 0
    out = capsys.readouterr().out
    assert [row[:3] for row in rows_of(out)][1:] == [
        ["1", "0.001", "done"],
        ["2", "0.0001", "stopped"],
        ["3", "1e-05", "done"],
    ]
    assert json.loads((run / "run.json").read_text())["status"] == "completed"

    # The same for whoever asks later.
    assert main(["report", "s"]) == 0
    assert capsys.readouterr().out in out
    assert main(["report", "s", "--out", "x.html"]) == 2
    assert "leave out --out" in capsys.readouterr().err
    assert sorted(p.name for p in run.glob("tune/trial_*")) == [
        "trial_001_lr=0.001",
        "trial_002_lr=0.0001",
        "trial_003_lr=1e-05",
    ]

    # A metric that does not exist ends the sweep at once.
    assert main(["train", "file", "sweep.py", "--stop", "scoer=1", "--out", "t"]) == 2
    assert "no metric 'scoer'; did you mean 'score'" in capsys.readouterr().err


def start(folder, *words, wait=True):
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "RAY_ADDRESS": "",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "envs")]),
        },
        start_new_session=True,
    )
    if not wait:
        return process
    try:
        out, err = process.communicate(timeout=250)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, err
    return out


MEETING = """\
import os, sys, time
sys.path.insert(0, {examples!r})
from sweep_gamma_shaping import Calculator, config, stop, tune_config

class Meeting(Calculator):
    def tasks(self, split):
        open(f"here-{{os.getpid()}}", "w").close()
        deadline = time.monotonic() + 100
        while sum(name.startswith("here-") for name in os.listdir()) < 2:
            assert time.monotonic() < deadline, "the other trial does not begin"
            time.sleep(0.1)
        return super().tasks(split)

config.environment(Meeting)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trials_share_a_core_and_a_cold_start(tmp_path):
    """The examples, in the two steps of docs/sweeps.md.

    Each of two trials that take half a core goes on only when both have begun.
    """
    examples = ROOT / "tuned_examples"
    small = ["--override=cold_start.steps=3", "--override=steps_per_iteration=3", "--num-cpus=1"]
    stop = "--stop=training_iteration=1"
    start(tmp_path, str(examples / "sft_calculator.py"), "--out", "cold", stop, *small)
    start(tmp_path, "-m", "rllib_gtpo.cli", "export", "cold", "cold/model")
    small = ["group_size=2", "groups_per_step=2", "shaping=none", "cold_start=null"]
    (tmp_path / "meeting.py").write_text(MEETING.format(examples=str(examples)))
    out = start(
        *(tmp_path, "-m", "rllib_gtpo.cli", "train", "file", "meeting.py", "--out", "s", stop),
        *("--num-cpus=1", *(f"--override={setting}" for setting in [*small, "model=cold/model"])),
    )
    assert "each trial takes 0.5 CPU: 2 at a time" in out and "cold start" not in out
    assert sorted(row[1:4] for row in rows_of(out)) == [
        ["0.9", "done", "1"],
        ["1", "done", "1"],
        ["gamma", "status", "iter"],
    ]
    for folder in (tmp_path / "s" / "tune").glob("trial_*"):
        (file,) = record.record_files(folder)
        assert file.iteration == 1
        events = EventAccumulator(str(folder)).Reload().Tags()
        assert "accuracy" in events["scalars"]
        assert "transcript/lowest_reward/text_summary" in events["tensors"]


@pytest.mark.slow
def test_ctrl_c_saves_running_trials(folder):
    slow = SWEEP.replace("super().training_step()", "super().training_step(); time.sleep(0.5)")
    slow = slow.replace("self.config.lr == 1e-5", "False").replace("tune_config =", "unused =")
    slow = "import time\n" + slow.replace("max_t=2", "max_t=99").replace(", 1e-5]", "]")
    (folder / "sweep.py").write_text(slow.replace('{"training_iteration": 2}', '{"score": 1}'))
    command = ["-m", "rllib_gtpo.cli", "train", "file", "sweep.py"]
    process = start(folder, *command, "--out", "s", "--num-cpus", "1", wait=False)
    told = folder / "told"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (told.exists() and " 2" in told.read_text()):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert err.strip() == "finishing this step, then saving; press Ctrl-C again to quit at once"
    saved = {}
    for trial in json.loads((folder / "s" / "summary.json").read_text())["trials"]:
        assert trial["status"] == "interrupted" and trial["iterations"] >= 1
        saved[trial["number"]] = trial["iterations"]
        assert Path(trial["checkpoint"]).is_dir()
    assert sorted(saved) == [1, 2]

    (folder / "sweep.py").write_text(slow.replace('{"training_iteration": 2}', STOP_SOON))
    start(folder, *command, "--resume", "s", "--num-cpus", "1")
    for number in saved:
        (rows,) = (folder / "s" / "tune").glob(f"trial_{number:03d}_*/result.json")
        counted = [json.loads(row)["training_iteration"] for row in rows.read_text().splitlines()]
        assert counted == list(range(1, len(counted) + 1))
        assert saved[number] <= len(counted) <= saved[number] + 1


STOP_SOON = '{"time_total_s": 0.1}'


def test_the_examples_are_sweeps():
    expected = {"sweep_gamma_shaping": 4, "sweep_asha": 1}
    for name, variants in expected.items():
        experiment = load_experiment(ROOT / "tuned_examples" / f"{name}.py")
        assert is_sweep(experiment)
        assert check(experiment) == {"CPU": 0.5}
        assert goal_of(experiment.config, experiment.tune_config) == Goal("accuracy", "max")
        assert len(list(variants_of(experiment))) == variants
    assert experiment.num_samples == 6
    experiment.config.learners(num_learners=2, num_cpus_per_learner=0.25, num_gpus_per_learner=0.2)
    experiment.config.env_runners(num_env_runners=2, num_cpus_per_env_runner=0.25)
    assert check(experiment) == pytest.approx({"CPU": 1.5, "GPU": 0.4})


def variants_of(experiment):
    from ray.tune.search.variant_generator import generate_variants

    return generate_variants(experiment.config.to_dict())


def test_what_a_file_says_to_tune_is_checked(folder):
    with pytest.raises(ConfigError, match=r"must be a ray\.tune\.TuneConfig, not dict"):
        load(folder, "tune_config = tune.TuneConfig(", "tune_config = dict(")
    with pytest.raises(ConfigError, match="`callbacks` must be a list of objects"):
        load(folder, "callbacks = [Told()]", "callbacks = [Told]")
    with pytest.raises(ConfigError, match="num_samples = 3, but tune_config says 2"):
        load(folder, 'metric="score"', "num_samples=(num_samples := 3) - 1")
    with pytest.raises(ConfigError, match="has no effect on a single trial"):
        is_sweep(load(folder, "tune.grid_search([1e-3, 1e-4, 1e-5])", "1e-3"))
    with pytest.raises(ConfigError, match=r"trial gamma=2 lr=0\.001: "):
        check(bad_variant())


def bad_variant():
    from ray import tune

    from rllib_gtpo import GTPOConfig
    from rllib_gtpo.command.files import Experiment
    from tests.tasks import Adder

    config = GTPOConfig().environment(Adder)
    config.training(lr=tune.grid_search([1e-3]), gamma=tune.grid_search([0.9, 2]))
    return Experiment("bad", Path("bad.py"), config)


def test_charts_escape_and_take_odd_values():
    hostile = "<img src=x onerror=alert(1)>"
    drawn = [
        lines([(hostile, "#123456", [(1, 0.5), (2, 0.5)])], hostile),
        strip([(hostile, 0.1, "#123456", hostile), (True, 0.2, "#123456", "b")], hostile),
        strip([(10.0**-k, float(k), "#123456", "x") for k in range(1, 8)], "lr"),
        heat_map({(hostile, 1): 0.1, ("b", 2): 0.2}, hostile, "column", "min"),
    ]
    for text in drawn:
        assert "<img" not in text and "nan" not in text.lower()
    assert "&lt;img" in drawn[0]
    assert drawn[2].count("<circle") == 7 and 'class="mean"' not in drawn[2]


def test_a_table_of_trials_without_results(tmp_path, capsys):
    trial = TrialSummary(1, "a", {}, "not started", 0, None, None, None, 0.0, "p", None, None, [])
    summary = SweepSummary("empty", "GTPO", Goal("accuracy"), tmp_path, [trial])
    summary.write()
    summary.show()
    assert "not started" in capsys.readouterr().out
    assert "accuracy" in (tmp_path / "sweep.html").read_text()
