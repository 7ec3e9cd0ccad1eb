"""Scheduling of rollouts, over a scripted engine: what is open when, who waits for whom, and what
becomes of groups that are slow, broken or not needed."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from rllib_gtpo.aio import run_coroutine
from rllib_gtpo.env_runner import GroupJob
from rllib_gtpo.episodes import trajectory_of
from rllib_gtpo.errors import EngineError
from rllib_gtpo.metrics import staleness_metrics, straggler_metrics
from rllib_gtpo.rollout_stats import RolloutStats, Tally
from rllib_gtpo.sampling import choose_jobs, refuse_broken_environment
from rllib_gtpo.types import Group, StopReason, Trajectory, Turn
from tests.scripted import CALL, scripted_config, scripted_runner, two_calls
from tests.tasks import Adder


class Counted(Adder):
    """Counts the instances that are reset and not closed."""

    open = most = resets = 0

    def reset(self, **kwargs):
        Counted.open += 1
        Counted.resets += 1
        Counted.most = max(Counted.most, Counted.open)
        self.counted = True
        return super().reset(**kwargs)

    def close(self):
        if getattr(self, "counted", False):
            Counted.open -= 1
            self.counted = False


@pytest.fixture(autouse=True)
def fresh_counts():
    Counted.open = Counted.most = Counted.resets = 0


def jobs(count, members=4, slow=(), **settings):
    return [
        GroupJob(position, members, 0, must_finish=position in slow, **settings)
        for position in range(count)
    ]


def run(config, given, **kwargs):
    runner = scripted_runner(config)
    try:
        return runner, runner.sample_groups(given, **kwargs)
    finally:
        runner.stop()


def reasons(trajectories):
    return sorted(str(t.stop_reason) for t in trajectories)


class TestBackPressure:
    @pytest.mark.parametrize("deterministic", [False, True])
    def test_never_more_than_max_concurrency_are_open(self, deterministic):
        config = scripted_config(Counted, max_concurrency=5).scripted(delay=0.001)
        runner, out = run(config.debugging(deterministic=deterministic), jobs(6))
        assert Counted.resets == 24 and Counted.open == 0
        assert Counted.most == runner.engine.peak == out.stats.in_flight_peak == 5
        assert len(out.episodes) == 24

    def test_groups_are_handed_on_while_others_have_not_started(self):
        seen = []

        def take(episodes):
            trajectories = [trajectory_of(e) for e in episodes]
            seen.append((trajectories[0].group_id, Counted.resets))
            assert all(t.turns[-1].rewards["accuracy"] in (0.0, 1.0) for t in trajectories)

        config = scripted_config(Counted, max_concurrency=4)
        _, out = run(config, jobs(5), on_group=take)
        assert sorted(position for position, _ in seen) == [0, 1, 2, 3, 4]
        assert seen[0][1] < 20
        assert out.episodes == []

    def test_episodes_are_in_the_order_of_the_jobs(self):
        def script(position, member, turn):
            return CALL if turn < 3 - position else "5"  # the later groups end first

        ends = []
        config = scripted_config(Adder).scripted(script)
        _, out = run(config, jobs(3), on_progress=lambda tally: ends.append(tally.groups))
        found = [(t.group_id, t.member) for t in map(trajectory_of, out.episodes)]
        assert found == [(p, m) for p in range(3) for m in range(4)]
        assert ends[-1] == 3


class SlowTool(Adder):
    """The first two tasks' environments take long for the first turn of their last member."""

    seconds = 20.0
    slow = ("train-0", "train-1")

    async def astep(self, action):
        if self.trajectory.task["id"] in self.slow and self.trajectory.member == 3:
            await asyncio.sleep(self.seconds)
        return await super().astep(action)


def tasks_in_order(config):
    """The runner's position p is task p."""
    runner = scripted_runner(config)
    runner.tasks.order = range(10_000)
    return runner


class TestStragglers:
    def test_the_slowest_groups_are_dropped(self):
        runner = tasks_in_order(scripted_config(SlowTool))
        began = time.monotonic()
        out = runner.sample_groups(jobs(6), wanted=4)
        runner.stop()
        assert time.monotonic() - began < 10
        assert [trajectory_of(e).group_id for e in out.episodes[::4]] == [2, 3, 4, 5]
        assert set(out.dropped) == {0, 1}
        for members in out.dropped.values():
            assert reasons(members) == ["answer"] * 3 + ["dropped"]
        assert len(runner.engine.released) == 24
        found = straggler_metrics(out.dropped)
        call, answer = (len(runner.engine.ids(text)) for text in (CALL, "5"))
        # of each group three members with all turns, and the fourth's, which was never taken
        assert found == {
            "straggler/dropped_groups": 2.0,
            "straggler/lost_tokens": 2.0 * 3 * (2 * call + answer),
        }

    def test_those_that_must_finish_are_waited_for_in_place_of_others(self, monkeypatch):
        monkeypatch.setattr(SlowTool, "seconds", 0.5)
        runner = tasks_in_order(scripted_config(SlowTool))
        out = runner.sample_groups(jobs(6, slow=(0, 1)), wanted=4)
        runner.stop()
        finished = [trajectory_of(e).group_id for e in out.episodes[::4]]
        assert len(finished) == 4 and finished[:2] == [0, 1]
        assert len(out.dropped) == 2 and not {0, 1} & set(out.dropped)

    def test_a_group_that_cannot_be_rolled_out_is_made_up_for(self):
        """Of six groups one has no task; four are wanted, and one is left to drop."""
        config = scripted_config(SlowTool).environment(env_config={"count": 6})
        runner = tasks_in_order(config)
        runner.tasks.order = [0, 2, 3, 4, 5, 1]
        long = "x" * 5000
        original = SlowTool.prompt

        def prompt(self, task):
            return long if task["id"] == "train-3" else original(self, task)

        SlowTool.prompt = prompt
        try:
            out = runner.sample_groups(jobs(6), wanted=3)
        finally:
            SlowTool.prompt = original
            runner.stop()
        assert set(out.skipped) == {2} and set(out.dropped) == {0, 5}
        assert [trajectory_of(e).group_id for e in out.episodes[::4]] == [1, 3, 4]

    def test_waiting_for_all_drops_none(self, monkeypatch):
        monkeypatch.setattr(SlowTool, "seconds", 0.3)
        runner = tasks_in_order(scripted_config(SlowTool))
        out = runner.sample_groups(jobs(6), wanted=6)
        runner.stop()
        assert len(out.episodes) == 24 and not out.dropped
        assert 0.1 < out.stats.straggler_wait_s < 5

    def test_which_jobs_a_step_has(self):
        def job(position, must_finish):
            return position, must_finish

        new = [(7, False), (8, False), (9, False), (10, False), (11, False)]
        assert choose_jobs([], 7, 4, 0.25, job) == new
        owed = choose_jobs([2, 5], 7, 4, 0.25, job)
        assert owed == [(2, True), (5, True), *new[:3]]
        assert choose_jobs([1, 2, 3, 4, 5], 7, 4, 1.0, job) == [(p, True) for p in (1, 2, 3, 4)]
        assert choose_jobs([], 7, 3, 0.0, job) == new[:3]


class TestEngineErrors:
    @staticmethod
    def failing(times, match=lambda key: True):
        """Fails the first `times` requests of each key that matches."""
        count = {}

        def fail(request):
            count[request.key] = count.get(request.key, 0) + 1
            if match(request.key) and count[request.key] <= times:
                return EngineError("out of memory")
            return None

        return fail

    def test_a_request_is_sent_again(self, monkeypatch):
        monkeypatch.setattr("rllib_gtpo.rollout.ENGINE_PAUSE_S", 0.01)
        config = scripted_config(Adder).scripted(fail=self.failing(2))
        runner, out = run(config, jobs(2))
        assert out.stats.engine_retries == 2 * 8 * 3
        assert not out.discarded and len(out.episodes) == 8
        by_key = {}
        for key, ids in runner.engine.requests:
            by_key.setdefault(key, []).append(ids)
        assert all(len(sent) == 3 and sent[0] == sent[1] == sent[2] for sent in by_key.values())

    def test_a_member_that_the_engine_fails_is_rolled_out_again(self, monkeypatch):
        """Also where it fails most of a group, which is not the task's doing."""
        monkeypatch.setattr("rllib_gtpo.rollout.ENGINE_PAUSE_S", 0.0)
        first = self.failing(3, lambda key: len(key) == 6 and key[4] != 0 and key[-1] == 1)
        _, out = run(scripted_config(Adder).scripted(fail=first), jobs(2))
        assert len(out.episodes) == 8 and not out.incomplete
        assert reasons(out.discarded) == ["engine_error"] * 6
        assert out.discarded[0].error == "EngineError: out of memory"
        assert {len(t.turns) for t in out.discarded} == {1}
        members = [(t.group_id, t.member) for t in map(trajectory_of, out.episodes)]
        assert members == [(p, m) for p in range(2) for m in range(4)]

    def test_what_is_rolled_out_again_goes_before_what_has_not_started(self, monkeypatch):
        monkeypatch.setattr("rllib_gtpo.rollout.ENGINE_PAUSE_S", 0.0)
        first = self.failing(3, lambda key: len(key) == 6 and key[3:5] == (0, 0))
        config = scripted_config(Adder, max_concurrency=4).scripted(fail=first)
        runner, out = run(config, jobs(5))
        assert len(out.episodes) == 20
        keys = [key for key, _ in runner.engine.requests]
        again = next(i for i, key in enumerate(keys) if len(key) == 7)
        assert again < next(i for i, key in enumerate(keys) if key[3] == 4)

    def test_an_engine_that_stays_broken_is_told(self, monkeypatch):
        monkeypatch.setattr("rllib_gtpo.rollout.ENGINE_PAUSE_S", 0.0)
        config = scripted_config(Adder).scripted(fail=lambda request: EngineError("no GPU"))
        _, out = run(config, jobs(2))
        assert len(out.incomplete) == 2 and not out.episodes
        assert "ended in engine_error: EngineError: no GPU" in out.incomplete[0]
        with pytest.raises(EngineError, match="24 of 24 rollouts ended in an error of the engine"):
            refuse_broken_environment([], out.discarded)

    def test_a_request_that_cannot_be_served_ends_the_run(self):
        config = scripted_config(Counted, max_concurrency=3)
        config.scripted(fail=lambda request: ValueError("token_ids reach outside"), delay=0.01)
        with pytest.raises(ValueError, match="reach outside"):
            run(config, jobs(2))
        assert Counted.open == 0

    def test_an_engine_that_cancels_by_itself_has_failed(self, monkeypatch):
        monkeypatch.setattr("rllib_gtpo.rollout.ENGINE_PAUSE_S", 0.0)
        cancelled = self.failing(1)
        config = scripted_config(Adder).scripted(
            fail=lambda request: asyncio.CancelledError() if cancelled(request) else None
        )
        _, out = run(config, jobs(1))
        assert len(out.episodes) == 4 and out.stats.engine_retries == 12


class Judged(Adder):
    """The first member of each group waits for its reward long after the others have ended."""

    async def reward(self, trajectory, task):
        await asyncio.sleep(0.2 if trajectory.member == 0 else 0.0)
        return {"accuracy": 1.0, "judge": 1.0}


class Troubled(Adder):
    """One member of each group raises, one cancels itself, in its second turn."""

    async def astep(self, action):
        if self.trajectory.turns and self.trajectory.member == 1:
            raise ConnectionError("gone")
        if self.trajectory.turns and self.trajectory.member == 2:
            raise asyncio.CancelledError
        return await super().astep(action)


class TestOneTrajectoryAndTheOthers:
    def test_an_exception_touches_no_other(self):
        config = scripted_config(Troubled, group_size=8)
        config.in_evaluation = True  # where broken ones are kept
        _, out = run(config, jobs(2, members=8, split="train"))
        trajectories = [trajectory_of(e) for e in out.episodes]
        assert reasons(trajectories) == ["answer"] * 12 + ["env_error"] * 4
        assert {t.error for t in trajectories if t.broken} == {
            "ConnectionError: gone",
            "EngineError: the environment cancelled its step",
        }
        for episode, trajectory in zip(out.episodes, trajectories, strict=True):
            assert len(episode) == len(trajectory.turns)

    def test_a_group_is_complete_when_the_last_reward_is_there(self):
        _, out = run(scripted_config(Judged), jobs(3))
        trajectories = [trajectory_of(e) for e in out.episodes]
        assert len(trajectories) == 12
        assert all(t.correct and t.turns[-1].rewards["judge"] == 1.0 for t in trajectories)
        assert [e.get_return() for e in out.episodes] == [t.reward for t in trajectories]

    def test_a_text_that_cannot_be_made_a_turn_ends_only_its_trajectory(self):
        """Of eight second turns the first and the fifth fail, and again the first that follows."""
        runner = scripted_runner(scripted_config(Adder))
        to_env, calls = runner.to_env, []

        def broken(episode, batch):
            if len(episode) == 1:
                calls.append(episode)
                if len(calls) % 4 == 1:
                    raise UnicodeError("no such text")
            return to_env(episode, batch)

        runner.to_env = broken
        out = runner.sample_groups(jobs(2))
        runner.stop()
        assert [t.error for t in out.discarded] == ["UnicodeError: no such text"] * 3
        assert reasons(out.discarded) == ["env_error"] * 3
        assert all(len(t.turns) == 1 for t in out.discarded)
        assert reasons(map(trajectory_of, out.episodes)) == ["answer"] * 8

    def test_a_context_that_overflows_in_a_turn(self):
        """The first turn fits, the second is cut off by the context, not by max_turn_tokens."""
        runner = scripted_runner(scripted_config(Adder, max_turn_tokens=64))
        runner.sample_groups(jobs(1))
        second = next(ids for key, ids in runner.engine.requests if key[-1] == 1)
        runner.engine.max_context = len(second) + 3
        out = runner.sample_groups(jobs(1))
        runner.stop()
        trajectories = [trajectory_of(e) for e in out.episodes]
        assert reasons(trajectories) == ["max_tokens"] * 4
        assert {t.num_tokens for t in trajectories} == {runner.engine.max_context}
        for trajectory in trajectories:
            assert [turn.finish for turn in trajectory.turns] == ["stop", "length"]
            assert trajectory.answer is None and not trajectory.correct
            assert trajectory.turns[-1].rewards["accuracy"] == 0.0


class TestNothingIsLeft:
    def test_no_task_and_no_thread(self, monkeypatch):
        left = []

        def watched(coroutine):
            async def main():
                await coroutine
                left.append(len(asyncio.all_tasks() - {asyncio.current_task()}))

            return run_coroutine(main())

        monkeypatch.setattr("rllib_gtpo.group_rollout.run_coroutine", watched)
        runner = tasks_in_order(scripted_config(SlowTool))
        runner.sample_groups(jobs(6), wanted=4)
        runner.stop()
        assert left == [0]
        names = [thread.name for thread in threading.enumerate()]
        assert not [name for name in names if name.startswith(("shaping", "asyncio"))]

    def test_an_error_in_the_middle_closes_everything(self):
        class Failing(Counted):
            def group_reward(self, group):
                raise ZeroDivisionError

        config = scripted_config(Failing, max_concurrency=5)
        with pytest.raises(ZeroDivisionError):
            run(config, jobs(4))
        assert Counted.resets >= 5 and Counted.open == 0


class TestFigures:
    def test_of_a_call(self):
        seen = []
        _, out = run(
            scripted_config(Adder),
            jobs(2),
            on_progress=lambda tally: seen.append(Tally() + tally),
        )
        assert [t.trajectories for t in seen if not t.groups][:3] == [1, 2, 3]
        tokens = sum(trajectory_of(e).num_trained_tokens for e in out.episodes)
        assert seen[-1] == Tally(8, 2, tokens)
        assert out.stats.turns == 24
        found = out.stats.metrics()
        assert found["rollout/in_flight_peak"] == 8
        assert 0 < found["rollout/overhead_per_turn_ms"] < 50
        assert found["rollout/engine_retries"] == 0

    def test_the_wait_for_the_last_tenth(self, monkeypatch):
        clock = iter([*range(1, 10), 30.0])
        monkeypatch.setattr("rllib_gtpo.rollout_stats.time.monotonic", lambda: next(clock))
        stats = RolloutStats()
        for _ in range(10):
            stats.trajectory_ended(Trajectory({}, turns=[Turn(0), Turn(1)]))
        stats.finish()
        assert stats.straggler_wait_s == 21.0 and stats.turns == 20
        stats.add(RolloutStats(in_flight_peak=7, straggler_wait_s=3.0, turns=5, overhead_s=0.05))
        assert (stats.in_flight_peak, stats.straggler_wait_s, stats.turns) == (7, 21.0, 25)
        assert stats.metrics()["rollout/overhead_per_turn_ms"] == pytest.approx(2.0)

    def test_staleness_by_hand(self):
        """Turns of versions 3, 4 and 4 (the last one ending with 5), the newest weights being 6."""
        turns = [Turn(0, weights_version=3), Turn(1, weights_version=4, last_version=5)]
        spanning = Trajectory({}, turns=turns)
        other = Trajectory({}, turns=[Turn(0, weights_version=4)])
        none = Trajectory({}, stop_reason=StopReason.ENV_ERROR)
        groups = [Group(0, {}, [spanning, other, none])]
        assert staleness_metrics(groups, 6) == {
            "weights/staleness_mean": pytest.approx((3 + 2 + 2) / 3),
            "weights/staleness_max": 3.0,
            "weights/spanning_frac": 0.5,
        }
        assert staleness_metrics(groups, 0)["weights/staleness_max"] == 2.0
        assert set(staleness_metrics([], 6).values()) == {0.0}

    def test_completions_carry_the_version_and_the_call_its_own(self):
        runner = scripted_runner(scripted_config(Adder).scripted(two_calls))
        runner._weights_seq_no = 4
        runner.engine.weights_updated(3)
        out = runner.sample_groups(jobs(1))
        runner.stop()
        assert {t.weights_version for e in out.episodes for t in trajectory_of(e).turns} == {3}
        assert out.weights_version == 4
