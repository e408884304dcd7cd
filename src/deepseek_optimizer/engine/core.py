"""The core of the engine: a step schedules requests, drafts tokens, runs the model and samples. Single-threaded.

Does not import torch: the backend samples tokens where it can; otherwise logits come as rows of numpy arrays.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backends.base import DECODE
from ..backends.qualities import EXACT
from ..cache.block_manager import SequenceBlocks
from ..cache.forgetting import Groups, kept_whole, max_tokens
from ..cache.prefix_cache import PrefixCache
from ..errors import BackendError, CheckpointChangedError, ContextLengthError, RequestError, shown
from .adapters import Adapter, Adapters, adapters_of
from .appending import append_tokens
from .decode_calls import as_drafts, decode_call
from .detokenizer import Detokenizer
from .ending import ended_early
from .metrics import EndedRequest, EngineMetrics
from .model_facts import ModelFacts
from .options import EngineOptions
from .pooling import Pooler
from .request import Finish, Output, Request, check_quality, check_reading, check_tokens, with_quality
from .running import Running
from .sampling.request_sampler import NotANumberError, RequestSampler
from .scheduling.batch_size import BatchSize
from .scheduling.budget import PromptBudget
from .scheduling.lowering import Lowering
from .scheduling.memory import Memory
from .scheduling.policies import policy_of
from .scheduling.policy import Policy
from .scheduling.scheduler import ScheduledChunk, Scheduler
from .scheduling.sliding import Sliding
from .scheduling.step_times import StepTimes
from .scheduling.store import Store
from .sequence import Part, Sequence
from .speculative.base import Proposer
from .speculative.drafting import Drafting
from .step_rows import logit_rows, part_of, prompt_rows, quality_of, served, token_choices, token_counts

if TYPE_CHECKING:
    from .runner import Runner

_log = logging.getLogger(__name__)
_TRIES = 3  # number of preemptions of a request that runs alone before it fails
_PATIENCE = 10.0  # seconds without a step before a request fails
_PROMPT_LOGITS = 64 << 20  # bytes of a step's logits for log probabilities of prompts


class EngineCore:
    """Schedules and runs requests; the base of `Engine` and `AsyncEngine`.

    Args:
        runner: runs the model's plan.
        memory: the cache memory that it uses.
        facts: properties of the model.
        options: options of the engine.
        tokenizer: converts tokens to text; None: outputs have token ids only.
        proposers: (proposer, maximum number of drafts per round) of speculative decoding, in the order in which they are tried.
        clock: returns the time in seconds.
        keep: objects to keep alive as long as the engine, such as the model.
        store: stores the prefix cache's blocks beyond this process; None: they end with it.
        adapters: the adapters that requests may use; None: the runner's plan supports none.
        policy: chooses the limits of steps; None: the one that the options name.
    """

    def __init__(
        self,
        runner: Runner,
        memory: Memory,
        facts: ModelFacts,
        options: EngineOptions,
        tokenizer: Any = None,
        proposers: list[tuple[Proposer, int]] | None = None,
        clock: Callable[[], float] = time.monotonic,
        keep: Any = None,
        store: Store | None = None,
        adapters: Adapters | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.runner, self.memory, self.facts, self.options, self.tokenizer = runner, memory, facts, options, tokenizer
        self.clock, self._keep, self.adapters = clock, keep, adapters
        self.times = StepTimes()
        with memory.locked() as manager:
            self.blocks, self.forgetting = manager.num_blocks, manager.forgetting
            # If some layers have no window, what those with one have released would be visible again after a window has slid.
            self._whole = options.cache_window is not None and self.forgetting is None
            self.groups: Groups = kept_whole(manager.groups) if self._whole else manager.groups
            self.prefix = PrefixCache(manager, whole=self._whole) if options.prefix_cache else None
        low, high = options.batch_size_range
        self.sliding: Sliding | None = None
        if options.cache_window is not None:
            whole = max_tokens(kept_whole(manager.groups), self.blocks, options.step_tokens, facts.context)
            window = min(options.cache_window, facts.plain or facts.context, whole)
            sinks = options.sinks if self.forgetting is None else self.forgetting.sinks  # others are not visible
            self.sliding = Sliding(memory, self.prefix, window, sinks, self._window_moved)
        self.scheduler = Scheduler(
            memory,
            PromptBudget(options.step_tokens, options.stall, self.times, facts.chunk),
            BatchSize(low, high, self.times, options.target_itl),
            self.prefix,
            self.sliding,
            max_prompt_logits=max(facts.chunk or 16, _PROMPT_LOGITS // (4 * facts.vocab_size)),
            invariant=options.batch_invariant,
            lost=self._reset_drafting,
            store=store,
        )
        self.policy = policy or policy_of(options, self.times, facts.chunk)
        self.drafting = Drafting(proposers, self.times) if proposers else None
        self.lowering = Lowering(options.lower_after) if facts.qualities else None
        self.metrics = EngineMetrics()
        self.unwatched = False  # True: nobody reads tokens before their text ends, so a step may run several decode steps
        self.on_ended: Callable[[EndedRequest, Finish], None] | None = None  # called for each request that has ended
        self.on_step: Callable[[list[Part]], None] | None = None  # called for each step with what was computed in it
        self._requests: dict[str, Running] = {}
        self._count = 0
        self._idle_since: float | None = None

    # ---- requests

    @property
    def room(self) -> int:
        """Maximum number of tokens of a request, prompt and text together. With a sliding window, the size of the window."""
        limit = self.facts.context if self.sliding is None else self.sliding.window
        return min(limit, self.cache_tokens)

    @property
    def cache_tokens(self) -> int:
        """Maximum number of tokens of a sequence that fits in the cache alone, up to the model's context."""
        return max_tokens(self.groups, self.blocks, self.options.step_tokens, self.facts.context)

    def check(self, request: Request, adapter: Adapter | None = None) -> int:
        """Checks a request and returns the maximum number of tokens to generate for it.

        Args:
            request: the request.
            adapter: the adapter that it names, if the caller has acquired that already.

        Raises:
            RequestError: the request can never be served.
        """
        prompt, sampling, facts = request.prompt, request.sampling, self.facts
        if request.adapter and adapter is None:
            adapters_of(self).check(request.adapter)
        check_tokens(request, facts.vocab_size)
        check_reading(request, classifies=False)
        check_quality(request, facts.qualities)
        if request.pictures is not None and not facts.pictures:
            raise RequestError("pictures", "this model reads text only")
        if request.pictures is not None and self.sliding is not None:
            raise RequestError("pictures", "are not possible with a window over the conversation (cache_window)")
        room, what, fix = facts.context, "this model's maximum context length", "Please reduce the length of the prompt"
        if self.sliding is not None:
            if not request.embed:
                self.sliding.check(self._pinned(request), len(prompt))
                return self.sliding.window if sampling.max_tokens is None else sampling.max_tokens
            room, what = self.sliding.window, "the window"
        if self.room < room:
            room, what = self.room, "the whole cache (kv_cache_memory)"
            if self.forgetting is None:
                fix += ', or load the model with sparse_attention=True or attention_optimization="sliding"'
        max_tokens = 1 if sampling.max_tokens is None or request.embed else sampling.max_tokens
        if len(prompt) + (0 if request.embed else max_tokens) > room:
            more = "" if sampling.max_tokens is None or request.embed else f" and max_tokens={max_tokens}"
            message = f"{len(prompt)} tokens{more} do not fit: {what} is {room} tokens. {fix}"
            raise ContextLengthError("prompt", message, len(prompt), room)
        return room - len(prompt) if sampling.max_tokens is None else max_tokens

    def add(self, request: Request, adapter: Adapter | None = None, arrived: float | None = None) -> None:
        """Adds a request to the waiting ones.

        Args:
            request: the request.
            adapter: the adapter that it names, if the caller has acquired that already; the engine releases it when the request
                ends.
            arrived: when it came, by the engine's clock; None: now.

        Raises:
            RequestError: a request with this id is in the engine already, or the request can never be served.
        """
        if request.id in self._requests:
            raise RequestError("id", f"{shown(request.id)} is running already")
        request = with_quality(request, self.options.quality) if self.facts.qualities else request
        sampling, now = request.sampling, self.clock()
        if self.idle:
            self._idle_since = None
        self._count += 1
        max_tokens = self.check(request, adapter)
        reach = self._reach(request, max_tokens)
        with self.memory.locked() as manager:
            interval = self.memory.state_interval if self.prefix is not None and not request.embed else 0
            blocks = SequenceBlocks(manager, interval, self._whole)
            sequence = Sequence(self._count, list(request.prompt), blocks, reach=reach, pictures=request.pictures)
            sequence.quality = request.quality or EXACT
        running = Running(
            number=self._count,
            request=request,
            sequence=sequence,
            sampler=RequestSampler(request, self.facts.vocab_size, self.facts.eos),
            text=Detokenizer(
                self.tokenizer,
                sampling.stop,
                include_stop=sampling.include_stop,
                skip_special_tokens=sampling.skip_special_tokens,
            ),
            max_tokens=max_tokens,
            arrived=now if arrived is None else arrived,
            prompt=len(request.prompt),
            pinned=self._pinned(request),
            frequencies=0 if self.facts.plain is None or reach <= self.facts.plain else reach,
            qualities=self.facts.qualities,
        )
        if request.adapter:
            running.adapter = adapter or adapters_of(self).acquire(request.adapter)
            sequence.adapter = running.adapter.slot
        self._requests[request.id] = running
        self.scheduler.add(running)
        if self.policy.learns:
            self.policy.added(running.number, running.arrived, now)

    def _pinned(self, request: Request) -> tuple[tuple[int, int], ...]:
        """Returns the ranges that the sliding window must keep: none if attention itself has a window."""
        return request.pinned if self.sliding is not None and self.forgetting is None else ()

    def _reach(self, request: Request, max_tokens: int) -> int:
        """Returns the maximum number of tokens that the request has in the cache at any time."""
        tokens = len(request.prompt) + (0 if request.embed else max_tokens)
        return min(tokens, self.facts.context if self.sliding is None else self.sliding.window)

    def cancel(self, request_id: str) -> None:
        """Cancels a request: it ends with the next step, unless it has ended already."""
        if (running := self._requests.get(request_id)) is not None:
            running.cancelled = True

    @property
    def idle(self) -> bool:
        return not self._requests

    @property
    def stalled(self) -> bool:
        """Whether no request could continue in the last step."""
        return self._idle_since is not None

    def cache_usage(self) -> float:
        """Returns the fraction of cache blocks in use by sequences; blocks that only the prefix cache holds do not count."""
        with self.memory.locked() as manager:
            used = manager.num_blocks - manager.free_blocks - (self.prefix.unused if self.prefix else 0)
        return used / max(1, self.blocks)

    @property
    def requests(self) -> int:
        """Number of requests in the engine."""
        return len(self._requests)

    @property
    def load(self) -> tuple[int, int]:
        """Number of requests in the running batch, and of requests that wait for it."""
        return len(self.scheduler.running), len(self.scheduler.waiting)

    def release_memory(self) -> None:
        """Drops all cached prefixes, and returns the memory of the cache to the system. No request may be in the engine."""
        if self.scheduler.stored is not None:
            self.scheduler.stored.flush()
        with self.memory.locked():
            if self.prefix is not None:
                self.prefix.clear()
        self.memory.release_unused()

    # ---- a step

    def step(self) -> list[Output]:
        """Runs one step and returns its outputs.

        Raises:
            CheckpointChangedError: a file that the model's weights are mapped from was modified; the step's results are
                discarded.
        """
        outputs = self._end_expired()
        begun = self.clock()
        try:
            chunks = self._schedule(begun)
        except (MemoryError, BackendError) as error:  # the requests' blocks are in an unknown state
            return outputs + self._fail(list(self.scheduler.running), error)
        outputs += self._end_starved()
        if not chunks:
            return outputs or ([] if self.scheduler.wait_for_stored() else self._check_stalled())
        self._idle_since = None
        parts = [part_of(chunk) for chunk in chunks]
        ends = list(accumulate(len(p.ids) for p in parts))
        rows = [row for chunk, end in zip(chunks, ends, strict=True) for row in logit_rows(chunk, end)]
        follows = bool(self.drafting and self.drafting.wants_states)
        embeds = any(s.running.request.embed for s in chunks)
        decoding, prompt = token_counts(chunks)
        call = None
        if self.unwatched and self.runner.decodes and self.sliding is None:
            call = decode_call(chunks, self.scheduler, self.facts)
        tokens: list[int | None]
        logits: Any
        last_hidden: Any = None
        states: Any = None
        try:
            if call is not None:
                decoded = self.runner.decode(parts, call, draft_states=follows)
                ran = self.clock()
                steps, (tokens, logits) = decoded.steps, as_drafts(chunks, decoded)
                states = None if decoded.draft_states is None else decoded.draft_states.transpose(0, 1).flatten(0, 1)
            else:
                result = self.runner.step(parts, rows, last_hidden=embeds, draft_states=follows)
                ran = self.clock()
                steps, last_hidden, states = 1, result.last_hidden, result.draft_states
                tokens, logits = self.runner.choose_tokens(result.logits, token_choices(chunks, self.runner.on_host))
                if not self.runner.on_host:
                    self.metrics.copied_rows += tokens.count(None)
        except (MemoryError, BackendError) as error:
            return outputs + self._fail([chunk.running for chunk in chunks], error)
        if self.on_step is not None:
            self.on_step(parts)
        outputs += self._advance(chunks, tokens, logits, last_hidden, states, drafted=call is None)
        if self.policy.learns:
            self.policy.stepped(ran - begun, prompt, steps * sum(chunk.phase == DECODE and chunk.ends for chunk in chunks))
        for chunk in chunks:
            self.scheduler.forget(chunk.running)
        seconds = (ran - begun) / steps
        for _ in range(steps):
            self.times.add(seconds, decoding, prompt)
            self.metrics.step(len(chunks), decoding, prompt, seconds, self.scheduler.preemptions)
        return outputs

    def _schedule(self, now: float) -> list[ScheduledChunk]:
        self.scheduler.limit(self.policy.limits(now))
        running = [r for r in self.scheduler.running if r.decoding]
        max_drafts = self.drafting.max_drafts(running) if self.drafting and running else {}
        decoders = self.scheduler.decoders(max_drafts)
        if max_drafts and self.drafting:
            room = {s.running: max_drafts[s.running] for s in decoders if max_drafts.get(s.running)}
            try:
                drafts = self.drafting.propose(room)
            except (MemoryError, BackendError):  # this step continues without drafts
                _log.exception("drafting failed; this step runs without drafts")
                drafts = {}
            except CheckpointChangedError as error:  # of the draft model; the step itself checks the model's own files
                _log.error("speculative decoding is disabled: %s", error)
                self.drafting, drafts = None, {}
            for chunk in decoders:
                chunk.drafts = drafts.get(chunk.running, [])
        if self.lowering is not None:
            self.lowering.choose(self.scheduler.waiting, self.scheduler.urgent_preemptions, self.clock())
        prompts = self.scheduler.prompts(sum(1 + len(s.drafts) for s in decoders))
        chunks = [s for s in decoders + prompts if s.valid]  # not preempted since
        now = self.clock()
        for chunk in chunks:
            if chunk.running.started is None:
                chunk.running.started = now
        # Stable; each quality's together, of these DECODE first, and the rows of each adapter together.
        chunks.sort(key=lambda s: (quality_of(s), s.phase, s.running.sequence.adapter))
        return chunks

    def _check_stalled(self) -> list[Output]:
        """Handles a step in which no request can run, as others use the cache: after _PATIENCE the first request fails."""
        if self.idle:
            return []
        self.runner.check_weights()  # as no step checks them
        now = self.clock()
        self._idle_since = now if self._idle_since is None else self._idle_since
        if now - self._idle_since < _PATIENCE:
            return []
        self._idle_since = None
        first = min(self._requests.values(), key=lambda r: r.order)
        return [self._short_of_memory(first)]

    def _window_moved(self, r: Running, tokens: int) -> None:
        """Called after a request's window has slid: drops all state that refers to positions in its text."""
        if (chunk := self.scheduler.chunks.get(r)) is not None:
            chunk.start -= tokens
        self._reset_drafting(r)

    def _reset_drafting(self, r: Running) -> None:
        if self.drafting:
            self.drafting.forget(r, ended=False)

    def _end_starved(self) -> list[Output]:
        """Ends the requests that cannot run even alone, since other users of the cache hold the blocks that they need."""
        starved = [r for r in self.scheduler.waiting if r.starved >= _TRIES]
        return [self._short_of_memory(r) for r in starved]

    def _short_of_memory(self, r: Running) -> Output:
        with self.memory.locked() as manager:
            shortage = manager.shortage
        why = "others use the KV cache; raise kv_cache_memory, or" if shortage is None else f"{shortage};"
        output = self._end(r, "error", error=f"{why} try again later")
        output.transient = True
        return output

    def _end_expired(self) -> list[Output]:
        """Ends the requests that were cancelled or are past their deadline."""
        return [self._end(r, finish) for r, finish in ended_early(self._requests.values(), self.clock())]

    def _fail(self, running: list[Running], error: Exception) -> list[Output]:
        """Ends the requests of a step that failed; other requests are not affected."""
        outputs = [self._end(r, "error", error=f"{type(error).__name__}: {error}") for r in running]
        for output in outputs:
            output.transient = isinstance(error, MemoryError)
        return outputs

    def _advance(
        self, chunks: list[ScheduledChunk], tokens: list[int | None], logits: Any, hidden: Any, states: Any, *, drafted: bool
    ) -> list[Output]:
        """Completes a step; `hidden`: last hidden states of its rows, if a request embeds; `states`: their draft states, if a
        proposer wants them."""
        outputs: list[Output] = []
        outcomes: list[tuple[Running, int, int]] = []
        row = begin = 0
        for chunk in chunks:
            r, sequence = chunk.running, chunk.running.sequence
            count, more = chunk.count + len(chunk.drafts), len(chunk.drafts)
            of_prompt = range(row, row + len(prompt_rows(chunk)))
            row = of_prompt.stop
            if r.request.progress and not r.generated:
                r.processed(chunk.start, chunk.count)
                if not chunk.ends:
                    outputs.append(r.output())
            if r.prompt_logprobs is not None and not all(r.prompt_logprobs.add(logits[n]) for n in of_prompt):
                row += 1 + more if chunk.ends else 0
                outputs.append(self._end(r, "error", error=str(NotANumberError())))
            elif r.request.embed:
                self._embed(r, hidden[begin : begin + count], chunk, outputs)
            elif chunk.ends and r.request.scored_tokens:
                outputs.append(self._score(r, chunk, logits[row]))
                row += 1
            elif chunk.ends:
                generated = r.generated
                output = self._append_tokens(r, chunk, tokens, logits, row)
                row += 1 + more
                outputs.append(output)
                if chunk.phase == DECODE and generated:
                    r.rounds, r.drafted = r.rounds + (1 if drafted else len(output.token_ids)), r.drafted + more * drafted
                    accepted = max(0, len(output.token_ids) - 1)
                    outcomes += [(r, more, accepted)] if drafted else [(r, 0, 0)]
                cached = chunk.start + chunk.count - 1 + len(output.token_ids)
                if output.finish is None and sequence.cached > cached:  # rejected drafts, or unused room for drafts
                    self.runner.crop([sequence], [cached])
            if states is not None and self.drafting and r.request.id in self._requests and not r.request.embed:
                self._follow(r, states[begin : begin + sequence.cached - chunk.start])
            begin += count
        if self.drafting and outcomes:
            self.drafting.record(outcomes)
        return outputs

    def _follow(self, r: Running, states: Any) -> None:
        assert self.drafting is not None
        try:
            self.drafting.follow(r, states)
        except (MemoryError, BackendError):  # the request continues without drafts for now
            _log.exception("updating the drafting state failed; request %s continues without drafts", r.request.id)
            self._reset_drafting(r)
        except CheckpointChangedError as error:
            _log.error("speculative decoding is disabled: %s", error)
            self.drafting = None

    def _append_tokens(self, r: Running, chunk: ScheduledChunk, tokens: list[int | None], logits: Any, row: int) -> Output:
        """Appends the tokens of a chunk to the request, up to the end of its text, and returns the output.

        Args:
            tokens: tokens chosen by the backend; None: the token is chosen here from the logits.
            row: index of the chunk's first row.
        """
        output = r.output()
        if not r.generated:
            output.prompt_logprobs = r.prompt_logprobs
        try:
            finish = append_tokens(chunk, tokens, logits, row, output, self.facts.eos, with_text=self.tokenizer is not None)
        except NotANumberError as error:
            return self._end(r, "error", output, error=str(error))
        except Exception as error:  # in its grammar or detokenizer: other requests are not affected
            _log.exception("request %s failed", r.request.id)
            return self._end(r, "error", output, error=f"choosing a token failed: {type(error).__name__}")
        output.completion_tokens = r.generated
        if output.token_ids:
            r.starved = 0
            self._record_tokens(r, len(output.token_ids))
        cached = chunk.start + chunk.count + max(0, len(output.token_ids) - 1)  # without rejected drafts
        self.scheduler.computed(r, cached)
        return self._end(r, finish, output) if finish else output

    def _embed(self, r: Running, states: Any, chunk: ScheduledChunk, outputs: list[Output]) -> None:
        r.pooler = r.pooler or Pooler(r.request.pooling)
        r.pooler.add(states.cpu().numpy())
        if chunk.ends:
            output = r.output()
            vector = r.pooler.vector()
            if not np.isfinite(vector).all():
                outputs.append(self._end(r, "error", output, error="the model's hidden states are not finite"))
                return
            output.embedding = vector
            outputs.append(self._end(r, "stop", output))

    def _score(self, r: Running, chunk: ScheduledChunk, logits: Any) -> Output:
        """Ends a request with the logits of its scored tokens after the prompt."""
        output = r.output()
        output.scores = np.array([logits[token] for token in r.request.scored_tokens], np.float32)
        if not np.isfinite(output.scores).all():
            return self._end(r, "error", output, error="the model's logits are not finite")
        self.scheduler.computed(r, chunk.start + chunk.count)
        return self._end(r, "stop", output)

    def _end(self, r: Running, finish: Finish, output: Output | None = None, error: str | None = None) -> Output:
        output = output or r.output()
        output.finish, output.error = finish, error
        if finish != "error" and self.tokenizer is not None and output.stop_reason not in r.request.sampling.stop:
            output.text += r.text.end()
        del self._requests[r.request.id]
        self.scheduler.remove(r)
        if r.adapter is not None and self.adapters is not None:
            self.adapters.release(r.adapter)
        if self.drafting:
            self.drafting.forget(r, ended=True)
        self.metrics.ended(r, finish, self.clock())
        if output.quality is not None:
            self.metrics.computed_at(output.quality, r.request.quality or EXACT)
        if self.policy.learns:
            self.policy.ended(served(r))
        if self.on_ended is not None:
            self.on_ended(r, finish)
        return output

    def _record_tokens(self, r: Running, tokens: int) -> None:
        now = self.clock()
        self.metrics.tokens(r, tokens, now)
        if r.first is None:
            r.first = now
        r.last = now
