"""A headless Chromium, driven through its DevTools protocol."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import time

import websocket

_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, _NAMES)), None)
_DEVTOOLS = re.compile(r"DevTools listening on ws://([^/]+)/")


class Browser:
    """One page.  `errors` collects exceptions and console errors, `requests` what it asked for."""

    def __init__(self, profile, width=1500, height=950):
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        command += ["--disable-dev-shm-usage", "--remote-debugging-port=0", "--hide-scrollbars"]
        command += [f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        for line in self._process.stderr:
            if match := _DEVTOOLS.search(line):
                break
        else:
            raise RuntimeError("chromium did not start")
        self.errors, self.requests, self._number = [], [], 0
        self._socket = self._connect(match[1])
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _connect(self, address):
        import urllib.request

        with urllib.request.urlopen(f"http://{address}/json") as reply:
            page = next(p for p in json.load(reply) if p["type"] == "page")
        return websocket.create_connection(
            page["webSocketDebuggerUrl"], timeout=60, suppress_origin=True
        )

    def call(self, method, **parameters):
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self._notice(message.get("method"), message.get("params", {}))

    def _notice(self, method, parameters):
        if method == "Runtime.exceptionThrown":
            self.errors.append(parameters["exceptionDetails"])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
            self.errors.append(parameters["args"])
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.errors.append(parameters["entry"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])

    def open(self, path, fragment=""):
        """Opens a report and waits until it is drawn; returns the seconds that it took."""
        began = time.perf_counter()
        self.call("Page.navigate", url=path.absolute().as_uri() + fragment)
        self.until('document.body && document.body.dataset.ready === "yes"')
        return time.perf_counter() - began

    def run(self, script):
        """The value of a JavaScript expression."""
        result = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, condition, seconds=30):
        """Waits for a JavaScript expression to be true."""
        end = time.perf_counter() + seconds
        while not self.run(f"Boolean({condition})"):
            assert time.perf_counter() < end, f"never true: {condition}; {self.errors}"
            time.sleep(0.02)

    def click(self, selector):
        """A real click in the middle of the first element that matches."""
        self.until(f"document.querySelector({json.dumps(selector)})")
        x, y = self.run(
            f"""(() => {{ const e = document.querySelector({json.dumps(selector)});
            e.scrollIntoView({{block: 'center', inline: 'center'}});
            const r = e.getClientRects()[0];
            return [r.x + r.width / 2, r.y + r.height / 2]; }})()"""
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path):
        """A PNG of what is in the window."""
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self):
        self._socket.close()
        self._process.terminate()
        self._process.wait(20)
        self._process.stderr.close()
