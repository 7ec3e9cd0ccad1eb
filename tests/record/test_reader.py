"""Records that are damaged, foreign, of another version or not there; and odd text."""

from __future__ import annotations

import json
import logging
import random
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rllib_gtpo import GTPOConfig, SFTConfig, record
from rllib_gtpo.errors import ConfigError, DataError
from rllib_gtpo.record.location import Location
from rllib_gtpo.record.schema import METADATA, SCHEMA, TURN, VERSION
from rllib_gtpo.record.settings import RecordSettings
from rllib_gtpo.record.table import build_table
from tests.record.samples import credited, make_group, write_record


@pytest.fixture
def run(tmp_path):
    """Two iterations of two groups of three."""
    write_record(tmp_path, iterations=2, groups=2, members=3)
    return tmp_path


def problems_of(run):
    problems = []
    files = record.record_files(run, problems)
    return [file.iteration for file in files], problems


def rewrite(path, metadata=None, **columns):
    table = pq.read_table(path)
    for name, column in columns.items():
        table = table.append_column(name, column)
    if metadata is not None:
        table = table.replace_schema_metadata(metadata)
    pq.write_table(table, path)


def test_a_run_or_its_record_can_be_named(run):
    assert len(record.load(run)) == len(record.load(run / "record")) == 12


def test_half_written_and_foreign_files_are_told_and_left_out(run, caplog):
    _, second = sorted((run / "record").iterdir())
    second.write_bytes(second.read_bytes()[:-100])
    (run / "record" / "notes.txt").write_text("not ours: of no concern")
    pq.write_table(pa.table({"a": [1]}), run / "record" / "iteration_000009.parquet")
    iterations, problems = problems_of(run)
    assert iterations == [1] and len(problems) == 2
    assert "iteration_000002.parquet is left out: it is damaged or half-written" in problems[0]
    assert "iteration_000009.parquet is left out: it is not a file of a record" in problems[1]
    with caplog.at_level(logging.WARNING):
        assert len(record.load(run)) == 6
    assert "half-written" in caplog.text


def test_another_version(run):
    first = min((run / "record").iterdir())
    about = {"version": VERSION + 1, "iteration": 1, "package": "9.1"}
    rewrite(first, {METADATA: json.dumps(about).encode()})
    iterations, (problem,) = problems_of(run)
    assert iterations == [2]
    assert f"version {VERSION + 1} of the record" in problem and "rllib-gtpo 9.1" in problem


def test_other_columns(run):
    rewrite(min((run / "record").iterdir()), more=pa.array([1] * 6))
    assert "other columns" in problems_of(run)[1][0]


def test_a_file_that_is_being_written_is_not_there_yet(run):
    (run / "record" / ".iteration_000003.parquet.tmp-1").write_bytes(b"PAR1")
    assert problems_of(run) == ([1, 2], [])


def test_nothing_to_read(tmp_path):
    with pytest.raises(DataError, match=r"has no record: train with reporting\(record="):
        record.load(tmp_path)
    with pytest.raises(ConfigError, match="no such directory"):
        record.load(tmp_path / "missing")


def test_a_column_that_does_not_exist(run):
    with pytest.raises(ConfigError, match="the record has iteration, split"):
        record.load(run, columns=["advantage"])


def test_a_damaged_pointer(tmp_path):
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(ConfigError, match=r"record\.json is damaged"):
        record.load(tmp_path)


def test_lone_surrogates_are_escaped(tmp_path):
    """A tool that decodes bytes as it likes may give text that no file can hold."""
    write_record(tmp_path, groups=1, members=1, output="bad \ud800 \x00 byte", text="\udcff")
    row = record.load(tmp_path)[0]
    assert row["turns"][0]["results"][0]["content"] == "bad \\ud800 \x00 byte"
    assert row["turns"][0]["text"] == "\\udcff"


def test_odd_values_of_a_task_are_text(tmp_path):
    """Of an environment that answers with a number, and has keys that JSON has not."""
    group = make_group(random.Random(0), 1, 2, 1, 4, "x", "y")
    group.task[(1, 2)] = group.task
    group.trajectories[0].answer = 14
    table = build_table(credited(random.Random(0), [group]), 1, str, {})
    assert table["answer"][0].as_py() == "14" and "(1, 2)" in table["task"][0].as_py()


def test_a_trajectory_without_turns(tmp_path):
    write_record(tmp_path, groups=1, members=2, turns=0)
    row = record.load(tmp_path)[1]
    assert row["turns"] == [] and row["token_ids"] == [] and not row["trained"]


def test_a_write_that_fails_leaves_nothing(tmp_path):
    table = pa.table({"a": np.arange(3)})
    location = Location.of(tmp_path / "missing")
    with pytest.raises(OSError):
        location.write(table, "x.parquet")
    location.make()
    location.write(table, "x.parquet")
    assert location.names() == ["x.parquet"] == [p.name for p in (tmp_path / "missing").iterdir()]


def test_the_schema_has_one_column_for_each_field():
    assert len(set(SCHEMA.names)) == len(SCHEMA.names) == 25


def test_the_page_names_every_column_and_its_code_runs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "record.md").read_text()
    named = set(re.findall(r"`(\w+)`", page))
    assert {*SCHEMA.names, *(field.name for field in TURN)} <= named
    write_record(tmp_path / "runs" / "calculator", iterations=2)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "record.md", "exec"), names)
    assert len(names["lost"]) and capsys.readouterr().out == "1 8 gtpo 2\n2 8 gtpo 2\n"


@pytest.mark.parametrize(
    ("setting", "share", "path"),
    [
        ("none", 0.0, None),
        (0, 0.0, None),
        (1, 1.0, None),
        ({"share": 0.5}, 0.5, None),
        ({"path": "s3://bucket/x"}, 0.25, "s3://bucket/x"),
    ],
)
def test_settings(setting, share, path):
    assert RecordSettings.of(setting) == RecordSettings(share, path)


def test_how_many_groups():
    counts = [RecordSettings(share).count(16) for share in (0.0, 0.001, 0.25, 1.0)]
    assert counts == [0, 1, 4, 16] and RecordSettings(0.5).count(0) == 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("all", "'none', the share of groups to record"),
        (1.5, "'none', the share of groups to record"),
        (True, "'none', the share of groups to record"),
        (None, "'none', the share of groups to record"),
        (float("nan"), "'none', the share of groups to record"),
        ({"pth": "x"}, "unknown 'pth'; did you mean 'path'"),
        ({"path": 3}, "path=3: a directory, or an address"),
        ({"path": "x", "share": 0}, "has no effect with share=0"),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(ConfigError, match=message):
        GTPOConfig().reporting(record=setting).validate()


def test_sft_has_nothing_to_record():
    with pytest.raises(ConfigError, match="record has no effect with SFT"):
        SFTConfig().reporting(record=0.5).validate()
