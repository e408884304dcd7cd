"""The rows of a step: the tokens that a chunk adds to it, the rows whose logits it needs, and how their tokens are chosen."""

from __future__ import annotations

from ..backends.base import DECODE
from ..backends.qualities import Quality, prompt_quality
from ..backends.sampling import ChangedChoice, TokenChoice
from ..cache.block_manager import BLOCK_TOKENS
from .running import Running
from .scheduling.policy import Served
from .scheduling.scheduler import ScheduledChunk
from .sequence import Part


def part_of(chunk: ScheduledChunk) -> Part:
    """Returns a chunk's part of the step: its tokens, followed by its drafts."""
    tokens = chunk.running.sequence.tokens[chunk.start : chunk.start + chunk.count]
    return Part(chunk.running.sequence, [*tokens, *chunk.drafts], chunk.start, phase=chunk.phase, quality=quality_of(chunk))


def quality_of(chunk: ScheduledChunk) -> Quality:
    """Returns the quality of a chunk's tokens, which are of the prompt or of the text."""
    quality = chunk.running.sequence.quality
    return prompt_quality(quality) if chunk.start < chunk.running.prompt else quality


def prompt_rows(chunk: ScheduledChunk) -> range:
    """Returns the rows of the chunk, counted from its first, that log probabilities of prompt tokens are still to be computed
    from. Each row gives that of the token after it."""
    r = chunk.running
    if r.prompt_logprobs is None:
        return range(0)
    start = chunk.start + r.dropped
    return range(max(0, r.prompt_logprobs.done - start), min(chunk.count, len(r.prompt_logprobs) - start))


def logit_rows(chunk: ScheduledChunk, end: int) -> list[int]:
    """Returns the rows of the step whose logits a chunk needs: those of `prompt_rows`, then those that tokens are chosen from.

    Args:
        chunk: the chunk.
        end: one past the chunk's last row.
    """
    begin = end - chunk.count - len(chunk.drafts)
    rows = [begin + row for row in prompt_rows(chunk)]
    if chunk.ends and not chunk.running.request.embed:
        rows += range(end - 1 - len(chunk.drafts), end)
    return rows


def token_counts(chunks: list[ScheduledChunk]) -> tuple[int, int]:
    """Number of tokens of a step that are decoded, drafts included, and of all others, those of prompts."""
    decoders = [chunk for chunk in chunks if chunk.ends and chunk.phase == DECODE and chunk.count == 1]
    return sum(1 + len(chunk.drafts) for chunk in decoders), sum(chunk.count for chunk in chunks) - len(decoders)


def served(r: Running) -> Served:
    """Returns what a request that has ended took."""
    prompt = 0 if r.started is None else max(1, r.prompt - r.cached)
    cached, last = r.cached // BLOCK_TOKENS, r.prompt // BLOCK_TOKENS
    prefix = r.keys[cached - 1] if 0 < cached <= len(r.keys) else None
    return Served(r.number, prompt, r.rounds, 1 + r.drafted / r.rounds if r.rounds else 1.0, prefix, r.keys[cached:last])


def token_choices(chunks: list[ScheduledChunk], on_host: bool) -> list[TokenChoice | ChangedChoice | None]:
    """Returns how the backend is to choose the token of each row of logits; None: the engine chooses it.

    Args:
        chunks: the chunks of the step, in order.
        on_host: whether the logits are in the host's memory.
    """
    choices: list[TokenChoice | ChangedChoice | None] = []
    for chunk in chunks:
        choices += [None] * len(prompt_rows(chunk))
        if not chunk.ends or chunk.running.request.embed:
            continue
        if chunk.drafts and on_host:  # chosen one by one: rows after a rejected draft are not needed
            choices += [None] * (1 + len(chunk.drafts))
            continue
        if chunk.running.request.scored_tokens:
            choices.append(None)
            continue
        sampler, place = chunk.running.sampler, chunk.running.generated
        if on_host or chunk.drafts:  # changes of the logits depend on the tokens before, and so on which drafts are accepted
            choices += [sampler.choice(place + j) for j in range(1 + len(chunk.drafts))]
        else:
            choices.append(sampler.device_choice(place))
    return choices
