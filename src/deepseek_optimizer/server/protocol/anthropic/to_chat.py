"""Conversion of Anthropic's requests to chats in OpenAI's format."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson

from ..base import parse
from ..chat import ChatRequest
from ..messages import continues
from .requests import (
    AnthropicAssistantMessage,
    AnthropicSystemMessage,
    AnthropicUserMessage,
    CountTokensRequest,
    ImageBlock,
    ImageUrl,
    MessagesRequest,
    NamedChoice,
    NoChoice,
    TextBlock,
    Texts,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)

_BILLING = "x-anthropic-billing-header:"  # a system block of Claude Code, different in every request: it would defeat the cache
_LOW_BUDGET, _MEDIUM_BUDGET = 4_096, 16_384  # budgets below these are low and medium effort
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_request(body: CountTokensRequest, has_switch: bool) -> ChatRequest:
    """Converts a request.

    Args:
        body: the request.
        has_switch: whether reasoning of the model can be turned off.

    Raises:
        ApiError: 400, a value that chats do not support.
    """
    chat: dict[str, Any] = {"model": body.model, "messages": _messages(body), "reasoning_effort": _effort(body, has_switch)}
    if continues(chat["messages"]):
        chat["continue_final_message"] = True
    if body.tools:
        chat["tools"] = [
            {
                "type": "function",
                "function": {"name": tool.name, "description": tool.description, "parameters": tool.input_schema},
            }
            for tool in body.tools
        ]
    if (choice := body.tool_choice) is not None:
        named = {"type": "function", "function": {"name": choice.name}} if isinstance(choice, NamedChoice) else None
        chat["tool_choice"] = named or _CHOICES[choice.type]
        if not isinstance(choice, NoChoice) and choice.disable_parallel_tool_use:
            chat["parallel_tool_calls"] = False
    form = (body.output_config.format if body.output_config else None) or body.output_format
    if form is not None:
        chat["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": form.schema_}}
    if isinstance(body, MessagesRequest):
        chat |= {
            "max_tokens": body.max_tokens,
            "stop": body.stop_sequences or None,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "stream": body.stream,
            "quality": body.quality,
            "min_quality": body.min_quality,
        }
    return parse(ChatRequest, chat)


def _effort(body: CountTokensRequest, has_switch: bool) -> str | None:
    """The reasoning effort; None: the model's default."""
    if body.thinking is None or body.thinking.type == "disabled":
        return "none" if body.thinking is not None and has_switch else None
    if body.output_config is not None and body.output_config.effort is not None:
        return body.output_config.effort
    if body.thinking.type == "adaptive":
        return None
    budget = body.thinking.budget_tokens
    if budget is None:
        return "medium"
    return "low" if budget < _LOW_BUDGET else "medium" if budget < _MEDIUM_BUDGET else "high"


def _messages(body: CountTokensRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.system is not None and (system := _text(body.system)):
        messages.append({"role": "system", "content": system})
    for message in body.messages:
        if isinstance(message, AnthropicAssistantMessage):
            messages.append(_assistant(message))
        elif isinstance(message, AnthropicSystemMessage):
            messages.append({"role": "system", "content": _text(message.content)})
        else:
            _add_user(messages, message)
    return messages


def _text(texts: Texts) -> str:
    return texts if isinstance(texts, str) else _joined(block.text for block in texts)


def _joined(texts: Iterable[str]) -> str:
    return "\n".join(text for text in texts if not text.startswith(_BILLING))


def _assistant(message: AnthropicAssistantMessage) -> dict[str, Any]:
    if isinstance(message.content, str):
        return {"role": "assistant", "content": message.content}
    out: dict[str, Any] = {"role": "assistant"}
    out["content"] = "\n".join(block.text for block in message.content if isinstance(block, TextBlock))
    if thoughts := "".join(block.thinking for block in message.content if isinstance(block, ThinkingBlock)):
        out["reasoning_content"] = thoughts
    calls = [
        {
            "id": block.id,
            "type": "function",
            "function": {"name": block.name, "arguments": orjson.dumps(block.input).decode()},
        }
        for block in message.content
        if isinstance(block, ToolUseBlock)
    ]
    return out | ({"tool_calls": calls} if calls else {})


def _add_user(messages: list[dict[str, Any]], message: AnthropicUserMessage) -> None:
    """Adds the results of tools, then the text and the images, which continue a user message before it: templates expect
    turns."""
    texts: list[str] = []
    parts: list[dict[str, Any]] = []  # of the message, if it has images
    if isinstance(message.content, str):
        texts.append(message.content)
    else:
        for block in message.content:
            if isinstance(block, ToolResultBlock):
                result = "" if block.content is None else _text(block.content)
                messages.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": result})
            elif isinstance(block, ImageBlock):
                source = block.source
                url = source.url if isinstance(source, ImageUrl) else f"data:{source.media_type};base64,{source.data}"
                parts.append({"type": "image_url", "image_url": {"url": url}})
            else:
                texts.append(block.text)
                parts.append({"type": "text", "text": block.text})
        if not parts:
            return
    content: Any = parts if len(parts) > len(texts) else "\n".join(texts)
    if messages and messages[-1]["role"] == "user":
        messages[-1]["content"] = _continued(messages[-1]["content"], content)
    else:
        messages.append({"role": "user", "content": content})


def _continued(first: Any, then: Any) -> Any:
    """The content of two messages in one."""
    if isinstance(first, str) and isinstance(then, str):
        return f"{first}\n{then}"
    lists = [[{"type": "text", "text": part}] if isinstance(part, str) else part for part in (first, then)]
    return lists[0] + lists[1]
