"""Answers of llama-server's /completion and /infill: as JSON or as events."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from ...engine.request import Output, SamplingParams, TokenLogprob
from ..http.problems import ApiError
from ..tokens.token_text import TokenTexts, finite
from .timings import Timings, native_timings, prompt_progress

_SETTINGS = (
    "min_tokens", "temperature", "top_k", "top_p", "min_p", "top_n_sigma", "typical_p", "xtc_probability", "xtc_threshold",
    "presence_penalty", "frequency_penalty", "dry_multiplier", "dry_base", "dry_allowed_length", "mirostat", "mirostat_tau",
    "mirostat_eta",
)  # fmt: skip
# Samplers that this server does not have, as llama-server reports them when they are off.
_OFF = {"dynatemp_range": 0.0, "dynatemp_exponent": 1.0, "adaptive_target": -1.0, "adaptive_decay": 0.9}


@dataclass(frozen=True)
class NativeOptions:
    """How answers are written.

    Attributes:
        with_tokens: include the ids of the new tokens; a stream always does.
        several: the body is a list even if there is one prompt.
        timings: chunks of a stream have timings.
        sampled: log probabilities are those after all samplers, and reported as probabilities.
        ignore_eos: the request forbids tokens that end the text.
        stream: the answer is a stream.
        fields: the fields of the answer to return; empty: all.
    """

    with_tokens: bool = False
    several: bool = False
    timings: bool = False
    sampled: bool = False
    ignore_eos: bool = False
    stream: bool = False
    fields: Sequence[str] = ()


class NativeAnswers:
    """Writes the answers to one request, as a stream (`feed`, `last`) or as JSON (`feed`, `body`).

    Args:
        model: its name.
        prompts: text of each prompt.
        params: of all answers.
        texts: of the model's tokens; None: no probabilities.
        options: how they are written.
    """

    def __init__(
        self, model: str, prompts: list[str], params: SamplingParams, texts: TokenTexts | None, options: NativeOptions
    ) -> None:
        self._model, self._prompts, self._params, self._texts, self._options = model, prompts, params, texts, options
        self._timings = [Timings() for _ in prompts]
        self._parts: list[list[str]] = [[] for _ in prompts]
        self._tokens: list[list[int]] = [[] for _ in prompts]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in prompts]

    def feed(self, index: int, output: Output) -> bytes:
        events = b"".join(self._progress(index, output, processed) for processed in output.progress)
        if not output.token_ids and output.finish is None:
            return events
        times = self._timings[index]
        times.add(output)
        self._parts[index].append(output.text)
        self._tokens[index] += output.token_ids
        self._logprobs[index] += output.logprobs or ()
        if not self._options.stream:
            return b""
        if output.token_ids or output.text:
            chunk = self._chunk(index, output)
            if output.logprobs and self._texts is not None:
                chunk["completion_probabilities"] = self._probabilities(output.logprobs, self._texts)
            if self._options.timings:
                chunk["timings"] = native_timings(output, times.prompt, times.answer)
            events += _event(chunk)
        if output.finish is not None:
            events += _event(selected(self._one(index, "", []), self._options.fields))
        return events

    def body(self) -> Any:
        """The whole answers."""
        bodies = []
        for index, parts in enumerate(self._parts):
            one = self._one(index, "".join(parts), self._tokens[index] if self._options.with_tokens else [])
            if self._texts is not None:
                one["completion_probabilities"] = self._probabilities(self._logprobs[index], self._texts)
            bodies.append(selected(one, self._options.fields))
        return bodies if self._options.several else bodies[0]

    def last(self) -> bytes:
        return b""

    def broken(self, error: ApiError) -> bytes:
        return b"error: " + orjson.dumps(error.body()["error"]) + b"\n\n"

    def _chunk(self, index: int, output: Output) -> dict[str, Any]:
        return {
            "index": index,
            "content": output.text,
            "tokens": output.token_ids,
            "stop": False,
            "id_slot": -1,
            "tokens_predicted": output.completion_tokens,
            "tokens_evaluated": output.prompt_tokens,
        }

    def _progress(self, index: int, output: Output, processed: int) -> bytes:
        """An event without text, for the progress of the prompt."""
        seconds = self._timings[index].elapsed if processed > output.cached_tokens else 0.0
        chunk = {"index": index, "content": "", "tokens": [], "stop": False, "id_slot": -1, "tokens_predicted": 0}
        chunk |= {"tokens_evaluated": processed, "prompt_progress": prompt_progress(output, processed, seconds)}
        if self._options.timings:
            chunk["timings"] = native_timings(output, seconds, 0.0, processed)
        return _event(chunk)

    def _one(self, index: int, content: str, tokens: list[int]) -> dict[str, Any]:
        times = self._timings[index]
        end = times.last
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
            "timings": native_timings(end, times.prompt, times.answer),
            **({} if end.quality is None else {"quality": end.quality}),
        }

    def _settings(self) -> dict[str, Any]:
        params = self._params
        limit = -1 if params.max_tokens is None else params.max_tokens
        return {
            **_OFF,
            **{name: getattr(params, name) for name in _SETTINGS},
            "seed": -1 if params.seed is None else params.seed,
            "repeat_penalty": params.repetition_penalty,
            "repeat_last_n": -1 if params.repetition_window is None else params.repetition_window,
            "dry_penalty_last_n": -1 if params.dry_last_n is None else params.dry_last_n,
            "n_predict": limit,
            "max_tokens": limit,
            "n_probs": params.logprobs or 0,
            "stop": list(params.stop),
            "stream": self._options.stream,
            "ignore_eos": self._options.ignore_eos,
            "post_sampling_probs": self._options.sampled,
            "timings_per_token": self._options.timings,
            # null: minus infinity, which JSON does not have
            "logit_bias": [
                {"token": token, "bias": None if bias <= -100 else bias} for token, bias in params.logit_bias.items()
            ],
        }

    def _probabilities(self, logprobs: list[TokenLogprob], texts: TokenTexts) -> list[dict[str, Any]]:
        sampled = self._options.sampled

        def entry(token: int, logprob: float) -> dict[str, Any]:
            raw = texts.bytes(token)
            value = {"prob": math.exp(logprob)} if sampled else {"logprob": finite(logprob)}
            return {"id": token, "token": raw.decode(errors="replace"), "bytes": list(raw), **value}

        name = "top_probs" if sampled else "top_logprobs"
        return [{**entry(one.token, one.logprob), name: [entry(*other) for other in one.top]} for one in logprobs]


def selected(answer: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """The fields of an answer that a request asks for, each under its path (`a/b`: field b of a); all if it names none."""
    if not fields:
        return answer
    found: dict[str, Any] = {}
    for path in fields:
        value: Any = answer
        for name in path.split("/"):
            if not isinstance(value, Mapping) or name not in value:
                break
            value = value[name]
        else:
            found[path] = value
    return found


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"
