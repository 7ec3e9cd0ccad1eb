"""Every chat template that the installed trl ships: random conversations, exact token streams.

In what each template's whole rendering differs from the pieces is the table in docs/chat.md, which
is what `python -m rllib_gtpo.chat check` prints; a template that is not in it fails here.
"""

import importlib.util
import random
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_gtpo import ToolEnv
from rllib_gtpo.chat import ChatCodec, ParsedTurn, call_format
from rllib_gtpo.chat.__main__ import HEADER, load, row
from rllib_gtpo.chat.formats import native_format
from rllib_gtpo.chat.template import tool, user
from rllib_gtpo.chat.verify import (
    PROBE_TOOL,
    Conversation,
    Spoken,
    equal,
    spoken,
    writes_text_verbatim,
)
from rllib_gtpo.connectors.chat import COMPLETIONS, PROMPT_IDS, MessagesToTokens, TokensToTurns
from rllib_gtpo.errors import ChatTemplateError, ConfigError
from rllib_gtpo.packing import NOT_TRAINED, token_sequences
from rllib_gtpo.types import Completion

DOCS = Path(__file__).parents[2] / "docs" / "chat.md"
FEW = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def trl_templates() -> list[Path]:
    spec = importlib.util.find_spec("trl")  # without importing it, which takes long
    assert spec is not None and spec.submodule_search_locations, "install the extra [dev]"
    found = sorted((Path(spec.submodule_search_locations[0]) / "chat_templates").glob("*.jinja"))
    assert len(found) >= 70
    return found


ALL = pytest.mark.parametrize("path", trl_templates(), ids=lambda path: path.stem)


@cache
def codec_of(path: Path) -> ChatCodec:
    return load(str(path))


def test_the_table_in_the_docs_is_of_these_templates():
    text = DOCS.read_text(encoding="utf-8")
    rows = [row(path.stem, codec_of(path)) for path in trl_templates()]
    shown = text.partition(HEADER + "\n")[2].partition("\n\n")[0].rstrip().split("\n")
    assert shown == rows, "put into docs/chat.md what `python -m rllib_gtpo.chat check` prints"


WORD = st.text("abcdefghijk", min_size=1, max_size=8)
TEXT = st.lists(WORD, min_size=1, max_size=4).map(" ".join)
WILD = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12).filter(
    lambda text: not set("<>[]|｜") & set(text)  # noqa: RUF001
)


def kinds_of(codec: ChatCodec) -> dict[str, int]:
    """The kinds of turns that the template can write, with the calls in each."""
    template = codec.template
    kinds = {"plain": 0, "thought": 0}
    if template.writes_calls:
        kinds |= {"called": 1, "thought and called": 1, "called twice": 2}
    known = {}
    for kind, count in kinds.items():
        try:
            if template.canonical(turn_of(kind, count, ["a"] * 4).message) is not None:
                known[kind] = count
        except ChatTemplateError:
            assert kind == "called twice"  # the only one that some templates refuse
    return known | ({"verbatim": 0} if writes_text_verbatim(template) else {})


def turn_of(kind: str, count: int, texts: list[str]) -> Spoken:
    calls = [("lookup", {"query": text}) for text in texts[:count]]
    thinking = texts[2] if "thought" in kind else ""
    return spoken(
        "" if calls else texts[3], thinking=thinking, calls=calls, verbatim=kind == "verbatim"
    )


def takes_system(codec: ChatCodec) -> bool:
    try:
        codec.template.render([{"role": "system", "content": "a"}, user("b")], generate=True)
    except ChatTemplateError:
        return False
    return True


@st.composite
def conversations(draw, codec):
    """A random conversation in forms that the template knows."""
    kinds = kinds_of(codec)
    turns = []
    for kind in draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=4)):
        count = kinds[kind]
        text = WILD if kind == "verbatim" else TEXT
        turn = turn_of(kind, count, [draw(TEXT), draw(TEXT), draw(TEXT), draw(text)])
        if not count and (codec.template.shape.needs_calls or draw(st.booleans())):
            turn.results = [user(draw(TEXT))]
        else:
            turn.results = [tool(draw(TEXT | WILD), "lookup") for _ in range(count or 1)]
        turns.append(turn)
    prompt = [user(draw(TEXT))]
    if takes_system(codec) and draw(st.booleans()):
        prompt = [{"role": "system", "content": draw(TEXT)}, *prompt]
    return Conversation(prompt, turns, draw(st.sampled_from([[], [PROBE_TOOL]])))


def stream_of(codec: ChatCodec, conversation: Conversation) -> list[int]:
    """The ids of a rollout that samples the turns of the conversation."""
    encode = codec.tokenizer.encode
    text = codec.template.render(conversation.prompt, conversation.tools, generate=True)
    stream = encode(text, add_special_tokens=False)
    for turn in conversation.turns:
        said = turn.message["content"] if turn.verbatim else codec.template.canonical(turn.message)
        if codec.tokenizer.decode(stream[-16:]).rstrip().endswith("<think>") and turn.verbatim:
            said = f"\n</think>\n\n{said}"
        end = codec.template.closing_end(turn.message) or codec.template.delta(turn.results).end
        ended_by = codec.tokenizer.convert_tokens_to_ids(end)
        stream += [*encode(said, add_special_tokens=False), ended_by]
        stream += codec.delta_ids(turn.results, ended_by)
    return stream


@ALL
def test_pieces_are_the_templates_own_rendering_but_for_what_is_documented(path):
    codec = codec_of(path)

    @FEW
    @given(conversations(codec))
    def check(conversation):
        whole = codec.template.render(conversation.messages, conversation.tools, generate=True)
        pieces = codec.tokenizer.decode(stream_of(codec, conversation))
        assert equal(whole, pieces, codec.template, list(codec.deviations))

    check()


def lookup(query: str) -> str:
    """Looks something up.  query: what."""
    return f"found {query}"


class Search(ToolEnv):
    """A task of one question."""

    tools = [lookup]
    max_turns = 9

    def tasks(self, split):
        return [{"id": "1", "question": "What is it?", "answer": "x"}]


class Calling:
    """Reads one call of the tool in whatever was sampled, so that random ids are turns as well."""

    name = "calling"
    explained = True

    def parse_sampled(self, text, tools, *, prompt, end):
        return ParsedTurn("", calls=call_format("hermes").parse(ONE_CALL, tools).calls)


ONE_CALL = '<tool_call>{"name": "lookup", "arguments": {"query": "it"}}</tool_call>'


@ALL
def test_what_is_trained_is_what_was_sampled(path):
    """Random ids, most of which no tokenizer would give for their text, through the real pieces."""
    codec = codec_of(path)
    random.seed(path.stem)
    size = len(codec.tokenizer)
    ordinary = [i for i in range(size) if i not in codec.stop_token_ids]
    before, codec.call_format = codec.call_format, Calling()
    to_tokens, to_turns = MessagesToTokens(codec=codec), TokensToTurns(codec=codec)
    env = Search()
    episode = SingleAgentEpisode()
    observation, _ = env.reset(options={"task": env.tasks("train")[0]})
    episode.add_env_reset(observation, {})
    sampled = []
    for _ in range(4):
        ids = [*random.choices(ordinary, k=9), random.choice(codec.stop_token_ids)]
        sampled.append(ids)
        batch = to_tokens(batch={}, episodes=[episode])
        prompt_ids = batch[PROMPT_IDS]
        if len(sampled) > 1:
            (added,) = prompt_ids
            assert added == codec.delta_ids(observation.messages, sampled[-2][-1])
        completion = Completion(ids, [-1.0] * len(ids), "stop")
        batch = to_turns(
            batch={PROMPT_IDS: prompt_ids, COMPLETIONS: [completion]}, episodes=[episode]
        )
        (turn,) = batch["actions"]
        observation, reward, *_ = env.step(turn)
        episode.add_env_step(observation, turn.text, reward, {})
    codec.call_format = before
    (sequence,) = token_sequences([env.trajectory])
    trained = [
        [i for i, t in zip(sequence.token_ids, sequence.turns, strict=True) if t == number]
        for number in range(4)
    ]
    assert trained == sampled
    context = [
        i for i, t in zip(sequence.token_ids, sequence.turns, strict=True) if t == NOT_TRAINED
    ]
    assert codec.tokenizer.decode(context).count("found it") == 3  # the last one's went unseen


@ALL
def test_a_call_that_the_template_writes_is_read(path):
    """In the format that "auto" takes."""
    codec = codec_of(path)
    native = native_format(codec.template)
    if native is None:
        with pytest.raises(ConfigError, match="writes no calls that a known format reads"):
            call_format("auto").bind(codec.template)
        return
    auto = call_format("auto").bind(codec.template)
    assert auto.name == native.name
    turn = auto.parse_sampled(native.written, [PROBE_TOOL], prompt=codec.template.header, end="")
    (call,) = turn.calls
    assert (call.name, list(call.arguments), call.error) == ("lookup", ["query"], None)
    assert turn.content == ""


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1", "glm4moe", "qwen3_5_think"])
def test_a_format_that_the_template_does_not_explain_is_refused(name):
    (codec,) = (codec_of(path) for path in trl_templates() if path.stem == name)
    native = ChatCodec(codec.tokenizer, "auto").call_format.name
    with pytest.raises(ChatTemplateError, match=f"set call_format='{native}' or 'auto'"):
        ChatCodec(codec.tokenizer, "mistral")
    more = {"llama3_1": ["<|eom_id|>"], "glm4moe": ["<|user|>", "<|observation|>"]}.get(name, [])
    stops = ChatCodec(codec.tokenizer, native).stop_token_ids
    assert set(codec.tokenizer.convert_tokens_to_ids(more)) <= set(stops)
    assert set(codec.stop_token_ids) <= set(stops)
