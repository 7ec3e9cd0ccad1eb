"""The script runs, and its row says what was recorded."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "release"))

import record_cost


@pytest.mark.slow
def test_it_measures_an_iteration(ray_session, tmp_path):
    file = tmp_path / "cost.json"
    record_cost.main(["--iterations", "1", "--cold-start", "2", "--json", str(file)])
    (row,) = json.loads(file.read_text())["metrics"]
    assert row["trajectories"] == 128 and row["file_kb"] > 10
    assert 0.0 < row["record_s"] < row["iteration_s"]
