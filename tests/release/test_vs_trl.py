"""The comparison with TRL: both get the same task, and what is compared is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from release.results import renewed
from release.rollouts import vs_trl
from rllib_gtpo.chat import ChatCodec, call_format
from rllib_gtpo.models import TINY_QWEN2, build_tokenizer, load_model, load_tokenizer
from rllib_gtpo.types import ToolCall

trl = pytest.importorskip("trl")
ROOT = Path(__file__).parents[2]
CALL = "```python\nprint(12+7)\n```"


@pytest.fixture
def tokenizer():
    """As TRL gets it."""
    made = load_tokenizer(build_tokenizer(), chat_template=vs_trl.TEMPLATE)
    made.response_template = vs_trl.RESPONSE
    return made


def test_trl_reads_the_calls_that_we_read(tokenizer):
    from trl.chat_template_utils import parse_response

    prefix = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    for text in (CALL, "so\n" + CALL, CALL + CALL):
        ids = tokenizer.encode(text + "<|im_end|>", add_special_tokens=False)
        tool = {"type": "function", "function": {"name": "python", "parameters": {}}}
        tool["function"]["parameters"] = {"properties": {"code": {"type": "string"}}}
        ours = call_format("fenced").parse(text, [tool]).calls
        theirs = parse_response(tokenizer, ids, prefix=prefix, tools=[tool])["tool_calls"]
        assert [c["function"]["arguments"] for c in theirs] == [c.arguments for c in ours]
        assert ours[0].arguments == {"code": "print(12+7)"}
    ids = tokenizer.encode("52<|im_end|>", add_special_tokens=False)
    assert vs_trl._answer([parse_response(tokenizer, ids, prefix=prefix)]) == "52"


def test_trl_continues_a_conversation_with_our_ids(tokenizer):
    answer = {"role": "tool", "name": "python", "content": "19\nleft: 19*3"}
    call = {"function": {"name": "python", "arguments": {"code": "print(12+7)"}}}
    conversation = [
        {"role": "user", "content": "12+7*3"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        answer,
    ]
    theirs = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    codec = ChatCodec(build_tokenizer(), "fenced")
    written = codec.call_format.write(ToolCall("python", {"code": "print(12+7)"}))
    said = codec.tokenizer.encode(written + "<|im_end|>", add_special_tokens=False)
    ours = codec.prompt_ids(conversation[:1]) + said + codec.delta_ids([answer])
    assert theirs == ours
    assert trl.chat_template_utils.supports_tool_calling(tokenizer)
    assert trl.chat_template_utils.is_chat_template_prefix_preserving(tokenizer)


def test_the_reward_is_the_whole_answer():
    say = {"role": "assistant", "content": " 52 "}
    call = {**say, "tool_calls": [{}]}
    told = {"role": "tool", "content": "52"}
    completions = [[call, told, say], [say], [call], [call, told], [{**say, "content": "5"}]]
    assert vs_trl.accuracy(completions, ["52"] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_ratios_are_of_pairs_after_the_warm_up():
    rows = [{"seconds": s, "cpu": 1.0} for s in (90.0, 1.0, 1.0, 2.0, 3.0)]
    others = [{"seconds": 4.0, "cpu": 4.0} for _ in rows]
    made = vs_trl.ratios(rows, others)
    assert (made["ratio_min"], made["ratio"], made["ratio_max"]) == (0.25, 0.5, 0.75)
    assert made["cpu_ratio"] == 0.25


@pytest.mark.slow
def test_both_train(ray_session, tmp_path, monkeypatch):
    for name, value in (("PROMPTS", 2), ("MEMBERS", 2), ("MICRO_BATCH", 4), ("TESTED", 4)):
        monkeypatch.setattr(vs_trl, name, value)
    model = tmp_path / "model"
    load_model(dict(TINY_QWEN2)).save_pretrained(model)
    build_tokenizer().save_pretrained(model)
    ours, theirs, ratio = vs_trl.compare(model, vs_trl.WARM_UP + 1, "gtpo", 2, tmp_path)
    for row in (ours, theirs):
        assert len(row["curve"]) == len(row["each_s"]) == vs_trl.WARM_UP + 1
        assert 4 <= row["sampled"] < row["positions"]
        assert row["seconds"] > row["rollout_s"] > 0
        assert row["trained_positions"] >= row["sampled"]
    assert ratio["ratio"] == pytest.approx(ours["seconds"] / theirs["seconds"])
    json.dumps([ours, theirs, ratio])


def test_the_docs_show_what_was_recorded():
    docs = (ROOT / "docs" / "speed.md").read_text()
    recorded = json.loads((ROOT / "release" / "results" / "vs_trl.json").read_text())
    assert renewed(docs, {"vs_trl": vs_trl.table(recorded["metrics"])}) == docs
