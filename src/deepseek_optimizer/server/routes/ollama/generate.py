"""/api/generate: answers a prompt, continues a text or fills one in, in Ollama's format."""

from __future__ import annotations

import uuid
from functools import partial

from fastapi import FastAPI, Request, Response

from ...chat.chat_answers import ChatAnswer
from ...chat.fill_in import fill_in_prompt
from ...chat.intake import admitted_request
from ...chat.prompts import text_prompts
from ...chat.replies import json_response
from ...openapi import body_errors, lines, reads
from ...protocol.ollama.requests import EXAMPLE_GENERATE, OllamaGenerateRequest
from ...protocol.ollama.responses import OllamaError, OllamaGenerate
from ...protocol.ollama.to_openai import completion_request, is_load, prompt_chat
from ...state import ServerState
from ..completions import start_completion
from .chat import answer_chat, has_switch, loaded, reply


def add(app: FastAPI, state: ServerState) -> None:
    @app.post(
        "/api/generate",
        response_model=OllamaGenerate,
        responses=body_errors(OllamaError) | {200: lines()},
        openapi_extra=reads(OllamaGenerateRequest, EXAMPLE_GENERATE),
        tags=["ollama"],
    )
    async def generate(request: Request) -> Response:
        """Answers a prompt in the format of Ollama's API: a JSON object per output, unless `stream` is false."""
        async with admitted_request(state, request, OllamaGenerateRequest, one=True) as (body, places, caller):
            salt = request.state.salt
            if is_load(body):
                return json_response(loaded(state, body) | {"response": ""})
            if not body.raw and body.suffix is None:
                switch = await has_switch(state, body, False, caller)
                converted = await state.bodies.working(caller.key, caller.size, partial(prompt_chat, body, switch))
                return await answer_chat(state, body, converted, places, caller, salt)
            text = await state.bodies.working(caller.key, caller.size, partial(completion_request, body))
            if body.suffix is not None:
                prompt = await fill_in_prompt(state, body.prompt or "", body.suffix, caller)
                prompts, stops = [prompt.ids], prompt.stops
            else:
                prompts, stops = await text_prompts(state, text.prompt, True, caller, "prompt"), ()
            started = await start_completion(
                state, text, prompts, caller,
                max_tokens=text.max_tokens, id=f"ollama-{uuid.uuid4().hex}", salt=salt, stop_token_ids=stops,
            )  # fmt: skip
            return reply(state, body, places, started.answers, ChatAnswer(None))
