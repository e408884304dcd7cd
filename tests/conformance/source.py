"""Transformers' tests of the installed version, from its source distribution on the package index.

They are downloaded once by pip, and stored in the user's cache directory. The distribution has `tests/*.py` without subfolders:
it includes the tests of all models (`test_modeling_common.py`), but not those of generation and of each family.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

NEEDED = ("test_modeling_common.py", "test_training_mixin.py")
OFFLINE = "DSO_CONFORMANCE_OFFLINE"


class SourceError(Exception):
    """Transformers' tests are not available; the message has the reason and a remedy."""


def cached_tests() -> Path:
    """The folder `tests` of the installed Transformers' source distribution, downloaded if it is not in the cache.

    Raises:
        SourceError: the index cannot be reached, or the distribution lacks the tests.
    """
    version = importlib.metadata.version("transformers")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = home / "deepseek-optimizer" / "transformers-tests" / version
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / "tests"
            extract(download(version, Path(folder)), made)
            try:
                made.rename(target)
            except OSError:  # another process was faster
                if not target.is_dir():
                    raise
    return target


def download(version: str, folder: Path) -> Path:
    """Downloads the source distribution into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(folder)]
    done = subprocess.run([*command, f"transformers=={version}"], capture_output=True, text=True, timeout=300)
    archives = list(folder.glob("transformers-*.tar.gz"))
    if done.returncode or not archives:
        reason = (done.stderr.strip().splitlines() or ["pip gave no archive"])[-1]
        raise SourceError(
            f"Transformers' tests: pip cannot fetch the source distribution of transformers {version}: {reason}; connect to a "
            f"package index, or set {OFFLINE}=1 to leave these tests out"
        )
    return archives[0]


def extract(archive: Path, target: Path) -> None:
    """Writes the `tests/*.py` of a source distribution into a new folder."""
    target.mkdir()
    with tarfile.open(archive) as opened:
        for member in opened.getmembers():
            parts = Path(member.name).parts
            if member.isfile() and len(parts) == 3 and parts[1] == "tests" and parts[2].endswith(".py"):
                content = opened.extractfile(member)
                assert content is not None  # a regular file
                (target / parts[2]).write_bytes(content.read())
    if lacking := [name for name in NEEDED if not (target / name).is_file()]:
        raise SourceError(f"{archive.name} has no tests/{lacking[0]}; fetch another version of Transformers")
