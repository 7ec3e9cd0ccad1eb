"""Executions and sessions on one zygote: queueing, deadlines, outcomes.  Hub's thread only."""

from __future__ import annotations

import fcntl
import itertools
import math
import os
import signal
import socket
import struct
import termios
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from rllib_gtpo.sandbox.cells import (
    CLOSED,
    CODES,
    Cell,
    Job,
    SessionState,
    cpu_time,
    has_threads,
    judge,
    memory_file,
    queued_time,
    wants_a_core,
)
from rllib_gtpo.sandbox.child import INLINE, REPLY
from rllib_gtpo.sandbox.hub import Hub
from rllib_gtpo.sandbox.limits import (
    RESTARTED,
    Limits,
    SandboxResult,
    SandboxUnavailable,
    Status,
)
from rllib_gtpo.sandbox.spawn import ZygoteProcess

CORES = os.cpu_count() or 1  # how much faster than the clock CPU time may pass
LOOK_AGAIN = 0.1  # seconds after which code that ran at the end of its wall time is looked at anew
KILL_SECONDS = 10.0  # how long a kill may take before the zygote itself counts as stuck
OVER_LIMIT = {  # what the zygote's watchdog reports
    b"D": (Status.DISK_LIMIT, "disk_mb", "MB of disk or too many files"),
    b"T": (Status.KILLED, "threads", "threads"),
}
CLOSED_SECONDS = 0.5  # how long a report of death may come after the end of the socket


class Pool:
    """See the module.  Other threads reach these methods only through `hub.post`."""

    def __init__(
        self,
        limits: Limits,
        workers: int,
        preload: Sequence[str],
        patience: float,
        layers: str,
        degraded: bool,
    ) -> None:
        """Start the hub; the zygote starts with the first `start` or job.

        It may say nothing for `patience` seconds, at its start or later, while it should fork.
        """
        self.limits, self.workers, self.preload = limits, workers, tuple(preload)
        self.patience, self.layers, self.degraded = patience, layers, degraded
        self.restarts = 0  # zygotes lost and replaced
        self.reruns = 0  # runs that such a loss ended and that ran again
        self.closed = ""  # why nothing runs any more
        self.zygote: ZygoteProcess | None = None
        self._started = False
        self._cells: dict[int, Cell] = {}
        self._numbers = itertools.count(1)
        self._waiting: deque[Job] = deque()  # fresh runs beyond `workers`
        self._fresh = 0
        self._listening = False
        self._ready: list[Future[dict[str, Any]]] = []
        self.hub = Hub(lambda error: self._crash(error))

    def start(self, ready: Future[dict[str, Any]]) -> None:
        """Start the zygote; `ready` gets its `facts` when the preload is imported, or fails."""
        self._ready.append(ready)
        try:
            self._ensure_zygote()
        except (OSError, SandboxUnavailable) as error:
            self._zygote_ready(str(error))

    def submit(self, job: Job) -> None:
        """Run `job` in a process of its own as soon as a worker is free."""
        if self.closed:
            return job.fail(self.closed)
        self._waiting.append(job)
        self._start_waiting()

    def submit_cell(self, session: SessionState, job: Job) -> None:
        """Run `job` as the session's next cell."""
        if self.closed or session.closed:
            return job.fail(self.closed or "This session is closed.")
        session.jobs.append(job)
        self._next_cell(session)

    def open_session(self, session: SessionState) -> None:
        """Fork the session's process ahead of its first cell; errors wait for that cell."""
        if not self.closed and session.cell is None and not session.closed:
            try:
                session.cell = self._fork(session, None)
            except (OSError, SandboxUnavailable):
                return

    def close_session(self, session: SessionState) -> None:
        """Kill the session's process and fail what it still had to run."""
        session.closed = True
        cell = session.cell
        if cell is not None and cell.job is not None:
            cell.job.fail("This session was closed while its code ran.")
            cell.job = None
        while session.jobs:
            session.jobs.popleft().fail("This session is closed.")
        if cell is not None:
            self._kill(cell, Status.KILLED, "")

    def cancel(self, job: Job) -> None:
        """Nobody waits for `job` any more: kill its process, or forget it."""
        for cell in self._cells.values():
            if cell.job is job:
                return self._kill(cell, Status.KILLED, "[Cancelled.]")
        if job in self._waiting:
            self._waiting.remove(job)

    def close(self, reason: str = "This sandbox is closed.") -> None:
        """Kill everything and end the hub."""
        if self.closed:
            return
        self.closed = reason
        if self.zygote is not None:
            self.zygote.kill()
        while self._waiting:
            self._waiting.popleft().fail(reason)
        self.hub.stop()

    def _crash(self, error: BaseException) -> None:
        reason = f"The sandbox's own thread failed: {type(error).__name__}: {error}"
        for cell in self._cells.values():  # first, since what failed may fail again
            jobs = [cell.job] if cell.job is not None else []
            if cell.session is not None:
                jobs += cell.session.jobs
                cell.session.jobs.clear()
            for job in jobs:
                job.fail(reason)
            cell.job = None
        self.close(reason)

    # The zygote.

    def _ensure_zygote(self) -> ZygoteProcess:
        if self.zygote is None:
            self.zygote = ZygoteProcess(
                self.hub,
                self.limits,
                self.preload,
                self.layers,
                self.degraded,
                self._on_event,
                self._zygote_ready,
                self._zygote_died,
            )
            self.restarts += self._started
            self._started = True
        if not self._listening:
            self._listening = True
            self.hub.after(self.patience, self._listen)
        return self.zygote

    def _listen(self) -> None:
        """Replace a zygote that has something to do and says nothing."""
        self._listening = False
        zygote = self.zygote
        asked = [cell.asked for cell in self._cells.values() if not cell.pid]
        if zygote is None or not asked:
            return
        left = max(zygote.heard, min(asked)) + self.patience - time.monotonic()
        if left <= 0:
            return zygote.kill(f"it said nothing for {self.patience:g} s", wait=0.0)
        self._listening = True
        self.hub.after(left, self._listen)

    def _zygote_ready(self, problem: str) -> None:
        for future in self._ready:
            if not problem:
                future.set_result(self.zygote.facts if self.zygote else {})
            else:
                future.set_exception(SandboxUnavailable(f"The sandbox cannot start: {problem}"))
        self._ready.clear()

    def _zygote_died(self) -> None:
        """End what ran on it, or run it again once; what waits runs on the next one."""
        self.zygote = None
        reason = (Status.KILLED, "[Killed: the sandbox's own process died.]")
        for cell in list(self._cells.values()):
            if cell.socket is not None and cell.verdict is None:
                self._read_reply(cell)  # it may have finished
            if cell.job is not None and self.closed:
                cell.job.fail(self.closed)
                cell.job = None
            elif cell.job is not None and cell.verdict is None:
                self._run_again(cell)
            cell.verdict = cell.verdict or reason
            self._ended(cell, signal.SIGKILL, 0.0)

    def _run_again(self, cell: Cell) -> None:
        """Queue the cell's job anew if it had no state to lose and has not been lost before."""
        job = cell.job
        assert job is not None
        if job.again or cell.ran:
            return
        cell.job, job.again = None, True
        self.reruns += 1
        if cell.session is None:
            self._waiting.appendleft(job)
        else:
            cell.session.jobs.appendleft(job)

    def _on_event(self, op: bytes, number: int, value: int, seconds: float) -> None:
        cell = self._cells.get(number)
        if cell is None:
            return
        if op == b"P":
            cell.pid = value
            self._start_clock(cell)
        elif op == b"X":
            self._ended(cell, value, seconds)
        elif op in OVER_LIMIT:
            status, name, unit = OVER_LIMIT[op]
            limit = f"{getattr(self.limits, name):g} {unit}"
            cell.verdict = cell.verdict or (status, f"[Killed: used more than {limit}.]")
        else:
            job, cell.job = cell.job, None
            if job is not None:
                job.fail(f"No process could be forked: {os.strerror(value)}.")
            self._ended(cell, signal.SIGKILL, 0.0)

    # Starting code.

    def _start_waiting(self) -> None:
        while self._waiting and self._fresh < self.workers and not self.closed:
            job = self._waiting.popleft()
            if job.future.cancelled():
                continue
            try:
                self._fork(None, job)
            except (OSError, SandboxUnavailable) as error:
                job.fail(self._explain(error))

    def _next_cell(self, session: SessionState) -> None:
        while session.jobs and (session.cell is None or session.cell.idle):
            job = session.jobs.popleft()
            if job.future.cancelled():
                continue
            try:
                if session.cell is None:
                    session.cell = self._fork(session, None)
                self._send_cell(session.cell, job)
            except (OSError, SandboxUnavailable) as error:
                job.fail(self._explain(error))

    @staticmethod
    def _explain(error: Exception) -> str:
        hint = " (raise `ulimit -n`)" if getattr(error, "errno", None) == 24 else ""
        return f"No process could be started: {error}{hint}"

    def _fork(self, session: SessionState | None, job: Job | None) -> Cell:
        """Ask for a process: of a session, or of the fresh run `job`."""
        zygote = self._ensure_zygote()
        cell = Cell(next(self._numbers), session, self.limits)
        fds: list[int] = []
        try:
            if job is not None:
                fds.append(memory_file(job.code))
            else:
                cell.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                cell.socket.setblocking(False)
                fds.append(theirs.detach())
            cell.pipe, write = os.pipe2(os.O_CLOEXEC)
            fds.append(write)
        except OSError:
            for fd in fds:
                os.close(fd)
            if cell.socket is not None:
                cell.socket.close()
            raise
        os.set_blocking(cell.pipe, False)
        self._cells[cell.number] = cell
        self._fresh += job is not None
        cell.job = job
        self.hub.watch(cell.pipe, partial(self._read_output, cell))
        if cell.socket is not None:
            self.hub.watch(cell.socket.fileno(), partial(self._read_reply, cell))
        zygote.fork(cell.number, job is not None, fds)
        return cell

    def _send_cell(self, cell: Cell, job: Job) -> None:
        assert cell.socket is not None
        job.nonce = int.from_bytes(os.urandom(8), "little")
        cell.job = job
        if cell.pid:  # before the job is sent: on a busy machine it may be far when this is read
            threads = "task/*/" if cell.ran and has_threads(cell.pid) else ""
            job.cpu, job.queued = cpu_time(cell.pid), queued_time(cell.pid, threads)
        message = job.nonce.to_bytes(8, "little")
        try:
            if len(job.code) <= INLINE:
                cell.socket.send(message + job.code)
            else:
                fd = memory_file(job.code)
                try:
                    socket.send_fds(cell.socket, [message], [fd])
                finally:
                    os.close(fd)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it died a moment ago; the report of that ends the job
        except OSError:
            cell.job = None
            raise
        self._start_clock(cell)

    # Deadlines.

    def _start_clock(self, cell: Cell) -> None:
        """Begin to count for the cell's job, once there are both a job and a process."""
        job = cell.job
        if job is None or not cell.pid:
            return
        job.started = time.monotonic()
        self._check_after(self.limits.cpu_seconds / CORES, cell)

    def _check_after(self, seconds: float, cell: Cell) -> None:
        if not cell.timer:
            cell.timer = True
            self.hub.after(seconds, partial(self._check, cell))

    def _check(self, cell: Cell) -> None:
        """Kill the cell if its job has used up its time, else look again when it could have."""
        cell.timer = False
        job = cell.job
        if cell.number not in self._cells or cell.verdict is not None:
            return
        if job is None:
            return self._check_idle(cell)
        cpu = self.limits.cpu_seconds - (cpu_time(cell.pid) - job.cpu)
        wall = self.limits.wall - (time.monotonic() - job.started)
        if wall <= 0:
            wall += queued_time(cell.pid, "task/*/") - job.queued
            # A wait for a core is counted when it ends, and one for a machine that stood still is
            # not: what wants to run has not been waiting for something else all the time.
            if wall <= 0 < cpu and wants_a_core(cell.pid):
                wall = LOOK_AGAIN
        if cpu <= 0:
            note = f"[Timed out after {self.limits.cpu_seconds:g} s of CPU time.]"
        elif wall <= 0:
            note = f"[Timed out after {self.limits.wall:g} s.]"
        else:
            return self._check_after(max(min(cpu / CORES, wall), 0.02), cell)
        self._kill(cell, Status.TIMEOUT, note)

    def _check_idle(self, cell: Cell) -> None:
        """Threads that a session's cells left behind have one cell's CPU time until the next."""
        if cell.ran:
            left = self.limits.cpu_seconds - (cpu_time(cell.pid) - cell.idle_from)
            if left <= 0:
                return self._kill(cell, Status.TIMEOUT, "[Timed out between two cells.]")
            self._check_after(max(left, 0.02), cell)

    def _kill(self, cell: Cell, status: Status, note: str) -> None:
        if cell.verdict is None and cell.number in self._cells and self.zygote is not None:
            cell.verdict = (status, note)
            self.zygote.kill_cell(cell.number)
            self.hub.after(KILL_SECONDS, partial(self._check_killed, cell))

    def _check_killed(self, cell: Cell) -> None:
        if cell.number in self._cells and self.zygote is not None:
            self.zygote.kill(wait=0.0)

    # Outcomes.

    def _read_output(self, cell: Cell) -> None:
        if not self._drain(cell, 1 << 16):
            self.hub.unwatch(cell.pipe)
            os.close(cell.pipe)
            cell.pipe = -1

    def _drain(self, cell: Cell, limit: int) -> bool:
        """Read up to `limit` bytes of output; False at the end of the stream."""
        try:
            data = os.read(cell.pipe, limit)
        except BlockingIOError:
            return True
        cell.output.feed(data)
        if cell.output.total > self.limits.max_output_mb * (1 << 20):
            note = f"[Killed: printed more than {self.limits.max_output_mb:g} MB.]"
            self._kill(cell, Status.OUTPUT_LIMIT, note)
        return bool(data)

    def _drain_rest(self, cell: Cell) -> None:
        """Read what is in the pipe now; a thread of the code may go on writing for ever."""
        if cell.pipe >= 0:
            size = struct.unpack("i", fcntl.ioctl(cell.pipe, termios.FIONREAD, b"\0" * 4))[0]
            if size:
                self._drain(cell, size)

    def _read_reply(self, cell: Cell) -> None:
        """A session's process says how its cell ended."""
        assert cell.socket is not None
        try:
            data = cell.socket.recv(REPLY.size + 1)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:  # it closed its end or died; only the zygote's report tells which
            self.hub.unwatch(cell.socket.fileno())
            cell.socket.close()
            cell.socket = None
            self.hub.after(CLOSED_SECONDS, partial(self._kill, cell, *CLOSED))
            return
        job = cell.job
        if job is None or len(data) != REPLY.size or REPLY.unpack(data)[0] != job.nonce:
            note = "[Killed: wrote to a descriptor of ours.]"
            return self._kill(cell, Status.PROTOCOL_VIOLATION, note)
        self._drain_rest(cell)
        if cell.verdict is not None:
            return  # being killed; the report of that ends the job
        assert cell.session is not None
        cell.ran = True
        self._finish(cell, CODES.get(REPLY.unpack(data)[1], Status.ERROR), "", 0.0)
        self._next_cell(cell.session)

    def _ended(self, cell: Cell, wait_status: int, cpu: float) -> None:
        """The process is gone: give its job a result and release what it held."""
        if cell.socket is not None and cell.job is not None and cell.verdict is None:
            self._read_reply(cell)  # it may have finished the cell before it died
        self._drain_rest(cell)
        if cell.pipe >= 0:
            self.hub.unwatch(cell.pipe)
            os.close(cell.pipe)
        if cell.socket is not None:
            self.hub.unwatch(cell.socket.fileno())
            cell.socket.close()
        del self._cells[cell.number]
        had_job = cell.job is not None
        if had_job:
            status, note = judge(cell, wait_status, self.limits)
            self._finish(cell, status, note, cpu)
        session = cell.session
        if session is None:
            self._fresh -= 1
            self._start_waiting()
        elif session.cell is cell:
            session.cell = None
            if had_job or cell.ran:
                session.note = RESTARTED
                session.restarts += 1
            self._next_cell(session)

    def _finish(self, cell: Cell, status: Status, note: str, cpu: float) -> None:
        job = cell.job
        assert job is not None
        cell.job = None
        before = ""
        if cell.session is not None:
            before, cell.session.note = cell.session.note, ""
            cell.idle_from = (cpu or cpu_time(cell.pid)) if cell.pid else 0.0
            cpu = max(cell.idle_from - job.cpu, 0.0)
        wall = time.monotonic() - job.started if job.started else math.nan
        output = cell.output.take(before, note + "\n" if note else "")
        job.finish(SandboxResult(status, output, cpu, 0.0 if math.isnan(wall) else wall))
