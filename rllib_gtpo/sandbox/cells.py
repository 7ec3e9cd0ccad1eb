"""What a pool runs: jobs, the processes they run in, sessions, and the kernel's word on them."""

from __future__ import annotations

import glob
import os
import signal
import socket
import time
from collections import deque
from concurrent.futures import Future, InvalidStateError

from rllib_gtpo.sandbox.child import EXIT_DISK, EXIT_MEMORY, EXIT_OK, EXIT_SETUP
from rllib_gtpo.sandbox.limits import Limits, SandboxResult, SandboxUnavailable, Status
from rllib_gtpo.sandbox.output import Output

CLOSED = (Status.PROTOCOL_VIOLATION, "[Killed: closed a descriptor of ours.]")
CODES = {EXIT_OK: Status.OK, EXIT_MEMORY: Status.MEMORY, EXIT_DISK: Status.DISK_LIMIT}


def cpu_time(pid: int) -> float:
    """CPU seconds that the process used, all threads, by the kernel's clock; 0 if it is gone."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0


def queued_time(pid: int, threads: str = "") -> float:
    """Seconds that the process was ready but had no core; 0 where the kernel does not say.

    Of its first thread, or with `threads="task/*/"` of the one that waited longest.
    """
    longest = 0.0
    for path in (
        glob.glob(f"/proc/{pid}/{threads}schedstat") if threads else [f"/proc/{pid}/schedstat"]
    ):
        try:
            fd = os.open(path, os.O_RDONLY)  # as every cell begins with it: `open` takes longer
            try:
                longest = max(longest, int(os.read(fd, 64).split()[1]) / 1e9)
            finally:
                os.close(fd)
        except (OSError, IndexError, ValueError):
            continue
    return longest


def wants_a_core(pid: int) -> bool:
    """Whether a thread of the process is running or ready to, at this moment."""
    for path in glob.glob(f"/proc/{pid}/task/*/stat"):
        try:
            with open(path, "rb") as f:
                if f.read().rpartition(b")")[2].split()[0] == b"R":
                    return True
        except (OSError, IndexError):
            continue
    return False


def has_threads(pid: int) -> bool:
    """Whether the process has more than one."""
    try:
        return os.stat(f"/proc/{pid}/task").st_nlink > 3
    except OSError:
        return False


class Job:
    """One piece of code to run, and the future that receives its result."""

    __slots__ = ("again", "code", "cpu", "future", "nonce", "queued", "started")

    def __init__(self, code: str) -> None:
        self.code = code.encode("utf-8", "surrogatepass")
        self.future: Future[SandboxResult] = Future()
        self.nonce = 0
        self.again = False  # its first process was lost with the zygote
        self.started = self.cpu = self.queued = 0.0

    def fail(self, problem: str) -> None:
        """The host could not run it."""
        try:
            self.future.set_exception(SandboxUnavailable(problem))
        except InvalidStateError:
            return  # cancelled meanwhile

    def finish(self, result: SandboxResult) -> None:
        """It ran."""
        try:
            self.future.set_result(result)
        except InvalidStateError:
            return


class Cell:
    """One forked process: of one fresh run, or of a session until it dies."""

    def __init__(self, number: int, session: SessionState | None, limits: Limits) -> None:
        self.number, self.session = number, session
        self.output = Output(limits.output_chars)
        self.job: Job | None = None
        self.asked = time.monotonic()  # when the zygote was asked to fork it
        self.pid = 0  # 0 until it has
        self.pipe = -1
        self.socket: socket.socket | None = None  # a session's
        self.verdict: tuple[Status, str] | None = None  # why the host killed it
        self.timer = False
        self.ran = False  # a session's: has finished a cell, so that names may be lost
        self.idle_from = 0.0  # CPU time at the end of its last cell

    @property
    def idle(self) -> bool:
        """Whether a session's next cell can go to it; not if it is dying."""
        return self.job is None and self.socket is not None and self.verdict is None


class SessionState:
    """A session across the deaths of its processes.  Cells run one after the other."""

    def __init__(self) -> None:
        self.cell: Cell | None = None
        self.jobs: deque[Job] = deque()
        self.note = ""  # what the next result must say first
        self.restarts = 0  # processes lost with names in them
        self.closed = False


def judge(cell: Cell, wait_status: int, limits: Limits) -> tuple[Status, str]:
    """The status of a job whose process ended, by the kernel's word and our verdict."""
    if cell.verdict is not None and cell.verdict[0] is Status.OUTPUT_LIMIT:
        return cell.verdict  # also where it ended by itself before the signal came
    if os.WIFEXITED(wait_status):
        code = os.WEXITSTATUS(wait_status)
        if cell.session is not None and code == EXIT_SETUP:
            return CLOSED
        if cell.session is not None:
            return Status.ERROR, f"[The session's process exited with code {code}.]"
        if code == EXIT_SETUP:
            return Status.KILLED, "[Killed: the process could not be set up.]"
        return CODES.get(code, Status.ERROR), ""
    number = os.WTERMSIG(wait_status)
    if number == signal.SIGKILL and cell.verdict is not None:
        return cell.verdict
    if number == signal.SIGXCPU:
        seconds = limits.cpu_seconds
        return Status.TIMEOUT, f"[Timed out after {seconds:g} s of CPU time.]"
    if number == signal.SIGXFSZ:
        return Status.DISK_LIMIT, f"[Killed: a file grew past {limits.file_mb} MB.]"
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return Status.KILLED, f"[Killed by {name}.]"


def memory_file(code: bytes) -> int:
    """A descriptor of a memory file that holds `code`."""
    fd = os.memfd_create("code", os.MFD_CLOEXEC)
    try:
        data = memoryview(code)
        while data:
            data = data[os.write(fd, data) :]
    except OSError:
        os.close(fd)
        raise
    return fd
