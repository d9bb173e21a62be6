"""Web servers on this machine, and one of files that supports range requests and can fail on purpose."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import TypeVar

Fault = Callable[[int], str | None]  # maps the number of a request for a path to a fault, or None


class LocalServer(ThreadingHTTPServer):
    """A server of the files of `root` at a free port of this machine."""

    daemon_threads = True

    def __init__(self, root: Path, handler: type[BaseHTTPRequestHandler]):
        super().__init__(("127.0.0.1", 0), handler)
        self.root = root

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class QuietHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None: ...


Server = TypeVar("Server", bound=LocalServer)


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """Let a server answer in a thread of its own while the context lasts."""
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class FileServer(LocalServer):
    """Serves the files of `root`; `fault` decides on each range request; `requests` counts requests by path."""

    def __init__(self, root: Path):
        super().__init__(root, Handler)
        self.lock = Lock()
        self.fault: Fault = lambda number: None
        self.ranges: Counter[tuple[str, str]] = Counter()
        self.faults: Counter[str] = Counter()
        self.sent = 0

    def handle_error(self, request, client_address):
        """Do not report clients that close the connection."""


class Handler(QuietHandler):
    server: FileServer

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


def serving(root: Path) -> AbstractContextManager[FileServer]:
    return running(FileServer(root))
