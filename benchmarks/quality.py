"""What each format costs in quality: `make quality`.

First the rounding alone (`weight_error.py`): our 4-bit formats beside ggml's types of the same size, on SmolLM2-135M-Instruct
and on tiny-v3, a DeepSeek-V3 model of 16 M weights that were never quantized. SmolLM2's were 4-bit (Q4_1) before, all but the
embedding's, so it is rounded a second time there. Then our engine: for each format how far its next-token distributions are
from the fp32 model's, through prefill (the text at once) and through decode (token by token), whose kernels differ;
Transformers' own bf16 stands beside them. "q4_1 as stored" is the GGUF file, taken over without loss: what arithmetic alone
costs; the others begin with weights rounded to bf16. The text is Python's documentation, and tiny-v3's own unseen documents.

    python -m benchmarks.quality [--out benchmarks/results/quality.json]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from deepseek_optimizer import load_model
from deepseek_optimizer.bench.hardware import cpu_name
from deepseek_optimizer.bench.quality import through_decode, through_prefill
from deepseek_optimizer.bench.unoptimized_model import load_unoptimized
from deepseek_optimizer.calibration.text import sample_text

from . import models, results
from .weight_error import Reference, measured

TINY_V3 = Path(__file__).parents[2] / "shared" / "models" / "tiny-v3"
CALIBRATION_TOKENS = 16_384
SHOWN = ("kl_mean", "kl_median", "kl_999", "same_top_percent", "perplexity_ratio", "perplexity_ratio_error", "worst_logit")
Row = tuple[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024, help="of a stretch that is evaluated")
    parser.add_argument("--texts", type=int, default=2, help="how many of them")
    parser.add_argument(
        "--tiny-v3", type=Path, default=TINY_V3, help="where that model lies; without it, its rows are left out"
    )
    parser.add_argument("--out", type=Path, help="JSON file to put the rows into")
    a = parser.parse_args()
    for name, row in _rows(a):
        shown = "  ".join(f"{key} {row[key]:.5f}" for key in SHOWN)
        print(f"{name:46}{shown}", flush=True)
        if a.out is not None:
            results.merge(a.out.stem, {name: {"cpu": cpu_name(), "date": time.strftime("%Y-%m-%d"), **row}}, a.out.parent)


def _rows(a: argparse.Namespace) -> Iterator[Row]:
    bf16 = models.model("smol", "bf16")
    tokenizer = AutoTokenizer.from_pretrained(bf16)
    evaluated, rest = _split(tokenizer(sample_text(), verbose=False)["input_ids"], a.tokens, a.texts)
    yield from _rounding("SmolLM2-135M", bf16, evaluated, rest)
    if a.tiny_v3.exists():
        yield from _rounding("tiny-v3", a.tiny_v3, *_split(np.load(a.tiny_v3 / "val_tokens.npy"), a.tokens, a.texts))
    else:
        print(f"tiny-v3 is left out: {a.tiny_v3} does not exist; name it with --tiny-v3")
    yield from _engine(bf16, evaluated, str(tokenizer.decode(torch.cat(rest, 1)[0])))


def _split(ids: Any, tokens: int, count: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The first `count` stretches of `tokens`, to evaluate; and CALIBRATION_TOKENS spread over the rest."""
    whole = torch.from_numpy(np.asarray(ids, dtype=np.int64))[None]
    evaluated = [whole[:, i * tokens : (i + 1) * tokens] for i in range(count)]
    rest = whole[:, count * tokens :].split(512, dim=1)[:-1]
    step = max(1, len(rest) * 512 // CALIBRATION_TOKENS)
    return evaluated, list(rest[::step])


def _rounding(title: str, path: Path, evaluated: Sequence[torch.Tensor], calibration: Sequence[torch.Tensor]) -> Iterator[Row]:
    for name, row in measured(load_unoptimized(path, torch.float32), evaluated, calibration):
        yield f"{title}, weights alone: {name}", row


def _engine(bf16: Path, evaluated: Sequence[torch.Tensor], calibration: str) -> Iterator[Row]:
    """Everything as a user gets it: rounded weights, rounded activations, our kernels."""
    gguf = models.model("smol", "gguf")
    reference = Reference(load_unoptimized(gguf, torch.float32), evaluated)
    yield "SmolLM2-135M: Transformers bf16", reference.compare(load_unoptimized(bf16, torch.bfloat16))
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "calibration.txt"
        text.write_text(calibration, encoding="utf-8")
        variants: list[tuple[str, Path, dict[str, Any]]] = [
            ("q4_1 as stored", gguf, {}),
            ("q4_1 as stored, fp32 cache", gguf, {"kv_cache": "fp32"}),
            ("q4_1 as stored, int8 cache", gguf, {"kv_cache": "int8"}),
            ("bf16", bf16, {"precision": "bf16"}),
            ("int8", bf16, {"precision": "int8"}),
            ("int8, int8 activations", bf16, {"precision": "int8", "activation": "int8"}),
            ("q4_1", bf16, {"precision": "q4_1", "calibration": None}),
            ("q4_1, calibrated", bf16, {"precision": "q4_1", "calibration": text}),
            ("int4", bf16, {"precision": "int4", "calibration": None}),
            ("int4, 16-bit activations", bf16, {"precision": "int4", "activation": "int16", "calibration": None}),
            ("int4, built-in text", bf16, {"precision": "int4", "calibration": "auto"}),
            ("int4, calibrated", bf16, {"precision": "int4", "calibration": text}),
        ]
        for name, path, options in variants:
            model = load_model(path, **options)
            for way, logits in (("prefill", through_prefill), ("decode", through_decode)):
                yield f"SmolLM2-135M: {name}: {way}", reference.compare(model, logits)


if __name__ == "__main__":
    main()
