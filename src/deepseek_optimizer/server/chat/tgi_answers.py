"""Answers of TGI's /generate and /generate_stream: as JSON or as an event per token."""

from __future__ import annotations

from typing import Any

import orjson

from ...engine.request import Output, TokenLogprob
from ..http.error_formats import tgi_error
from ..http.problems import ApiError
from ..tokens.token_text import TokenTexts, finite


class TgiAnswer:
    """Writes one answer, as a stream (`feed`, `last`) or as JSON (`feed`, `body`).

    Args:
        texts: of the model's tokens.
        special: ids of special tokens.
        echo: text before the answer.
        details: include tokens and the reason of the end.
        seed: of the request.
        top: include the most likely tokens.
    """

    def __init__(
        self, texts: TokenTexts, special: frozenset[int], echo: str, *, details: bool, seed: int | None, top: bool
    ) -> None:
        self._texts, self._special, self._details, self._seed, self._top = texts, special, details, seed, top
        self._parts = [echo]
        self._logprobs: list[TokenLogprob] = []
        self._count = 0
        self._last: Output | None = None

    def feed(self, index: int, output: Output) -> bytes:
        self._last = output
        self._parts.append(output.text)
        logprobs = output.logprobs or []
        self._logprobs += logprobs
        events = []
        for number, one in enumerate(logprobs):
            self._count += 1
            end = number == len(logprobs) - 1  # the text of an output cannot be divided among its tokens
            token = {**self._token(one.token, one.logprob), "text": output.text if end else ""}
            event = {"index": self._count, "token": token, "generated_text": None, "details": None}
            if self._top:
                event["top_tokens"] = [self._token(top, value) for top, value in one.top]
            if end and output.finish is not None:
                event |= {"generated_text": "".join(self._parts), "details": self._end()}
            events.append(b"data:" + orjson.dumps(event) + b"\n\n")
        return b"".join(events)

    def body(self) -> dict[str, Any]:
        """The whole answer."""
        body: dict[str, Any] = {"generated_text": "".join(self._parts)}
        if self._details:
            tokens = [self._token(one.token, one.logprob) for one in self._logprobs]
            body["details"] = {**self._end(), "prefill": [], "tokens": tokens}
            if self._top:
                body["details"]["top_tokens"] = [[self._token(top, value) for top, value in one.top] for one in self._logprobs]
        return body

    def last(self) -> bytes:
        return b""

    def broken(self, error: ApiError) -> bytes:
        return b"data:" + orjson.dumps(tgi_error(error)) + b"\n\n"

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._texts.bytes(token).decode(errors="replace")
        return {"id": token, "text": text, "logprob": finite(logprob), "special": token in self._special}

    def _end(self) -> dict[str, Any]:
        last = self._last
        assert last is not None
        reason = "length" if last.finish == "length" else "stop_sequence" if last.stop_reason is not None else "eos_token"
        quality = {} if last.quality is None else {"quality": last.quality}
        return {"finish_reason": reason, "generated_tokens": last.completion_tokens, "input_length": last.prompt_tokens,
                "seed": self._seed, **quality}  # fmt: skip
