"""Which groups and tokens a step trains on, and that every learner agrees about it."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import ray
import torch
from ray.rllib.core.learner.training_data import TrainingData

from rllib_gtpo import GTPOConfig
from rllib_gtpo.algorithm import GTPO
from rllib_gtpo.connectors.learner import CUT_OFF, CreditRule, credited_turns
from rllib_gtpo.env_runner import GroupJob
from rllib_gtpo.episodes import groups_of, trajectory_of
from rllib_gtpo.errors import DataError, EnvironmentFault
from rllib_gtpo.ops.diagnostics import diagnostic_sums, finish_diagnostics
from rllib_gtpo.sampling import Sampled, Step, sample_step
from rllib_gtpo.types import Group, StopReason, Trajectory, Turn
from tests.integration.test_determinism import numbers, run
from tests.integration.test_learners import SPACES, weights
from tests.tasks import Adder


def config(model, learners=0, **training):
    settings = {"lr": 1e-3, "group_size": 4, "groups_per_step": 5, **training}
    return (
        GTPOConfig()
        .environment(Adder)
        .language_model(model=model)
        .rollouts(max_tokens=30, max_turn_tokens=20)
        .rewards(format_penalty=0.0)
        .training(token_budget=512, **settings)
        .learners(num_learners=learners)
        .reporting(progress=False)
        .debugging(seed=3, deterministic=True)
    )


def member(*rewards, correct=False, reason=StopReason.ANSWER, tokens=3):
    """A trajectory with one dict of reward components a turn."""
    turns = [
        Turn(i, [1], list(range(tokens)), [0.0] * tokens, rewards=components)
        for i, components in enumerate(rewards)
    ]
    return Trajectory({}, turns=turns, correct=correct, stop_reason=reason)


def group(*members):
    for index, trajectory in enumerate(members):
        trajectory.member = index
    return Group(0, {}, list(members))


def solved(turns=1, **components):
    last = {"accuracy": 1.0, **components}
    return member(*[{} for _ in range(turns - 1)], last, correct=True)


def failed(turns=1, reason=StopReason.ANSWER, tokens=3, **components):
    last = {"accuracy": 0.0, **components}
    return member(*[{} for _ in range(turns - 1)], last, reason=reason, tokens=tokens)


class TestWhichGroupsAreKept:
    def kept_by(self, of, estimator="gtpo", overlong="keep"):
        """The strictest setting of uniform_groups that keeps the group."""
        choices = ("drop", "drop_solved", "keep")
        rules = [CreditRule(estimator, 0.9, {}, choice, overlong) for choice in choices]
        kept = [rule.keeps(of) for rule in rules]
        assert kept == sorted(kept)  # each drops what the one before drops
        return choices[kept.index(True)]

    def test_a_contrast_of_outcomes(self):
        assert self.kept_by(group(solved(), failed())) == "drop"

    def test_solved_by_all(self):
        """Also where turns or format differ, which moves advantages."""
        assert self.kept_by(group(solved(2), solved(3))) == "keep"
        assert self.kept_by(group(solved(format=-0.1), solved(format=0.0))) == "keep"

    def test_failed_by_all(self):
        """gamma makes no contrast out of when the same penalty was paid."""
        assert self.kept_by(group(failed(2), failed(3))) == "drop_solved"
        late, early = failed(2, format=-0.1), member({"format": -0.1}, {"accuracy": 0.0})
        assert self.kept_by(group(late, early)) == "drop_solved"

    def test_failed_by_all_with_different_penalties(self):
        """A gradient for GTPO, and none for an estimator that takes the outcome."""
        different = group(failed(format=-0.1), failed(format=0.0))
        assert self.kept_by(different) == "drop"
        assert self.kept_by(different, "grpo_sum") == "drop"
        assert self.kept_by(different, "grpo") == "drop_solved"

    def test_the_only_contrast_is_masked(self):
        """Two failed members on either side of the masked one's reward would still be trained."""
        cut = failed(reason=StopReason.MAX_TOKENS, format=-0.1)
        lonely = group(cut, failed(reason=StopReason.TURN_TRUNCATED))
        assert self.kept_by(lonely) == "drop"
        assert self.kept_by(lonely, overlong="mask") == "drop_solved"
        assert self.kept_by(group(cut, failed(), failed()), overlong="mask") == "drop"

    def test_running_out_of_turns_is_not_masked(self):
        rule = CreditRule("gtpo", 0.9, {}, "keep", "mask")
        masked = {r for r in StopReason if not rule.trains(failed(reason=r))}
        assert masked == {StopReason.MAX_TOKENS, StopReason.TURN_TRUNCATED}
        assert not rule.trains(Trajectory({}))


class Stream:
    """Tasks 0, 1, 2, ...; `lively` ones give a contrast, the others none; some cannot be used."""

    every_member = False  # of a broken group breaks, instead of the first

    def __init__(self, lively, unusable=(), broken=()):
        self.position = 0
        self.lively, self.unusable, self.broken = lively, unusable, broken

    def __call__(self, count):
        sampled = Sampled()
        for position in range(self.position, self.position + count):
            members = [failed(), solved() if position in self.lively else failed()]
            for trajectory in members:
                trajectory.group_id = position
            if position in self.unusable:
                sampled.skipped[position] = "no room"
            elif position in self.broken:
                for trajectory in members if self.every_member else members[:1]:
                    trajectory.stop_reason = StopReason.ENV_ERROR
                sampled.incomplete[position] = "the database is down"
                sampled.discarded += members
            else:
                sampled.episodes += [
                    SimpleNamespace(custom_data={"trajectory": t}) for t in members
                ]
        self.position += count
        return sampled


def sample(stream, wanted, budget):
    keeps = CreditRule("gtpo", 0.9, {}, "drop").keeps
    return sample_step(stream, wanted=wanted, budget=budget, keeps=keeps)


class TestResampling:
    def test_until_enough_are_kept(self):
        step = sample(Stream({0, 3, 6, 7}), wanted=3, budget=10)
        assert [g.id for g in step.kept] == [0, 3, 6]
        assert [g.id for g in step.groups] == list(range(7))
        assert [trajectory_of(e).group_id for e in step.episodes[::2]] == list(range(7))
        assert step.resampled == 4

    def test_until_the_budget_is_spent(self):
        stream = Stream({0})
        step = sample(stream, wanted=3, budget=5)
        assert [g.id for g in step.kept] == [0]
        assert step.resampled == 5
        assert stream.position == len(step.groups) == 8

    def test_not_at_all_without_a_budget_or_a_need(self):
        assert sample(Stream(set()), wanted=3, budget=0).resampled == 0
        assert sample(Stream({0, 1, 2}), wanted=3, budget=9).resampled == 0

    def test_tasks_that_cannot_be_used_cost_no_budget(self):
        step = sample(Stream({0, 5, 6}, unusable={1, 3}, broken={2}), wanted=3, budget=2)
        assert [g.id for g in step.groups] == [0, 4, 5, 6]
        assert [g.id for g in step.kept] == [0, 5, 6]
        assert (step.resampled, len(step.skipped), len(step.incomplete)) == (1, 2, 1)
        assert len(step.discarded) == 2

    def test_a_stream_without_a_usable_task_ends(self):
        with pytest.raises(DataError, match="no usable tasks; the last: the database is down"):
            sample(Stream(set(), broken=set(range(1000))), wanted=3, budget=0)

    def test_most_rollouts_break(self):
        stream = Stream(set(), broken={0, 1, 2})
        stream.every_member = True
        with pytest.raises(EnvironmentFault, match="6 of 6 rollouts ended in an error"):
            sample(stream, wanted=3, budget=0)


@pytest.fixture(scope="module")
def resampling(adder_model):
    setup = config(adder_model, uniform_groups="drop", resample_groups=30)
    algorithm = setup.build_algo()
    steps = []
    sample = algorithm._sample_step
    algorithm._sample_step = lambda: steps.append(sample()) or steps[-1]
    results = [algorithm.train() for _ in range(3)]
    batches = [algorithm.learner_group._learner.last_batch]
    positions = algorithm.progress_made.next_position
    algorithm.stop()
    return steps, results, batches, positions


def test_resampling_is_counted_and_metrics_are_of_all_groups(resampling):
    steps, results, _, positions = resampling
    for step, result in zip(steps, results, strict=True):
        trajectories = [t for g in step.groups for t in g.trajectories]
        assert len(step.groups) == 5 + step.resampled
        assert result["group"]["resampled"] == step.resampled
        assert result["group"]["kept"] == len(step.kept)
        assert result["group"]["budget_exhausted"] == float(len(step.kept) < 5)
        assert result["group"]["dropped_frac"] == pytest.approx(
            1 - len(step.kept) / len(step.groups)
        )
        assert result["accuracy"] == pytest.approx(
            sum(t.correct for t in trajectories) / len(trajectories)
        )
        assert result["tokens"]["sampled"] == sum(t.num_trained_tokens for t in trajectories)
    assert sum(step.resampled for step in steps) > 0
    assert any(len(step.kept) == 5 for step in steps)
    assert positions == sum(len(step.groups) for step in steps)
    ids = [g.id for step in steps for g in step.groups]
    assert ids == list(range(positions))


def test_only_kept_groups_are_trained_on(resampling):
    steps, _, batches, _ = resampling
    assert [g.id for g in batches[-1].groups] == [g.id for g in steps[-1].kept]


def test_the_names_of_metrics_never_change(resampling):
    _, results, _, _ = resampling
    names = [set(numbers(result)) for result in results]
    assert names[0] == names[1] == names[2]
    for name in (
        "group/signal_frac_unshaped",
        "advantage/by_turn/7",
        "advantage/by_turn/rest",
        "advantage/turns_corr",
        "shaping/variance",
        "overlong/masked_tokens_frac",
    ):
        assert name in names[0]
    assert 0 < results[0]["time"]["credit_s"] < results[0]["time"]["update_s"]


def test_resampling_goes_on_where_it_stopped(adder_model, tmp_path):
    def make():
        return config(adder_model, uniform_groups="drop", resample_groups=7)

    path = str(tmp_path / "checkpoint")
    whole = run(make(), 3)
    before = run(make(), 2, checkpoint=path)
    after = run(make(), 1, restore=path)
    assert before[0] + after[0] == whole[0]
    assert before[1] + after[1] == whole[1]
    assert any(result["group/resampled"] for result in whole[1])
    assert any(result["group/budget_exhausted"] for result in whole[1])


@pytest.fixture(scope="module")
def episodes(adder_model):
    """Groups of every kind, sampled once: all updates see the very same data."""
    algorithm = config(adder_model).build_algo()
    jobs = [GroupJob(position, 4, 0) for position in range(8)]
    sampled = algorithm.env_runner.sample_groups(jobs).episodes
    algorithm.stop()
    return sampled


def update(setup, *shards):
    """Change of the weights and metrics of one update, with one shard a learner."""
    learners = setup.build_learner_group(
        rl_module_spec=setup.get_multi_rl_module_spec(spaces=SPACES)
    )
    before = weights(learners)
    if setup.num_learners:
        results = learners.update(episodes_refs=[ray.put(shard) for shard in shards])
    else:
        results = learners.update(training_data=TrainingData(episodes=list(shards[0])))
    reports = [flat(r["default_policy"]) for r in results]
    after = weights(learners)
    learners.shutdown()
    return {k: after[k] - before[k] for k in after}, reports


def flat(report):
    """The numbers of a learner's report by slash name, without times."""
    found = {}
    for key, value in report.items():
        if isinstance(value, dict):
            found |= {f"{key}/{name}": number for name, number in flat(value).items()}
        elif hasattr(value, "peek"):
            found[key] = float(value.peek())
    return {
        name: number
        for name, number in found.items()
        if not name.startswith("time/") and "lifetime" not in name and name != "computed_tokens"
    }


def apart(episodes, *owners):
    """Shards of whole groups: the positions that each learner gets."""
    return [[e for e in episodes if trajectory_of(e).group_id in owned] for owned in owners]


@pytest.mark.parametrize(
    "settings",
    [
        {"overlong": "mask"},
        {"uniform_groups": "drop"},
        {"uniform_groups": "drop", "overlong": "mask", "mini_batches": 2, "epochs": 2},
    ],
    ids=["mask", "drop", "both in steps"],
)
def test_two_learners_equal_one(adder_model, episodes, settings):
    """The second learner has nothing but what is dropped, and one group."""
    rule = config(adder_model, **settings).build_credit_rule()
    groups = groups_of(episodes)
    dropped = {g.id for g in groups if not rule.keeps(g)}
    first = {g.id for g in groups} - dropped
    if not dropped:
        dropped = {first.pop()}
    one, [report] = update(config(adder_model, 0, **settings), episodes)
    two, reports = update(config(adder_model, 2, **settings), *apart(episodes, first, dropped))
    change = max(delta.abs().max().item() for delta in one.values())
    difference = max((one[k] - two[k]).abs().max().item() for k in one)
    assert change > 1e-4
    assert difference <= 0.02 * change
    assert len(reports) == 2
    for other in reports:
        assert other == pytest.approx(report, rel=1e-3, abs=1e-6)


def test_a_learner_all_of_whose_groups_are_dropped(adder_model, episodes):
    rule = config(adder_model, uniform_groups="drop").build_credit_rule()
    dropped = {g.id for g in groups_of(episodes) if not rule.keeps(g)}
    assert 0 < len(dropped) < 8  # else the tests above show nothing
    everything = apart(episodes, dropped, dropped)
    change, reports = update(config(adder_model, 2, uniform_groups="drop"), *everything)
    assert all(not delta.any() for delta in change.values())
    assert reports[0]["group/dropped_frac"] == 1.0
    assert reports[0]["group/signal_frac"] == reports[0]["advantage/abs_mean"] == 0.0


def test_masked_tokens_are_not_trained_but_count_in_the_statistics(adder_model, episodes):
    trajectories = [trajectory_of(e) for e in episodes]
    cut = [t for t in trajectories if t.stop_reason in CUT_OFF]
    assert 0 < len(cut) < len(trajectories)
    change, [report] = update(config(adder_model, overlong="mask"), episodes)
    left = sum(t.num_trained_tokens for t in trajectories if t.stop_reason not in CUT_OFF)
    everything = sum(t.num_trained_tokens for t in trajectories)
    assert report["tokens"] == left
    assert report["overlong/masked_frac"] == pytest.approx(len(cut) / len(trajectories))
    assert report["overlong/masked_tokens_frac"] == pytest.approx(1 - left / everything)

    other_tokens, other_rewards = copy.deepcopy(episodes), copy.deepcopy(episodes)
    for trajectory in map(trajectory_of, other_tokens):
        if trajectory.stop_reason in CUT_OFF:
            for turn in trajectory.turns:
                turn.token_ids = [5] * len(turn.token_ids)
    same, _ = update(config(adder_model, overlong="mask"), other_tokens)
    assert all(torch.equal(change[k], same[k]) for k in change)
    for trajectory in map(trajectory_of, other_rewards):
        if trajectory.stop_reason in CUT_OFF:
            trajectory.turns[-1].rewards["accuracy"] = -1.0
    moved, _ = update(config(adder_model, overlong="mask"), other_rewards)
    assert any(not torch.equal(change[k], moved[k]) for k in change)
    _, [plain] = update(config(adder_model), episodes)
    assert plain["tokens"] == everything
    assert plain["overlong/masked_frac"] == plain["overlong/masked_tokens_frac"] == 0.0


def test_a_long_trajectory_is_punished_by_a_component_of_its_own(adder_model):
    setup = config(adder_model, overlong="penalty", overlong_penalty=0.5, overlong_buffer=10)
    algorithm = setup.build_algo()
    step = algorithm._sample_step()
    lengths = set()
    for episode in step.episodes:
        trajectory = trajectory_of(episode)
        expected = -0.5 * min(1.0, max(0.0, (trajectory.num_tokens - 20) / 10))
        assert trajectory.turns[-1].rewards["overlong"] == pytest.approx(expected)
        assert episode.get_return() == pytest.approx(trajectory.reward)
        assert not any("overlong" in turn.rewards for turn in trajectory.turns[:-1])
        lengths.add(trajectory.num_tokens)
    assert min(lengths) < 20 and max(lengths) == 30 and len(lengths) > 4
    assert algorithm.train()["reward"]["overlong"] < 0
    algorithm.stop()


def test_signal_before_and_after_shaping():
    """Of three groups one is silent without the term, and one also with it.

    The silent one's correct member says so without an accuracy of 1, as a task may.
    """
    silent = group(
        member({"accuracy": 0.0, "shaping": 0.0}, correct=True),
        failed(shaping=0.2),
        failed(2, shaping=0.6),
    )
    plain = group(solved(shaping=0.0), failed(shaping=0.4), failed(shaping=0.0))
    plain.trajectories[2].turns[-1].rewards["accuracy"] = 0.5  # it keeps that, so it has no term
    hopeless = group(failed(shaping=0.0), failed(shaping=0.0))
    groups = [silent, plain, hopeless]
    rule = CreditRule("grpo_sum", 0.9, {})
    credit, unshaped = rule.credit(groups), rule.credit(groups, without="shaping")
    rows = credited_turns(groups, credit.advantages, unshaped.advantages, [True] * 8)
    found = finish_diagnostics(diagnostic_sums(rows))
    assert found["group/signal_frac"] == pytest.approx(2 / 3)
    assert found["group/signal_frac_unshaped"] == pytest.approx(1 / 3)
    assert found["shaping/mean"] == pytest.approx((0.2 + 0.6 + 0.4) / 3)
    assert found["shaping/variance"] == pytest.approx(0.04)


def test_diagnostics_line_up_with_members_without_turns_and_masked_ones():
    """Tokens say which turns are counted: 1 and 2 are trained, 4 is masked."""
    empty = Trajectory({}, stop_reason=StopReason.ENV_ERROR)
    one, two = failed(tokens=1), member({}, {"accuracy": 1.0}, correct=True, tokens=2)
    cut = member({"accuracy": 0.0}, reason=StopReason.MAX_TOKENS, tokens=4)
    groups = [group(empty, one, cut), group(two)]
    rule = CreditRule("gtpo", 0.9, {}, "keep", "mask")
    trained = [rule.trains(t) for g in groups for t in g.trajectories]
    assert trained == [False, True, False, True]
    advantages = torch.tensor([0.5, -3.0, 1.0, 2.0])
    rows = credited_turns(groups, advantages, advantages, trained)
    found = finish_diagnostics(diagnostic_sums(rows))
    assert found["advantage/abs_mean"] == pytest.approx(3.5 / 3)
    assert found["advantage/by_turn/0"] == pytest.approx(0.75)
    assert found["advantage/by_turn/1"] == pytest.approx(2.0)
    assert found["overlong/masked_frac"] == pytest.approx(1 / 3)
    assert found["overlong/masked_tokens_frac"] == pytest.approx(4 / 9)


@pytest.mark.parametrize(("kept", "dropped"), [(0, 4), (1, 3), (3, 1), (4, 0), (1, 9), (6, 2)])
def test_no_learner_is_left_without_a_group(kept, dropped):
    """And those that are trained on are spread as evenly as they can be."""
    groups = []
    for position in range(kept + dropped):
        members = [solved() if position < kept else failed(), failed()]
        for trajectory in members:
            trajectory.group_id = position
        groups.append(Group(position, {}, members))
    episodes = [
        SimpleNamespace(custom_data={"trajectory": t}) for g in groups for t in g.trajectories
    ]
    step = Step(episodes=episodes, groups=groups, kept=groups[:kept])
    shards = GTPO._shards(SimpleNamespace(config=SimpleNamespace(num_learners=4)), step)
    owned = [{trajectory_of(e).group_id for e in shard} for shard in shards]
    assert all(owned) and sorted(p for o in owned for p in o) == list(range(kept + dropped))
    trained = [len([p for p in o if p < kept]) for o in owned]
    assert max(trained) - min(trained) <= 1
    assert sum(map(len, shards)) == 2 * (kept + dropped)
