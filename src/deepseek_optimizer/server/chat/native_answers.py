"""Answers of llama-server's /completion and /infill: as JSON or as events."""

from __future__ import annotations

from typing import Any

import orjson

from ...engine.request import Output, SamplingParams, TokenLogprob
from ..http.problems import ApiError
from ..tokens.token_text import TokenTexts, finite
from .timings import Timings

_SETTINGS = ("min_tokens", "temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "ignore_eos")


class NativeAnswers:
    """Writes the answers to one request, as a stream (`feed`, `last`) or as JSON (`feed`, `body`).

    Args:
        model: its name.
        prompts: text of each prompt.
        params: of all answers.
        texts: of the model's tokens; None: no probabilities.
        with_tokens: include the ids of the new tokens.
        several: the body is a list even if there is one prompt.
    """

    def __init__(
        self,
        model: str,
        prompts: list[str],
        params: SamplingParams,
        texts: TokenTexts | None,
        *,
        with_tokens: bool,
        several: bool,
    ) -> None:
        self._model, self._prompts, self._params, self._texts = model, prompts, params, texts
        self._with_tokens, self._several = with_tokens, several
        self._timings = [Timings() for _ in prompts]
        self._parts: list[list[str]] = [[] for _ in prompts]
        self._tokens: list[list[int]] = [[] for _ in prompts]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in prompts]

    def feed(self, index: int, output: Output) -> bytes:
        self._timings[index].add(output)
        self._parts[index].append(output.text)
        self._tokens[index] += output.token_ids
        self._logprobs[index] += output.logprobs or ()
        chunk = {
            "index": index,
            "content": output.text,
            "tokens": output.token_ids if self._with_tokens else [],
            "stop": False,
            "id_slot": -1,
            "tokens_predicted": output.completion_tokens,
            "tokens_evaluated": output.prompt_tokens,
        }
        if output.logprobs and self._texts is not None:
            chunk["completion_probabilities"] = _probabilities(output.logprobs, self._texts)
        events = _event(chunk) if output.text or output.token_ids else b""
        if output.finish is not None:
            events += _event(self._one(index, "", []))
        return events

    def body(self) -> Any:
        """The whole answers."""
        bodies = []
        for index, parts in enumerate(self._parts):
            one = self._one(index, "".join(parts), self._tokens[index] if self._with_tokens else [])
            if self._texts is not None:
                one["completion_probabilities"] = _probabilities(self._logprobs[index], self._texts)
            bodies.append(one)
        return bodies if self._several else bodies[0]

    def last(self) -> bytes:
        return b""

    def broken(self, error: ApiError) -> bytes:
        return b"error: " + orjson.dumps(error.body()["error"]) + b"\n\n"

    def _one(self, index: int, content: str, tokens: list[int]) -> dict[str, Any]:
        end = self._timings[index].last
        assert end is not None
        stop = end.stop_reason
        kind = "limit" if end.finish == "length" else "word" if isinstance(stop, str) else "eos"
        return {
            "index": index,
            "content": content,
            "tokens": tokens,
            "id_slot": -1,
            "stop": True,
            "model": self._model,
            "tokens_predicted": end.completion_tokens,
            "tokens_evaluated": end.prompt_tokens,
            "tokens_cached": end.prompt_tokens + end.completion_tokens,
            "generation_settings": self._settings(),
            "prompt": self._prompts[index],
            "has_new_line": any("\n" in part for part in self._parts[index]),
            "truncated": False,
            "stop_type": kind,
            "stopping_word": stop if isinstance(stop, str) else "",
            "timings": _timings(self._timings[index], end),
        }

    def _settings(self) -> dict[str, Any]:
        params = self._params
        limit = -1 if params.max_tokens is None else params.max_tokens
        return {
            **{name: getattr(params, name) for name in _SETTINGS},
            "seed": -1 if params.seed is None else params.seed,
            "repeat_penalty": params.repetition_penalty,
            "n_predict": limit,
            "max_tokens": limit,
            "n_probs": params.logprobs or 0,
            "stop": list(params.stop),
        }


def _timings(times: Timings, end: Output) -> dict[str, Any]:
    evaluated, predicted = end.prompt_tokens - end.cached_tokens, end.completion_tokens
    prompt_ms, predicted_ms = times.prompt * 1e3, times.answer * 1e3
    return {
        "cache_n": end.cached_tokens,
        "prompt_n": evaluated,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": prompt_ms / max(evaluated, 1),
        "prompt_per_second": evaluated / max(times.prompt, 1e-9),
        "predicted_n": predicted,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": predicted_ms / max(predicted, 1),
        "predicted_per_second": predicted / max(times.answer, 1e-9),
    }


def _probabilities(logprobs: list[TokenLogprob], texts: TokenTexts) -> list[dict[str, Any]]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = texts.bytes(token)
        return {"id": token, "token": raw.decode(errors="replace"), "bytes": list(raw), "logprob": finite(logprob)}

    return [
        {**entry(one.token, one.logprob), "top_logprobs": [entry(token, value) for token, value in one.top]} for one in logprobs
    ]


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"
