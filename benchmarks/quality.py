"""What each format costs in quality, on SmolLM2-135M-Instruct and text that every Python ships: `make quality`.

For each format how far its next-token distributions are from the fp32 model's (`deepseek_optimizer.bench.quality`), through
prefill (the text at once) and through decode (token by token): their kernels differ. Transformers' own bf16 stands beside them.
SmolLM2's weights were 4-bit (Q4_1) before; `q4_1` holds them without loss, so its rows show what arithmetic alone costs, and
the others begin with weights rounded to bf16.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from transformers import AutoTokenizer

from deepseek_optimizer import load_model
from deepseek_optimizer.bench import smollm2
from deepseek_optimizer.bench.plain import dequantised, load_plain
from deepseek_optimizer.bench.process import cpu_name
from deepseek_optimizer.bench.quality import compare, sample_text, stretches, through_decode, through_prefill

SHOWN = ("kl_mean", "kl_median", "kl_999", "same_top_percent", "perplexity_ratio", "perplexity_ratio_error", "worst_logit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--texts", type=int, default=2, help="how many stretches of that many tokens")
    a = parser.parse_args()
    gguf = smollm2.fetch()
    bf16 = dequantised(gguf)
    texts = stretches(AutoTokenizer.from_pretrained(bf16), sample_text(), a.tokens, a.texts)
    reference = load_plain(gguf, torch.float32)
    rows: dict[str, dict[str, float]] = {}

    def add(name: str, model: Any, logits: Any) -> None:
        rows[name] = compare(model, reference, texts, logits)
        print(f"{name:34}" + "  ".join(f"{k} {rows[name][k]:.5f}" for k in SHOWN), flush=True)

    add("Transformers bf16", load_plain(bf16, torch.bfloat16), through_prefill)
    variants: list[tuple[str, Any, dict[str, Any]]] = [
        ("q4_1", gguf, {}),
        ("q4_1, fp32 cache", gguf, {"kv_cache": "fp32"}),
        ("q4_1, int8 cache", gguf, {"kv_cache": "int8"}),
        ("bf16", bf16, {"precision": "bf16"}),
        ("int8", bf16, {"precision": "int8"}),
        ("int8, int8 activations", bf16, {"precision": "int8", "activation": "int8"}),
        ("int4", bf16, {"precision": "int4"}),
        ("int4, 16-bit activations", bf16, {"precision": "int4", "activation": "int16"}),
    ]
    for name, path, options in variants:
        model = load_model(path, **options)
        add(f"{name}: prefill", model, through_prefill)
        add(f"{name}: decode", model, through_decode)
    print(json.dumps({"cpu": cpu_name(), "tokens": a.tokens * a.texts, "rows": rows}))


if __name__ == "__main__":
    main()
