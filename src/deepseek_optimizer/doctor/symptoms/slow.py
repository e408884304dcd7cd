"""Slow answers: compares a short decode with the time that reading its weights takes, and explains the difference."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...backends.registry import is_fallback
from ...bench.background import cpu_times, used_by_others
from ..case import Case
from ..finding import Finding, Severity
from ..memory_estimate import estimate_memory
from .base import Symptom

NAME = "slow"
PROMPT_TOKENS, TOKENS, ROUNDS = 32, 24, 3
GOOD_SHARE = 0.5  # of the bandwidth limit: what decoding should reach
SMALL = 32 << 20  # bytes per token, below which reading them does not dominate the time
CLEARLY = 0.9  # of the time: fewer threads count as faster below it
BUSY = 0.3  # CPUs used by other processes, above which they affect the result


@dataclass(frozen=True)
class Decode:
    """seconds: per token, in the best round. others: CPUs used by other processes meanwhile; None if unknown. bytes: of weights
    read per token. backend, threads, formats: of the model. notes: warnings of its report."""

    seconds: float
    others: float | None
    bytes: int
    backend: str
    threads: int | None
    formats: tuple[str, ...]
    notes: tuple[str, ...] = ()


def measure(case: Case) -> Iterator[Finding]:
    """Decodes, measures the machine's read bandwidth over the same number of bytes, and compares."""
    from ...bench.machine_limits import read_gb_s

    decode = measure_decode(case.loaded)
    findings = list(judge(decode, read_gb_s(decode.bytes, decode.threads or case.machine.usable_cpus) * 1e9))
    yield from findings
    slow = any(finding.severity == "warning" for finding in findings)
    if (
        slow and decode.threads and decode.threads > 1 and decode.bytes < estimate_memory(case).free
    ):  # a second copy of the weights
        fewer = measure_decode(case.load(threads=(decode.threads + 1) // 2))
        if fewer.seconds < decode.seconds * CLEARLY:
            yield fewer_threads(decode, fewer)


def fewer_threads(whole: Decode, fewer: Decode) -> Finding:
    """The finding that half as many threads are faster."""
    before, after = whole.seconds * 1e3, fewer.seconds * 1e3
    return Finding(
        NAME, "warning", f"threads={fewer.threads} is faster than {whole.threads}: {after:.1f} ms per token instead of "
        f"{before:.1f}",
        "some threads share a CPU or its memory bandwidth: with other processes, as hyper-threads, or because of a quota",
        f"use threads={fewer.threads}, or DSO_THREADS={fewer.threads}",
        {"threads": fewer.threads, "ms_per_token": after, "ms_per_token_before": before},
    )  # fmt: skip


def measure_decode(model: Any) -> Decode:
    """The best of several rounds of `generate` with the same tokens."""
    import torch

    from ...bench.memory_traffic import traffic_of

    report = model.report()
    ids = torch.arange(1, PROMPT_TOKENS + 1, dtype=torch.int64, device="cpu")[None] % model.config.vocab_size
    seconds, others = float("inf"), None
    for _ in range(ROUNDS):
        first = _timed(model, ids, 1)
        before = cpu_times()
        whole = _timed(model, ids, TOKENS + 1)
        others = used_by_others(before, cpu_times())
        seconds = min(seconds, max(whole - first, 1e-9) / TOKENS)
    formats = tuple(row.format for row in report.formats)
    traffic = traffic_of(model)
    size = traffic.weight_bytes + round(sum(layer.read(1) for layer in traffic.experts))  # the cache is too short to matter
    return Decode(seconds, others, size, report.backend, report.threads, formats, report.warnings)


def _timed(model: Any, ids: Any, tokens: int) -> float:
    started = time.perf_counter()
    model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return time.perf_counter() - started


def judge(decode: Decode, bandwidth: float) -> Iterator[Finding]:
    """The findings that follow from the measurements."""
    floor = decode.bytes / bandwidth
    share = floor / decode.seconds
    facts = {
        "ms_per_token": decode.seconds * 1e3, "floor_ms": floor * 1e3, "share_of_read_limit": share,
        "bytes_per_token": decode.bytes, "read_gb_per_s": bandwidth / 1e9, "others_cpus": decode.others,
        "backend": decode.backend, "threads": decode.threads, "formats": list(decode.formats),
    }  # fmt: skip
    figures = (
        f"{decode.seconds * 1e3:.1f} ms per token; reading its {decode.bytes / 1e6:.0f} MB takes {floor * 1e3:.1f} ms at "
        f"{bandwidth / 1e9:.0f} GB/s"
    )
    for note in decode.notes:
        yield Finding(NAME, "warning", note, facts=facts)
    if is_fallback(decode.backend):
        yield Finding(
            NAME, "warning", f"the {decode.backend} backend runs: {figures}", "it is written in plain torch, as a reference "
            "and a fallback",
            "remove the setting backend; if there is no native build, the check 'native build' says why", facts,
        )  # fmt: skip
        return
    busy = decode.others is not None and decode.others > BUSY
    if busy:
        yield Finding(
            NAME, "warning", f"other processes used {decode.others:.1f} of the CPUs of this process meanwhile",
            "they compete with its threads, and each step waits for its last thread",
            "stop them, or assign each its own CPUs (taskset, docker --cpuset-cpus)", facts,
        )  # fmt: skip
    if share >= GOOD_SHARE:
        smaller = [f for f in decode.formats if f in ("fp32", "bf16")]
        fix = "for more speed, use smaller weights: precision='int8' or 'int4'" if smaller else ""
        yield Finding(NAME, "ok", f"{figures}: {share:.0%} of the limit", fix=fix, facts=facts)
        return
    severity: Severity = "warning"
    if busy:
        cause = "other processes (see above)"
    elif decode.bytes < SMALL:
        cause, severity = "the model is so small that the overhead of each step dominates", "note"
    else:
        cause = "too few or too many threads, a throttled container, or a slower ISA than this CPU supports"
    fix = "see the findings on threads, CPU features and environment"
    yield Finding(NAME, severity, f"{figures}: {share:.0%} of the limit", cause, fix, facts)


SYMPTOM = Symptom(measure, checks=("native build", "CPU features", "threads", "environment", "huge pages"))
