"""The built-in calibration text: dialogues, English prose, code and some Chinese.

The files in `sample/` were written for this package. Dialogues are put into the model's own chat template, since a chat model
mostly sees texts in it. Python's documentation (`sample_text`) is not part of it: models are evaluated on that.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from .text import LENGTH, stretches

_FILES = ("prose.txt", "code.txt", "chinese.txt")
_ROLE = re.compile(r"^(SYSTEM|USER|ASSISTANT): ", re.MULTILINE)


def built_in_stretches(tokenizer: Any, length: int = LENGTH, count: int = 16) -> list[torch.Tensor]:
    """Stretches of the built-in text: token ids, int64 [1, length] each.

    Args:
        tokenizer: a Transformers tokenizer, with or without a chat template.
        length: tokens per stretch.
        count: maximum number of stretches; there are about ten of 512 tokens.

    Raises:
        ConfigError: the text is shorter than one stretch, in this tokenizer's tokens.
    """
    text = "\n\n".join([*(_in_template(tokenizer, dialogue) for dialogue in dialogues()), *map(_read, _FILES)])
    return stretches(tokenizer, text, length, count, "the built-in text")


def dialogues() -> list[list[dict[str, str]]]:
    """The dialogues as lists of messages with role and content."""
    result: list[list[dict[str, str]]] = []
    for text in _read("dialogues.txt").split("\n\n"):
        parts = _ROLE.split(text)
        turns = [{"role": role.lower(), "content": body.strip()} for role, body in zip(parts[1::2], parts[2::2], strict=True)]
        if turns and turns[0]["role"] != "assistant" and not parts[0]:
            result.append(turns)
        else:  # a paragraph of the answer before it
            result[-1][-1]["content"] += f"\n\n{parts[0].strip()}"
            result[-1] += turns
    return result


def _in_template(tokenizer: Any, dialogue: list[dict[str, str]]) -> str:
    """A dialogue in the tokenizer's chat template; without a template that accepts it, as plain text."""
    if getattr(tokenizer, "chat_template", None):
        for messages in (dialogue, [message for message in dialogue if message["role"] != "system"]):
            try:
                return str(tokenizer.apply_chat_template(messages, tokenize=False))
            except Exception:  # templates are programs that may refuse roles with any error
                continue
    return "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in dialogue)


def _read(name: str) -> str:
    return (Path(__file__).parent / "sample" / name).read_text(encoding="utf-8").strip()
