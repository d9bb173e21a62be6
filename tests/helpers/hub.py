"""A hub of models on this machine: as much of huggingface.co as `hf upload` and `from_pretrained` ask for."""

import base64
import hashlib
import json
from contextlib import AbstractContextManager
from pathlib import Path

from tests.helpers.servers import LocalServer, QuietHandler, running

COMMIT = "0" * 40


class Hub(LocalServer):
    """Keeps the files of one repository in `root`; `cards` holds the model cards that clients had checked."""

    def __init__(self, root: Path, repository: str):
        super().__init__(root, Handler)
        self.repository, self.cards = repository, list[str]()


class Handler(QuietHandler):
    server: Hub

    def do_POST(self) -> None:
        path, _, _ = self.path.partition("?")
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        page = f"{self.server.url}/{self.server.repository}"
        match path.removeprefix(f"/api/models/{self.server.repository}"):
            case "/api/repos/create":
                self._answer({"url": page})
            case "/api/validate-yaml":
                self.server.cards.append(json.loads(body)["content"])
                self._answer({"errors": [], "warnings": []})
            case "/preupload/main":
                files = json.loads(body)["files"]
                modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
                self._answer({"files": modes})
            case "/commit/main":
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        (self.server.root / line["value"]["path"]).write_bytes(content)
                self._answer({"commitUrl": f"{page}/commit/{COMMIT}", "commitOid": COMMIT, "success": True})
            case _:
                self.send_error(404)

    def do_GET(self) -> None:
        """A file; all else that a client asks is not there, as in a repository without it."""
        begin = f"/{self.server.repository}/resolve/"
        name = self.path.removeprefix(begin).partition("/")[2]
        file = self.server.root / name
        if self.path.startswith(begin) and file.is_file():
            self._answer(file.read_bytes())
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_GET

    def _answer(self, content: dict | bytes) -> None:
        found = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(found)))
        self.send_header("ETag", f'"{hashlib.sha256(found).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(found)


def hub(root: Path, repository: str) -> AbstractContextManager[Hub]:
    return running(Hub(root, repository))
