"""Runs threats against a sandbox, with things to attack around it, and looks for damage."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rllib_gtpo.sandbox.limits import Limits, SandboxResult
from rllib_gtpo.sandbox.python import PythonSandbox
from rllib_gtpo.sandbox.threats import MARK, PRELUDE, Threat

LIMITS = Limits(cpu_seconds=1.0, wall_seconds=3.0, memory_mb=256, output_chars=4096, threads=64)
_SETTLE_SECONDS = 5.0


@dataclass(slots=True)
class Outcome:
    """What came of one threat."""

    threat: Threat
    result: SandboxResult
    breaches: list[str] = field(default_factory=list)  # attempts that worked
    damage: list[str] = field(default_factory=list)  # what was wrong afterwards

    @property
    def stopped(self) -> bool:
        """Whether nothing worked and nothing was harmed."""
        return not self.breaches and not self.damage


class Arena:
    """A sandbox beside a sibling session, files, sockets and a secret; a context manager."""

    def __init__(self, layers: str = "auto", preload: tuple[str, ...] = ()) -> None:
        """Start the sandbox; "rlimits-only" is the negative control and warns."""
        self._stack = contextlib.ExitStack()
        try:
            self._set_up(layers, preload)
        except BaseException:
            self._stack.close()
            raise

    def _set_up(self, layers: str, preload: tuple[str, ...]) -> None:
        self.directory = tempfile.mkdtemp(prefix="rllib-gtpo-arena-")
        self._stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
        os.chmod(self.directory, 0o777)
        for name in ("file", "empty"):
            path = os.path.join(self.directory, name)
            Path(path).write_text("canary" if name == "file" else "")
            os.chmod(path, 0o666)
        os.environ["RLLIB_GTPO_CANARY"] = secret = secrets.token_hex(16)
        self._stack.callback(os.environ.pop, "RLLIB_GTPO_CANARY", None)
        degraded = layers == "rlimits-only"
        self.sandbox = self._stack.enter_context(
            PythonSandbox(LIMITS, preload=preload, layers=layers, allow_degraded=degraded)
        )
        self._rollout = secrets.token_hex(16)
        self._sibling = self._stack.enter_context(self.sandbox.session())
        code = f"import os; rollout = '{self._rollout}' + '-1234'\nprint(os.getpid(), os.getcwd())"
        pid, scratch = self._sibling.run(code).output.split()
        if self.sandbox.rung != "sealed":
            self._sibling.run("open('note', 'w').write('mine')")
        zygote = self.sandbox._pool.zygote
        assert zygote is not None
        self._zygote = zygote.pid
        home = os.path.expanduser("~")
        self.facts: dict[str, Any] = {
            "directory": self.directory,
            "file": os.path.join(self.directory, "file"),
            "empty": os.path.join(self.directory, "empty"),
            "readable": ["/etc/passwd", "/etc/shadow", os.path.join(home, ".ssh"), __file__],
            "places": [*self._places(), home, sys.prefix],
            "host": os.getpid(),
            "zygote": zygote.pid,
            "sibling": int(pid),
            "others": [int(pid), zygote.pid, os.getpid()],
            "sibling_scratch": scratch,
            "secret": secret,
            "rollout": self._rollout,
            "threads": LIMITS.threads,
            "disk": LIMITS.disk_mb << 20,
            "disk_files": LIMITS.disk_files,
            **self._sockets(),
        }
        self._before = self._state()

    def _sockets(self) -> dict[str, Any]:
        """Listeners of every kind; nobody accepts, which is enough to see a connection succeed."""
        kinds = (
            ("tcp", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            ("udp", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            ("unix", socket.AF_UNIX, socket.SOCK_STREAM, f"{self.directory}/stream"),
            ("datagrams", socket.AF_UNIX, socket.SOCK_DGRAM, f"{self.directory}/datagrams"),
            ("abstract", socket.AF_UNIX, socket.SOCK_STREAM, f"\0{MARK}-{secrets.token_hex(8)}"),
        )
        facts: dict[str, Any] = {}
        for name, family, kind, address in kinds:
            sock = self._stack.enter_context(socket.socket(family, kind))
            sock.bind(address)
            if kind == socket.SOCK_STREAM:
                sock.listen(64)
            if family == socket.AF_INET:
                facts[name] = sock.getsockname()[1]
            else:
                facts[name] = str(address).lstrip("\0")
                if name != "abstract":
                    os.chmod(str(address), 0o777)
        return facts

    @staticmethod
    def _places() -> list[str]:
        return ["/etc", "/tmp", "/dev/shm", tempfile.gettempdir()]

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def run(self, threat: Threat) -> Outcome:
        """Run one threat and look at what it did."""
        marker = secrets.token_hex(8)
        code = f"A = {self.facts | {'marker': marker}!r}\n{PRELUDE}\n{threat.code}"
        if threat.session:
            with self.sandbox.session() as cell:
                result = cell.run(code)
        else:
            result = self.sandbox.run(code)
        outcome = Outcome(threat, result, re.findall(rf"{marker} (.*)", result.output))
        sealed = self.sandbox.rung == "sealed"
        if not outcome.breaches and threat.statuses:
            expected = (*threat.statuses, "error") if sealed else threat.statuses
            if result.status not in expected:
                outcome.damage.append(f"ended with {result.status}, not {' or '.join(expected)}")
        if threat.output not in result.output:
            outcome.damage.append(f"the output lacks {threat.output!r}")
        try:
            result.output.encode()
        except UnicodeEncodeError:
            outcome.damage.append("the output is not a valid string")
        outcome.damage += self._damage()
        return outcome

    def _damage(self) -> Iterator[str]:
        if self.sandbox.run("print(6 * 7)").output != "42\n":
            yield "the pool does not run code any more"
        if self._sibling.run("print(rollout)").output != f"{self._rollout}-1234\n":
            yield "the sibling was harmed"
        deadline = time.monotonic() + _SETTLE_SECONDS
        while (now := self._state()) != self._before and time.monotonic() < deadline:
            time.sleep(0.01)
        for name, value in now.items():
            if value != self._before[name]:
                yield f"{name}: {value} instead of {self._before[name]}"
        self._before = now

    def _state(self) -> dict[str, Any]:
        """What no execution may change."""
        tables = {}
        for kind in ("shm", "sem", "msg"):
            with contextlib.suppress(OSError):
                tables[kind] = len(Path(f"/proc/sysvipc/{kind}").read_text().splitlines())
        stray = []
        for place in {*self._places(), os.path.expanduser("~"), sys.prefix, "/dev/mqueue"}:
            with contextlib.suppress(OSError):
                stray += [f"{place}/{name}" for name in os.listdir(place) if MARK in name]
        zygote = self.sandbox._pool.zygote
        files = [Path(self.directory, name) for name in ("file", "empty")]
        return {
            "zygote": zygote.pid if zygote else 0,
            "processes": self._processes(),
            "IPC objects": tables,
            "stray files": stray,
            "files in scratch directories": self._scratch_files(),
            "attacked directory": sorted(os.listdir(self.directory)),
            "attacked files": [
                (f.read_text(), oct(f.stat().st_mode), f.stat().st_mtime) for f in files
            ],
        }

    def _processes(self) -> list[int]:
        """The zygote's children and theirs; executions that run now are all ours."""
        found: list[int] = []
        waiting = [self._zygote]
        while waiting:
            pid = waiting.pop()
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
                waiting += map(int, text.split())
                found += map(int, text.split())
        return sorted(found)

    def _scratch_files(self) -> list[str]:
        """Files of executions that have ended; a tmpfs in the zygote's root cannot be seen here."""
        zygote = self.sandbox._pool.zygote
        if zygote is None or not os.path.isdir(zygote.scratch):
            return []
        below = [walk for walk in os.walk(zygote.scratch) if walk[0] != zygote.scratch]
        names = [f"{top}/{name}" for top, *kinds in below for kind in kinds for name in kind]
        return sorted(name for name in names if not name.endswith("/note"))
