"""A hub on this machine that speaks the calls with which huggingface_hub uploads: repository, LFS, Xet, commit.

Uploads by LFS are checked and kept. Of those by Xet, which hf_xet splits into compressed chunks, only the checksums in
the commit are kept; a client with ``HF_XET_CLIENT_SHARD_API_VERSION=1`` can use it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", "tokenizer.json")  # what this hub wants by LFS


class Hub:
    """What the hub has, and how it answers.

    Args:
        token: the one that may write; others are refused.
        forbidden: owners that this token may not write to.
        fails: part of the path of a request that is answered with status 500, or by closing the connection.
    """

    def __init__(self, token: str = "hf_writes", forbidden: tuple[str, ...] = (), fails: str = "") -> None:
        self.token, self.forbidden, self.fails, self.endpoint = token, forbidden, fails, ""
        self.asked: list[str] = []
        self.repositories: dict[str, dict[str, Any]] = {}  # by name: visibility, and files by branch
        self.objects: dict[str, bytes] = {}  # of LFS, by SHA-256
        self.commits: list[dict[str, Any]] = []
        self.chunked = 0  # bytes that came by Xet

    def add(self, repo: str, files: dict[str, bytes] | None = None, visibility: str = "public") -> None:
        """Add a repository."""
        self.repositories[repo] = {"visibility": visibility, "branches": {"main": dict(files or {})}}

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """The files of a branch."""
        found: dict[str, bytes] = self.repositories[repo]["branches"][branch]
        return found

    def answer(self, command: str, path: str, body: bytes, authorization: str) -> tuple[int, Any, dict[str, str]]:
        """Status, content, and headers of the answer to a request."""
        path = path.partition("?")[0]
        if path == "/":
            return 200, {}, {}
        if path.startswith("/lfs/"):
            if hashlib.sha256(body).hexdigest() != path.rpartition("/")[2]:
                return 422, {"error": "another checksum"}, {}
            self.objects[path.rpartition("/")[2]] = body
            return 200, {}, {}
        if path.startswith(("/v1/", "/shards")):
            self.chunked += len(body)
            unknown = command == "GET" or path.startswith("/v1/xorb-grants/")  # chunks; storage other than this server
            return (404 if unknown else 200), {"result": 1, "was_inserted": True}, {}
        if authorization != f"Bearer {self.token}":
            refused = "Invalid credentials in Authorization header"
            return 401, {"error": refused}, {"X-Error-Message": refused}
        if path == "/api/whoami-v2":
            return 200, {"name": "tester", "type": "user"}, {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        values: Any = json.loads(body) if body and "/commit/" not in path else {}
        if path == "/api/repos/create":
            repo = f"{values['organization']}/{values['name']}"
            if values["organization"] in self.forbidden:
                return 403, {"error": "You don't have the rights to create a model under this namespace"}, {}
            if repo in self.repositories:
                return 409, {"error": "You already created this model repo"}, {}
            self.add(repo, visibility=values.get("visibility", "public"))
            return 200, {"url": f"{self.endpoint}/{repo}"}, {}
        if path == "/verify":
            known = len(self.objects.get(values["oid"], b"")) == values["size"]
            return (200 if known else 404), {}, {}
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return 200, {"transfer": "basic", "objects": [self._action(one) for one in values["objects"]]}, {}
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([\w-]+)/([^/]+))?", path)
        repo, call, revision = found.groups() if found else ("", "", "")
        if repo not in self.repositories:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        branches, revision = self.repositories[repo]["branches"], unquote(revision or "main")
        if call == "branch":
            if revision in branches:
                return 409, {"error": "Reference already exists"}, {}
            branches[revision] = dict(branches["main"])
            return 201, {}, {}
        if revision not in branches:
            return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
        if call == "xet-write-token":
            return 200, {"casUrl": self.endpoint, "accessToken": "xet", "exp": int(time.time()) + 3600}, {}
        if call == "preupload":
            modes = {one["path"]: "lfs" if one["path"].endswith(LARGE) else "regular" for one in values["files"]}
            return 200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}, {}
        if call == "commit":
            return 200, self._commit(repo, branches[revision], body), {}
        return 200, {"id": repo, "sha": COMMIT}, {}

    def _action(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.objects:
            return wanted
        upload = {"href": f"{self.endpoint}/lfs/{wanted['oid']}", "header": {}}
        return {**wanted, "actions": {"upload": upload, "verify": {"href": f"{self.endpoint}/verify"}}}

    def _commit(self, repo: str, branch: dict[str, bytes], body: bytes) -> dict[str, Any]:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.commits.append({"repo": repo, **value})
            elif entry["key"] == "file":
                branch[value["path"]] = base64.b64decode(value["content"])
            else:
                assert entry["key"] == "lfsFile"
                content = self.objects.get(value["oid"], value["oid"].encode())  # by Xet: the checksum
                assert self.chunked or value["size"] == len(content)
                branch[value["path"]] = content
        return {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.endpoint}/{repo}/commit/{COMMIT}"}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve a hub on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            length = self.headers.get("Content-Length")
            body = self.rfile.read(int(length)) if length else b"".join(self._chunks())
            hub.asked.append(f"{self.command} {self.path}")
            status, content, headers = hub.answer(self.command, self.path, body, self.headers.get("Authorization", ""))
            if hub.fails and hub.fails in self.path:
                status, content, headers = 500, {"error": "broken"}, {}
            text = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(text))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)

        def _chunks(self) -> Iterator[bytes]:
            while self.headers.get("Transfer-Encoding") == "chunked" and (size := int(self.rfile.readline(), 16)):
                yield self.rfile.read(size)
                self.rfile.readline()

        do_GET = do_HEAD = do_POST = do_PUT = _answer  # noqa: N815 - the names of http.server

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
