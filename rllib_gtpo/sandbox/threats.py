"""What hostile code tries, as data: for the command `check` and for the tests.

Each snippet runs after `PRELUDE`, with facts about its surroundings in `A`.  It calls `breach` if
its attack worked, and `refused` for attempts that must raise OSError.
"""

from __future__ import annotations

from dataclasses import dataclass

MARK = "rllib-gtpo-threat"  # in the name of every file that an attack may leave behind
PRELUDE = f"""
import ctypes, errno, os, signal, socket, struct, sys, time
MARK = "{MARK}"
libc = ctypes.CDLL(None, use_errno=True)
def breach(what):
    os.write(1, f"\\n{{A['marker']}} {{what}}\\n".encode())
def refused(**attempts):
    for name, attempt in attempts.items():
        try: attempt()
        except OSError: continue
        breach(name)
def raw(number, *arguments):
    result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
    if result < 0: raise OSError(ctypes.get_errno(), str(number))
    return result
def unreachable(**calls):
    for name, arguments in calls.items():
        try: raw(*arguments)
        except OSError as error:
            if error.errno == errno.EPERM: continue
        breach(name)
def create(path):
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)); os.unlink(path)
def leave(attempt):  # for attempts that would go on in a second process
    if attempt() == 0: os._exit(0)
"""


@dataclass(frozen=True, slots=True)
class Threat:
    """One attack.

    `control`: unconfined it is harmless to the machine and succeeds, at least as root, so that the
    negative control must see it.  Never set it for a bomb.
    """

    name: str
    layer: str  # what stops it
    code: str
    control: bool = False
    statuses: tuple[str, ...] = ()  # how it may end; empty: anyhow
    output: str = ""  # what the result's output must contain
    session: bool = False  # run as a cell


def _bomb(name: str, layer: str, code: str, *statuses: str, output: str = "") -> Threat:
    return Threat(name, layer, code, statuses=statuses, output=output)


def _kernel(name: str, layer: str, code: str, *statuses: str) -> Threat:
    return Threat(name, layer, code, control=True, statuses=statuses or ("ok",))


PROCESSES = (
    _kernel("fork", "seccomp", "refused(fork=lambda: leave(os.fork))"),
    _kernel("clone", "seccomp", "refused(clone=lambda: leave(lambda: raw(56, 17, 0, 0, 0, 0)))"),
    _kernel(
        "clone3",
        "seccomp",
        """
try: raw(435, 0, 0)
except OSError as error:
    if error.errno not in (errno.ENOSYS, errno.EPERM): breach("clone3")
""",
    ),
    _bomb("vfork", "seccomp", "refused(vfork=lambda: raw(58))"),
    _bomb(
        "clone into a user namespace",
        "seccomp",
        "refused(clone=lambda: leave(lambda: raw(56, 0x10000011, 0, 0, 0, 0)))",
    ),
    _bomb(
        "fork bomb",
        "seccomp",
        """
while True:
    try: os.fork(); breach("fork")
    except OSError: pass
""",
        "timeout",
    ),
    _bomb(
        "thread bomb",
        "limits",
        """
import threading
threading.stack_size(32768)
started = 0
try:
    while started < 5000:
        threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
        started += 1
except RuntimeError: pass
if started > 2 * A["threads"] + 1000: breach(f"{started} threads")
os._exit(0)
""",
    ),
    _kernel(
        "double-fork daemon",
        "seccomp",
        """
def daemon():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0: time.sleep(30)
        os._exit(0)
refused(daemon=daemon)
""",
    ),
    _kernel(
        "subprocess, os.system, exec",
        "seccomp",
        """
import subprocess
refused(run=lambda: subprocess.run(["/bin/true"]), popen=lambda: os.popen("true").close(),
        spawn=lambda: os.posix_spawn("/bin/true", ["true"], {}))
if os.system("exit 7") == 7 << 8: breach("system")
unreachable(execve=(59, 0, 0, 0), execveat=(322, -1, 0, 0, 0, 0))
""",
    ),
)
MEMORY = (
    _bomb("heap bomb", "limits", "x = []\nwhile True: x.append(bytearray(1 << 20))", "memory"),
    _bomb(
        "80 GB at once, also by numpy",
        "limits",
        """
try: import numpy; numpy.ones(10**10); breach("numpy")
except (ImportError, OSError): pass
bytearray(80 << 30)
""",
        "memory",
    ),
    _bomb(
        "shared mmap",
        "limits",
        """
import mmap
maps = []
while len(maps) < 64: maps.append(mmap.mmap(-1, 256 << 20))
breach("16 GB of shared memory")
""",
        "error",
        "memory",
    ),
    _kernel("memfd", "seccomp", "refused(memfd=lambda: os.close(os.memfd_create('x')))"),
    _kernel("/dev/shm", "landlock", "refused(shm=lambda: create('/dev/shm/' + MARK))"),
)
TIME = (
    _bomb(
        "loop that ignores all signals",
        "host",
        """
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True:
    try:
        while True: pass
    except BaseException: pass
""",
        "timeout",
    ),
    _bomb("3**10**9", "host", "3**10**9", "timeout", "memory"),
    _bomb("SIGSTOP to itself", "host", "os.kill(os.getpid(), signal.SIGSTOP)", "timeout"),
    _bomb(
        "exception whose __str__ loops",
        "host",
        "class E(Exception):\n def __str__(self):\n  while True: pass\nraise E",
        "timeout",
    ),
    _bomb("input()", "host", "input()", "error", output="EOFError: EOF when reading a line"),
)
OUTPUT = (
    _bomb("endless print", "host", "while True: print('x' * 9999)", "output_limit", "timeout"),
    _bomb(
        "20 MB, then exit",
        "host",
        "for _ in range(20000): sys.stdout.buffer.write(b'x' * 999 + b'\\n')\nprint('the end')",
        "ok",
        output="xxx\nthe end\n",
    ),
    _bomb(
        "surrogates, NUL, ANSI, bytes that are no text",
        "host",
        "print('\\ud800 \\0 \\x1b[2J'); sys.stdout.flush(); os.write(1, bytes(range(256)))",
        "ok",
        output="\\ud800 \0 \x1b[2J",
    ),
)
FILES = (
    _kernel(
        "writes to /etc, home, /tmp, /dev/shm, the prefix",
        "landlock",
        """
for place in A["places"]:
    refused(**{place: lambda: create(os.path.join(place, MARK))})
""",
    ),
    _kernel(
        "writes where everybody may",
        "landlock",
        """
refused(file=lambda: create(A["directory"] + "/" + MARK),
        write=lambda: open(A["file"], "a").close(),
        rename=lambda: os.rename(A["file"], A["file"]), link=lambda: os.link(A["file"], MARK))
""",
    ),
    _kernel(
        "chmod, chown, utime, xattr",
        "seccomp",
        """
def changed(attempt):  # some succeed without an effect
    before = os.stat(A["file"])
    attempt()
    if os.stat(A["file"]) == before: raise OSError
refused(chmod=lambda: changed(lambda: os.chmod(A["file"], 0o606)),
        chown=lambda: os.chown(A["file"], -1, -1),
        utime=lambda: changed(lambda: os.utime(A["file"], (1e9, 1e9))),
        xattr=lambda: os.setxattr(A["file"], "user.x", b""), list=lambda: os.listxattr(A["file"]))
""",
    ),
    _kernel(
        "truncate, O_RDONLY|O_TRUNC",
        "seccomp",
        """
refused(truncate=lambda: os.truncate(A["empty"], 0),
        open=lambda: os.close(os.open(A["empty"], os.O_RDONLY | os.O_TRUNC)),
        neither=lambda: os.close(os.open(A["empty"], 3 | os.O_TRUNC)))
""",
    ),
    _kernel(
        "reads of ~/.ssh, /etc/shadow, /etc/passwd, world-readable files",
        "landlock",
        """
def read(path): os.close(os.open(path, os.O_RDONLY))
for path in A["readable"]: refused(**{path: lambda: read(path)})
""",
    ),
    _kernel(
        "/proc: environ, maps, mem",
        "landlock",
        """
for pid in ("self", A["sibling"], A["zygote"], A["host"]):
    for name in ("environ", "maps", "mem"):
        refused(**{f"{pid}/{name}": lambda: os.close(os.open(f"/proc/{pid}/{name}", os.O_RDONLY))})
""",
    ),
    _kernel(
        "a sibling's scratch",
        "landlock",
        """
place = A["sibling_scratch"]
refused(list=lambda: os.listdir(place), read=lambda: open(place + "/note").close(),
        write=lambda: create(place + "/" + MARK))
""",
    ),
    _kernel(
        "leases and owners of descriptors",
        "seccomp",
        """
import fcntl
fd = os.open(MARK, os.O_CREAT | os.O_RDWR)
refused(lease=lambda: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK),
        owner=lambda: fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid()),
        signal=lambda: fcntl.fcntl(fd, fcntl.F_SETSIG, 0),
        pipe=lambda: fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, 1 << 20))
""",
    ),
)
DISK = (
    _bomb(
        "disk fill",
        "limits",
        """
written = 0
for number in range(10**6):
    with open(str(number), "wb", 0) as f:
        for _ in range(8): written += f.write(bytes(1 << 20))
        if written > A["disk"] * 4 + (1 << 30): breach(f"{written} bytes"); break
""",
        "disk_limit",
        "timeout",
    ),
    _bomb(
        "inode bomb",
        "limits",
        """
for number in range(10**6):
    open(str(number), "w").close()
    if number > 100 * A["disk_files"]: breach(f"{number} files"); break
""",
        "disk_limit",
        "timeout",
    ),
    _bomb(
        "unreadable directories",
        "host",
        """
for n in 1, 2, 3: os.mkdir(str(n), 0o300); open(f"{n}/f", "w").close(); os.mkdir(f"{n}/d", 0)
""",
    ),
    _bomb(
        "3,000-deep tree",
        "host",
        "for _ in range(3000): os.mkdir('d'); os.chdir('d')\nopen('f', 'w').close()",
    ),
    _bomb(
        "symbolic links at clean-up",
        "host",
        """
here = os.getcwd()
os.symlink(A["directory"], "link"); os.mkdir("d"); os.symlink(A["directory"], "d/link")
try: os.rename(here, here + MARK); os.symlink(A["directory"], here)
except OSError: pass
else: breach("replaced its own directory")
""",
    ),
)
NETWORK = (
    _kernel(
        "TCP",
        "seccomp",
        """
refused(connect=lambda: socket.create_connection(("127.0.0.1", A["tcp"]), 1).close(),
        listen=lambda: socket.create_server(("127.0.0.1", 0)).close())
""",
    ),
    _kernel(
        "UDP, raw, packet, netlink",
        "seccomp",
        """
def datagram():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.sendto(b"x", ("127.0.0.1", A["udp"]))
refused(udp=datagram, raw=lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1),
        packet=lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
        netlink=lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))
""",
    ),
    _kernel(
        "vsock and odd families",
        "seccomp",
        "unreachable(**{f'family {n}': (41, n, 1, 0) for n in (1, 2, 10, 16, 17, 38, 40, 44)})",
    ),
    _kernel(
        "unix sockets by path and by abstract name",
        "seccomp",
        """
def connect(address):
    with socket.socket(socket.AF_UNIX) as s: s.connect(address)
refused(path=lambda: connect(A["unix"]), abstract=lambda: connect("\\0" + A["abstract"]))
""",
    ),
    _kernel(
        "unnamed datagram to a path",
        "seccomp",
        """
def send(how):
    with socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0] as s: how(s)
refused(sendto=lambda: send(lambda s: s.sendto(b"x", A["datagrams"])),
        sendmsg=lambda: send(lambda s: s.sendmsg([b"x"], [], 0, A["datagrams"])))
""",
    ),
    _bomb("DNS", "seccomp", "refused(dns=lambda: socket.getaddrinfo('example.com', 80))"),
)
SYSTEM_CALLS = (
    _kernel(
        "raw system calls",
        "seccomp",
        """
unreachable(io_uring=(425, 0, 0), openat2=(437, 0, 0, 0, 0), bpf=(321, 0, 0, 0),
    perf=(298, 0, 0, 0), userfaultfd=(323, 0), keyctl=(250, 0, 0),
    add_key=(248, 0, 0, 0), request_key=(249, 0, 0, 0),
    mount=(165, 0, 0, 0, 0, 0), unshare=(272, 0), setns=(308, -1, 0), pivot_root=(155, 0, 0),
    chroot=(161, 0), mknod=(133, 0, 0, 0), mknodat=(259, -1, 0, 0, 0), by_handle=(304, 0, 0, 0),
    fanotify=(300, -1, 0), inotify=(294, -1), splice=(275, -1, 0, -1, 0, 0, 0),
    personality=(135, -1), modify_ldt=(154, 0, 0, 0), ioctl=(16, 0, 0x5412, 0),
    secret=(447, -1), landlock=(444, 0, 0, 1),
    memory_policy=(237, 0, 0, 0, 0, 0, 0), watch_queue=(293, 0, 0o200), timer=(222, 0, 0, 0))
""",
    ),
    _kernel("unknown system calls", "seccomp", "unreachable(a=(999,), b=(6000,))"),
    _kernel("x32 system calls", "seccomp", "unreachable(x32=(0x40000000 + 39,))", "killed"),
    _kernel(
        "int 0x80 shellcode",
        "seccomp",
        """
libc.mmap.restype = ctypes.c_void_p
page = libc.mmap(None, 4096, 7, 34, -1, 0)
ctypes.memmove(page, bytes.fromhex("b814000000cd80c3"), 8)
ctypes.CFUNCTYPE(ctypes.c_int)(page)()
breach("a 32-bit system call")
""",
        "killed",
    ),
    _kernel(
        "loosening its own bonds by prctl",
        "seccomp",
        """
refused(death=lambda: raw(157, 1, 0), dump=lambda: raw(157, 4, 1), keep=lambda: raw(157, 8, 0))
""",
    ),
)
OTHERS = (
    _kernel(
        "ptrace",
        "seccomp",
        "for pid in A['others']: refused(**{f'seize {pid}': lambda: raw(101, 0x4206, pid, 0, 0)})",
    ),
    _kernel(
        "process_vm_readv, pidfd_open, kcmp, prlimit",
        "seccomp",
        """
import resource
for pid in A["others"]:
    refused(read=lambda: raw(310, pid, 0, 0, 0, 0, 0), write=lambda: raw(311, pid, 0, 0, 0, 0, 0),
            pidfd=lambda: os.close(raw(434, pid, 0)), compare=lambda: raw(312, pid, pid, 1, 0, 0),
            prlimit=lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE))
""",
    ),
    _kernel(
        "signals to others",
        "seccomp",
        """
refused(everybody=lambda: os.kill(-1, 0), group=lambda: os.kill(0, 0))
info = ctypes.create_string_buffer(struct.pack("<iii", 0, 0, -1) + bytes(116))
for pid in A["others"]:
    refused(kill=lambda: os.kill(pid, 0), tkill=lambda: raw(200, pid, 0),
            tgkill=lambda: raw(234, pid, pid, 0),
            queue=lambda: raw(129, pid, 0, ctypes.addressof(info)))
""",
    ),
    _bomb(
        "killing for real",
        "seccomp",
        """
for pid in (-1, *A["others"]):
    refused(**{f"kill {pid}": lambda: os.kill(pid, signal.SIGKILL)})
""",
    ),
    _kernel(
        "System V IPC",
        "seccomp",
        """
refused(shm=lambda: raw(31, raw(29, 0, 4096, 0o1600), 0, 0),
        sem=lambda: raw(66, raw(64, 0, 1, 0o1600), 0, 0),
        msg=lambda: raw(71, raw(68, 0, 0o1600), 0, 0))
""",
    ),
    _kernel(
        "POSIX message queues",
        "seccomp",
        """
name = ctypes.create_string_buffer(MARK.encode())
def queue():
    os.close(raw(240, ctypes.addressof(name), os.O_CREAT | os.O_RDWR, 0o600, 0))
    raw(241, ctypes.addressof(name))
refused(queue=queue)
""",
    ),
    _kernel(
        "raising its limits and priority",
        "seccomp",
        """
import resource
def more(name):
    hard = resource.getrlimit(name)[1]
    if hard == resource.RLIM_INFINITY: raise OSError
    try: resource.setrlimit(name, (hard, hard + 1))
    except ValueError: raise OSError  # what the module makes of EPERM
refused(memory=lambda: more(resource.RLIMIT_AS), files=lambda: more(resource.RLIMIT_NOFILE),
        size=lambda: more(resource.RLIMIT_FSIZE), nice=lambda: os.nice(-1),
        affinity=lambda: os.sched_setaffinity(0, os.sched_getaffinity(0)))
""",
    ),
    _kernel(
        "setuid(0), setgid(0), capset",
        "seccomp",
        """
header, sets = struct.pack("<Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
def capabilities():
    libc.capget(header, sets)
    if libc.capset(header, sets) != 0: raise OSError
refused(user=lambda: os.setuid(0), group=lambda: os.setgid(0), both=lambda: os.setresuid(0, 0, 0),
        groups=lambda: os.setgroups([0]), capset=capabilities)
""",
    ),
)
MISCHIEF = (
    _bomb("os._exit(0)", "host", "os._exit(0)", "ok"),
    Threat("os._exit(0) in a session", "host", "os._exit(0)", statuses=("error",), session=True),
    _bomb("closing every descriptor", "host", "os.closerange(0, 4096)"),
    Threat(
        "closing every descriptor in a session",
        "host",
        "os.closerange(0, 4096)",
        statuses=("protocol_violation",),
        session=True,
    ),
    Threat(
        "garbage to every descriptor",
        "host",
        """
for fd in range(64):
    try: os.write(fd, b"garbage" * 99)
    except OSError: pass
""",
        statuses=("protocol_violation",),
        session=True,
    ),
    _bomb(
        "inherited descriptors",
        "host",
        """
for fd in range(3, 4096):
    refused(**{f"descriptor {fd}": lambda: os.fstat(fd)})
""",
    ),
    _bomb(
        "the environment's secrets",
        "host",
        "if any(A['secret'][:9] in value for value in os.environ.values()): breach('secret')",
    ),
    _bomb(
        "stack overflow",
        "host",
        "sys.setrecursionlimit(10**9)\na = []\nfor _ in range(10**5): a = [a]\nrepr(a)",
        "killed",
        "timeout",
    ),
    _bomb("NULL read", "host", "ctypes.string_at(0)", "killed"),
    _bomb(
        "tampering with builtins and modules",
        "host",
        """
import builtins, gc
for thing in gc.get_objects():
    if type(thing).__name__ in ("Confinement", "Zygote", "Filter", "Rules"): vars(thing).clear()
builtins.print = builtins.exec = builtins.compile = builtins.open = None
os.fork = os._exit = lambda *a: None
sys.modules.clear()
""",
    ),
    _bomb(
        "searching memory for other rollouts",
        "host",
        """
import gc
prefix = A["rollout"]
def texts():
    for thing in gc.get_objects():
        for item in (*gc.get_referents(thing), thing):
            if isinstance(item, str): yield item
            elif isinstance(item, bytes): yield item.decode("latin1")
for text in texts():
    found = text.find(prefix + "-")
    if found >= 0 and text[found + len(prefix) + 1:][:4].isdigit(): breach(text[found:][:40])
""",
    ),
)
THREATS: tuple[Threat, ...] = (
    *(PROCESSES + MEMORY + TIME + OUTPUT + FILES + DISK + NETWORK),
    *(SYSTEM_CALLS + OTHERS + MISCHIEF),
)
