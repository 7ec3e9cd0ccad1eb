"""A run that is read, reported and exported while another process writes and prunes it."""

from __future__ import annotations

import csv
import json

import pytest

from rllib_gtpo import record
from rllib_gtpo.command.directory import RunDirectory
from rllib_gtpo.command.export import export
from rllib_gtpo.errors import ConfigError, DataError
from rllib_gtpo.report import build_report
from tests.integration.test_killed_runs import Fork, arguments

ITERATIONS = 30


@pytest.mark.slow
def test_a_reader_never_sees_anything_torn(adder_model, tmp_path):
    run, seen, exported = tmp_path / "run", [], 0
    command = arguments(tmp_path, adder_model, "--stop", f"training_iteration={ITERATIONS}")
    process = Fork(
        [*command, "--out", str(run), "--checkpoint-freq", "1", "--keep", "1"], tmp_path / "out"
    )
    while process.running():
        try:
            found = record.load(run, columns=["iteration"])["iteration"]
            build_report(str(run), tmp_path / "report.html")
            export(run, tmp_path / f"model-{exported}")
        except (ConfigError, DataError):
            assert not seen, "there was something before"
            continue
        exported += 1
        assert json.loads((run / "run.json").read_text())["status"] in ("running", "completed")
        *lines, _ = (run / "result.json").read_text().split("\n")
        iterations = [json.loads(line)["training_iteration"] for line in lines]
        assert iterations == list(range(1, len(lines) + 1))
        with (run / "progress.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert all(None not in row.values() for row in rows[:-1])
        assert max(found) <= len(lines) + 1
        seen.append(len(lines))
    assert process.wait() == 0, (tmp_path / "out").read_text()
    assert len(set(seen)) > 2 and seen == sorted(seen)
    *held, last = (c.iteration for c in RunDirectory.open(run)[0].checkpoints())
    assert last == ITERATIONS
    assert len(held) <= 1, "what the reader held at the last save"
