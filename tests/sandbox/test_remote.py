"""The SandboxFusion client, against a service that speaks the protocol and runs the code."""

import asyncio
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rllib_gtpo.errors import ConfigError
from rllib_gtpo.sandbox import Limits, SandboxUnavailable, Status
from rllib_gtpo.sandbox.backend import SandboxBackend
from rllib_gtpo.sandbox.guarantees import NAMES
from rllib_gtpo.sandbox.remote import RemoteSandbox
from tests.sandbox.fusion import Fusion

LIMITS = Limits(cpu_seconds=1, wall_seconds=5, output_chars=400)


@pytest.fixture
def service():
    with Fusion() as fusion:
        thread = threading.Thread(target=fusion.serve_forever, args=(0.02,))
        thread.start()
        yield fusion
        fusion.shutdown()
        thread.join()


@pytest.fixture
def sandbox(service):
    with RemoteSandbox(service.url, LIMITS, backoff=0.01) as sandbox:
        yield sandbox


@pytest.mark.parametrize(
    ("code", "status", "output"),
    [
        ("print(1 + 1)", "ok", "2\n"),
        ("", "ok", ""),
        ("exit(3)", "error", ""),
        (
            "1/0",
            "error",
            'Traceback (most recent call last):\n  File "<cell>", line 1, in <module>\n    1/0\n',
        ),
        ("raise MemoryError", "memory", "Traceback"),
        ("import os; os.kill(os.getpid(), 9)", "killed", "[Killed by signal 9.]\n"),
        ("print('\\u00e9 \\U0001d54f')", "ok", "\u00e9 \U0001d54f\n"),
        ("import sys\nprint(1, file=sys.stderr); print(2)", "ok", "2\n1\n"),
        ("input()", "error", "Traceback"),
        ("x = '\ud800'", "error", "UnicodeEncodeError: 'utf-8' codec can't encode"),
    ],
)
def test_status_and_output(sandbox, code, status, output):
    result = sandbox.run(code)
    assert (result.status, result.output[: len(output)]) == (status, output)
    assert output or result.output == ""


def test_long_output_is_clipped_as_in_the_local_sandbox(sandbox):
    output = sandbox.run("print('x' * 5000 + 'end')").output
    assert len(output) <= 400 and " omitted] ...\n" in output and output.endswith("xend\n")


def test_what_is_asked_of_the_service(service):
    with RemoteSandbox(service.url + "/run_code/", LIMITS, headers={"X-Token": "t"}) as sandbox:
        sandbox.run("1")
    assert service.requests == [{"code": "1", "language": "python", "run_timeout": 5}]
    assert service.headers[0]["X-Token"] == "t"


def test_a_timeout_says_so_and_keeps_what_was_printed(service):
    limits = Limits(cpu_seconds=0.5, wall_seconds=0.7)
    with RemoteSandbox(service.url, limits) as sandbox:
        result = sandbox.run("print('before', flush=True)\nwhile True: pass")
    assert result.status is Status.TIMEOUT
    assert result.output == "before\n[Timed out after 0.7 s.]\n" and result.wall_seconds > 0.6


def test_connections_are_reused(service, sandbox):
    for n in range(5):
        assert sandbox.run(f"print({n})").output == f"{n}\n"
    assert service.connections == 1


def test_a_connection_that_the_service_closed_is_replaced(service, sandbox):
    service.faults.append(lambda h: (h.answer(200, {}), setattr(h, "close_connection", True)))
    with pytest.raises(SandboxUnavailable):
        RemoteSandbox(service.url, LIMITS, attempts=1).run("1")
    sandbox.run("1")
    sandbox._idle[0].sock.shutdown(socket.SHUT_RDWR)
    assert sandbox.run("print(2)").output == "2\n"
    assert len(service.requests) == 3  # no attempt was lost


def test_concurrency_is_bounded(service):
    async def main():
        with RemoteSandbox(service.url, LIMITS, concurrency=2) as sandbox:
            code = "import time; time.sleep(.1); print({})"
            return await asyncio.gather(*(sandbox.arun(code.format(n)) for n in range(6)))

    assert [r.output for r in asyncio.run(main())] == [f"{n}\n" for n in range(6)]
    assert service.most == 2


def test_many_threads_and_loops(sandbox):
    with ThreadPoolExecutor(8) as pool:
        outputs = pool.map(lambda n: asyncio.run(sandbox.arun(f"print({n})")).output, range(16))
    assert list(outputs) == [f"{n}\n" for n in range(16)]


def busy(handler):
    handler.answer(429, {"detail": "busy"}, Retry_After="1")


def broken(handler):
    handler.answer(500, {"detail": "oops"})


def garbage(handler):
    handler.answer(200, b"<html>")


def other(handler):
    handler.answer(200, {"status": "Success", "run_result": {"status": "Weird"}})


def bare(handler):
    handler.answer(200, ["Success"])


def failed(handler):
    run = {"status": "Error", "stderr": "no space left"}
    handler.answer(200, {"status": "SandboxError", "message": "disk", "run_result": run})


def hang_up(handler):
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def cut(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"status": "Suc')
    handler.close_connection = True


@pytest.mark.parametrize("fault", [broken, garbage, other, bare, failed, hang_up, cut])
def test_a_fault_that_passes_is_not_seen(service, sandbox, fault):
    service.faults.extend([fault, fault])
    assert sandbox.run("print(1)").output == "1\n"
    assert len(service.requests) == 3


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (broken, "HTTP 500: .*oops"),
        (garbage, "no answer of SandboxFusion: '<html>'"),
        (other, "no answer of SandboxFusion"),
        (failed, "the service failed: disk"),
        (hang_up, "RemoteDisconnected"),
        (cut, "IncompleteRead"),
    ],
)
def test_a_fault_that_stays_is_unavailable(service, sandbox, fault, problem):
    service.faults.extend([fault] * 4)
    with pytest.raises(SandboxUnavailable, match=f"{service.url} gave up .*4 attempts.*{problem}"):
        sandbox.run("print(1)")
    assert len(service.requests) == 4


def test_the_service_says_when_to_come_back(service, sandbox):
    service.faults.append(busy)
    began = time.monotonic()
    assert sandbox.run("print(1)").output == "1\n"
    assert time.monotonic() - began > 0.9


def test_a_refusal_is_not_tried_again(service):
    with (
        RemoteSandbox(service.url + "/elsewhere", LIMITS) as sandbox,
        pytest.raises(SandboxUnavailable, match=r"HTTP 404.*is the address right"),
    ):
        sandbox.run("1")
    assert len(service.requests) == 1


def test_a_service_that_hangs(service):
    limits = Limits(cpu_seconds=0.1, wall_seconds=0.2)
    release = threading.Event()
    service.faults.extend([lambda h: release.wait(5)] * 2)
    with RemoteSandbox(service.url, limits, attempts=2, grace_seconds=0.1, backoff=0) as sandbox:
        with pytest.raises(SandboxUnavailable, match=r"no answer in 0.3 s"):
            sandbox.run("1")
        release.set()


def test_a_service_that_drips(service):
    def drip(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(50):
            handler.wfile.write(b" ")
            time.sleep(0.05)

    service.faults.append(drip)
    limits = Limits(cpu_seconds=0.1, wall_seconds=0.2)
    with RemoteSandbox(service.url, limits, attempts=1, grace_seconds=0.1) as sandbox:
        began = time.monotonic()
        with pytest.raises(SandboxUnavailable, match="no answer in"):
            sandbox.run("1")
        assert time.monotonic() - began < 2


def test_nobody_there():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with (
        RemoteSandbox(f"http://127.0.0.1:{port}", attempts=2, backoff=0.01) as sandbox,
        pytest.raises(SandboxUnavailable, match="refused"),
    ):
        sandbox.run("1")


def test_an_answer_of_any_size_is_bounded(service):
    with RemoteSandbox(service.url, Limits(max_output_mb=0.5)) as sandbox:
        result = sandbox.run("print('x' * (1 << 20))")
        assert result.status is Status.OUTPUT_LIMIT
        assert result.output == "[Killed: printed more than 0.5 MB.]\n"
        assert sandbox.run("print(1)").output == "1\n"


def test_cancelling_drops_the_request(service):
    held = threading.Event()
    service.faults.append(lambda h: held.wait(5))

    async def main():
        with RemoteSandbox(service.url, LIMITS, concurrency=1) as sandbox:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(sandbox.arun("1"), 0.2)
            return await sandbox.arun("print(2)")  # the one slot is free at once

    began = time.monotonic()
    assert asyncio.run(main()).output == "2\n"
    assert time.monotonic() - began < 3
    held.set()


def test_close_ends_what_waits(service):
    held = threading.Event()
    service.faults.append(lambda h: held.wait(5))
    sandbox = RemoteSandbox(service.url, LIMITS, concurrency=1)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(sandbox.run, "1") for _ in range(2)]
        time.sleep(0.1)
        sandbox.close()
        for future in waiting:
            with pytest.raises(SandboxUnavailable, match="closed"):
                future.result(2)
    sandbox.close()
    held.set()
    with pytest.raises(SandboxUnavailable, match="closed"):
        sandbox.run("1")


def test_sessions_are_refused_with_the_alternative(sandbox):
    with pytest.raises(SandboxUnavailable, match="stateful=False"):
        sandbox.session()


def test_it_is_a_backend_that_promises_nothing(sandbox):
    assert isinstance(sandbox, SandboxBackend)
    assert sandbox.guarantees.keys() == NAMES and not any(sandbox.guarantees.values())


@pytest.mark.parametrize(
    ("url", "options", "problem"),
    [
        ("sandbox:8080", {}, "http://HOST:PORT"),
        ("ftp://sandbox", {}, "http://HOST:PORT"),
        ("http://sandbox", {"concurrency": 0}, "concurrency"),
        ("http://sandbox", {"attempts": 0}, "attempts"),
    ],
)
def test_bad_settings_are_refused(url, options, problem):
    with pytest.raises(ConfigError, match=problem):
        RemoteSandbox(url, **options)


def test_threads_end_with_the_work(sandbox):
    sandbox.run("1")
    names = [t.name for t in threading.enumerate()]
    deadline = time.monotonic() + 2
    while "remote-sandbox" in names and time.monotonic() < deadline:
        time.sleep(0.01)
        names = [t.name for t in threading.enumerate()]
    assert "remote-sandbox" not in names
