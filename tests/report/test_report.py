"""What is read, left out and said: everything but the browser."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from rllib_gtpo import record
from rllib_gtpo.cli import main
from rllib_gtpo.connectors.learner import credit_of
from rllib_gtpo.errors import ConfigError, DataError
from rllib_gtpo.record.schema import METADATA, VERSION
from rllib_gtpo.report import build_report, groups, print_report
from rllib_gtpo.report.comparison import compare_estimators
from rllib_gtpo.report.curves import learning_curves
from tests.record.samples import write_record

ENV = {**os.environ, "PYTHONIOENCODING": "", "COLUMNS": "100"}


def embedded(path, name):
    """The data of a page, as its script reads them."""
    data = re.search(rb'id="%s">([^<]*)<' % name.encode(), path.read_bytes())[1]
    return json.loads(gzip.decompress(base64.b64decode(data)))


def make_run(path, **written):
    """A run directory with a checkpoint of its first iteration."""
    path.mkdir(exist_ok=True)
    write_record(path, **{"iterations": 2, "groups": 2, "members": 3, **written})
    (path / "run.json").write_text(json.dumps({"algorithm": "GTPO", "from": "another version"}))
    rows = [{"training_iteration": i, "accuracy": i / 10, "reward": {"a": 1.0}} for i in (1, 2)]
    (path / "result.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "checkpoint_000001").mkdir()
    (path / "checkpoint_000001" / "progress.json").write_text('{"training_iteration": 1}')
    return path


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def terminal(run, *, code=0, encoding="utf-8", **variables):
    """What `rllib report --terminal` prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "rllib_gtpo.cli", "report", "--terminal", str(run)],
        capture_output=True,
        env={**ENV, "PYTHONIOENCODING": encoding, **variables},
    )
    assert done.returncode == code, done.stderr
    return done.stdout.decode(encoding)


def test_every_number_is_the_records(run):
    build_report(str(run))
    rows = {
        (r["iteration"], r["group_id"], r["member"]): r
        for file in record.record_files(run)
        for r in file.read().to_pylist()
    }
    overview = embedded(run / "report.html", "overview")
    assert len(overview["groups"]) == 4
    chunk = embedded(run / "report.html", "chunk-0")
    seen = 0
    for line in overview["groups"]:
        group = chunk[line["place"]]
        assert (group["iteration"], group["id"]) == (line["iteration"], line["id"])
        for t in group["trajectories"]:
            row = rows[group["iteration"], group["id"], t["member"]]
            assert t["tokens"]["ids"] == row["token_ids"]
            assert t["tokens"]["clipped"] == row["clipped"]
            for turn, recorded in zip(t["turns"], row["turns"], strict=True):
                for name in ("reward", "return", "baseline", "scale", "advantage"):
                    assert turn[name] == recorded[name]
                assert turn["others"]["gtpo"] == recorded["advantage"]
                seen += 1
    assert seen == 36


def test_other_estimators_are_computed_as_training_would(run):
    """gigpo, too, which needs the tokens of prompts."""
    file = record.record_files(run)[0]
    step = record.groups_of_rows(file.read().to_pylist())
    assert all(turn.prompt_ids for g in step for t in g.trajectories for turn in t.turns)
    found = compare_estimators(step, file.about)
    assert {"gtpo", "grpo", "rloo", "reinforce_pp", "mt_grpo", "gigpo"} <= set(found)
    for name, values in found.items():
        expected = credit_of(step, name, 0.9, {}).advantages
        assert torch.equal(torch.tensor(values, dtype=torch.float64), expected)


def test_a_checkpoint_shows_what_came_before_it(run, capsys):
    assert main(["report", str(run / "checkpoint_000001")]) == 0
    assert "(0.0 MB, 6 trajectories in 2 groups)" in capsys.readouterr().out
    overview = embedded(run / "report.html", "overview")
    assert {group["iteration"] for group in overview["groups"]} == {1}
    assert [len(curve["points"]) for curve in overview["curves"]] == [1, 1, 1]
    assert overview["name"] == "run at checkpoint_000001"


def test_out_and_its_errors(run, tmp_path, capsys):
    assert main(["report", str(run), "--out", str(tmp_path / "x.html")]) == 0
    assert (tmp_path / "x.html").is_file() and not (run / "report.html").exists()
    assert main(["report", str(run), "--out", str(tmp_path / "no" / "x.html")]) == 2
    assert "x.html cannot be written" in capsys.readouterr().err
    assert main(["report", str(run), "--out", "x", "--terminal"]) == 2
    assert "leave out --terminal, or --out" in capsys.readouterr().err


def test_a_report_that_fails_leaves_no_file(run, monkeypatch):
    monkeypatch.setattr("rllib_gtpo.report.command.summary", lambda group: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_report(str(run))
    assert not [path for path in run.iterdir() if "report" in path.name]


@pytest.mark.parametrize("arguments", [[], ["--terminal"]])
def test_an_empty_run(tmp_path, capsys, arguments):
    (tmp_path / "run.json").write_text("{}")
    assert main(["report", str(tmp_path), *arguments]) == 2
    assert "has nothing to report yet: no iteration has finished" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_what_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match="no such directory"):
        build_report(str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match=r"is not a run: it has no run\.json"):
        build_report(str(tmp_path))
    (tmp_path / "checkpoint_000002").mkdir()
    with pytest.raises(ConfigError, match="is not a complete checkpoint of a run"):
        build_report(str(tmp_path / "checkpoint_000002"))
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"run\.json is damaged"):
        build_report(str(tmp_path))


def test_a_sweep_names_a_trial(tmp_path):
    (tmp_path / "run.json").write_text('{"kind": "sweep"}')
    with pytest.raises(ConfigError, match="is a sweep: name one of its trials, of which none"):
        build_report(str(tmp_path))
    trial = tmp_path / "tune" / "trial_0"
    trial.mkdir(parents=True)
    (trial / "result.json").write_text('{"training_iteration": 1, "accuracy": 1.0}')
    with pytest.raises(ConfigError, match=r"such as .*trial_0"):
        build_report(str(tmp_path))
    assert "0 trajectories" in build_report(str(trial))


def test_another_version_and_half_written_files_are_told(run):
    first, second = sorted((run / "record").iterdir())
    about = {"version": VERSION + 1, "iteration": 1}
    table = pq.read_table(first)
    pq.write_table(table.replace_schema_metadata({METADATA: json.dumps(about).encode()}), first)
    second.write_bytes(second.read_bytes()[:200])
    build_report(str(run))
    notes = embedded(run / "report.html", "overview")["notes"]
    assert f"version {VERSION + 1} of the record" in notes[0] and "half-written" in notes[1]
    assert "no rollout record" in notes[2]
    assert "half-written" in terminal(run)


def test_nothing_but_a_record_of_another_version(tmp_path):
    write_record(tmp_path)
    (file,) = (tmp_path / "record").iterdir()
    table = pq.read_table(file)
    header = {METADATA: json.dumps({"version": 99}).encode()}
    pq.write_table(table.replace_schema_metadata(header), file)
    with pytest.raises(DataError, match=r"nothing to report yet.*\n.*version 99 of the record"):
        build_report(str(tmp_path))


def test_large_reports_are_cut_and_say_so(run, monkeypatch):
    monkeypatch.setattr(groups, "TRAJECTORY_LIMIT", 6)
    monkeypatch.setattr(groups, "TOKEN_LIMIT", 200)
    monkeypatch.setattr(groups, "TEXT_LIMIT", 5)
    build_report(str(run))
    overview = embedded(run / "report.html", "overview")
    assert [group["iteration"] for group in overview["groups"]] == [1, 2]
    assert overview["notes"] == [
        "6 of 12 recorded trajectories are shown: whole groups, drawn evenly over the iterations.",
        "Token views are in the report for 3 of the 6 trajectories; the record has them for all.",
    ]
    chunk = embedded(run / "report.html", "chunk-0")
    assert "characters more in the record" in chunk[0]["trajectories"][0]["turns"][0]["text"]


def test_intervals():
    """Of 4 sampled groups two are recorded, with accuracies 0 and 1: their deviation is 0.707."""
    results = [{"training_iteration": 1, "accuracy": 0.6}, {"training_iteration": 2, "accuracy": 1}]
    (curve,) = learning_curves(results, {1: (4, [{"accuracy": 0.0}, {"accuracy": 1.0}])})
    half = 1.96 * 0.5**0.5 / 2
    assert curve["points"] == [
        [1, 0.6, pytest.approx(0.6 - half), pytest.approx(0.6 + half)],
        [2, 1, None, None],
    ]
    held_out = {"accuracy": 0.5, "avg@2": 0.5, "avg@2_low": 0.4, "avg@2_high": 0.6}
    row = {"training_iteration": 3, **{f"evaluation/{name}": v for name, v in held_out.items()}}
    assert learning_curves([row], {})[0]["points"] == [[3, 0.5, 0.4, 0.6]]
    assert learning_curves([{"training_iteration": 1, "accuracy": float("nan")}], {}) == []


def test_the_page_asks_for_nothing(run):
    build_report(str(run))
    page = re.sub(
        rb'<script type="application/gzip\+json".*?</script>',
        b"",
        (run / "report.html").read_bytes(),
    )
    assert not re.findall(rb"(?:src|href)=\"(?!data:|#)", page)
    addresses = set(re.findall(rb"https?://[^\s\"']+", page))
    assert addresses == {b"http://www.w3.org/2000/svg"}  # a name, not an address
    assert b"innerHTML" not in page.replace(b"no innerHTML", b"") and b"eval(" not in page


def test_terminal_without_colour_and_with_control_characters(tmp_path):
    run = make_run(tmp_path / "run\x1b[31m")
    for variables in ({"TERM": "dumb"}, {"FORCE_COLOR": "1", "TERM": "xterm"}):
        text = terminal(run, **variables)
        assert "\\x1b[31m" in text and "Groups with most signal" in text
        assert ("\x1b[" in text) == ("FORCE_COLOR" in variables)
        assert "\x1b[31m\\" not in text


def test_a_terminal_that_knows_ascii_only(run):
    text = terminal(run, encoding="ascii")
    assert "Curves" in text and text.isascii()


def test_a_closed_pipe(run):
    command = f"{sys.executable} -m rllib_gtpo.cli report --terminal {run} | true"
    command += "; echo ${PIPESTATUS[0]}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=ENV)
    assert done.stdout == "141\n" and "Traceback" not in done.stderr


def test_print_report_in_this_process(run, capsys):
    print_report(str(run))
    text = capsys.readouterr().out
    assert "Accuracy in training" in text and "advantage of each turn" in text


def test_assets_are_in_the_package():
    assets = Path(groups.__file__).parent / "assets"
    assert {path.name for path in assets.iterdir()} == {
        "head.html",
        "report.css",
        "report.js",
        "sweep.css",
    }


def test_the_page_shows_pictures_that_exist():
    docs = Path(__file__).parents[2] / "docs"
    images = re.findall(r"!\[[^]]+\]\(([^)]+)\)", (docs / "report.md").read_text())
    assert len(images) == 3 and all((docs / image).is_file() for image in images)
