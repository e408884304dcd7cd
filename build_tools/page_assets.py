"""Fetches the libraries of the chat page into server/page/vendor/, as server/page/vendor.json pins them.

    python build_tools/page_assets.py

Each package is downloaded by `npm pack`, which does not run its code. The tarball must have the SHA-512 given in the lock file,
and each file extracted from it the SHA-256. Files that are present already are not fetched again, so a source distribution,
which contains them, builds without network access.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "src" / "deepseek_optimizer" / "server" / "page"
LOCK = PAGE / "vendor.json"
VENDOR = PAGE / "vendor"
TIMEOUT_SECONDS = 120


class AssetError(Exception):
    """A library could not be fetched, or is not the one that the lock file pins."""


def missing(files: dict[str, Any], folder: Path) -> list[str]:
    """Names of the files that are missing from the folder or have different content."""

    def differs(name: str, sha256: str) -> bool:
        path = folder / name
        return not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256

    return [name for name, file in files.items() if differs(name, file["sha256"])]


def fetch(lock: Path = LOCK, folder: Path = VENDOR) -> None:
    """Fetches every file of the lock file into the folder.

    Raises:
        AssetError: npm is missing or fails, or a checksum is wrong. Packages fetched before the error stay in the folder.
    """
    for package, pinned in json.loads(lock.read_text(encoding="utf-8"))["packages"].items():
        if missing(pinned["files"], folder):
            with tempfile.TemporaryDirectory() as temporary:
                unpack(download(f"{package}@{pinned['version']}", Path(temporary)), pinned, folder)


def download(package: str, folder: Path) -> Path:
    """Downloads the tarball of a package, given as name@version.

    Raises:
        AssetError: npm is missing or fails.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise AssetError(f"{package}: fetching it needs npm, which is not on the PATH")
    command = [npm, "pack", "--ignore-scripts", "--fetch-retries=1", "--fetch-timeout=30000", package]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise AssetError(f"{package}: `npm pack` did not finish within {TIMEOUT_SECONDS} s") from None
    tarballs = list(folder.glob("*.tgz"))
    if done.returncode or len(tarballs) != 1:
        raise AssetError(f"{package}: `npm pack` failed:\n{done.stderr.strip()}")
    return tarballs[0]


def unpack(tarball: Path, pinned: dict[str, Any], folder: Path) -> None:
    """Extracts the pinned files of a tarball into the folder.

    Raises:
        AssetError: a checksum is wrong, or a file is not in the tarball.
    """
    digest = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    if f"sha512-{digest}" != pinned["integrity"]:
        raise AssetError(f"{tarball.name}: the SHA-512 is {digest}, but {LOCK.name} has {pinned['integrity']}")
    folder.mkdir(exist_ok=True)
    with tarfile.open(tarball) as archive:
        for name, file in pinned["files"].items():
            try:
                member = archive.extractfile(f"package/{file['path']}")
            except KeyError:
                member = None
            if member is None:
                raise AssetError(f"{tarball.name}: contains no file {file['path']}")
            content = member.read()
            if (found := hashlib.sha256(content).hexdigest()) != file["sha256"]:
                wrong = f"the SHA-256 of {file['path']} is {found}, but {LOCK.name} has {file['sha256']}"
                raise AssetError(f"{tarball.name}: {wrong}")
            (folder / name).write_bytes(content)


def main() -> int:
    try:
        fetch()
    except AssetError as error:
        print(f"page assets: {error}\npage assets: without them the chat page shows answers as plain text", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
