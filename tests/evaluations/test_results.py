"""Results of single tasks: by hand, as a file, and as other programs read it."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rllib_gtpo.errors import ConfigError
from rllib_gtpo.evaluations import Results
from rllib_gtpo.evaluations.results import METADATA, SCHEMA, prompt_text, summarise, task_rows
from rllib_gtpo.metrics import rollout_metrics
from rllib_gtpo.record.location import Location
from rllib_gtpo.types import (
    Group,
    StopReason,
    ToolCall,
    ToolError,
    ToolResult,
    Trajectory,
    Turn,
)

TASK = {"id": "seven", "answer": "7"}


def member(answer, *errors, tokens=3):
    """A rollout with a turn for each call's error (or None), and one that answers."""
    turns = [
        Turn(
            k,
            token_ids=[1] * tokens,
            calls=[ToolCall("add", error="no" if error is ToolError.INVALID else None)],
            results=[ToolResult("add", "", error)],
        )
        for k, error in enumerate(errors)
    ]
    turns.append(Turn(len(errors), token_ids=[1] * tokens, rewards={"accuracy": answer == "7"}))
    reason = StopReason.ANSWER if answer is not None else StopReason.MAX_TURNS
    return Trajectory(TASK, turns=turns, stop_reason=reason, answer=answer, correct=answer == "7")


GROUP = Group(
    4,
    TASK,
    [
        member("7", None),
        member("7", ToolError.RAISED, ToolError.INVALID),
        member("07"),
        member(None, ToolError.TIMEOUT, tokens=5),
    ],
)


@pytest.fixture
def results():
    rows = task_rows("test", [GROUP], {4: "3+4 \ud800"}, lambda a, b, task: int(a) == int(b))
    return Results({"source": "x", "splits": ["test"], "settings": {"temperature": 1.0}}, rows)


def test_a_row_by_hand(results):
    [row] = results.rows
    assert list(row) == SCHEMA.names
    assert (row["split"], row["position"], row["task_id"]) == ("test", 4, "seven")
    assert (row["prompt"], row["samples"], row["correct"], row["avg"]) == (
        "3+4 \\ud800",  # half of a pair, which UTF-8 does not have
        4,
        2,
        0.5,
    )
    assert row["pass_at_k"] == pytest.approx([1 / 2, 5 / 6, 1, 1])
    assert row["maj"] == pytest.approx(2 / 3)  # "7", "7" and "07" are one answer
    assert row["reward"] == 0.5
    assert row["turns"] == (2 + 3 + 1 + 2) / 4
    assert row["tokens"] == (6 + 9 + 3 + 10) / 4
    assert (row["tool_calls"], row["tool_errors"], row["invalid_turns"]) == (3, 2, 1)
    assert row["answers"] == ["7", "7", "07", None]
    assert row["solved"] == [True, True, False, False]
    assert row["stop_reasons"] == ["answer"] * 3 + ["max_turns"]


def test_the_summary_is_what_training_reports(results):
    numbers, training = summarise(results.rows), rollout_metrics([GROUP])
    for name in ("turn/per_trajectory", "tool/error_rate", "tool/invalid_rate", "stop/answer"):
        assert numbers[name] == pytest.approx(training[name])
    assert numbers["avg@4"] == training["accuracy"]
    assert numbers["stop/max_turns"] == 0.25
    assert numbers["pass@2"] == pytest.approx(5 / 6)


def test_a_file_and_back(results, tmp_path):
    address = results.write(Location.of(tmp_path / "new"), "name")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["name.parquet"]
    again = Results.read(address)
    assert again.rows == results.rows
    assert {**again.about, **results.about} == again.about and again.about["package"]


def test_datasets_reads_it(results, tmp_path):
    import datasets

    address = results.write(Location.of(tmp_path), "name")
    rows = datasets.load_dataset(
        "parquet", data_files=address, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert rows[0]["answers"] == ["7", "7", "07", None]
    assert rows.column_names == SCHEMA.names


def test_a_prompt_is_what_the_policy_is_told():
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "first"},
        {"role": "user", "content": [{"type": "text", "text": "second"}]},
    ]
    assert prompt_text(messages) == 'first\n[{"type": "text", "text": "second"}]'


def test_files_that_are_none(results, tmp_path):
    address = results.write(Location.of(tmp_path), "name")
    table = pq.read_table(address)
    about = json.loads(table.schema.metadata[METADATA])
    bad = {
        "text": (lambda path: path.write_text("a,b\n1,2\n"), "is no file of results"),
        "other": (lambda path: pq.write_table(pa.table({"a": [1]}), path), "is no file of results"),
        "half": (
            lambda path: path.write_bytes((tmp_path / "name.parquet").read_bytes()[:-20]),
            "is no file of results",
        ),
        "older": (
            lambda path: pq.write_table(
                table.replace_schema_metadata({METADATA: json.dumps({**about, "version": 0})}), path
            ),
            "other columns: evaluate again",
        ),
        "empty": (lambda path: pq.write_table(table.slice(0, 0), path), "has no rows"),
    }
    for name, (make, message) in bad.items():
        path = tmp_path / f"{name}.parquet"
        make(path)
        with pytest.raises(ConfigError, match=message):
            Results.read(path)
