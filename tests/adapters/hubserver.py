"""A model hub on 127.0.0.1, as much of it as publishing needs: the unmodified client talks to it in LFS mode.

Written from the client's requests, so it proves what the client does and not what huggingface.co answers.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback"


class Repository:
    """Commits as maps of path to content; `main` and the tags point to commits."""

    def __init__(self, *, private: bool) -> None:
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.tags: dict[str, str] = {}
        self.head = ""
        self.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")

    def commit(self, files: dict[str, bytes], message: str) -> str:
        text = json.dumps([self.head, message, {name: hashlib.sha1(c).hexdigest() for name, c in files.items()}])
        self.head = hashlib.sha1(text.encode()).hexdigest()
        self.commits[self.head] = files
        return self.head

    def resolve(self, revision: str) -> str | None:
        name = self.tags.get(revision, self.head if revision == "main" else revision)
        return name if name in self.commits else None


class Hub(ThreadingHTTPServer):
    """The server with its repositories, its LFS store and a log of requests. `before` runs ahead of each of them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.log: list[str] = []
        self.fail: dict[str, int] = {}  # request line pattern -> status, once
        self.before: Any = None
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str) -> bool:
    return path.endswith(".safetensors")


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._route()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_: Any) -> None:
        """Keep the test's output clean."""

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        line = f"{self.command} {path}"
        body = self._body()
        with self.server.lock:
            self.server.log.append(line)
            if self.server.before is not None:
                self.server.before(line)
            for pattern in list(self.server.fail):
                if re.search(pattern, line):
                    self._send(self.server.fail.pop(pattern), {"error": "injected"})
                    return
            if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/lfs/"):
                self._send(401, {"error": "no token"})
                return
            for pattern, method in _ROUTES:
                if match := re.fullmatch(pattern, line):
                    method(self, body, *match.groups())
                    return
            self._send(404, {"error": f"no route for {line}"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _repository(self, name: str, revision: str = "main") -> tuple[Repository, str] | None:
        repository = self.server.repositories.get(name)
        if repository is None:
            self._send(404, {"error": "no repository"}, {"X-Error-Code": "RepoNotFound"})
            return None
        commit = repository.resolve(revision)
        if commit is None:
            self._send(404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return repository, commit

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        owner = asked.get("organization")
        name = f"{owner}/{asked['name']}" if owner else asked["name"]
        if name in self.server.repositories:
            self._send(409, {"error": "exists", "url": f"{self.server.url}/{name}"})
            return
        private = asked.get("private", asked.get("visibility") == "private")
        self.server.repositories[name] = Repository(private=bool(private))
        self._send(200, {"url": f"{self.server.url}/{name}", "name": name})

    def validate_yaml(self, _: bytes) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def info(self, _: bytes, name: str, revision: str | None) -> None:
        if found := self._repository(name, revision or "main"):
            repository, commit = found
            siblings = [{"rfilename": path} for path in sorted(repository.commits[commit])]
            fields = {"_id": "1", "id": name, "modelId": name, "tags": [], "downloads": 0, "likes": 0}
            self._send(200, {**fields, "sha": commit, "private": repository.private, "siblings": siblings})

    def refs(self, _: bytes, name: str) -> None:
        if found := self._repository(name):
            repository, _head = found
            branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.head}
            tags = [
                {"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": commit}
                for tag, commit in repository.tags.items()
            ]
            self._send(200, {"branches": [branch], "converts": [], "tags": tags})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        if found := self._repository(name, revision):
            repository, commit = found
            files = []
            for item in json.loads(body)["files"]:
                content = repository.commits[commit].get(item["path"])
                lfs = is_lfs(item["path"])
                oid = None
                if content is not None:
                    oid = hashlib.sha256(content).hexdigest() if lfs else git_oid(content)
                mode = "lfs" if lfs else "regular"
                files.append({"path": item["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self._send(200, {"files": files, "commitOid": commit})

    def lfs_batch(self, body: bytes, _: str) -> None:
        objects = []
        for item in json.loads(body)["objects"]:
            href = f"{self.server.url}/lfs/{item['oid']}"
            actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(item if item["oid"] in self.server.stored else {**item, "actions": actions})
        self._send(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._send(400, {"error": "hash differs"})
            return
        self.server.stored[oid] = body
        self._send(200, {})

    def lfs_verify(self, _: bytes, oid: str) -> None:
        self._send(200 if oid in self.server.stored else 404, {})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        if not (found := self._repository(name, revision)):
            return
        repository, head = found
        lines = [json.loads(line) for line in body.splitlines() if line]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, head):
            self._send(412, {"error": "parent commit is not the head"})
            return
        files = dict(repository.commits[head])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(files, header["summary"])
        self._send(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"})

    def tag(self, body: bytes, name: str, revision: str) -> None:
        if found := self._repository(name, revision):
            repository, commit = found
            tag = json.loads(body)["tag"]
            if tag in repository.tags:
                self._send(409, {"error": "tag exists"})
                return
            repository.tags[tag] = commit
            self._send(200, {})

    def file(self, _: bytes, name: str, revision: str, path: str) -> None:
        if found := self._repository(name, revision):
            repository, commit = found
            content = repository.commits[commit].get(path)
            if content is None:
                self._send(404, {"error": "no file"}, {"X-Error-Code": "EntryNotFound"})
                return
            etag = hashlib.sha256(content).hexdigest() if is_lfs(path) else git_oid(content)
            self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})


_REPO = r"([^/]+/[^/]+)"
_ROUTES = [
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate_yaml),
    (rf"GET /api/models/{_REPO}(?:/revision/(.+))?", _Handler.info),
    (rf"GET /api/models/{_REPO}/refs", _Handler.refs),
    (rf"POST /api/models/{_REPO}/preupload/(.+)", _Handler.preupload),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"PUT /lfs/([0-9a-f]+)", _Handler.lfs_put),
    (r"POST /lfs/([0-9a-f]+)/verify", _Handler.lfs_verify),
    (rf"POST /api/models/{_REPO}/commit/(.+)", _Handler.commit),
    (rf"POST /api/models/{_REPO}/tag/(.+)", _Handler.tag),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/([^/]+)/(.+)", _Handler.file),
]
