"""Scores of pairs of texts: by a cross-encoder, by a language model that answers yes or no, or by the cosine of embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...engine.request import SamplingParams
from ..http.problems import ApiError
from ..state import ServerState
from .embedding import EmbedOptions, embed_texts
from .relevance_prompt import answer_tokens, judge_tokens
from .run import Job, run_all
from .texts import Tokens, Truncation, pair_tokens, prompt_name, shortened
from .vectors import cosine, sigmoid

_ONE_TOKEN = SamplingParams(max_tokens=1)


@dataclass(frozen=True)
class ScoreOptions:
    """
    Attributes:
        cut: truncation of the texts.
        max_document_tokens: maximum number of tokens of a document, before `cut`; None: no maximum.
        activation: whether scores are probabilities, and not logits.
        instruction: the task, for a language model.
        field: of the request that has the documents, for errors.
    """

    cut: Truncation
    max_document_tokens: int | None = None
    activation: bool = True
    instruction: str | None = None
    field: str = "documents"


async def scores_of(
    state: ServerState, queries: Sequence[str], documents: Sequence[str], options: ScoreOptions, job: Job
) -> tuple[list[float], int]:
    """The score of each pair, and the number of tokens that were processed.

    Args:
        state: the server's.
        queries: one text, or as many as documents.
        documents: the texts to score.
        options: see `ScoreOptions`.
        job: see `Job`.

    Raises:
        ApiError: 400, the model has no score for pairs; others see `run_all`.
        RequestError: a text does not fit the context.
    """
    if options.max_document_tokens:
        documents = await shortened(state, documents, options.max_document_tokens, job.caller)
    classifier = state.engine.classifier
    if classifier is None and state.reranker == "cosine":
        return await _cosines(state, queries, documents, options, job)
    pairs = list(zip(queries if len(queries) > 1 else list(queries) * len(documents), documents, strict=True))
    if classifier is None:
        return await _judged(state, pairs, options, job)
    if len(classifier.labels) != 1:
        raise ApiError(
            400,
            f"this model has {len(classifier.labels)} classes, and no score for pairs of texts; use /classify",
            param="model",
        )
    tokens = await pair_tokens(state, pairs, options.cut, job.caller, options.field)
    outputs = await run_all(state, [job.request(one, classify=True) for one in tokens], job.caller)
    activation = state.settings.embedding.score_activation or classifier.score_activation
    probability = options.activation and activation == "sigmoid"
    values = [float(output.scores[0]) for output in outputs if output.scores is not None]
    return [float(sigmoid(value)) if probability else value for value in values], sum(o.prompt_tokens for o in outputs)


async def _judged(state: ServerState, pairs: list[tuple[str, str]], options: ScoreOptions, job: Job) -> tuple[list[float], int]:
    def prompts(tokenizer: object) -> tuple[list[Tokens], tuple[int, int]]:
        room = state.engine.room - 1
        return (
            judge_tokens(tokenizer, pairs, options.instruction, room, options.cut),
            answer_tokens(tokenizer, state.settings.embedding.score_tokens),
        )

    tokens, answers = await state.tokenizing(lambda lane: prompts(lane.tokenizer), job.caller)
    requests = [job.request(one, scored_tokens=answers, sampling=_ONE_TOKEN) for one in tokens]
    outputs = await run_all(state, requests, job.caller)
    odds = [float(output.scores[0] - output.scores[1]) for output in outputs if output.scores is not None]
    scores = [float(sigmoid(value)) for value in odds] if options.activation else odds
    return scores, sum(output.prompt_tokens for output in outputs)


async def _cosines(
    state: ServerState, queries: Sequence[str], documents: Sequence[str], options: ScoreOptions, job: Job
) -> tuple[list[float], int]:
    prompts = [prompt_name(state.settings.embedding, kind, None) for kind in ("query", "document")]
    from_queries, read = await embed_texts(state, list(queries), EmbedOptions(prompts[0], options.cut), job)
    from_documents, more = await embed_texts(state, list(documents), EmbedOptions(prompts[1], options.cut), job)
    if len(from_queries) == 1:
        from_queries = from_queries * len(from_documents)
    scores = [cosine(one, other) for one, other in zip(from_queries, from_documents, strict=True)]
    return scores, read + more
