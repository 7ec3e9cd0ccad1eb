"""The python tool: where it runs, what it keeps, what it is bounded by."""

import asyncio
import gc
import threading
import time

import pytest

from rllib_gtpo.errors import ConfigError
from rllib_gtpo.sandbox import Limits, PythonSandbox, SandboxUnavailable, Status
from rllib_gtpo.sandbox.limits import RESTARTED
from rllib_gtpo.sandbox.remote import RemoteSandbox
from rllib_gtpo.tools import PythonSession, Tool, run_calls, to_tool_result
from rllib_gtpo.tools import python as python_tool
from rllib_gtpo.tools.python import _Slots, available_mb, cell_slots, shared_sandbox
from rllib_gtpo.types import ToolCall, ToolError, ToolResult
from tests.sandbox.fusion import Fusion

LIMITS = Limits(cpu_seconds=0.5, memory_mb=64)


@pytest.fixture
def url():
    with Fusion() as fusion:
        thread = threading.Thread(target=fusion.serve_forever, args=(0.02,))
        thread.start()
        yield fusion.url
        fusion.shutdown()
        thread.join()


@pytest.fixture
def host(monkeypatch):
    """A host of this test's own, for LIMITS, with two slots."""
    monkeypatch.setattr(python_tool, "_hosts", {})
    monkeypatch.setattr(python_tool, "cell_slots", lambda limits: 2)
    made = python_tool._host(LIMITS, (), {})
    yield made
    made.sandbox.close()


def processes(sandbox) -> int:
    return sum(cell.session is not None for cell in sandbox._pool._cells.values())


def eventually(condition, seconds=5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_the_default_is_this_machine_and_keeps_names():
    async def main():
        session = PythonSession(LIMITS)
        first = await session.arun("x = 1")
        second = await session.arun("print(x)")
        session.close()
        return first, second

    first, second = asyncio.run(main())
    assert (first.status, second.output) == (Status.OK, "1\n")
    assert isinstance(shared_sandbox(LIMITS, ()), PythonSandbox)


def test_stateless_calls_keep_nothing_and_run_at_once(host):
    session = PythonSession(LIMITS, stateful=False)

    async def main():
        await session.arun("x = 1")
        code = "import time; time.sleep(0.3); print('x' in globals())"
        began = time.monotonic()
        results = await asyncio.gather(session.arun(code), session.arun(code))
        return results, time.monotonic() - began

    results, seconds = asyncio.run(main())
    assert [r.output for r in results] == ["False\n"] * 2 and seconds < 0.6
    assert processes(host.sandbox) == 0
    session.close()
    with pytest.raises(SandboxUnavailable, match="closed"):
        asyncio.run(session.arun("1"))


@pytest.mark.parametrize("as_mapping", [True, False])
def test_a_service_runs_the_code(url, as_mapping):
    where = {"url": url, "concurrency": 2} if as_mapping else url

    async def main():
        sessions = [PythonSession(LIMITS, sandbox=where, stateful=False) for _ in range(4)]
        return await asyncio.gather(*(s.arun(f"print({n})") for n, s in enumerate(sessions)))

    assert [r.output for r in asyncio.run(main())] == [f"{n}\n" for n in range(4)]
    assert isinstance(shared_sandbox(LIMITS, (), where), RemoteSandbox)
    assert shared_sandbox(LIMITS, (), where) is shared_sandbox(LIMITS, (), where)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"sandbox": "http://host"}, "stateful=False"),
        ({"sandbox": "http://host", "stateful": False, "preload": ("json",)}, "no effect"),
        ({"sandbox": "host:80", "stateful": False}, "http://HOST:PORT"),
        ({"sandbox": {"ulr": "http://host"}, "stateful": False}, "unknown 'ulr'.*'url'"),
        ({"sandbox": {"concurrency": 3}, "stateful": False}, "give a URL"),
    ],
)
def test_bad_settings_are_refused_before_any_trajectory(settings, problem):
    with pytest.raises(ConfigError, match=problem):
        PythonSession(**settings)


def call(session, code, timeout=60.0):
    async def python(code: str) -> ToolResult:
        """Run Python.  code: the code."""
        return to_tool_result(await session.arun(code))

    calls = [ToolCall("python", {"code": code})]
    tools = {"python": Tool.from_function(python)}
    return asyncio.run(run_calls(tools, calls, timeout=timeout, output_chars=500))[0]


def test_the_model_is_told_of_a_timeout():
    session = PythonSession(LIMITS)
    result = call(session, "print('so far')\nwhile True: pass")
    assert result.error is ToolError.TIMEOUT
    assert result.content == "so far\n[Timed out after 0.5 s of CPU time.]\n"
    result = call(session, "print(1)")
    assert result.content == RESTARTED + "1\n" and result.error is None
    result = call(session, "import time; time.sleep(60)", timeout=0.3)
    assert (result.error, result.content) == (ToolError.TIMEOUT, "Error: timed out after 0.3 s")
    session.close()


def test_a_machine_that_cannot_run_code_is_not_the_policy_s_fault():
    session = PythonSession(LIMITS, preload=("no_such_module",))
    with pytest.raises(SandboxUnavailable, match="no_such_module"):
        call(session, "print(1)")


def test_closing_ends_the_process_and_what_runs(host):
    async def main():
        session = PythonSession(LIMITS)
        await session.arun("x = 1")
        assert processes(host.sandbox) == 1
        running = asyncio.ensure_future(session.arun("import time; time.sleep(60)"))
        await asyncio.sleep(0.1)
        session.close()
        with pytest.raises(SandboxUnavailable, match="closed"):
            await running

    asyncio.run(main())
    assert eventually(lambda: processes(host.sandbox) == 0)
    assert host.slots._free == 2 and not host._idle


def test_a_forgotten_session_frees_its_process(host):
    asyncio.run(PythonSession(LIMITS).arun("x = 1"))
    gc.collect()
    assert eventually(lambda: processes(host.sandbox) == 0)


def test_an_idle_session_holds_no_slot(host):
    async def main():
        sessions = [PythonSession(LIMITS) for _ in range(40)]
        await asyncio.gather(*(s.arun(f"x = {n}") for n, s in enumerate(sessions)))
        assert processes(host.sandbox) == 40 and host.slots._free == 2
        results = await asyncio.gather(*(s.arun("print(x)") for s in sessions))
        for session in sessions:
            session.close()
        return [r.output for r in results]

    assert asyncio.run(main()) == [f"{n}\n" for n in range(40)]


def test_cells_at_one_time_are_bounded(host):
    async def main():
        sessions = [PythonSession(LIMITS) for _ in range(6)]
        code = "import time; print(time.monotonic()); time.sleep(.1); print(time.monotonic())"
        results = await asyncio.gather(*(s.arun(code) for s in sessions))
        return [tuple(map(float, r.output.split())) for r in results]

    spans = asyncio.run(main())
    for begin, _ in spans:
        assert sum(b <= begin < e for b, e in spans) <= 2


def test_calls_on_one_session_take_one_slot(host):
    async def main():
        one, other = PythonSession(LIMITS), PythonSession(LIMITS)
        many = [asyncio.ensure_future(one.arun("import time; time.sleep(.2)")) for _ in range(5)]
        await asyncio.sleep(0.05)
        began = time.monotonic()
        await other.arun("1")
        seconds = time.monotonic() - began
        await asyncio.gather(*many)
        return seconds

    assert asyncio.run(main()) < 0.5


def test_without_memory_the_oldest_idle_sessions_start_again(host, monkeypatch):
    async def main():
        sessions = [PythonSession(LIMITS) for _ in range(5)]
        for n, session in enumerate(sessions):
            await session.arun(f"x = {n}")
        await asyncio.sleep(2 * python_tool._LOOK_EVERY_S)
        monkeypatch.setattr(python_tool, "available_mb", lambda: 63)
        await sessions[0].arun("x += 10")  # the newest use, at the cost of 1 and 2
        monkeypatch.setattr(python_tool, "available_mb", lambda: 64)
        return [await s.arun("print(globals().get('x'))") for s in sessions]

    results = asyncio.run(main())
    lost = RESTARTED + "None\n"
    assert [r.output for r in results] == ["10\n", lost, lost, "3\n", "4\n"]
    assert {r.status for r in results} == {Status.OK}


def test_memory_is_not_read_for_every_cell_where_there_is_plenty(host, monkeypatch):
    looks = []
    monkeypatch.setattr(python_tool, "available_mb", lambda: looks.append(1) or 10**6)

    async def main():
        sessions = [PythonSession(LIMITS) for _ in range(2)]
        for _ in range(10):
            for session in sessions:
                host.begin(session)
                host.end(session)
        first = len(looks)
        await asyncio.sleep(2 * python_tool._LOOK_EVERY_S)
        host.begin(sessions[0])
        host.end(sessions[0])
        for session in sessions:
            session.close()
        return first, len(looks)

    assert asyncio.run(main()) == (1, 2)


def test_a_restart_is_told_within_the_limit_of_the_output(host):
    limits = Limits(output_chars=256)
    session = PythonSession(limits)
    asyncio.run(session.arun("x = 1"))
    session._evict()
    output = asyncio.run(session.arun("print('y' * 999)")).output
    assert output.startswith(RESTARTED) and len(output) <= 256
    session.close()
    python_tool._hosts[python_tool._key(limits, (), {})].sandbox.close()


def test_slots_survive_cancelled_waits_and_many_loops():
    slots = _Slots(1)

    async def hold(seconds):
        async with slots:
            await asyncio.sleep(seconds)

    async def main():
        holder = asyncio.ensure_future(hold(0.05))
        waiters = [asyncio.ensure_future(hold(0)) for _ in range(10)]
        await asyncio.sleep(0.01)
        for waiter in waiters[::2]:
            waiter.cancel()
        await asyncio.gather(holder, *waiters, return_exceptions=True)

    threads = [threading.Thread(target=asyncio.run, args=(main(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert slots._free == 1 and not slots._waiting


def test_slots_times_memory_fit_the_node():
    for memory in (16, 256, 1024):
        slots = cell_slots(Limits(memory_mb=memory))
        assert slots == 1 or slots * memory <= available_mb() * 0.55
    assert cell_slots(Limits(memory_mb=10**9)) == 1
    assert 0 < available_mb() < 10**8


@pytest.mark.parametrize(("version", "room"), [("2", 50), ("1", 50), ("unlimited", None)])
def test_a_container_s_limit_counts(version, room, tmp_path, monkeypatch):
    groups = [(tmp_path, *names) for _, *names in python_tool._CONTROL_GROUPS]
    _, limit, used, cache = groups[version == "1"]
    node = available_mb()
    (tmp_path / limit).write_text("max\n" if room is None else f"{100 << 20}\n")
    (tmp_path / used).write_text(f"{70 << 20}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\n{cache} {20 << 20}\n")
    monkeypatch.setattr(python_tool, "_CONTROL_GROUPS", groups)
    if room is None:
        assert available_mb() > node / 2
    else:
        assert available_mb() == room and cell_slots(Limits(memory_mb=16)) == 1
