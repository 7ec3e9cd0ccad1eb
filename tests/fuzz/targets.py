"""What is fuzzed: everything that reads what a model wrote or what its code did.

A target is a strategy, whose cases JSON can express (bytes as hexadecimal), and a check that
raises if a case breaks a promise.  Nothing that is checked in this process may take longer than
`SECONDS` of processor time.
"""

# ruff: noqa: RUF001, SIM905
from __future__ import annotations

import asyncio
import copy
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import FrameType
from typing import Any, Literal

from hypothesis import strategies as st

from rllib_gtpo.chat import call_format
from rllib_gtpo.rewards.answer import KINDS, AnswerChecker, Verdict, extract_answer
from rllib_gtpo.sandbox import Limits, PythonSandbox, SandboxResult, Status
from rllib_gtpo.sandbox.limits import RESTARTED
from rllib_gtpo.sandbox.output import Output, clip
from rllib_gtpo.sandbox.remote import _Retry, to_result
from rllib_gtpo.tools import Tool, run_calls
from rllib_gtpo.types import ToolCall, ToolError

SECONDS = 1.0
LONGEST = 100_000  # characters of a case


@dataclass(frozen=True)
class Target:
    """Cases and what must hold for each."""

    cases: st.SearchStrategy[Any]
    check: Callable[[Any], None]


@contextmanager
def bounded(what: str) -> Iterator[None]:
    """Fails if what is done inside takes too long, and ends it soon after (main thread only)."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"{what} hangs")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, 2 * SECONDS)
    began = time.process_time()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    taken = time.process_time() - began
    assert taken < SECONDS, f"{what} took {taken:.1f} s"


def texts(*pieces: str, longest: int = LONGEST) -> st.SearchStrategy[str]:
    """Texts of pieces, some of them repeated very often, and of anything else."""
    piece = st.sampled_from(pieces) | st.text(max_size=8)
    often = st.sampled_from((2, 7, 64, 1000, 20_000, longest))
    repeated = st.builds(lambda p, n: (p * n)[: longest // 2], st.sampled_from(pieces), often)
    parts = st.lists(st.one_of(piece, piece, piece, repeated), max_size=14)
    return parts.map(lambda found: "".join(found)[:longest])


# Tool calls.


def _python(code: str) -> str:
    """Run Python.  code: the code."""
    return code


def _search(
    query: str, k: int = 1, how: Literal["a", 1] = 1, more: dict[str, list[float]] | None = None
) -> str:
    """Search.  query: what."""
    return json.dumps([query, k, how, more])


@cache
def tools() -> dict[str, Tool]:
    """A tool that takes a text, and one that takes much."""
    return {
        "python": Tool.from_function(_python, name="python"),
        "search": Tool.from_function(_search, name="search"),
    }


FORMATS = ("hermes", "fenced", "llama3_json", "mistral", "mistral_args", "qwen3_coder", "glm")
CALL_PIECES = (
    *("<tool_call>", "</tool_call>", "<think>", "</think>", "```", "```python\n", "\n```", "``"),
    *("`", "\n", " ", "python", "search", '{"name": "python", "arguments": {"code": "1"}}'),
    *('{"name": "search", "arguments": {"query": "q", "k": ', "}}", '"name"', '"arguments"', ":"),
    *("{", "}", "[", "]", '"', "\\", "\\ud800", "9", "-", ".", "e", "NaN", "Infinity", "null"),
    *("```js\nx\n```", "<|im_end|>", "\x00", "\u2028", "<tool_call></tool_call>", "[THINK]"),
    *("[/THINK]", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", '[{"name": "python"}]', "<|python_tag|>"),
    *('\n{"name": "python", "parameters": {"code": "1"}}', "; ", "\n> ", "<function=search>"),
    *("</function>", "<parameter=query>", "</parameter>", "<tool_call>search\n", "</arg_value>"),
    *("<arg_key>k</arg_key>", "<arg_key>", "<arg_value>", "</arg_key>", "\n  "),
)


def check_calls(text: str) -> None:
    """Any text is a turn; its calls can be run, and say what is wrong with them."""
    schemas = [tool.schema for tool in tools().values()]
    for name in FORMATS:
        with bounded(f"the {name} format"):
            turn = call_format(name).parse(text, schemas)
        assert isinstance(turn.content, str) and isinstance(turn.thinking, str)
        for call in turn.calls:
            assert call.raw and call.raw in text, "raw was not written"
            assert call.error is None or (call.error and not call.arguments)
        calls = turn.calls[:50]
        with bounded("running the calls"):
            results = asyncio.run(run_calls(tools(), calls, timeout=5, output_chars=500))
        for call, result in zip(calls, results, strict=True):
            assert call.error is None or result.error is ToolError.INVALID
            assert len(result.content) <= 500
            result.content.encode()  # no lone surrogates


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


def check_written(case: list[Any]) -> None:
    """A call that is written is read again, unless its text ends the call before its end."""
    name, arguments = case
    schemas = [tool.schema for tool in tools().values()]
    call = ToolCall(name, copy.deepcopy(arguments))
    for form in ("hermes", "llama3_json", "mistral"):
        read = call_format(form).parse("Well.\n" + call_format(form).write(call), schemas)
        assert [(c.name, c.arguments, c.error) for c in read.calls] == [(name, arguments, None)]
        assert read.content == "Well."
    code = next((v for v in arguments.values() if isinstance(v, str)), "")
    call = ToolCall("python", {"code": code})
    written = call_format("fenced").write(call)
    if "```" not in f"\n{code}\n":
        read = call_format("fenced").parse("Well.\n" + written, schemas)
        assert [(c.arguments, c.error) for c in read.calls] == [({"code": code}, None)]


# Answers.

ANSWER_PIECES = (
    *r"\boxed{ \fbox{ } { \frac{1}{2} \dfrac \sqrt{ \sqrt[3]{ ^ _ 1 0 12 0.5 . , 1,000 e9".split(),
    *r"e999999 % \% $ \$ ( ) [ ] \left \right \cup \cap \text{ and or = x y \pi ° ^\circ".split(),
    *r"\begin{pmatrix} & \\ \end{pmatrix} 1/3 - \pm ± 10^{ ½ − ٣ \infty \{ \} ; #### A (B)".split(),
    *r"Answer: Monday 2024-01-15 ! ** \ln i 0.\overline{3} \cdot \times < \leq \in".split(),
    *(r"\mathbb{R}", "yes", "9" * 60, "The answer is", "\n", " ", " km", " m/s", "3:45 pm"),
)


@cache
def checker() -> AnswerChecker:
    """One for the process."""
    return AnswerChecker()


def check_answers(case: list[str]) -> None:
    """Extraction and what is compared in this process: no crash, no hang, equal to itself."""
    text, given, reference = case
    with bounded("extracting"):
        answer = extract_answer(text)
    assert answer is None or answer.strip() == answer != ""
    for kind in KINDS:
        for one in (given, answer):
            with bounded(f"comparing ({kind})"):
                verdict = checker()._quick(one, reference, kind)
            if one is not None and one.strip() == reference.strip():
                assert isinstance(verdict, Verdict) and verdict.correct, "not equal to itself"


def check_graded(case: list[str]) -> None:
    """The same with the sandbox: a verdict comes within its limits."""
    given, reference = case
    began = time.monotonic()
    verdict = checker().check(given, reference)
    assert isinstance(verdict.correct, bool) and verdict.how
    assert time.monotonic() - began < 60  # other processes may need the cores


# Output.


def check_output(case: list[Any]) -> None:
    """Bounded, valid, and the same however the bytes come in pieces."""
    data, limit, cuts, before, after = case
    raw = bytes.fromhex(data)
    taken = []
    for pieces in ([raw], [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]):
        output = Output(limit)
        for piece in pieces:
            output.feed(piece)
        assert len(output._head) + len(output._tail) <= 12 * limit
        taken.append(output.take(before, after))
    whole, in_pieces = taken
    assert whole == in_pieces
    assert len(whole) <= limit and whole.startswith(before) and whole.endswith(after)
    whole.encode()
    text = raw.decode("utf-8", "backslashreplace")
    if not after and len(before) + len(text) <= limit:
        assert whole == before + text
    assert len(clip(text, limit)) <= limit


@st.composite
def output_cases(draw: st.DrawFn) -> list[Any]:
    """Bytes, a limit, where they are cut, and notes."""
    piece = st.binary(max_size=12) | st.text(max_size=8).map(lambda t: t.encode("utf-8", "ignore"))
    parts = draw(st.lists(st.tuples(piece, st.sampled_from((1, 1, 1, 90, 1500))), max_size=8))
    raw = b"".join(part * count for part, count in parts)
    cuts = sorted(draw(st.lists(st.integers(0, len(raw)), max_size=5)))
    notes = draw(st.sampled_from((("", ""), (RESTARTED, ""), ("", "[Killed.]\n"))))
    return [raw.hex(), draw(st.integers(256, 600)), cuts, *notes]


# A service's answers.

_RUN = st.fixed_dictionaries(
    {},
    optional={
        "status": st.sampled_from(("Finished", "Error", "TimeLimitExceeded")) | JSON,
        "execution_time": st.floats() | JSON,
        "return_code": st.integers(-40, 300) | JSON,
        "stdout": st.text() | JSON,
        "stderr": st.text() | st.just("MemoryError\n") | JSON,
    },
)
_REPLY = st.fixed_dictionaries(
    {},
    optional={
        "status": st.sampled_from(("Success", "Failed", "SandboxError")) | JSON,
        "message": JSON,
        "run_result": _RUN | JSON,
    },
)


def check_reply(data: str) -> None:
    """An answer is a result, or the reason to ask again."""
    limits = Limits(output_chars=256)
    with bounded("reading an answer"):
        try:
            result = to_result(bytes.fromhex(data), limits)
        except _Retry as retry:
            assert len(str(retry)) < 2000
            return
    assert isinstance(result.status, Status) and len(result.output) <= 256
    assert result.wall_seconds >= 0
    result.output.encode()


# The sandbox from inside.

_FD = st.integers(0, 12)
_BYTES = st.binary(max_size=40).map(repr)
_ACTIONS = st.one_of(
    st.builds("os.write({}, {})".format, _FD, _BYTES),
    st.builds("os.close({})".format, _FD),
    st.builds("os.dup2({}, {})".format, _FD, _FD),
    st.builds("os.read({}, 20)".format, _FD),
    st.builds("os.set_blocking({}, {})".format, _FD, st.booleans()),
    st.builds("socket.socket(fileno={}).send({})".format, _FD, _BYTES),
    st.builds("socket.socket(fileno={}).shutdown(2)".format, _FD),
    st.builds("socket.send_fds(socket.socket(fileno={}), [{}], [{}])".format, _FD, _BYTES, _FD),
    st.builds("socket.recv_fds(socket.socket(fileno={}), 100, 4)".format, _FD),
    st.builds("os.write({}, struct.pack('<QB', {}, {}))".format, _FD, st.integers(0, 9), _FD),
    st.builds("os.lseek({}, 0, 0)".format, _FD),
    st.builds("os.ftruncate({}, 0)".format, _FD),
    st.builds("print({})".format, st.text(max_size=20).map(ascii)),
    st.sampled_from(
        (
            "sys.stdout = 1",
            "sys.stderr = None",
            "sys.excepthook = 1",
            "builtins.print = builtins.exec = builtins.compile = None",
            "sys.modules.clear()",
            "sys.modules.pop('traceback')",
            "sys.exit(7)",
            "os._exit(243)",
            "os._exit(0)",
            "os.kill(os.getpid(), 9)",
            "os.kill(os.getpid(), 11)",
            "os.kill(os.getpid(), 19)",
            "raise BaseException('x')",
            "raise MemoryError",
            "sys.setrecursionlimit(5)",
            "signal.setitimer(signal.ITIMER_REAL, 0.01)",
            "threading.Thread(target=os._exit, args=[3]).start()",
            "gc.get_objects().clear()",
            "os.closerange(0, 99)",
            "os.abort()",
        )
    ),
)
_IMPORTS = "import builtins, gc, os, signal, socket, struct, sys, threading\n"
SANDBOX_LIMITS = Limits(cpu_seconds=0.5, wall_seconds=1.0, memory_mb=128, output_chars=500)


@cache
def sandbox() -> PythonSandbox:
    """One for the process."""
    return PythonSandbox(SANDBOX_LIMITS, workers=1)


def check_sandbox(actions: list[str]) -> None:
    """Whatever code does to its descriptors and interpreter: a result, and a healthy sandbox."""
    body = "".join(f"try: {a}\nexcept OSError: pass\n" for a in actions)
    own = sandbox()
    began = time.monotonic()
    restarts = own.restarts
    check_result(own.run(_IMPORTS + body))
    with own.session() as cell:
        check_result(cell.run("x = 1"))
        check_result(cell.run(_IMPORTS + body))
        check_result(cell.run("x = 3"))
        after = own.run("print('healthy')")
    assert (after.status, after.output) == (Status.OK, "healthy\n")
    assert own.restarts == restarts, "the zygote died"
    assert time.monotonic() - began < 60  # other processes may need the cores


def check_result(result: SandboxResult) -> None:
    """A result as it is promised."""
    assert isinstance(result.status, Status) and len(result.output) <= 500
    result.output.encode()
    assert result.cpu_seconds >= 0 and result.wall_seconds >= 0


_short = texts(*ANSWER_PIECES, longest=5000)
_formula = st.lists(st.sampled_from(ANSWER_PIECES), max_size=8).map("".join)
TARGETS: dict[str, Target] = {
    "calls": Target(texts(*CALL_PIECES), check_calls),
    "written": Target(
        st.tuples(
            st.text(min_size=1, max_size=9), st.dictionaries(st.text(max_size=9), JSON, max_size=3)
        ).map(list),
        check_written,
    ),
    "answers": Target(
        st.tuples(texts(*ANSWER_PIECES), _short | _formula, _short | _formula).map(list),
        check_answers,
    ),
    "graded": Target(st.tuples(_formula, _formula).map(list), check_graded),
    "output": Target(output_cases(), check_output),
    "reply": Target(
        st.binary(max_size=50).map(bytes.hex)
        | _REPLY.map(lambda reply: json.dumps(reply).encode().hex()),
        check_reply,
    ),
    "sandbox": Target(st.lists(_ACTIONS, max_size=6), check_sandbox),
}
