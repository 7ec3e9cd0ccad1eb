"""The forked process that runs the code.  Loaded into the zygote; imports only the library.

Nothing in here is trusted once the code has started: the status of a fresh run is the kernel's wait
status alone, and a session's replies are only as good as the session.
"""

from __future__ import annotations

import errno
import linecache
import os
import resource
import signal
import socket
import struct
import sys
import traceback
import types
from typing import Any, TextIO

EXIT_OK, EXIT_ERROR, EXIT_MEMORY, EXIT_DISK, EXIT_SETUP = 0, 1, 241, 242, 243
INLINE = 1 << 14  # bytes of a cell's code that travel in its message; longer code as a memory file
REPLY = struct.Struct("<QB")  # the cell's nonce, how it ended
SOCKET = 3  # a session's own descriptor, the only one besides 0, 1 and 2
RESERVE = 64 << 20  # address space for reporting a MemoryError
DISK_ERRORS = (errno.EFBIG, errno.ENOSPC, errno.EDQUOT)


def run(kind: str, fds: list[int], confinement: Any, slot: Any, limits: dict[str, Any]) -> None:
    """Confine this process and run what it was forked for.  Never returns.

    `confinement` is the zygote's `confine.Confinement`, `limits` its limits with `address_space`.
    """
    try:
        _enter(fds[1], slot.path)
        confinement.renounce(slot)
        if kind == "session":
            os.dup2(fds[0], SOCKET)
            os.closerange(SOCKET + 1, 1 << 30)
            memory = _limit(limits)
            sock = socket.socket(fileno=SOCKET)
            confinement.lock()
            _serve(sock, memory, limits)
        else:
            code = _read(fds[0])
            os.closerange(3, 1 << 30)
            memory = _limit(limits)
            confinement.lock()
            _exit(_execute(code, "<cell>", _main_module(), memory))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(EXIT_SETUP)


def _enter(out: int, scratch: str) -> None:
    """Leave the zygote behind: own session, output and home."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    nothing = os.open("/dev/null", os.O_RDONLY)  # the zygote's own would be one for all
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = sys.__stdout__ = _stream(1)  # type: ignore[assignment,misc]
    sys.stderr = sys.__stderr__ = _stream(2)  # type: ignore[assignment,misc]
    os.environ["HOME"] = os.environ["TMPDIR"] = scratch
    if "tempfile" in sys.modules:
        vars(sys.modules["tempfile"])["tempdir"] = None
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()  # fork copies its state; `random` reseeds itself


def _stream(fd: int) -> TextIO:
    """A text stream that writes lines as they come.

    So stdout and stderr keep their order, and a process that is killed leaves what it printed.
    """
    return open(fd, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)


def set_limit(kind: int, value: int, hard: int | None = None) -> int:
    """Set a resource limit, or as much of it as this process was left; returns the soft one."""
    most = resource.getrlimit(kind)[1]
    hard = value if hard is None else hard
    if most != resource.RLIM_INFINITY:
        value = min(value, most)
        hard = most if hard == resource.RLIM_INFINITY else min(hard, most)
    resource.setrlimit(kind, (value, hard))
    return value


def _limit(limits: dict[str, Any]) -> int:
    """Set the resource limits; returns the address space that the code may reach.

    The size of a file and of a core dump are the zygote's own limits, which are inherited.
    """
    memory = set_limit(resource.RLIMIT_AS, limits["address_space"] + RESERVE) - RESERVE
    set_limit(resource.RLIMIT_NOFILE, int(limits["open_files"]))
    _limit_cpu(limits["cpu_seconds"])
    return memory


def _limit_cpu(seconds: float) -> None:
    """Let the kernel end what the host should have ended by its own, finer, clock."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(usage.ru_utime + usage.ru_stime + seconds) + 2
    set_limit(resource.RLIMIT_CPU, soft, resource.RLIM_INFINITY)


def _read(fd: int) -> str:
    """The source code in the memory file `fd`, which is closed."""
    with open(fd, "rb", 0) as f:
        f.seek(0)
        return f.read().decode("utf-8", "surrogatepass")


def _main_module() -> dict[str, Any]:
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = module
    return module.__dict__


def _serve(sock: socket.socket, memory: int, limits: dict[str, Any]) -> None:
    """Run the cells of a session until the host closes it."""
    variables = _main_module()
    count = 0
    while True:
        try:
            message, fds, _, _ = socket.recv_fds(sock, 8 + INLINE, 1)
        except OSError:
            os._exit(EXIT_SETUP)  # the code closed the descriptor
        if not message:
            os._exit(EXIT_OK)
        count += 1
        code = _read(fds[0]) if fds else message[8:].decode("utf-8", "surrogatepass")
        if count > 1:
            _limit_cpu(limits["cpu_seconds"])
        status = _execute(code, f"<cell {count}>", variables, memory)
        _flush()
        try:
            sock.send(REPLY.pack(int.from_bytes(message[:8], "little"), status))
        except OSError:
            os._exit(EXIT_SETUP)


def _execute(code: str, name: str, variables: dict[str, Any], memory: int) -> int:
    """Run `code`, print what escapes from it as CPython does, and say how it ended."""
    lines = [line + "\n" for line in code.split("\n")]  # tracebacks quote them
    linecache.cache[name] = (len(code), None, lines, name)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    try:
        resource.setrlimit(resource.RLIMIT_AS, (memory, hard))
        exec(compile(code, name, "exec", dont_inherit=True), variables)
        return EXIT_OK
    except SystemExit as error:
        return _exit_code(error.code)
    except BaseException as error:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        _report(error)
        if isinstance(error, MemoryError):
            return EXIT_MEMORY
        disk = isinstance(error, OSError) and error.errno in DISK_ERRORS
        return EXIT_DISK if disk else EXIT_ERROR
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def _exit_code(code: object) -> int:
    """What CPython makes of the argument of sys.exit, short of the codes reserved here."""
    if code is None:
        return EXIT_OK
    if isinstance(code, int):
        return EXIT_OK if code & 0xFF == 0 else EXIT_ERROR
    print(code, file=sys.stderr)
    return EXIT_ERROR


def _report(error: BaseException) -> None:
    """Print `error` without the frames of this file."""
    tb = error.__traceback__.tb_next if error.__traceback__ else None
    whole = isinstance(error, SyntaxError) and tb is None  # the cell did not even begin
    if isinstance(error, SyntaxError) and whole:
        error.__traceback__ = None
        error.text = error.text or linecache.getline(error.filename or "", error.lineno or 0)
    try:
        if whole or sys.excepthook is not sys.__excepthook__:
            sys.excepthook(type(error), error, tb)
        else:
            sys.stdout.flush()
            traceback.print_exception(type(error), error, tb)
    except BaseException:
        print(type(error).__name__, file=sys.stderr)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        try:
            stream.flush()  # type: ignore[union-attr]
        except BaseException:
            continue


def _exit(status: int) -> None:
    """End as an interpreter does (threads, exit handlers, buffers) without its slow tear-down."""
    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        if "atexit" in sys.modules:
            sys.modules["atexit"]._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    _flush()
    os._exit(status)
