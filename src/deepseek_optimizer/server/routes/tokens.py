"""/tokenize and /detokenize, in vLLM's form and llama-server's."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response

from ..chat.chat_setup import ChatSpec, set_up
from ..chat.intake import admitted_request
from ..chat.old_functions import with_tool_calls
from ..chat.prompts import tokens_of
from ..chat.replies import json_response
from ..http.caller import Caller
from ..http.problems import ApiError
from ..openapi import body_errors, reads
from ..protocol.models import (
    EXAMPLE_DETOKENIZE,
    EXAMPLE_TOKENIZE,
    DetokenizeRequest,
    NativeTokens,
    Text,
    TokenizeRequest,
    Tokens,
)
from ..state import ServerState
from ..tokens.tokenizing import Lane


def add(app: FastAPI, state: ServerState) -> None:
    @app.post(
        "/tokenize",
        response_model=Tokens | NativeTokens,
        responses=body_errors(),
        openapi_extra=reads(TokenizeRequest, EXAMPLE_TOKENIZE),
        tags=["tokens"],
    )
    async def tokenize(request: Request) -> Response:
        """Tokenizes a text, or a chat with the model's chat template."""
        async with admitted_request(state, request, TokenizeRequest, one=True) as (body, _, caller):
            return await (tokens(body, caller) if body.content is None else native_tokens(body, body.content, caller))

    async def native_tokens(body: TokenizeRequest, text: str, caller: Caller) -> Response:
        if body.prompt is not None or body.messages is not None:
            raise ApiError(400, "content: give only one of prompt, messages and content", param="content")

        def work(lane: Lane) -> list[int]:
            if body.parse_special is False:
                start = tokens_of(lane.tokenizer, "") if body.add_special else []
                return start + lane.plain(text)
            return tokens_of(lane.tokenizer, text, bool(body.add_special))

        ids = await state.tokenizing(work, caller)
        if not body.with_pieces:
            return json_response({"tokens": ids})
        return json_response({"tokens": [{"id": token, "piece": _piece(state.texts.bytes(token))} for token in ids]})

    async def tokens(body: TokenizeRequest, caller: Caller) -> Response:
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "prompt: give either prompt or messages", param="prompt")
        if body.messages is not None:
            messages = with_tool_calls([message.model_dump(exclude_none=True) for message in body.messages])
            chat = ChatSpec(
                messages,
                [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in body.tools or ()],
                options=body.chat_template_kwargs or {},
                add_generation_prompt=body.add_generation_prompt is not False,
                continue_final=bool(body.continue_final_message),
            )
            setup = await state.tokenizing(lambda lane: set_up(state, lane, chat), caller)
            caller.ignored.extend(setup.ignored)
            ids = setup.prompt.ids
        else:
            text, special = body.prompt or "", body.add_special_tokens is not False
            ids = await state.tokenizing(lambda lane: tokens_of(lane.tokenizer, text, special), caller)
        strings = None
        if body.return_token_strs:
            strings = await state.tokenizing(lambda lane: lane.tokenizer.convert_ids_to_tokens(ids), caller)
        return json_response({"count": len(ids), "max_model_len": state.engine.context, "tokens": ids, "token_strs": strings})

    @app.post(
        "/detokenize",
        response_model=Text,
        responses=body_errors(),
        openapi_extra=reads(DetokenizeRequest, EXAMPLE_DETOKENIZE),
        tags=["tokens"],
    )
    async def detokenize(request: Request) -> Response:
        """Decodes tokens, including special ones."""
        async with admitted_request(state, request, DetokenizeRequest, one=True) as (body, _, caller):
            if any(token >= state.engine.vocab_size for token in body.tokens):
                raise ApiError(400, f"tokens: must be ids from 0 to {state.engine.vocab_size - 1}", param="tokens")
            text = await state.tokenizing(lambda lane: lane.tokenizer.decode(body.tokens), caller)
        return json_response({"prompt": text, "content": text})


def _piece(raw: bytes) -> str | list[int]:
    """A token's text, or its bytes if they are part of a character."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)
