"""A virtual environment a peer, made once in the user's cache directory: engines pin other versions of the same packages."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from ...errors import BackendError, ConfigError
from ..smollm2 import cache_directory
from .base import Peer


def directory(peer: Peer) -> Path:
    """Where a peer's environment is: named after what it holds, so that another pin makes another."""
    wanted = repr((sys.version_info[:2], list(peer.requirements), sorted(peer.environment.items())))
    return cache_directory() / "peers" / f"{peer.name}-{hashlib.sha256(wanted.encode()).hexdigest()[:8]}"


def interpreter(peer: Peer) -> Path:
    """The Python that runs the peer's side.

    Raises:
        ConfigError: its environment was not made yet.
    """
    if not peer.requirements:
        return Path(sys.executable)
    if not _complete(peer).exists():
        raise ConfigError(f"{peer.name} is not set up; run: dso bench --setup-peers --against {peer.name}")
    return directory(peer) / "bin" / "python"


def _complete(peer: Peer) -> Path:
    """Marks an environment that was made to the end: one cannot be moved into place whole, since its scripts know its path."""
    return directory(peer) / ".complete"


def setup(peer: Peer) -> Path:
    """Makes the environment where it is missing, whole or not at all, and returns its interpreter.

    Raises:
        BackendError: pip failed; holds its last line.
    """
    target = directory(peer)
    if not peer.requirements or _complete(peer).exists():
        return interpreter(peer)
    try:
        venv.create(target, clear=True, with_pip=True)
        _pip(peer, "install", *peer.requirements)
        if peer.unwanted:
            _pip(peer, "uninstall", "--yes", *peer.unwanted)
        _complete(peer).touch()
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    return interpreter(peer)


def _pip(peer: Peer, action: str, *arguments: str) -> None:
    command = [str(directory(peer) / "bin" / "python"), "-m", "pip", action, "--quiet", *arguments]
    environment = {**os.environ, **peer.environment}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=environment)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BackendError(f"cannot set up {peer.name}: {said}")
