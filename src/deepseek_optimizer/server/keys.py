"""API keys: where they come from, and whether a request has one."""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import ConfigError

ENVIRONMENT = "DSO_API_KEYS"


class KeyFileWarning(UserWarning):
    """Others than its owner can read the file of API keys."""


class ApiKeys:
    """Knows keys by their hashes alone, so that none can leak through a log or a traceback.

    Args:
        keys: none: everyone may ask.

    Raises:
        ConfigError: a key is empty, or could not be sent in a header.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        keys = list(keys)
        for key in keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError("an API key must be one or more printable ASCII characters without spaces")
        self._hashes = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def __len__(self) -> int:
        return len(self._hashes)

    def salt(self, authorization: bytes | None) -> str | None:
        """Of the key in an Authorization header, for the prefix cache: None where the key is not one of ours.

        All keys are compared, each in constant time, so that the time taken tells nothing about them.
        """
        if not self._hashes:
            return ""
        scheme, _, key = (authorization or b"").partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(known, given) for known in self._hashes]
        return given.hex() if any(matches) and scheme.lower() == b"bearer" else None


def read_keys(file: str | Path | None, environment: Mapping[str, str] = os.environ) -> ApiKeys:
    """Keys of a file, one a line, where "#" begins a comment; without a file those of DSO_API_KEYS, separated by commas or
    spaces.

    Raises:
        ConfigError: the file can't be read, or holds no key. A server that was meant to be locked must not stand open.
    """
    if file is None:
        given = environment.get(ENVIRONMENT)
        if given is None:
            return ApiKeys()
        keys = given.replace(",", " ").split()
        if not keys:
            raise ConfigError(f"{ENVIRONMENT} is set and holds no key; give one, or unset it to serve without keys")
        return ApiKeys(keys)
    path = Path(file)
    try:
        text, mode = path.read_text(encoding="utf-8"), path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise ConfigError(f"the file of API keys {path} can't be read: {reason}") from None
    keys = [key for line in text.splitlines() if (key := line.partition("#")[0].strip())]
    if not keys:
        raise ConfigError(f"the file of API keys {path} holds no key: write one a line")
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        warnings.warn(f"others than its owner can read the API keys in {path}: chmod 600 it", KeyFileWarning, stacklevel=2)
    return ApiKeys(keys)
