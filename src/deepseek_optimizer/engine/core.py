"""The engine's heart: one step is schedule, draft, run, choose. Knows no threads and no clock but the one it is given.

No torch: the tokens come from the backend where it can choose them, or else rows of logits as numpy arrays.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backends.base import BLOCK_TOKENS, DECODE
from ..backends.sampling import NOT_FINITE, TokenChoice
from ..cache.block_manager import SequenceBlocks
from ..cache.prefix_cache import PrefixCache
from ..errors import BackendError, CheckpointChangedError, RequestError, shown
from .detokenizer import Detokenizer
from .metrics import EngineMetrics
from .options import EngineOptions
from .request import Finish, Output, Request
from .running import Running
from .sampling.chooser import Chooser, NotANumberError, NoTokenError
from .scheduling.batch_size import BatchSize
from .scheduling.budget import PromptBudget
from .scheduling.memory import Memory
from .scheduling.scheduler import ScheduledChunk, Scheduler
from .scheduling.sliding import Sliding, window_of
from .scheduling.step_times import StepTimes
from .sequence import Part, Sequence
from .speculative.base import Proposer
from .speculative.drafting import Drafting

if TYPE_CHECKING:
    from .runner import Runner

_log = logging.getLogger(__name__)
_TRIES = 3  # of a request to be run alone
_PATIENCE = 10.0  # seconds without a step before a request is given up


@dataclass(frozen=True)
class ModelFacts:
    """What the engine must know of a model.

    Attributes:
        context: positions it has; what prompt and text may take together.
        eos: tokens that end a text.
        chunk: tokens that prompts are always cut into, because the model's arithmetic depends on where; None: anywhere.
        plain: tokens up to which a text has the plain frequencies, where RoPE is dynamic; None: all have them.
    """

    vocab_size: int
    hidden_size: int
    context: int
    eos: frozenset[int]
    chunk: int | None = None
    plain: int | None = None


class EngineCore:
    """
    Args:
        runner: of the model's plan.
        memory: the cache that it runs over.
        tokenizer: writes the text; None: there is none, only tokens.
        proposers: of drafts, and how many each may make in a round, in order of asking.
        keep: what must live as long as the engine: the model.
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
    ) -> None:
        self.runner, self.memory, self.facts, self.options, self.tokenizer = runner, memory, facts, options, tokenizer
        self.clock, self._keep = clock, keep
        self.times = StepTimes()
        with memory.locked() as manager:
            self.blocks, self.forgetting = manager.num_blocks, manager.forgetting
            self.prefix = PrefixCache(manager) if options.prefix_cache else None
        low, high = options.batch_size_range
        self.sliding: Sliding | None = None
        if options.cache_window is not None:
            window = window_of(options.cache_window, facts.plain or facts.context, self.blocks)
            sinks = options.sinks if self.forgetting is None else self.forgetting.sinks  # no others are seen
            self.sliding = Sliding(memory, self.prefix, window, sinks, self._moved)
        self.scheduler = Scheduler(
            memory,
            PromptBudget(options.step_tokens, options.stall, self.times, facts.chunk),
            BatchSize(low, high, self.times, options.target_itl),
            self.prefix,
            self.sliding,
            invariant=options.batch_invariant,
            lost=self._lost,
        )
        self.drafting = Drafting(proposers, self.times) if proposers else None
        self.metrics = EngineMetrics()
        self._requests: dict[str, Running] = {}
        self._count = 0
        self._idle_since: float | None = None

    # ---- what comes in

    @property
    def room(self) -> int:
        """Tokens that prompt and text of a request may take together, but for what is read through a window."""
        most = self.facts.context if self.sliding is None else self.sliding.window
        return most if self.blocks >= self._max_blocks(most) else self.blocks * BLOCK_TOKENS

    def check(self, request: Request) -> int:
        """Tokens of text that it may get.

        Raises:
            RequestError: it can never be served as it is.
        """
        prompt, sampling, facts = request.prompt, request.sampling, self.facts
        if not prompt:
            raise RequestError("prompt", "is empty")
        if min(prompt) < 0 or max(prompt) >= facts.vocab_size:
            raise RequestError("prompt", f"holds token ids outside the vocabulary of {facts.vocab_size}")
        for name, tokens in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
            if any(t >= facts.vocab_size for t in tokens):
                raise RequestError(name, f"names tokens outside the vocabulary of {facts.vocab_size}")
        room, what, fix = facts.context, "the model's context", "shorten it"
        if self.sliding is not None:
            if not request.embed:
                self.sliding.check(self._pinned(request), len(prompt))
                return self.sliding.window if sampling.max_tokens is None else sampling.max_tokens
            room, what = self.sliding.window, "the window"
        if self.room < room:
            room, what = self.room, "the whole cache (kv_cache_memory)"
            if self.forgetting is None:
                fix += ', or load the model with sparse_attention=True or attention_optimization="sliding"'
        asked = 1 if sampling.max_tokens is None or request.embed else sampling.max_tokens
        if len(prompt) + (0 if request.embed else asked) > room:
            more = "" if sampling.max_tokens is None or request.embed else f" and max_tokens={asked}"
            raise RequestError("prompt", f"{len(prompt)} tokens{more} do not fit {what} of {room} tokens; {fix}")
        return room - len(prompt) if sampling.max_tokens is None else asked

    def add(self, request: Request) -> None:
        """It waits from now on. Call `check` first: nothing is checked here but the id.

        Raises:
            RequestError: there is one of this id already.
        """
        if request.id in self._requests:
            raise RequestError("id", f"{shown(request.id)} is running already")
        sampling = request.sampling
        if self.idle:
            self._idle_since = None
        self._count += 1
        most = self.check(request)
        reach = self._reach(request, most)
        with self.memory.locked() as manager:
            sequence = Sequence(self._count, list(request.prompt), SequenceBlocks(manager), reach=reach)
        running = Running(
            number=self._count,
            request=request,
            sequence=sequence,
            chooser=Chooser(request, self.facts.vocab_size, self.facts.eos),
            text=Detokenizer(
                self.tokenizer,
                sampling.stop,
                include_stop=sampling.include_stop,
                skip_special_tokens=sampling.skip_special_tokens,
            ),
            most=most,
            arrived=self.clock(),
            prompt=len(request.prompt),
            pinned=self._pinned(request),
            frequencies=0 if self.facts.plain is None or reach <= self.facts.plain else reach,
        )
        self._requests[request.id] = running
        self.scheduler.add(running)

    def _pinned(self, request: Request) -> tuple[tuple[int, int], ...]:
        """What a window must keep of a request: nothing where attention does not see it."""
        return request.pinned if self.sliding is not None and self.forgetting is None else ()

    def _max_blocks(self, tokens: int) -> int:
        """Blocks that a sequence of so many tokens takes at most at once."""
        blocks = -(-tokens // BLOCK_TOKENS)
        return blocks if self.forgetting is None else min(blocks, self.forgetting.blocks(self.options.step_tokens))

    def _reach(self, request: Request, most: int) -> int:
        """Tokens that it may have in the cache at once."""
        tokens = len(request.prompt) + (0 if request.embed else most)
        return min(tokens, self.facts.context if self.sliding is None else self.sliding.window)

    def cancel(self, request_id: str) -> None:
        """It ends with the next step, if it has not ended yet."""
        if (running := self._requests.get(request_id)) is not None:
            running.cancelled = True

    @property
    def idle(self) -> bool:
        return not self._requests

    @property
    def nobody_ran(self) -> bool:
        """Whether the last step found nobody who could go on."""
        return self._idle_since is not None

    def cache_usage(self) -> float:
        """Share of the cache's blocks that sequences use; those that only the prefix cache keeps are as good as free."""
        with self.memory.locked() as manager:
            used = manager.num_blocks - manager.free_blocks - (self.prefix.unused if self.prefix else 0)
        return used / max(1, self.blocks)

    @property
    def requests(self) -> int:
        """That are in it."""
        return len(self._requests)

    # ---- a step

    def step(self) -> list[Output]:
        """One step of all that take part in it, and what it brought.

        Raises:
            CheckpointChangedError: a file that the model's weights are mapped from was changed. Nothing of the step is kept.
        """
        outputs = self._expired()
        begun = self.clock()
        try:
            shares = self._schedule()
        except (MemoryError, BackendError) as error:  # in the midst: nobody knows what was taken for whom
            return outputs + self._failed(list(self.scheduler.running), error)
        outputs += self._starved()
        if not shares:
            return outputs or self._stuck()
        self._idle_since = None
        parts = [_part(share) for share in shares]
        ends = list(accumulate(len(p.ids) for p in parts))
        rows = [row for share, end in zip(shares, ends, strict=True) for row in _rows(share, end)]
        states = any(s.running.request.embed for s in shares) or bool(self.drafting and self.drafting.wants_states)
        try:
            made = self.runner.step(parts, rows, last_hidden=states)
            ran = self.clock()
            tokens, logits = self.runner.choose_tokens(made.logits, self._choices(shares))
        except (MemoryError, BackendError) as error:
            return outputs + self._failed([share.running for share in shares], error)
        outputs += self._advance(shares, tokens, logits, made.last_hidden if states else None)
        for share in shares:
            self.scheduler.forget(share.running)
        self._measure(shares, ran - begun, self.clock())
        return outputs

    def _schedule(self) -> list[ScheduledChunk]:
        running = [r for r in self.scheduler.running if r.decoding]
        wanted = self.drafting.wanted(running) if self.drafting and running else {}
        decoders = self.scheduler.decoders(wanted)
        if wanted and self.drafting:
            room = {s.running: wanted[s.running] for s in decoders if wanted.get(s.running)}
            try:
                drafts = self.drafting.propose(room)
            except (MemoryError, BackendError):  # the text does without
                _log.exception("drafts could not be made")
                drafts = {}
            except CheckpointChangedError as error:  # the draft model's; the model's own is found out in the step
                _log.error("no more drafts are made: %s", error)
                self.drafting, drafts = None, {}
            for share in decoders:
                share.drafts = drafts.get(share.running, [])
        prompts = self.scheduler.prompts(sum(1 + len(s.drafts) for s in decoders))
        shares = [s for s in decoders + prompts if s.holds]  # and has not lost its blocks since
        now = self.clock()
        for share in shares:
            if share.running.started is None:
                share.running.started = now
        shares.sort(key=lambda s: s.phase)  # stable; DECODE first
        return shares

    def _stuck(self) -> list[Output]:
        """Nobody can go on: others use the cache. Whoever waits for long is told so."""
        if self.idle:
            return []
        self.runner.check_weights()  # no step would meet it
        now = self.clock()
        self._idle_since = now if self._idle_since is None else self._idle_since
        if now - self._idle_since < _PATIENCE:
            return []
        self._idle_since = None
        first = min(self._requests.values(), key=lambda r: r.order)
        return [self._short_of_memory(first)]

    def _moved(self, r: Running, tokens: int) -> None:
        """A window has slid: whoever remembers places in its text is wrong now."""
        if (share := self.scheduler.shares.get(r)) is not None:
            share.start -= tokens
        self._lost(r)

    def _lost(self, r: Running) -> None:
        if self.drafting:
            self.drafting.forget(r, ended=False)

    def _starved(self) -> list[Output]:
        """Those that cannot be run although nobody else of ours is: blocks that they lack belong to others for good."""
        found = [r for r in self.scheduler.waiting if r.starved >= _TRIES]
        return [self._short_of_memory(r) for r in found]

    def _short_of_memory(self, r: Running) -> Output:
        with self.memory.locked() as manager:
            shortage = manager.shortage
        why = "the cache is used by others; raise kv_cache_memory, or" if shortage is None else f"{shortage};"
        output = self._end(r, "error", error=f"{why} try again later")
        output.transient = True
        return output

    def _expired(self) -> list[Output]:
        """Those that were cancelled, or whose time is up."""
        now = self.clock()
        ended: list[tuple[Running, Finish]] = []
        for r in self._requests.values():
            if r.cancelled:
                ended.append((r, "cancelled"))
            elif r.request.deadline is not None and now >= r.request.deadline:
                ended.append((r, "deadline"))
        return [self._end(r, finish) for r, finish in ended]

    def _failed(self, running: list[Running], error: Exception) -> list[Output]:
        """A step that could not be run: its requests end, the others go on."""
        outputs = [self._end(r, "error", error=f"{type(error).__name__}: {error}") for r in running]
        for output in outputs:
            output.transient = isinstance(error, MemoryError)
        return outputs

    def _choices(self, shares: list[ScheduledChunk]) -> list[TokenChoice | None]:
        """How the backend is to choose the token of each row of logits; None: it is chosen here."""
        choices: list[TokenChoice | None] = []
        for share in shares:
            if not share.ends or share.running.request.embed:
                continue
            if share.drafts and self.runner.on_host:  # rows behind a rejected draft are not needed: one after the other
                choices += [None] * (1 + len(share.drafts))
                continue
            chooser, place = share.running.chooser, share.running.generated
            choices += [chooser.choice(place + j) for j in range(1 + len(share.drafts))]
        return choices

    def _advance(self, shares: list[ScheduledChunk], tokens: list[int | None], logits: Any, states: Any) -> list[Output]:
        outputs: list[Output] = []
        outcomes: list[tuple[Running, int, int]] = []
        row = begin = 0
        for share in shares:
            r, sequence = share.running, share.running.sequence
            count, drafted = share.count + len(share.drafts), len(share.drafts)
            if r.request.embed:
                self._embed(r, states[begin : begin + count], share, outputs)
            elif share.ends:
                generated = r.generated
                output = self._take(r, share, tokens, logits, row)
                row += 1 + drafted
                outputs.append(output)
                if share.phase == DECODE and generated:
                    outcomes.append((r, drafted, max(0, len(output.token_ids) - 1)))
                kept = share.start + share.count - 1 + len(output.token_ids)
                if output.finish is None and sequence.cached > kept:  # drafts that fell, or room for some that nobody made
                    self.runner.crop([sequence], [kept])
            if states is not None and self.drafting and r.request.id in self._requests and not r.request.embed:
                self._follow(r, states[begin : begin + sequence.cached - share.start])
            begin += count
        if self.drafting and outcomes:
            self.drafting.record(outcomes)
        return outputs

    def _follow(self, r: Running, states: Any) -> None:
        assert self.drafting is not None
        try:
            self.drafting.follow(r, states)
        except (MemoryError, BackendError):  # the text does without its drafts
            _log.exception("drafts could not follow")
            self._lost(r)
        except CheckpointChangedError as error:
            _log.error("no more drafts are made: %s", error)
            self.drafting = None

    def _take(self, r: Running, share: ScheduledChunk, tokens: list[int | None], logits: Any, row: int) -> Output:
        """The tokens that a share brings, up to where the text ends: the backend's choice, or one made here from the logits.
        `row`: the share's first."""
        output = r.output()
        kept = r.chooser.sampling.logprobs is not None
        if kept:
            output.logprobs = []
        finish: Finish | None = None
        try:
            for j in range(1 + len(share.drafts)):
                token = tokens[row + j]
                if token is None:
                    token = r.chooser.choose(logits[row + j], r.generated)
                elif token == NOT_FINITE:
                    raise NotANumberError
                if kept and output.logprobs is not None:
                    output.logprobs.append(r.chooser.logprob(logits[row + j], token))
                output.token_ids.append(token)
                r.sequence.tokens.append(token)
                r.generated += 1
                finish = self._write(r, token, output)
                if finish or j == len(share.drafts) or share.drafts[j] != token:
                    break
        except NotANumberError as error:
            return self._end(r, "error", output, error=str(error))
        except NoTokenError:
            finish, output.stop_reason = "stop", "no token may come"
        except Exception as error:  # of its grammar or its text: no other request has a part in it
            _log.exception("request %s has failed", r.request.id)
            return self._end(r, "error", output, error=f"choosing a token failed: {type(error).__name__}")
        output.completion_tokens = r.generated
        if output.token_ids:
            r.starved = 0
            self._clock_tokens(r, len(output.token_ids))
        cached = share.start + share.count + len(output.token_ids) - 1  # what was drafted behind it is nobody's text
        self.scheduler.computed(r, cached)
        return self._end(r, finish, output) if finish else output

    def _write(self, r: Running, token: int, output: Output) -> Finish | None:
        """Adds a token's text; why the request ends at it, if it does."""
        sampling = r.chooser.sampling
        stops = r.generated > sampling.min_tokens
        if stops and token in self.facts.eos and not sampling.ignore_eos:
            return "stop"
        if stops and token in sampling.stop_token_ids:
            output.stop_reason = token
            return "stop"
        if self.tokenizer is not None:
            piece, stop = r.text.add(token, stops=stops)
            output.text += piece
            if stop is not None:
                output.stop_reason = stop
                return "stop"
        if r.chooser.grammar is not None and r.chooser.grammar.finished:
            return "stop"
        return "length" if r.generated >= r.most else None

    def _embed(self, r: Running, states: Any, share: ScheduledChunk, outputs: list[Output]) -> None:
        """Adds up rows in order, so that the sum is the same however the prompt is cut."""
        rows = states.cpu().numpy().astype(np.float64)
        if r.states is not None:
            rows = np.concatenate([r.states[None], rows])
        r.states = np.add.reduce(rows, axis=0)
        if share.ends:
            output = r.output()
            mean = (r.states / len(r.request.prompt)).astype(np.float32)
            if not np.isfinite(mean).all():
                outputs.append(self._end(r, "error", output, error="the model's hidden states are not finite"))
                return
            output.embedding = mean
            outputs.append(self._end(r, "stop", output))

    def _end(self, r: Running, finish: Finish, output: Output | None = None, error: str | None = None) -> Output:
        output = output or r.output()
        output.finish, output.error = finish, error
        if finish != "error" and self.tokenizer is not None and output.stop_reason not in r.request.sampling.stop:
            output.text += r.text.end()
        del self._requests[r.request.id]
        self.scheduler.remove(r)
        if self.drafting:
            self.drafting.forget(r, ended=True)
        self.metrics.ended(r, finish, self.clock())
        return output

    # ---- what is measured

    def _clock_tokens(self, r: Running, tokens: int) -> None:
        now = self.clock()
        self.metrics.tokens(r, tokens, now)
        if r.first is None:
            r.first = now
        r.last = now

    def _measure(self, shares: list[ScheduledChunk], seconds: float, now: float) -> None:
        decoding = sum(1 + len(s.drafts) for s in shares if s.ends and s.phase == DECODE and s.count == 1)
        prompt = sum(s.count for s in shares) - sum(1 for s in shares if s.ends and s.phase == DECODE and s.count == 1)
        self.times.add(seconds, decoding, prompt)
        self.metrics.step(len(shares), decoding, prompt, seconds, self.scheduler.preemptions)


def _part(share: ScheduledChunk) -> Part:
    tokens = share.running.sequence.tokens[share.start : share.start + share.count]
    return Part(share.running.sequence, [*tokens, *share.drafts], share.start, phase=share.phase)


def _rows(share: ScheduledChunk, end: int) -> range:
    """The step's rows whose logits a share needs; `end`: one past its own."""
    if not share.ends or share.running.request.embed:
        return range(end, end)
    return range(end - 1 - len(share.drafts), end)
