"""/v1/embeddings: texts into vectors."""

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
        """The mean, over a text's tokens, of the model's last hidden states (behind its final norm), not of length 1.

        A language model was not trained to embed: texts that mean the same are near each other, but less so than with an
        embedding model.
        """
        async with admitted_request(state, request, EmbeddingRequest) as (asked, places, caller):
            prompts = await text_prompts(state, asked.input, True, caller, "input")
            name = f"embd-{uuid.uuid4().hex}"
            priority, salt = asked.priority or 0, request.state.salt
            answers = state.submit(
                [
                    EngineRequest(
                        ids, id=name, salt=salt, client=caller.key, deadline=caller.deadline, embed=True, priority=priority
                    )
                    for ids in prompts
                ]
            )
            found: dict[int, Output] = {}
            as_text = asked.encoding_format == "base64"
            return WholeReply(state, places.pop_all(), answers, found.__setitem__, lambda: _body(state, found, as_text))


def _body(state: ServerState, found: dict[int, Output], as_text: bool) -> dict[str, Any]:
    data = []
    for index in sorted(found):
        vector = np.asarray(found[index].embedding, "<f4")
        value = base64.b64encode(vector.tobytes()).decode() if as_text else vector
        data.append({"object": "embedding", "index": index, "embedding": value})
    tokens = sum(output.prompt_tokens for output in found.values())
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": state.model_name, "usage": usage}
