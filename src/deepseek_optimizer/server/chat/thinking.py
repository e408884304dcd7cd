"""Whether a model reasons before its answer, for requests that do not say: `ServerSettings.thinking`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...chat.reasoning import CLOSE, opened_by
from ...chat.template import Prompt
from ..tokens.tokenizing import Lane
from .prompts import tokens_of

SWITCHES = ("enable_thinking", "thinking")  # variables of chat templates; the latter is DeepSeek's


def default_thinking(setting: bool | None, effort: str | None, options: Mapping[str, Any]) -> bool | None:
    """The server's setting for a chat; None: the request decides, or the template.

    Args:
        setting: the server's.
        effort: of reasoning, from the request; None: not given.
        options: variables of the chat template from the request.
    """
    return None if effort is not None or any(name in options for name in SWITCHES) else setting


def closed(prompt: Prompt, lane: Lane) -> Prompt:
    """The prompt with empty reasoning if it ends with the tag that opens it: for templates that always open it, as llama-server
    does for them with `--reasoning off`."""
    if not opened_by(prompt.text):
        return prompt
    return replace(prompt, ids=prompt.ids + tokens_of(lane.tokenizer, CLOSE, special=False), text=prompt.text + CLOSE)
