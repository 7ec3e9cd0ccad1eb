"""How strongly this machine lets us confine: the ladder, and one rung of it put into practice.

Runs in the zygote, which sets up once whatever can be shared, and in each child, which gives up
its rights for good.  Imported under a private name there, hence the relative imports.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from typing import Any

from . import identity, landlock, namespaces, roots, seccomp, sweep
from .child import set_limit

NO_FILTER = (
    "seccomp filters are not available here (there is one for Linux on x86-64), so nothing can be "
    "confined. Run the code elsewhere with a remote backend (rllib_gtpo.sandbox.remote), or accept "
    "a sandbox that only sets resource limits with allow_degraded=True."
)
_SET_DUMPABLE = 4
_libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """Nothing can be confined here."""


class Slot:
    """A scratch directory and the rights to it; used by one execution after another."""

    def __init__(self, number: int, path: str, user: int, ruleset: int) -> None:
        """See `Confinement.open_slot`."""
        self.number, self.path, self.user, self.ruleset = number, path, user, ruleset


class Confinement:
    """What is put around the children of one zygote."""

    def __init__(self, config: dict[str, Any]) -> None:
        """Find out what works here, at most up to the rung `config["layers"]`.

        Raises:
            Refused: There is no way to confine and `config["degraded"]` does not accept that.
        """
        layers, self.scratch, self.limits = config["layers"], config["scratch"], config["limits"]
        self._zygote = os.getpid()
        self.directories = roots.directories(config["path"])
        self._rules: landlock.Rules | None = None
        self._filter: seccomp.Filter | None = None
        self.namespaces = self.search = False
        self.first_user = 0
        self.rung = "rlimits-only"
        if layers == "rlimits-only" or not _filters_work():
            if not config["degraded"]:
                raise Refused(NO_FILTER)
            return
        self.rung = "sealed" if layers == "sealed" or not landlock.version() else "landlock"
        self.first_user = identity.first_user()
        if layers == "auto" and namespaces.available(self.scratch, not self.first_user):
            self.namespaces = True
            if self.rung == "landlock":
                self.rung = "namespaces"

    @property
    def users(self) -> int:
        """How many slots can be open at one time, so that no two have the same user."""
        return identity.USERS if self.first_user else 1 << 20

    @property
    def sealed(self) -> bool:
        """Whether nothing can be opened."""
        return self.rung == "sealed"

    @property
    def confined(self) -> bool:
        """Whether children can leave nothing but files in their own directory."""
        return self.rung != "rlimits-only"

    def facts(self) -> dict[str, Any]:
        """What the host wants to know."""
        return {
            "rung": self.rung,
            "landlock": landlock.version() if self._rules else 0,
            "own user": bool(self.first_user),
            "namespaces": self.namespaces,
        }

    def unbounded(self) -> tuple[tuple[int, int] | None, int]:
        """What a watchdog must bound: (bytes, files) of a slot or None, and threads or 0."""
        disk = (int(self.limits["disk_mb"] * (1 << 20)), int(self.limits["disk_files"]))
        return (
            None if self.namespaces or self.sealed else disk,
            0 if self.first_user else int(self.limits["threads"]),
        )

    def enter(self) -> None:
        """Before the preload: what needs a process of one thread."""
        if self.namespaces:
            namespaces.enter(not self.first_user)

    def seal(self) -> None:
        """After the preload: what every child inherits or shares."""
        with open("/proc/self/statm") as f:
            size = int(f.read().split()[0]) * resource.getpagesize()
        self.limits["address_space"] = size + int(self.limits["memory_mb"] * (1 << 20))
        files = roots.libraries(self.directories) if self.confined else []
        devices = [path for path in roots.DEVICES if os.path.exists(path)]
        if self.first_user:
            os.chmod(self.scratch, 0o711)
            reach = (
                [] if self.namespaces or self.sealed else [*self.directories, *files, self.scratch]
            )
            self.search = identity.needs_search(reach)
        if self.namespaces:
            namespaces.enter_root(self.directories, [*files, *devices], self.scratch)
        if self.rung in ("namespaces", "landlock"):
            access = [
                (path, landlock.READ if os.path.isdir(path) else landlock.FILE_READ)
                for path in [*self.directories, *files, *devices]
            ]
            access += [(path, landlock.FILE_WRITE) for path in devices[:1]]
            self._rules = landlock.Rules(access)
        if self.confined:
            self._filter = seccomp.Filter(self.sealed)
            _libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0)  # out of reach of each other, also as one user
        for name, size in (
            ("RLIMIT_CORE", 0),
            ("RLIMIT_FSIZE", self.limits["file_mb"] * (1 << 20)),
        ):
            set_limit(getattr(resource, name), int(size))

    def open_slot(self, number: int) -> Slot:
        """Make an empty scratch directory that belongs to its own user.

        Raises:
            OSError: The kernel refuses.
        """
        path = os.path.join(self.scratch, str(number))
        user = self.first_user + number % identity.USERS if self.first_user else os.getuid()
        os.mkdir(path, 0o700)
        if self.namespaces:
            size = int(self.limits["disk_mb"] * (1 << 20))
            namespaces.mount_scratch(path, user, size, self.limits["disk_files"])
        elif self.first_user:
            os.chown(path, user, user)
        ruleset = self._rules.ruleset(path) if self._rules else -1
        return Slot(number, path, user, ruleset)

    def remove_slot(self, slot: Slot) -> None:
        """Remove a scratch directory and its files; may take long, so not in the zygote itself.

        On a loaded machine the kernel alone may take a second to unmount something.
        """
        if self.namespaces:
            namespaces.unmount_scratch(slot.path)
        else:
            sweep.sweep(slot.path)

    def renounce(self, slot: Slot) -> None:
        """In the child, first part: its user, its death with the zygote, its files.

        Raises:
            OSError: The kernel refuses.
        """
        os.chdir(slot.path)
        if self.first_user:
            identity.assume(slot.user, self.search)
            set_limit(resource.RLIMIT_NPROC, int(self.limits["threads"]))
        elif self.confined:
            identity.drop_capabilities()
        identity.die_with(self._zygote)
        if slot.ruleset >= 0:
            landlock.restrict(slot.ruleset)

    def lock(self) -> None:
        """In the child, last part: no system call from here on that is not on the list.

        Raises:
            OSError: The kernel refuses.
        """
        if self._filter is not None:
            self._filter.install(os.getpid())


def _filters_work() -> bool:
    """Whether a filter can be installed; found out in a throw-away child."""
    if not seccomp.supported():
        return False
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(OSError):
            seccomp.Filter(True).install(os.getpid())
            os._exit(0)
        os._exit(1)
    return os.waitpid(pid, 0)[1] == 0
