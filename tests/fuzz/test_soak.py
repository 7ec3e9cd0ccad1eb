"""The soak finds what is planted, makes it small, and keeps it once."""

import json
import re
import sys
from pathlib import Path

import hypothesis.strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "release"))

import fuzz

from tests.fuzz.targets import Target, bounded


def test_a_planted_bug_is_found_and_kept_once(tmp_path, monkeypatch, capsys):
    def check(text: str) -> None:
        assert "x" not in text, "an x"

    monkeypatch.setattr(fuzz, "CORPUS", tmp_path)
    soak = fuzz.Soak("calls", Target(st.text("abx"), check))
    soak.turn(1, 0)
    soak.turn(2, 0)
    (path,) = tmp_path.iterdir()
    found = {"target": "calls", "case": "x", "found": "AssertionError: an x"}
    assert json.loads(path.read_text()) == found
    assert soak.cases > 0 and "FOUND by calls" in capsys.readouterr().out


def test_a_failure_ends_with_exit_code_one(tmp_path, monkeypatch):
    def check(text: str) -> None:
        raise ValueError("always")

    results = tmp_path / "results.json"
    monkeypatch.setattr(fuzz, "CORPUS", tmp_path)
    monkeypatch.setattr(fuzz, "TARGETS", {"calls": Target(st.text(), check)})
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--minutes", "0.001", "--json", str(results)])
    assert fuzz.main() == 1
    assert json.loads(results.read_text())["metrics"][0]["failures"] == 1


def test_a_hang_is_ended_and_kept(tmp_path, monkeypatch):
    def check(text: str) -> None:
        with bounded("matching"):
            re.fullmatch(r"(?:a|aa|\w)*!", "a" * 60)

    monkeypatch.setattr(fuzz, "CORPUS", tmp_path)
    soak = fuzz.Soak("calls", Target(st.just("a"), check))
    soak.turn(1, 0)
    assert list(soak.found) == ["AssertionError: matching hangs"]
