"""Repeated text: the same prompt answered greedily and sampled, and how much of each answer was said before.

Greedy decoding falls into loops that sampling leaves (Holtzman et al., 2020, "The Curious Case of Neural Text Degeneration").
If both repeat, decoding isn't the cause.
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
N = 4  # length of the runs that are counted
LIMIT = 0.3  # share of repeated runs above which a text repeats itself; English prose of this length stays below 0.1
_TEMPERATURE, _TOP_K, _PENALTY = 0.7, 50, 1.15


def repeated_share(ids: Sequence[int], n: int = N) -> float:
    """Share of the n-token runs that occurred before, 0 to 1; 0 for texts shorter than two runs."""
    runs = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if len(runs) > 1 else 0.0


def measure(case: Case) -> Iterator[Finding]:
    """Greedy, sampled with the model's own settings or common ones, and with a penalty if both repeat."""
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
            "below 1 it rewards tokens that were said before", "remove it, or set it to 1", facts,
        )  # fmt: skip
    if greedy <= LIMIT and sampled <= LIMIT:
        yield Finding(
            NAME, "ok", f"neither answer repeats itself: {greedy:.0%} of runs greedy, {sampled:.0%} sampled", facts=facts
        )
    elif sampled <= LIMIT:
        own = "the model's own settings answer greedily" if not settings.do_sample else "asked to be greedy, the model loops"
        yield Finding(
            NAME, "warning", f"greedy answers repeat themselves ({greedy:.0%} of runs), sampled ones don't ({sampled:.0%})",
            f"the likeliest token leads back to where it was; {own}",
            f"do_sample=True, temperature={temperature:g}, top_k={top_k}; on the command line --temperature and --top-k", facts,
        )  # fmt: skip
    else:
        yield _not_decoding(case, ids, sample, facts)


def _not_decoding(case: Case, ids: Any, sample: dict[str, Any], facts: dict[str, Any]) -> Finding:
    penalised = repeated_share(_generate(case, ids, **sample, repetition_penalty=_PENALTY))
    facts = {**facts, "repeated_penalised": penalised, "penalty": _PENALTY}
    helps = penalised <= LIMIT
    first = f"repetition_penalty={_PENALTY} helps ({penalised:.0%})" if helps else (
        f"a higher temperature than {sample['temperature']:g}, a larger top_k than {sample['top_k']}"
    )  # fmt: skip
    return Finding(
        NAME, "warning", f"sampled answers repeat themselves too: {facts['repeated_sampled']:.0%} of runs",
        "greedy decoding is not all: the model puts nearly all weight on one continuation. A temperature near 0 or a top_k "
        "near 1, weights quantised too far, a wrong chat template or a small model do that",
        f"{first}; `--symptom garbage` looks at weights, template and quantisation", facts,
    )  # fmt: skip


def _sampling(settings: Any) -> tuple[float, int]:
    """The model's own temperature and top_k where it samples, else common ones."""
    if not settings.do_sample:
        return _TEMPERATURE, _TOP_K
    return (settings.temperature if settings.temperature is not None else 1.0), settings.top_k or _TOP_K


def _generate(case: Case, ids: Any, **decoding: Any) -> list[int]:
    """New tokens, always as many, with the same random numbers each time."""
    import torch

    room = case.graph.max_positions - ids.shape[1]
    tokens = max(1, min(TOKENS, room))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = case.loaded.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0, **decoding)
    new: list[int] = made[0, ids.shape[1] :].tolist()
    return new


SYMPTOM = Symptom(measure, checks=("tokenizer",))
