"""The bench of vLLM runs, on a small scale."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_rollouts_and_the_bare_engine_sample_the_same_tokens(tmp_path):
    script, file = str(ROOT / "release" / "rollouts" / "bench_vllm.py"), tmp_path / "result.json"
    small = ["--cold-start=20", "--groups=1", "--repetitions=1", "--tools=function"]
    done = subprocess.run(
        [sys.executable, script, *small, f"--json={file}"],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode in (0, 1), done.stderr  # how fast so few are says nothing
    (row,) = json.loads(file.read_text())["metrics"]
    assert row["sampled_tokens"] > row["requests"] > 0
    assert row["ratio_function"] == row["ratio"] > 0
