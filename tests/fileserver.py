"""Files on 127.0.0.1 with byte ranges and faults on demand: what a data server does and what goes wrong."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class FileServer(ThreadingHTTPServer):
    """Files by path, a log of requests, and faults by path.

    A fault is a status (503), or `cut` (half of the bytes, then the connection ends), and is used up by one request.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = dict(files)
        self.log: list[tuple[str, str]] = []
        self.faults: dict[str, list[int | str]] = {}
        self.takes_ranges = True
        self.hold: threading.Event | None = None
        self.held = "a/100.dat"
        self.write_list()

    def write_list(self) -> None:
        """Write SHA256SUMS.txt anew."""
        lines = [f"{hashlib.sha256(data).hexdigest()} {name}\n" for name, data in sorted(self.files.items())]
        self.files["SHA256SUMS.txt"] = "".join(line for line in lines if "SHA256SUMS" not in line).encode()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/files/tiny/1.0.0/"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are part of the tests."""

    def asked(self, name: str) -> list[str]:
        """Range headers of the requests for a file, empty ones for the whole of it."""
        return [wanted for path, wanted in self.log if path == name]


class _Handler(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = unquote(self.path).removeprefix("/files/tiny/1.0.0/")
        wanted = self.headers.get("Range", "")
        self.server.log.append((name, wanted))
        fault = self.server.faults.get(name, [])
        found = fault.pop(0) if fault else None
        data = self.server.files.get(name)
        if isinstance(found, int) or data is None:
            self._answer(found if isinstance(found, int) else 404, b"")
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.server.takes_ranges else 0
        if start >= len(data) > 0:
            self._answer(416, b"", total=len(data))
            return
        body = data[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if found == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        self.wfile.write(body[: len(body) // 2])
        if self.server.hold is not None and name == self.server.held:
            self.wfile.flush()
            self.server.hold.wait(timeout=20)
        self.wfile.write(body[len(body) // 2 :])

    def _answer(self, status: int, body: bytes, *, total: int | None = None) -> None:
        self.send_response(status)
        if total is not None:
            self.send_header("Content-Range", f"bytes */{total}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as http.server calls it
        """Stay silent."""
