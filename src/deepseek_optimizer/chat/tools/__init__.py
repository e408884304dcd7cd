"""Formats in which models call tools: one file a format, chosen by what the model's chat template shows it."""

from __future__ import annotations

from .base import ToolFormat
from .deepseek import CALL_BEGIN, V3, V31
from .dsml import MARK, DsmlFormat
from .hermes import BEGIN, HermesFormat
from .llama import PYTHON_TAG, LlamaFormat

FORMATS: dict[str, ToolFormat] = {f.name: f for f in (DsmlFormat(), V3, V31, HermesFormat(), LlamaFormat())}


def detect(template: str) -> ToolFormat | None:
    """The format that a chat template teaches, None where it teaches none that is known here.

    Args:
        template: Jinja source, or a rendered prompt that explains the calls.
    """
    if MARK in template:
        return FORMATS["dsml"]
    if CALL_BEGIN in template:
        return V3 if "```json" in template else V31
    if BEGIN in template and "<function=" not in template:  # Qwen3-Coder's calls are in the same tags, but not JSON
        return FORMATS["hermes"]
    if PYTHON_TAG in template or ('"parameters":' in template and "<|start_header_id|>" in template):
        return FORMATS["llama"]
    return None
