"""The process that forks every execution.  Started by path; imports only the standard library.

One thread.  It imports the preload once and then forks on request over a SOCK_SEQPACKET socket,
kills on request, and reports wait statuses.  It sees neither code nor output: it passes on
descriptors, so that no execution inherits anything of another.  It never waits for the host.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import errno
import gc
import importlib
import json
import os
import select
import signal
import site
import socket
import struct
import sys
import traceback
import types
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


class Zygote:
    """Serves one host until the host is gone."""

    def __init__(self, config: dict[str, Any], modules: Any, confinement: Any) -> None:
        """Set up the event sources; `modules` are those of `load`."""
        self.limits, self.scratch = config["limits"], config["scratch"]
        self.modules, self.confinement = modules, confinement
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

    def watch(self) -> None:
        """Fork the watchdog if something needs one."""
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
                self.modules.watchdog.watch(self.scratch, self.pid, report, disk, threads)
            finally:
                os._exit(0)
        os.close(report)
        self.helpers.add(self.watchdog)
        self.record = self.modules.watchdog.REPORT
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
            self.modules.child.run(kind, fds, self.confinement, slot, self.limits)
            os._exit(self.modules.child.EXIT_SETUP)
        self.pids[cell], self.cells[pid], self.slots[pid] = pid, cell, slot
        self.outbox.append(EVENT.pack(b"P", cell, pid, 0.0))

    def open_slot(self) -> Any:
        """A slot with a number, and so a user, that no other has now."""
        users = self.confinement.users
        taken = {slot.number % users for slot in (*self.slots.values(), *self.free)}
        if len(taken) >= users:
            raise OSError(errno.EAGAIN, "no user is free")
        self.slot_count += 1
        while self.slot_count % users in taken:
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
        """Keep an empty slot for the next; a process of its own removes any other."""
        with contextlib.suppress(OSError):
            if self.confinement.confined and not os.listdir(slot.path):
                self.free.append(slot)
                return
        if slot.ruleset >= 0:
            os.close(slot.ruleset)
        try:
            pid = os.fork()
        except OSError:
            return  # it is removed with everything else, at the end
        if pid == 0:
            try:
                signal.set_wakeup_fd(-1)
                self.confinement.remove_slot(slot)
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
            self.modules.sweep.sweep(self.scratch)


def load(home: str) -> Any:
    """Our modules in the directory `home`, imported under no name that code could import."""
    package = types.ModuleType(PACKAGE)
    package.__path__ = [home]
    sys.modules[PACKAGE] = package
    names = ("child", "confine", "sweep", "watchdog")
    modules = {name: importlib.import_module(f"{PACKAGE}.{name}") for name in names}
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
    return types.SimpleNamespace(**modules)


def main() -> None:
    """Prepare the interpreter, say so, and serve."""
    config = json.loads(sys.argv[1])
    sys.argv = sys.orig_argv = [""]
    modules = load(config["home"])
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: daemonised descendants come here
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
        f.write("1000")  # inherited; a lost zygote is replaced, a lost host is not
    try:
        confinement = modules.confine.Confinement(config)
        zygote = Zygote(config, modules, confinement)
        zygote.watch()
        confinement.enter()
        sys.path.extend(config["path"])
        site.setquit()
        site.sethelper()
        for name in [*config["preload"], *(SEALED if confinement.sealed else ())]:
            importlib.import_module(name)
            exec(WARM_UP.get(name, ""), {})
        confinement.seal()
    except BaseException as error:
        refused = isinstance(error, modules.confine.Refused)
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
