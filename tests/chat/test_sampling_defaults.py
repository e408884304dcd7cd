"""Default sampling parameters: those of the checkpoint, then the published ones of its family, then common ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import GenerationConfig

from deepseek_optimizer.chat.published_sampling import _TABLE, published_sampling
from deepseek_optimizer.chat.sampling_defaults import SOURCES, sampling_defaults
from deepseek_optimizer.engine.request import SamplingParams
from deepseek_optimizer.errors import ConfigError


def defaults(family="none", name="model", source="model", **checkpoint):
    config = GenerationConfig(**checkpoint)
    return sampling_defaults(SimpleNamespace(config=SimpleNamespace(model_type=family), generation_config=config), name, source)


@pytest.mark.parametrize(
    "source, expected",
    [
        ("model", {"temperature": 0.3, "top_p": 0.8, "top_k": 20, "min_p": 0.0}),
        ("vllm", {"temperature": 0.3, "top_p": 0.8}),
        ("openai", {}),
    ],
)
def test_sources(source, expected):
    assert defaults("qwen3", source=source, temperature=0.3, top_p=0.8).values == expected
    assert source in SOURCES


def test_a_model_without_any_settings():
    assert defaults().values == {"temperature": 0.7, "top_p": 0.95}
    assert defaults(top_p=0.5, top_k=40).values == {"temperature": 0.7, "top_p": 0.5, "top_k": 40}
    assert defaults(source="vllm").values == defaults(source="openai").values == {}


def test_a_temperature_of_the_checkpoint_gets_no_common_top_p():
    assert defaults(temperature=0.15).values == {"temperature": 0.15}


def test_do_sample_is_not_considered():
    assert defaults(do_sample=False, temperature=0.6).values["temperature"] == 0.6
    assert defaults(do_sample=False).values["temperature"] == 0.7


def test_qwen3_by_thinking():
    actual = defaults("qwen3_moe")
    assert actual.values == {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0}
    assert actual.not_thinking == {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0}
    assert defaults("qwen3", temperature=0.5).not_thinking["temperature"] == 0.5  # the checkpoint's


@pytest.mark.parametrize(
    "family, name, expected",
    [
        ("qwen2", "/models/DeepSeek-R1-Distill-Qwen-1.5B", (0.6, 0.95)),
        ("llama", "models--deepseek-ai--DeepSeek-R1-Distill-Llama-8B/snapshots/0123", (0.6, 0.95)),
        ("deepseek_v3", "r1-int4", (0.6, 0.95)),
        ("qwen2", "Qwen2.5-7B-Instruct", (0.7, 0.8)),
        ("llama", "/work/SmolLM2-135M-Instruct", (0.2, 0.9)),
        ("llama", "tiny", (0.7, 0.95)),
        ("gemma3_text", "gemma-3-4b-it", (1.0, 0.95)),
        ("qwen3_moe", "Qwen3-Coder-30B-A3B-Instruct", (0.7, 0.8)),
        ("qwen3_next", "Qwen3-Coder-Next", (1.0, 0.95)),
        ("qwen3_next", "Qwen3-Next-80B-A3B-Thinking", (0.6, 0.95)),
        ("lfm2", "LFM2.5-1.2B-Instruct", (0.1, 0.1)),
        ("mistral3", "Magistral-Small-2509", (0.7, 0.95)),
    ],
)
def test_families(family, name, expected):
    values = defaults(family, name).values
    assert (values["temperature"], values["top_p"]) == expected


def test_folders_above_the_model_do_not_count():
    assert published_sampling("llama", "tiny") is None
    assert defaults("llama", "/data/deepseek-r1/a/b/c").values == {"temperature": 0.7, "top_p": 0.95}


def test_every_entry_can_be_used():
    for entry in _TABLE:
        for values in (entry.values, entry.not_thinking or {}):
            SamplingParams(**values)


def test_values_of_the_checkpoint_are_checked():
    assert defaults(top_k=-1).values["top_k"] == 0
    broken = GenerationConfig()
    broken.top_p = 3.0
    model = SimpleNamespace(config=SimpleNamespace(model_type="llama"), generation_config=broken)
    with pytest.raises(ConfigError, match=r"generation_config.json: top_p"):
        sampling_defaults(model, "model")
