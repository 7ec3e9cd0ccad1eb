"""What is no text: bytes of a model that are not UTF-8, and lone surrogates, which JSON can say."""

from __future__ import annotations

import json

import pytest

from rllib_gtpo import record
from rllib_gtpo.report import build_report, print_report
from rllib_gtpo.types import StopReason
from tests.report.test_report import embedded
from tests.scripted import ScriptedConfig, ScriptedEngine
from tests.tasks import MARKUP, Adder

CALL = '<tool_call>{"name": "shout", "arguments": {"text": "\\ud800"}}</tool_call>'
SURROGATE = "\ud800"


def shout(text: str) -> str:
    """Say it twice.  text: what to say."""
    assert text == SURROGATE
    return text + "\udcff!"


class Odd(Adder):
    """Also its questions are no text."""

    tools = [shout]

    def tasks(self, split):
        return [{**task, "question": task["question"] + "\udc80"} for task in super().tasks(split)]


class Babbler(ScriptedEngine):
    """Ends each turn with a byte that begins no character."""

    def ids(self, text):
        *said, end = super().ids(text)
        return [*said, self.codec.tokenizer.convert_tokens_to_ids("ÿ"), end]


class BabblerConfig(ScriptedConfig):
    def build_engine(self, module):
        return Babbler(self.build_codec(), lambda position, member, turn: (CALL, "9")[turn])


@pytest.fixture(scope="module")
def run(tmp_path_factory, ray_session):
    from rllib_gtpo.models import build_tokenizer

    directory = tmp_path_factory.mktemp("run")
    config = (
        BabblerConfig()
        .environment(Odd)
        .language_model(tokenizer=build_tokenizer(MARKUP))
        .rollouts(max_turn_tokens=128)
        .training(group_size=2, groups_per_step=2)
        .reporting(progress=False, record=1.0)
    )
    algorithm = config.build_algo()
    algorithm.run_directory = str(directory)
    result = algorithm.train()
    algorithm.stop()
    assert result["trajectory"]["discarded"] == 0
    return directory


def test_it_is_rolled_out_trained_on_and_recorded(run):
    rows = record.load(run)
    assert len(rows) == 4
    for row in rows:
        assert row["stop_reason"] == StopReason.ANSWER.value
        first, last = row["turns"]
        assert "ud800" in first["calls"][0]["arguments"]
        assert first["results"][0]["content"] == "\\ud800\\udcff!"
        assert last["text"] == "9\ufffd"
        assert row["messages"][0]["content"].endswith("\\udc80")


def test_it_is_reported(run, capsys):
    build_report(str(run))
    assert "\\\\udcff!" in json.dumps(embedded(run / "report.html", "chunk-0"))
    print_report(str(run))
    assert "advantage of each turn" in capsys.readouterr().out
