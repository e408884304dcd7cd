"""/api/embed and /api/embeddings: converts texts to vectors, in Ollama's format."""

from __future__ import annotations

import time
import uuid
from contextlib import ExitStack
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response

from ....engine.request import Output
from ....engine.request import Request as EngineRequest
from ...chat.intake import admitted_request
from ...chat.ollama_answers import nanoseconds
from ...chat.prompts import text_prompts
from ...chat.replies import WholeReply
from ...http.caller import Caller
from ...openapi import body_errors, reads
from ...protocol.ollama.requests import EXAMPLE_EMBED, EXAMPLE_EMBEDDINGS, OllamaEmbeddingsRequest, OllamaEmbedRequest
from ...protocol.ollama.responses import OllamaEmbed, OllamaEmbeddings, OllamaError
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
        async with admitted_request(state, request, OllamaEmbedRequest) as (body, places, caller):
            outputs, answers = await start(body.input, caller, request.state.salt)

            def result() -> dict[str, Any]:
                took = nanoseconds(time.perf_counter() - begun)
                count = sum(output.prompt_tokens for output in outputs.values())
                vectors = [_unit(outputs[index]) for index in sorted(outputs)]
                return {"model": state.model_name, "embeddings": vectors, "total_duration": took, "load_duration": 0,
                        "prompt_eval_count": count}  # fmt: skip

            return _reply(outputs, answers, places, result)

    @app.post(
        "/api/embeddings",
        response_model=OllamaEmbeddings,
        responses=body_errors(OllamaError),
        openapi_extra=reads(OllamaEmbeddingsRequest, EXAMPLE_EMBEDDINGS),
        tags=["ollama"],
    )
    async def embeddings(request: Request) -> Response:
        """Embeds one text, in the older format of Ollama's API."""
        async with admitted_request(state, request, OllamaEmbeddingsRequest, one=True) as (body, places, caller):
            outputs, answers = await start(body.prompt, caller, request.state.salt)
            return _reply(outputs, answers, places, lambda: {"embedding": _unit(outputs[0])})

    async def start(texts: str | list[str], caller: Caller, salt: str) -> tuple[dict[int, Output], list[Any]]:
        prompts = await text_prompts(state, texts, True, caller, "input")
        name = f"embd-{uuid.uuid4().hex}"
        requests = [
            EngineRequest(ids, id=name, salt=salt, client=caller.key, deadline=caller.deadline, embed=True) for ids in prompts
        ]
        return {}, state.submit(requests)

    def _reply(outputs: dict[int, Output], answers: list[Any], places: ExitStack, result: Any) -> Response:
        return WholeReply(state, places.pop_all(), answers, outputs.__setitem__, result)


def _unit(output: Output) -> Any:
    vector = np.asarray(output.embedding, np.float32)
    return vector / max(float(np.linalg.norm(vector)), 1e-12)
