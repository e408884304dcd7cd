"""Formats of tool calls, one per file, detected from the model's chat template."""

from __future__ import annotations

from . import deepseek, dsml, functions, glm, granite, hermes, kimi, llama, minimax, mistral
from .base import ToolFormat
from .generic import GENERIC
from .harmony import CHANNEL, HARMONY

FORMATS: dict[str, ToolFormat] = {
    f.name: f
    for f in (
        dsml.V32, dsml.V4, deepseek.V3, deepseek.V31, hermes.HERMES, llama.LLAMA, functions.QWEN3_CODER, functions.SEED_OSS,
        glm.GLM45, glm.GLM47, minimax.MINIMAX_M2, kimi.KIMI_K2, mistral.LISTED, mistral.NUMBERED, mistral.PLAIN,
        granite.GRANITE3, granite.PHI4_MINI, HARMONY, GENERIC,
    )
}  # fmt: skip


def detect(template: str) -> ToolFormat | None:
    """The tool call format of a chat template; None if it has none or an unknown one.

    Args:
        template: Jinja source, or a rendered prompt that explains the calls.
    """
    if CHANNEL in template and "analysis" in template:
        return HARMONY
    if dsml.MARK in template:
        return dsml.V4 if "tool_calls>" in template else dsml.V32
    if deepseek.CALL_BEGIN in template:
        return deepseek.V3 if "```json" in template else deepseek.V31
    if kimi.SECTION in template:
        return kimi.KIMI_K2
    if minimax.BEGIN in template:
        return minimax.MINIMAX_M2
    if mistral.BEGIN in template:
        if mistral.ID in template:
            return mistral.NUMBERED
        return mistral.PLAIN if mistral.ARGUMENTS in template else mistral.LISTED
    if functions.SEED in template:
        return functions.SEED_OSS
    if hermes.BEGIN in template:
        if glm.KEY in template:
            return glm.GLM45 if f"{glm.KEY_END}\n{glm.VALUE}" in template else glm.GLM47
        return functions.QWEN3_CODER if functions.FUNCTION in template else hermes.HERMES
    if granite.BEGIN in template:
        return granite.PHI4_MINI if granite.PHI_END in template else granite.GRANITE3
    if llama.PYTHON_TAG in template or ('"parameters":' in template and "<|start_header_id|>" in template):
        return llama.LLAMA
    return None
