"""Proves at the start that a confined child is refused what it must be refused."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from rllib_gtpo.sandbox.guarantees import MEANINGS, report
from rllib_gtpo.sandbox.limits import Limits, SandboxResult, SandboxUnavailable

# What is enforced on every rung, by the parent process and by resource limits.
ALWAYS = (
    *("separate process", "clean environment", "no shared state"),
    *("cpu limit", "wall limit", "output limit", "file size limit"),
)
OPTIONAL = ("own user", "own namespaces", "disk limit")

# Each attempt belongs to a guarantee and is refused if it raises.  `call` makes a raw system call.
ATTEMPTS: tuple[tuple[str, str, str], ...] = (
    ("file reads", "reading a file", "open(A['file']).read()"),
    ("file reads", "reading /etc/passwd", "open('/etc/passwd').read()"),
    ("file reads", "reading /proc/self/environ", "open('/proc/self/environ').read()"),
    ("file reads", "listing a directory", "os.listdir(A['directory'])"),
    ("file writes", "writing a file", "open(A['file'], 'a').close()"),
    ("file writes", "making a file", "open(A['directory'] + '/new', 'w').close()"),
    ("file writes", "making a directory", "os.mkdir(A['directory'] + '/newdir')"),
    ("file metadata", "chmod", "changed(lambda: os.chmod(A['file'], 0o606))"),
    ("file metadata", "utime", "changed(lambda: os.utime(A['file'], (1, 1)))"),
    ("file metadata", "truncate", "os.truncate(A['file'], 0)"),
    ("network", "a TCP socket", "socket.socket(socket.AF_INET, socket.SOCK_STREAM)"),
    ("network", "a UDP socket", "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)"),
    ("network", "a unix socket", "socket.socket(socket.AF_UNIX)"),
    ("process creation", "fork", "os.fork() or os._exit(0)"),
    ("process creation", "exec", "refused(lambda: os.execv('/nonexistent', ['x']))"),
    ("signals to other processes", "kill", "os.kill(A['host'], 0)"),
    ("signals to other processes", "kill of the parent", "os.kill(os.getppid(), 0)"),
    ("other processes' memory", "process_vm_readv", "call(310, os.getppid(), 0, 0, 0, 0, 0)"),
    ("other processes' memory", "pidfd_open", "call(434, os.getppid(), 0)"),
    ("ipc objects", "shmget", "call(29, 0x72677470, 0, 0)"),
    ("system call filter", "personality", "call(135, 0xffffffff)"),
    ("system call filter", "an unknown system call", "call(6000)"),
    ("memory limit", "too much memory", "bytearray(A['memory'])"),
)
_CODE = """
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def refused(attempt):
    try: attempt()
    except OSError as error:
        if error.errno in (1, 13): raise
def changed(attempt):  # chmod and utime succeed without an effect
    before = os.stat(A["file"])
    attempt()
    if os.stat(A["file"]) == before: raise PermissionError
def call(*arguments):
    if libc.syscall(*arguments) < 0 and ctypes.get_errno() == 1: raise PermissionError
def attempt(code):
    try: eval(code)
    except BaseException: return False
    return True
print(*(n for n, code in enumerate(A["attempts"]) if attempt(code)), "done", os.getuid())
"""


def prove(
    run: Callable[[str], SandboxResult], limits: Limits, facts: Mapping[str, Any], degraded: bool
) -> Mapping[str, bool]:
    """What is enforced here, by name, from what a child that `run` starts was refused.

    Warns where the rung is a low one.

    Raises:
        SandboxUnavailable: Something succeeded that must not, and `degraded` does not accept it.
    """
    directory = tempfile.mkdtemp(prefix="rllib-gtpo-probe-")
    try:
        os.chmod(directory, 0o777)
        file = os.path.join(directory, "file")
        with open(file, "w") as f:
            f.write("canary")
        os.chmod(file, 0o666)
        arguments = {
            "file": file,
            "directory": directory,
            "host": os.getpid(),
            "memory": (int(limits.memory_mb) + 128) << 20,
            "attempts": [code for _, _, code in ATTEMPTS],
        }
        result = run(f"A = {arguments!r}\n{_CODE}")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    numbers, done, user = result.output.partition("done")
    if not done:
        raise SandboxUnavailable(
            f"The sandbox's probe did not finish ({result.status}): {result.output[-2000:]}"
        )
    succeeded = [ATTEMPTS[int(number)] for number in numbers.split()]
    broken = {name for name, _, _ in succeeded}
    enforced = {*ALWAYS, *(name for name, _, _ in ATTEMPTS if name not in broken)}
    if facts["namespaces"] or facts["rung"] == "sealed":
        enforced.add("disk limit")  # else files that were unlinked count towards no limit
    if "process creation" in enforced:
        enforced.add("killed with the host")
    if facts["own user"] and int(user) != os.getuid():
        enforced.add("own user")
    if facts["namespaces"]:
        enforced.add("own namespaces")
    missing = [name for name in MEANINGS if name not in enforced and name not in OPTIONAL]
    if missing:
        what = ", ".join(what for _, what, _ in succeeded)
        if not degraded:
            raise SandboxUnavailable(
                f"The code cannot be confined here: a probe succeeded at {what}. Use a remote "
                "backend (rllib_gtpo.sandbox.remote), or accept it with allow_degraded=True."
            )
        warnings.warn(
            f"This sandbox is DEGRADED: code in it has your rights. Not enforced: "
            f"{', '.join(missing)} (a probe succeeded at {what}).",
            RuntimeWarning,
            stacklevel=3,
        )
    elif facts["rung"] == "sealed":
        warnings.warn(
            "This sandbox is sealed, for want of Landlock: code cannot open files and can import "
            "only what `preload` names and a few modules of the standard library.",
            RuntimeWarning,
            stacklevel=3,
        )
    return report(enforced)
