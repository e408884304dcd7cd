"""Environment variables of the native backend, used if the config does not set a value: DSO_ISA and DSO_THREADS.

Both are read when a backend is created. Empty is the same as unset; an invalid value is an error, never ignored.
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
