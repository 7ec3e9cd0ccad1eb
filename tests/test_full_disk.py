"""What happens on a disk without room: nothing is left in halves, and one line says so.

Checkpoints: test_run.py.
"""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest

from rllib_gtpo import record
from rllib_gtpo.cli import main
from rllib_gtpo.command.directory import RunDirectory, RunRecord
from rllib_gtpo.command.result_log import ResultLog
from rllib_gtpo.episodes import groups_of
from rllib_gtpo.record.location import Location
from rllib_gtpo.record.recorder import Recorder
from rllib_gtpo.record.settings import RecordSettings
from tests.disks import small_disk
from tests.record.samples import ABOUT, credited, make_group, write_record


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", 2) as disk:
        yield disk


def result(iteration):
    return {"training_iteration": iteration, "text": "x" * 5000, "accuracy": 0.5}


def test_results_wait_until_there_is_room(disk, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = ResultLog(disk.path)
    log.write_params({"lr": 1e-3})
    log.write(result(1))
    disk.fill(leave=8192)
    for iteration in (2, 3, 4):
        log.write(result(iteration))
    rows = (disk.path / "result.json").read_text().splitlines()
    assert 1 <= len(rows) < 4 and all(json.loads(row) for row in rows)
    assert capsys.readouterr().err.count("results are not being written: [Errno 28]") == 1
    disk.free()
    log.write(result(5))
    log.close()
    rows = [json.loads(row) for row in (disk.path / "result.json").read_text().splitlines()]
    assert [row["training_iteration"] for row in rows] == [1, 2, 3, 4, 5]
    with (disk.path / "progress.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["training_iteration"] for row in table] == ["1", "2", "3", "4", "5"]
    events = EventAccumulator(str(disk.path))
    events.Reload()
    assert {event.step for event in events.Scalars("accuracy")} == {1, 2, 3, 4, 5}
    assert not list(disk.path.glob("*.tmp"))


def test_the_settings_and_the_status_are_no_reason_to_stop(disk, capsys):
    run = RunDirectory.create(disk.path / "run", RunRecord("task.py", "0", "run", "GTPO"))
    log = ResultLog(run.path)
    disk.fill()
    log.write_params({"lr": 1e-3})
    assert "results are not being written" in capsys.readouterr().err
    with pytest.raises(OSError, match="No space"):
        run.write_record()
    assert json.loads((run.path / "run.json").read_text())["name"] == "run"
    assert not list(run.path.glob("*.tmp"))


def test_the_record_goes_on_and_counts_what_is_missing(disk, capsys):
    rng = random.Random(0)
    recorded = credited(rng, [make_group(rng, 7, 2, 2, 4, "text", "output")])
    episodes = [
        SimpleNamespace(custom_data={"trajectory": one.trajectory}, get_observations=lambda: [])
        for one in recorded
    ]
    step = SimpleNamespace(groups=groups_of(episodes), episodes=episodes)
    recorder = Recorder(RecordSettings(1.0), ABOUT, lambda: str)

    def iterate(number):
        credit = [[one.credit for one in recorded]]
        return recorder.record(Location.of(disk.path), step, number, lambda ids: credit)

    assert iterate(1)["record/unwritten"] == 0
    recorder.flush()
    disk.fill()
    for number in (2, 3):
        iterate(number)
    recorder.flush()
    assert capsys.readouterr().err.count("the record is not being written") == 1
    disk.free()
    assert iterate(4)["record/unwritten"] == 2
    recorder.close()
    assert [file.iteration for file in record.record_files(disk.path)] == [1, 4]
    assert len(list((disk.path / "record").iterdir())) == 2


def test_a_report_leaves_nothing_half_made(disk, tmp_path, capsys):
    write_record(tmp_path / "run", iterations=2)
    disk.fill(leave=4096)
    out = disk.path / "report.html"
    assert main(["report", str(tmp_path / "run"), "--out", str(out)]) == 2
    assert "cannot be written: [Errno 28] No space left" in capsys.readouterr().err
    assert [path.name for path in disk.path.iterdir()] == ["filler"]


STORE = """
import numpy as np, ray
from rllib_gtpo.command.failures import guarded

def fill():
    ray.init(num_cpus=1, object_store_memory=80 << 20, include_dashboard=False)
    kept = [ray.put(np.zeros(40 << 20, np.uint8)) for _ in range(6)]
    return 0

print("code", guarded(fill), flush=True)
"""


@pytest.mark.slow
def test_a_full_object_store_without_room_to_spill_is_told_with_what_helps():
    ended = subprocess.run(
        [sys.executable, "-c", STORE],
        capture_output=True,
        text=True,
        timeout=120,
        env={
            **os.environ,
            "RAY_ADDRESS": "",
            "RAY_local_fs_capacity_threshold": "0.0001",  # as if the disk were full
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
    )
    assert "code 1" in ended.stdout
    assert "Ray's object store is full, and so is the disk" in ended.stderr
    assert "Traceback" not in ended.stderr
