"""The learner's bench: its sides compute the same, it measures what it says, and the docs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from release.learner import bench, heads, lengths
from release.learner.batches import SIZES, log_normal_lengths, ragged_groups, trajectories_of
from release.learner.updates import Learner, Parts, Plain, make_model
from release.results import renewed

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "release" / "results" / "learner.json"
SETTINGS = SIZES["tiny"]


@pytest.fixture(scope="module")
def groups():
    return ragged_groups(log_normal_lengths(8, seed=3), bench.VOCABULARY)


def test_trajectories_have_their_lengths(groups):
    wanted = log_normal_lengths(8, seed=3)
    assert min(wanted) >= 50
    assert max(wanted) <= 2000
    assert [t.num_tokens for t in trajectories_of(groups)] == wanted
    assert all(turn.token_ids for t in trajectories_of(groups) for turn in t.turns)


def test_all_sides_make_the_same_weights(groups):
    ours = Learner(SETTINGS, groups, 1500)
    model = (SETTINGS, "cpu", "float32", False)
    sides = [ours, Plain(make_model(*model), groups, 4096), Parts(make_model(*model), groups, 700)]
    before = {k: v.clone() for k, v in sides[1].model.state_dict().items()}
    for _ in range(2):
        norms = [side.update() for side in sides]
        assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)
    change = max((v - before[k]).abs().max() for k, v in sides[1].model.state_dict().items())
    assert change > 1e-6
    for side in sides[1:]:
        for name, value in side.model.state_dict().items():
            difference = (value - ours.model.state_dict()[name]).abs().max()
            assert difference < 0.05 * change, name


def test_the_ways_to_log_probabilities_agree():
    sizes = (2048, 20_000, 32)
    ours, full = (heads.measured(way, *sizes) for way in ("ours", "full"))
    assert ours["gradients"] == pytest.approx(full["gradients"], rel=1e-4)
    logits = 4 * sizes[0] * sizes[1]
    assert full["peak_bytes"] > logits
    assert ours["peak_bytes"] < 0.3 * logits


def test_lengths_run_where_ray_is_absent():
    code = """
import sys
sys.modules["ray"] = None
from release.learner import lengths
small = lengths.Scale(*("tiny", lengths.SIZES["tiny"], "float32", True), *((64,), 256, 128, 64))
lengths.SCALES["cpu"] = small
print([(r["runs"], r["tokens"], r["of_matrix_peak"] > 0) for r in lengths.rows("cpu", 1)])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "envs")])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[('Plain', 256, True), ('Parts', 256, True)]"


def test_operations_by_hand(groups):
    model = make_model(SETTINGS, "cpu", "float32", False)
    trajectories = trajectories_of(groups)
    layer = 128 * (128 + 64 + 64) + 128 + 64 + 64 + 128 * 128 + 3 * 128 * 256 + 2 * 128
    body, head = 2 * layer + 128, model.config.vocab_size * 128
    tokens = sum(t.num_tokens for t in trajectories)
    trained = sum(t.num_trained_tokens for t in trajectories)
    attention = 2 * 128 * sum(t.num_tokens**2 for t in trajectories)
    assert lengths.operations(model, groups) == 6 * (body * tokens + head * trained + attention)


def test_the_bench_runs(tmp_path):
    file = tmp_path / "result.json"
    options = ["--trajectories", "8", "--rounds", "1", "--sizes", "tiny"]
    bench.main([*options, "--parts", "updates", "--json", str(file)])
    (row,) = json.loads(file.read_text())["metrics"]
    assert row["waste"] == 0.0
    assert row["trl_positions"] > row["tokens"] > 0
    assert row["of_plain"] == pytest.approx(row["ours_per_s"] / row["plain_per_s"])
    assert row["times_trl"] == pytest.approx(row["ours_per_s"] / row["trl_per_s"])


def test_a_way_that_is_not_installed_has_no_row(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    figures = {"peak_bytes": 2.0, "seconds": 1.0, "gradients": 1.0}
    monkeypatch.setattr(heads, "measured", lambda *args: figures)
    rows = bench.head_rows(("ours", "full", "liger"), (8, 4, 2))
    assert [row["way"] for row in rows] == ["ours", "full"]
    assert rows[0]["of_allowed"] == pytest.approx(2 / (4 * (2 * 8 * 2 + 4 * 2 + 2 * 1024 * 4)))
    assert rows[0]["of_full"] == 1.0


def test_the_docs_show_what_was_recorded():
    docs = (ROOT / "docs" / "speed.md").read_text()
    recorded = json.loads(RECORDED.read_text())
    assert renewed(docs, bench.tables(recorded["metrics"])) == docs
    assert recorded["passed"]
    rows = recorded["metrics"]
    assert {row["model"] for row in rows if "of_plain" in row} == set(bench.RUNS)
    measured = {row["way"]: row for row in rows if "way" in row}
    assert set(measured) == {"ours", "full", "liger"}
    assert {(r["tokens"], r["vocabulary"]) for r in measured.values()} == {bench.HEADS[:2]}
