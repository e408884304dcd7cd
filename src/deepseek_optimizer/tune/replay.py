"""Replays a trace on an engine, and measures a model with some settings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .settings import Figures, Settings
from .steps import Observation, Record, StepLoad, TimedStep, load_of
from .traces import Trace, prompts, shortened

_SOON = 0.001  # seconds that an idle engine waits at least
_TEXT = 200_000  # characters of the sample text that prompts are taken from
_KL_TOKENS = 256


class ReplayTooLong(Exception):
    """A replay was ended because it took longer than was allowed."""


def replay(
    engine: Any,
    running: Callable[[], Any],
    trace: Trace,
    tokens: list[list[int]],
    salt: str = "",
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    longest: float | None = None,
    record: Record | None = None,
) -> Figures:
    """Sends each request when its time has come; answers are greedy and have the trace's lengths. `memory_bytes`: the cache's.

    Args:
        engine: an idle `Engine`.
        running: its backend's `thread_context`.
        trace, tokens: the requests, and their prompts.
        salt: replays with other salts do not share cached prefixes.
        clock, sleep: of seconds.
        longest: seconds that it may take; None: any.
        record: gets what is not in the figures.

    Raises:
        ReplayTooLong: it takes longer; requests are left in the engine.
    """
    from ..engine.request import Request, SamplingParams

    core, began = engine.core, clock()
    waiting, most = list(range(len(trace))), 0
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    loads: list[StepLoad] = []
    if record is not None:
        record.answers = [[] for _ in trace]
        core.on_step = lambda parts: loads.append(load_of(parts))
    while waiting or len(last) < len(trace):
        now = clock() - began
        if longest is not None and now > longest:
            raise ReplayTooLong(f"ended after {now:.2f} seconds; {longest:.2f} were allowed")
        while waiting and trace[waiting[0]].at <= now:
            index = waiting.pop(0)
            sampling = SamplingParams(temperature=0, max_tokens=trace[index].new_tokens, ignore_eos=True)
            core.add(Request(tokens[index], sampling, id=str(index), salt=salt), arrived=began + trace[index].at)
        if core.idle:
            sleep(max(_SOON, trace[waiting[0]].at - now))
            continue
        begun = clock()
        with running():
            outputs = core.step()
        now = clock() - began
        if record is not None and loads:
            record.steps.append(TimedStep(loads.pop(), now + began - begun))
        for output in outputs:
            index = int(output.request_id)
            if record is not None:
                record.answers[index] += output.token_ids
            if output.token_ids:
                first.setdefault(index, now - trace[index].at)
            if output.finish is not None:
                last[index] = now - trace[index].at
        most = max(most, core.memory.used_bytes)
    if record is not None:
        core.on_step = None
    total = sum(map(len, tokens)) + sum(request.new_tokens for request in trace)
    return Figures(_mean(last), _mean(first or last), total / (clock() - began), float(most))


def _mean(values: dict[int, float]) -> float:
    return sum(values.values()) / len(values)


def _drafted(core: Any) -> tuple[int, int, int]:
    """See `Record.drafted`; of all requests so far."""
    drafting = core.drafting
    return (0, 0, 0) if drafting is None else (drafting.drafts, drafting.proposed, drafting.accepted)


class ModelMeasure:
    """Measures a model: `for figures in measure(settings): ...`, one replay after the other, each with an empty prefix cache.
    The model is loaded again only for settings with another number of threads or another format.

    Args:
        path: of the model, see `load_model`.
        fields: of `DeepSeekConfig`, that are not searched.
        trace: to replay; requests that do not fit the model's context are shortened.
        at_once: send all requests at once: only throughput counts.
        models: how many loaded models are kept, those that were used last.
        observe: called with what each replay showed.
        copies: where the model lies packed in a precision; None: it is packed while it is loaded.

    Attributes:
        longest: seconds that a replay may take before it raises ReplayTooLong; None: any.
    """

    def __init__(
        self,
        path: str | Path,
        fields: dict[str, Any],
        trace: Trace,
        at_once: bool = False,
        models: int = 1,
        observe: Callable[[Observation], None] = lambda _: None,
        copies: Callable[[str], Path] | None = None,
    ) -> None:
        self._observe, self._copies = observe, copies
        self._path, self._fields, self._at_once, self._most = path, fields, at_once, models
        self._trace, self._salts = trace, 0
        self._models: dict[tuple[int, str, str], Any] = {}  # by what they were loaded with; the one that was used last is last
        self._tokenizer: Any = None
        self.longest: float | None = None
        self._tokens: list[list[int]] | None = None
        self._reference: Any = None  # logits of the defaults
        self._divergences: dict[tuple[str, str, str], float] = {}

    def __call__(self, settings: Settings) -> Iterator[Figures]:
        from dataclasses import replace

        from ..serving import STALL, make_engine

        model, tokenizer = self._loaded(settings)
        options = {"drafts": settings.drafts or False, **settings.to_options()}
        with make_engine(model, tokenizer, **options, stall=STALL) as engine:  # as a server schedules
            core = engine.core
            trace = self._prepared(engine, tokenizer)
            weights, kl = model.report().bytes_after, self._divergence(model, tokenizer, settings)
            running = model.dso.backend.thread_context
            while True:
                self._salts += 1
                assert self._tokens is not None
                record, before = Record(), _drafted(core)
                figures = replay(engine, running, trace, self._tokens, str(self._salts), longest=self.longest, record=record)
                rounds, proposed, accepted = (now - then for now, then in zip(_drafted(core), before, strict=True))
                record.drafted = rounds, proposed, accepted
                figures = replace(figures, memory_bytes=figures.memory_bytes + weights, kl=kl)
                self._observe(
                    Observation(
                        settings,
                        figures,
                        record,
                        trace,
                        self._tokens,
                        core.facts.context,
                        core.facts.chunk,
                        core.blocks,
                        weights,
                        layers_draft=bool(core.drafting and core.drafting.wants_states),
                    )  # fmt: skip
                )
                yield figures

    def _loaded(self, settings: Settings) -> tuple[Any, Any]:
        """The model, ready for an engine with these settings, and its tokenizer."""
        from ..integration.bind.runtime import runtime_of
        from ..optimized_model import load_model, load_tokenizer

        key = settings.threads, settings.kv_cache, settings.precision
        model = self._models.pop(key, None)
        if model is None:
            while len(self._models) >= self._most:  # before the next one is loaded
                del self._models[next(iter(self._models))]
            path = self._path if self._copies is None else self._copies(settings.precision)
            model = load_model(path, **{**self._fields, **settings.to_fields()})
        else:
            runtime_of(model).prepare_for(settings.batch, settings.prefill_chunk)
        self._models[key] = model
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._path)
        return model, self._tokenizer

    def _prepared(self, engine: Any, tokenizer: Any) -> Trace:
        """The trace as it is sent; its prompts are made once."""
        from dataclasses import replace

        from ..calibration.text import sample_text

        facts = engine.core.facts
        trace = shortened(self._trace, facts.context)
        if self._tokens is None:

            def encode(text: str) -> list[int]:
                ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
                return ids[: facts.context - facts.context // 2]  # an answer may take the other half

            self._tokens = prompts(trace, encode, encode_all(tokenizer, sample_text()[:_TEXT]), facts.vocab_size)
        return tuple(replace(request, at=0.0) for request in trace) if self._at_once else trace

    def _divergence(self, model: Any, tokenizer: Any, settings: Settings) -> float:
        """KL divergence of a text after a prompt from that of the first settings, which are the defaults."""
        import torch

        from ..backends.qualities import EXACT, prompt_quality
        from ..bench.quality import Divergence, after_prompt
        from ..calibration.text import sample_text

        kind = model.report().kv_cache, settings.precision, settings.quality
        if kind in self._divergences:
            return self._divergences[kind]
        ids = encode_all(tokenizer, sample_text()[: 32 * _KL_TOKENS])[: 2 * _KL_TOKENS]
        ids = ids[: model.dso.graph.max_positions]
        prompt, runtime = len(ids) // 2, model.dso
        first, then = (
            runtime.plan if quality == EXACT else runtime.compile(runtime.graph, quality)
            for quality in (prompt_quality(settings.quality), settings.quality)
        )
        logits = after_prompt(model, ids, prompt, first, then, step=1)
        if self._reference is None:
            self._reference = logits
        found = Divergence()
        found.add(logits, self._reference, torch.tensor(ids[prompt:], dtype=torch.int64, device="cpu"))
        self._divergences[kind] = max(0.0, found.summary()["kl_mean"]) if logits is not self._reference else 0.0
        return self._divergences[kind]


def encode_all(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text of any length."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids
