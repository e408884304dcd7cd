"""The files of the chat page: those in `page/` and its libraries in `page/vendor/`, read once. No other file is served."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "page"
VENDOR = "vendor"
LOCK = "vendor.json"  # pins the libraries; build_tools/page_assets.py fetches them
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".webmanifest": "application/manifest+json",
}
# The page shows model output: if a script or an address in it escapes sanitisation, the browser must not run or fetch it.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; connect-src 'self'; "
    "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class PageFile:
    content: bytes
    type: str
    etag: str


def page_files(folder: Path = FOLDER) -> dict[str, PageFile]:
    """Reads the page's files, by name; files of the libraries are `vendor/NAME`."""
    files = {}
    for place in (folder, folder / VENDOR):
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            if path.suffix in _TYPES and path.is_file():
                content = path.read_bytes()
                etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
                files[path.relative_to(folder).as_posix()] = PageFile(content, _TYPES[path.suffix], etag)
    return files


def missing_libraries(files: dict[str, PageFile], folder: Path = FOLDER) -> list[str]:
    """Files of libraries in the lock file that this installation lacks because it was built without npm or a network."""
    lock = folder / LOCK
    packages = json.loads(lock.read_text(encoding="utf-8"))["packages"].values() if lock.is_file() else ()
    names = [name for package in packages for name in package["files"] if name.endswith(".js")]
    return [name for name in names if f"{VENDOR}/{name}" not in files]
