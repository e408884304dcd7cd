"""Generation with speculative decoding: `use_mtp=True`, `prompt_lookup_num_tokens=N`, an optimized `assistant_model`, or the
caller's `proposer`.

The loop of `generate.py` in rounds of several tokens: each row of a batch advances by the tokens it accepts, and ends on its
own. The request's logits processors, stopping criteria and streamer get every token once, in order and with the same prefix as
in plain decoding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.generation import logits_process, stopping_criteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ...backends.decoding import DecodeCall, Decoded, DraftedCall
from ...engine.draft import Draft
from ...engine.runner import Runner
from ...engine.sampling.torch_sampler import TorchSampler
from ...engine.scheduling.memory import Memory
from ...engine.sequence import Part, Sequence
from ...engine.speculative.base import Proposer
from ...engine.speculative.draft_and_verify import SpeculativeDecoder
from ...engine.speculative.draft_length import DraftLengthController
from ...engine.speculative.draft_model import DraftModelProposer
from ...engine.speculative.drafted_rounds import DraftedRoundCalls
from ...engine.speculative.mtp import MtpProposer
from ...engine.speculative.prompt_lookup import PromptLookupProposer
from ...errors import DeepSeekOptimizerError, UnsupportedRequestError
from ...graph.analysis import dynamic_rope
from ...models import mtp_layers
from ..bind.runtime import Runtime, runtime_of
from ..compat import cache_name
from .cache import PagedCache
from .loop import ContextLimit, RowStops, next_positions, prefill
from .token_choice import TokenChoices

# Processors that treat each row separately and have no state between calls.
_BY_ROW = tuple(
    getattr(logits_process, name)
    for name in (
        "MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor", "TemperatureLogitsWarper", "TopPLogitsWarper",
        "RepetitionPenaltyLogitsProcessor", "TopKLogitsWarper", "TopHLogitsWarper", "MinPLogitsWarper", "EtaLogitsWarper",
        "TypicalLogitsWarper", "EpsilonLogitsWarper", "NoRepeatNGramLogitsProcessor", "SequenceBiasLogitsProcessor",
        "NoBadWordsLogitsProcessor", "ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor",
        "InfNanRemoveLogitsProcessor", "ExponentialDecayLengthPenalty", "LogitNormalization",
        "SuppressTokensAtBeginLogitsProcessor", "SuppressTokensLogitsProcessor",
    )
)  # fmt: skip
DEFAULT_DRAFTS = 3  # per round, if the request sets no number
_CRITERIA_BY_ROW = (stopping_criteria.MaxTimeCriteria, stopping_criteria.StopStringCriteria, ContextLimit)


@dataclass(frozen=True)
class Drafts:
    """The speculative decoding that a request asks for.

    Attributes:
        maximum: maximum number of drafts per round.
        proposer: creates the proposer, given a sampler for its drafts.
        fixed: always use the maximum, whether or not it saves time.
        least: a draft whose probability is below this is the last of its round, where rounds are run in calls of several.
    """

    maximum: int
    proposer: Callable[[TorchSampler], Proposer]
    fixed: bool = False
    least: float = 0.0


def requested_drafts(
    runtime: Runtime,
    config: Any,
    given: int | None,
    schedule: str | None,
    proposer: Proposer | None,
    confidence: float | None = None,
    assistant: Runtime | None = None,
) -> Drafts | None:
    """The speculative decoding that a request asks for; None: none.

    Args:
        runtime: the model's runtime.
        config: the complete generation config.
        given, schedule: the caller's `num_assistant_tokens` and `num_assistant_tokens_schedule`, or None; the schedule
            "constant" always drafts that number.
        proposer: the caller's proposer, or None.
        confidence: the caller's `assistant_confidence_threshold`, or None.
        assistant: runs the caller's assistant model; None: there is none.

    Raises:
        UnsupportedRequestError: use_mtp=True, but there are no MTP layers.
    """
    fixed = schedule == "constant"
    if proposer is not None:
        return Drafts(given or DEFAULT_DRAFTS, lambda _: proposer, fixed)
    if assistant is not None:  # overrides the others, as in Transformers
        return Drafts(given or DEFAULT_DRAFTS, lambda _: draft_model_proposer(assistant, assistant.arena), fixed)
    if config.prompt_lookup_num_tokens is not None:  # overrides use_mtp, as in Transformers
        longest = config.max_matching_ngram_size or 3
        return Drafts(config.prompt_lookup_num_tokens, lambda _: PromptLookupProposer(longest), fixed)
    if not config.use_mtp:
        return None
    plans = runtime.mtp_plans
    if not plans:
        raise UnsupportedRequestError(f"use_mtp=True, but {_why_no_mtp(runtime)}")
    maximum = given or max(DEFAULT_DRAFTS, len(plans))
    return Drafts(maximum, lambda drafter: mtp_proposer(runtime, runtime.arena, drafter), fixed, confidence or 0.0)


def assistant_runtime(runtime: Runtime, assistant: Any) -> Runtime | None:
    """What runs an assistant model if its plan can draft for a model; None: Transformers' own loop has to."""
    try:
        other = runtime_of(assistant)
    except DeepSeekOptimizerError:
        return None
    same = other.graph.vocab_size == runtime.graph.vocab_size
    return other if same and other.graph.has_head and other.unserved() is None else None


def draft_model_proposer(other: Runtime, memory: Memory) -> DraftModelProposer:
    """A proposer with another model.

    Args:
        other: the other model's runtime.
        memory: cache memory of its sequences.
    """
    runner = Runner(other.current_plan, memory, other.graph.vocab_size, decodes=other.backend.capabilities.decode_calls)
    return DraftModelProposer(runner, other.graph.max_positions, other.config.prefill_chunk)


def mtp_proposer(runtime: Runtime, memory: Memory, drafter: TorchSampler) -> MtpProposer:
    """A proposer with the model's MTP layers.

    Args:
        runtime: the model's runtime.
        memory: cache memory of the sequences.
        drafter: samples the drafts.
    """
    vocabularies, vocab_size = runtime.draft_vocabularies, runtime.graph.vocab_size
    decodes = runtime.backend.capabilities.decode_calls
    layers = [
        Runner(plan, memory, vocab_size if vocabulary is None else len(vocabulary.tokens), decodes=decodes)
        for plan, vocabulary in zip(runtime.mtp_plans, vocabularies, strict=True)
    ]
    return MtpProposer(layers, drafter.draft, drafter.greedy, vocabularies)


def _why_no_mtp(runtime: Runtime) -> str:
    if not mtp_layers(runtime.model.config):
        return "this model has no MTP layers; leave it out, or use prompt_lookup_num_tokens=3"
    if runtime.config.mtp == "off":
        return 'the MTP layers were not loaded because of DeepSeekConfig(mtp="off"); load the model with mtp="auto"'
    return (
        "the checkpoint contains no MTP layers (model.layers.N.* after the last), or the model was converted in memory after "
        "Transformers dropped them; load a checkpoint that has them with load_model or quantization_config=DeepSeekConfig(...)"
    )


def why_not(
    input_ids: torch.Tensor, processors: Any, stop: RowStops, config: Any, owned: bool, kwargs: dict[str, Any]
) -> str | None:
    """Why a request cannot use speculative decoding; None if it can."""
    if kwargs.get("inputs_embeds") is not None:
        return "the prompt consists of embeddings"
    if input_ids.shape[0] == 1:
        return None
    if not owned or config.return_dict_in_generate:
        return "a cache or scores of several rows were requested, whose lengths would differ"
    for used, supported in ((processors, _BY_ROW), (stop.others, _CRITERIA_BY_ROW)):
        other = next((type(f).__name__ for f in used if type(f) not in supported), None)
        if other is not None:
            return f"{other} may need all rows of the batch at once"
    return None


def _of_row(processor: Any, row: int) -> Any:
    """A processor of `_BY_ROW` for one row: since 5.24 the repetition penalty stores the prompt length of each row."""
    lengths = getattr(processor, "prompt_ignore_length", None)
    if not isinstance(lengths, torch.Tensor) or lengths.ndim == 0:
        return processor
    twin = copy.copy(processor)
    twin.prompt_ignore_length = lengths[row : row + 1]
    return twin


class _Text:
    """The ids of every row, prompt and padding included, for the request's processors and criteria.

    Attributes:
        ids: int64 [B, capacity].
        prompt: columns of the prompt.
        lengths: columns of each row.
    """

    def __init__(self, input_ids: torch.Tensor) -> None:
        self.ids, self.prompt = input_ids, input_ids.shape[1]
        self.lengths = [self.prompt] * input_ids.shape[0]

    def append(self, row: int, token: int) -> None:
        self._reserve(self.lengths[row] + 1)
        self.ids[row, self.lengths[row]] = token
        self.lengths[row] += 1

    def prefix(self, row: int, drafted: list[int]) -> torch.Tensor:
        """The row followed by drafts that are not accepted yet, int64 [1, n]."""
        length = self.lengths[row]
        self._reserve(length + len(drafted))
        if drafted:
            self.ids[row, length : length + len(drafted)] = torch.tensor(drafted, device=self.ids.device, dtype=torch.int64)
        return self.ids[row : row + 1, : length + len(drafted)]

    def of_row(self, row: int) -> torch.Tensor:
        """A row, int64 [n]."""
        return self.ids[row, : self.lengths[row]]

    def _reserve(self, columns: int) -> None:
        if columns > self.ids.shape[1]:
            self.ids = torch.nn.functional.pad(self.ids, (0, max(columns, 64 + 2 * self.ids.shape[1]) - self.ids.shape[1]))

    def padded(self, pad: int) -> torch.Tensor:
        """All rows, int64 [B, maximum length]; shorter rows are filled with `pad`."""
        result = self.ids[:, : max(self.lengths)].clone()
        for row, length in enumerate(self.lengths):
            result[row, length:] = pad
        return result


class _Stream:
    """Passes tokens to a streamer column by column, as soon as every row has a token there."""

    def __init__(self, streamer: Any, text: _Text, pad: int) -> None:
        self._streamer, self._text, self._pad, self._column = streamer, text, pad, text.prompt

    def put(self, alive: list[bool]) -> None:
        if self._streamer is None:
            return
        lengths = self._text.lengths
        running = [n for n, a in zip(lengths, alive, strict=True) if a]
        for column in range(self._column, min(running, default=max(lengths))):
            values = [int(self._text.ids[row, column]) if column < n else self._pad for row, n in enumerate(lengths)]
            self._streamer.put(torch.tensor(values, dtype=torch.int64, device="cpu"))
            self._column = column + 1

    def end(self) -> None:
        if self._streamer is not None:
            self._streamer.end()


class _Request:
    """One call of `generate`: the rows, their state, and the outputs that the caller requested."""

    def __init__(self, runtime: Runtime, input_ids: torch.Tensor, processors: Any, stop: RowStops, config: Any) -> None:
        self.runtime, self.config, self.stop = runtime, config, stop
        rows = range(input_ids.shape[0])
        self.processors = (
            [type(processors)(_of_row(p, row) for p in processors) for row in rows] if len(rows) > 1 else [processors]
        )
        self.text = _Text(input_ids)
        as_dict = bool(config.return_dict_in_generate)
        self.scores: list[torch.Tensor] | None = [] if as_dict and config.output_scores else None
        self.logits: list[torch.Tensor] | None = [] if as_dict and config.output_logits else None
        self.alive = [True] * input_ids.shape[0]

    def process(self, index: int, drafted: list[int], logits: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.processors[index](self.text.prefix(index, drafted), logits.to(self.text.ids.device))
        return scores

    @property
    def keeps_logits(self) -> bool:
        return self.scores is not None or self.logits is not None

    def _ends(self, row: int) -> bool:
        """Whether one of the caller's criteria ends the row."""
        if not self.stop.others:
            return False
        scores = None if self.scores is None else tuple(self.scores)
        return bool(self.stop.others(self.text.prefix(row, []), scores)[0])

    def take(self, row: int, tokens: list[int], used: list[Any], stream: _Stream) -> int:
        """Appends tokens to a row until it ends.

        Returns: the number of tokens appended.
        """
        for count, token in enumerate(tokens):
            if used:
                raw, processed = used[count]
                for output, value in ((self.logits, raw), (self.scores, processed)):
                    if output is not None:
                        output.append(value)
            self.text.append(row, token)
            ended = self._ends(row)
            if ended or self.stop.ends(self.text.lengths[row], token):
                self.alive[row] = False
            stream.put(self.alive)
            if not self.alive[row]:
                return count + 1
        return len(tokens)


class _PlainRounds:
    """Rounds without drafts, several in one call of the backend.

    Args:
        runner: runs the model's plan.
        choices: how the backend chooses the request's tokens.
        text: the text of a row so far, int64 [n].
        states: whether the proposer needs draft states.

    Attributes: those of `token_choice.Steps`.
    """

    def __init__(
        self, runner: Runner, choices: TokenChoices, text: Callable[[int], torch.Tensor], vocab_size: int, states: bool
    ) -> None:
        self._runner, self._choices, self._text, self._states = runner, choices, text, states
        self.vocab_size = vocab_size
        self.rows: list[int] = []
        self._sequences: list[Sequence] = []

    def __call__(self, sequences: list[Sequence], most: int) -> Decoded:
        """Runs up to `most` rounds; see `SpeculativeDecoder`."""
        self._sequences, self.rows = sequences, [s.index for s in sequences]
        count = min(most, 1 + min(s.blocks.room for s in sequences))
        return self._choices.decode(self, self._text, [s.tokens[-1] for s in sequences], count)

    def decode(self, tokens: list[int], call: DecodeCall) -> Decoded:
        parts = [Part(s, [token], s.cached - 1) for s, token in zip(self._sequences, tokens, strict=True)]
        return self._runner.decode(parts, call, draft_states=self._states)


def speculative_sample(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    runtime: Runtime,
    drafts: Drafts,
    plain: Callable[..., Any],
    streamer: Any,
    owned: bool,
    **model_kwargs: Any,
) -> Any:
    """The generation loop with speculative decoding. `plain` is the loop without, for requests that this one cannot serve."""
    stop, config = RowStops(stopping_criteria), generation_config
    if reason := why_not(input_ids, logits_processor, stop, config, owned, model_kwargs):
        runtime.warn_once(f"a request ran without drafts: {reason}")
        return plain(
            model, input_ids, logits_processor, stopping_criteria, config, runtime=runtime, streamer=streamer, owned=owned,
            **model_kwargs,
        )  # fmt: skip
    request = _Request(runtime, input_ids, logits_processor, stop, config)
    pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
    stream = _Stream(streamer, request.text, pad)
    sampler = TorchSampler(sampled=bool(config.do_sample), process=request.process if logits_processor else None)
    stateless = all(type(p) in _BY_ROW for p in logits_processor)  # others may count their calls and are not used for drafts
    drafter = TorchSampler(sampled=sampler.sampled, process=request.process if logits_processor and stateless else None)
    proposer = drafts.proposer(drafter)
    sequences, logits, cache = _begin(model, request, proposer, model_kwargs)
    choices = None
    if runtime.backend.capabilities.decode_calls and input_ids.device.type == "cpu" and not request.keeps_logits:
        choices = TokenChoices.of(config, logits_processor, stop, len(sequences), streamed=streamer is not None)
    if choices is None:
        runner, plain_rounds = Runner(runtime.current_plan, runtime.arena), None
    else:  # nobody keeps logits, so that they may be overwritten
        runner = Runner(runtime.current_plan, runtime.arena, runtime.graph.vocab_size, decodes=True)
        plain_rounds = _PlainRounds(runner, choices, request.text.of_row, runtime.graph.vocab_size, proposer.wants_states)
    controller = DraftLengthController(drafts.maximum, fixed=drafts.fixed)
    drafted = None if choices is None else _drafted_rounds(request, runner, proposer, choices, sampler, drafts.least)
    decoder = SpeculativeDecoder(runner, proposer, sampler, controller, plain_rounds, drafted)
    limit = runtime.graph.max_positions - max(s.first_position + len(s.tokens) for s in sequences) + 1
    if stop.max_length is not None:
        limit = min(limit, stop.max_length - request.text.prompt)
    used: list[Any] = []
    keep = used if request.keeps_logits else None
    try:
        for sequence in sequences:
            tokens = sampler.accept(sequence.index, Draft(), logits[sequence.index][None], keep)
            sequence.tokens += tokens
            request.take(sequence.index, tokens, used, stream)
        _rounds(request, decoder, sequences, limit, stream, used, keep)
        stream.end()
    finally:
        runtime.speculation = decoder.draft_length.report()
        for sequence in sequences:
            proposer.forget(sequence)
        _settle(cache, decoder, sequences, request.text)
    ids = request.text.padded(pad)
    if not config.return_dict_in_generate:
        return ids
    scores, raw = (None if output is None else tuple(output) for output in (request.scores, request.logits))
    fields: dict[str, Any] = {"sequences": ids, "scores": scores, "logits": raw, cache_name(): cache}
    return GenerateDecoderOnlyOutput(**fields)


def _drafted_rounds(
    request: _Request, runner: Runner, proposer: Proposer, choices: TokenChoices, sampler: TorchSampler, least: float
) -> DraftedRoundCalls | None:
    """Runs several rounds with drafts in one call of the backend; None: the request's rounds are run step by step."""
    graph = request.runtime.graph
    possible = request.runtime.backend.capabilities.drafted_calls and not graph.states and dynamic_rope(graph) is None
    if not possible or not choices.greedy or not isinstance(proposer, MtpProposer):
        return None

    def make_call(rounds: int, drafts: int, room: int) -> DraftedCall:
        return replace(choices.drafted_call(rounds, drafts, room), least=least)

    return DraftedRoundCalls(runner, proposer, make_call, sampler.choose)


def _begin(
    model: Any, request: _Request, proposer: Proposer, model_kwargs: dict[str, Any]
) -> tuple[list[Sequence], torch.Tensor, PagedCache]:
    """Processes the prompt.

    Returns: one sequence per row, the logits of their next tokens [B, V], and the cache.
    """
    ids, mask = request.text.ids, model_kwargs.get("attention_mask")
    cache: PagedCache = model_kwargs[cache_name()]
    positions = next_positions(model_kwargs, ids.shape[1], ids.shape[0])
    copies = 1 if cache.get_seq_length() else request.config.num_return_sequences  # prefill computes copies once
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    prompts = [row[mask].tolist() for row, mask in zip(ids, real, strict=True)]
    firsts = [int(p) - len(tokens) for p, tokens in zip(positions, prompts, strict=True)]
    state = cache.state
    of_prompt: dict[int, Sequence] = {}

    def follow(row: int, states: torch.Tensor) -> None:
        index = row * copies
        if row not in of_prompt:
            reach = int(state.reach[row]) or None
            of_prompt[row] = Sequence(index, prompts[index], state.sequences[row], firsts[index], reach)
        proposer.follow(of_prompt[row], states)

    state.follower = follow if proposer.wants_states else None
    try:
        logits, cache = prefill(model, ids, request.config, model_kwargs)
    finally:
        state.follower = None
    sequences = []
    for index, (tokens, first) in enumerate(zip(prompts, firsts, strict=True)):
        sequence = Sequence(index, list(tokens), state.sequences[index], first, int(state.reach[index]) or None)
        origin = of_prompt.get(index // copies)
        if origin is not None and origin.index != index:
            proposer.fork(origin, sequence)
        sequences.append(sequence)
    return sequences, logits, cache


def _rounds(
    request: _Request,
    decoder: SpeculativeDecoder,
    sequences: list[Sequence],
    limit: int,
    stream: _Stream,
    used: list[Any],
    keep: list[Any] | None,
) -> None:
    text, context = request.text, request.runtime.graph.max_positions
    while True:
        active = [s for s in sequences if request.alive[s.index]]
        room = [limit - (text.lengths[s.index] - text.prompt) for s in active]
        if full := [s for s, r in zip(active, room, strict=True) if r <= 0]:  # `stop` has already ended rows at max_length
            request.runtime.warn_once(f"generation stopped at the model's context of {context} tokens")
            for sequence in full:
                request.alive[sequence.index] = False
            stream.put(request.alive)
            continue
        if not active:
            return
        used.clear()
        for sequence, tokens in zip(active, decoder.round(active, room, keep), strict=True):
            request.take(sequence.index, tokens, used, stream)


def _settle(cache: PagedCache, decoder: SpeculativeDecoder, sequences: list[Sequence], text: _Text) -> None:
    """Leaves the cache of a single row as plain decoding does, without the last token. With several rows it is not returned."""
    if len(sequences) != 1:
        return
    sequence, state = sequences[0], cache.state
    before = state.columns if state.kept is None else int(state.kept[0].sum())
    tokens = before + max(text.lengths[0] - text.prompt - 1, 0)
    decoder.runner.crop(sequences, [min(tokens, sequence.cached)])
    state.written(sequence.cached - before)
