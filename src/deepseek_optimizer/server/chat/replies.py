"""Sends the engine's answers to a client, whole or as a stream of events. If the client disconnects, they are cancelled.

A stream takes one `send` per output and no task of its own; only several answers to a request have a task each. The engine
merges outputs that were not read yet, so a slow client keeps at most one output in memory.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ...engine.request import Output
from ...errors import EngineDeadError
from ..http.problems import ApiError, busy, problem, timed_out
from ..state import ServerState

logger = logging.getLogger("deepseek_optimizer.server")
_JSON = [(b"content-type", b"application/json")]
EVENTS, LINES = b"text/event-stream; charset=utf-8", b"application/x-ndjson"  # content types of streams
_UNBUFFERED = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
Headers = Sequence[tuple[bytes, bytes]]


def json_response(value: Any) -> Response:
    """A response with status 200 and `value` as JSON."""
    return Response(orjson.dumps(value), media_type="application/json")


def failure(state: ServerState, output: Output) -> ApiError | None:
    """The error response if an answer ended with an error; None otherwise."""
    if output.finish == "deadline":
        return timed_out()
    if output.finish == "cancelled":
        return busy("the server is stopping", 5)
    if output.finish != "error":
        return None
    logger.error("request %s failed: %s", output.request_id, output.error)
    if output.transient:
        return busy("the server has no memory for this answer now", 5)
    try:
        state.engine.check_alive()
    except EngineDeadError as error:
        return problem(error)
    return ApiError(500, "generation failed; see the server's log", code="generation_failed")


class Encoder(Protocol):
    """Writes a protocol's events. `index`: of the answer in the request."""

    def feed(self, index: int, output: Output) -> bytes:
        """Events for an output; b"" if there are none."""

    def last(self) -> bytes:
        """Events after those of all answers."""

    def broken(self, error: ApiError) -> bytes:
        """Events that end the stream when an answer has failed."""


class _AnyReply(Response):
    """Base of both kinds of response.

    Args:
        state: the server's.
        places: in the engine's queue, released when the engine is done, so that a client that does not read does not block
            others.
        answers: the engine's, one for each request; cancelled at the end of this response.
        headers: additional ones.
        before_end: called after the last output and awaited before the end of the response is sent; may raise ApiError.
    """

    def __init__(
        self,
        state: ServerState,
        places: ExitStack,
        answers: list[Any],
        headers: Headers = (),
        before_end: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__()
        self._state, self._places, self._answers = state, places, answers
        self._more_headers, self._before_end = headers, before_end
        self._gone = False
        self._unfinished = len(answers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.ensure_future(self._watch(receive))
        for answers in self._answers:
            answers.when_ended(self._one_ended)
        try:
            await self._respond(send)
        finally:
            watch.cancel()
            self._cancel()
            self._places.close()

    async def _respond(self, send: Send) -> None:
        raise NotImplementedError

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._cancel()

    def _one_ended(self) -> None:
        self._unfinished -= 1
        if self._unfinished == 0:
            self._places.close()

    def _cancel(self) -> None:
        for answers in self._answers:
            answers.cancel()

    def _failure(self, output: Output) -> ApiError | None:
        return failure(self._state, output)


class WholeReply(_AnyReply):
    """A response with one JSON body.

    Args:
        feed: receives the outputs of each answer.
        body: returns the body after the last output.
        more: arguments of `_AnyReply`.
    """

    def __init__(
        self,
        state: ServerState,
        places: ExitStack,
        answers: list[Any],
        feed: Callable[[int, Output], object],
        body: Callable[[], Any],
        **more: Any,
    ) -> None:
        super().__init__(state, places, answers, **more)
        self._feed, self._body = feed, body

    async def _respond(self, send: Send) -> None:
        for index, answers in enumerate(self._answers):  # one after the other; outputs of the others are merged meanwhile
            async for output in answers:
                if self._gone:
                    return
                if error := self._failure(output):
                    raise error
                self._feed(index, output)
        if self._before_end is not None:
            await self._before_end()
        content = orjson.dumps(self._body(), option=orjson.OPT_SERIALIZE_NUMPY)
        headers = [*_JSON, *self._more_headers, (b"content-length", b"%d" % len(content))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})


class StreamReply(_AnyReply):
    """A stream of events. The status is sent with the first output; a failure before it has an error status.

    Args:
        encoder: writes the events.
        media: content type of the stream.
        more: arguments of `_AnyReply`.
    """

    def __init__(
        self, state: ServerState, places: ExitStack, answers: list[Any], encoder: Encoder, media: bytes = EVENTS, **more: Any
    ) -> None:
        super().__init__(state, places, answers, **more)
        self._encoder, self._media = encoder, media

    async def _respond(self, send: Send) -> None:
        first = await self._answers[0].__anext__()
        if self._gone:
            return
        if error := self._failure(first):
            raise error
        headers = [(b"content-type", self._media), *_UNBUFFERED, *self._more_headers]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            if data := self._encoder.feed(0, first):
                await send({"type": "http.response.body", "body": data, "more_body": True})
            if len(self._answers) == 1:
                await self._pump(0, send)
            else:
                await self._pump_all(send)
            if self._before_end is not None and not self._gone:
                await self._before_end()
            data = self._encoder.last()
        except ApiError as error:
            data = self._encoder.broken(error)
        if not self._gone:
            await send({"type": "http.response.body", "body": data})

    async def _pump(self, index: int, send: Send) -> None:
        feed = self._encoder.feed
        async for output in self._answers[index]:
            if self._gone:
                return
            if output.finish is not None and (error := self._failure(output)):
                raise error
            if data := feed(index, output):
                await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _pump_all(self, send: Send) -> None:
        pumps = [asyncio.ensure_future(self._pump(index, send)) for index in range(len(self._answers))]
        try:
            await asyncio.gather(*pumps)
        finally:
            for pump in pumps:
                pump.cancel()
