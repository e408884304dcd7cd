"""The format of the server's log: text as before, or one JSON object per line, with the id of the request that caused it."""

from __future__ import annotations

import logging
from datetime import datetime, timezone
from typing import Any

import orjson

from . import request_id

_FIELDS = ("method", "route", "status", "seconds")  # of access logs, passed as `extra`


class JsonFormatter(logging.Formatter):
    """Formats a record as a JSON object: time (RFC 3339, UTC), level, logger, message, request_id, exception, and for a line of
    the access log method, route, status and seconds."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (current := request_id.current.get()) is not None:
            line["request_id"] = current
        line |= {name: value for name in _FIELDS if (value := getattr(record, name, None)) is not None}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


class TextFormatter(logging.Formatter):
    """Formats a record as one line, with the id of the request if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        current = request_id.current.get()
        return line if current is None else f"{line} [{current}]"


def set_up_logs(json: bool) -> None:
    """Configures the logging of the process: to stderr, warnings of all loggers and this package's from INFO on.

    Args:
        json: whether to write JSON instead of text.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if json else TextFormatter("dso: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("deepseek_optimizer").setLevel(logging.INFO)
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs every index at its own default level
