"""A response that is stored: its input items, and its generation in the background."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import orjson
from pydantic import ValidationError

from ..http.caller import Caller
from ..http.problems import ApiError
from ..protocol.base import field_error
from ..protocol.responses import InputItems, ResponsesRequest
from ..state import ServerState
from ..stored_responses.database import Row
from .replies import failure
from .response_answers import ResponseCollector, new_id

logger = logging.getLogger("deepseek_optimizer.server")
_WRITE_SECONDS = 30.0
_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def input_items(body: ResponsesRequest) -> list[dict[str, Any]]:
    """The input items of a request in the form in which they are stored and listed: with ids."""
    if isinstance(body.input, str):
        content = [{"type": "input_text", "text": body.input}]
        return [{"type": "message", "id": new_id("msg"), "role": "user", "status": "completed", "content": content}]
    items = [item.model_dump(exclude_none=True) for item in body.input]
    return [{"id": new_id(_PREFIXES[item["type"]]), **item} for item in items]


def conversation_items(rows: Sequence[Row], body: ResponsesRequest) -> list[Any]:
    """The items of stored responses, followed by the input of a request.

    Args:
        rows: from the first of the conversation on.
        body: the request.

    Raises:
        ApiError: 400, there are too many items.
    """
    stored: list[Any] = []
    for row in rows:
        stored += orjson.loads(row.input)
        stored += orjson.loads(row.body)["output"]
    own = input_items(body) if isinstance(body.input, str) else body.input
    try:
        return InputItems.validate_python([*stored, *own])
    except ValidationError as error:
        raise field_error(error, stored) from None


class ResponseRecord:
    """A response to be stored.

    Args:
        state: the server's.
        head: the response before generation has begun.
        items: input items of its request.
        owner: salt of the API key.
        caller: who sent the request.
    """

    def __init__(
        self, state: ServerState, head: dict[str, Any], items: list[dict[str, Any]], owner: str, caller: Caller
    ) -> None:
        self._state, self._head, self._items, self._owner, self._caller = state, head, items, owner, caller
        self._cancelled = False

    async def put(self, body: Callable[[], dict[str, Any]]) -> None:
        """Stores the complete response. Raises ApiError: see `ResponseStore.put`."""
        await self._put(body())

    async def start(self, collector: ResponseCollector, answers: Any, places: ExitStack) -> dict[str, Any]:
        """Stores the response as queued and generates it in the background.

        Args:
            collector: receives the outputs.
            answers: the engine's.
            places: in the engine's queue; they are taken over.

        Returns: the queued response.

        Raises:
            ApiError: see `ResponseStore.put`.
        """
        queued = {**self._head, "status": "queued"}
        await self._put(queued)

        def cancel() -> None:
            self._cancelled = True
            answers.cancel()

        work = self._generate(collector, answers, places.pop_all())
        self._state.responses.background.start(self._owner, self._head["id"], work, cancel)
        return queued

    async def _generate(self, collector: ResponseCollector, answers: Any, places: ExitStack) -> None:
        begun = False
        try:
            with places:
                async for output in answers:
                    error = failure(self._state, output)
                    if output.finish == "cancelled" and self._cancelled:
                        return await self._update({**self._head, "status": "cancelled"})
                    if error is not None:
                        detail = {"code": "server_error", "message": error.message}
                        return await self._update({**self._head, "status": "failed", "error": detail})
                    collector.feed(0, output)
                    if not begun and output.finish is None:
                        begun = True
                        await self._update({**self._head, "status": "in_progress"})
            await self._update(collector.body())
        except ApiError as error:
            logger.error("response %s was not stored: %s", self._head["id"], error.message)
        finally:
            answers.cancel()

    async def _put(self, body: dict[str, Any]) -> None:
        row = Row(
            body["id"], self._owner, body["previous_response_id"], body["status"], body["background"],
            orjson.dumps(self._items), orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY),
        )  # fmt: skip
        await self._state.responses.put(row, self._writer())

    async def _update(self, body: dict[str, Any]) -> None:
        data = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        await self._state.responses.update(self._owner, body["id"], body["status"], data, self._writer())

    def _writer(self) -> Caller:
        """The client with a deadline for writing, which may be later than that of the answer."""
        return replace(self._caller, deadline=time.monotonic() + _WRITE_SECONDS)
