"""/v1/embeddings: converts texts to vectors."""

from __future__ import annotations

import base64
import uuid
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response

from ...engine.request import Output
from ...engine.request import Request as EngineRequest
from ..chat.intake import admitted_request
from ..chat.prompts import text_prompts
from ..chat.replies import WholeReply
from ..openapi import body_errors, reads
from ..protocol.embeddings import EXAMPLE, EmbeddingList, EmbeddingRequest
from ..state import ServerState


def add(app: FastAPI, state: ServerState) -> None:
    @app.post(
        "/v1/embeddings",
        response_model=EmbeddingList,
        responses=body_errors(),
        openapi_extra=reads(EmbeddingRequest, EXAMPLE),
        tags=["embeddings"],
    )
    async def embeddings(request: Request) -> Response:
        """The mean of the model's last hidden states (after its final norm) over a text's tokens, not normalized to length 1.

        A language model is not trained for embeddings: texts with the same meaning are close to each other, but less so than
        with an embedding model.
        """
        async with admitted_request(state, request, EmbeddingRequest) as (body, places, caller):
            prompts = await text_prompts(state, body.input, True, caller, "input")
            name = f"embd-{uuid.uuid4().hex}"
            priority, salt = body.priority or 0, request.state.salt
            answers = state.submit(
                [
                    EngineRequest(
                        ids,
                        id=name,
                        salt=salt,
                        client=caller.key,
                        deadline=caller.deadline,
                        embed=True,
                        priority=priority,
                        adapter=caller.adapter,
                    )
                    for ids in prompts
                ]
            )
            outputs: dict[int, Output] = {}
            model = caller.adapter or state.model_name
            as_text = body.encoding_format == "base64"
            return WholeReply(state, places.pop_all(), answers, outputs.__setitem__, lambda: _body(model, outputs, as_text))


def _body(model: str, outputs: dict[int, Output], as_text: bool) -> dict[str, Any]:
    data = []
    for index in sorted(outputs):
        vector = np.asarray(outputs[index].embedding, "<f4")
        value = base64.b64encode(vector.tobytes()).decode() if as_text else vector
        data.append({"object": "embedding", "index": index, "embedding": value})
    tokens = sum(output.prompt_tokens for output in outputs.values())
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}
