"""Uneven streams: the time between tokens while nothing else happens, while long prompts are read, and in company.

A few streams decode in an engine. Then the same with prompts that arrive meanwhile, once in pieces as `dso serve` reads them
and once whole, and last as many streams at once as the batch may have. What makes a token late is one of: a prompt in the same
step, a batch that is too large, a cache too small, so that streams lose their place and are run again, or other processes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
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
STREAMS, TOKENS, SHORT = 4, 48, 16  # streams, tokens of each, tokens of their prompts
PROMPT = 1024  # tokens of the prompts that arrive
QUIET = 4  # steps between two of them
STAGE = 6  # steps at each size of the batch
LIMIT = 4.0  # times the usual gap, from where on a stream is seen to stop
UNEVEN = 3.0  # the same where nothing else happens


@dataclass(frozen=True)
class Pace:
    """Gaps between a stream's tokens, in seconds: the median, and the one that 99 of 100 stay below."""

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
        streams: how many decoded.
        idle: their pace while nothing else happened.
        pieces, whole: while prompts arrived, read in pieces by `stall`, and read as fast as can be.
        prompt_tokens: of each.
        stall: times as long as without it that a step with a piece may take.
        step_tokens: tokens of a step at most.
        steps: seconds of a step by how many streams decode in it.
        high, chosen: streams at once that are allowed, and that the engine settles at by the times it has measured.
        preemptions: how often a stream lost its place in the cache.
        cache_tokens: that the cache has room for.
        others: processors' worth of time that other processes took meanwhile; None where the system doesn't tell.
    """

    streams: int
    idle: Pace
    pieces: Pace
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
               for name in ("idle", "pieces", "whole") for key in ("p50", "p99")},
            "step_ms_by_streams": {str(n): seconds * 1e3 for n, seconds in self.steps.items()},
            "high": self.high, "chosen": self.chosen, "preemptions": self.preemptions, "cache_tokens": self.cache_tokens,
            "others_cpus": self.others,
        }  # fmt: skip


def measure(case: Case) -> Iterator[Finding]:
    """Measures with as many streams as --batch says, or else the model's batch_size_range."""
    yield from judge(measure_jitter(case.loaded, high=case.batch if case.batch > 1 else None))


def measure_jitter(model: Any, high: int | None = None) -> Jitter:
    """Runs streams and prompts of numbers that mean nothing: no text is needed."""
    from ...integration.bind.runtime import runtime_of
    from ...serving import STALL, make_engine
    from ...system.threads import one_torch_thread

    runtime = runtime_of(model)
    running = one_torch_thread if runtime.backend.name == "cpu" else nullcontext
    low, most = runtime.config.batch_size_range
    high = high or most

    def core(**options: Any) -> EngineCore:
        bounds = (min(low, high), high)
        return make_engine(model, drafts=False, prefix_cache=False, batch_size_range=bounds, **options).core

    before = cpu_times()
    first = core()
    streams = min(STREAMS, high)
    room = min(first.facts.context, first.blocks * BLOCK_TOKENS)
    prompt = max(1, min(PROMPT, room - streams * (SHORT + TOKENS), room // 2))
    pieces, whole, crowd = core(stall=STALL), core(), core()
    paces = [
        Pace.of(gaps(first, running, streams)),
        Pace.of(gaps(pieces, running, streams, prompt)),
        Pace.of(gaps(whole, running, streams, prompt)),
    ]
    steps = steps_by_streams(crowd, running, high)
    return Jitter(
        streams=streams,
        idle=paces[0],
        pieces=paces[1],
        whole=paces[2],
        prompt_tokens=prompt,
        stall=STALL,
        step_tokens=first.options.step_tokens,
        steps=steps,
        high=high,
        chosen=crowd.scheduler.batch.choose(),
        preemptions=sum(one.metrics.preemptions for one in (first, pieces, whole, crowd)),
        cache_tokens=first.blocks * BLOCK_TOKENS,
        others=used_by_others(before, cpu_times()),
    )


def gaps(core: EngineCore, running: Callable[[], AbstractContextManager[Any]], streams: int, prompt: int = 0) -> list[float]:
    """Seconds between the tokens of each stream, by the engine's clock: while prompts of `prompt` tokens arrive, one after the
    other, or, where that is 0, none do.

    Raises:
        BackendError: the model cannot be run.
    """
    for number in range(streams):
        core.add(_request(core, f"stream-{number}", SHORT, TOKENS))
    alive, last, found = streams, dict[str, float](), list[float]()
    quiet, arrived, reading = 0, 0, False
    with running():
        while alive:
            if prompt and len(last) == streams and not reading and (not arrived or quiet >= QUIET):
                core.add(_request(core, f"prompt-{arrived}", prompt, 1))
                arrived, reading, quiet = arrived + 1, True, 0
            quiet += 1
            for output in core.step():
                if output.finish == "error":
                    raise BackendError(output.error or "the engine could not go on")
                now = core.clock()
                if output.request_id.startswith("prompt"):
                    reading, quiet = False, 0
                    continue
                if output.request_id in last and (arrived or not prompt):
                    found.append(now - last[output.request_id])
                last[output.request_id] = now
                alive -= output.finish is not None
        if reading:
            core.cancel(f"prompt-{arrived - 1}")
            core.step()
    return found


def steps_by_streams(core: EngineCore, running: Callable[[], AbstractContextManager[Any]], high: int) -> dict[int, float]:
    """Median seconds of a step in which so many streams decode: `high` of them, then half as many, and so on down to one."""
    sizes = [high]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    for number in range(high):
        core.add(_request(core, f"stream-{number}", SHORT, STAGE * sum(size > number for size in sizes)))
    with running():
        while not core.idle:
            for output in core.step():
                if output.finish == "error":
                    raise BackendError(output.error or "the engine could not go on")
    samples: dict[int, list[float]] = {}
    for rows, prompts, seconds in core.metrics.recent_steps:
        if not prompts:
            samples.setdefault(rows, []).append(seconds)
    return {rows: statistics.median(found) for rows, found in sorted(samples.items()) if len(found) > 2}


def _request(core: EngineCore, name: str, prompt: int, tokens: int) -> Request:
    ids = [(7 + 31 * i) % core.facts.vocab_size for i in range(prompt)]
    return Request(ids, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True), id=name)


def judge(jitter: Jitter) -> Iterator[Finding]:
    """What the figures say; numbers in, findings out."""
    found = [*_others(jitter), *_preempted(jitter), *_crowded(jitter), *_prompts(jitter)]
    if not found and jitter.idle.p99 > UNEVEN * jitter.idle.p50:
        found.append(
            _warning(
                jitter,
                f"{jitter.streams} streams are uneven though nothing else runs: {jitter.idle}",
                "some threads have no processor of their own, or the container is throttled",
                "see the findings on threads and environment; fewer threads",
            )  # fmt: skip
        )
    yield from found
    if not any(finding.severity == "warning" for finding in found):
        yield Finding(
            NAME, "ok",
            f"{jitter.streams} streams keep their pace: {jitter.idle} between tokens, {jitter.pieces} while prompts of "
            f"{jitter.prompt_tokens} tokens are read", facts=jitter.facts(),
        )  # fmt: skip


def _busy(jitter: Jitter) -> bool:
    return jitter.others is not None and jitter.others > BUSY


def _others(jitter: Jitter) -> Iterator[Finding]:
    if _busy(jitter):
        yield _warning(
            jitter, f"other processes used {jitter.others:.1f} of our processors meanwhile",
            "they take turns with our threads, and a step waits for its last thread",
            "stop them, or give each its own processors (taskset, docker --cpuset-cpus)",
        )  # fmt: skip


def _preempted(jitter: Jitter) -> Iterator[Finding]:
    if jitter.preemptions:
        yield _warning(
            jitter, f"streams lost their place in the cache {jitter.preemptions} times, and were run again from their tokens",
            f"it has room for {jitter.cache_tokens} tokens, which {jitter.high} streams of some length exceed",
            f"a larger kv_cache_memory, kv_cache='int8', or fewer at once: batch_size_range=(1, {max(1, jitter.high // 2)})",
        )  # fmt: skip
        return
    each = jitter.prompt_tokens + TOKENS
    if (fit := max(1, jitter.cache_tokens // each)) < jitter.chosen:
        yield Finding(
            NAME, "note", f"the cache has room for {fit} streams of {each} tokens, and {jitter.chosen} may run at once",
            "those that come late wait, or lose their place and are run again, and their streams stop meanwhile",
            f"a larger kv_cache_memory, kv_cache='int8', or batch_size_range=(1, {fit})", jitter.facts(),
        )  # fmt: skip


def _crowded(jitter: Jitter) -> Iterator[Finding]:
    if not jitter.steps:
        return
    alone = jitter.steps[min(jitter.steps)]
    settled = next((n for n in sorted(jitter.steps) if n >= jitter.chosen), max(jitter.steps))
    if jitter.steps[settled] <= LIMIT * alone:
        return
    fitting = max(n for n, seconds in jitter.steps.items() if seconds <= LIMIT * alone)
    rates = {n: n / jitter.steps[n] for n in (settled, fitting)}
    yield _warning(
        jitter,
        f"with {settled} streams at once a token takes {jitter.steps[settled] * 1e3:.1f} ms, with {min(jitter.steps)} "
        f"{alone * 1e3:.1f} ms: streams slow down and speed up as others come and go",
        f"the upper bound of batch_size_range, {jitter.high}, lets so many run at once",
        f"batch_size_range=(1, {fitting}): {rates[fitting]:.0f} tokens a second in all instead of {rates[settled]:.0f}; or "
        "target_itl, the seconds between tokens that the engine then keeps to",
    )  # fmt: skip


def _prompts(jitter: Jitter) -> Iterator[Finding]:
    most = LIMIT * jitter.idle.p50
    if jitter.pieces.p99 > most:
        yield _warning(
            jitter,
            f"prompts of {jitter.prompt_tokens} tokens stall the streams though they are read in pieces: {jitter.pieces}, and "
            f"{jitter.idle} without",
            "other processes (see above)"
            if _busy(jitter)
            else f"a step with a piece takes longer than stall={jitter.stall:g} allows: it cannot be cut any smaller",
            "a smaller stall and prefill_chunk; shorter prompts, or fewer at once",
        )
    elif jitter.whole.p99 > most:
        yield Finding(
            NAME, "note",
            f"read whole, prompts of {jitter.prompt_tokens} tokens stall the streams: {jitter.whole}; read in pieces, as `dso "
            f"serve` does, they do not: {jitter.pieces}",
            f"an engine without `stall` gives prompts all of a step, here {jitter.step_tokens} tokens",
            f"make_engine(..., stall={jitter.stall:g}), or a smaller prefill_chunk, where somebody watches",
            jitter.facts(),
        )  # fmt: skip


def _warning(jitter: Jitter, what: str, cause: str, fix: str) -> Finding:
    return Finding(NAME, "warning", what, cause, fix, jitter.facts())


SYMPTOM = Symptom(measure, checks=("native build", "threads", "environment", "memory"))
