"""Two machines, imitated by two network namespaces."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import uuid
from collections.abc import Iterator

import pytest

ADDRESSES = ("10.213.7.1", "10.213.7.2")


@contextlib.contextmanager
def two_namespaces() -> Iterator[list[tuple[str, ...]]]:
    """The prefixes of commands in two network namespaces, which a cable joins: with 0.1 ms of delay each way if possible."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the command ip")
    names = [f"dso-{uuid.uuid4().hex[:8]}" for _ in range(2)]

    def ip(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)

    made = [ip("netns", "add", name) for name in names]
    if any(run.returncode for run in made):
        for name in names:
            ip("netns", "del", name)
        pytest.skip(f"network namespaces are not permitted here: {made[0].stderr.strip()}")
    try:
        cable = ip("link", "add", "dso0", "netns", names[0], "type", "veth", "peer", "name", "dso0", "netns", names[1])
        if cable.returncode:
            pytest.skip(f"virtual network devices are not permitted here: {cable.stderr.strip()}")
        for address, name in zip(ADDRESSES, names, strict=True):
            ip("-n", name, "addr", "add", f"{address}/30", "dev", "dso0")
            for device in ("lo", "dso0"):
                ip("-n", name, "link", "set", device, "up")
            if shutil.which("tc") is not None:  # without the kernel's netem, the link has no delay
                delay = ["tc", "-n", name, "qdisc", "add", "dev", "dso0", "root", "netem", "delay", "0.1ms"]
                subprocess.run(delay, capture_output=True, check=False)
        yield [("ip", "netns", "exec", name) for name in names]
    finally:
        for name in names:
            ip("netns", "del", name)
