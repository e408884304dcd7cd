"""Reports fields of requests that were ignored: in a response header, and once per name in the log."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

logger = logging.getLogger("deepseek_optimizer.server")

HEADER = "X-Ignored-Fields"
_MAX_NAMES, _MAX_CHARACTERS = 16, 64  # in a header: 16 names of 64 characters are about a kilobyte
_MAX_LOGGED = 200  # names; clients may invent any number of them
_UNSAFE = re.compile(r"[^A-Za-z0-9_.$-]")


class IgnoredFields:
    """The names of ignored fields that were logged."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def report(self, names: Sequence[str]) -> str:
        """Logs the names that were not logged before.

        Args:
            names: of the fields of one request; written by a client.

        Returns: the value of the response header: the names, separated by commas. Long names are shortened, unusual characters
            replaced by "?", and names beyond the first 16 by "...".
        """
        safe = list(dict.fromkeys(_UNSAFE.sub("?", name[:_MAX_CHARACTERS]) for name in names))
        for name in safe:
            if name not in self._logged and len(self._logged) < _MAX_LOGGED:
                self._logged.add(name)
                logger.info("a request has the unknown field %s, which is ignored; this is logged once per field", name)
        return ", ".join([*safe[:_MAX_NAMES], *(["..."] if len(safe) > _MAX_NAMES else [])])
