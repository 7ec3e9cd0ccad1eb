"""Isolated execution of model-written Python.  Standard library only."""

from rllib_gtpo.sandbox.limits import Limits, SandboxResult, SandboxUnavailable, Status
from rllib_gtpo.sandbox.python import PythonSandbox, Session

__all__ = ["Limits", "PythonSandbox", "SandboxResult", "SandboxUnavailable", "Session", "Status"]
