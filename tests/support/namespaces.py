"""Two machines, imitated by two network namespaces."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

ADDRESSES = ("10.213.7.1", "10.213.7.2")


DELAY = 0.2e-3  # seconds, each way
_DEVICE = "dso0"


@contextlib.contextmanager
def two_namespaces(delay: float = DELAY) -> Iterator[list[tuple[str, ...]]]:
    """The prefixes of commands in two network namespaces, which a cable joins whose packets take `delay` seconds each way.

    Skips the test where network namespaces or TUN devices are not permitted.
    """
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the command ip")
    names = [f"dso-{uuid.uuid4().hex[:8]}" for _ in range(2)]
    made = [_ip("netns", "add", name) for name in names]
    try:
        if any(run.returncode for run in made):
            pytest.skip(f"network namespaces are not permitted here: {made[0].stderr.strip()}")
        with _cable(names, delay):
            for address, peer, name in zip(ADDRESSES, reversed(ADDRESSES), names, strict=True):
                _ip("-n", name, "addr", "add", address, "peer", peer, "dev", _DEVICE)
                for device in ("lo", _DEVICE):
                    _ip("-n", name, "link", "set", device, "mtu", "65000", "up")
            yield [("ip", "netns", "exec", name) for name in names]
    finally:
        for name in names:
            _ip("netns", "del", name)


@contextlib.contextmanager
def _cable(names: list[str], delay: float) -> Iterator[None]:
    command = [sys.executable, Path(__file__).with_name("delayed_cable.py"), *names, _DEVICE, str(delay)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*map(str, command)], text=True, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None
        if process.stdout.readline() != "ready\n":
            pytest.skip(f"TUN devices are not permitted here: {process.communicate()[1].strip()[-200:]}")
        try:
            yield
        finally:
            process.stdin.close()  # ends it


def _ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
