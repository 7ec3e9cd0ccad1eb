import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rllib_gtpo import ToolEnv
from rllib_gtpo.chat import ChatCodec, FencedFormat, HermesFormat, call_format
from rllib_gtpo.chat.__main__ import tokenizer_for
from rllib_gtpo.errors import ChatTemplateError, ConfigError
from rllib_gtpo.models import build_tokenizer

PYTHON = {
    "type": "function",
    "function": {
        "name": "python",
        "description": "",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string"}},
            "required": ["code"],
        },
    },
}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@pytest.fixture(scope="module")
def codec() -> ChatCodec:
    return ChatCodec(build_tokenizer(), "fenced")


class TestCodec:
    @pytest.mark.parametrize(("name", "shown"), [("hermes", True), ("fenced", False)])
    def test_templates_explain_tools_in_the_hermes_format_only(self, name, shown):
        tokenizer = build_tokenizer()
        hint = "{% if tools %}Write <tool_call>.{% endif %}"
        tokenizer.chat_template = hint + tokenizer.chat_template
        codec = ChatCodec(tokenizer, name)
        text = codec.decode(codec.prompt_ids([{"role": "user", "content": "1+1"}], [PYTHON]))
        assert ("<tool_call>" in text) == shown

    def test_stop_token_is_the_one_that_closes_an_assistant_turn(self, codec):
        assert codec.tokenizer.decode([codec.end_of_turn_id]) == "<|im_end|>"
        assert codec.end_of_turn_id in codec.stop_token_ids

    @settings(max_examples=50, deadline=None)
    @given(
        st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=2)), min_size=1, max_size=4),
        TEXT,
    )
    def test_prompts_and_deltas_are_the_templates_own_rendering(self, codec, turns, last):
        """The stream that a rollout builds decodes to what the template renders for the
        transcript."""
        messages = [{"role": "user", "content": "question"}]
        ids = codec.prompt_ids(messages)
        for said, answers in turns:
            tool = [{"role": "tool", "content": a} for a in answers]
            ids += [*codec.tokenizer.encode(said, add_special_tokens=False), codec.end_of_turn_id]
            ids += codec.delta_ids(tool)
            messages += [{"role": "assistant", "content": said}, *tool]
        rendered = codec.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        assert codec.tokenizer.decode(ids) == rendered

    def test_a_demonstration_is_the_stream_of_a_rollout_and_only_the_assistant_is_trained(
        self, codec
    ):
        prompt = [{"role": "user", "content": "1+1"}]
        demonstration = [
            {"role": "assistant", "content": "```python\nprint(1+1)\n```"},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "2"},
        ]
        ids, trained = codec.conversation_ids(prompt, demonstration)
        sampled = codec.tokenizer.decode([i for i, t in zip(ids, trained, strict=True) if t])
        assert sampled == "```python\nprint(1+1)\n```<|im_end|>2<|im_end|>"
        whole = codec.tokenizer.apply_chat_template([*prompt, *demonstration], tokenize=False)
        assert codec.tokenizer.decode(ids) + "\n" == whole

    def test_decode_drops_the_stop_token_only(self, codec):
        ids = codec.tokenizer.encode("abc", add_special_tokens=False)
        assert codec.decode([*ids, codec.end_of_turn_id]) == "abc"
        assert codec.decode(ids) == "abc"

    def test_no_template_is_refused_with_the_remedy(self):
        tokenizer = build_tokenizer()
        tokenizer.chat_template = None
        with pytest.raises(ChatTemplateError, match="chat_template="):
            ChatCodec(tokenizer)

    @pytest.mark.parametrize(
        ("rewrite", "reason"),
        [
            ("message['content'] | upper", "verbatim"),
            ("message['content'] if loop.last else 'cut'", "changes an assistant's message"),
            (
                "(message['content'] ~ ' ') if loop.index == 2 else message['content']",
                "special|exactly",
            ),
        ],
    )
    def test_a_template_that_rewrites_is_refused(self, rewrite, reason):
        tokenizer = build_tokenizer()
        tokenizer.chat_template = tokenizer.chat_template.replace(
            "message['content']", f"({rewrite})"
        )
        with pytest.raises(ChatTemplateError, match=reason):
            ChatCodec(tokenizer)

    def test_a_template_that_trims_earlier_turns_is_refused(self):
        tokenizer = build_tokenizer()
        tokenizer.chat_template = tokenizer.chat_template.replace(
            "message['content']",
            "(message['content'] if messages | length - loop.index < 3 else 'x')",
        )
        with pytest.raises(ChatTemplateError, match="cannot be continued exactly"):
            ChatCodec(tokenizer)

    def test_a_template_without_a_tool_role_gets_results_as_a_users_message(self):
        tokenizer = build_tokenizer()
        tokenizer.chat_template = (
            "{% for message in messages %}{% if message['role'] == 'tool' %}"
            "{{ raise_exception('no tools here') }}{% endif %}"
            "{{ message['role'] + ':' + message['content'] + '<|im_end|>' }}{% endfor %}"
        )
        codec = ChatCodec(tokenizer)
        results = [{"role": "tool", "content": c} for c in ("one", "two")]
        assert codec.decode(codec.delta_ids(results)) == "user:one\ntwo"

    def test_a_template_that_hides_results_is_refused(self):
        tokenizer = build_tokenizer()
        tokenizer.chat_template = (
            "{% for message in messages %}{% if message['role'] == 'tool' or loop.index > 2 %}"
            "{{ '<|im_end|>' }}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
            "{% endfor %}"
        )
        with pytest.raises(ChatTemplateError, match=r"turn by turn .*leaves out what tools answer"):
            ChatCodec(tokenizer)


# As Mistral's: roles alternate, a result needs the nine characters of its call's id.
WITH_IDS = (
    "{{ bos_token }}{% set ns = namespace(at=0) %}{% for m in messages %}"
    "{% if m.role == 'user' or m.role == 'assistant' and not m.tool_calls %}"
    "{% if (m.role == 'user') != (ns.at % 2 == 0) %}{{ raise_exception('must alternate') }}"
    "{% endif %}{% set ns.at = ns.at + 1 %}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% elif m.role == 'tool' %}"
    "{% if m.tool_call_id | length != 9 %}{{ raise_exception('nine characters') }}{% endif %}"
    "{{ '[TOOL_RESULTS]' + m.tool_call_id + ':' + m.content + '[/TOOL_RESULTS]' }}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS][' }}{% for c in m.tool_calls %}"
    """{{ '{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments | tojson }}"""
    """{{ ', "id": "' + c.id + '"}' }}{{ ', ' if not loop.last }}{% endfor %}"""
    "{{ ']' + eos_token }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
# As GLM's: a turn ends with what begins the next message.
WITHOUT_END = (
    "{% for m in messages %}{{ {'user': '<|user|>', 'assistant': '<|assistant|>', "
    "'tool': '<|observation|>'}[m.role] + '\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
OPENS_THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' and '</think>' not in m.content }}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


def results(*contents, **more):
    return [{"role": "tool", "name": "f", "content": c, **more} for c in contents]


class TestTemplates:
    """Templates that want something of a kind that TRL's do not show, or all of one kind."""

    def test_results_behind_structured_calls_carry_the_ids_of_their_calls(self):
        codec = ChatCodec(tokenizer_for(WITH_IDS), "auto")
        assert codec.call_format.name == "mistral"
        assert codec.template.shape.needs_calls
        shown = codec.decode(codec.delta_ids(results("one", "two")))
        assert shown == (
            "[TOOL_RESULTS]call00000:one[/TOOL_RESULTS][TOOL_RESULTS]call00001:two[/TOOL_RESULTS]"
        )
        given = codec.decode(codec.delta_ids(results("one", tool_call_id="abcdefghi")))
        assert given == "[TOOL_RESULTS]abcdefghi:one[/TOOL_RESULTS]"

    def test_an_id_of_the_policys_comes_back_with_the_result(self):
        env = ToolEnv()
        env.call_format = call_format("mistral")
        env.reset(options={"task": {"id": "1", "question": "?", "answer": ""}})
        text = '[TOOL_CALLS][{"name": "f", "arguments": {}, "id": "abcdefghi"}]'
        observation, *_ = env.step(text)
        assert observation.messages[0]["tool_call_id"] == "abcdefghi"

    def test_marks_that_are_special_tokens_survive_decoding(self):
        codec = ChatCodec(tokenizer_for(WITH_IDS), "mistral")
        text = '[TOOL_CALLS][{"name": "f", "arguments": {}}]'
        ids = codec.tokenizer.encode(text, add_special_tokens=False)
        assert ids[0] in codec.tokenizer.all_special_ids
        assert codec.decode([*ids, codec.end_of_turn_id]) == text
        assert codec.parse(ids).calls[0].name == "f"

    def test_a_turn_may_end_with_what_begins_the_next_message(self):
        codec = ChatCodec(tokenizer_for(WITHOUT_END), "glm")
        user, observation = codec.tokenizer.convert_tokens_to_ids(["<|user|>", "<|observation|>"])
        assert {user, observation} <= set(codec.stop_token_ids)
        assert codec.decode(codec.delta_ids(results("x"), observation)) == "\nx<|assistant|>\n"
        wrong = codec.delta_ids(results("x"), user)
        assert codec.decode(wrong) == "<|observation|>\nx<|assistant|>\n"
        asked = [{"role": "user", "content": "x"}]
        assert codec.decode(codec.delta_ids(asked, user)) == "\nx<|assistant|>\n"
        assert codec.decode(codec.delta_ids(asked, observation)) == "<|user|>\nx<|assistant|>\n"

    def test_demonstrations_end_as_turns_do(self):
        codec = ChatCodec(tokenizer_for(WITHOUT_END), "glm")
        prompt, *said = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "one"},
            *results("x"),
            {"role": "assistant", "content": "two"},
        ]
        ids, trained = codec.conversation_ids([prompt], said)
        sampled = codec.tokenizer.decode([i for i, t in zip(ids, trained, strict=True) if t])
        assert sampled == "one<|observation|>two<|user|>"
        whole = codec.template.render([prompt, *said], generate=False)
        assert codec.tokenizer.decode(ids) == whole + "<|user|>"

    def test_a_turn_begins_in_the_thinking_that_its_prompt_opens(self):
        codec = ChatCodec(tokenizer_for(OPENS_THINKING))
        prompt_ids = codec.prompt_ids([{"role": "user", "content": "?"}])
        call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
        ids = codec.tokenizer.encode(f"{call}\n</think>\n\n{call}", add_special_tokens=False)
        turn = codec.parse(ids, [], prompt_ids)
        assert (len(turn.calls), turn.content, turn.thinking) == (1, "", call + "\n")
        assert len(codec.parse(ids, [], []).calls) == 2  # behind another prompt

    @pytest.mark.parametrize(
        ("said", "sampled"),
        [
            ("4", "\n</think>\n\n4"),
            ("<think>\nhm\n</think>\n\n4", "hm\n</think>\n\n4"),
            ("hm\n</think>\n\n4", "hm\n</think>\n\n4"),
        ],
    )
    def test_demonstrations_go_on_in_that_thinking(self, said, sampled):
        codec = ChatCodec(tokenizer_for(OPENS_THINKING))
        prompt = [{"role": "user", "content": "?"}]
        ids, trained = codec.conversation_ids(prompt, [{"role": "assistant", "content": said}])
        shown = codec.tokenizer.decode([i for i, t in zip(ids, trained, strict=True) if t])
        assert shown == sampled + "<|im_end|>"

    @pytest.mark.parametrize(
        ("rewrite", "deviation"),
        [
            ("message['content']", None),
            ("message['content'] | trim", "whitespace"),
            ("message['content'].split('</think>')[-1]", "thinking"),
        ],
    )
    def test_what_a_whole_rendering_differs_in_has_a_name(self, rewrite, deviation):
        tokenizer = build_tokenizer()
        tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", rewrite)
        found = ChatCodec(tokenizer).deviations
        assert deviation in found if deviation else not found

    @pytest.mark.parametrize("end", ["<|eot_id|>", "</s>", "[END]", "stop"])
    def test_a_template_of_another_tokenizer_is_refused_by_its_marker(self, end):
        tokenizer = build_tokenizer()
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", end)
        expected = rf"closes .*'{re.escape(end)}' is {len(end)} ordinary tokens .*use the tokenizer"
        with pytest.raises(ChatTemplateError, match=expected):
            ChatCodec(tokenizer)
        tokenizer.add_special_tokens({"extra_special_tokens": [end]})
        codec = ChatCodec(tokenizer)
        assert codec.tokenizer.decode([codec.end_of_turn_id]) == end

    def test_a_template_without_an_end_of_turn_is_refused(self):
        tokenizer = build_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        with pytest.raises(ChatTemplateError, match=r"ordinary tokens|nothing behind"):
            ChatCodec(tokenizer)


class TestFenced:
    def parse(self, text):
        return FencedFormat().parse(text, [PYTHON])

    def test_a_block_in_a_tools_language_is_a_call(self):
        turn = self.parse("Let me see.\n```python\nprint(1)\n```")
        (call,) = turn.calls
        assert (call.name, call.arguments, call.error) == ("python", {"code": "print(1)"}, None)
        assert turn.content == "Let me see."

    def test_several_calls_in_order(self):
        turn = self.parse("```python\na\n```\n```python\nb\n```")
        assert [c.arguments["code"] for c in turn.calls] == ["a", "b"]

    def test_plain_text_is_an_answer(self):
        assert self.parse("42").calls == []

    def test_an_unclosed_block_is_invalid(self):
        (call,) = self.parse("```python\nprint(1)").calls
        assert "not closed" in call.error

    def test_a_wrong_language_is_invalid_only_as_the_end_of_the_turn(self):
        (call,) = self.parse("```pyton\nprint(1)\n```").calls
        assert "not a tool" in call.error and "```python" in call.error
        assert self.parse("like ```json\n{}\n``` says: 3").calls == []

    def test_code_in_thinking_is_no_call(self):
        turn = self.parse("<think>```python\nx\n```</think>7")
        assert (turn.calls, turn.content) == ([], "7")
        assert "```python" in turn.thinking

    @settings(max_examples=300, deadline=None)
    @given(st.text(alphabet='`python\n ab<>{}"', max_size=60))
    def test_any_text_parses(self, text):
        for call in self.parse(text).calls:
            assert call.raw in text


class TestHermes:
    def parse(self, text):
        return HermesFormat().parse(text, [PYTHON])

    def test_a_call(self):
        body = json.dumps({"name": "python", "arguments": {"code": "1"}})
        turn = self.parse(f"so\n<tool_call>\n{body}\n</tool_call>")
        assert turn.calls[0].arguments == {"code": "1"} and turn.calls[0].error is None
        assert turn.content == "so"

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("<tool_call>{}", "not closed"),
            ("<tool_call>{oops}</tool_call>", "not JSON"),
            ("<tool_call>[1]</tool_call>", "must be"),
            ('<tool_call>{"name": "python", "arguments": "x"}</tool_call>', "must be an object"),
            ("<tool_call>" + "[" * 100_000 + "</tool_call>", "not JSON"),
        ],
    )
    def test_what_cannot_be_read_is_an_invalid_call_that_says_why(self, text, why):
        (call,) = self.parse(text).calls
        assert why in call.error


def test_an_unknown_format_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"valid: .*hermes"):
        call_format("xml")


@pytest.mark.parametrize("name", ["fenced", "hermes"])
@pytest.mark.parametrize(
    "text",
    [
        *(
            "\n```" * 25_000 + "\u2028" * 100_000,
            "```\n" * 25_000,
            "```python\n" * 10_000,
            "```python\nx\n```\n" * 6_000,
        ),
        *("<tool_call>" * 9_000, "<tool_call>{}</tool_call>" * 4_000, "<think>" * 14_000),
    ],
)
def test_parsing_takes_time_in_proportion_to_the_text(name, text):
    began = time.process_time()
    call_format(name).parse(text, [PYTHON])
    assert time.process_time() - began < 0.5  # the first took 3 s once
