"""The files of a project's tests, from its source distribution on the package index.

They are downloaded once, checked against a checksum, and stored in the user's cache directory. pip is not used for the
download: it would also build the project's metadata, for which vLLM needs torch and a compiler.
"""

from __future__ import annotations

import hashlib
import os
import ssl
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urljoin

import httpx

OFFLINE = "DSO_PEERS_OFFLINE"
_JSON = "application/vnd.pypi.simple.v1+json"  # PEP 691


class SourceError(Exception):
    """The tests are not available; the message has the reason and a remedy."""


@dataclass(frozen=True)
class Distribution:
    """A source distribution.

    Attributes:
        project, version: name on the index, and release.
        sha256: checksum of the archive.
        kept: what is extracted: paths inside the archive's folder, of files or of folders.
        root: folder of the archive that becomes the root of the result.
    """

    project: str
    version: str
    sha256: str
    kept: tuple[str, ...]
    root: str = "."

    @property
    def filename(self) -> str:
        return f"{self.project.replace('-', '_')}-{self.version}.tar.gz"


def cached_files(distribution: Distribution) -> Path:
    """The folder with the kept files, downloaded if it is not in the cache.

    Raises:
        SourceError: the index cannot be reached, the archive is not the expected one, or a kept file is missing.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepseek-optimizer" / "peers-tests"
    # The list of kept files is part of the name: a cache of another list is not complete.
    kept = hashlib.sha256("\n".join(distribution.kept).encode()).hexdigest()[:8]
    target = home / f"{distribution.project}-{distribution.version}-{kept}"
    if not target.is_dir():
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as folder:
            archive = Path(folder) / distribution.filename
            download(distribution, archive)
            made = Path(folder) / "files"
            extract(distribution, archive, made)
            try:
                made.rename(target)
            except OSError:  # another process was faster
                if not target.is_dir():
                    raise
    return target


def index_url() -> str:
    """The package index that pip uses."""
    if given := os.environ.get("PIP_INDEX_URL"):
        return given
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout.strip() or "https://pypi.org/simple"


def download(distribution: Distribution, target: Path) -> None:
    """Writes the archive to `target`."""
    page = f"{index_url().rstrip('/')}/{distribution.project}/"
    try:
        with httpx.Client(verify=_certificates(), follow_redirects=True, timeout=180) as client:
            listed = client.get(page, headers={"accept": _JSON}).raise_for_status()
            files = {file["filename"]: file["url"] for file in listed.json()["files"]}
            if distribution.filename not in files:
                raise SourceError(f"{page} has no {distribution.filename}; set another version in tests/peers/suites.py")
            digest = hashlib.sha256()
            with (
                client.stream("GET", urljoin(str(listed.url), files[distribution.filename])) as reply,
                target.open("wb") as file,
            ):
                reply.raise_for_status()
                for piece in reply.iter_bytes():
                    digest.update(piece)
                    file.write(piece)
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise SourceError(
            f"cannot fetch {distribution.filename}: {error}; connect to a package index, or set {OFFLINE}=1 to leave these "
            "tests out"
        ) from error
    if digest.hexdigest() != distribution.sha256:
        raise SourceError(
            f"{distribution.filename} has another checksum than in tests/peers/suites.py; it may be damaged: try again"
        )


def _certificates() -> ssl.SSLContext:
    """The authorities that pip trusts."""
    return ssl.create_default_context(cafile=os.environ.get("PIP_CERT"))


def extract(distribution: Distribution, archive: Path, target: Path) -> None:
    """Writes the kept files of an archive into a new folder. Links, and all other files, are left out."""
    target.mkdir()
    found = set()
    with tarfile.open(archive) as opened:
        for member in opened:
            path = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            kept = next((name for name in distribution.kept if path == PurePosixPath(name) or path.is_relative_to(name)), None)
            if kept is None or not member.isfile() or ".." in path.parts:
                continue
            found.add(kept)
            content = opened.extractfile(member)
            assert content is not None  # a regular file
            written = target / path.relative_to(distribution.root)
            written.parent.mkdir(parents=True, exist_ok=True)
            written.write_bytes(content.read())
    if missing := [name for name in distribution.kept if name not in found]:
        raise SourceError(f"{archive.name} has no {missing[0]}; set another version in tests/peers/suites.py")
