"""Slow answers: a short measured decode against the time that reading its weights takes, and what stands between the two."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...bench.background import cpu_times, used_by_others
from ..budget import budget
from ..case import Case
from ..finding import Finding, Severity
from .base import Symptom

NAME = "slow"
PROMPT_TOKENS, TOKENS, ROUNDS = 32, 24, 3
GOOD_SHARE = 0.5  # of the read limit: what decoding should reach at least
SMALL = 32 << 20  # bytes a token, below which reading them is not what takes the time
CLEARLY = 0.9  # of the time: what fewer threads must take to be called faster
BUSY = 0.3  # processors' worth of other work on ours that shows in the figures


@dataclass(frozen=True)
class Decode:
    """seconds: of a token, the best round. others: processors' worth of time that other processes took on ours meanwhile, None
    where the system doesn't tell. bytes: of weights that a token reads. backend, threads, formats: of the model."""

    seconds: float
    others: float | None
    bytes: int
    backend: str
    threads: int | None
    formats: tuple[str, ...]
    notes: tuple[str, ...] = ()


def measure(case: Case) -> Iterator[Finding]:
    """Decodes, measures the machine's read bandwidth over as many bytes, and compares."""
    from ...bench.machine import read_gb_s

    decode = measure_decode(case.loaded)
    found = list(judge(decode, read_gb_s(decode.bytes, decode.threads or case.machine.usable_cpus) * 1e9))
    yield from found
    slow = any(finding.severity == "warning" for finding in found)
    if slow and decode.threads and decode.threads > 1 and decode.bytes < budget(case).free:  # a second copy of the weights
        fewer = measure_decode(case.load(threads=(decode.threads + 1) // 2))
        if fewer.seconds < decode.seconds * CLEARLY:
            yield fewer_threads(decode, fewer)


def fewer_threads(whole: Decode, fewer: Decode) -> Finding:
    """Half as many threads are faster."""
    before, after = whole.seconds * 1e3, fewer.seconds * 1e3
    return Finding(
        NAME, "warning", f"threads={fewer.threads} is faster than {whole.threads}: {after:.1f} ms a token, {before:.1f} before",
        "some threads have no processor, or no path to memory, of their own: other processes, hyper-threads, or a quota",
        f"threads={fewer.threads}, or DSO_THREADS={fewer.threads}",
        {"threads": fewer.threads, "ms_per_token": after, "ms_per_token_before": before},
    )  # fmt: skip


def measure_decode(model: Any) -> Decode:
    """Best of a few rounds of the same tokens through `generate`."""
    import torch

    from ...bench.traffic import traffic_of

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
    size = traffic.weight_bytes + round(sum(layer.read(1) for layer in traffic.experts))  # so short a cache adds little
    return Decode(seconds, others, size, report.backend, report.threads, formats, report.warnings)


def _timed(model: Any, ids: Any, tokens: int) -> float:
    started = time.perf_counter()
    model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return time.perf_counter() - started


def judge(decode: Decode, bandwidth: float) -> Iterator[Finding]:
    """What the figures say; numbers in, findings out."""
    floor = decode.bytes / bandwidth
    share = floor / decode.seconds
    facts = {
        "ms_per_token": decode.seconds * 1e3, "floor_ms": floor * 1e3, "share_of_read_limit": share,
        "bytes_per_token": decode.bytes, "read_gb_per_s": bandwidth / 1e9, "others_cpus": decode.others,
        "backend": decode.backend, "threads": decode.threads, "formats": list(decode.formats),
    }  # fmt: skip
    figures = (
        f"{decode.seconds * 1e3:.1f} ms a token; reading its {decode.bytes / 1e6:.0f} MB takes {floor * 1e3:.1f} ms at "
        f"{bandwidth / 1e9:.0f} GB/s"
    )
    for note in decode.notes:
        yield Finding(NAME, "warning", note, facts=facts)
    if decode.backend != "cpu":
        yield Finding(
            NAME, "warning", f"the {decode.backend} backend runs: {figures}", "it is plain torch: an oracle and a fallback",
            "leave backend out; where there is no native build, the check 'native build' says why", facts,
        )  # fmt: skip
        return
    busy = decode.others is not None and decode.others > BUSY
    if busy:
        yield Finding(
            NAME, "warning", f"other processes used {decode.others:.1f} of our processors meanwhile",
            "they take turns with our threads, and a step waits for its last thread",
            "stop them, or give each its own processors (taskset, docker --cpuset-cpus)", facts,
        )  # fmt: skip
    if share >= GOOD_SHARE:
        smaller = [f for f in decode.formats if f in ("fp32", "bf16")]
        fix = "fewer bytes are what makes it faster: precision='int8' or 'int4'" if smaller else ""
        yield Finding(NAME, "ok", f"{figures}: {share:.0%} of the limit", fix=fix, facts=facts)
        return
    severity: Severity = "warning"
    if busy:
        cause = "other processes (see above)"
    elif decode.bytes < SMALL:
        cause, severity = "the model is so small that steps, not weights, take the time", "note"
    else:
        cause = "too few or too many threads, a throttled container, or a slower ISA than this CPU has"
    fix = "see the findings on threads, CPU features and environment"
    yield Finding(NAME, severity, f"{figures}: {share:.0%} of the limit", cause, fix, facts)


SYMPTOM = Symptom(measure, checks=("native build", "CPU features", "threads", "environment", "huge pages"))
