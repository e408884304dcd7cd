"""`benchmark_model`: runs real prompts through a model, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .metrics import figures, samples
from .peak_memory import peak_resident_bytes
from .runs import Run, timed
from .statistics import summary


def benchmark_model(
    model: Any,
    tokenizer: Any,
    test_cases: Sequence[Any],
    *,
    max_new_tokens: int = 128,
    repeats: int = 3,
    warmup: int = 1,
    **generation: Any,
) -> dict[str, Any]:
    """Measures generation: answers every test case `repeats` times, after `warmup` unmeasured answers to the first one.

    Args:
        model: any Transformers model that generates, optimized or not.
        tokenizer: the model's own.
        test_cases: prompts: texts (formatted with the model's chat template if it has one), chats (lists of messages), or
            token ids (int64 tensor [T] or [1, T]).
        max_new_tokens: maximum length of an answer, in tokens; it may end earlier.
        repeats: measured answers to each test case.
        warmup: unmeasured answers to the first test case.
        generation: arguments of `model.generate`; greedy by default.

    Returns:
        "n": the number of answers. "p50", "p90", "p95", "p99": percentiles of the time from request to last token, in
        milliseconds; p95 is None with fewer than 20 answers, p99 with fewer than 100. "throughput": generated tokens per
        second, including the time for prompts. "figures": TTFT, TPOT, inter-token latency, prefill and decode speed, with the
        same percentiles. "memory_bytes": the peak memory of the process so far; None on systems other than Linux. "cases":
        tokens, text and times of each answer.

    Raises:
        ValueError: there are no test cases, or one does not fit the model's context.
    """
    if isinstance(test_cases, str) or not len(test_cases):
        raise ValueError("test_cases must be a list of prompts with at least one entry")
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")
    prompts = [_ids(case, tokenizer).to(model.device) for case in test_cases]
    options: dict[str, Any] = {"do_sample": False, **generation}
    limits = [min(max_new_tokens, _room(model, ids)) for ids in prompts]
    for _ in range(warmup):
        timed(model, prompts[0], max_new_tokens=limits[0], **options)
    runs: list[Run] = []
    cases: list[dict[str, Any]] = []
    for _ in range(repeats):
        for number, (ids, limit) in enumerate(zip(prompts, limits, strict=True)):
            run, new = timed(model, ids, max_new_tokens=limit, **options)
            runs.append(run)
            if len(cases) < len(prompts):
                text = tokenizer.decode(new[0], skip_special_tokens=True)
                cases.append({"prompt_tokens": ids.shape[1], "new_tokens": new.shape[1], "text": text, "e2e_ms": []})
            cases[number]["e2e_ms"].append(run.e2e_s * 1e3)
    seconds = sum(run.e2e_s for run in runs)
    return {
        **summary([run.e2e_s * 1e3 for run in runs]),
        "throughput": sum(run.generated for run in runs) / seconds,
        "requests_s": len(runs) / seconds,
        "figures": figures(samples(runs)),
        "memory_bytes": peak_resident_bytes(),
        "cases": cases,
    }


def _ids(case: Any, tokenizer: Any) -> Any:
    """int64 [1, T]."""
    from ..chat.conversation import prompt_ids

    if isinstance(case, str):
        return prompt_ids(tokenizer, [{"role": "user", "content": case}])
    if isinstance(case, list) and case and isinstance(case[0], dict):
        return prompt_ids(tokenizer, case)
    import torch

    ids = torch.as_tensor(case, dtype=torch.int64, device="cpu")
    return ids.reshape(1, -1) if ids.ndim == 1 else ids


def _room(model: Any, ids: Any) -> int:
    """Number of new tokens that still fit into the model's context."""
    from ..integration.bind.context_extension import room_of

    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise ValueError(f"a test case must be one prompt of at least one token, got ids of shape {list(ids.shape)}")
    context = room_of(model.config.get_text_config())
    if context is not None and ids.shape[1] >= context:
        raise ValueError(f"a test case of {ids.shape[1]} tokens leaves no room in the model's context of {context}")
    return context - ids.shape[1] if context is not None else 1 << 30
