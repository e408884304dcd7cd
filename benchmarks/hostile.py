"""A client that means harm: large prompts, schemas and documents, as many at once as it likes, and connections that it cuts.

    python -m benchmarks.hostile PORT KEY KIND [--seconds 60]

One of KINDS, or "all" of them, against a server of this machine. Prints, as JSON, how often each status came. Run as a
process of its own, so that what it costs to send so much is not measured with the honest clients.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from typing import Any

from deepseek_optimizer.bench.http_client import Exchange, request_bytes

TEXTS, CHATS, FILES = "/v1/completions", "/v1/chat/completions", "/v1/files"
HARMLESS = frozenset({200, 400, 413, 429, 503, 504})  # statuses that such requests may get
PATIENCE = 660.0  # seconds for an answer: more than the server takes for any
LEAVING = 0.25  # share of connections that are cut, where all kinds come
_PROPERTIES = 3_000
_PARAGRAPHS = 6_000_000
_BREAK = b"hostile-boundary"


def prompts(rng: random.Random) -> Callable[[str], bytes]:
    """Chats of 3.9 MB: no context has room for them."""
    return _chat("word " * 780_000)


def fitting(rng: random.Random) -> Callable[[str], bytes]:
    """Chats of 600 kB, whose tokens have to be counted."""
    return _chat("".join(rng.choices("abcdefghij \n", k=600_000)))


def tokens(rng: random.Random) -> Callable[[str], bytes]:
    """Bodies of more than a million tokens."""
    body = {"prompt": [1] * 1_300_000, "max_tokens": 1}
    return lambda key: request_bytes(TEXTS, body, key=key)


def schemas(rng: random.Random) -> Callable[[str], bytes]:
    """Each another one, of thousands of properties that may be left out."""
    name = f"{rng.randrange(1 << 40):x}"
    schema = {"type": "object", "properties": {f"{name}{n}": {"type": "string"} for n in range(_PROPERTIES)}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return _chat("x", response_format=form)


def documents(rng: random.Random) -> Callable[[str], bytes]:
    """Word documents of some 50 kB and six million paragraphs."""
    content = _form(f"{rng.randrange(1 << 40):x}.docx", _docx())

    kind = f"multipart/form-data; boundary={_BREAK.decode()}"

    def made(key: str) -> bytes:
        lines = [f"POST {FILES} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", f"Authorization: Bearer {key}",
                 f"Content-Type: {kind}", f"Content-Length: {len(content)}"]  # fmt: skip
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + content

    return made


# kind -> (what it sends, how many at once)
KINDS: dict[str, tuple[Callable[[random.Random], Callable[[str], bytes]], int]] = {
    "prompts": (prompts, 4), "fitting": (fitting, 4), "tokens": (tokens, 4), "schemas": (schemas, 8),
    "documents": (documents, 4),
}  # fmt: skip


class Hostile:
    """
    Args:
        leaving: share of its connections that it cuts after a while.
    """

    def __init__(self, port: int, key: str, kinds: list[str], leaving: float = 0.0, seed: int = 0) -> None:
        self._port, self._key, self._kinds, self._leaving, self._seed = port, key, kinds, leaving, seed
        self.statuses: Counter[str] = Counter()

    async def run(self, seconds: float) -> None:
        """Leans on the server for so long. Prints a line when all that it sends is made."""
        ways = [(KINDS[kind][0], n) for kind in self._kinds for n in range(KINDS[kind][1])]
        rngs = [random.Random(f"{self._seed} {make.__name__} {n}") for make, n in ways]
        requests = [make(rng)(self._key) for (make, _), rng in zip(ways, rngs, strict=True)]
        print("begun", flush=True)
        until = time.monotonic() + seconds
        await asyncio.gather(
            *(self._one(request, make, rng, until) for request, (make, _), rng in zip(requests, ways, rngs, strict=True))
        )

    async def _one(
        self, request: bytes, make: Callable[[random.Random], Callable[[str], bytes]], rng: random.Random, until: float
    ) -> None:
        while (left := until - time.monotonic()) > 0:
            try:
                await self._ask(request, rng, left)
            except OSError as error:
                self.statuses[type(error).__name__] += 1
                await asyncio.sleep(0.5)
            if make is schemas:  # one that is known costs nothing
                request = make(rng)(self._key)

    async def _ask(self, request: bytes, rng: random.Random, left: float) -> None:
        """
        Args:
            left: seconds after which it leaves in any case.
        """
        loop = asyncio.get_running_loop()
        _, exchange = await loop.create_connection(lambda: Exchange(request), "127.0.0.1", self._port)
        stays = rng.random() * 2 if rng.random() < self._leaving else left
        try:
            reply = await asyncio.wait_for(exchange.reply(), min(stays, PATIENCE))
        except asyncio.TimeoutError:
            exchange.leave()
            self.statuses["left" if stays < PATIENCE else "unanswered"] += 1
            return
        self.statuses[str(reply.status)] += 1


@contextmanager
def leaning(port: int, key: str, kind: str, seconds: float) -> Iterator[Counter[str]]:
    """A hostile client as a process, which has begun by then and is ended in the end.

    Returns: how often each status came, when it has ended.

    Raises: RuntimeError, it ended by an error.
    """
    command = [sys.executable, "-m", "benchmarks.hostile", str(port), key, kind, "--seconds", str(seconds)]
    statuses: Counter[str] = Counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield statuses
        finally:
            process.terminate()
            said, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the hostile client ended with status {process.returncode}")
    statuses.update(json.loads(said))


def _chat(content: str, **fields: Any) -> Callable[[str], bytes]:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8, **fields}
    return lambda key: request_bytes(CHATS, body, key=key)


@cache
def _docx() -> bytes:
    from docx import Document

    plain, made = BytesIO(), BytesIO()
    Document().save(plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as target:
        for item in source.namelist():
            data = source.read(item)
            if item == "word/document.xml":
                begin, end = data.index(b"<w:body>") + len(b"<w:body>"), data.index(b"</w:body>")
                data = data[:begin] + b"<w:p/>" * _PARAGRAPHS + data[end:]
            target.writestr(item, data)
    return made.getvalue()


def _form(name: str, data: bytes) -> bytes:
    parts = [
        b'Content-Disposition: form-data; name="purpose"\r\n\r\nuser_data',
        b'Content-Disposition: form-data; name="file"; filename="' + name.encode() + b'"\r\n\r\n' + data,
    ]
    return b"".join(b"--" + _BREAK + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + _BREAK + b"--\r\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("port", type=int)
    parser.add_argument("key")
    parser.add_argument("kind", choices=[*KINDS, "all"])
    parser.add_argument("--seconds", type=float, default=60.0)
    a = parser.parse_args()
    every = a.kind == "all"
    hostile = Hostile(a.port, a.key, list(KINDS) if every else [a.kind], LEAVING if every else 0.0)
    asyncio.run(_until_terminated(hostile.run(a.seconds)))
    print(json.dumps(hostile.statuses))


async def _until_terminated(work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await asyncio.wait({task})
    if not task.cancelled():
        task.result()


if __name__ == "__main__":
    main()
