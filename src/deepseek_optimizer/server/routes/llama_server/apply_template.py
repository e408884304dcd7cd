"""/apply-template: renders the prompt of a chat, as llama-server does."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response

from ...chat.chat_setup import ChatSpec, set_up
from ...chat.intake import admitted_request
from ...chat.replies import json_response
from ...openapi import body_errors, reads
from ...protocol.llama_server import EXAMPLE_TEMPLATE, ApplyTemplateRequest, PromptText
from ...state import ServerState


def add(app: FastAPI, state: ServerState) -> None:
    @app.post(
        "/apply-template",
        response_model=PromptText,
        responses=body_errors(),
        openapi_extra=reads(ApplyTemplateRequest, EXAMPLE_TEMPLATE),
        tags=["llama-server"],
    )
    async def apply_template(request: Request) -> Response:
        """The prompt of a chat as text, with control tokens."""
        async with admitted_request(state, request, ApplyTemplateRequest, one=True) as (body, _, caller):
            chat = ChatSpec(
                messages=[message.model_dump(exclude_none=True) for message in body.messages],
                tools=[tool.model_dump(exclude_none=True) for tool in body.tools or ()],
                options=body.chat_template_kwargs or {},
                add_generation_prompt=body.add_generation_prompt is not False,
            )
            state.prompt_size.check_chat(chat.messages)
            setup = await state.tokenizing(lambda lane: set_up(state, lane, chat), caller)
            return json_response({"prompt": setup.prompt.text})
