"""A stand-in for the Hugging Face Hub on loopback: what huggingface_hub asks of it to create, upload and download."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """Model repositories in memory, every file of them uploaded inside a commit (no LFS).

    Attributes:
        branches: the last commit by (repository, branch).
        files: the content by path, by (repository, commit).
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.branches: dict[tuple[str, str], str] = {}
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}

    def create(self, repo: str) -> None:
        if (repo, "main") not in self.branches:
            self.commit(repo, "main", {})

    def commit(self, repo: str, branch: str, added: dict[str, bytes]) -> str:
        files = (self.find(repo, branch) or {}) | added
        state = [repo, branch, self.branches.get((repo, branch)), *((path, files[path].hex()) for path in files)]
        commit = hashlib.sha1(repr(state).encode()).hexdigest()
        self.files[repo, commit] = files
        self.branches[repo, branch] = commit
        return commit

    def find(self, repo: str, revision: str) -> dict[str, bytes] | None:
        return self.files.get((repo, self.branches.get((repo, revision), revision)))

    def upload(self, repo: str, folder: Path) -> None:
        """Put the files of `folder` in a new repository."""
        self.commit(repo, "main", {path.name: path.read_bytes() for path in folder.iterdir()})


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args) -> None:
        """Say nothing."""

    def answer(self, body: bytes = b"", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value: object) -> None:
        self.answer(json.dumps(value).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        match unquote(urlsplit(self.path).path).split("/")[1:]:
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                repo = f"{asked.get('organization') or 'user'}/{asked['name']}"
                self.server.create(repo)
                self.answer_json({"url": f"{self.server.url}/{repo}", "name": repo})
            case ["api", "validate-yaml"]:
                self.answer_json({"errors": [], "warnings": []})
            case ["api", "models", owner, name, "branch", branch]:
                repo = f"{owner}/{name}"
                self.server.branches[repo, branch] = self.server.branches[repo, "main"]
                self.answer_json({})
            case ["api", "models", _, _, "preupload", _]:
                paths = [file["path"] for file in json.loads(body)["files"]]
                files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
                self.answer_json({"files": files})
            case ["api", "models", owner, name, "commit", branch]:
                items = [json.loads(line) for line in body.splitlines()]
                added = [item["value"] for item in items if item["key"] == "file"]
                files = {file["path"]: base64.b64decode(file["content"]) for file in added}
                commit = self.server.commit(f"{owner}/{name}", branch, files)
                url = f"{self.server.url}/{owner}/{name}/commit/{commit}"
                self.answer_json({"success": True, "commitOid": commit, "commitUrl": url})
            case _:
                self.answer(status=404)

    def do_GET(self) -> None:
        match unquote(urlsplit(self.path).path).split("/")[1:]:
            case [owner, name, "resolve", revision, *path]:
                self.answer_file(f"{owner}/{name}", revision, "/".join(path))
            case _:
                self.answer(status=404)

    do_HEAD = do_GET

    def answer_file(self, repo: str, revision: str, path: str) -> None:
        files = self.server.find(repo, revision)
        if files is None:
            self.answer(status=404, X_Error_Code="RevisionNotFound")
        elif path not in files:
            commit = self.server.branches.get((repo, revision), revision)
            self.answer(status=404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        else:
            commit = self.server.branches.get((repo, revision), revision)
            etag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
            self.answer(files[path], ETag=etag, X_Repo_Commit=commit)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub that answers at its `url` until the context ends."""
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()
