"""A local server that speaks S3, as far as reading objects goes."""

from __future__ import annotations

import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_ERRORS = {403: "AccessDenied", 404: "NoSuchKey"}


class S3:
    """Serves `objects`, by "bucket/key", to signed requests; `forbidden` ones to nobody.

    requests: (method, path, range) of every request.
    """

    def __init__(self, objects, forbidden=()):
        self.objects, self.forbidden = dict(objects), set(forbidden)
        self.requests = []
        s3 = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                s3._answer(self)

            def do_GET(self):
                s3._answer(self)

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, request):
        name = urllib.parse.unquote(request.path.partition("?")[0]).removeprefix("/")
        wanted = request.headers.get("Range")
        self.requests.append((request.command, name, wanted))
        signed = request.headers.get("Authorization", "").startswith("AWS4-HMAC-SHA256 ")
        if not signed or name in self.forbidden:
            self._send(request, 403, self._error(403), {"Content-Type": "application/xml"})
        elif name not in self.objects:
            self._send(request, 404, self._error(404), {"Content-Type": "application/xml"})
        else:
            body, headers, status = self.objects[name], {"ETag": '"tag"'}, 200
            if wanted:
                first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted).groups()
                last = min(int(last or len(body) - 1), len(body) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
                body, status = body[int(first) : last + 1], 206
            self._send(request, status, body, headers)

    def _error(self, status):
        return f"<Error><Code>{_ERRORS[status]}</Code><Message>no</Message></Error>".encode()

    def _send(self, request, status, body, headers):
        request.send_response(status)
        for key, value in headers.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)
