"""Classify and pooling, as vLLM serves them."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
from fastapi import FastAPI, Request, Response

from ..chat.intake import admitted_request
from ..chat.replies import json_response
from ..http.problems import ApiError
from ..openapi import body_errors, reads
from ..protocol.scores import (
    EXAMPLE_CLASSIFY,
    EXAMPLE_POOLING,
    ClassifyRequest,
    ClassifyResponse,
    PoolingRequest,
    PoolingResponse,
)
from ..search.embedding import aside, pooled_outputs, vector_of
from ..search.run import Job, job_of, run_all
from ..search.texts import Truncation, embedding_tokens, truncation
from ..search.vectors import encoded, sigmoid, softmax
from ..state import ServerState
from .embeddings import embed_options, response


def add(app: FastAPI, state: ServerState) -> None:
    @app.post(
        "/classify",
        response_model=ClassifyResponse,
        responses=body_errors(),
        openapi_extra=reads(ClassifyRequest, EXAMPLE_CLASSIFY),
        tags=["search"],
    )
    async def classify(request: Request) -> Response:
        """The probability of each class, by a model with a classification head."""
        async with admitted_request(state, request, ClassifyRequest, one=True) as (body, _, caller):
            job = job_of(request, "classify", body.priority, caller)
            cut = truncation(state, body.truncate_prompt_tokens, body.truncation_side)
            special = body.add_special_tokens is not False
            values, tokens = await classes(body.input, cut, special, body.use_activation is not False, job)
        labels = state.engine.classifier.labels
        data = [
            {"index": index, "label": labels[int(np.argmax(row))], "probs": row.tolist(), "num_classes": len(labels)}
            for index, row in enumerate(values)
        ]
        return json_response(response(state, job, data, tokens))

    @app.post(
        "/pooling",
        response_model=PoolingResponse,
        responses=body_errors(),
        openapi_extra=reads(PoolingRequest, EXAMPLE_POOLING),
        tags=["search"],
    )
    async def pooling(request: Request) -> Response:
        """The vector of each text, or the probability of each class."""
        async with admitted_request(state, request, PoolingRequest, one=True) as (body, _, caller):
            job = job_of(request, "pool", body.priority, caller)
            options = embed_options(state, body)
            base64 = body.encoding_format == "base64"
            own = "embed" if state.engine.classifier is None else "classify"
            if body.task not in (None, own):
                raise ApiError(400, f"Unsupported task: {body.task!r}; this model's is {own!r}", param="task")
            if own == "classify":
                values, tokens = await classes(body.input, options.cut, options.special, body.use_activation is not False, job)
                return json_response(response(state, job, [_pooled(i, row, base64) for i, row in enumerate(values)], tokens))
            outputs = await pooled_outputs(state, body.input, options, job)

            def whole() -> bytes:
                data = [_pooled(index, vector_of(state, output, options), base64) for index, output in enumerate(outputs)]
                return orjson.dumps(response(state, job, data, sum(output.prompt_tokens for output in outputs)))

            return Response(await aside(state, caller, outputs, whole), media_type="application/json")

    async def classes(given: Any, cut: Truncation, special: bool, activation: bool, job: Job) -> tuple[list[Any], int]:
        """The probability of each class for each text, float32 [classes], and the number of tokens that were processed."""
        classifier = state.engine.classifier
        if classifier is None:
            raise ApiError(
                400, "this model has no classification head; serve a ForSequenceClassification checkpoint", param="model"
            )
        tokens = await embedding_tokens(state, given, None, special, cut, job.caller)
        outputs = await run_all(state, [job.request(one, classify=True) for one in tokens], job.caller)
        logits = [output.scores for output in outputs]
        read = sum(output.prompt_tokens for output in outputs)
        if not activation or classifier.activation == "identity":
            return logits, read
        function = sigmoid if classifier.activation == "sigmoid" else softmax
        return [function(row).astype(np.float32) for row in logits], read


def _pooled(index: int, values: Any, base64: bool) -> dict[str, Any]:
    return {"index": index, "object": "pooling", "data": encoded(values, base64)}
