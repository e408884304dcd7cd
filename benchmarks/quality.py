"""What each format costs in quality, on SmolLM2-135M-Instruct and text that every Python ships: `make quality`.

For each format the KL divergence of its next-token distribution from the fp32 model's (mean, median, 99.9%), how often both
name the same token, and the largest difference of logits in terms of the row's largest, through prefill (the text at once)
and through decode (token by token): their kernels differ. Transformers' own bf16 stands beside them. SmolLM2's weights were
4-bit (Q4_1) before; `q4_1` holds them without loss, so its rows show what arithmetic alone costs, and the others begin with
weights rounded to bf16.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from deepseek_optimizer import load_model
from deepseek_optimizer.bench import smollm2
from deepseek_optimizer.bench.demo import dequantised
from deepseek_optimizer.bench.process import cpu_name


def text() -> str:
    """English prose and code out of Python's own documentation."""
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics) if len(topics[name]) > 2000)


@torch.inference_mode()
def through_prefill(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """float32 [T, V]: the text at once."""
    logits: torch.Tensor = model(ids).logits[0].float()
    return logits


@torch.inference_mode()
def through_decode(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """float32 [T, V]: one token a call."""
    from deepseek_optimizer import PagedCache
    from deepseek_optimizer.integration.compat import cache_name

    cache = PagedCache(model)
    return torch.cat([model(ids[:, i : i + 1], **{cache_name(): cache}).logits[0] for i in range(ids.shape[1])])


def compare(logits: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    p, q = reference.log_softmax(-1), logits.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    largest = (logits - reference).abs().amax(-1) / reference.abs().amax(-1)
    return {
        "kl_mean": kl.mean().item(),
        "kl_median": kl.median().item(),
        "kl_999": kl.quantile(0.999).item(),
        "same_top": (logits.argmax(-1) == reference.argmax(-1)).float().mean().item(),
        "worst_logit": largest.max().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--texts", type=int, default=2, help="how many stretches of that many tokens")
    a = parser.parse_args()
    gguf = smollm2.fetch()
    bf16 = dequantised(gguf)
    all_ids = AutoTokenizer.from_pretrained(bf16)(text(), return_tensors="pt").input_ids
    stretches = [all_ids[:, i * a.tokens : (i + 1) * a.tokens] for i in range(a.texts)]
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32,
        quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
    )  # fmt: skip
    references = [through_prefill(model, ids) for ids in stretches]
    rows: dict[str, dict[str, float]] = {}

    def add(name: str, run: Any, model: Any) -> None:
        rows[name] = compare(torch.cat([run(model, ids) for ids in stretches]), torch.cat(references))
        print(f"{name:28}" + "  ".join(f"{k} {v:.5f}" for k, v in rows[name].items()), flush=True)

    add("Transformers bf16", through_prefill, AutoModelForCausalLM.from_pretrained(bf16, dtype=torch.bfloat16))
    for name, path, options in (
        ("q4_1", gguf, {}),
        ("q4_1, fp32 cache", gguf, {"kv_cache": "fp32"}),
        ("q4_1, int8 cache", gguf, {"kv_cache": "int8"}),
        ("bf16", bf16, {"precision": "bf16"}),
        ("int8", bf16, {"precision": "int8"}),
        ("int8, int8 activations", bf16, {"precision": "int8", "activation": "int8"}),
        ("int4", bf16, {"precision": "int4"}),
        ("int4, 16-bit activations", bf16, {"precision": "int4", "activation": "int16"}),
    ):
        model = load_model(path, **options)
        add(f"{name}: prefill", through_prefill, model)
        add(f"{name}: decode", through_decode, model)
    print(json.dumps({"cpu": cpu_name(), "tokens": a.tokens * a.texts, "rows": rows}))


if __name__ == "__main__":
    main()
