"""Formats of tool calls, one per file, detected from the model's chat template."""

from __future__ import annotations

from .base import ToolFormat
from .deepseek import CALL_BEGIN, V3, V31
from .dsml import MARK, DsmlFormat
from .hermes import BEGIN, HermesFormat
from .llama import PYTHON_TAG, LlamaFormat

FORMATS: dict[str, ToolFormat] = {f.name: f for f in (DsmlFormat(), V3, V31, HermesFormat(), LlamaFormat())}


def detect(template: str) -> ToolFormat | None:
    """The tool call format of a chat template; None if it has none or an unknown one.

    Args:
        template: Jinja source, or a rendered prompt that explains the calls.
    """
    if MARK in template:
        return FORMATS["dsml"]
    if CALL_BEGIN in template:
        return V3 if "```json" in template else V31
    if BEGIN in template and "<function=" not in template:  # Qwen3-Coder uses the same tags, but not JSON
        return FORMATS["hermes"]
    if PYTHON_TAG in template or ('"parameters":' in template and "<|start_header_id|>" in template):
        return FORMATS["llama"]
    return None
