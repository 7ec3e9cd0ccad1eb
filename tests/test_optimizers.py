"""Which torch optimizers can be used, and how learning rates change."""

from __future__ import annotations

import pytest
import torch

from rllib_gtpo import GTPOConfig
from rllib_gtpo.errors import ConfigError
from rllib_gtpo.optimizers import LRSchedule, check_optimizer
from tests.tasks import Adder

REFUSED = {"LBFGS": "several times a step", "SparseAdam": "are dense", "Muon": "matrices only"}
NAMES = sorted(
    name
    for name, value in vars(torch.optim).items()
    if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and name != "Optimizer"
)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_of_torch_works_or_is_refused_with_the_reason(name):
    if name not in REFUSED:
        check_optimizer({"name": name}, "single")
        return
    with pytest.raises(ConfigError, match=REFUSED[name]):
        check_optimizer({"name": name}, "single")


@pytest.mark.parametrize(
    ("settings", "strategy", "message"),
    [
        ({"name": "AdanW"}, "single", "did you mean 'Adam"),
        ({"name": "Optimizer"}, "single", "unknown"),
        ({"weight_decoy": 0.1}, "single", "did you mean 'weight_decay'"),
        ({"name": "SGD", "betas": [0.9, 0.9]}, "ddp", "which SGD does not take"),
        ({"betas": 0.9}, "single", "cannot take a step"),
        ({"weight_decay": -1.0}, "fsdp2", "cannot take a step"),
        ("AdamW", "single", "give a dict"),
        ({"name": "Adafactor"}, "fsdp2", "learners of strategy='fsdp2' hold slices"),
        ({"name": "Adafactor"}, "deepspeed", "hold slices"),
        ({"name": "Adagrad"}, "deepspeed", "before DeepSpeed has cut"),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused(settings, strategy, message):
    with pytest.raises(ConfigError, match=message):
        check_optimizer(settings, strategy)


def factors(count=8, **settings):
    schedule = LRSchedule.of(settings, 1e-6)
    return [schedule.factor(done) for done in range(count)]


def test_schedules():
    assert factors(warmup=2, decay="linear", iterations=6) == [0.5, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert factors(5, warmup=4) == [0.25, 0.5, 0.75, 1, 1]
    cosine = factors(6, decay="cosine", iterations=4, final_frac=0.1)
    assert cosine == pytest.approx([1, 0.868198, 0.55, 0.231802, 0.1, 0.1], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warm_up": 3}, "did you mean 'warmup'"),
        ({"warmup": 0.1}, "iterations, 0 or more"),
        ({"decay": "cosin", "iterations": 3}, "did you mean 'cosine'"),
        ({"decay": "cosine"}, "needs the run's iterations"),
        ({"iterations": 10}, "neither has an effect"),
        ({"warmup": 10, "decay": "linear", "iterations": 10}, "must be more than"),
        ({"decay": "linear", "iterations": 3, "final_frac": 2.0}, "must lie in"),
        (3, "give a dict"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        GTPOConfig().environment(Adder).training(lr_schedule=settings).validate()


def test_two_schedules_are_one_too_many():
    config = GTPOConfig().environment(Adder)
    with pytest.raises(ConfigError, match="is a schedule itself"):
        config.training(lr=[[0, 1e-6], [9, 1e-7]], lr_schedule={"warmup": 2}).validate()


def test_switches_are_switches():
    for name in ("activation_checkpointing", "torch_compile"):
        with pytest.raises(ConfigError, match="true or false"):
            GTPOConfig().environment(Adder).learners(**{name: "no"}).validate()


def test_what_would_be_compiled_in_vain_is_refused():
    rllibs = GTPOConfig().environment(Adder).framework(torch_compile_learner=True)
    with pytest.raises(ConfigError, match=r"use learners\(torch_compile=True\)"):
        rllibs.validate()


@pytest.mark.deepspeed
def test_layers_whose_weights_come_and_go_are_not_compiled():
    config = GTPOConfig().environment(Adder).learners(num_learners=2, torch_compile=True)
    config.learners(strategy="deepspeed", strategy_options={"stage": 2}).validate()
    with pytest.raises(ConfigError, match="stage 3"):
        config.learners(strategy_options={"stage": 3}).validate()
