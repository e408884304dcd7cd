"""Latency jitter: the time between tokens with nothing else to do, while long prompts are processed, and in large batches.

A few streams decode in an engine; then again while prompts arrive, once processed in chunks as in `dso serve` and once whole;
and finally as many concurrent streams as the batch allows. A token is late because of a prompt in the same step, a batch that
is too large, a cache so small that streams are preempted, or other processes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from ...backends.base import BLOCK_TOKENS
from ...bench.background import cpu_times, used_by_others
from ...engine.core import EngineCore
from ...engine.request import Request, SamplingParams
from ...errors import BackendError
from ..case import Case
from ..finding import Finding
from .base import Symptom
from .slow import BUSY

NAME = "latency-jitter"
STREAMS, TOKENS, SHORT = 4, 48, 16  # number of streams, tokens of each, tokens of their prompts
PROMPT = 1024  # tokens of the prompts that arrive
QUIET = 4  # steps between two of these prompts
STAGE = 6  # steps at each batch size
LIMIT = 4.0  # times the usual gap, above which a stream visibly stalls
UNEVEN = 3.0  # the same with nothing else to do


@dataclass(frozen=True)
class Pace:
    """Gaps between a stream's tokens, in seconds: the median and the 99th percentile."""

    p50: float
    p99: float

    @classmethod
    def of(cls, gaps: Sequence[float]) -> Pace:
        ordered = sorted(gaps)
        return cls(statistics.median(ordered), ordered[math.ceil(0.99 * len(ordered)) - 1])

    def __str__(self) -> str:
        return f"{self.p50 * 1e3:.1f} ms, p99 {self.p99 * 1e3:.1f} ms"


@dataclass(frozen=True)
class Jitter:
    """
    Attributes:
        streams: number of decoding streams.
        idle: their pace with nothing else to do.
        chunked, whole: their pace while prompts arrive, processed in chunks limited by `stall`, and whole.
        prompt_tokens: length of each prompt.
        stall: maximum duration of a step with a chunk, relative to a step without.
        step_tokens: maximum tokens of a step.
        steps: seconds of a step by number of streams in it.
        high, chosen: maximum number of concurrent streams, and the number that the engine chooses from measured times.
        preemptions: how often a stream was removed from the cache.
        cache_tokens: capacity of the cache.
        others: CPUs used by other processes meanwhile; None if unknown.
    """

    streams: int
    idle: Pace
    chunked: Pace
    whole: Pace
    prompt_tokens: int
    stall: float
    step_tokens: int
    steps: Mapping[int, float]
    high: int
    chosen: int
    preemptions: int
    cache_tokens: int
    others: float | None

    def facts(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "streams": self.streams, "prompt_tokens": self.prompt_tokens, "stall": self.stall, "step_tokens": self.step_tokens,
            **{f"{name}_{key}_ms": getattr(getattr(self, name), key) * 1e3
               for name in ("idle", "chunked", "whole") for key in ("p50", "p99")},
            "step_ms_by_streams": {str(n): seconds * 1e3 for n, seconds in self.steps.items()},
            "high": self.high, "chosen": self.chosen, "preemptions": self.preemptions, "cache_tokens": self.cache_tokens,
            "others_cpus": self.others,
        }  # fmt: skip


def measure(case: Case) -> Iterator[Finding]:
    """Measures with up to --batch streams, or else the upper bound of batch_size_range."""
    yield from judge(measure_jitter(case.loaded, high=case.batch if case.batch > 1 else None))


def measure_jitter(model: Any, high: int | None = None) -> Jitter:
    """Runs streams and prompts of arbitrary token ids; no text is needed."""
    from ...integration.bind.runtime import runtime_of
    from ...serving import STALL, make_engine

    runtime = runtime_of(model)
    running = runtime.backend.thread_context
    low, configured = runtime.config.batch_size_range
    high = high or configured

    def core(**options: Any) -> EngineCore:
        bounds = (min(low, high), high)
        return make_engine(model, drafts=False, prefix_cache=False, batch_size_range=bounds, **options).core

    before = cpu_times()
    first = core()
    streams = min(STREAMS, high)
    cache_tokens = first.blocks // len(first.groups) * BLOCK_TOKENS
    room = min(first.facts.context, cache_tokens)
    prompt = max(1, min(PROMPT, room - streams * (SHORT + TOKENS), room // 2))
    chunked, whole, crowd = core(stall=STALL), core(), core()
    paces = [
        Pace.of(gaps(first, running, streams)),
        Pace.of(gaps(chunked, running, streams, prompt)),
        Pace.of(gaps(whole, running, streams, prompt)),
    ]
    steps = steps_by_streams(crowd, running, high)
    return Jitter(
        streams=streams,
        idle=paces[0],
        chunked=paces[1],
        whole=paces[2],
        prompt_tokens=prompt,
        stall=STALL,
        step_tokens=first.options.step_tokens,
        steps=steps,
        high=high,
        chosen=crowd.scheduler.batch.choose(),
        preemptions=sum(one.metrics.preemptions for one in (first, chunked, whole, crowd)),
        cache_tokens=cache_tokens,
        others=used_by_others(before, cpu_times()),
    )


def gaps(core: EngineCore, running: Callable[[], AbstractContextManager[Any]], streams: int, prompt: int = 0) -> list[float]:
    """Seconds between the tokens of each stream, by the engine's clock, while prompts of `prompt` tokens arrive one after the
    other; 0: no prompts.

    Raises:
        BackendError: the model cannot be run.
    """
    for number in range(streams):
        core.add(_request(core, f"stream-{number}", SHORT, TOKENS))
    alive, last, seconds = streams, dict[str, float](), list[float]()
    quiet, arrived, reading = 0, 0, False
    with running():
        while alive:
            if prompt and len(last) == streams and not reading and (not arrived or quiet >= QUIET):
                core.add(_request(core, f"prompt-{arrived}", prompt, 1))
                arrived, reading, quiet = arrived + 1, True, 0
            quiet += 1
            for output in core.step():
                if output.finish == "error":
                    raise BackendError(output.error or "the engine stopped without an error message")
                now = core.clock()
                if output.request_id.startswith("prompt"):
                    reading, quiet = False, 0
                    continue
                if output.request_id in last and (arrived or not prompt):
                    seconds.append(now - last[output.request_id])
                last[output.request_id] = now
                alive -= output.finish is not None
        if reading:
            core.cancel(f"prompt-{arrived - 1}")
            core.step()
    return seconds


def steps_by_streams(core: EngineCore, running: Callable[[], AbstractContextManager[Any]], high: int) -> dict[int, float]:
    """Number of streams -> median seconds of a step: for `high` streams, half as many, and so on down to one."""
    sizes = [high]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    for number in range(high):
        core.add(_request(core, f"stream-{number}", SHORT, STAGE * sum(size > number for size in sizes)))
    with running():
        while not core.idle:
            for output in core.step():
                if output.finish == "error":
                    raise BackendError(output.error or "the engine stopped without an error message")
    samples: dict[int, list[float]] = {}
    for rows, prompts, seconds in core.metrics.recent_steps:
        if not prompts:
            samples.setdefault(rows, []).append(seconds)
    return {rows: statistics.median(times) for rows, times in sorted(samples.items()) if len(times) > 2}


def _request(core: EngineCore, name: str, prompt: int, tokens: int) -> Request:
    ids = [(7 + 31 * i) % core.facts.vocab_size for i in range(prompt)]
    return Request(ids, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True), id=name)


def judge(jitter: Jitter) -> Iterator[Finding]:
    """The findings that follow from the measurements."""
    findings = [*_others(jitter), *_preempted(jitter), *_crowded(jitter), *_prompts(jitter)]
    if not findings and jitter.idle.p99 > UNEVEN * jitter.idle.p50:
        findings.append(
            _warning(
                jitter,
                f"{jitter.streams} streams are uneven though nothing else runs: {jitter.idle}",
                "some threads have no CPU of their own, or the container is throttled",
                "see the findings on threads and environment; use fewer threads",
            )  # fmt: skip
        )
    yield from findings
    if not any(finding.severity == "warning" for finding in findings):
        yield Finding(
            NAME, "ok",
            f"{jitter.streams} streams keep their pace: {jitter.idle} between tokens, {jitter.chunked} while prompts of "
            f"{jitter.prompt_tokens} tokens are processed", facts=jitter.facts(),
        )  # fmt: skip


def _busy(jitter: Jitter) -> bool:
    return jitter.others is not None and jitter.others > BUSY


def _others(jitter: Jitter) -> Iterator[Finding]:
    if _busy(jitter):
        yield _warning(
            jitter, f"other processes used {jitter.others:.1f} of the CPUs of this process meanwhile",
            "they compete with its threads, and each step waits for its last thread",
            "stop them, or assign each its own CPUs (taskset, docker --cpuset-cpus)",
        )  # fmt: skip


def _preempted(jitter: Jitter) -> Iterator[Finding]:
    if jitter.preemptions:
        yield _warning(
            jitter, f"streams were preempted {jitter.preemptions} times, and their cache was recomputed",
            f"the cache has room for {jitter.cache_tokens} tokens, too few for {jitter.high} longer streams",
            f"use a larger kv_cache_memory, kv_cache='int8', or fewer concurrent streams: batch_size_range=(1, "
            f"{max(1, jitter.high // 2)})",
        )  # fmt: skip
        return
    each = jitter.prompt_tokens + TOKENS
    if (fit := max(1, jitter.cache_tokens // each)) < jitter.chosen:
        yield Finding(
            NAME, "note", f"the cache has room for {fit} streams of {each} tokens, but {jitter.chosen} may run concurrently",
            "later streams wait, or are preempted and recomputed, and stall meanwhile",
            f"use a larger kv_cache_memory, kv_cache='int8', or batch_size_range=(1, {fit})", jitter.facts(),
        )  # fmt: skip


def _crowded(jitter: Jitter) -> Iterator[Finding]:
    if not jitter.steps:
        return
    alone = jitter.steps[min(jitter.steps)]
    chosen = next((n for n in sorted(jitter.steps) if n >= jitter.chosen), max(jitter.steps))
    if jitter.steps[chosen] <= LIMIT * alone:
        return
    fitting = max(n for n, seconds in jitter.steps.items() if seconds <= LIMIT * alone)
    rates = {n: n / jitter.steps[n] for n in (chosen, fitting)}
    yield _warning(
        jitter,
        f"with {chosen} concurrent streams a token takes {jitter.steps[chosen] * 1e3:.1f} ms, with {min(jitter.steps)} "
        f"{alone * 1e3:.1f} ms: streams slow down and speed up as others start and end",
        f"the upper bound of batch_size_range, {jitter.high}, allows that many",
        f"use batch_size_range=(1, {fitting}): {rates[fitting]:.0f} tokens/s in total instead of {rates[chosen]:.0f}; or "
        "target_itl, the time between tokens in seconds that the engine then maintains",
    )  # fmt: skip


def _prompts(jitter: Jitter) -> Iterator[Finding]:
    limit = LIMIT * jitter.idle.p50
    if jitter.chunked.p99 > limit:
        yield _warning(
            jitter,
            f"prompts of {jitter.prompt_tokens} tokens stall the streams though they are processed in chunks: "
            f"{jitter.chunked}, and "
            f"{jitter.idle} without",
            "other processes (see above)"
            if _busy(jitter)
            else f"a step with the smallest chunk takes longer than stall={jitter.stall:g} allows",
            "use a smaller stall and prefill_chunk, shorter prompts, or fewer concurrent prompts",
        )
    elif jitter.whole.p99 > limit:
        yield Finding(
            NAME, "note",
            f"processed whole, prompts of {jitter.prompt_tokens} tokens stall the streams: {jitter.whole}; processed in "
            f"chunks, as in `dso serve`, they do not: {jitter.chunked}",
            f"an engine without `stall` uses whole steps for prompts, here {jitter.step_tokens} tokens",
            f"for interactive use, pass stall={jitter.stall:g} to make_engine, or use a smaller prefill_chunk",
            jitter.facts(),
        )  # fmt: skip


def _warning(jitter: Jitter, what: str, cause: str, fix: str) -> Finding:
    return Finding(NAME, "warning", what, cause, fix, jitter.facts())


SYMPTOM = Symptom(measure, checks=("native build", "threads", "environment", "memory"))
