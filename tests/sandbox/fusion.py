"""A SandboxFusion service on this machine: runs the code for real, and fails when told to."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Fusion(ThreadingHTTPServer):
    """Answers POST /run_code; the first of `faults`, if any, answers in its stead."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: deque[Callable[[Handler], None]] = deque()
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.connections = 0
        self.most = self.now = 0  # requests at one time
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def get_request(self):
        self.connections += 1
        return super().get_request()

    def handle_error(self, request, client_address):
        """Clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Fusion

    def log_message(self, format, *args):
        """Quiet."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            self.server.headers.append(self.headers)
            fault = self.server.faults.popleft() if self.server.faults else None
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        try:
            if fault is not None:
                fault(self)
            elif self.path != "/run_code":
                self.answer(404, {"detail": "Not Found"})
            else:
                self.answer(200, run_code(body))
        finally:
            with self.server.lock:
                self.server.now -= 1

    def answer(self, status: int, body: Any, **headers: str) -> None:
        """Send a JSON body, or bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def run_code(request: dict[str, Any]) -> dict[str, Any]:
    """What the service does with `language: python`."""
    assert request["language"] == "python"
    with tempfile.TemporaryDirectory() as directory:
        with tempfile.NamedTemporaryFile("w", dir=directory, suffix=".py", delete=False) as f:
            f.write(request["code"])
        began = time.monotonic()
        try:
            done = subprocess.run(
                [sys.executable, f.name],
                input=(request.get("stdin") or "").encode(),
                capture_output=True,
                cwd=directory,
                timeout=request["run_timeout"],
            )
            run = {"status": "Finished", "return_code": done.returncode}
        except subprocess.TimeoutExpired as error:
            done, run = error, {"status": "TimeLimitExceeded", "return_code": None}
    run |= {
        "execution_time": time.monotonic() - began,
        "stdout": (done.stdout or b"").decode(errors="replace"),
        "stderr": (done.stderr or b"").decode(errors="replace"),
    }
    ok = run["status"] == "Finished" and run["return_code"] == 0
    return {
        "status": "Success" if ok else "Failed",
        "message": "",
        "compile_result": None,
        "run_result": run,
        "executor_pod_name": None,
        "files": {},
    }
