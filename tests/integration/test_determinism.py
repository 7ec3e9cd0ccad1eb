"""Deterministic runs repeat, and a resumed run equals one that never stopped."""

from __future__ import annotations

import math

import pytest

from rllib_gtpo.command import stopping
from rllib_gtpo.episodes import trajectory_of
from rllib_gtpo.metrics import repeatable


def run(config, iterations, *, checkpoint=None, restore=None):
    """Trains and returns, per iteration: everything that was sampled, and every metric but
    times."""
    algorithm = config.build_algo()
    if restore is not None:
        algorithm.restore_from_path(restore)
    seen = []
    sample = algorithm._sample_step

    def spy():
        step = sample()
        seen.append(
            [
                (t.group_id, t.member, turn.prompt_ids, turn.token_ids, turn.logprobs, turn.rewards)
                for t in map(trajectory_of, step.episodes)
                for turn in t.turns
            ]
        )
        return step

    algorithm._sample_step = spy
    results = [numbers(algorithm.train()) for _ in range(iterations)]
    if checkpoint is not None:
        algorithm.save_to_path(checkpoint)
    algorithm.stop()
    return seen, results


def numbers(result):
    """The metrics of a result that should repeat; NaN is left out, for it equals nothing."""
    flat = repeatable(stopping.numbers(result))
    return {name: value for name, value in flat.items() if not math.isnan(value)}


@pytest.fixture(scope="module")
def uninterrupted(adder_model):
    return run(settings(adder_model), 3)


def settings(model):
    from rllib_gtpo import GTPOConfig
    from tests.tasks import Adder

    return (
        GTPOConfig()
        .environment(Adder)
        .language_model(model=model)
        .rollouts(max_turn_tokens=64)
        .training(lr=[[0, 1e-3], [200, 1e-4]], group_size=4, groups_per_step=6)
        .evaluation(evaluation_interval=1, evaluation_duration=10)
        .reporting(progress=False)
        .debugging(seed=11, deterministic=True)
    )


def test_two_runs_give_the_same_tokens_rewards_and_metrics(adder_model, uninterrupted):
    again = run(settings(adder_model), 3)
    assert again[0] == uninterrupted[0]
    assert again[1] == uninterrupted[1]


def test_the_comparison_covers_what_it_should(uninterrupted):
    seen, results = uninterrupted
    assert all(len(iteration) >= 24 for iteration in seen)
    assert seen[0] != seen[1]
    names = results[0].keys()
    for name in (
        "accuracy",
        "reward/format",
        "mismatch/kl",
        "grad/norm",
        "evaluation/accuracy",
    ):
        assert name in names
    assert "env_runners/num_env_steps_sampled_lifetime" in names
    assert results[0]["grad/norm"] > 0


def test_another_seed_gives_another_run(adder_model, uninterrupted):
    seen, _ = run(settings(adder_model).debugging(seed=12), 1)
    assert seen[0] != uninterrupted[0][0]


def test_a_resumed_run_equals_one_that_was_not_stopped(adder_model, uninterrupted, tmp_path):
    path = str(tmp_path / "checkpoint")
    before = run(settings(adder_model), 2, checkpoint=path)
    after = run(settings(adder_model), 1, restore=path)
    assert before[0] + after[0] == uninterrupted[0]
    assert before[1] + after[1] == uninterrupted[1]
