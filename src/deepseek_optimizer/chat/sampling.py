"""Sampling parameters: those of generation_config.json, overridden by the caller's."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from ..engine.request import SamplingParams
from ..errors import RequestError, shown

_TOP_K = 50  # the default of `generate`
_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "stop_strings": "stop", "stop_sequence": "stop"}
_FILTERS = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_SAMPLES = (*_FILTERS, "seed")
_READ = (*_FILTERS, "repetition_penalty", "max_new_tokens", "min_new_tokens", "stop_strings")
# Settings that `generate` supports and an engine does not, and the values that have no effect.
_IGNORED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "no_repeat_ngram_size": (0,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "bad_words_ids": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "sequence_bias": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
}


def sampling_params(generation_config: Any = None, **given: Any) -> SamplingParams:
    """The sampling parameters that `generate` would use.

    Greedy unless `do_sample` is set in the config or by the caller. Passing temperature, top_k, top_p, min_p or seed also
    enables sampling, and temperature 0 disables it. With sampling, top_k defaults to 50 (0: all tokens).

    Args:
        generation_config: of the model; None: no settings.
        given: fields of `SamplingParams`, or Transformers' names for them: do_sample, max_new_tokens, min_new_tokens,
            stop_strings. None: not given.

    Raises:
        RequestError: an unknown name, or a value outside its range.
    """
    options = {_NAMES.get(name, name): value for name, value in given.items() if value is not None}
    do_sample = options.pop("do_sample", None)
    if do_sample is not None and not isinstance(do_sample, bool):
        raise RequestError("do_sample", f"must be True or False, got {shown(do_sample)}")
    _check_names(options)
    configured = {_NAMES.get(name, name): getattr(generation_config, name, None) for name in _READ}
    merged = {**{name: value for name, value in configured.items() if value is not None}, **options}
    if do_sample is None:
        do_sample = any(name in options for name in _SAMPLES) or bool(getattr(generation_config, "do_sample", None))
    if do_sample:
        merged = {"top_k": _TOP_K, **merged}
    elif not isinstance(options.get("temperature"), (int, float)) or options["temperature"] >= 0:  # else it is out of range
        merged["temperature"] = 0.0
    for name in ("stop", "stop_token_ids"):
        merged[name] = _tuple(name, merged.get(name, ()))
    if merged.get("max_tokens") == 0:  # an engine would only process the prompt
        raise RequestError("max_tokens", "must be at least 1, got 0")
    return SamplingParams(**merged)


def ignored_settings(generation_config: Any) -> list[str]:
    """Fields of a generation config that affect `generate` but that an engine ignores."""
    values = {name: getattr(generation_config, name, None) for name in _IGNORED}
    return [name for name, value in values.items() if value is not None and value not in _IGNORED[name] and value != []]


def _check_names(options: dict[str, Any]) -> None:
    known = [f.name for f in fields(SamplingParams)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *_NAMES, "do_sample"], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join([*known, *_NAMES, 'do_sample'])}"
            raise RequestError(name, f"is not a sampling parameter; {hint}")


def _tuple(name: str, value: Any) -> tuple[Any, ...]:
    kind = str if name == "stop" else int
    values = (value,) if isinstance(value, (str, int)) else tuple(value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(v, kind) and not isinstance(v, bool) for v in values):
        raise RequestError(name, f"must be {'strings' if kind is str else 'token ids'}, got {shown(value)}")
    return values
