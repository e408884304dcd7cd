"""Joins two network namespaces by a cable with a delay, where the kernel lacks netem: TUN devices whose packets arrive late.

    python delayed_cable.py NAMESPACE NAMESPACE DEVICE SECONDS

Creates the device in both namespaces, prints a line, and passes packets on until its input ends. Each packet arrives SECONDS
after it was sent, at least. Standard library only.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 1, 0x1000  # linux/if_tun.h
_CLONE_NEWNET = 0x40000000
_PACKET = 1 << 16  # bytes, at most


def device(namespace: str, name: str) -> int:
    """The file descriptor of a new TUN device in a namespace, which this process enters for it."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{namespace}", "rb") as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return descriptor


def pass_on(ends: tuple[int, int], delay: float) -> None:
    """Passes packets on until standard input ends."""
    stdin, (one, other) = sys.stdin.fileno(), ends
    opposite = {one: other, other: one}
    late: deque[tuple[float, int, bytes]] = deque()  # time, to, packet: the delay is constant, so they are in order
    while True:
        wait = None if not late else max(0.0, late[0][0] - time.monotonic())
        ready = select.select([stdin, one, other], [], [], wait)[0]
        now = time.monotonic()
        for end in ends:
            if end in ready:
                try:
                    while True:
                        late.append((now + delay, opposite[end], os.read(end, _PACKET)))
                except BlockingIOError:
                    pass
        while late and late[0][0] <= time.monotonic():
            _, end, packet = late.popleft()
            try:
                os.write(end, packet)
            except OSError:  # the device is not up yet, or its queue is full: a network loses packets, too
                pass
        if stdin in ready and not os.read(stdin, 1):
            return


if __name__ == "__main__":
    first, second, name, seconds = sys.argv[1:]
    both = device(first, name), device(second, name)
    print("ready", flush=True)
    pass_on(both, float(seconds))
