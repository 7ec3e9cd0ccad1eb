"""A task outside of the repository, by the page and nothing else: trained, and reported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tests.docs.pages import ROOT, blocks

PAGE = ROOT / "docs" / "bring_a_task.md"


@pytest.mark.slow
def test_the_task_of_the_page_trains_and_reports_from_elsewhere(tmp_path):
    listing, commands = (
        next(block.text for block in blocks(PAGE) if block.language == language)
        for language in ("python", "bash")
    )
    assert sum(bool(line.strip()) for line in listing.splitlines()) <= 40
    file, elsewhere = tmp_path / "task" / "shelves.py", tmp_path / "elsewhere"
    file.parent.mkdir()
    elsewhere.mkdir()
    file.write_text(listing)
    printed = ""
    for line in commands.splitlines():
        program, *rest = line.replace("shelves.py", str(file)).split()
        assert program == "rllib"
        command = [sys.executable, "-m", "rllib_gtpo.cli", *rest]
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "envs")]),
        }
        done = subprocess.run(
            command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stderr
        printed += done.stdout

    before, after = map(float, re.search(r"held-out accuracy (\S+) -> (\S+)", printed).groups())
    assert 0.3 <= before <= 0.8 and after >= before + 0.15, printed  # about 0.55 -> 0.88
    rows = [json.loads(line) for line in (elsewhere / "runs/shelves/result.json").open()]
    assert len(rows) == 20
    assert rows[0]["cold_start"]["best_validation_loss"] < 1.0
    assert "runs/shelves/report.html (" in printed
    assert "</html>" in (elsewhere / "runs/shelves/report.html").read_text()
