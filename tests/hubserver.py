"""A model hub on 127.0.0.1, as much of it as publishing needs: the unmodified client talks to it, in LFS or Xet mode.

Written from the client's requests, so it proves what the client does and not what huggingface.co answers. In Xet mode
the client's own library keeps its chunks in a folder (`local://`, a hook of its tests); the hub reads from the index
there which hash a file got.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

DROP, CUT = "drop", "cut"


@dataclass(frozen=True)
class Stored:
    """A file of a commit: its SHA-256 and size, and its content unless that lies in the Xet store."""

    sha256: str
    size: int
    content: bytes | None

    @property
    def git_oid(self) -> str:
        assert self.content is not None
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


def stored(content: bytes) -> Stored:
    return Stored(hashlib.sha256(content).hexdigest(), len(content), content)


def is_lfs(path: str) -> bool:
    return path.endswith(".safetensors")


class Repository:
    """Commits as maps of path to file, the newest last; `main` and the tags point to commits."""

    def __init__(self, *, private: bool) -> None:
        self.private = private
        self.commits: dict[str, dict[str, Stored]] = {}
        self.titles: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.head = ""
        self.commit({".gitattributes": stored(b"*.safetensors filter=lfs\n")}, "initial commit")

    def commit(self, files: dict[str, Stored], title: str) -> str:
        text = json.dumps([self.head, title, {name: file.sha256 for name, file in files.items()}])
        self.head = hashlib.sha1(text.encode()).hexdigest()
        self.commits[self.head] = files
        self.titles[self.head] = title
        return self.head

    def change(self, title: str = "somebody else", **files: bytes) -> str:
        """A commit of somebody else; `_` in a name stands for a dot, `__` for a slash."""
        new = {name.replace("__", "/").replace("_", "."): stored(content) for name, content in files.items()}
        return self.commit({**self.commits[self.head], **new}, title)

    def resolve(self, revision: str) -> str | None:
        name = self.tags.get(revision, self.head if revision == "main" else revision)
        return name if name in self.commits else None


@dataclass
class Fault:
    """What goes wrong with requests of a pattern: a status, or the connection; before or after the work is done."""

    pattern: str
    action: int | str
    times: int
    after: bool


class Hub(ThreadingHTTPServer):
    """The server with its repositories, its LFS store and a log of requests. `before` runs ahead of each of them."""

    daemon_threads = True
    TOKEN, READER, EXPIRED = "hf_loopback", "hf_onlyreads", "hf_hasexpired"

    def __init__(self, *, xet_dir: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.log: list[str] = []
        self.faults: list[Fault] = []
        self.before: Callable[[str], None] | None = None
        self.lock = threading.Lock()
        self.xet_dir = xet_dir

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fail(self, pattern: str, action: int | str, *, times: int = 1, after: bool = False) -> None:
        """Let the next requests whose line has `pattern` go wrong: a status, DROP (no answer) or CUT (half of it)."""
        self.faults.append(Fault(pattern, action, times, after))

    def fault_of(self, line: str) -> Fault | None:
        found = next((fault for fault in self.faults if re.search(fault.pattern, line)), None)
        if found is not None:
            found.times -= 1
            if found.times == 0:
                self.faults.remove(found)
        return found

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is part of the tests."""

    def xet_hash(self, sha256: str) -> str:
        """Hash under which the Xet store keeps a file, from the shards that the client has written."""
        assert self.xet_dir is not None
        return xet_hashes(self.xet_dir)[sha256]


def xet_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 to Xet hash, from the shards: rows of 48 bytes, per file one with its hash, flags and number of chunks,
    its chunks, with the top flag as many rows of their hashes, with the next one a row with the SHA-256."""
    found = {}
    for shard in folder.glob("xet/xorbs/shards/*.mdb"):
        data = shard.read_bytes()
        position = 48
        while (key := data[position : position + 32]) != b"\xff" * 32:
            flags, chunks = struct.unpack_from("<II", data, position + 32)
            position += 48 * (1 + chunks * (2 if flags >> 31 else 1))
            if flags >> 30 & 1:
                found[_hex(data[position : position + 32])] = _hex(key)
                position += 48
    return found


def _hex(key: bytes) -> str:
    """A hash as text: four little-endian numbers of 64 bits."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", key))


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    is_muted = False
    is_cut = False

    def do_GET(self) -> None:
        self._route()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_: Any) -> None:
        """Keep the test's output clean."""

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        line = f"{self.command} {path}"
        body = self._body()
        if self.server.before is not None:
            self.server.before(line)  # may ask the hub itself
        with self.server.lock:
            self.server.log.append(line)
            fault = self.server.fault_of(line)
            if fault is None:
                self._answer(line, path, body)
                return
            self.is_cut = fault.action == CUT
            self.is_muted = fault.after
            if fault.after or self.is_cut:
                self._answer(line, path, body)
            self.is_muted = False
            if isinstance(fault.action, int):
                self._send(fault.action, {"error": "injected"})
            else:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, line: str, path: str, body: bytes) -> None:
        if not path.startswith("/lfs/") and not self._may(line):
            return
        for pattern, method in _ROUTES:
            if match := re.fullmatch(pattern, line):
                method(self, body, *match.groups())
                return
        self._send(404, {"error": f"no route for {line}"})

    def _may(self, line: str) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token == Hub.EXPIRED:
            message = "Invalid credentials in Authorization header"
            self._send(401, {"error": message}, {"X-Error-Message": message})
        elif not token and not line.startswith(("GET", "HEAD")):
            self._send(401, {"error": "Invalid username or password."})
        elif token == Hub.READER and re.match(r"POST /api/(repos|models/.*/(preupload|commit|tag))", line):
            self._send(403, {"error": "You don't have the required permissions"})
        elif token not in ("", Hub.TOKEN, Hub.READER):
            self._send(401, {"error": f"unknown token {token}"})  # a hub that tells what it should not
        else:
            return True
        return False

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
        if self.is_muted:
            return
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if self.is_cut else content)
            self.wfile.flush()

    def _repository(self, name: str, revision: str = "main") -> tuple[Repository, str] | None:
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self.headers.get("Authorization")):
            self._send(401 if repository else 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        commit = repository.resolve(revision)
        if commit is None:
            self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
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

    def tree(self, _: bytes, name: str, revision: str) -> None:
        if found := self._repository(name, revision):
            repository, commit = found
            entries = []
            for path, file in sorted(repository.commits[commit].items()):
                entry: dict[str, Any] = {"type": "file", "path": path, "size": file.size}
                if is_lfs(path):
                    entry |= {
                        "oid": file.sha256[:40],
                        "lfs": {"oid": file.sha256, "size": file.size, "pointerSize": 130},
                    }
                else:
                    entry["oid"] = file.git_oid
                entries.append(entry)
            self._send(200, entries)

    def commits(self, _: bytes, name: str, revision: str) -> None:
        if found := self._repository(name, revision):
            repository, commit = found
            history = list(repository.commits)
            rows = [
                {
                    "id": oid,
                    "title": repository.titles[oid],
                    "message": "",
                    "date": "2026-01-01T00:00:00.000Z",
                    "authors": [],
                }
                for oid in reversed(history[: history.index(commit) + 1])
            ]
            self._send(200, rows)

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
                file = repository.commits[commit].get(item["path"])
                lfs = is_lfs(item["path"])
                oid = None if file is None else file.sha256 if lfs else file.git_oid
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

    def xet_token(self, _: bytes, name: str, __: str, revision: str) -> None:
        if self._repository(name, revision):
            url, expires = f"local://{self.server.xet_dir}", int(time.time()) + 3600
            headers = {
                "X-Xet-Cas-Url": url,
                "X-Xet-Access-Token": "xet",
                "X-Xet-Token-Expiration": str(expires),
            }
            self._send(200, {"casUrl": url, "accessToken": "xet", "exp": expires}, headers)

    def commit(self, body: bytes, name: str, revision: str) -> None:
        if not (found := self._repository(name, revision)):
            return
        repository, head = found
        lines = [json.loads(line) for line in body.splitlines() if line]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, head):
            self._send(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        files = dict(repository.commits[head])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = stored(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                is_here = value["oid"] in self.server.stored
                if not is_here:
                    self.server.xet_hash(value["oid"])
                content = self.server.stored.get(value["oid"])
                files[value["path"]] = Stored(value["oid"], value["size"], content)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(files, header["summary"])
        self._send(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"})

    def tag(self, body: bytes, name: str, revision: str) -> None:
        if found := self._repository(name, revision):
            repository, commit = found
            tag = json.loads(body)["tag"]
            if tag in repository.tags:
                self._send(409, {"error": "Tag already exists"})
                return
            repository.tags[tag] = commit
            self._send(200, {})

    def file(self, _: bytes, name: str, revision: str, path: str) -> None:
        if found := self._repository(name, revision):
            repository, commit = found
            file = repository.commits[commit].get(path)
            if file is None:
                self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
                return
            etag = file.sha256 if is_lfs(path) else file.git_oid
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit}
            if file.content is None:
                route = f"{self.server.url}/api/models/{name}/xet-read-token/{commit}"
                headers |= {"X-Xet-Hash": self.server.xet_hash(file.sha256), "X-Xet-Refresh-Route": route}
                headers |= {"X-Linked-Size": str(file.size), "Content-Length": "0"}
            self._send(200, file.content or b"", headers)


_REPO = r"([^/]+/[^/]+)"
_ROUTES = [
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate_yaml),
    (rf"GET /api/models/{_REPO}(?:/revision/(.+))?", _Handler.info),
    (rf"GET /api/models/{_REPO}/refs", _Handler.refs),
    (rf"GET /api/models/{_REPO}/tree/([^/]+)", _Handler.tree),
    (rf"GET /api/models/{_REPO}/commits/([^/]+)", _Handler.commits),
    (rf"POST /api/models/{_REPO}/preupload/(.+)", _Handler.preupload),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"PUT /lfs/([0-9a-f]+)", _Handler.lfs_put),
    (r"POST /lfs/([0-9a-f]+)/verify", _Handler.lfs_verify),
    (rf"GET /api/models/{_REPO}/xet-(read|write)-token/(.+)", _Handler.xet_token),
    (rf"POST /api/models/{_REPO}/commit/(.+)", _Handler.commit),
    (rf"POST /api/models/{_REPO}/tag/(.+)", _Handler.tag),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/([^/]+)/(.+)", _Handler.file),
]
