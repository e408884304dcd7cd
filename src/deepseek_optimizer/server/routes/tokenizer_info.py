"""/tokenizer_info: the tokenizer's settings, compatible with vLLM's."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Response

from ..chat.replies import json_response
from ..openapi import errors
from ..protocol.models import TokenizerInfo
from ..state import ServerState

_PATHS = frozenset({"name_or_path", "added_tokens_decoder"})  # paths on the server, and what has its own place


def add(app: FastAPI, state: ServerState) -> None:
    @app.get("/tokenizer_info", response_model=TokenizerInfo, responses=errors(401, 403), tags=["tokens"])
    async def tokenizer_info() -> Response:
        """The fields of the checkpoint's tokenizer_config.json, with the tokenizer's class and its chat template."""
        return json_response(describe(state.tokenizer))


def describe(tokenizer: Any) -> dict[str, Any]:
    """The settings of a tokenizer as JSON, without the paths of its files.

    Args:
        tokenizer: of Transformers.
    """
    settings = {name: _plain(value) for name, value in tokenizer.init_kwargs.items() if _is_shown(name)}
    settings |= {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    settings["tokenizer_class"] = type(tokenizer).__name__
    if tokenizer.chat_template:
        settings["chat_template"] = tokenizer.chat_template
    return settings


def _is_shown(name: str) -> bool:
    return name not in _PATHS and not name.endswith(("_file", "_dir", "_path"))


def _plain(value: Any) -> Any:
    """A value of a tokenizer's settings as JSON: added tokens become their text. Integers of more than 64 bits are null:
    Transformers writes 1e30 for a `model_max_length` without a limit."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
