"""Environment variables of the native backend: DSO_ISA and DSO_THREADS, used if the config does not set a value, DSO_TOPOLOGY
and DSO_NUMA.

They are read when a backend is created. Empty is the same as unset; an invalid value is an error, never ignored.
"""

from __future__ import annotations

import os

from ...errors import ConfigError

MAX_THREADS = 1024


def forced_isa() -> str | None:
    """DSO_ISA, unchecked: the library rejects ISAs that are unknown or cannot run on this machine."""
    return os.environ.get("DSO_ISA") or None


def forced_threads() -> int | None:
    """DSO_THREADS, or None if unset. Raises ConfigError for an invalid value."""
    text = os.environ.get("DSO_THREADS") or None
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 9 and 1 <= int(text) <= MAX_THREADS):
        raise ConfigError(f"DSO_THREADS must be a whole number from 1 to {MAX_THREADS}, got {text!r}; correct or unset it")
    return int(text)


def topology_file() -> str | None:
    """DSO_TOPOLOGY: the file that describes a machine (`topology`), or None if unset."""
    return os.environ.get("DSO_TOPOLOGY") or None


def memory_nodes() -> str:
    """DSO_NUMA: what happens if the threads are on several memory nodes. "off": nothing. "move" (default): the pages of weights
    are moved to the nodes whose threads read them. "copy": as "move", but those of mapped files are copied. Raises ConfigError
    for another value.
    """
    text = os.environ.get("DSO_NUMA") or "move"
    if text not in ("off", "move", "copy"):
        raise ConfigError(f"DSO_NUMA must be off, move or copy, got {text!r}; correct or unset it")
    return text
