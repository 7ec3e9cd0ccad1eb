"""Dropped groups over iterations, checkpoints and several runners; progress of busy runners."""

from __future__ import annotations

import asyncio

import pytest

from rllib_gtpo.episodes import trajectory_of
from rllib_gtpo.progress import Progress
from rllib_gtpo.rollout_stats import Tally
from rllib_gtpo.shuffling import EndlessOrder
from tests.scripted import scripted_config
from tests.tasks import Adder

ORDER = EndlessOrder(40, 1)


class Slow(Adder):
    """The tasks `env_config["slow"]` take long; members of others end one after another."""

    seconds = 30.0

    async def astep(self, action):
        await asyncio.sleep(self.env_config["pause"] * self.trajectory.member)
        if self.trajectory.task["id"] in self.env_config["slow"]:
            await asyncio.sleep(self.seconds)
        return await super().astep(action)


def dropping(slow, oversample=0.25, pause=0.0):
    """Four groups a step and one more; the tasks at the positions `slow` are slow."""
    config = scripted_config(Slow, stragglers="drop", oversample=oversample)
    slow_tasks = [f"train-{ORDER[position]}" for position in slow]
    return config.environment(env_config={"slow": slow_tasks, "pause": pause})


@pytest.fixture
def build(ray_session):
    built = []

    def make(config):
        built.append(config.build_algo())
        return built[-1]

    yield make
    for algorithm in built:
        algorithm.stop()


def positions(step):
    return [g.id for g in step.groups]


def test_a_dropped_task_goes_first_in_the_next_iteration(build, monkeypatch):
    algorithm = build(dropping({1}))
    result = algorithm.train()
    assert result["straggler"]["dropped_groups"] == 1.0
    assert result["straggler"]["lost_tokens"] == 0.0  # its first turns were never taken
    assert result["stop"]["dropped"] == pytest.approx(4 / 20)
    assert result["group"]["kept"] == 4.0
    assert result["env_runners"]["num_episodes"] == 16
    assert algorithm.progress_made.owed_positions == [1]
    assert algorithm.progress_made.next_position == 5

    monkeypatch.setattr(Slow, "seconds", 0.3)
    step = algorithm._sample_step()
    assert positions(step)[0] == 1 and len(step.groups) == 4
    assert set(step.dropped) == set(range(5, 9)) - set(positions(step))
    assert algorithm.progress_made.owed_positions == sorted(step.dropped)
    assert algorithm.progress_made.next_position == 9


def test_a_resumed_run_still_owes_what_was_dropped(build, tmp_path, monkeypatch):
    first = build(dropping({0, 2}, oversample=0.5))
    first.train()
    assert first.progress_made.owed_positions == [0, 2]
    first.save_to_path(str(tmp_path / "checkpoint"))

    monkeypatch.setattr(Slow, "seconds", 0.0)
    second = build(dropping({0, 2}, oversample=0.5))
    second.restore_from_path(str(tmp_path / "checkpoint"))
    step = second._sample_step()
    assert positions(step)[:2] == [0, 2]
    assert second.progress_made.next_position == 9


def test_each_of_several_runners_drops_its_own_share_and_says_how_far_it_is(build, monkeypatch):
    monkeypatch.setattr("rllib_gtpo.remote_progress.EVERY_S", 0.05)
    shown = []
    monkeypatch.setattr(
        Progress, "reach", lambda self, done, note="": shown.append((done, note.split(",")[0]))
    )
    config = dropping({0, 1}, 0.5, pause=0.2).env_runners(num_env_runners=2)
    algorithm = build(config.reporting(progress=True))
    step = algorithm._sample_step()
    assert sorted(step.dropped) == [0, 1]
    assert positions(step) == [2, 3, 4, 5]
    assert [trajectory_of(e).group_id for e in step.episodes[::4]] == [2, 3, 4, 5]
    assert step.stats.in_flight_peak == 12
    assert any(0 < done < 16 for done, _ in shown)
    assert shown[-1] == (16, "4/4 groups")


def test_evaluation_drops_nothing(build, monkeypatch):
    monkeypatch.setattr(Slow, "seconds", 0.05)
    config = dropping({0}).evaluation(evaluation_interval=1, evaluation_duration=6)
    algorithm = build(config)
    assert algorithm.evaluate()["env_runners"]["num_episodes"] == 6


def test_tallies_of_busy_runners_are_added_up(ray_session, monkeypatch):
    import ray

    from rllib_gtpo import remote_progress

    monkeypatch.setattr(remote_progress, "EVERY_S", 0.02)

    @ray.remote(num_cpus=0)
    def work(report, groups):
        report(Tally(4 * groups, groups, 100))

    seen = []
    base = Tally(10, 2, 50)
    with remote_progress.remote_tallies(2, base, lambda t: seen.append(Tally() + t)) as reports:
        ray.get([work.remote(report, i + 1) for i, report in enumerate(reports)])
        for _ in range(200):
            if seen and seen[-1].groups == 5:
                break
            asyncio.run(asyncio.sleep(0.02))
    assert seen[-1] == Tally(22, 5, 250)
    with remote_progress.remote_tallies(2, base, None) as reports:
        assert reports == [None, None]
