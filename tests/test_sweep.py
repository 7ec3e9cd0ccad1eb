"""Sweeps: what a file may ask of Tune, the table and its files, failures, resuming, sharing."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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

    # Settings of a sweep that has begun stay as they are.
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

    # A metric that does not exist ends the sweep at once.
    assert main(["train", "file", "sweep.py", "--stop", "scoer=1", "--out", "t"]) == 2
    assert "no metric 'scoer'; did you mean 'score'" in capsys.readouterr().err


@pytest.mark.slow
def test_an_example_shares_one_core_between_two_trials(tmp_path):
    """As `python FILE`; trials that take half a core each hold it at the same time."""
    from ray.tune import ExperimentAnalysis

    small = ["cold_start.steps=3", "group_size=2", "groups_per_step=2", "shaping=none"]
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "tuned_examples" / "sweep_gamma_shaping.py")),
            *("--stop", "training_iteration=1", "--num-cpus", "1", "--out", str(tmp_path / "s")),
            *(f"--override={setting}" for setting in small),
        ],
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "RAY_ADDRESS": ""},
    )
    assert done.returncode == 0, done.stderr
    assert "each trial takes 0.5 CPU: 2 at a time" in done.stdout
    trials = ExperimentAnalysis(str(tmp_path / "s" / "tune")).trials
    assert sorted(t.evaluated_params["gamma"] for t in trials) == [0.9, 1.0]
    ends = [t.last_result["timestamp"] for t in trials]
    assert max(t.run_metadata.start_time for t in trials) < min(ends)
    assert [row[2] for row in rows_of(done.stdout)] == ["status", "done", "done"]


def test_the_examples_are_sweeps():
    expected = {"sweep_gamma_shaping": 4, "sweep_asha": 1}
    for name, variants in expected.items():
        experiment = load_experiment(ROOT / "tuned_examples" / f"{name}.py")
        assert is_sweep(experiment)
        assert check(experiment) == {"CPU": 0.5}
        assert goal_of(experiment.config, experiment.tune_config) == Goal("accuracy", "max")
        assert len(list(variants_of(experiment))) == variants
    assert experiment.num_samples == 6


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
