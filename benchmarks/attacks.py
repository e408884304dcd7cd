"""Whether a hostile key slows another one's small chats: idle, and while it leans on the server in each of its ways.

    python -m benchmarks.attacks [--chats 40] [--model DIRECTORY]

A small chat of key b is asked again and again, one at a time: while nobody else asks anything, then while key a sends large
prompts, prompts that may just fit, lists of tokens, large schemas, or documents that take long to read (`hostile`); with a
small schema and a small file too, where such are what the other sends. Prints the 95th percentiles and their ratio, and ends
with status 1 where one is over 3.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_optimizer.bench.http_client import ask
from deepseek_optimizer.bench.served import Served

from . import hostile
from .models import model

MAX = 3.0  # times the idle percentile
WARM = 3  # chats that are not counted
BEGINS = 5.0  # seconds after which an attack is under way
_TEXT = "The lamp of the lighthouse was lit on Tuesday by Ada, who keeps the key under the third stone."
_SCHEMA = {
    "type": "object", "required": ["city"], "additionalProperties": False,
    "properties": {"city": {"enum": ["Paris", "Rome", "Bonn"]}},
}  # fmt: skip
# attack -> what is asked meanwhile
ROWS = {
    "prompts": ["chat"],
    "fitting": ["chat"],
    "tokens": ["chat"],
    "schemas": ["chat", "schema"],
    "documents": ["chat", "file"],
}


@dataclass(frozen=True)
class Row:
    """Seconds of one kind of chat: idle and under an attack; and what the hostile client got meanwhile."""

    attack: str
    asked: str
    idle: float
    attacked: float
    slowest: float
    statuses: Mapping[str, int]

    @property
    def ratio(self) -> float:
        return self.attacked / self.idle


def body(kind: str) -> dict[str, Any]:
    """Of a small chat: plain, with a schema, or about a file."""
    content: Any = "Name a city, and say who lives there."
    fields: dict[str, Any] = {}
    if kind == "schema":
        fields = {"response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": _SCHEMA}}}
    if kind == "file":
        data = f"data:text/plain;base64,{base64.b64encode(_TEXT.encode()).decode()}"
        content = [{"type": "file", "file": {"filename": "a.txt", "file_data": data}}, {"type": "text", "text": "Who lit it?"}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 12, "temperature": 0, **fields}


async def chats(port: int, key: str, kind: str, count: int) -> list[float]:
    """Seconds that each of so many takes, ascending.

    Raises:
        RuntimeError: one was not answered.
    """
    found = []
    for _ in range(count):
        began = time.perf_counter()
        reply = await ask(port, hostile.CHATS, body(kind), key=key)
        if reply.status != 200 or not reply.whole:
            raise RuntimeError(f"a {kind} of the honest key got {reply.status}: {reply.body[:300]!r}")
        found.append(time.perf_counter() - began)
    return sorted(found)


def percentile(values: list[float], share: float = 0.95) -> float:
    """Of ascending values: the least that so many do not exceed."""
    return values[min(len(values) - 1, int(share * len(values)))]


def measure(port: int, keys: tuple[str, str], count: int) -> list[Row]:
    """
    Args:
        keys: of the honest client, and of the hostile one.
    """
    honest, other = keys
    idle: dict[str, float] = {}
    for kind in ("chat", "schema", "file"):
        asyncio.run(chats(port, honest, kind, WARM))
        idle[kind] = percentile(asyncio.run(chats(port, honest, kind, count)))
    rows = []
    for attack, kinds in ROWS.items():
        for kind in kinds:
            with hostile.leaning(port, other, attack, 3600.0) as statuses:
                time.sleep(BEGINS)
                times = asyncio.run(chats(port, honest, kind, count))
            rows.append(Row(attack, kind, idle[kind], percentile(times), times[-1], statuses))
            time.sleep(1.0)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chats", type=int, default=40, help="of each kind, idle and under each attack")
    parser.add_argument("--model", type=Path, help="a directory; default: SmolLM2-135M in int4")
    a = parser.parse_args()
    honest, other = "honest-key", "hostile-key"
    with Served(a.model or model("smol", "int4"), environment={"DSO_API_KEYS": f"{honest},{other}"}, key=honest) as server:
        rows = measure(server.port, (honest, other), a.chats)
    print(f"{'attack':<12}{'asked':<10}{'idle p95':>10}{'p95':>10}{'slowest':>10}{'ratio':>8}   statuses of the attack")
    for row in rows:
        statuses = ", ".join(f"{status} {n:,}" for status, n in sorted(row.statuses.items()))
        print(
            f"{row.attack:<12}{row.asked:<10}{row.idle * 1e3:>7.0f} ms{row.attacked * 1e3:>7.0f} ms"
            f"{row.slowest * 1e3:>7.0f} ms{row.ratio:>8.2f}   {statuses}"
        )
    print(json.dumps({f"{row.attack} {row.asked}": round(row.ratio, 3) for row in rows}))
    raise SystemExit(any(row.ratio > MAX for row in rows))


if __name__ == "__main__":
    main()
