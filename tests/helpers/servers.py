"""A web server of files that supports range requests and can fail on purpose."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread

Fault = Callable[[int], str | None]  # maps the number of a request for a path to a fault, or None


class FileServer(ThreadingHTTPServer):
    """Serves the files of `root`; `fault` decides on each range request; `requests` counts requests by path."""

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.lock = root, Lock()
        self.fault: Fault = lambda number: None
        self.ranges: Counter[tuple[str, str]] = Counter()
        self.faults: Counter[str] = Counter()
        self.sent = 0

    def handle_error(self, request, client_address):
        """Do not report clients that close the connection."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.server.root / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content, status = path.read_bytes(), 200
        fault = None
        if given := self.headers.get("Range"):
            with self.server.lock:
                fault = self.server.fault(self.server.ranges.total())
                self.server.ranges[self.path, given] += 1
                self.server.faults[fault or "none"] += 1
            first, last = (int(x) for x in given.removeprefix("bytes=").split("-"))
            content, status = content[first : last + 1], 206
        if fault == "500":
            self.send_error(500)
            return
        if fault == "slow":
            time.sleep(3)
        if fault == "wrong bytes":
            content = bytes([content[0] ^ 1]) + content[1:]
        if fault == "no ranges":
            content, status = path.read_bytes(), 200
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "truncated":
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif fault == "short":  # announces the shorter length, so that no library notices
            self.close_connection = True
            self.wfile.write(content[:-1])
        else:
            self.wfile.write(content)
        with self.server.lock:
            self.server.sent += len(content)


@contextmanager
def serving(root: Path) -> Iterator[FileServer]:
    server = FileServer(root)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
