"""Conversion of Ollama's requests to requests in OpenAI's format."""

from __future__ import annotations

from collections import deque
from typing import Any

import orjson

from ..base import parse
from ..chat import ChatRequest
from ..completions import CompletionRequest
from ..messages import continues
from . import requests as ollama


def is_load(body: ollama.OllamaChatRequest | ollama.OllamaGenerateRequest) -> bool:
    """Whether a request asks only that the model be loaded."""
    if isinstance(body, ollama.OllamaChatRequest):
        return not body.messages
    return not body.prompt and not body.suffix and not body.system and not body.images


def chat_request(body: ollama.OllamaChatRequest, thinking: bool) -> ChatRequest:
    """Converts a chat.

    Args:
        body: the request.
        thinking: whether reasoning of the model can be turned on and off.

    Raises:
        ApiError: 400, a value that chats do not support.
    """
    chat: dict[str, Any] = {"messages": _messages(body.messages or []), **_common(body, thinking)}
    if continues(chat["messages"]):
        chat["continue_final_message"] = True
    if body.tools:
        chat["tools"] = [{"type": "function", "function": tool.function.model_dump(exclude={"strict"})} for tool in body.tools]
    return parse(ChatRequest, chat)


def prompt_chat(body: ollama.OllamaGenerateRequest, thinking: bool) -> ChatRequest:
    """Converts a prompt to a chat. Arguments and errors as those of `chat_request`."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": body.system}] if body.system else []
    messages.append({"role": "user", "content": _content(body.prompt or "", body.images)})
    return parse(ChatRequest, {"messages": messages, **_common(body, thinking)})


def completion_request(body: ollama.OllamaGenerateRequest) -> CompletionRequest:
    """Converts a prompt to a text to continue.

    Raises:
        ApiError: 400, a value that completions do not support.
    """
    text = {"prompt": body.prompt or " ", "suffix": body.suffix}
    return parse(CompletionRequest, {**text, **_common(body, False)})


def _common(body: ollama.OllamaChatRequest | ollama.OllamaGenerateRequest, thinking: bool) -> dict[str, Any]:
    options = body.options or ollama.Options.model_validate({})
    fields: dict[str, Any] = {
        "max_tokens": options.num_predict if options.num_predict is not None and options.num_predict > 0 else None,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p or None,
        "min_p": options.min_p,
        "typical_p": options.typical_p,
        "repeat_penalty": options.repeat_penalty,
        "repeat_last_n": options.repeat_last_n,
        "presence_penalty": options.presence_penalty,
        "frequency_penalty": options.frequency_penalty,
        "seed": options.seed if options.seed is not None and options.seed >= 0 else None,
        "stop": options.stop or None,
        "quality": options.quality,
        "min_quality": options.min_quality,
    }
    if body.format == "json":
        fields["response_format"] = {"type": "json_object"}
    elif body.format:
        fields["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": body.format}}
    if thinking and body.think is not None:
        fields["reasoning_effort"] = body.think if isinstance(body.think, str) else "medium" if body.think else "none"
    return fields


def _messages(messages: list[ollama.Message]) -> list[dict[str, Any]]:
    """Messages in OpenAI's format. Calls without an id get one, and results are assigned to them by name and order."""
    out: list[dict[str, Any]] = []
    waiting: deque[tuple[str, str]] = deque()  # (id, name) of calls without a result
    for number, message in enumerate(messages):
        one: dict[str, Any] = {"role": message.role, "content": _content(message.content or "", message.images)}
        if message.role == "assistant":
            one |= {"reasoning_content": message.thinking} if message.thinking else {}
            calls = [(call.id or f"call_{number}_{i}", call.function) for i, call in enumerate(message.tool_calls or ())]
            waiting = deque((id, function.name) for id, function in calls)
            if calls:
                one["tool_calls"] = [
                    {"id": id, "function": {"name": f.name, "arguments": orjson.dumps(f.arguments).decode()}} for id, f in calls
                ]
        elif message.role == "tool":
            one["tool_call_id"] = message.tool_call_id or _call_of(message.tool_name, waiting)
        out.append(one)
    return out


def _content(text: str, images: list[str] | None) -> str | list[dict[str, Any]]:
    """A message's content in OpenAI's format: its pictures, and then its text, as Ollama's templates place them."""
    if not images:
        return text
    pictures = [{"type": "image_url", "image_url": {"url": f"data:;base64,{image}"}} for image in images]
    return [*pictures, {"type": "text", "text": text}]


def _call_of(name: str | None, waiting: deque[tuple[str, str]]) -> str:
    """The id of the call that a result belongs to, which no longer waits for it."""
    for call in waiting:
        if name in (None, call[1]):
            waiting.remove(call)
            return call[0]
    return "call"
