"""What every sandbox offers, on this machine or behind a service.

`PythonSandbox` and the remote clients satisfy `SandboxBackend`; whoever runs code asks for no more
than this, so that gVisor, SandboxFusion or a hosted sandbox can stand in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from rllib_gtpo.sandbox.limits import SandboxResult


@runtime_checkable
class SessionBackend(Protocol):
    """A notebook-like session: names stay between its cells, which run one after the other.

    If the process behind it is lost, the next result's output begins with `limits.RESTARTED`.
    """

    async def arun(self, code: str) -> SandboxResult:
        """Run `code` as the next cell.  Never raises for what the code does.

        Raises:
            SandboxUnavailable: The backend cannot run code, or the session is closed.
        """
        ...

    def close(self) -> None:
        """End the session without waiting for it; may be called again."""
        ...


@runtime_checkable
class SandboxBackend(Protocol):
    """Runs Python that nobody has read."""

    async def arun(self, code: str) -> SandboxResult:
        """Run `code` by itself.  Never raises for what the code does; cancelling it ends the code.

        Raises:
            SandboxUnavailable: The backend cannot run code.
        """
        ...

    def session(self) -> SessionBackend:
        """Open a session.  Returns at once; a failure waits for its first cell."""
        ...

    def close(self) -> None:
        """End everything that runs here; may be called again."""
        ...

    @property
    def guarantees(self) -> Mapping[str, bool]:
        """What is known to be enforced (True) and what is not or cannot be told (False), by name.

        The names are those of `rllib_gtpo.sandbox.guarantees.NAMES`.
        """
        ...
