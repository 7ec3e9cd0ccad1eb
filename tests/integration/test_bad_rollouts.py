"""A bad rollout is data, a bad environment is an error, and a lost runner loses nothing."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from typing import ClassVar

import pytest

from rllib_gtpo import GTPOConfig
from rllib_gtpo.env_runner import GroupJob
from rllib_gtpo.episodes import trajectory_of
from rllib_gtpo.errors import DataError, EnvironmentFault
from rllib_gtpo.types import StopReason
from tests.tasks import Adder


class Flaky(Adder):
    """Raises in some turns."""

    async def astep(self, action):
        if self.trajectory.task["question"].startswith("3"):
            raise RuntimeError("the database is down")
        return await super().astep(action)


class Broken(Adder):
    def reward(self, trajectory, task):
        raise ZeroDivisionError("bug in the reward")


class Hanging(Adder):
    async def astep(self, action):
        await asyncio.sleep(3600)


class Endless(Adder):
    """Never ends by itself: every turn is answered."""

    def _reason_to_stop(self, trajectory, turn, truncated):
        return StopReason.MAX_TURNS if len(trajectory.turns) >= self.turn_limit else None


class LongPrompt(Adder):
    def prompt(self, task):
        return "x" * 5000 if task["id"].endswith(("1", "3")) else super().prompt(task)


class AllLong(Adder):
    def prompt(self, task):
        return "x" * 5000


class Empty(Adder):
    def tasks(self, split):
        return []


class FailingReset(Adder):
    """The second member of each group cannot be reset, in every second group twice."""

    resets: ClassVar[Counter[str]] = Counter()

    def reset(self, *, seed=None, options=None):
        task = options["task"]["id"]
        self.resets[task] += 1
        twice = int(task.rpartition("-")[2]) % 2 == 0
        if self.resets[task] == 2 or (twice and self.resets[task] == 5):
            raise ConnectionError("no more licences")
        return super().reset(seed=seed, options=options)


class Late(Adder):
    """Raises before it takes its second turn."""

    async def astep(self, action):
        if self.trajectory.turns and self.trajectory.member == 0:
            raise RuntimeError("too late")
        return await super().astep(action)


def add(a: int, b: int) -> str:
    """Add two numbers.  a: the first.  b: the second."""
    return "9" * 5000


class Talkative(Adder):
    """Its tool fills the context, and its reward is asynchronous."""

    tools = [add]

    async def reward(self, trajectory, task):
        await asyncio.sleep(0)
        return {"accuracy": 0.0, "graded": 1.0}


class Hopeless(Adder):
    def reward(self, trajectory, task):
        return {"accuracy": 0.0}


def build(model, env, **settings):
    config = (
        GTPOConfig()
        .environment(env)
        .language_model(model=model)
        .rollouts(**{"max_turn_tokens": 64, **settings})
        .training(lr=1e-3, group_size=4, groups_per_step=10)
        .reporting(progress=False)
        .debugging(seed=1)
    )
    return config


@pytest.fixture
def train(adder_model):
    built = []

    def run(env, **settings):
        algorithm = build(adder_model, env, **settings).build_algo()
        built.append(algorithm)
        return algorithm

    yield run
    for algorithm in built:
        algorithm.stop()


def test_a_group_whose_task_always_breaks_is_replaced_and_counted(train):
    algorithm = train(Flaky)
    result = algorithm.train()
    incomplete = result["group"]["incomplete"]
    assert incomplete > 0
    assert result["trajectory"]["discarded"] == 4 * incomplete  # not tried again in vain
    assert result["stop"]["env_error"] == incomplete / (10 + incomplete)
    assert result["env_runners"]["num_episodes"] == 40
    assert algorithm.progress_made.next_position == 10 + incomplete
    trained = algorithm.learner_group._learner.last_batch
    assert not any(t.task["question"].startswith("3") for t in trained.trajectories)


def test_an_environment_that_always_raises_is_told_with_its_error(train):
    with pytest.raises(EnvironmentFault, match="ZeroDivisionError: bug in the reward"):
        train(Broken).train()


def test_an_environment_that_hangs_is_ended(train, monkeypatch):
    monkeypatch.setattr("rllib_gtpo.rollout.TURN_TIMEOUT_S", 0.05)
    with pytest.raises(EnvironmentFault, match=r"no answer in 0\.05 s"):
        train(Hanging).train()


def test_an_environment_that_never_ends_stops_at_the_turn_limit(train):
    algorithm = train(Endless, max_turns=3)
    trajectories = [t for g in algorithm._sample_step().groups for t in g.trajectories]
    assert {t.stop_reason for t in trajectories} <= {
        StopReason.MAX_TURNS,
        StopReason.TURN_TRUNCATED,
    }
    assert max(len(t.turns) for t in trajectories) == 3


def test_a_context_that_a_tool_fills_ends_the_trajectory_which_is_scored(train):
    algorithm = train(Talkative)
    trajectories = [t for g in algorithm._sample_step().groups for t in g.trajectories]
    full = [t for t in trajectories if t.stop_reason is StopReason.MAX_TOKENS]
    assert full
    assert all(t.answer is None and not t.correct for t in full)
    for trajectory in trajectories:
        assert not any("graded" in turn.rewards for turn in trajectory.turns[:-1])
        assert trajectory.turns[-1].rewards["graded"] == 1.0


def test_a_prompt_that_is_too_long_is_left_out_and_replaced(train):
    result = train(LongPrompt).train()
    assert result["group"]["skipped"] > 0
    assert result["env_runners"]["num_episodes"] == 40


def test_only_prompts_that_are_too_long_say_so(train):
    with pytest.raises(
        DataError, match=r"task train-\d+: its prompt has \d+ tokens and the context holds"
    ):
        train(AllLong).train()


def test_no_tasks(train):
    with pytest.raises(DataError, match=r"tasks\('train'\) has no rows"):
        train(Empty).train()


def test_a_full_context_ends_the_trajectory_not_the_run(train):
    algorithm = train(Adder, max_tokens=20, max_turn_tokens=20)
    trajectories = [t for g in algorithm._sample_step().groups for t in g.trajectories]
    assert StopReason.MAX_TOKENS in {t.stop_reason for t in trajectories}
    assert max(t.num_tokens for t in trajectories) <= 20


def test_members_that_break_are_rolled_out_again(adder_model):
    """Of 40 resets 10 fail, of the next 10 again some."""
    FailingReset.resets.clear()
    config = build(adder_model, FailingReset).training(mini_batches=2, epochs=2)
    algorithm = config.build_algo()
    result = algorithm.train()
    assert result["group"]["incomplete"] == 0
    again = sum(count == 6 for count in FailingReset.resets.values())
    assert 0 < again < 10 and sum(FailingReset.resets.values()) == 50 + again
    assert result["trajectory"]["discarded"] == 10 + again
    assert result["stop"]["env_error"] == pytest.approx((10 + again) / (50 + again))
    groups = algorithm.learner_group._learner.last_batch.groups
    assert [[t.member for t in g.trajectories] for g in groups] == [[0, 1, 2, 3]] * 10
    assert not any(t.broken for g in groups for t in g.trajectories)
    assert result["grad"]["norm"] > 0
    algorithm.stop()


def test_broken_rollouts_are_no_failures_of_the_policy_in_training(train):
    algorithm = train(Late)
    result = algorithm.train()
    assert result["stop"]["env_error"] > 0
    assert result["group"]["incomplete"] > 0
    trajectories = algorithm.learner_group._learner.last_batch.trajectories
    assert len(trajectories) == 40 and not any(t.broken for t in trajectories)


def test_a_broken_rollout_keeps_its_turns_and_counts_as_failed_in_evaluation(adder_model):
    config = build(adder_model, Late).evaluation(evaluation_interval=1, evaluation_duration=40)
    algorithm = config.evaluation(evaluation_samples_per_task=4).build_algo()
    runner = algorithm.eval_env_runner_group.local_env_runner
    episodes = runner.sample_groups([GroupJob(position, 4, 0) for position in range(10)]).episodes
    broken = [e for e in episodes if trajectory_of(e).broken]
    assert len(episodes) == 40 and broken
    for episode in broken:
        assert len(episode) == len(trajectory_of(episode).turns) == len(episode.get_rewards()) > 1
    algorithm.stop()


def test_evaluation_ends_with_the_split_and_needs_runners(adder_model):
    from rllib_gtpo.errors import ConfigError

    config = build(adder_model, Adder)
    algorithm = config.build_algo()
    with pytest.raises(ConfigError, match="evaluation_interval"):
        algorithm.evaluate()
    algorithm.stop()
    config = config.environment(env_config={"count": 7})
    algorithm = config.evaluation(evaluation_interval=1, evaluation_samples_per_task=2).build_algo()
    assert algorithm.evaluate()["env_runners"]["num_episodes"] == 14
    algorithm.stop()


def test_mini_batches_that_are_empty_are_left_out(adder_model):
    config = build(adder_model, Adder).rewards(format_penalty=0.0)
    config = config.training(mini_batches=10, groups_per_step=10)
    algorithm = config.training(uniform_groups="drop").build_algo()
    result = algorithm.train()
    assert 0 < result["group"]["dropped_frac"] < 1
    assert result["grad"]["norm"] > 0
    algorithm.stop()


def test_a_text_environment_that_hangs_is_ended(adder_model, monkeypatch):
    import time

    import gymnasium as gym

    class Stuck(gym.Env):
        observation_space = action_space = gym.spaces.Text(100)

        def __init__(self, env_config):
            super().__init__()

        def reset(self, *, seed=None, options=None):
            return "hello", {}

        def step(self, action):
            time.sleep(30)

    monkeypatch.setattr("rllib_gtpo.rollout.TURN_TIMEOUT_S", 0.2)
    algorithm = build(adder_model, Stuck).build_algo()
    began = time.monotonic()
    with pytest.raises(EnvironmentFault, match="no answer"):
        algorithm.train()
    assert time.monotonic() - began < 20
    algorithm.stop()


def test_a_step_without_any_signal_changes_nothing(adder_model):
    config = build(adder_model, Hopeless).rewards(format_penalty=0.0)
    config = config.training(uniform_groups="drop")
    algorithm = config.build_algo()
    before = algorithm.get_module().get_state()
    result = algorithm.train()
    assert result["group"]["dropped_frac"] == result["group"]["zero_std_frac"] == 1.0
    line, remedy = algorithm.summary_line(result).split("\n")
    assert "no-signal 1.00" in line
    assert "nothing to learn from, every rollout failed: try a cold_start" in remedy
    after = algorithm.get_module().get_state()
    assert all((before[name] == after[name]).all() for name in before)
    algorithm.stop()


def test_a_runner_that_dies_loses_no_group(adder_model):
    config = build(adder_model, Adder).env_runners(num_env_runners=2)
    algorithm = config.build_algo()
    algorithm.train()
    # Once its weights are there nothing is under way, so that it is found dead with groups.
    algorithm.env_runner_group.fetch_ready_async_reqs(tags="set_state", timeout_seconds=None)
    pids = algorithm.env_runner_group.foreach_env_runner(
        lambda runner: os.getpid(), local_env_runner=False
    )
    os.kill(pids[0], signal.SIGKILL)
    result = algorithm.train()
    assert result["group"]["lost_and_resampled"] > 0
    assert result["env_runners"]["num_episodes"] == 40
    positions = {g.id for g in algorithm.learner_group._learner.last_batch.groups}
    assert positions == set(range(10, 20))
    algorithm.stop()


def test_remote_runners_sample_what_a_local_one_samples(adder_model):
    def tokens(runners):
        config = build(adder_model, Adder).env_runners(num_env_runners=runners)
        algorithm = config.build_algo()
        episodes = algorithm._sample_step().episodes
        algorithm.stop()
        trajectories = [trajectory_of(e) for e in episodes]
        return {(t.group_id, t.member): [turn.token_ids for turn in t.turns] for t in trajectories}

    assert tokens(0) == tokens(1)


def test_turns_of_nothing_but_invalid_calls_end_a_trajectory(train):
    algorithm = train(Adder, max_invalid_calls=1)
    result = algorithm.train()
    assert 0 < result["stop"]["invalid_calls"] < 1
    for t in algorithm.learner_group._learner.last_batch.trajectories:
        assert not any(turn.calls and turn.results[0].error == "invalid" for turn in t.turns[:-1])
        if t.stop_reason is StopReason.INVALID_CALLS:
            assert t.turns[-1].results and t.turns[-1].rewards["format"] == -0.1
