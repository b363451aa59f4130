"""What reading and filling a bucket needs of Google Cloud Storage's JSON API, on loopback.

Speaks to gcsfs and to array_record's C++ client. Set STORAGE_EMULATOR_HOST, and the tests run
against another server instead, such as Google's own (github.com/googleapis/storage-testbench).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

Objects = dict[tuple[str, str], bytes]


@contextlib.contextmanager
def serve() -> Iterator[str]:
    """A server; yields its address."""
    objects: Objects = {}
    handler = type("Handler", (_Handler,), {"objects": objects})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def make_bucket(address: str, bucket: str) -> None:
    """Makes a bucket."""
    _post(f"{address}/storage/v1/b?project=test", json.dumps({"name": bucket}).encode())


def upload(address: str, bucket: str, folder: Path, prefix: str) -> None:
    """Uploads the files below a folder as PREFIX/..."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = quote(f"{prefix}/{path.relative_to(folder)}", safe="")
            where = f"{address}/upload/storage/v1/b/{bucket}/o?uploadType=media&name={name}"
            _post(where, path.read_bytes())


def _post(url: str, data: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers, method="POST")):
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: Objects

    def handle(self) -> None:
        # array_record hangs up as soon as it has its record.
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        url = urlsplit(self.path)
        if match := re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", url.path):
            self.objects[match[1], parse_qs(url.query)["name"][0]] = data
        self._answer({})

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        match = re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o(?:/(.+))?", url.path)
        if match is None:
            self._answer({"error": {"code": 404, "message": "Not Found"}}, 404)
        elif match[2] is None:
            prefix = query.get("prefix", [""])[0]
            self._answer(self._listing(match[1], prefix, "delimiter" in query))
        elif (data := self.objects.get((match[1], unquote(match[2])))) is None:
            self._answer({"error": {"code": 404, "message": f"No such object: {self.path}"}}, 404)
        elif query.get("alt") == ["media"]:
            self._send_part(data)
        else:
            self._answer(_described(match[1], unquote(match[2]), data))

    def _listing(self, bucket: str, prefix: str, folders: bool) -> dict[str, object]:
        items, prefixes = [], set()
        for (of, name), data in sorted(self.objects.items()):
            if of == bucket and name.startswith(prefix):
                below, slash, _ = name.removeprefix(prefix).partition("/")
                if slash and folders:
                    prefixes.add(f"{prefix}{below}/")
                else:
                    items.append(_described(bucket, name, data))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def _send_part(self, data: bytes) -> None:
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "bytes=0-"))
        assert found, self.headers
        first, last = found.groups()
        start = int(first) if first else max(len(data) - int(last), 0)
        stop = min(int(last) + 1, len(data)) if first and last else len(data)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self._send(data[start:stop])

    def _answer(self, fields: dict[str, object], status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self._send(json.dumps(fields).encode())

    def _send(self, data: bytes) -> None:
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a test's output is its own."""


def _described(bucket: str, name: str, data: bytes) -> dict[str, object]:
    return {
        "kind": "storage#object",
        "bucket": bucket,
        "name": name,
        "size": str(len(data)),
        "generation": "1",
        "metageneration": "1",
        "updated": "2026-01-01T00:00:00.000Z",
        "timeCreated": "2026-01-01T00:00:00.000Z",
        "contentType": "application/octet-stream",
    }


@contextlib.contextmanager
def emulator() -> Iterator[str]:
    """The address of $STORAGE_EMULATOR_HOST or of a server here; sends both clients to it."""
    with contextlib.ExitStack() as stack:
        address = os.environ.get("STORAGE_EMULATOR_HOST") or stack.enter_context(serve())
        before = dict(os.environ)
        os.environ["STORAGE_EMULATOR_HOST"] = address
        os.environ["CLOUD_STORAGE_EMULATOR_ENDPOINT"] = address
        try:
            yield address
        finally:
            for name in ("STORAGE_EMULATOR_HOST", "CLOUD_STORAGE_EMULATOR_ENDPOINT"):
                os.environ.pop(name)
                if name in before:
                    os.environ[name] = before[name]
