"""A local server that speaks the Bedrock runtime protocol, as far as embeddings go."""

from __future__ import annotations

import hashlib
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np


def vector_of(text, dimensions):
    """What the server answers: a unit vector that depends on the text alone."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    vector = np.random.default_rng(seed).normal(size=dimensions)
    return vector / np.linalg.norm(vector)


def error(code, status, message="told by the test"):
    """An AWS error answer."""
    headers = {"x-amzn-ErrorType": code}
    return status, headers, json.dumps({"message": message}).encode()


def raw(body):
    """An answer with status 200 and any body."""
    return 200, {}, body


class Bedrock:
    """Answers with `vector_of`, unless `behave(text, n)` gives an answer of its own.

    n: how often this text was asked for before.  requests: (model id, request) of every call.
    """

    def __init__(self, behave=lambda text, n: None):
        self.behave = behave
        self.requests = []
        self._asked = {}
        self._lock = threading.Lock()
        bedrock = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status, headers, answer = bedrock._answer(self.path, json.loads(body))
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client's patience was shorter

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def texts(self):
        return [request["inputText"] for _, request in self.requests]

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, path, request):
        _, kind, model, action = urllib.parse.unquote(path).split("/")
        if (kind, action) != ("model", "invoke"):
            return error("UnknownOperationException", 404)
        text = request["inputText"]
        with self._lock:
            self.requests.append((model, request))
            n = self._asked[text] = self._asked.get(text, -1) + 1
        own = self.behave(text, n)
        if own is not None:
            return own
        vector = vector_of(text, request["dimensions"])
        return raw(json.dumps({"embedding": vector.tolist(), "inputTextTokenCount": 3}).encode())
