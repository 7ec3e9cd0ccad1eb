"""A run goes on with other learners and runners, and after a learner was lost."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from rllib_gtpo.cli import main
from tests.integration.test_killed_runs import FILE

sys.path.insert(0, str(Path(__file__).parents[2] / "release"))

from killed_runs import rows_of

KILLER = """
import os, signal
from ray.rllib.callbacks.callbacks import RLlibCallback

class Killer(RLlibCallback):
    # Kills a learner between the second iteration and its checkpoint, once.
    def on_train_result(self, *, algorithm, result, **kwargs):
        if result["training_iteration"] == 2 and not os.path.exists({mark!r}):
            open({mark!r}, "w").close()
            calls = algorithm.learner_group.foreach_learner(lambda learner: os.getpid())
            os.kill([call.get() for call in calls][-1], signal.SIGKILL)

config.callbacks(Killer)
"""


@pytest.fixture(scope="module")
def whole(adder_model, tmp_path_factory):
    """The file, and the rows of a run in one process."""
    folder = tmp_path_factory.mktemp("hardware")
    (folder / "task.py").write_text(FILE.format(model=adder_model, folder=str(folder)))
    assert train(folder, "--out", str(folder / "whole"), "--stop", "training_iteration=6") == 0
    return folder, rows_of(folder / "whole")


def train(folder, *arguments):
    return main(["train", "file", str(folder / "task.py"), *arguments])


def over(*settings):
    return [part for setting in settings for part in ("--override", setting)]


def assert_alike(rows, expected):
    """Batches of other sizes round otherwise, and tokens are drawn all the same."""
    for row, other in zip(rows, expected, strict=True):
        for name in ("accuracy", "tokens/sampled", "turn/per_trajectory", "reward/format"):
            assert row[name] == pytest.approx(other[name], rel=1e-6), name
        for name in ("grad/norm", "loss", "policy/entropy"):
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name


@pytest.mark.slow
def test_a_run_moves_to_other_learners_and_runners_and_back(whole, capsys):
    folder, expected = whole
    run = folder / "moved"
    stop = ["--stop", "training_iteration=2"]
    assert train(folder, "--out", str(run), *stop) == 0
    resume = ["--resume", str(run)]
    more = over("num_learners=2", "num_env_runners=1", "token_budget=300")
    assert train(folder, *resume, *more, "--stop", "training_iteration=4") == 0
    less = over("num_learners=0", "num_env_runners=0", "token_budget=16384")
    assert train(folder, *resume, *less, "--stop", "training_iteration=6") == 0
    assert_alike(rows_of(run), expected)

    capsys.readouterr()
    later = ["--stop", "training_iteration=7"]
    assert train(folder, *resume, *over("num_learners=2", "strategy=single"), *later) == 2
    assert "for one learner" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("learners", [1, 2])
def test_a_lost_learner_costs_the_work_since_the_last_checkpoint(whole, capsys, learners):
    folder, expected = whole
    mark = str(folder / f"killed-{learners}")
    text = (folder / "task.py").read_text()
    (folder / "killer.py").write_text(text + KILLER.format(mark=mark))
    run = folder / f"lost-{learners}"
    arguments = ["train", "file", str(folder / "killer.py"), "--out", str(run)]
    arguments += ["--max-failures", "1", "--checkpoint-freq", "1"]
    arguments += over(f"num_learners={learners}")
    assert main([*arguments, "--stop", "training_iteration=4"]) == 0
    assert os.path.exists(mark)
    assert "starting again from checkpoint_000001" in capsys.readouterr().err
    assert json.loads((run / "run.json").read_text())["failures"] == 1
    assert_alike(rows_of(run), expected[:4])
    assert [row["run/failures"] for row in rows_of(run)] == [0, 1, 1, 1]
