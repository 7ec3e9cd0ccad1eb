"""The system-call filter: an allowlist for x86-64 as a classic BPF program.

Whatever is not named here fails with EPERM, or has no effect; a foreign ABI (int 0x80, x32) kills
the process.  A filter cannot follow pointers, so what a path or an address may be is Landlock's
part; without Landlock the *sealed* filter refuses every call that opens or changes anything by its
name.  Runs in the zygote and its children; standard library only.
"""

from __future__ import annotations

import ctypes
import platform
import struct

ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOSYS, EOPNOTSUPP = 1, 38, 95
AUDIT_ARCH_X86_64 = 0xC000003E
X32_BIT = 0x40000000
_LOAD, _AND, _RETURN, _JUMP = 0x20, 0x54, 0x06, 0x05
_JUMP_EQUAL, _JUMP_AT_LEAST = 0x15, 0x35
_NUMBER, _ARCH = 0, 4  # offsets in struct seccomp_data
_INSTRUCTION = struct.Struct("<HBBI")
_SECCOMP, _PRCTL_NO_NEW_PRIVS, _FLAG_SPEC_ALLOW = 317, 38, 4
PID = -1  # stands for the process's own id, which is filled in after the fork

Instruction = tuple[int, int, int, int]

# Names are for the reader; the numbers are what counts.
PLAIN = {
    **dict(read=0, write=1, close=3, stat=4, fstat=5, lstat=6, poll=7, lseek=8, mmap=9),
    **dict(mprotect=10, munmap=11, brk=12, rt_sigaction=13, rt_sigprocmask=14, rt_sigreturn=15),
    **dict(pread64=17, pwrite64=18, readv=19, writev=20, access=21, pipe=22, select=23),
    **dict(sched_yield=24, mremap=25, msync=26, madvise=28, dup=32, dup2=33, pause=34),
    **dict(nanosleep=35, getitimer=36, alarm=37, setitimer=38, getpid=39, sendfile=40),
    **dict(recvfrom=45, recvmsg=47, shutdown=48, getsockname=51, getpeername=52, getsockopt=55),
    **dict(exit=60, wait4=61, uname=63, fsync=74, fdatasync=75, ftruncate=77),
    **dict(getdents=78, getcwd=79, umask=95, gettimeofday=96, getrlimit=97, getrusage=98),
    **dict(sysinfo=99, times=100, getuid=102, getgid=104, geteuid=107, getegid=108, getppid=110),
    **dict(getpgrp=111, getgroups=115, getresuid=118, getresgid=120, getpgid=121, getsid=124),
    **dict(capget=125, rt_sigpending=127, rt_sigtimedwait=128, rt_sigsuspend=130),
    **dict(sigaltstack=131, statfs=137, fstatfs=138, sched_getparam=143, sched_getscheduler=145),
    **dict(sched_get_priority_max=146, sched_get_priority_min=147, gettid=186, time=201),
    **dict(futex=202, sched_getaffinity=204, epoll_create=213, getdents64=217),
    **dict(set_tid_address=218, restart_syscall=219, fadvise64=221, clock_gettime=228),
    **dict(clock_getres=229, clock_nanosleep=230, exit_group=231, epoll_wait=232, epoll_ctl=233),
    **dict(waitid=247, newfstatat=262, faccessat=269, pselect6=270, ppoll=271),
    **dict(set_robust_list=273, epoll_pwait=281, eventfd=284, eventfd2=290, epoll_create1=291),
    **dict(dup3=292, preadv=295, pwritev=296, getcpu=309, getrandom=318),
    **dict(membarrier=324, preadv2=327, pwritev2=328, statx=332, rseq=334, close_range=436),
    **dict(faccessat2=439, epoll_pwait2=441),
}
# Changes by name: safe only where Landlock says which names.
NAMED = {
    **dict(chdir=80, fchdir=81, rename=82, mkdir=83, rmdir=84, link=86, unlink=87, symlink=88),
    **dict(readlink=89, mkdirat=258, unlinkat=263, renameat=264, linkat=265, symlinkat=266),
    **dict(readlinkat=267),
}
OPEN, OPENAT = 2, 257
FCNTL_COMMANDS = (
    *range(0, 6),  # duplicate, descriptor and status flags, ask for a lock
    *(36, 1030, 1032),  # the newer lock, duplicate, ask for a pipe's size
)  # not F_SETOWN, F_SETSIG, F_SETLEASE, F_NOTIFY, F_SETPIPE_SZ
# Taking and giving back locks: success without effect.  One process needs none, and on files that
# others read, too, such as the library's, they would reach siblings and the host.
FCNTL_LOCKS = (6, 7, 37, 38)
IOCTLS = (
    0x5401,
    0x5413,
    0x541B,
    0x5421,
    0x5450,
    0x5451,
)  # isatty, size, FIONREAD, FIONBIO, CLOEXEC
PRCTLS = (15, 16, 0x53564D41)  # names of threads and of mappings
XATTRS = range(188, 200)  # EOPNOTSUPP, which is how the standard library expects a refusal
# chmod, utime and their kin: success without effect, because `shutil.copy` calls them on its own
# files, and Landlock does not mediate them, so that they cannot be allowed for own files alone.
# flock (73): see FCNTL_LOCKS.
PRETENDED = (73, 90, 91, 132, 235, 261, 268, 280, 452)
O_ACCMODE, O_TRUNC, O_TMPFILE = 3, 0o1000, 0o20000000
_THREAD = 0x00010900  # CLONE_VM | CLONE_SIGHAND | CLONE_THREAD: must all be set
# Must not be set: an exit signal, CLONE_VFORK, PTRACE, PARENT, UNTRACED, IO and every CLONE_NEW*.
_NOT_THREAD = 0x000000FF | 0xFE82E000


def supported() -> bool:
    """Whether this module has a filter for the machine; the kernel is another matter."""
    return platform.machine() == "x86_64" and struct.calcsize("P") == 8


def _argument(index: int) -> int:
    return 16 + 8 * index  # its lower half, which is all that the kernel uses of an int


def _result(action: int) -> Instruction:
    return (_RETURN, 0, 0, action)


def _one_of(index: int, values: tuple[int, ...]) -> list[Instruction]:
    """Allow if the int argument `index` is one of `values`."""
    tests = [(_JUMP_EQUAL, len(values) - n, 0, value) for n, value in enumerate(values)]
    return [(_LOAD, 0, 0, _argument(index)), *tests, _result(ERRNO | EPERM), _result(ALLOW)]


def _open(index: int) -> list[Instruction]:
    """Allow the flags in argument `index` unless they truncate what is not opened for writing.

    Landlock before its third version does not see that, nor access mode 3, which is neither.
    Nor a file that never has a name, which would count towards no limit.
    """
    return [
        (_LOAD, 0, 0, _argument(index)),
        (_AND, 0, 0, O_TMPFILE),
        (_JUMP_EQUAL, 0, 6, 0),
        (_LOAD, 0, 0, _argument(index)),
        (_AND, 0, 0, O_ACCMODE | O_TRUNC),
        (_JUMP_EQUAL, 3, 0, O_TRUNC),
        (_AND, 0, 0, O_ACCMODE),
        (_JUMP_EQUAL, 1, 0, O_ACCMODE),
        _result(ALLOW),
        _result(ERRNO | EPERM),
    ]


def _fcntl() -> list[Instruction]:
    """Allow what is harmless, pretend locks."""
    allowed, locks = len(FCNTL_COMMANDS), len(FCNTL_LOCKS)
    tests = [
        (_JUMP_EQUAL, allowed + locks - n + 1, 0, value) for n, value in enumerate(FCNTL_COMMANDS)
    ]
    tests += [(_JUMP_EQUAL, locks - n, 0, value) for n, value in enumerate(FCNTL_LOCKS)]
    ends = [_result(ERRNO | EPERM), _result(ERRNO), _result(ALLOW)]
    return [(_LOAD, 0, 0, _argument(1)), *tests, *ends]


_PIPE2 = [  # without O_NOTIFICATION_PIPE
    (_LOAD, 0, 0, _argument(1)),
    (_AND, 0, 0, 0o200),
    (_JUMP_EQUAL, 1, 0, 0),
    _result(ERRNO | EPERM),
    _result(ALLOW),
]
_CLONE = [
    (_LOAD, 0, 0, _argument(0)),
    (_AND, 0, 0, _THREAD | _NOT_THREAD),
    (_JUMP_EQUAL, 1, 0, _THREAD),
    _result(ERRNO | EPERM),
    _result(ALLOW),
]
_SOCKETPAIR = [  # of the kind that cannot be sent elsewhere: AF_UNIX, SOCK_STREAM
    (_LOAD, 0, 0, _argument(0)),
    (_JUMP_EQUAL, 0, 3, 1),
    (_LOAD, 0, 0, _argument(1)),
    (_AND, 0, 0, 0xF),
    (_JUMP_EQUAL, 1, 0, 1),
    _result(ERRNO | EPERM),
    _result(ALLOW),
]
_SENDTO = [  # to the other end only: the address, a pointer, must be null
    (_LOAD, 0, 0, _argument(4)),
    (_JUMP_EQUAL, 0, 2, 0),
    (_LOAD, 0, 0, _argument(4) + 4),
    (_JUMP_EQUAL, 1, 0, 0),
    _result(ERRNO | EPERM),
    _result(ALLOW),
]


def rules(sealed: bool) -> dict[int, list[Instruction]]:
    """What to do with each system call; the accumulator holds its number on entry."""
    found = {number: [_result(ALLOW)] for number in PLAIN.values()}
    found |= {
        16: _one_of(1, IOCTLS),
        44: _SENDTO,
        53: _SOCKETPAIR,
        56: _CLONE,
        62: _one_of(0, (PID,)),  # kill
        72: _fcntl(),
        157: _one_of(0, PRCTLS),
        293: _PIPE2,
        234: _one_of(0, (PID,)),  # tgkill
        302: _one_of(0, (0, PID)),  # prlimit64
        435: [_result(ERRNO | ENOSYS)],  # clone3: its flags lie in memory; libc falls back to clone
    }
    found |= {number: [_result(ERRNO | EOPNOTSUPP)] for number in XATTRS}
    found |= {number: [_result(ERRNO)] for number in PRETENDED}
    if not sealed:
        found |= {number: [_result(ALLOW)] for number in NAMED.values()}
        found |= {OPEN: _open(1), OPENAT: _open(2)}
    return found


def build(sealed: bool) -> list[Instruction]:
    """The program: a binary search for the number, so that the kernel attaches it quickly."""
    refuse = [_result(ERRNO | EPERM)]
    found = rules(sealed)
    leaves: list[tuple[int, list[Instruction]]] = []  # (first number, what to do from there on)
    for number in range(max(found) + 2):
        action = found.get(number, refuse)
        if not leaves or leaves[-1][1] != action:
            leaves.append((number, action))
    return [
        (_LOAD, 0, 0, _ARCH),
        (_JUMP_EQUAL, 1, 0, AUDIT_ARCH_X86_64),
        _result(KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_AT_LEAST, 0, 1, X32_BIT),
        _result(KILL),
        *_search(leaves),
    ]


def _search(leaves: list[tuple[int, list[Instruction]]]) -> list[Instruction]:
    if len(leaves) == 1:
        return leaves[0][1]
    middle = len(leaves) // 2
    left, right = _search(leaves[:middle]), _search(leaves[middle:])
    first = leaves[middle][0]
    if len(left) < 256:
        return [(_JUMP_AT_LEAST, len(left), 0, first), *left, *right]
    return [(_JUMP_AT_LEAST, 0, 1, first), (_JUMP, 0, 0, len(left)), *left, *right]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


class Filter:
    """A program ready to be installed, made once in the zygote."""

    def __init__(self, sealed: bool) -> None:
        """Lay out the program in memory."""
        program = build(sealed)
        self._own = [n * _INSTRUCTION.size + 4 for n, i in enumerate(program) if i[3] == PID]
        self._bytes = ctypes.create_string_buffer(
            b"".join(_INSTRUCTION.pack(*i[:3], i[3] & 0xFFFFFFFF) for i in program)
        )
        self._program = _Program(len(program), ctypes.addressof(self._bytes))
        self._libc = ctypes.CDLL(None, use_errno=True)

    def install(self, pid: int) -> None:
        """Put this process, whose id is `pid`, under the filter for good.

        Raises:
            OSError: The kernel refuses.
        """
        for offset in self._own:
            struct.pack_into("<I", self._bytes, offset, pid)
        libc = self._libc
        if libc.prctl(_PRCTL_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "no_new_privs")
        if libc.syscall(_SECCOMP, 1, _FLAG_SPEC_ALLOW, ctypes.byref(self._program)) != 0:
            raise OSError(ctypes.get_errno(), "seccomp")
