"""How a model's answers are chosen: by what its authors set in generation_config.json, and what a caller says over that."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from ..engine.request import SamplingParams
from ..errors import RequestError, shown

_TOP_K = 50  # what `generate` takes where neither a config nor a caller says
_OURS = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "stop_strings": "stop", "stop_sequence": "stop"}
_SAMPLES = ("temperature", "top_k", "top_p", "min_p", "seed")
_READ = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "min_new_tokens", "stop_strings")
# What `generate` does and an engine does not, and the values that mean nothing.
_LEFT_OUT: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "typical_p": (1.0,),
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
    """
    The choices of `generate`: greedy unless `do_sample` is set there or given. Naming temperature, top_k, top_p, min_p or seed
    gives it too, and temperature 0 takes it back. Where one samples, top_k is 50 unless somebody says otherwise (0: all).

    Args:
        generation_config: of the model; None: nobody has chosen anything.
        given: fields of `SamplingParams`, or Transformers' names for them: do_sample, max_new_tokens, min_new_tokens,
            stop_strings. None: not given.

    Raises:
        RequestError: a name that is not known, or a value outside its range.
    """
    said = {_OURS.get(name, name): value for name, value in given.items() if value is not None}
    do_sample = said.pop("do_sample", None)
    if do_sample is not None and not isinstance(do_sample, bool):
        raise RequestError("do_sample", f"must be True or False, got {shown(do_sample)}")
    _check_names(said)
    chosen = {_OURS.get(name, name): getattr(generation_config, name, None) for name in _READ}
    merged = {**{name: value for name, value in chosen.items() if value is not None}, **said}
    if do_sample is None:
        do_sample = any(name in said for name in _SAMPLES) or bool(getattr(generation_config, "do_sample", None))
    if do_sample:
        merged = {"top_k": _TOP_K, **merged}
    elif not isinstance(said.get("temperature"), (int, float)) or said["temperature"] >= 0:  # else its range is what is wrong
        merged["temperature"] = 0.0
    for name in ("stop", "stop_token_ids"):
        merged[name] = _tuple(name, merged.get(name, ()))
    return SamplingParams(**merged)


def left_out(generation_config: Any) -> list[str]:
    """Fields of a generation config that mean something to `generate` and nothing to an engine."""
    values = {name: getattr(generation_config, name, None) for name in _LEFT_OUT}
    return [name for name, value in values.items() if value is not None and value not in _LEFT_OUT[name] and value != []]


def _check_names(said: dict[str, Any]) -> None:
    known = [f.name for f in fields(SamplingParams)]
    for name in said:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *_OURS, "do_sample"], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join([*known, *_OURS, 'do_sample'])}"
            raise RequestError(name, f"is no way to choose tokens; {hint}")


def _tuple(name: str, value: Any) -> tuple[Any, ...]:
    kind = str if name == "stop" else int
    values = (value,) if isinstance(value, (str, int)) else tuple(value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(v, kind) and not isinstance(v, bool) for v in values):
        raise RequestError(name, f"must be {'strings' if kind is str else 'token ids'}, got {shown(value)}")
    return values
