"""The article's calls, chapter by chapter, as a reader would type them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, pipeline


def loading(path):  # 2.2
    from deepseek_optimizer import DeepSeekConfig, load_model

    config = DeepSeekConfig(precision="bf16", kernel_fusion=True, attention_optimization="flash")
    model = AutoModelForCausalLM.from_pretrained(
        path, torch_dtype=torch.bfloat16, device_map="auto", low_cpu_mem_usage=True, quantization_config=config
    )
    return model, load_model(path, config)


def dynamic_graph(model):  # 3.1
    from deepseek_optimizer import DynamicGraphOptimizer

    optimizer = DynamicGraphOptimizer(model, fusion_rules=["attention_softmax", "layer_norm"], batch_size_range=(4, 32))
    optimized = optimizer.optimize()
    print(optimizer.report())
    return optimized


@pytest.mark.filterwarnings("ignore::deepseek_optimizer.integration.bind.runtime.OptimizerWarning")
def test_loading(tiny_model):
    prompt = torch.tensor([[5, 6, 7]])
    answers = []
    for model in loading(tiny_model):
        assert isinstance(model, PreTrainedModel)
        answers.append(model.generate(prompt, max_new_tokens=8, do_sample=False).tolist())
    assert len(answers[0][0]) == 11
    assert {f["format"] for f in model.report().to_dict()["formats"]} == {"bf16"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", [0, "cuda", {"": 0}])
def test_a_missing_device(tiny_model, device):
    from deepseek_optimizer import ConfigError, DeepSeekConfig

    with pytest.raises(ConfigError, match='device_map="cpu"'):
        AutoModelForCausalLM.from_pretrained(tiny_model, device_map=device, quantization_config=DeepSeekConfig())


@pytest.mark.filterwarnings("ignore::deepseek_optimizer.integration.bind.runtime.OptimizerWarning")
def test_dynamic_graph(tiny_model, capsys):
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    prompt = torch.tensor([[5, 6, 7]])
    expected = plain.generate(prompt, max_new_tokens=12, do_sample=False)
    optimized = dynamic_graph(plain)
    assert torch.equal(optimized.generate(prompt, max_new_tokens=12, do_sample=False), expected)
    table = capsys.readouterr().out
    assert "rule attention_softmax" in table and "rule layer_norm" in table


def long_document(path, text):  # 4.2
    from deepseek_optimizer import sliding_window_mask

    tokenizer = AutoTokenizer.from_pretrained(path)
    chunks = tokenizer(text, truncation=False, max_length=4096, stride=1024, return_overflowing_tokens=True)
    for row, mask in zip(chunks["input_ids"], sliding_window_mask(chunks, window=1024, sinks=4), strict=False):
        # True: key j is visible to query i: j <= i, and i - j < window or j < sinks
        assert mask.shape == (len(row), len(row)) and mask.dtype == torch.bool
        yield mask


def test_long_document(tiny_model):
    (mask,) = long_document(tiny_model, "All that is gold does not glitter. " * 200)  # one long row: nothing is truncated
    i, j = torch.arange(len(mask))[:, None], torch.arange(len(mask))
    assert len(mask) == 7000 and torch.equal(mask, (j <= i) & ((i - j < 1024) | (j < 4)))


def benchmark(model, tokenizer):  # 5.1
    from deepseek_optimizer import benchmark_model

    result = benchmark_model(model, tokenizer, ["What is a hash table?", "Name three rivers."])
    print(result["p50"], result["p90"], result["throughput"])  # ms, ms, generated tokens per second


def test_benchmark(tiny_model, byte_tokenizer, capsys):
    from deepseek_optimizer import load_model

    for model in (AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), load_model(tiny_model)):
        benchmark(model, byte_tokenizer)
        p50, p90, throughput = map(float, capsys.readouterr().out.split())
        assert 0 < p50 <= p90 and throughput > 0


def dialogue(path):  # 4.1; device=0 on CUDA
    import deepseek_optimizer  # noqa: F401  registers the task

    chat = pipeline(
        "conversational",
        model=path,
        device="cpu",
        optimizer_config={"type": "deepseek_realtime", "max_length": 2048, "stream_output": True},
    )
    for token in chat("Explain the basic principles of quantum computing", max_length=100):
        print(token["generated_text"][-1], end="", flush=True)
    return chat


def test_dialogue(tiny_model, tmp_path, capsys):
    path = shutil.copytree(tiny_model, tmp_path / "model")
    # A random model with varied output that never ends early.
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    (path / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 2.0}))
    chat = dialogue(str(path))
    answer = capsys.readouterr().out
    assert answer and chat.messages == [
        {"role": "user", "content": "Explain the basic principles of quantum computing"},
        {"role": "assistant", "content": answer},
    ]
