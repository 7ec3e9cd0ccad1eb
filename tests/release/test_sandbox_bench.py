"""The sandbox's figures in the docs are the recorded ones."""

from __future__ import annotations

import json
from pathlib import Path

from release.results import renewed
from release.sandbox import bench

ROOT = Path(__file__).parents[2]


def test_the_docs_show_the_recorded_speed():
    recorded = json.loads((ROOT / "release" / "results" / "sandbox.json").read_text())
    docs = (ROOT / "docs" / "sandbox.md").read_text()
    assert renewed(docs, {"sandbox": bench.table(recorded["metrics"])}) == docs
    assert recorded["passed"]
