"""/props: describes the server, as llama-server's /props does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Response

from ...engine.request import SamplingParams
from ...errors import RequestError
from ...versions import versions
from ..chat.replies import json_response
from ..openapi import errors
from ..protocol.props import Props
from ..state import ServerState


def add(app: FastAPI, state: ServerState) -> None:
    @app.get("/props", response_model=Props, responses=errors(401, 403), tags=["models"])
    async def props() -> Response:
        """Describes the server: default settings, model, chat template."""
        tokenizer = state.tokenizer
        other = state.settings.sampling_not_thinking
        body = {
            "default_generation_settings": {"n_ctx": state.engine.context, "params": _default_params(state)},
            "sampling_without_thinking": dict(other) if other is not None else None,
            "total_slots": state.engine.max_running,
            "model_alias": state.model_name,
            "model_path": state.settings.model_path or state.model_name,
            "chat_template": _chat_template(state),
            "bos_token": tokenizer.bos_token or "",
            "eos_token": tokenizer.eos_token or "",
            "modalities": {"vision": state.pictures is not None, "audio": False},
            "build_info": f"deepseek-optimizer {versions('deepseek-optimizer')['deepseek-optimizer']}",
            "is_sleeping": state.sleeping,
        }
        return json_response(body)


def _default_params(state: ServerState) -> dict[str, Any]:
    defaults = replace(SamplingParams(), **state.settings.sampling)
    return {
        "n_predict": state.max_answer_tokens,
        "max_tokens": state.max_answer_tokens,
        "seed": -1,
        "temperature": defaults.temperature,
        "top_k": defaults.top_k,
        "top_p": defaults.top_p,
        "min_p": defaults.min_p,
        "repeat_penalty": defaults.repetition_penalty,
        "presence_penalty": defaults.presence_penalty,
        "frequency_penalty": defaults.frequency_penalty,
        "stop": [],
        "ignore_eos": False,
        "stream": False,
    }


def _chat_template(state: ServerState) -> str:
    try:
        return state.template.source()
    except RequestError:  # the model has none
        return ""
