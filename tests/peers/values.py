"""Values in llama.cpp's tests that belong to their model: what it writes, and how many tokens a prompt has.

Numbers of tokens are computed with the tokenizer of the model that takes its place, without the server.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from deepseek_optimizer.cache.block_manager import BLOCK_TOKENS

from . import models

# "(little|girl)+" and the like, and what has another form.
_WORDS = re.compile(r"\^?[ ]?\(?[A-Za-z|]+\)?\+?")
_TEXTS = frozenset({"But she couldn't", '(Suddenly)+|\\{ " Sarax.', "[ -3000 ]", "(cat)+|(automobile)+"})


def is_text_of_their_model(regex: str) -> bool:
    """Whether a regular expression describes what the model of llama.cpp's tests writes. What a grammar or a schema requires
    has other characters."""
    return _WORDS.fullmatch(regex) is not None or regex in _TEXTS


@functools.cache
def _tokenizer(model: Callable[[], Any]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model())


def _tokens(text: str, model: Callable[[], Any] = models.smollm2) -> int:
    return len(_tokenizer(model)(text)["input_ids"])


def _text(content: Any) -> str:
    """A message's content, whose parts the server joins with line breaks."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _of_chat(params: dict[str, Any]) -> dict[str, Any]:
    template = params.get("chat_template")
    if template not in (None, "chatml"):  # of SmolLM2, which is ChatML's
        return {"n_prompt": _tokens(template)}
    messages = [{"role": role, "content": _text(params[f"{role}_prompt"])} for role in ("system", "user")]
    tokenizer = _tokenizer(models.smollm2)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    return {"n_prompt": len(ids)}


def _of_progress(params: dict[str, Any]) -> dict[str, Any]:
    """The number of reports: one at the start, then one for each batch of the prompt that is not cached, in blocks."""
    messages = [{"role": "user", "content": "This is a test" * 10}]
    tokenizer = _tokenizer(models.smollm2)
    size = len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
    cached = (size - 1) // BLOCK_TOKENS * BLOCK_TOKENS if params["reuse_cache"] else 0
    return {"batch_count": 1 + -(-(size - cached) // params["n_batch"])}


VALUES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "test_chat_completion": _of_chat,
    "test_chat_completion_stream": _of_chat,
    "test_return_progress": _of_progress,
    "test_completion": lambda params: {"n_prompt": _tokens(params["prompt"])},
    "test_completion_stream": lambda params: {"n_prompt": _tokens(params["prompt"])},
    "test_embedding_usage_single": lambda params: {"n_tokens": _tokens(params["content"], models.encoder)},
}
