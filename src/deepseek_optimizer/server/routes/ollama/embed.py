"""/api/embed and /api/embeddings: converts texts to vectors, in Ollama's format."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import orjson
from fastapi import FastAPI, Request, Response

from ...chat.intake import admitted_request
from ...chat.ollama_answers import nanoseconds
from ...http.problems import ApiError
from ...openapi import body_errors, reads
from ...protocol.ollama.requests import EXAMPLE_EMBED, EXAMPLE_EMBEDDINGS, OllamaEmbeddingsRequest, OllamaEmbedRequest
from ...protocol.ollama.responses import OllamaEmbed, OllamaEmbeddings, OllamaError
from ...search.embedding import EmbedOptions, embed_texts
from ...search.run import job_of
from ...search.texts import truncation
from ...search.vectors import dimensions_of
from ...state import ServerState


def add(app: FastAPI, state: ServerState) -> None:
    @app.post(
        "/api/embed",
        response_model=OllamaEmbed,
        responses=body_errors(OllamaError),
        openapi_extra=reads(OllamaEmbedRequest, EXAMPLE_EMBED),
        tags=["ollama"],
    )
    async def embed(request: Request) -> Response:
        """Embeds texts in the format of Ollama's API; vectors have length 1."""
        begun = time.perf_counter()
        async with admitted_request(state, request, OllamaEmbedRequest, one=True) as (body, _, caller):
            most = dimensions_of(state.engine.hidden_size, state.settings.embedding)
            if body.dimensions is not None and state.engine.hidden_size and body.dimensions > most:
                raise ApiError(400, f"dimensions: must be at most {most}", param="dimensions")
            cut = truncation(state, -1 if body.truncate is not False else None, None)
            options = EmbedOptions(cut=cut, dimensions=body.dimensions)
            vectors, tokens = await embed_texts(state, body.input, options, job_of(request, "embd", None, caller))
            took = nanoseconds(time.perf_counter() - begun)
            return _json({"model": state.model_name, "embeddings": vectors, "total_duration": took, "load_duration": 0,
                          "prompt_eval_count": tokens})  # fmt: skip

    @app.post(
        "/api/embeddings",
        response_model=OllamaEmbeddings,
        responses=body_errors(OllamaError),
        openapi_extra=reads(OllamaEmbeddingsRequest, EXAMPLE_EMBEDDINGS),
        tags=["ollama"],
    )
    async def embeddings(request: Request) -> Response:
        """Embeds one text, in the older format of Ollama's API."""
        async with admitted_request(state, request, OllamaEmbeddingsRequest, one=True) as (body, _, caller):
            options = EmbedOptions(cut=truncation(state, -1, None))
            [vector], _tokens = await embed_texts(state, body.prompt, options, job_of(request, "embd", None, caller))
            return _json({"embedding": vector})


def _json(value: dict[str, Any]) -> Response:
    """A response with NumPy's arrays as lists."""
    plain = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY, default=np.ndarray.tolist)
    return Response(plain, media_type="application/json")
