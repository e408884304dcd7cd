"""Repetition: answers the same prompt greedily and with sampling, and measures how much of each answer repeats.

Greedy decoding gets into loops that sampling avoids (Holtzman et al., 2020, "The Curious Case of Neural Text Degeneration").
If both repeat, decoding is not the cause.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..case import Case
from ..finding import Finding
from .base import Symptom

NAME = "repetition"
PROMPT = "Write a short story about a lighthouse keeper."
TOKENS = 96
N = 4  # length of the n-grams
LIMIT = 0.3  # share of repeated n-grams above which a text counts as repetitive; English prose of this length is below 0.1
_TEMPERATURE, _TOP_K, _PENALTY = 0.7, 50, 1.15


def repeated_share(ids: Sequence[int], n: int = N) -> float:
    """Share of the n-grams of tokens that occurred before, 0 to 1; 0 for texts with fewer than two n-grams."""
    ngrams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if len(ngrams) > 1 else 0.0


def measure(case: Case) -> Iterator[Finding]:
    """Generates greedily, with the model's own or common sampling settings, and with a penalty if both repeat."""
    from ...chat.conversation import prompt_ids

    settings = case.generation_config
    temperature, top_k = _sampling(settings)
    ids = prompt_ids(case.tokenizer, [{"role": "user", "content": PROMPT}])
    greedy = repeated_share(_generate(case, ids, do_sample=False))
    sample: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": top_k}
    sampled = repeated_share(_generate(case, ids, **sample))
    facts: dict[str, Any] = {
        "prompt": PROMPT, "tokens": TOKENS, "repeated_greedy": greedy, "repeated_sampled": sampled, "temperature": temperature,
        "top_k": top_k, "model_samples": bool(settings.do_sample), "repetition_penalty": settings.repetition_penalty,
    }  # fmt: skip
    if settings.repetition_penalty is not None and settings.repetition_penalty < 1:
        yield Finding(
            NAME, "warning", f"generation_config.json sets repetition_penalty={settings.repetition_penalty:g}",
            "below 1 it rewards tokens that have already occurred", "remove it, or set it to 1", facts,
        )  # fmt: skip
    if greedy <= LIMIT and sampled <= LIMIT:
        yield Finding(
            NAME, "ok", f"neither answer repeats itself: {greedy:.0%} of n-grams greedy, {sampled:.0%} sampled", facts=facts
        )
    elif sampled <= LIMIT:
        own = "the generation config is greedy" if not settings.do_sample else "greedy decoding was requested"
        yield Finding(
            NAME, "warning", f"greedy answers repeat themselves ({greedy:.0%} of n-grams), sampled ones do not ({sampled:.0%})",
            f"the most likely tokens form a loop; {own}",
            f"use do_sample=True, temperature={temperature:g}, top_k={top_k}, or --temperature and --top-k", facts,
        )  # fmt: skip
    else:
        yield _not_decoding(case, ids, sample, facts)


def _not_decoding(case: Case, ids: Any, sample: dict[str, Any], facts: dict[str, Any]) -> Finding:
    penalised = repeated_share(_generate(case, ids, **sample, repetition_penalty=_PENALTY))
    facts = {**facts, "repeated_penalised": penalised, "penalty": _PENALTY}
    helps = penalised <= LIMIT
    first = f"repetition_penalty={_PENALTY} helps ({penalised:.0%})" if helps else (
        f"use a temperature above {sample['temperature']:g} and a top_k above {sample['top_k']}"
    )  # fmt: skip
    return Finding(
        NAME, "warning", f"sampled answers repeat themselves too: {facts['repeated_sampled']:.0%} of n-grams",
        "greedy decoding is not the only cause: the model gives nearly all probability to one continuation, because of a "
        "temperature near 0 or a top_k near 1, too coarse a quantization, a wrong chat template, or its small size",
        f"{first}; `--symptom garbage` checks weights, template and quantization", facts,
    )  # fmt: skip


def _sampling(settings: Any) -> tuple[float, int]:
    """The model's own temperature and top_k if it samples, else common values."""
    if not settings.do_sample:
        return _TEMPERATURE, _TOP_K
    return (settings.temperature if settings.temperature is not None else 1.0), settings.top_k or _TOP_K


def _generate(case: Case, ids: Any, **decoding: Any) -> list[int]:
    """The same number of new tokens, with the same random numbers, in each call."""
    import torch

    room = case.graph.max_positions - ids.shape[1]
    tokens = max(1, min(TOKENS, room))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = case.loaded.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0, **decoding)
    new: list[int] = output[0, ids.shape[1] :].tolist()
    return new


SYMPTOM = Symptom(measure, checks=("tokenizer",))
