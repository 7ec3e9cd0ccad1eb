"""What must hold for every rollout on its way from the sampler to the loss."""

from __future__ import annotations

import pytest
import torch

from rllib_gtpo.connectors.learner import credit_of
from rllib_gtpo.env_runner import GroupJob
from rllib_gtpo.episodes import groups_of, trajectory_of
from rllib_gtpo.packing import NOT_TRAINED, token_sequences
from rllib_gtpo.types import ToolError, flat_turns


@pytest.fixture(scope="module")
def algorithm(adder_model):
    from rllib_gtpo import GTPOConfig
    from tests.tasks import Adder

    config = (
        GTPOConfig()
        .environment(Adder)
        .language_model(model=adder_model)
        .rollouts(max_turn_tokens=64, temperature=1.3)
        .training(lr=1e-3, group_size=6, groups_per_step=8)
        .reporting(progress=False)
        .debugging(seed=5)
    )
    algorithm = config.build_algo()
    yield algorithm
    algorithm.stop()


@pytest.fixture(scope="module")
def episodes(algorithm):
    jobs = [GroupJob(position, 6, 0) for position in range(8)]
    return algorithm.env_runner.sample_groups(jobs).episodes


def test_the_rollouts_are_of_every_kind(episodes):
    """Without this the other tests could pass on empty data."""
    trajectories = [trajectory_of(e) for e in episodes]
    turns = [t for trajectory in trajectories for t in trajectory.turns]
    assert len({len(t.turns) for t in trajectories}) > 1
    assert any(t.correct for t in trajectories) and not all(t.correct for t in trajectories)
    assert any(t.invalid for t in turns)
    assert any(r.error is None for t in turns for r in t.results)
    assert any(r.error is ToolError.INVALID for t in turns for r in t.results)


def test_trained_ids_are_the_sampled_ids(algorithm, episodes):
    for trajectory, sequence in _streams(episodes):
        sampled = [i for turn in trajectory.turns for i in turn.token_ids]
        trained = [
            i
            for i, turn in zip(sequence.token_ids, sequence.turns, strict=True)
            if turn != NOT_TRAINED
        ]
        assert trained == sampled
        codec = algorithm.env_runner.codec
        for turn in trajectory.turns:
            assert codec.decode(turn.token_ids) == turn.text
            assert turn.finish == "length" or turn.token_ids[-1] in codec.stop_token_ids


def test_every_trained_token_has_exactly_one_turn_and_nothing_else_is_trained(algorithm, episodes):
    row = 0
    for trajectory, sequence in _streams(episodes):
        at = 0
        for turn in trajectory.turns:
            assert sequence.turns[at : at + len(turn.prompt_ids)] == [NOT_TRAINED] * len(
                turn.prompt_ids
            )
            at += len(turn.prompt_ids)
            assert sequence.turns[at : at + len(turn.token_ids)] == [row] * len(turn.token_ids)
            at += len(turn.token_ids)
            row += 1
        assert at == len(sequence.token_ids)


def test_the_context_is_what_the_template_renders(algorithm, episodes):
    """Tool output stands where the template puts it, and none of it is trained."""
    codec = algorithm.env_runner.codec
    for episode in episodes:
        trajectory = trajectory_of(episode)
        stream = codec.tokenizer.decode(
            [i for turn in trajectory.turns for i in (*turn.prompt_ids, *turn.token_ids)]
        )
        messages = [*episode.get_observations(0).messages]
        for turn in trajectory.turns:
            messages.append({"role": "assistant", "content": turn.text})
            messages += [{"role": "tool", "content": r.content} for r in turn.results]
        rendered = codec.tokenizer.apply_chat_template(messages, tokenize=False)
        assert rendered.startswith(stream)


def test_turn_rewards_sum_to_the_episodes_return(episodes):
    for episode in episodes:
        trajectory = trajectory_of(episode)
        rewards = [sum(turn.rewards.values()) for turn in trajectory.turns]
        assert list(episode.get_rewards()) == pytest.approx(rewards)
        assert (
            episode.get_return() == pytest.approx(sum(rewards)) == pytest.approx(trajectory.reward)
        )
        assert len(episode) == len(trajectory.turns)


def test_learner_and_sampler_agree_before_the_first_update(algorithm, episodes):
    """Within 1e-4 in float32, at a temperature other than 1, over cached multi-turn contexts."""
    sequences = token_sequences([trajectory_of(e) for e in episodes])
    learner = algorithm.learner_group._learner
    found = learner._logprobs_of(sequences)
    worst = 0.0
    for index, sequence in enumerate(sequences):
        sampled = [
            p
            for p, turn in zip(sequence.logprobs, sequence.turns, strict=True)
            if turn != NOT_TRAINED
        ]
        worst = max(worst, (found[index].cpu() - torch.tensor(sampled)).abs().max().item())
    assert worst < 1e-4
    assert min(p for s in sequences for p in s.logprobs) < -1.0  # the comparison is not of zeros


def test_credit_rows_are_turns_in_order(episodes):
    groups = groups_of(episodes)
    credit = credit_of(groups, "gtpo", 0.9, {})
    turns = flat_turns(groups)
    assert len(credit.advantages) == len(turns)
    at = 0
    for group in groups:
        for trajectory in group.trajectories:
            expected = 0.0
            for offset in reversed(range(len(trajectory.turns))):
                expected = trajectory.turns[offset].reward + 0.9 * expected
                assert credit.returns[at + offset].item() == pytest.approx(expected)
            at += len(trajectory.turns)


def test_the_learner_keeps_the_credit_that_it_trained_on(algorithm):
    algorithm.train()
    trained = algorithm.learner_group._learner.last_batch
    turns = flat_turns(trained.groups)
    assert len(trained.credit.advantages) == len(turns) > 0
    groups_with_signal = trained.credit.advantages.abs().sum()
    assert groups_with_signal > 0


def _streams(episodes):
    trajectories = [trajectory_of(e) for e in episodes]
    return zip(trajectories, token_sequences(trajectories), strict=True)


def test_callbacks_see_every_turn_and_final_rewards(adder_config):
    from ray.rllib.callbacks.callbacks import RLlibCallback

    seen = {"created": 0, "start": 0, "step": 0, "returns": []}

    class Watch(RLlibCallback):
        def on_episode_created(self, *, episode, **kwargs):
            seen["created"] += 1

        def on_episode_start(self, *, episode, **kwargs):
            seen["start"] += len(episode.get_observations()) == 1

        def on_episode_step(self, *, episode, metrics_logger, **kwargs):
            seen["step"] += 1
            metrics_logger.log_value("steps_seen", 1, reduce="sum")

        def on_episode_end(self, *, episode, env, rl_module, **kwargs):
            assert episode.is_done and env is not None and rl_module is not None
            seen["returns"].append(episode.get_return())

    algorithm = adder_config().callbacks(Watch).build_algo()
    result = algorithm.train()
    trained = algorithm.learner_group._learner.last_batch
    trajectories = trained.trajectories
    assert seen["created"] == seen["start"] == len(seen["returns"]) == len(trajectories) == 16
    assert seen["step"] == sum(len(t.turns) for t in trajectories)
    assert result["env_runners"]["steps_seen"] == seen["step"]
    assert sorted(seen["returns"]) == pytest.approx(sorted(t.reward for t in trajectories))
    algorithm.stop()


@pytest.mark.slow
def test_any_number_of_runners_and_learners_is_the_same_program(adder_config):
    def run(workers):
        config = adder_config().env_runners(num_env_runners=workers)
        algorithm = config.learners(num_learners=workers).build_algo()
        results = [algorithm.train() for _ in range(2)]
        algorithm.stop()
        return [(r["accuracy"], r["tokens"]["sampled"], r["grad"]["norm"]) for r in results]

    local = run(0)
    for workers in (1, 2):
        for mine, theirs in zip(local, run(workers), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-3)
