"""/embedding: converts texts to vectors, in llama-server's format."""

from __future__ import annotations

import orjson
from fastapi import FastAPI, Request, Response

from ...chat.intake import admitted_request
from ...openapi import body_errors, reads
from ...protocol.embeddings import EXAMPLE_NATIVE, NativeEmbedding, NativeEmbeddingRequest
from ...search.embedding import aside, pooled_outputs, vector_of
from ...search.run import job_of
from ...search.vectors import encoded
from ...state import ServerState
from ..embeddings import embed_options


def add(app: FastAPI, state: ServerState) -> None:
    @app.post(
        "/embedding",
        response_model=list[NativeEmbedding],
        responses=body_errors(),
        openapi_extra=reads(NativeEmbeddingRequest, EXAMPLE_NATIVE),
        tags=["llama-server"],
    )
    async def embedding(request: Request) -> Response:
        """Converts texts to vectors as /v1/embeddings does. Each is in a list of one, which with llama-server may be longer."""
        async with admitted_request(state, request, NativeEmbeddingRequest, one=True) as (body, _, caller):
            options = embed_options(state, body)
            outputs = await pooled_outputs(state, body.content, options, job_of(request, "embd", body.priority, caller))

            def whole() -> bytes:
                vectors = [encoded(vector_of(state, output, options), False) for output in outputs]
                return orjson.dumps([{"index": index, "embedding": [vector]} for index, vector in enumerate(vectors)])

            return Response(await aside(state, caller, outputs, whole), media_type="application/json")
