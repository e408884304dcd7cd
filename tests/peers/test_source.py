"""The download of other projects' tests: only what is kept is written, and damaged or missing archives are errors. No network:
the index is a local server."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from peers.source import Distribution, SourceError, cached_files


def archive(names):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as made:
        for name in names:
            entry = tarfile.TarInfo(f"some-project-1.0/{name}")
            entry.size = len(name)
            made.addfile(entry, io.BytesIO(name.encode()))
        link = tarfile.TarInfo("some-project-1.0/inner/tests/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        made.addfile(link)
    return buffer.getvalue()


@pytest.fixture
def index(monkeypatch, tmp_path):
    """index(names, listed=True): an index with an archive of these files; returns its distribution, and counts requests."""
    running = []

    def start(names, listed=True, damaged=False, **fields):
        data = archive(names)
        filename = "some_project-1.0.tar.gz"

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                seen.append(self.path)
                files = [{"filename": filename, "url": f"../../files/{filename}"}] if listed else []
                body = data if self.path == f"/files/{filename}" else json.dumps({"files": files}).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        seen = []
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple/")
        digest = hashlib.sha256(b"another" if damaged else data).hexdigest()
        return Distribution("some-project", "1.0", digest, ("inner/tests", "notes.md"), **fields), seen

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield start
    for server in running:
        server.shutdown()
        server.server_close()


NAMES = ("inner/tests/test_a.py", "inner/tests/deep/test_b.py", "inner/testsuite.py", "notes.md", "inner/tests/../../../x.py")


def test_only_kept_files_are_extracted_and_only_once(index):
    distribution, seen = index(NAMES)
    folder = cached_files(distribution)
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert found == ["inner/tests/deep/test_b.py", "inner/tests/test_a.py", "notes.md"]
    assert cached_files(distribution) == folder and len(seen) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ("notes.md",)}, "has no inner/tests"),
        ({"names": NAMES, "damaged": True}, "has another checksum"),
        ({"names": NAMES, "listed": False}, "has no some_project-1.0.tar.gz"),
    ],
)
def test_incomplete_archives_are_errors_and_removed(index, options, message):
    distribution, seen = index(**options)
    for _ in range(2):
        with pytest.raises(SourceError, match=message):
            cached_files(distribution)
    assert len(set(seen)) < len(seen)


def test_an_unreachable_index_is_an_error_with_a_remedy(index, monkeypatch):
    distribution, _ = index(NAMES)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(SourceError, match="connect to a package index, or set DSO_PEERS_OFFLINE=1"):
        cached_files(distribution)
