"""Shared fixtures: one Ray session, and one small trained model for everything that rolls out."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # see rllib_gtpo.subcommands.options
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # else workers starve on a busy machine

import pytest


@pytest.fixture(scope="session")
def ray_session():
    """Ray with four logical CPUs, whatever the machine has; shut down at the end."""
    import ray

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def adder_model(ray_session, tmp_path_factory):
    """A directory with a model that has seen the Adder's demonstrations: it calls, errs and
    answers."""
    from rllib_gtpo import SFTConfig
    from rllib_gtpo.models import build_tokenizer
    from tests.tasks import MARKUP, Adder

    config = (
        SFTConfig()
        .environment(Adder)
        .language_model(
            tokenizer=build_tokenizer(MARKUP),
            cold_start={"steps": 150, "batch_size": 16, "lr": 4e-3},
        )
        .training(steps_per_iteration=150)
        .reporting(progress=False)
        .debugging(seed=0)
    )
    algorithm = config.build_algo()
    result = algorithm.train()
    assert result["sft"]["steps"] == 150
    directory = tmp_path_factory.mktemp("adder")
    algorithm.env_runner.module.model.save_pretrained(directory)
    algorithm.env_runner.codec.tokenizer.save_pretrained(directory)
    algorithm.stop()
    return str(directory)


@pytest.fixture
def adder_config(adder_model):
    """A GTPO run on the Adder from that model; every call makes a new config."""
    from rllib_gtpo import GTPOConfig
    from tests.tasks import Adder

    def make(**training):
        settings = {"lr": 1e-3, "group_size": 4, "groups_per_step": 4, **training}
        return (
            GTPOConfig()
            .environment(Adder)
            .language_model(model=adder_model)
            .rollouts(max_turn_tokens=64)
            .training(**settings)
            .reporting(progress=False)
            .debugging(seed=3, deterministic=True)
        )

    return make
