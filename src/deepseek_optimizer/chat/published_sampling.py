"""Sampling settings that the authors of models publish, for checkpoints whose generation config does not contain them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

Values = Mapping[str, float | int]


@dataclass(frozen=True)
class Published:
    """The settings of a family of models.

    Attributes:
        families: `model_type` of their configs, without "_text" at its end; empty: any.
        name: regular expression that a model's name must contain, ignoring case; empty: any name.
        values: fields of `SamplingParams`.
        not_thinking: the same for answers without reasoning; None: `values`.
    """

    families: tuple[str, ...]
    name: str
    values: Values
    not_thinking: Values | None = None


# The first entry that matches is used. Each comment is the source: a model card or generation_config.json on huggingface.co.
_TABLE = (
    # deepseek-ai/DeepSeek-R1, Usage Recommendations: temperature 0.5 to 0.7 (0.6), top-p 0.95; also for the distilled models,
    # whose model_type is that of Qwen2 or Llama.
    Published((), r"\br1\b|deepseek[-_]?r1", {"temperature": 0.6, "top_p": 0.95}),
    # deepseek-ai/DeepSeek-V3.2: "we recommend setting the sampling parameters to temperature = 1.0, top_p = 0.95".
    Published(("deepseek_v32",), "", {"temperature": 1.0, "top_p": 0.95}),
    # deepseek-ai/DeepSeek-V3.1, generation_config.json.
    Published(("deepseek_v3",), "", {"temperature": 0.6, "top_p": 0.95}),
    # deepseek-ai/DeepSeek-V2-Chat, generation_config.json.
    Published(("deepseek_v2",), "", {"temperature": 0.3, "top_p": 0.95}),
    # Qwen/Qwen3.5-35B-A3B, Best Practices, general tasks.
    Published(
        ("qwen3_5", "qwen3_5_moe"),
        "",
        {"temperature": 1.0, "top_p": 0.95, "top_k": 20, "min_p": 0.0, "presence_penalty": 1.5},
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0, "presence_penalty": 1.5},
    ),
    # Qwen/Qwen3-Coder-Next and Qwen3-Coder-30B-A3B-Instruct, Best Practices. They do not reason.
    Published(("qwen3_next",), r"coder", {"temperature": 1.0, "top_p": 0.95, "top_k": 40}),
    Published(
        ("qwen3", "qwen3_moe"), r"coder", {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    ),
    # Qwen/Qwen3-8B, Best Practices; Qwen3-30B-A3B-Instruct-2507, Qwen3-30B-A3B-Thinking-2507 and Qwen3-Next say the same.
    Published(
        ("qwen3", "qwen3_moe", "qwen3_next"),
        "",
        {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0},
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0},
    ),
    # Qwen/QwQ-32B, Usage Guidelines: top-k 20 to 40.
    Published(("qwen2",), r"qwq", {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0}),
    # Qwen/Qwen2.5-7B-Instruct, generation_config.json.
    Published(("qwen2", "qwen2_moe"), "", {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}),
    # HuggingFaceTB/SmolLM2-1.7B-Instruct, How to use.
    Published(("llama",), r"smollm-?2", {"temperature": 0.2, "top_p": 0.9}),
    # HuggingFaceTB/SmolLM3-3B: "We recommend setting temperature=0.6 and top_p=0.95".
    Published(("smollm3",), "", {"temperature": 0.6, "top_p": 0.95}),
    # meta-llama/Llama-3.1-8B-Instruct and Llama-4-Scout-17B-16E-Instruct, generation_config.json.
    Published(("llama",), r"llama-?3", {"temperature": 0.6, "top_p": 0.9}),
    Published(("llama4",), "", {"temperature": 0.6, "top_p": 0.9}),
    # google/gemma-3-4b-it and gemma-4-31B-it, generation_config.json.
    Published(("gemma3", "gemma4", "gemma4_unified"), "", {"temperature": 1.0, "top_p": 0.95, "top_k": 64}),
    # openai/gpt-oss: "We recommend sampling with temperature=1.0 and top_p=1.0" (github.com/openai/gpt-oss).
    Published(("gpt_oss",), "", {"temperature": 1.0, "top_p": 1.0}),
    # zai-org/GLM-4.6 and later; docs.z.ai, migration to GLM-4.6: temperature 1.0, top_p 0.95.
    Published(("glm4_moe",), "", {"temperature": 1.0, "top_p": 0.95}),
    # allenai/Olmo-3-7B-Think, generation_config.json.
    Published(("olmo3",), "", {"temperature": 0.6, "top_p": 0.95}),
    # LGAI-EXAONE/EXAONE-4.0-32B, Usage Guideline: 0.6 and 0.95 for reasoning, and a temperature below 0.6 otherwise.
    Published(("exaone4",), "", {"temperature": 0.6, "top_p": 0.95}),
    # docs.liquid.ai, Text Generation and Prompting, Recommended Settings: LFM2.5 and LFM2.
    Published(
        ("lfm2", "lfm2_moe"), r"lfm-?2\.5", {"temperature": 0.1, "top_p": 0.1, "top_k": 50, "repetition_penalty": 1.05}
    ),
    Published(("lfm2", "lfm2_moe"), "", {"temperature": 0.3, "min_p": 0.15, "repetition_penalty": 1.05}),
    # mistralai/Magistral-Small-2509, Sampling parameters; Mistral-Small-3.2-24B-Instruct-2506 and Devstral-Small-2507, Usage.
    Published(("mistral", "mistral3"), r"magistral", {"temperature": 0.7, "top_p": 0.95}),
    Published(("mistral", "mistral3"), r"mistral-?small|devstral", {"temperature": 0.15}),
    # MiniMaxAI/MiniMax-M2, Inference Parameters.
    Published(("minimax_m2",), "", {"temperature": 1.0, "top_p": 0.95, "top_k": 40}),
    # ByteDance-Seed/Seed-OSS-36B-Instruct, Quick Start.
    Published(("seed_oss",), "", {"temperature": 1.1, "top_p": 0.95}),
    # baidu/ERNIE-4.5-0.3B-PT and ERNIE-4.5-21B-A3B-PT, Best Practices.
    Published(("ernie4_5", "ernie4_5_moe"), "", {"temperature": 0.8, "top_p": 0.8}),
    # tencent/Hunyuan-7B-Instruct, Use with transformers.
    Published(
        ("hunyuan_v1_dense",), "", {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    ),
    # CohereLabs/c4ai-command-r7b-12-2024, Usage.
    Published(("cohere2",), "", {"temperature": 0.3}),
)  # fmt: skip


def published_sampling(family: str, name: str) -> Published | None:
    """The published settings for a model; None: there are none in the table.

    Args:
        family: `model_type` of its config.
        name: of the model or its files, such as "DeepSeek-R1-Distill-Qwen-1.5B".
    """
    family = family.removesuffix("_text")
    for entry in _TABLE:
        if (not entry.families or family in entry.families) and re.search(entry.name, name, re.IGNORECASE):
            return entry
    return None
