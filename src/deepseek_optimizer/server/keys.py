"""API keys: reading them, and checking those of requests."""

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
    """The file of API keys is readable by users other than its owner."""


class ApiKeys:
    """The accepted API keys. Only their hashes are stored, so that no key can leak through a log or a traceback.

    Args:
        keys: the accepted keys; without any, requests need no key.

    Raises:
        ConfigError: a key is empty, or cannot be sent in a header.
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

    def has(self, salt: str) -> bool:
        """Whether `salt` is that of an accepted key; without keys, whether it is ""."""
        return any(known.hex() == salt for known in self._hashes) if self._hashes else salt == ""

    def salt(self, authorization: bytes | None) -> str | None:
        """The prefix cache's salt for the key in an Authorization header.

        All keys are compared, each in constant time, so that the time taken reveals nothing about them.

        Args:
            authorization: value of the header; None: there is none.

        Returns: a hash of the key; "" if the server needs no key; None if the key is not accepted.
        """
        if not self._hashes:
            return ""
        scheme, _, key = (authorization or b"").partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(known, given) for known in self._hashes]
        return given.hex() if any(matches) and scheme.lower() == b"bearer" else None


def read_keys(file: str | Path | None, environment: Mapping[str, str] = os.environ) -> ApiKeys:
    """Reads API keys.

    Args:
        file: a text file with one key per line, where "#" begins a comment; None: keys are taken from DSO_API_KEYS, separated
            by commas or spaces.
        environment: where DSO_API_KEYS is looked up.

    Raises:
        ConfigError: the file cannot be read, or there is no key in it or in DSO_API_KEYS. A server that was meant to be
            protected must not start without keys.
    """
    if file is None:
        given = environment.get(ENVIRONMENT)
        if given is None:
            return ApiKeys()
        keys = given.replace(",", " ").split()
        if not keys:
            raise ConfigError(f"{ENVIRONMENT} is set but contains no key; add one, or unset it to serve without keys")
        return ApiKeys(keys)
    path = Path(file)
    try:
        text, mode = path.read_text(encoding="utf-8"), path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise ConfigError(f"the API key file {path} cannot be read: {reason}") from None
    keys = [key for line in text.splitlines() if (key := line.partition("#")[0].strip())]
    if not keys:
        raise ConfigError(f"the API key file {path} contains no key; write one key per line")
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        warnings.warn(f"the API key file {path} is readable by other users; run chmod 600 {path}", KeyFileWarning, stacklevel=2)
    return ApiKeys(keys)
