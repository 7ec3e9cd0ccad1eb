"""The bench of vLLM runs, on a small scale."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from release.results import renewed
from release.rollouts.bench import table

ROOT = Path(__file__).parents[2]


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_rollouts_and_the_bare_engine_sample_the_same_tokens(tmp_path):
    script, file = str(ROOT / "release" / "rollouts" / "bench_vllm.py"), tmp_path / "result.json"
    small = ["--cold-start=20", "--groups=1", "--repetitions=1", "--sizes=tiny"]
    done = subprocess.run(
        [sys.executable, script, *small, f"--json={file}"],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode in (0, 1), done.stderr  # how fast so few are says nothing
    (row,) = json.loads(file.read_text())["metrics"]
    assert row["sampled_tokens"] > row["requests"] > 0
    assert row["ratio_tiny"] == row["ratio"] > 0


def test_the_docs_show_the_recorded_speed():
    recorded = json.loads((ROOT / "release" / "results" / "rollouts_vllm.json").read_text())
    docs = (ROOT / "docs" / "vllm.md").read_text()
    assert renewed(docs, {"rollouts_vllm": table(recorded["metrics"])}) == docs
    assert recorded["passed"]
