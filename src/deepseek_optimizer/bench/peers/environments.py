"""One virtual environment per peer in the user's cache directory, since engines pin conflicting versions of packages."""

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
    """The directory of a peer's environment; its name depends on the requirements, so that other pins get another one."""
    wanted = repr((sys.version_info[:2], list(peer.requirements), sorted(peer.environment.items())))
    return cache_directory() / "peers" / f"{peer.name}-{hashlib.sha256(wanted.encode()).hexdigest()[:8]}"


def interpreter(peer: Peer) -> Path:
    """The Python that runs the peer's side.

    Raises:
        ConfigError: its environment is not set up.
    """
    if not peer.requirements:
        return Path(sys.executable)
    if not _complete(peer).exists():
        raise ConfigError(f"{peer.name} is not set up; run: dso bench --setup-peers --against {peer.name}")
    return directory(peer) / "bin" / "python"


def _complete(peer: Peer) -> Path:
    """The marker of a complete environment. It cannot be built elsewhere and moved, since its scripts contain its path."""
    return directory(peer) / ".complete"


def setup(peer: Peer) -> Path:
    """Creates the environment if it is missing, completely or not at all, and returns its interpreter.

    Raises:
        BackendError: pip failed; contains the last line of its output.
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
        message = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BackendError(f"cannot set up {peer.name}: {message}")
