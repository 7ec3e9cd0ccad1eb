"""The host's end of a zygote: starting it, asking it to fork and kill, hearing what happened."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import selectors
import site
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rllib_gtpo.sandbox.hub import Hub
from rllib_gtpo.sandbox.limits import Limits, SandboxUnavailable
from rllib_gtpo.sandbox.sweep import sweep
from rllib_gtpo.sandbox.zygote import EVENT, REQUEST

HERE = Path(__file__).parent
IN_FLIGHT = 64  # forks asked for and not yet done: bounds descriptors in transit
ENDED = "it ended while starting (is a preloaded module broken?)"


def module_path() -> list[str]:
    """Where the code may import from: site-packages, but nothing that merely is on `sys.path`."""
    paths = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        paths.append(site.getusersitepackages())
    return [p for p in dict.fromkeys(paths) if p and os.path.isdir(p)]


def environment(scratch: str) -> dict[str, str]:
    """The whole environment of the zygote: nothing of the host's own but the loader's path."""
    env = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "HOME": scratch,
        "TMPDIR": scratch,
        "PYTHONHASHSEED": "0",  # the order of a printed set is the same in every run
        "OPENBLAS_NUM_THREADS": "1",  # one thread, or forking is unsafe
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    if "LD_LIBRARY_PATH" in os.environ:
        env["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    return env


class ZygoteProcess:
    """A running zygote.  Hub's thread only.

    `on_event(op, cell, number, seconds)` receives what it reports, see `zygote.EVENT`;
    `on_ready(problem)` is called once, with "" or with why it could not start; `on_death()` is
    called once when it is gone for whatever reason.
    """

    def __init__(
        self,
        hub: Hub,
        limits: Limits,
        preload: Sequence[str],
        layers: str,
        degraded: bool,
        on_event: Callable[[bytes, int, int, float], None],
        on_ready: Callable[[str], None],
        on_death: Callable[[], None],
    ) -> None:
        """Start the process; it accepts requests at once and serves them when it is ready."""
        self._hub, self._on_event = hub, on_event
        self._on_ready, self._on_death = on_ready, on_death
        self._ready = self._blocked = self.dead = False
        self.heard = time.monotonic()  # when it last reported anything
        self._outbox: deque[tuple[bytes, list[int]]] = deque()
        self._in_flight = 0
        self.facts: dict[str, Any] = {}  # see `confine.Confinement.facts`; known when it is ready
        if not sys.executable:
            raise SandboxUnavailable("This interpreter is embedded: sys.executable is empty.")
        self.scratch = tempfile.mkdtemp(prefix="rllib-gtpo-sandbox-")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        config = {
            "control": theirs.fileno(),
            "host": os.getpid(),
            "limits": asdict(limits),
            "scratch": self.scratch,
            "path": module_path(),
            "preload": list(preload),
            "home": str(HERE),
            "layers": layers,
            "degraded": degraded,
        }
        flags = ["-P", "-s", "-S", "-B", "-X", "utf8"]
        try:
            self._process = subprocess.Popen(
                [sys.executable, *flags, str(HERE / "zygote.py"), json.dumps(config)],
                cwd=self.scratch,
                env=environment(self.scratch),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a terminal's Ctrl-C is not for it
            )
            # What it forked a moment ago may hold the other end of the socket after its death.
            self._process_fd = os.pidfd_open(self._process.pid)
        except BaseException:
            ours.close()
            os.rmdir(self.scratch)
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        self._socket = ours
        hub.watch(ours.fileno(), self._readable)
        hub.watch(self._process_fd, self._exited)

    @property
    def pid(self) -> int:
        """The zygote's process id."""
        return self._process.pid

    def fork(self, cell: int, fresh: bool, fds: list[int]) -> None:
        """Ask for a process; takes over `fds`."""
        self._send(REQUEST.pack(b"F" if fresh else b"S", cell), fds)

    def kill_cell(self, cell: int) -> None:
        """Ask for the end of a process; nothing happens if it has ended already."""
        self._send(REQUEST.pack(b"K", cell), [])

    def _send(self, data: bytes, fds: list[int]) -> None:
        self._outbox.append((data, fds))
        self._flush()

    def _flush(self) -> None:
        """Send in order; a kill may wait behind forks, since it may be for one of them."""
        blocked = False
        while self._outbox and not self.dead:
            data, fds = self._outbox[0]
            if fds and self._in_flight >= IN_FLIGHT:
                break
            try:
                socket.send_fds(self._socket, [data], fds)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.ETOOMANYREFS):
                    break  # it is gone, which the reading side will find out
                blocked = error.errno == errno.EAGAIN
                break
            self._outbox.popleft()
            for fd in fds:
                os.close(fd)
            self._in_flight += bool(fds)
        if blocked != self._blocked and not self.dead:
            self._blocked = blocked
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if blocked else 0)
            self._hub.rewatch(self._socket.fileno(), self._readable, events)

    def _readable(self) -> None:
        while not self.dead:
            try:
                data = self._socket.recv(8192)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            self.heard = time.monotonic()
            if not data:
                self.kill(ENDED)
            elif data[:1] == b"!":
                self.kill(data[1:].decode(errors="replace"))
            elif data[:1] == b"R":
                self._ready = True
                self.facts = json.loads(data[1:])
                self._on_ready("")
            else:
                op, cell, number, seconds = EVENT.unpack(data)
                self._in_flight -= op in b"PE"
                self._on_event(op, cell, number, seconds)
        self._flush()

    def _exited(self) -> None:
        self._readable()  # its last words
        self.kill(ENDED)

    def kill(self, problem: str = "it was closed", wait: float = 2.0) -> None:
        """End it and everything that it forked, and remove its files.

        It gets `wait` seconds to do so itself.
        """
        if self.dead:
            return
        self.dead = True
        self._hub.unwatch(self._socket.fileno())
        with contextlib.suppress(OSError):  # its signal to kill, tidy up and leave, also if a
            self._socket.shutdown(socket.SHUT_RDWR)  # forked host has a copy of the socket
        self._socket.close()
        self._hub.unwatch(self._process_fd)
        os.close(self._process_fd)
        try:
            self._process.wait(wait)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for _, fds in self._outbox:
            for fd in fds:
                os.close(fd)
        self._outbox.clear()
        if os.path.lexists(self.scratch) or os.path.lexists(self.scratch + ".sweep"):
            with contextlib.suppress(OSError):
                sweep(self.scratch)
        if not self._ready:
            self._on_ready(problem)
        self._on_death()
