"""Rerank and score: how well documents answer a query."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response

from ..chat.intake import admitted_request
from ..chat.replies import json_response
from ..openapi import body_errors, reads
from ..protocol.scores import (
    EXAMPLE_RERANK,
    EXAMPLE_SCORE,
    RankedText,
    RerankRequest,
    RerankResponse,
    ScoreRequest,
    ScoreResponse,
)
from ..search.run import job_of
from ..search.scoring import ScoreOptions, scores_of
from ..search.texts import truncation
from ..state import ServerState
from .embeddings import response


def add(app: FastAPI, state: ServerState) -> None:
    @app.post("/v2/rerank", include_in_schema=False)
    @app.post(
        "/v1/rerank",
        response_model=RerankResponse | list[RankedText],
        responses=body_errors(),
        openapi_extra=reads(RerankRequest, EXAMPLE_RERANK),
        tags=["search"],
    )
    async def rerank(request: Request) -> Response:
        """Sorts documents by their relevance to a query, in the format of Jina and Cohere."""
        async with admitted_request(state, request, RerankRequest, one=True) as (body, _, caller):
            job = job_of(request, "rerank", body.priority, caller)
            documents = body.given()
            field = "documents" if body.texts is None else "texts"
            activation = body.use_activation is not False and not body.raw_scores
            scores, tokens = await scores_of(
                state, [body.query], documents, options(body, activation, body.max_tokens_per_doc, field), job
            )
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n or None]
        if body.texts is not None:
            return json_response([_ranked(index, scores, documents, bool(body.return_text)) for index in order])
        results: list[dict[str, Any]] = [{"index": index, "relevance_score": scores[index]} for index in order]
        if body.return_documents is not False:
            results = [{**result, "document": {"text": documents[result["index"]]}} for result in results]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return json_response({"id": job.name, "model": job.model(state), "usage": usage, "results": results})

    @app.post(
        "/v1/score",
        response_model=ScoreResponse,
        responses=body_errors(),
        openapi_extra=reads(ScoreRequest, EXAMPLE_SCORE),
        tags=["search"],
    )
    async def score(request: Request) -> Response:
        """Scores pairs of texts, as vLLM does: by a cross-encoder, by a language model trained to judge them, or by the cosine
        of their embeddings."""
        async with admitted_request(state, request, ScoreRequest, one=True) as (body, _, caller):
            job = job_of(request, "score", body.priority, caller)
            first, second = body.pairs()
            scores, tokens = await scores_of(
                state, first, second, options(body, body.use_activation is not False, body.max_tokens_per_doc, "text_2"), job
            )
        data = [{"index": index, "object": "score", "score": value} for index, value in enumerate(scores)]
        return json_response(response(state, job, data, tokens))

    def options(body: RerankRequest | ScoreRequest, activation: bool, limit: int | None, field: str) -> ScoreOptions:
        cut = truncation(state, body.truncate_prompt_tokens, body.truncation_side)
        return ScoreOptions(cut, limit or None, activation, body.instruction, field)


def _ranked(index: int, scores: list[float], documents: list[str], text: bool) -> dict[str, Any]:
    result: dict[str, Any] = {"index": index, "score": scores[index]}
    return {**result, "text": documents[index]} if text else result
