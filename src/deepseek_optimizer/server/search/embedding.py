"""Embeddings of texts, through the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ...engine.pooling import Pooling
from ...engine.request import Output
from ..http.caller import Caller
from ..state import ServerState
from .run import Job, run_all
from .texts import Truncation, embedding_tokens
from .vectors import UNIT, embedding

T = TypeVar("T")
_FEW = 1 << 14  # elements of all vectors of a response that take about a millisecond to process


@dataclass(frozen=True)
class EmbedOptions:
    """
    Attributes:
        prompt: name of the prompt to put before each text; None: none.
        cut: truncation of the texts.
        norm: see `vectors.normalized`.
        dimensions: number of leading elements of the vectors; None: all.
        special: whether the tokenizer adds special tokens.
    """

    prompt: str | None = None
    cut: Truncation = Truncation()
    norm: int = UNIT
    dimensions: int | None = None
    special: bool = True


async def pooled_outputs(state: ServerState, given: Any, options: EmbedOptions, job: Job) -> list[Output]:
    """The engine's outputs for texts, with their pooled hidden states.

    Args:
        state: the server's.
        given: a text or several, or token ids of one or several.
        options: `prompt`, `cut` and `special` matter.
        job: see `Job`.

    Raises:
        ApiError, RequestError: see `embedding_tokens` and `run_all`.
    """
    modes = state.settings.embedding.pooling
    tokens = await embedding_tokens(state, given, options.prompt, options.special, options.cut, job.caller)
    requests = [job.request(one, embed=True, pooling=Pooling(modes, one.skip)) for one in tokens]
    return await run_all(state, requests, job.caller)


async def embed_texts(
    state: ServerState, given: Any, options: EmbedOptions, job: Job
) -> tuple[list[npt.NDArray[np.float32]], int]:
    """The embeddings of texts, and the number of tokens that were processed.

    Args:
        state: the server's.
        given: a text or several, or token ids of one or several.
        options: see `EmbedOptions`.
        job: see `Job`.

    Raises:
        ApiError, RequestError: see `embedding_tokens` and `run_all`.
    """
    outputs = await pooled_outputs(state, given, options, job)
    vectors = await aside(state, job.caller, outputs, lambda: [vector_of(state, output, options) for output in outputs])
    return vectors, sum(output.prompt_tokens for output in outputs)


def vector_of(state: ServerState, output: Output, options: EmbedOptions) -> npt.NDArray[np.float32]:
    """The embedding of an output of `pooled_outputs`."""
    assert output.embedding is not None
    return embedding(output.embedding, state.settings.embedding, options.dimensions, options.norm)


async def aside(state: ServerState, caller: Caller, outputs: list[Output], work: Callable[[], T]) -> T:
    """Runs work on the vectors of a response: at once if they are small, otherwise on a queue's thread.

    Args:
        state: the server's.
        caller: who sent the request.
        outputs: whose vectors it processes.
        work: the function to run.

    Raises:
        ApiError: see `FairQueue.run`.
    """
    elements = sum(output.embedding.size for output in outputs if output.embedding is not None)
    if elements <= _FEW:
        return work()
    return await state.vectors.run(caller.key, work, caller.deadline)
