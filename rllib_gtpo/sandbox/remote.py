"""A client of SandboxFusion (or any service that speaks its `POST /run_code`) as a sandbox.

    with RemoteSandbox("http://sandbox:8080") as sandbox:
        sandbox.run("print(1 + 1)").output

What differs from `PythonSandbox`, because of the protocol:

- There are no sessions: the service runs every request by itself.  Replaying a session's earlier
  cells would draw other random numbers, read other clocks and take as long again with every cell,
  so `session` refuses and says what to use instead.
- Only wall time can be limited; the service is asked for `Limits.wall`.  CPU time is not reported
  (`cpu_seconds` is 0).
- Memory, files and open descriptors are what the service is configured for.  Its `memory_limit_MB`
  is not sent: it also bounds the stack of every thread, so that code with threads would fail.
- Standard error follows standard output: their order is not reported.
- Nothing is known to be enforced: see the service's own documentation for its isolation.

Standard library only.  Works from any thread and any event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import math
import os
import random
import re
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import NoReturn, Self
from urllib.parse import urlsplit

from rllib_gtpo.errors import ConfigError
from rllib_gtpo.sandbox import guarantees
from rllib_gtpo.sandbox.limits import Limits, SandboxResult, SandboxUnavailable, Status
from rllib_gtpo.sandbox.output import Output, clip

MAX_DELAY = 30.0  # seconds between attempts, also where the service asks for more
RETRIED = (429, 500, 502, 503, 504)
_SCRIPT = re.compile(r'File "/[^"\n]*/tmp\w{8}\.py"')  # where the service put the code


class _Retry(Exception):
    """An attempt failed in a way that another may not."""

    def __init__(self, problem: str, delay: float = 0.0) -> None:
        super().__init__(problem)
        self.delay = delay


@dataclass(eq=False)
class _Job:
    """One piece of code on its way through the service."""

    code: str
    future: Future[SandboxResult] = field(default_factory=Future)
    dropped: threading.Event = field(default_factory=threading.Event)  # nobody waits any more
    sock: socket.socket | None = None

    def drop(self) -> None:
        """Stop waiting for the service; the service ends the code at its time limit."""
        self.future.cancel()
        self.dropped.set()
        if (sock := self.sock) is not None:
            with contextlib.suppress(OSError):  # it has ended meanwhile
                sock.shutdown(socket.SHUT_RDWR)


class RemoteSandbox:
    """Runs each piece of code by itself on a SandboxFusion service.  See the module."""

    def __init__(
        self,
        url: str,
        limits: Limits | None = None,
        *,
        concurrency: int = 64,
        attempts: int = 4,
        backoff: float = 0.5,
        grace_seconds: float = 60.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Remember where the service is; the first execution connects.

        Args:
            url: The service's address, with or without the final /run_code.
            limits: Bounds of every execution, as far as the protocol can express them.
            concurrency: Requests at one time; more of them wait here.  Match it to the service.
            attempts: How often an execution is tried at HTTP 429 and 5xx, lost connections, and
                answers that are no SandboxFusion answers.  The code may then run more than once.
            backoff: Seconds before the second attempt; twice as long before each further one.
            grace_seconds: What an answer may take beyond the code's own time (the service's queue).
            headers: Sent with each request, such as Authorization.

        Raises:
            ConfigError: The address or a number cannot be used.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"url={url!r}: give http://HOST:PORT or https://HOST:PORT.")
        for name, value in (("concurrency", concurrency), ("attempts", attempts)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")
        self.limits = limits or Limits()
        self.url = url
        path = parts.path.rstrip("/")
        self._path = path if path.endswith("/run_code") else path + "/run_code"
        self._address = (parts.hostname, parts.port)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        self._concurrency, self._attempts, self._backoff = concurrency, attempts, backoff
        self._timeout = self.limits.wall + grace_seconds
        self._lock = threading.Lock()
        self._waiting: deque[_Job] = deque()
        self._running: set[_Job] = set()
        self._threads = 0
        self._idle: list[http.client.HTTPConnection] = []
        self._closed = False
        self._pid = os.getpid()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(self, code: str) -> SandboxResult:
        """Run `code` and wait.  Never raises for what the code does.

        Raises:
            SandboxUnavailable: The service cannot run code.
        """
        job = self._submit(code)
        try:
            return job.future.result()
        except BaseException:
            job.drop()
            raise

    async def arun(self, code: str) -> SandboxResult:
        """Like `run`, without blocking the event loop; cancelling it drops the request."""
        job = self._submit(code)
        try:
            return await asyncio.wrap_future(job.future)
        except BaseException:
            job.drop()
            raise

    def session(self) -> NoReturn:
        """Refuse, see the module.

        Raises:
            SandboxUnavailable: Always.
        """
        raise SandboxUnavailable(
            f"{self.url} keeps no names between requests, so it has no sessions: run each call by "
            "itself (PythonSession(..., stateful=False)), or use the local sandbox."
        )

    @property
    def guarantees(self) -> Mapping[str, bool]:
        """Nothing is known of what the service enforces."""
        return guarantees.report(())

    def close(self) -> None:
        """Drop what runs and close the connections; may be called again."""
        with self._lock:
            self._closed = True
            jobs = [*self._waiting, *self._running]
            self._waiting.clear()
            idle, self._idle = self._idle, []
        for job in jobs:
            _fail(job, "This sandbox is closed.")
            job.drop()
        for connection in idle:
            connection.close()

    # Threads: as many as there are requests, none when idle.

    def _submit(self, code: str) -> _Job:
        job = _Job(code)
        if os.getpid() != self._pid:
            raise SandboxUnavailable("This sandbox belongs to the parent process: make one here.")
        with self._lock:
            if self._closed:
                raise SandboxUnavailable("This sandbox is closed.")
            self._waiting.append(job)
            if self._threads < self._concurrency:
                self._threads += 1
                threading.Thread(target=self._work, name="remote-sandbox", daemon=True).start()
        return job

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                job = self._waiting.popleft()
                self._running.add(job)
            try:
                result = self._try(job)
                with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
                    job.future.set_result(result)
            except Exception as error:
                known = isinstance(error, SandboxUnavailable)
                _fail(job, str(error) if known else f"{type(error).__name__}: {error}")
            with self._lock:
                self._running.discard(job)

    def _try(self, job: _Job) -> SandboxResult:
        """Run the job, several times if need be."""
        try:
            job.code.encode()
        except UnicodeEncodeError as error:  # the service could not write it to a file
            return SandboxResult(Status.ERROR, f"UnicodeEncodeError: {error}\n", 0.0, 0.0)
        for attempt in range(self._attempts):
            try:
                return self._attempt(job)
            except _Retry as retry:
                problem = str(retry)
                wait = self._backoff * 2**attempt * random.uniform(0.75, 1.25)
                wait = min(max(wait, retry.delay), MAX_DELAY)
            if attempt + 1 < self._attempts and job.dropped.wait(wait):
                break
        times = f"after {self._attempts} attempts" if self._attempts > 1 else "at once"
        raise SandboxUnavailable(f"{self.url} gave up {times}: {problem}")

    def _attempt(self, job: _Job) -> SandboxResult:
        connection = self._connection()
        reusable = False
        try:
            status, headers, body, reusable = self._post(connection, job)
        except (OSError, http.client.HTTPException) as error:
            if job.dropped.is_set():
                raise SandboxUnavailable("This execution was cancelled.") from None
            late = isinstance(error, TimeoutError)
            problem = f"no answer in {self._timeout:g} s" if late else repr(error)
            raise _Retry(problem) from None
        finally:
            job.sock = None
            if reusable and not self._closed:
                self._idle.append(connection)
            else:
                connection.close()
        if status != 200:
            problem = f"HTTP {status}: {clip((body or b'').decode(errors='replace'), 300)}"
            if status in RETRIED:
                after = headers.get("Retry-After", "")
                raise _Retry(problem, float(after) if after.isdecimal() else 0.0)
            raise SandboxUnavailable(f"{self.url} refused: {problem}; is the address right?")
        if body is None:
            note = f"[Killed: printed more than {self.limits.max_output_mb:g} MB.]\n"
            return SandboxResult(Status.OUTPUT_LIMIT, note, 0.0, 0.0)
        return to_result(body, self.limits)

    def _connection(self) -> http.client.HTTPConnection:
        """One that is open and silent, or a new one."""
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:
                break
            poll = select.poll()
            poll.register(connection.sock, select.POLLIN)
            if not poll.poll(0):
                return connection
            connection.close()  # the service has hung up meanwhile
        if self._tls is not None:
            return http.client.HTTPSConnection(*self._address, context=self._tls)
        return http.client.HTTPConnection(*self._address)

    def _post(
        self, connection: http.client.HTTPConnection, job: _Job
    ) -> tuple[int, http.client.HTTPMessage, bytes | None, bool]:
        """Send the code; returns status, headers, body, and whether the connection is reusable.

        The body is None if it is longer than `Limits.max_output_mb`.
        """
        end = time.monotonic() + self._timeout
        if connection.sock is None:
            connection.timeout = min(self._timeout, 10.0)
            connection.connect()
        sock = job.sock = connection.sock
        if job.dropped.is_set():
            raise ConnectionAbortedError
        sock.settimeout(self._timeout)
        request = {"code": job.code, "language": "python", "run_timeout": self.limits.wall}
        connection.request("POST", self._path, json.dumps(request).encode(), self._headers)
        response = connection.getresponse()
        body = bytearray()
        most = int(self.limits.max_output_mb * (1 << 20))
        while chunk := response.read1(1 << 16):
            body += chunk
            if len(body) > most:
                return response.status, response.headers, None, False
            if time.monotonic() > end:
                raise TimeoutError
        if response.length:
            raise http.client.IncompleteRead(bytes(body))
        response.close()  # `read1` leaves it open, and the connection taken
        return response.status, response.headers, bytes(body), not response.will_close


def to_result(body: bytes, limits: Limits) -> SandboxResult:
    """The answer of a service as our result.

    Raises:
        _Retry: It is no answer, or says that the service itself failed.
    """
    try:
        reply = json.loads(body)
        run = reply.get("run_result") or {}
        if reply["status"] == "SandboxError" or run.get("status") == "Error":
            problem = reply.get("message") or run.get("stderr") or "no message"
            raise _Retry(f"the service failed: {clip(str(problem), 300)}")
        seconds = float(run.get("execution_time") or 0.0)
        seconds = seconds if 0 <= seconds < math.inf else 0.0
        stdout, stderr = run.get("stdout") or "", run.get("stderr") or ""
        text = (stdout + stderr).encode("utf-8", "backslashreplace").decode()
        status, note = _judge(run["status"], run.get("return_code"), stderr, limits)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        answer = clip(body.decode(errors="replace"), 300)
        raise _Retry(f"this is no answer of SandboxFusion: {answer!r}") from None
    output = Output(limits.output_chars)
    output.feed(_SCRIPT.sub('File "<cell>"', text).encode())
    return SandboxResult(status, output.take("", note + "\n" if note else ""), 0.0, seconds)


def _judge(ended: str, code: int | None, stderr: str, limits: Limits) -> tuple[Status, str]:
    if ended == "TimeLimitExceeded":
        return Status.TIMEOUT, f"[Timed out after {limits.wall:g} s.]"
    if ended != "Finished" or not isinstance(code, int):
        raise ValueError(ended)
    if code == 0:
        return Status.OK, ""
    if code < 0 or code in (134, 137, 139):  # of the process, or as its shell reports it
        return Status.KILLED, f"[Killed by signal {-code if code < 0 else code - 128}.]"
    last = stderr.rstrip().rpartition("\n")[2]
    return (Status.MEMORY if last.split(":")[0] == "MemoryError" else Status.ERROR), ""


def _fail(job: _Job, problem: str) -> None:
    with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
        job.future.set_exception(SandboxUnavailable(problem))
