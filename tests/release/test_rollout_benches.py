"""The benches of rollouts measure what they say, and the docs show the recorded figures."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from pathlib import Path

import pytest

from release.results import renewed
from release.rollouts import latency, scale
from release.rollouts.setup import ScriptedEngine, Sum, bench_config, runner_of

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "release" / "results"


@pytest.fixture
def runner():
    config = bench_config(max_concurrency=64)
    config.make_engine = lambda codec, module: ScriptedEngine(codec, scale.TURNS)
    made = runner_of(config)
    yield made
    made.stop()


def test_a_small_scale_run(runner):
    figures = scale.roll_out(runner, 320)
    assert figures["in_flight_peak"] == 64
    assert figures["tasks_left"] == figures["environments_left"] == 0
    assert 0 < figures["overhead_ms"] < figures["turn_ms"]


def test_kept_episodes_show_in_the_memory():
    """In a process of its own: one that has freed much before does not grow."""
    code = """
from release.rollouts import scale
from release.rollouts.setup import ScriptedEngine, bench_config, runner_of

config = bench_config(max_concurrency=64)
config.make_engine = lambda codec, module: ScriptedEngine(codec, scale.TURNS)
runner = runner_of(config)
scale.roll_out(runner, 800)
print([scale.roll_out(runner, 2400, keep=keep)["mb_per_1000"] for keep in (False, True)])
runner.stop()
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "envs")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    let_go, kept = json.loads(done.stdout.splitlines()[-1])
    assert kept > let_go + 3.0, (kept, let_go)


def test_lock_step_waits_for_the_slowest_and_the_runner_does_not(runner, monkeypatch):
    """Each of the five turns has a slow call in some trajectory, but no trajectory has two."""

    def one_slow(name, call):
        return 0.3 if int(name.split("-")[1].split("/")[0]) % 4 == call - 1 else 0.0

    monkeypatch.setattr(Sum, "latency", staticmethod(one_slow))
    monkeypatch.setattr(latency, "IN_FLIGHT", 64)
    select = selectors.DefaultSelector.select
    monkeypatch.setattr(selectors.DefaultSelector, "select", select)  # undone at the end
    latency.Clock.watch()
    assert latency.lock_step(runner, 1)["seconds"] > 4 * 0.3
    assert latency.free(runner, 64)["seconds"] < 3 * 0.3


def test_one_call_in_a_hundred_is_slow_and_always_the_same_ones():
    names = [f"train-{i}/{m}" for i in range(1000) for m in range(4)]
    slow = [n for n in names if latency.long_tail(n, 1) == latency.SLOW_S]
    assert 0.005 < len(slow) / len(names) < 0.015
    assert slow == [n for n in names if latency.long_tail(n, 1) == latency.SLOW_S]
    assert slow != [n for n in names if latency.long_tail(n, 2) == latency.SLOW_S]


@pytest.mark.parametrize(
    ("name", "file", "bench"),
    [
        ("rollouts at scale", "rollouts_scale.json", scale),
        ("rollouts with slow tools", "rollouts_latency.json", latency),
    ],
)
def test_the_docs_show_the_recorded_figures(name, file, bench):
    recorded = json.loads((RESULTS / file).read_text())
    docs = (ROOT / "docs" / "rollouts.md").read_text()
    assert renewed(docs, {name: bench.table(recorded["metrics"])}) == docs
    assert recorded["passed"]
