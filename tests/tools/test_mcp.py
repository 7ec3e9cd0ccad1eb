"""MCP servers as tools: real processes over standard streams and HTTP."""

import asyncio
import gc
import importlib.metadata
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from rllib_gtpo import ToolEnv
from rllib_gtpo.errors import ConfigError, EnvironmentFault
from rllib_gtpo.tools import MCPServer, ToolSchemaError, mcp_tools, run_calls
from rllib_gtpo.types import StopReason, ToolCall, ToolError
from tests.processes import gone, running

pytest.importorskip("mcp")

HERE = Path(__file__).parent
COMMAND = [sys.executable, str(HERE / "mcp_server.py")]
CLOCK = [str(Path(sys.executable).with_name("mcp-server-time")), "--local-timezone=UTC"]
# The same published server over HTTP: its command knows only the standard streams.
CLOCK_OVER_HTTP = (
    "import sys; from mcp_server_time.server import create_server; "
    "create_server('UTC').run('streamable-http', port=int(sys.argv[1]))"
)
TASK = {"question": "What time is 16:30 in Tokyo in UTC?", "answer": "07:30"}


def call(name: str, **arguments) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@contextmanager
def over_http(*command):
    """A server on a free port; the block may restart it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    running = []

    def start():
        process = subprocess.Popen([*command, str(port)], stderr=subprocess.DEVNULL)
        running.append(process)
        for _ in range(600):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    return process
            time.sleep(0.05)
        raise TimeoutError(command)

    start()
    try:
        yield f"http://127.0.0.1:{port}/mcp", running, start
    finally:
        for process in running:
            process.kill()
            process.wait()


def started(env: ToolEnv) -> ToolEnv:
    env.reset(options={"task": TASK})
    return env


def say(env: ToolEnv, name: str, **arguments):
    """The result of a turn with one call."""
    env.step(call(name, **arguments))
    return env.trajectory.turns[-1].results[0]


@pytest.fixture(scope="module")
def env():
    """An environment with the tools of one server, which lives as long as the module's tests."""

    class Testing(ToolEnv):
        tools = [MCPServer(COMMAND, timeout=20)]
        max_turns = 10_000

    made = started(Testing())
    yield made
    made.close()


class TestPublishedServer:
    """mcp-server-time, which somebody else wrote, with scripted turns."""

    def check(self, server):
        class Clock(ToolEnv):
            tools = [server]
            max_turns = 4

            def reward(self, trajectory, task):
                return {"accuracy": float(trajectory.answer == task["answer"])}

        env = Clock()
        observation, _ = env.reset(options={"task": TASK})
        shown = {tool["function"]["name"]: tool["function"] for tool in observation.tools}
        assert shown["convert_time"]["parameters"]["properties"]["time"]["type"] == "string"
        where = {"source_timezone": "Asia/Tokyo", "target_timezone": "UTC"}
        result = say(env, "convert_time", **where, time="16:30")
        assert result.error is None
        assert json.loads(result.content)["target"]["datetime"].endswith("T07:30:00+00:00")
        result = say(env, "convert_time", **where, time="25:00")
        assert result.error is ToolError.RAISED and "Invalid time format" in result.content
        result = say(env, "convert_time", **where)
        assert result.error is ToolError.INVALID
        assert result.content == "Error: missing argument 'time' of tool 'convert_time'"
        *_, terminated, _, _ = env.step("07:30")
        assert terminated and env.trajectory.correct
        assert env.trajectory.stop_reason is StopReason.ANSWER
        env.close()

    def test_over_stdio(self):
        self.check(MCPServer(command=CLOCK))
        assert all(gone(pid) for pid in running("mcp-server-time --local", parent=os.getpid()))

    def test_over_http(self):
        with over_http(sys.executable, "-c", CLOCK_OVER_HTTP) as (url, *_):
            self.check(MCPServer(url=url))


class TestAnswers:
    def test_what_is_no_text_is_noted(self, env):
        result = say(env, "picture")
        assert result.error is None
        assert result.content == "a dot:\n[image, image/png, 12 bytes: not shown]"

    def test_an_error_is_a_raise(self, env):
        result = say(env, "fail", how="on purpose")
        assert result.error is ToolError.RAISED
        assert result.content.startswith("Error: ") and "on purpose" in result.content

    def test_names_are_what_templates_can_show(self, env):
        assert say(env, "geometry_norm", point={"x": 3, "y": 4}).content == "5.0"

    @pytest.mark.parametrize(
        ("arguments", "problem"),
        [
            ({}, "missing argument 'point'"),
            ({"point": {"x": "3"}}, "argument 'point' of tool 'geometry_norm' ['x']: '3' is not"),
            ({"point": {"y": 3}}, "argument 'point' of tool 'geometry_norm': 'x' is a required"),
            ({"point": {"x": 3}, "power": 9}, "argument 'power' of tool 'geometry_norm': 9 is gr"),
            ({"point": {"x": 3}, "power": "2"}, "must be integer, got string '2'"),
            ({"point": {"x": 3}, "extra": 1}, "unknown argument 'extra'"),
        ],
    )
    def test_arguments_are_checked_against_the_servers_schema(self, env, arguments, problem):
        result = say(env, "geometry_norm", **arguments)
        assert result.error is ToolError.INVALID and problem in result.content

    def test_a_long_answer_loses_its_middle(self, env):
        result = say(env, "long", characters=5_000_000)
        assert len(result.content) == env.tool_output_chars
        assert result.content.startswith("axx") and result.content.endswith("xxz")

    def test_a_call_that_takes_too_long_is_a_timeout_and_the_next_one_works(self):
        class Short(ToolEnv):
            tools = [MCPServer(COMMAND, timeout=0.3, include=["sleep", "pid"])]

        env = started(Short())
        assert {t["function"]["name"] for t in env.tool_schemas} == {"sleep", "pid"}
        assert say(env, "pid").error in (None, ToolError.TIMEOUT)  # while the server starts
        result = say(env, "sleep", seconds=60)
        assert (result.error, result.content) == (ToolError.TIMEOUT, "Error: timed out after 0.3 s")
        assert result.seconds < 5
        assert say(env, "pid").error is None
        env.close()


class TestConnections:
    def test_calls_of_many_trajectories_overlap_on_one_server(self, env):
        envs = [started(type(env)()) for _ in range(20)]

        async def all_at_once():
            await asyncio.gather(*(e.astep(call("sleep", seconds=1.0) * 2) for e in envs))

        began = time.monotonic()
        asyncio.run(all_at_once())
        assert time.monotonic() - began < 10  # one after the other it takes 40 s
        pids = {say(e, "pid").content for e in [*envs, env]}
        assert len(pids) == 1
        for other in envs:
            other.close()
        assert say(env, "pid").content in pids  # somebody needs it still

    def test_a_dead_server_is_started_again(self, env):
        pid = int(say(env, "pid").content)
        say(env, "count")
        os.kill(pid, signal.SIGKILL)
        assert gone(pid)
        time.sleep(0.2)
        result = say(env, "count")
        assert (result.error, result.content) == (None, "1")
        assert say(env, "pid").content != str(pid)

    def test_a_call_that_ends_the_server_is_not_repeated(self, env):
        pid = say(env, "pid").content
        result = say(env, "crash")
        assert result.error is ToolError.CRASHED
        assert (
            result.content
            == "Error: the tool's server stopped during the call; it was started anew"
        )
        assert say(env, "pid").content != pid

    def test_a_trajectory_may_have_a_server_of_its_own(self):
        class Own(ToolEnv):
            tools = [MCPServer(COMMAND, per_trajectory=True, include=["count", "pid"], timeout=30)]
            max_turns = 100

        one, other = started(Own()), started(Own())
        say(one, "count")
        assert say(one, "count").content == "2"
        assert say(other, "count").content == "1"
        pids = [int(say(e, "pid").content) for e in (one, other)]
        assert pids[0] != pids[1]
        started(one)  # the next trajectory of the same environment
        assert gone(pids[0])
        assert say(one, "count").content == "1"
        pids[0] = int(say(one, "pid").content)
        one.close()
        assert gone(pids[0]) and say(other, "count").content == "2"
        del other  # without close()
        gc.collect()
        assert gone(pids[1])

    def test_the_last_environment_to_leave_ends_the_server(self):
        class Last(ToolEnv):
            tools = [MCPServer(COMMAND, env={"ONLY": "HERE"}, timeout=30)]
            max_turns = 100

        one, other = started(Last()), started(Last())
        pids = {int(say(e, "pid").content) for e in (one, other)}
        assert len(pids) == 1
        one.close()
        assert say(other, "pid").error is None
        other.close()
        assert gone(*pids)
        assert say(other, "count").content == "1"  # whoever needs it again gets a new one
        other.close()

    def test_a_command_gets_its_directory_and_variables(self, tmp_path):
        program = tmp_path / "serve"
        program.write_text('#!/bin/sh\nexec "$INTERPRETER" "$SERVER"\n')
        program.chmod(0o755)
        variables = dict(zip(("INTERPRETER", "SERVER"), COMMAND, strict=True))
        tools = mcp_tools(["./serve"], cwd=str(tmp_path), env=variables, include=["pid"])
        pid = int(asyncio.run(tools[0].fn()).content)
        assert os.readlink(f"/proc/{pid}/cwd") == str(tmp_path)

    def test_headers_reach_the_server(self):
        seen = []

        class Refuse(BaseHTTPRequestHandler):
            def do_POST(self):
                seen.append(self.headers["Authorization"])
                self.send_error(401)

            def log_message(self, *_):
                pass

        with HTTPServer(("127.0.0.1", 0), Refuse) as server:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            with pytest.raises(EnvironmentFault, match="does not start"):
                mcp_tools(
                    url=f"http://127.0.0.1:{server.server_port}/mcp",
                    headers={"Authorization": "Bearer hush"},
                )
            server.shutdown()
        assert set(seen) == {"Bearer hush"}

    def test_over_http_a_restarted_server_is_found_again(self):
        with over_http(*COMMAND) as (url, running, start):

            class Remote(ToolEnv):
                tools = [MCPServer(url=url, include=["count", "crash", "picture"])]
                max_turns = 100

            env = started(Remote())
            assert [say(env, "count").content for _ in range(2)] == ["1", "2"]
            running[-1].kill()
            running[-1].wait()
            with pytest.raises(EnvironmentFault, match=f"MCP server '{url}' does not start"):
                say(env, "count")
            start()
            assert say(env, "count").content == "1"
            assert "[image, image/png" in say(env, "picture").content
            env.close()

    def test_tools_can_go_to_other_processes(self):
        tools = mcp_tools(COMMAND, prefix="t_", include=["count", "geometry.norm"], output_chars=50)
        tools = {tool.name: tool for tool in pickle.loads(pickle.dumps(tools))}
        assert set(tools) == {"t_count", "t_geometry_norm"}
        assert {tool.output_chars for tool in tools.values()} == {50}
        calls = [ToolCall("t_count", {"by": 3}), ToolCall("t_geometry_norm", {"point": {"x": "a"}})]
        results = asyncio.run(run_calls(tools, calls, timeout=30, output_chars=100))
        assert results[0].error is None and results[1].error is ToolError.INVALID


ENDING = """
    import os, sys, time
    from rllib_gtpo.tools import mcp_tools
    import asyncio
    tools = {{t.name: t for t in mcp_tools({command!r})}}
    print(asyncio.run(tools["linger"].fn()).content, flush=True)
    {end}
"""


@pytest.mark.parametrize("end", ["sys.exit(1)", "time.sleep(60)"])
def test_no_server_outlives_its_process(end):
    code = textwrap.dedent(ENDING.format(command=COMMAND, end=end))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    if "sleep" in end:
        process.kill()
    assert process.wait(timeout=30) == (-signal.SIGKILL if "sleep" in end else 1)
    assert gone(pid)


class TestRefusals:
    @pytest.mark.parametrize(
        ("command", "reason"),
        [
            (
                ["no-such-server", "--x"],
                "'no-such-server --x' does not start: .*'no-such-server' was",
            ),
            (
                [sys.executable, "-c", "import sys; sys.exit('no licence')"],
                r"(?s)does not start: .*\nIts stderr ended with:\nno licence",
            ),
            ([sys.executable, "-c", "print('hello')"], "does not start: "),
        ],
    )
    def test_a_server_that_does_not_start(self, command, reason):
        with pytest.raises(EnvironmentFault, match=reason):
            mcp_tools(command)

    def test_a_server_that_says_nothing_is_given_up_and_ended(self):
        silent = [sys.executable, "-c", "import time; time.sleep(60)", "is silent"]
        with pytest.raises(EnvironmentFault, match=r"no answer in 0\.5 s: raise start_timeout"):
            mcp_tools(silent, start_timeout=0.5)
        assert all(gone(pid) for pid in running("is silent", parent=os.getpid()))

    def test_nobody_at_the_address(self):
        with pytest.raises(EnvironmentFault, match=r"'http://127\.0\.0\.1:9/mcp' does not start"):
            mcp_tools(url="http://127.0.0.1:9/mcp")

    def test_two_tools_of_one_name(self, env):
        def pid() -> str:
            """Mine."""
            return ""

        class Both(ToolEnv):
            tools = [pid, *type(env).tools]

        clash = r"two tools named 'pid': <function .*pid.*> and MCPServer\('.*mcp_server.py'\)"
        with pytest.raises(ToolSchemaError, match=clash + r".*MCPServer\(prefix=\.\.\.\)"):
            Both().reset(options={"task": TASK})

        class Apart(ToolEnv):
            tools = [pid, MCPServer(COMMAND, prefix="theirs_")]

        observation, _ = Apart().reset(options={"task": TASK})
        assert {"pid", "theirs_pid"} < {t["function"]["name"] for t in observation.tools}

    @pytest.mark.parametrize(
        ("settings", "problem"),
        [
            ({}, "either a command or a url"),
            ({"command": ["x"], "url": "http://x/mcp"}, "either a command or a url"),
            ({"command": "mcp-server-time"}, "must be a list"),
            ({"command": []}, "must be a list"),
            ({"url": "localhost:80"}, "must look like http://"),
            ({"url": "http://x/mcp", "env": {"A": "b"}}, "env and cwd are for a command"),
            ({"command": ["x"], "headers": {"A": "b"}}, "headers are for a url"),
            ({"command": ["x"], "prefix": "my tools"}, "prefix='my tools'"),
            ({"command": ["x"], "env": {"A": 1}}, "the value of 'A' must be text, not 1"),
            ({"command": ["x"], "timeout": 0}, "timeout=0 must be"),
        ],
    )
    def test_settings_that_cannot_stand(self, settings, problem):
        with pytest.raises(ConfigError, match=problem):
            MCPServer(**settings)

    def test_a_tool_that_the_server_does_not_have(self, env):
        with pytest.raises(ConfigError, match="include has 'cuont'; did you mean 'count'"):
            mcp_tools(COMMAND, include=["cuont"])

    def test_per_trajectory_needs_trajectories(self):
        with pytest.raises(ConfigError, match=r"tools = \[MCPServer"):
            mcp_tools(COMMAND, per_trajectory=True)

    @pytest.mark.parametrize("found", [None, "1.30.0"])
    def test_without_the_sdk(self, monkeypatch, found):
        def version(name):
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(importlib.metadata, "version", version)
        with pytest.raises(ConfigError, match=r"pip install 'rllib-gtpo\[mcp\]'"):
            MCPServer(COMMAND)

    def test_secrets_are_not_shown(self):
        server = MCPServer(COMMAND, env={"TOKEN": "hush"})
        assert "hush" not in f"{server!r} {server.address}"
