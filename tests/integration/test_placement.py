"""Learners and engines on the same devices: who gets which, and whose turn it is."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from contextlib import contextmanager

import pytest

from rllib_gtpo.engines.vllm.settings import SHARED_MEMORY, EngineSettings
from rllib_gtpo.errors import ConfigError
from rllib_gtpo.placement import Turns, with_engines
from tests.engines.test_vllm_client import config, installed
from tests.scripted import scripted_config
from tests.tasks import Adder


def shared(learners=2, share=0.6, **rollouts):
    made = config(**{"placement": "shared", "num_engines": learners, **rollouts})
    return made.training(groups_per_step=4).learners(
        num_learners=learners, num_gpus_per_learner=share
    )


class TestBundles:
    RLLIB = ({"CPU": 1}, {"CPU": 2}, {"CPU": 0, "GPU": 0.6}, {"CPU": 0, "GPU": 0.6})
    ENGINE = {"CPU": 1, "GPU": 0.4}

    def test_shared_bundles_have_a_whole_device(self):
        assert with_engines(self.RLLIB, self.ENGINE, 2, shared=True) == [
            {"CPU": 1},
            {"CPU": 2},
            {"CPU": 1, "GPU": 1.0},
            {"CPU": 1, "GPU": 1.0},
        ]

    def test_separate_ones_are_behind_the_others(self):
        engine = {"CPU": 1, "GPU": 2}
        assert with_engines(self.RLLIB, engine, 1, shared=False) == [*self.RLLIB, engine]
        assert with_engines(self.RLLIB, {"CPU": 0}, 3, shared=False) == list(self.RLLIB)

    def test_tune_is_asked_for_them(self, monkeypatch):
        installed(monkeypatch, "vllm")
        made = shared().env_runners(num_env_runners=1)
        request = made.algo_class.default_resource_request(made)
        assert request.bundles[2:] == [{"CPU": 1.0, "GPU": 1.0}] * 2
        separate = config(num_engines=2).learners(num_learners=1, num_gpus_per_learner=1)
        bundles = separate.algo_class.default_resource_request(separate).bundles
        assert bundles[1:] == [{"GPU": 1.0}, *[{"CPU": 1.0, "GPU": 1.0}] * 2]


SCRIPT = """
    import ray
    from ray.train._internal.worker_group import WorkerGroup
    from ray.tune.execution.placement_groups import PlacementGroupFactory
    from ray import tune
    from rllib_gtpo.placement import reserve, with_engines

    LEARNER = {{"CPU": 0, "GPU": 0.6}}  # as RLlib starts learners, anywhere in the group

    class Learner:
        pass

    @ray.remote(num_cpus=1, num_gpus=0.4)
    class Engine:
        def device(self):
            return ray.get_gpu_ids()[0]

    def devices(bundles):
        places, new = reserve(bundles[-2:])
        learners = WorkerGroup(
            2, LEARNER, **({{"placement_group": new}} if new is not None else {{}})
        )
        engines = [Engine.options(**places.options(i)).remote() for i in range(2)]
        mine = [int(i[0]) for i in learners.execute(ray.get_gpu_ids)]
        theirs = [int(i) for i in ray.get([e.device.remote() for e in engines])]
        return sorted(mine), sorted(theirs), new is None, places.first

    ray.init(num_cpus=5, num_gpus=2, include_dashboard=False, log_to_driver=False)
    engine = {{"CPU": 1, "GPU": 0.4}}
    bundles = with_engines([{{"CPU": 1}}, LEARNER, LEARNER], engine, 2, shared=True)
    if {under_tune}:
        def trial(_):
            mine, theirs, current, first = devices(bundles)
            tune.report({{"mine": mine, "theirs": theirs, "current": current, "first": first}})

        trainable = tune.with_resources(trial, PlacementGroupFactory(bundles))
        (result,) = tune.Tuner(trainable, run_config=tune.RunConfig(verbose=0)).fit()
        found = [result.metrics[k] for k in ("mine", "theirs", "current", "first")]
        assert found == [[0, 1], [0, 1], True, 1], found
    else:
        assert devices(bundles) == ([0, 1], [0, 1], False, 0)
        free = ray.available_resources().get("GPU", 0)
        assert free == 0, free  # the bundles are full: nothing else can get these devices
    print("right")
    ray.shutdown()
"""


@pytest.mark.parametrize("under_tune", [False, True])
def test_each_device_has_a_learner_and_an_engine(tmp_path, under_tune):
    """With Ray's own scheduling of two devices that it is told there are."""
    script = tmp_path / "place.py"
    script.write_text(textwrap.dedent(SCRIPT).format(under_tune=under_tune))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, timeout=240
    )
    assert "right" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: shared(share=0.5), "more than half of a GPU and less than all, such as 0.6"),
        (lambda: shared(share=1), "more than half of a GPU and less than all"),
        (lambda: shared(num_engines=1), "set num_engines=2"),
        (lambda: shared(engine_config={"tensor_parallel_size": 2}), "leave out tensor_parallel"),
        (lambda: shared().learners(num_learners=0), "set num_learners to 1 or more"),
        (lambda: shared(placement="share"), "did you mean 'shared'"),
        (lambda: shared(1).rollouts(engine="hf"), "no effect with engine='hf'"),
        (lambda: shared(engine_config={"weight_transfer": "nccl"}), "or use 'ipc'"),
        (lambda: config(engine_config={"weight_transfer": "ipc"}), r"rollouts\(placement='shared'"),
    ],
)
def test_what_cannot_share_is_refused(monkeypatch, change, message):
    installed(monkeypatch, "vllm")
    with pytest.raises(ConfigError, match=message):
        change().validate()


def test_a_shared_engine_can_sleep_and_leaves_the_learner_its_part(monkeypatch, tmp_path):
    installed(monkeypatch, "vllm")
    arguments = EngineSettings.of(shared()).arguments(tmp_path)
    assert arguments["enable_sleep_mode"] and arguments["gpu_memory_utilization"] == 0.4
    own = shared(engine_config={"gpu_memory_utilization": 0.7})
    assert EngineSettings.of(own).arguments(tmp_path)["gpu_memory_utilization"] == 0.7
    assert "enable_sleep_mode" not in EngineSettings.of(config()).arguments(tmp_path)


class RecordedEngines:
    """Stands where the engines' pool does, and writes down what is asked of it."""

    class settings:
        weight_transfer = SHARED_MEMORY
        lora = None

    def __init__(self, log):
        self.log = log

    def sleep(self, level):
        self.log.append(f"sleep {level}")

    def wake(self, tags):
        self.log.append(f"wake {' '.join(tags)}")

    def update_weights(self, version, packed):
        self.log.append(f"weights {version}")

    def stop(self):
        self.log.append("stop")


@contextmanager
def recorded(made):
    """An algorithm whose engines are recorded, together with what it does between."""
    algorithm = made.build_algo()
    log = []
    algorithm.engines = engines = RecordedEngines(log)
    algorithm._turns = Turns(engines)
    for owner, name, word in (
        (algorithm, "_sample_step", "sample"),
        (algorithm.learner_group, "update", "update"),
        (algorithm.learner_group._learner, "supervised_step", "supervised"),
    ):
        method = getattr(owner, name)

        def noted(*args, method=method, word=word, **kwargs):
            log.append(word)
            return method(*args, **kwargs)

        setattr(owner, name, noted)
    try:
        yield algorithm, log
    finally:
        algorithm.stop()


def test_engines_sleep_while_learners_work(ray_session):
    made = scripted_config(Adder)
    made.language_model(cold_start={"steps": 2, "batch_size": 4})
    turn = ["sleep 2", "update", "wake weights", "weights {}", "wake kv_cache"]
    with recorded(made) as (algorithm, log):
        algorithm.train()
        algorithm.train()
        algorithm.sync_weights()  # awake already: nothing to wake
    first = int(log[4].split()[1])
    versions = iter(range(first, first + 3))
    cold = ["sleep 2", "supervised", "supervised", *turn[2:]]
    expected = [*cold, "sample", *turn, "sample", *turn]
    expected = [e.format(next(versions)) if "{}" in e else e for e in expected]
    assert log == [*expected, f"weights {first + 2}", "stop"]


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_shared_with_real_engines(ray_session):
    """A CPU build frees nothing when it sleeps; the rest is as on a GPU."""
    from rllib_gtpo import GTPOConfig

    made = (
        GTPOConfig()
        .environment(Adder)
        .rollouts(engine="vllm", placement="shared", max_turn_tokens=16, max_tokens=256)
        .learners(num_learners=1)
        .training(lr=1e-3, group_size=2, groups_per_step=2)
        .reporting(progress=False)
    )
    algorithm = made.build_algo()
    assert algorithm._bundles is not None
    for _ in range(2):
        assert abs(algorithm.train()["mismatch"]["kl"]) < 1e-6  # the new weights arrived
    algorithm.stop()
    assert algorithm._bundles is None
