"""A process that is killed at any moment of a save leaves the last good checkpoint."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
import torch

from rllib_gtpo.command.directory import RunDirectory
from tests.integration.test_learners import config, episodes, weights  # noqa: F401
from tests.integration.test_strategies import train, uneven  # noqa: F401

CHILD = """
import json, pickle, sys
from pathlib import Path
import ray
from rllib_gtpo.command.directory import RunDirectory, RunRecord
from tests.integration.test_killed_saves import fingerprint, learning
from tests.integration.test_strategies import train

folder, model, strategy, address = sys.argv[1:]
ray.init(address, namespace="killed", log_to_driver=False)
algorithm = learning(model, strategy).build_algo()
episodes = pickle.loads(Path(folder, "episodes.pkl").read_bytes())
run = RunDirectory.create(Path(folder, "run"), RunRecord("task.py", "0", "run", "GTPO"))
for iteration in range(1, 1000):
    train(algorithm.learner_group, episodes, 1)
    progress = {"training_iteration": iteration, "print": fingerprint(algorithm)}
    print("saving", flush=True)
    run.save(iteration, progress, algorithm.save_checkpoint)
    print("saved", flush=True)
"""


def learning(model, strategy):
    learners = 2 if strategy == "fsdp2" else 0
    return config(model, learners, uniform_groups="drop").learners(
        num_learners=learners, strategy=strategy
    )


def moments(learner):
    """Sums over whole tensors: any number of learners has the same."""
    optimizer = learner.get_optimizer("default_policy", "policy")
    whole = [
        getattr(value, "full_tensor", lambda value=value: value)()
        for state in optimizer.state.values()
        for name, value in sorted(state.items())
    ]
    return [float(value.double().abs().sum()) for value in whole]


def fingerprint(algorithm):
    """Of weights and moments."""
    of_weights = [float(v.double().abs().sum()) for v in weights(algorithm.learner_group).values()]
    of_learners = [result.get() for result in algorithm.learner_group.foreach_learner(moments)]
    return of_weights + of_learners[0]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "kills"), [("single", 3), ("fsdp2", 2)])
def test_the_last_good_checkpoint_loads_whenever_a_save_is_killed(
    adder_model,
    uneven,  # noqa: F811
    tmp_path,
    strategy,
    kills,
):
    import pickle

    address = ray.get_runtime_context().gcs_address
    moment = random.Random(0)
    reader = learning(adder_model, "single").build_algo()
    for number in range(kills):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "episodes.pkl").write_bytes(pickle.dumps(uneven))
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder), adder_model, strategy, address],
            stdout=subprocess.PIPE,
            stderr=(folder / "stderr").open("w"),
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        lines = (line.strip() for line in child.stdout)
        assert "saving" in lines, (folder / "stderr").read_text()
        began = time.perf_counter()
        assert next(lines) == "saved"
        took = time.perf_counter() - began
        assert "saving" in lines
        time.sleep(moment.uniform(0.0, took))
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        run, checkpoint = RunDirectory.open(folder / "run")
        assert checkpoint.iteration in (1, 2)  # 2, if the kill came just too late
        reader.load_checkpoint(str(checkpoint.path.absolute()))
        saved = json.loads((checkpoint.path / "progress.json").read_text())["print"]
        assert fingerprint(reader) == pytest.approx(saved, rel=1e-5)
        assert all(torch.isfinite(v).all() for v in weights(reader.learner_group).values())
        run.clean(checkpoint)
        left = [path.name for path in (folder / "run").iterdir() if "tmp" in path.name]
        assert left == []
    reader.stop()


def test_a_checkpoint_without_its_last_file_does_not_count(tmp_path):
    from rllib_gtpo.command.directory import RunRecord

    run = RunDirectory.create(tmp_path / "run", RunRecord("task.py", "0", "run", "GTPO"))
    kept = run.save(1, {}, lambda folder: Path(folder, "weights").write_text("all"))
    (tmp_path / "run" / "checkpoint_000002").mkdir()
    assert run.checkpoints() == [kept]
