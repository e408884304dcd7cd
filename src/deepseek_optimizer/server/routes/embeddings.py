"""/v1/embeddings and /embeddings: converts texts to vectors."""

from __future__ import annotations

import time
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response

from ..chat.intake import admitted_request
from ..http.problems import ApiError
from ..openapi import body_errors, reads
from ..protocol.embeddings import EXAMPLE, EmbeddingList, EmbeddingRequest, Embeds
from ..search.embedding import EmbedOptions, aside, pooled_outputs, vector_of
from ..search.run import Job, job_of
from ..search.texts import prompt_name, truncation
from ..search.vectors import NO_NORM, UNIT, dimensions_of, encoded
from ..state import ServerState


def add(app: FastAPI, state: ServerState) -> None:
    @app.post(
        "/v1/embeddings",
        response_model=EmbeddingList,
        responses=body_errors(),
        openapi_extra=reads(EmbeddingRequest, EXAMPLE),
        tags=["search"],
    )
    async def embeddings(request: Request) -> Response:
        """Converts texts to vectors of length 1, pooled as the checkpoint's sentence-transformers files say; without these, the
        mean of the last hidden states.

        A language model that is not trained for embeddings gives similar vectors for texts with the same meaning, but less so
        than an embedding model.
        """
        async with admitted_request(state, request, EmbeddingRequest, one=True) as (body, _, caller):
            job = job_of(request, "embd", body.priority, caller)
            options = embed_options(state, body)
            outputs = await pooled_outputs(state, body.input, options, job)
            base64 = body.encoding_format == "base64"

            def whole() -> bytes:
                data = [
                    {"object": "embedding", "index": index, "embedding": encoded(vector_of(state, output, options), base64)}
                    for index, output in enumerate(outputs)
                ]
                return orjson.dumps(response(state, job, data, sum(output.prompt_tokens for output in outputs)))

            return Response(await aside(state, caller, outputs, whole), media_type="application/json")


def embed_options(state: ServerState, body: Embeds) -> EmbedOptions:
    """The options of a request for vectors.

    Raises:
        ApiError: 400, more dimensions than the vectors have, or an unknown prompt.
        RequestError: see `truncation`.
    """
    settings = state.settings.embedding
    hidden = state.engine.hidden_size
    if body.dimensions is not None and hidden and body.dimensions > dimensions_of(hidden, settings):
        raise ApiError(400, f"dimensions: must be at most {dimensions_of(hidden, settings)}", param="dimensions")
    norm = body.embd_normalize
    if norm is None:
        norm = NO_NORM if False in (body.normalize, body.use_activation) else UNIT
    return EmbedOptions(
        prompt=prompt_name(settings, body.input_type, body.prompt_name),
        cut=truncation(state, body.truncate_prompt_tokens, body.truncation_side),
        norm=norm,
        dimensions=body.dimensions,
        special=body.add_special_tokens is not False,
    )


def response(state: ServerState, job: Job, data: list[Any], tokens: int) -> dict[str, Any]:
    """The body of a response that lists results."""
    usage = {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
    return {
        "id": job.name, "object": "list", "created": int(time.time()), "model": job.model(state), "data": data, "usage": usage
    }  # fmt: skip
