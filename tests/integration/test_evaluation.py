"""Evaluation on several splits, with several rollouts of each task, and of a checkpoint."""

from __future__ import annotations

import time

import pytest

from rllib_gtpo import GTPOConfig
from rllib_gtpo.errors import ConfigError, DataError
from rllib_gtpo.metrics import nested
from tests.tasks import Adder


class Two(Adder):
    """The Adder's tasks, some of which nobody can solve; any number is the same answer."""

    def tasks(self, split):
        rows = super().tasks("test" if split == "hard" else split)
        return [{**row, "answer": "none"} for row in rows[:3]] if split == "hard" else rows[:5]

    def same_answer(self, one, other, task):
        return one.isdigit() and other.isdigit()


@pytest.fixture
def config(adder_model):
    def make(split, **evaluation):
        settings = {"samples_per_task": 4, "evaluation_duration": 20, **evaluation}
        return (
            GTPOConfig()
            .environment(Two)
            .language_model(model=adder_model)
            .rollouts(max_turn_tokens=64)
            .training(lr=1e-3, group_size=2, groups_per_step=2)
            .evaluation(split=split, evaluation_interval=1, **settings)
            .reporting(progress=False)
            .debugging(seed=3, deterministic=True)
        )

    return make


def own(results):
    """Without RLlib's part."""
    return {name: value for name, value in nested(results).items() if name != "env_runners"}


def evaluated(config):
    algorithm = config.build_algo()
    results = own(algorithm.evaluate())
    algorithm.stop()
    return results


def test_one_split(config):
    results = evaluated(config("validation"))
    assert results["tasks"] == 5
    assert results["avg@4"] == pytest.approx(results["accuracy"])
    assert 0 < results["avg@4"] < results["pass@2"] < results["pass@4"] <= 1
    assert results["avg@4_low"] < results["avg@4"] < results["avg@4_high"]
    assert "split" not in results


def test_several_splits_are_each_what_they_are_alone(config):
    alone = evaluated(config("validation"))
    both = evaluated(config(["validation", "hard"]))
    assert both["split"]["validation"] == alone
    hard = both["split"]["hard"]
    assert (hard["tasks"], hard["accuracy"], hard["pass@4"]) == (3, 0, 0)
    assert hard["pass@4_high"] == pytest.approx(3.8415 / 6.8415, abs=1e-4)  # Wilson, none of three
    assert both["accuracy"] == pytest.approx((20 * alone["accuracy"] + 12 * 0) / 32)
    assert "avg@4" not in both


def test_remote_runners_give_the_same(config):
    local = evaluated(config(["validation", "hard"]))
    remote = evaluated(config(["validation", "hard"], evaluation_num_env_runners=2))
    for name in ("accuracy", "avg@4", "maj@4", "pass@2", "tasks"):
        assert remote["split"]["validation"][name] == local["split"]["validation"][name]


def test_a_runner_that_is_behind_is_not_evaluated_with_old_weights(config):
    """RLlib gives a runner that has not confirmed its last weights no new ones, silently."""
    algorithm = config("validation", evaluation_num_env_runners=1).build_algo()
    algorithm.eval_env_runner_group.foreach_env_runner_async_fetch_ready(
        lambda runner: time.sleep(2), tag="set_state"
    )
    result = algorithm.train()
    algorithm.stop()
    assert result["evaluation"]["weights"]["version"] == 1


def test_the_environment_says_which_answers_are_the_same(config, monkeypatch):
    """All numbers are one answer, so a task's vote is the share of right ones among its numbers."""
    same = evaluated(config("validation"))["maj@4"]
    monkeypatch.setattr(Two, "same_answer", Adder.same_answer)
    strict = evaluated(config("validation"))["maj@4"]
    assert same != strict


def test_results_of_training_have_them(config):
    algorithm = config(["validation", "hard"]).build_algo()
    result = algorithm.train()
    algorithm.stop()
    splits = result["evaluation"]["split"]
    assert set(splits) == {"validation", "hard"}
    assert splits["hard"]["maj@4"] == 0 and splits["validation"]["avg@4"] > 0


@pytest.mark.parametrize("split", [[], ["test", "test"], ["test", 3], 5])
def test_splits_that_are_none(split):
    with pytest.raises(ConfigError, match="a list of different ones"):
        GTPOConfig().evaluation(split=split).validate()


def test_an_empty_split_is_named(config, monkeypatch):
    monkeypatch.setattr(Two, "tasks", lambda self, split: [] if split == "hard" else [{"id": "x"}])
    algorithm = config(["hard"]).build_algo()
    with pytest.raises(DataError, match="tasks\\('hard'\\) has no rows"):
        algorithm.evaluate()
    algorithm.stop()
