"""Calls that are read by the tokenizer's own response template."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rllib_gtpo.chat import ChatCodec, call_format
from rllib_gtpo.errors import ChatTemplateError, ConfigError
from rllib_gtpo.models import build_tokenizer
from rllib_gtpo.types import ToolCall

# Calls as no format of ours has them: <<name {...}>>.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}"
    "{{ '<<' + call.function.name + ' ' + call.function.arguments | tojson + '>>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close_pattern": r"</think>\s*"},
        "tool_calls": {
            "open_pattern": r"<<(?P<name>\w+) ",
            "close_pattern": r">>\s*",
            "repeats": True,
            "content": "json",
            "transform": {
                "type": "function",
                "function": {"name": "{name}", "arguments": "{content}"},
            },
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*"},
    },
}
TOOL = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string"}, "k": {"type": "integer"}},
        },
    },
}


def tokenizer_with(template=TEMPLATE, response=RESPONSE):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    tokenizer.response_template = response
    return tokenizer


@pytest.fixture(scope="module")
def codec():
    return ChatCodec(tokenizer_with(), "response_template")


def parse(codec, text, *, stopped=True):
    ids = codec.tokenizer.encode(text, add_special_tokens=False)
    prompt_ids = codec.prompt_ids([{"role": "user", "content": "?"}])
    return codec.parse([*ids, *([codec.end_of_turn_id] if stopped else [])], [TOOL], prompt_ids)


@pytest.mark.parametrize("before", ["", "Let me see. ", "<think>hm</think>Well. "])
def test_calls_text_and_thinking(codec, before):
    turn = parse(codec, before + '<<search {"query": "5", "k": 2}>><<search {"query": "b"}>>')
    assert [(c.name, c.arguments, c.error) for c in turn.calls] == [
        ("search", {"query": "5", "k": 2}, None),
        ("search", {"query": "b"}, None),
    ]
    assert turn.content == before.partition("</think>")[2].strip() or before.strip()
    assert turn.thinking == ("hm" if "hm" in before else "")


def test_text_is_an_answer(codec):
    turn = parse(codec, "It is 42.")
    assert (turn.content, turn.calls) == ("It is 42.", [])


@pytest.mark.parametrize(
    ("text", "stopped"),
    [
        ('<<search {"query": "x"}', True),
        ('<<search {"query": "x"}', False),
        ('<<search {"que', False),
        ('<<search {"query": }>>', True),
    ],
)
def test_a_call_that_is_cut_off_or_malformed_is_invalid(codec, text, stopped):
    (call,) = parse(codec, text, stopped=stopped).calls
    assert "cannot be read" in call.error and call.raw == text and call.arguments == {}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["query", "k", "x"]),
            st.integers() | st.booleans() | st.text("ab <\n", max_size=5),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_what_is_written_is_read(codec, calls):
    form = codec.call_format
    text = form.write_all([ToolCall("find", arguments) for arguments in calls])
    read = form.parse(text, []).calls
    assert [(c.name, c.arguments, c.error) for c in read] == [("find", a, None) for a in calls]


def test_auto_takes_it_where_the_tokenizer_has_one(codec):
    assert ChatCodec(codec.tokenizer, "auto").call_format.name == "response_template"


def test_a_tokenizer_without_one_is_refused_with_the_remedy():
    with pytest.raises(ConfigError, match=r"no response_template; set it .* or use another"):
        ChatCodec(tokenizer_with(response=None), "response_template")


@pytest.mark.parametrize("name", ["response_template", "auto"])
def test_without_a_codec_it_says_what_is_missing(name):
    with pytest.raises(ConfigError, match="ChatCodec"):
        call_format(name).parse("x", [])
    with pytest.raises(ConfigError, match="ChatCodec"):
        call_format(name).write(ToolCall("x"))


def test_calls_that_the_template_does_not_write_cannot_be_demonstrated():
    codec = ChatCodec(tokenizer_with(build_tokenizer().chat_template), "response_template")
    with pytest.raises(ChatTemplateError, match="cannot be demonstrated"):
        codec.call_format.write(ToolCall("x"))
