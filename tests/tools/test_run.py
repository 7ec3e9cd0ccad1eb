"""Running tools: whatever they do becomes a result."""

import asyncio
import re
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import deque

import pytest

from rllib_gtpo.errors import EnvironmentFault
from rllib_gtpo.sandbox import Limits, SandboxUnavailable, Status
from rllib_gtpo.tools import PythonSession, Tool, run_calls, run_tool, threads, to_tool_result
from rllib_gtpo.tools.python import shared_sandbox
from rllib_gtpo.types import ToolCall, ToolError, ToolResult


def run(fn, arguments=None, timeout=5.0, output_chars=1000, **options):
    tool = Tool.from_function(fn, name="tool", **options)
    return asyncio.run(run_tool(tool, arguments or {}, timeout=timeout, output_chars=output_chars))


def both(fn):
    """`fn` as a synchronous and as an asynchronous tool."""

    async def asynchronous():
        return fn()

    return [lambda: fn(), asynchronous]


class Broken:
    def __repr__(self):
        raise RuntimeError("no repr")


class BadError(Exception):
    def __str__(self):
        raise RuntimeError("no str")


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("text", "text"),
        ("", ""),
        (None, "null"),
        (True, "true"),
        (3, "3"),
        (0.5, "0.5"),
        (["é", {"a": None}], '["é", {"a": null}]'),
        ({1, }, "{1}"),
        (b"x", "b'x'"),
        ("\ud800", "\\ud800"),
        (ToolResult("other", "said", ToolError.RAISED), "said"),
    ],
)  # fmt: skip
def test_return_values_become_text(value, content):
    for fn in both(lambda: value):
        result = run(fn)
        assert (result.name, result.content) == ("tool", content)
        assert result.error is getattr(value, "error", None)


def raiser(error):
    def fn():
        raise error

    return fn


@pytest.mark.parametrize(
    ("fn", "content"),
    [
        (raiser(ValueError("bad value")), "Error: ValueError: bad value"),
        (raiser(KeyError()), "Error: KeyError"),
        (raiser(SystemExit(3)), "Error: SystemExit: 3"),
        (raiser(StopIteration()), "Error: StopIteration"),
        (raiser(TimeoutError("mine")), "Error: TimeoutError: mine"),
        (raiser(asyncio.CancelledError()), "Error: CancelledError"),
        (raiser(BadError()), "Error: BadError"),
        (Broken, "Error: RuntimeError: no repr"),
    ],
)
def test_a_raise_is_a_result(fn, content):
    variants = both(fn)
    if content.endswith("StopIteration"):
        variants = variants[:1]  # a coroutine cannot raise it
    for variant in variants:
        result = run(variant)
        assert (result.error, result.content) == (ToolError.RAISED, content)


def test_a_keyboard_interrupt_is_the_tools_own_unless_it_may_be_the_users():
    synchronous, asynchronous = both(raiser(KeyboardInterrupt()))
    assert run(synchronous).content == "Error: KeyboardInterrupt"
    with pytest.raises(KeyboardInterrupt):  # Ctrl-C comes to whatever the main thread runs
        run(asynchronous)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(run(asynchronous)))
    thread.start()
    thread.join()
    assert seen[0].content == "Error: KeyboardInterrupt"


@pytest.mark.parametrize("error", [SandboxUnavailable("none"), EnvironmentFault("none")])
def test_what_the_policy_is_not_to_blame_for_propagates(error):
    for fn in both(raiser(error)):
        with pytest.raises(type(error), match="none"):
            run(fn)


async def deaf():
    while True:
        try:
            await asyncio.sleep(0.5)
            return "late"
        except asyncio.CancelledError:
            continue


async def sleeper():
    await asyncio.sleep(60)


@pytest.mark.parametrize("fn", [lambda: time.sleep(1), sleeper, deaf])
def test_a_hang_is_a_timeout(fn):
    async def main():
        tool = Tool.from_function(fn, name="tool")
        began = time.monotonic()
        result = await run_tool(tool, {}, timeout=0.1, output_chars=100)
        return result, time.monotonic() - began

    result, seconds = asyncio.run(main())
    assert (result.error, result.content) == (ToolError.TIMEOUT, "Error: timed out after 0.1 s")
    assert 0.1 <= result.seconds <= seconds < 0.4


def test_a_tools_own_limits_go_first():
    assert run(lambda: time.sleep(0.3), timeout=0.05).error is ToolError.TIMEOUT
    tool = Tool.from_function(lambda: time.sleep(0.3), name="tool", timeout=0.05)
    result = asyncio.run(run_tool(tool, {}, timeout=5, output_chars=100))
    assert result.content == "Error: timed out after 0.05 s"
    assert len(run(lambda: "x" * 999).content) == 999
    tool = Tool.from_function(lambda: "x" * 999, name="tool", output_chars=100)
    assert len(asyncio.run(run_tool(tool, {}, timeout=5, output_chars=5000)).content) == 100


def test_long_output_loses_its_middle():
    for fn in [lambda: "a" * 900 + "b" * 900, raiser(ValueError("a" * 900 + "b" * 900))]:
        result = run(fn, output_chars=200)
        assert len(result.content) == 200 and result.content.endswith("bbb")
        assert len(re.findall(r"\[1[67]\d\d characters omitted\]", result.content)) == 1


HUNDRED_MB = 100_000_000


@pytest.mark.parametrize("kind", ["text", "bytes", "json", "message"])
def test_a_hundred_megabytes_cost_neither_memory_nor_time(kind):
    def fn():
        if kind == "bytes":
            return b"a" + b"x" * HUNDRED_MB + b"z"
        text = "a" + "x" * HUNDRED_MB + "z"
        if kind == "message":
            raise ValueError(text)
        return [text] if kind == "json" else text

    for variant in both(fn):
        tracemalloc.start()
        began = time.perf_counter()
        result = run(variant, timeout=20, output_chars=8192)
        seconds = time.perf_counter() - began
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(result.content) <= 8192 and "omitted] ..." in result.content
        assert "axxx" in result.content[:30] and "xxz" in result.content[-5:]
        # The value itself, a piece or two of it, and for JSON the quoted string.
        assert peak < (4.1 if kind == "json" else 2.1) * HUNDRED_MB
        assert seconds < 5  # 0.2 s on an idle core


def test_a_long_list_is_written_while_the_others_go_on():
    async def main():
        async def numbers():
            return list(range(1_000_000))

        tool = Tool.from_function(numbers, name="numbers")
        longest = 0.0

        async def tick():
            nonlocal longest
            while True:
                began = time.perf_counter()
                await asyncio.sleep(0.001)
                longest = max(longest, time.perf_counter() - began)

        ticker = asyncio.create_task(tick())
        result = await run_tool(tool, {}, timeout=60, output_chars=100)
        await asyncio.sleep(0.05)  # the ticker notices
        ticker.cancel()
        return result, longest

    result, longest = asyncio.run(main())
    assert result.content.startswith("[0, 1, 2, ") and result.content.endswith("999998, 999999]")
    assert "[7888828 characters omitted]" in result.content
    assert longest < result.seconds / 2


def test_lone_surrogates_in_a_long_text_do_not_make_it_longer():
    assert run(lambda: "\ud800" * 500, output_chars=100).content.startswith("????")
    assert len(run(lambda: "\ud800" * 99, output_chars=100).content) == 100


def test_ints_reach_float_parameters_as_floats():
    def half(x: float) -> str:
        return repr(x)

    assert run(half, {"x": 3}).content == "3.0"


def test_threads_are_reused_and_hung_ones_replaced():
    release = threading.Event()

    async def main():
        who = Tool.from_function(lambda: threading.get_ident(), name="who")
        hang = Tool.from_function(lambda: release.wait(10), name="hang")
        ids = {(await run_tool(who, {}, timeout=5, output_chars=99)).content for _ in range(20)}
        hung = await asyncio.gather(
            *(run_tool(hang, {}, timeout=0.1, output_chars=99) for _ in range(8))
        )
        after = await run_tool(who, {}, timeout=5, output_chars=99)
        return ids, hung, after

    try:
        ids, hung, after = asyncio.run(main())
    finally:
        release.set()
    assert len(ids) <= 2  # the thread may not be idle again yet
    assert {r.error for r in hung} == {ToolError.TIMEOUT} and after.error is None


def test_the_end_of_threads_is_told(monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threads, "_idle", deque(maxlen=0))  # others may become idle
    monkeypatch.setattr(threading.Thread, "start", refuse)  # as at the system's limit
    with pytest.raises(EnvironmentFault, match=r"no thread for a tool .* \d+ threads are running"):
        run(lambda: "x")


def test_a_hung_tool_does_not_keep_the_process():
    code = (
        "import asyncio, time\nfrom rllib_gtpo.tools import *\n"
        "t = Tool.from_function(lambda: time.sleep(60), name='t')\n"
        "print(asyncio.run(run_tool(t, {}, timeout=0.1, output_chars=99)).error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert done.stdout == "timeout\n" and done.returncode == 0 and not done.stderr


def test_cancelling_cancels_the_tool():
    seen = []

    async def tool():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    async def main():
        call = run_tool(Tool.from_function(tool), {}, timeout=60, output_chars=99)
        task = asyncio.create_task(call)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)

    asyncio.run(main())
    assert seen == ["cancelled"]


def test_a_call_is_cheap():
    async def main():
        tool = Tool.from_function(lambda: "x", name="tool")
        times = []
        for _ in range(500):
            times.append((await run_tool(tool, {}, timeout=5, output_chars=99)).seconds)
        return sorted(times)[250]

    assert asyncio.run(main()) < 1e-3  # 40 us on an idle core


def add(a: int, b: int = 1) -> int:
    """Add.  a: one.  b: other."""
    return a + b


def test_calls_of_a_turn_in_order_with_reasons():
    ran = []

    def note(x: str) -> str:
        ran.append(x)
        return x

    tools = {t.name: t for t in map(Tool.from_function, (add, note))}
    calls = [
        ToolCall("add", {"a": 1}),
        ToolCall("nope", {"a": 1}),
        ToolCall("add", {"a": "1"}),
        ToolCall("note", {"x": "y"}, error="unparsable: missing brace"),
        ToolCall("add", {"a": 2, "b": 3}),
    ]
    results = asyncio.run(run_calls(tools, calls, timeout=5, output_chars=500))
    assert [(r.name, r.error, r.content) for r in results] == [
        ("add", None, "2"),
        ("nope", ToolError.INVALID, "Error: unknown tool 'nope', available: 'add', 'note'"),
        (
            "add",
            ToolError.INVALID,
            "Error: argument 'a' of tool 'add' must be integer, got string '1'",
        ),
        ("note", ToolError.INVALID, "Error: unparsable: missing brace"),
        ("add", None, "5"),
    ]
    assert ran == []
    assert asyncio.run(run_calls(tools, [], timeout=5, output_chars=500)) == []
    single = asyncio.run(run_calls({}, [ToolCall("x")], timeout=5, output_chars=500))
    assert single[0].content == "Error: unknown tool 'x', available: none"


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_calls_of_a_turn_overlap(kind):
    barrier = threading.Barrier(4, timeout=5)
    arrived = []

    def meet() -> str:
        barrier.wait()  # only passes when all four are in here
        return "met"

    async def ameet() -> str:
        arrived.append(1)
        while len(arrived) < 4:
            await asyncio.sleep(0.001)
        return "met"

    tools = {"meet": Tool.from_function(meet if kind == "sync" else ameet, name="meet")}
    calls = [ToolCall("meet") for _ in range(4)]
    results = asyncio.run(run_calls(tools, calls, timeout=5, output_chars=99))
    assert [r.content for r in results] == ["met"] * 4


LIMITS = Limits(cpu_seconds=0.5)


def test_python_sessions_share_a_sandbox_but_no_names():
    async def main():
        one, other = PythonSession(LIMITS), PythonSession(LIMITS)
        first = await asyncio.gather(one.arun("x = 1"), other.arun("x = 2"), one.arun("x += 1"))
        second = await asyncio.gather(one.arun("print(x)"), other.arun("print(x)"))
        one.close()
        one.close()
        with pytest.raises(SandboxUnavailable, match="closed"):
            await one.arun("1")
        other.close()
        return first, second

    first, second = asyncio.run(main())
    assert {r.status for r in first} == {Status.OK} and [r.output for r in second] == ["2\n", "2\n"]
    assert shared_sandbox(LIMITS, ()) is shared_sandbox(LIMITS, ())
    assert shared_sandbox(LIMITS, ()) is not shared_sandbox(LIMITS, ("json",))


def test_an_unused_python_session_costs_nothing():
    session = PythonSession(preload=("no_such_module",))
    session.close()
    with pytest.raises(SandboxUnavailable, match="no_such_module"):
        asyncio.run(PythonSession(preload=("no_such_module",)).arun("1"))


def test_python_as_a_tool():
    class Env:
        def __init__(self):
            self.session = PythonSession(LIMITS)

        async def python(self, code: str) -> ToolResult:
            """Run Python.  code: the code."""
            return to_tool_result(await self.session.arun(code))

    env = Env()
    tools = {"python": Tool.from_function(env.python)}

    def call(code):
        calls = [ToolCall("python", {"code": code})]
        return asyncio.run(run_calls(tools, calls, timeout=5, output_chars=500))[0]

    assert (call("x = 2; print(x)").content, call("print(x)").error) == ("2\n", None)
    assert call("1/0").error is ToolError.RAISED
    assert call("while True: pass").error is ToolError.TIMEOUT
    assert call("import os; os._exit(0)").error is ToolError.RAISED
    env.session.close()
