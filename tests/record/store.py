"""A local server that speaks as much S3 as writing, listing and reading a record needs."""

from __future__ import annotations

import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from xml.sax.saxutils import escape

_XML = {"Content-Type": "application/xml"}


class Store:
    """Holds `objects` by "bucket/key"; refuses every request if it is `closed_to_all`.

    address(path): what a setting takes.
    """

    def __init__(self, closed_to_all=False):
        self.objects, self.closed_to_all = {}, closed_to_all
        self._uploads, store = {}, self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self):
                store._answer(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def address(self, path):
        where = f"127.0.0.1:{self._server.server_port}"
        return f"s3://{path}?endpoint_override={where}&scheme=http&region=us-east-1"

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, request):
        url = urllib.parse.urlsplit(request.path)
        name = urllib.parse.unquote(url.path).removeprefix("/")
        asked = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        body = self._body(request)
        if self.closed_to_all:
            return self._send(request, 403, b"<Error><Code>AccessDenied</Code></Error>", _XML)
        found = getattr(self, f"_{request.command.lower()}")(request, name, asked, body)
        return self._send(request, *found)

    def _body(self, request):
        """What was sent; newer clients send it in chunks with a check sum behind."""
        if request.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(request.rfile.readline(), 16):
                body += request.rfile.read(size)
                request.rfile.readline()
            request.rfile.readline()
        else:
            body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if "aws-chunked" not in request.headers.get("Content-Encoding", ""):
            return body
        whole = b""
        while body:
            size, _, body = body.partition(b"\r\n")
            count = int(size.split(b";")[0], 16)
            if not count:
                break
            whole, body = whole + body[:count], body[count + 2 :]
        return whole

    def _get(self, request, name, asked, body):
        if "list-type" in asked:
            return 200, self._list(name.removesuffix("/"), asked), _XML
        return self._read(request, name)

    def _head(self, request, name, asked, body):
        if "/" not in name.removesuffix("/"):
            return 200, b"", {}
        return self._read(request, name)

    def _read(self, request, name):
        if name not in self.objects:
            return 404, b"<Error><Code>NoSuchKey</Code></Error>", _XML
        data, headers = self.objects[name], {"ETag": '"tag"', "Last-Modified": _DATE}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
        if not wanted:
            return 200, data, headers
        first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return 206, data[first : last + 1], headers

    def _put(self, request, name, asked, body):
        if "partNumber" in asked:
            self._uploads[asked["uploadId"]][int(asked["partNumber"])] = body
        elif "/" in name:
            self.objects[name] = body
        return 200, b"", {"ETag": '"tag"'}

    def _post(self, request, name, asked, body):
        if "uploads" in asked:
            upload = str(len(self._uploads))
            self._uploads[upload] = {}
            tag = "InitiateMultipartUploadResult"
            return 200, f"<{tag}><UploadId>{upload}</UploadId></{tag}>".encode(), _XML
        if "uploadId" in asked:
            parts = self._uploads[asked["uploadId"]]
            self.objects[name] = b"".join(parts[number] for number in sorted(parts))
            tag = "CompleteMultipartUploadResult"
            return 200, f'<{tag}><ETag>"tag"</ETag></{tag}>'.encode(), _XML
        for key in re.findall(rb"<Key>(.*?)</Key>", body):
            self.objects.pop(f"{name}/{key.decode()}", None)
        return 200, b"<DeleteResult></DeleteResult>", _XML

    def _delete(self, request, name, asked, body):
        self.objects.pop(name, None)
        return 204, b"", {}

    def _list(self, bucket, asked):
        prefix, mark = asked.get("prefix", ""), asked.get("delimiter", "")
        keys, folders = [], set()
        for name in sorted(self.objects):
            key = name.removeprefix(f"{bucket}/")
            if name != key and key.startswith(prefix):
                rest = key[len(prefix) :]
                if mark and mark in rest:
                    folders.add(prefix + rest.partition(mark)[0] + mark)
                else:
                    keys.append(key)
        keys = keys[: int(asked.get("max-keys", 1000))]
        listed = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.objects[f'{bucket}/{key}'])}</Size>"
            f"<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in keys
        )
        listed += "".join(
            f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>"
            for folder in sorted(folders)
        )
        count = len(keys) + len(folders)
        return (
            f"<ListBucketResult><Name>{bucket}</Name><KeyCount>{count}</KeyCount>"
            f"<IsTruncated>false</IsTruncated>{listed}</ListBucketResult>"
        ).encode()

    def _send(self, request, status, body, headers):
        request.send_response(status)
        for key, value in headers.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)


_DATE = "Thu, 01 Jan 2026 00:00:00 GMT"
