"""The process that forks every execution.  Started by path; imports only the standard library.

One thread.  It imports the preload once and then forks on request over a SOCK_SEQPACKET socket,
kills on request, and reports wait statuses.  It sees neither code nor output: it passes on
descriptors, so that no execution inherits anything of another.  It never waits for the host.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import site
import socket
import stat
import struct
import sys
import traceback
import types
from collections.abc import Iterator
from typing import Any

REQUEST = struct.Struct("<cQ")  # "F"resh, "S"ession or "K"ill; the cell's id
# "P"id, e"X"ited (wait status, cpu seconds), "E"rror (errno), over the limit of "D"isk or "T"hreads
EVENT = struct.Struct("<cQqd")
SEALED = (  # importable where nothing can be opened, besides the preload
    *("bisect", "cmath", "collections", "copy", "dataclasses", "datetime", "decimal", "enum"),
    *("fractions", "functools", "heapq", "itertools", "json", "math", "numbers", "operator"),
    *("random", "re", "statistics", "string", "textwrap", "threading", "time", "typing"),
)
PACKAGE = "_sandbox"  # the name of this directory while its modules are imported here
WARM_UP = {  # what a first use initialises lazily, and each child would pay for again
    "sympy": "import sympy as s; x = s.Symbol('x'); s.solve(x**2 - 2, x); s.simplify(s.sin(x)**2)",
    "numpy": "import numpy as n; n.linalg.solve(n.eye(2), n.ones(2)); n.random.rand()",
    "math_verify": r"""
import latex2sympy2_extended, sympy
for text in r'''3\sqrt{2}+\sqrt[3]{x}; (x+1)^2=y_1; \frac{-a}{2b}*c; 1-\sin(x)\cos{2x}; \log_{2}(8);
    \pi r^{2}; e^{-2x}\ln2; 5!; \binom{5}{2}; x>3; |x-1|; 6xyz/7; f(x)\cdot3^n; \tan^2(y)-\infty;
    \sum_{k=1}^{n}k; \int_0^1 x dx; (2n+1)(x-3); \lfloor x\rfloor'''.split(";"):
    sympy.N(sympy.simplify(latex2sympy2_extended.latex2sympy(text, normalization_config=None)))
""",
}


def sweep(top: str) -> None:
    """Remove the directory `top`, however deep, wide or unreadable; follows no symbolic link.

    Subdirectories are moved up beside each other before they are emptied, so that neither the
    recursion limit nor the longest path name matters.
    """
    shelf = top + ".sweep"
    with contextlib.suppress(OSError):
        os.mkdir(shelf, 0o700)
    try:
        shelf_fd = os.open(shelf, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    # The shelf is not empty if whoever swept before was killed.
    queue = [top, *(os.path.join(shelf, name) for name in os.listdir(shelf_fd))]
    count = 0
    while queue:
        directory = queue.pop()
        for name, fd in _entries(directory):
            try:
                if stat.S_ISDIR(os.lstat(name, dir_fd=fd).st_mode):
                    count += 1
                    place = f"{os.getpid()}-{count}"
                    os.close(_make_writable(name, fd))  # to move it takes that, if not root
                    os.rename(name, place, src_dir_fd=fd, dst_dir_fd=shelf_fd)
                    queue.append(os.path.join(shelf, place))
                else:
                    os.unlink(name, dir_fd=fd)
            except OSError:
                continue
        with contextlib.suppress(OSError):
            os.rmdir(directory)
    os.close(shelf_fd)
    with contextlib.suppress(OSError):
        os.rmdir(shelf)
    with contextlib.suppress(OSError):  # what took the name of a directory, never what it points at
        os.unlink(top)


def _make_writable(directory: str, parent: int | None) -> int:
    """Make sure that the owner can use it; returns a path descriptor of it, never of a link."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    with contextlib.suppress(OSError):
        os.chmod(f"/proc/self/fd/{fd}", 0o700)
    return fd


def _entries(directory: str) -> Iterator[tuple[str, int]]:
    """The names in `directory` with a descriptor of it; none if it is a symbolic link."""
    try:
        path_fd = _make_writable(directory, None)
    except OSError:
        return
    fd = -1
    try:
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=path_fd)
        for name in os.listdir(fd):
            yield name, fd
    except OSError:
        return
    finally:
        os.close(path_fd)
        if fd >= 0:
            os.close(fd)


class Zygote:
    """Serves one host until the host is gone."""

    def __init__(self, config: dict[str, Any], child: Any, confinement: Any) -> None:
        """Set up the event sources; `child` is the module that runs code."""
        self.limits, self.scratch, self.child = config["limits"], config["scratch"], child
        self.confinement = confinement
        self.control = socket.socket(fileno=config["control"])
        self.control.setblocking(False)
        self.outbox: collections.deque[bytes] = collections.deque()
        self.pids: dict[int, int] = {}  # cell id -> pid
        self.cells: dict[int, int] = {}  # pid -> cell id
        self.slots: dict[int, Any] = {}  # pid -> what it runs in
        self.free: list[Any] = []  # empty slots
        self.slot_count = 0
        self.helpers: set[int] = set()  # sweepers and the watchdog
        self.watchdog = self.reports = -1
        # Outlives the private root; the directory itself stays empty there.
        self.parent = os.open(os.path.dirname(self.scratch), os.O_PATH | os.O_CLOEXEC)
        self.pid = os.getpid()
        self.signals, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.poll = select.epoll()
        self.poll.register(self.signals, select.EPOLLIN)
        self.poll.register(self.control, select.EPOLLIN)
        # A process that the host forked may keep the control socket open after the host's death.
        self.host = os.pidfd_open(config["host"])
        self.poll.register(self.host, select.EPOLLIN)
        if os.getppid() != config["host"]:
            sys.exit("the host is gone")

    def watch(self, watchdog: Any) -> None:
        """Fork the watchdog if something needs one; `watchdog` is its module."""
        disk, threads = self.confinement.unbounded()
        if disk is None and not threads:
            return
        self.reports, report = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.watchdog = os.fork()
        if self.watchdog == 0:
            try:
                signal.set_wakeup_fd(-1)
                for fd in range(3, 1 << 10):
                    if fd != report:
                        with contextlib.suppress(OSError):
                            os.close(fd)
                watchdog.watch(self.scratch, self.pid, report, disk, threads)
            finally:
                os._exit(0)
        os.close(report)
        self.helpers.add(self.watchdog)
        self.record = watchdog.REPORT
        self.poll.register(self.reports, select.EPOLLIN)

    def serve(self) -> None:
        """Handle events until the host closes the control socket or dies."""
        gone = select.EPOLLIN | select.EPOLLHUP  # or there is a request
        while True:
            for fd, events in self.poll.poll():
                if fd == self.signals:
                    os.read(self.signals, 4096)
                    self.reap()
                elif fd == self.reports:
                    self.over_limit()
                elif fd == self.host or (events & gone and not self.receive()):
                    return
            self.flush()

    def receive(self) -> bool:
        """Handle one request; False once the host is gone."""
        try:
            data, fds, _, _ = socket.recv_fds(self.control, REQUEST.size, 2)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not data:
            return False
        op, cell = REQUEST.unpack(data)
        if op == b"K":
            if cell in self.pids:
                self.kill(self.pids[cell])
        elif len(fds) == 2:
            self.fork(cell, "fresh" if op == b"F" else "session", fds)
        else:
            self.outbox.append(EVENT.pack(b"E", cell, 24, 0.0))  # descriptors lost: EMFILE
        for fd in fds:
            os.close(fd)
        return True

    def fork(self, cell: int, kind: str, fds: list[int]) -> None:
        """Fork the process of one execution or session."""
        slot = None
        try:
            slot = self.free.pop() if self.free else self.open_slot()
            pid = os.fork()
        except OSError as error:
            if slot is not None:
                self.free.append(slot)
            self.outbox.append(EVENT.pack(b"E", cell, error.errno or 0, 0.0))
            return
        if pid == 0:
            self.child.run(kind, fds, self.confinement, slot, self.limits)
            os._exit(self.child.EXIT_SETUP)
        self.pids[cell], self.cells[pid], self.slots[pid] = pid, cell, slot
        self.outbox.append(EVENT.pack(b"P", cell, pid, 0.0))

    def open_slot(self) -> Any:
        """A slot with a number, and so a user, that no other has now."""
        self.slot_count += 1
        return self.confinement.open_slot(self.slot_count)

    def over_limit(self) -> None:
        """Kill whom the watchdog reports; the host gives the reason."""
        for op, number in self.record.iter_unpack(os.read(self.reports, 64 * self.record.size)):
            by_slot = (pid for pid, slot in self.slots.items() if slot.number == number)
            pid = number if op == b"T" else next(by_slot, 0)
            if pid in self.cells:
                self.outbox.append(EVENT.pack(op, self.cells[pid], 0, 0.0))
                self.kill(pid)

    def kill(self, pid: int) -> None:
        """Kill the process group of a child that has not been reaped yet."""
        for kill in (os.killpg, os.kill):  # the group does not exist before the child's setsid
            try:
                kill(pid, signal.SIGKILL)
            except OSError:
                continue

    def reap(self) -> None:
        """Report every child that ended, and kill whatever it left behind."""
        ended = False
        while True:
            try:
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if info is None:
                if ended and not self.confinement.confined and self.kill_strays():
                    continue
                return
            cell = self.cells.pop(info.si_pid, None)
            if cell is not None:
                self.kill(info.si_pid)  # still a zombie, so the number cannot mean anyone else
            _, status, usage = os.wait4(info.si_pid, 0)
            self.helpers.discard(info.si_pid)
            if info.si_pid == self.watchdog:
                sys.exit("the watchdog is gone")
            if cell is None:
                continue
            ended = True
            del self.pids[cell]
            self.outbox.append(EVENT.pack(b"X", cell, status, usage.ru_utime + usage.ru_stime))
            self.recycle(self.slots.pop(info.si_pid))

    def recycle(self, slot: Any) -> None:
        """Keep an empty slot for the next; a process of its own sweeps what takes long."""
        with contextlib.suppress(OSError):
            if self.confinement.confined and not os.listdir(slot.path):
                self.free.append(slot)
                return
        if self.confinement.close_slot(slot):
            return
        pid = os.fork()
        if pid == 0:
            try:
                signal.set_wakeup_fd(-1)
                sweep(slot.path)
            finally:
                os._exit(0)
        self.helpers.add(pid)

    def kill_strays(self) -> bool:
        """Kill adopted descendants that left their process group; whether there were any."""
        try:
            with open(f"/proc/self/task/{self.pid}/children") as f:
                pids = {int(pid) for pid in f.read().split()}
        except OSError:
            return False
        strays = pids - self.cells.keys() - self.helpers
        for pid in strays:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        return bool(strays)

    def flush(self) -> None:
        """Send what the host takes now and remember the rest."""
        try:
            while self.outbox:
                self.control.send(self.outbox[0])
                self.outbox.popleft()
        except BlockingIOError:
            self.poll.modify(self.control, select.EPOLLIN | select.EPOLLOUT)
        except OSError:
            self.outbox.clear()  # the host is going; the next poll says so
        else:
            self.poll.modify(self.control, select.EPOLLIN)

    def close(self) -> None:
        """Kill everything and remove every file."""
        for pid in [*self.cells, *self.helpers]:
            self.kill(pid)
        self.kill_strays()
        if self.confinement.namespaces:
            with contextlib.suppress(OSError):  # the file systems end with us
                os.rmdir(os.path.basename(self.scratch), dir_fd=self.parent)
        else:
            sweep(self.scratch)


def load(home: str) -> list[Any]:
    """Import our modules from the directory `home`, under no name that code could import."""
    package = types.ModuleType(PACKAGE)
    package.__path__ = [home]
    sys.modules[PACKAGE] = package
    names = [f"{PACKAGE}.{name}" for name in ("child", "confine", "watchdog")]
    modules = [importlib.import_module(name) for name in names]
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
    return modules


def main() -> None:
    """Prepare the interpreter, say so, and serve."""
    config = json.loads(sys.argv[1])
    sys.argv = [""]
    child, confine, watchdog = load(config["home"])
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: daemonised descendants come here
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
        f.write("1000")  # inherited; a lost zygote is replaced, a lost host is not
    try:
        confinement = confine.Confinement(config)
        zygote = Zygote(config, child, confinement)
        zygote.watch(watchdog)
        confinement.enter()
        sys.path.extend(config["path"])
        site.setquit()
        site.sethelper()
        for name in [*config["preload"], *(SEALED if confinement.sealed else ())]:
            importlib.import_module(name)
            exec(WARM_UP.get(name, ""), {})
        confinement.seal()
    except BaseException as error:
        refused = isinstance(error, confine.Refused)
        problem = str(error) if refused else traceback.format_exc()[-4000:]
        socket.socket(fileno=os.dup(config["control"])).send(b"!" + problem.encode())
        return
    gc.collect()
    gc.freeze()  # the children share these pages as long as no collection writes to them
    zygote.outbox.append(b"R" + json.dumps(confinement.facts()).encode())
    zygote.flush()
    try:
        zygote.serve()
    finally:
        if os.getpid() == zygote.pid:
            zygote.close()


if __name__ == "__main__":
    main()
