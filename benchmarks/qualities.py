"""What each quality of a model in int8_nested costs, beside int4 and int8: KL divergence, or the speed of decoding.

    python -m benchmarks.qualities kl      # of SmolLM2 and tiny-v3, from the model in fp32
    python -m benchmarks.qualities speed   # of r1q15, in alternating runs; nothing else may run meanwhile

The divergence is that of texts of 512 tokens after prompts of 512. Rows with a prompt of another quality than the engine's say
what the precision of earlier tokens costs later ones. The speed is that of `Engine.generate` with one request and with eight.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from deepseek_optimizer import Request, SamplingParams, load_model, make_engine
from deepseek_optimizer.backends.qualities import QUALITIES, Quality, prompt_quality
from deepseek_optimizer.bench.hardware import cpu_name
from deepseek_optimizer.bench.quality import Divergence, after_prompt, through_prefill
from deepseek_optimizer.bench.unoptimized_model import load_unoptimized
from deepseek_optimizer.calibration.text import sample_text

from . import models
from .quality import TINY_V3

PROMPT, TEXT = 512, 512  # tokens
NESTED = "int8_nested"
OTHERS = ("int4", "int8")
OTHER_PROMPTS: tuple[tuple[Quality, Quality], ...] = (("balanced", "balanced"), ("exact", "fast"))  # of prompt and text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("kl", "speed"))
    parser.add_argument("--texts", type=int, default=2, help="how many stretches to evaluate")
    parser.add_argument("--tiny-v3", type=Path, default=TINY_V3)
    parser.add_argument("--model", default="r1q15", help="for the speed: a name of benchmarks.models")
    parser.add_argument("--runs", type=int, default=5, help="of each variant, in alternation")
    parser.add_argument("--tokens", type=int, default=64, help="to generate in a run")
    a = parser.parse_args()
    print(f"{cpu_name()}, {time.strftime('%Y-%m-%d')}")
    if a.what == "kl":
        _print_divergences(a)
    else:
        _print_speeds(a)


def _print_divergences(a: argparse.Namespace) -> None:
    smol = models.model("smol", "bf16")
    ids = AutoTokenizer.from_pretrained(smol)(sample_text(), verbose=False)["input_ids"]
    for title, path, tokens in (
        ("SmolLM2-135M", smol, np.array(ids)),
        ("tiny-v3", a.tiny_v3, np.load(a.tiny_v3 / "val_tokens.npy")),
    ):
        size = PROMPT + TEXT
        texts = [torch.from_numpy(tokens[n * size : (n + 1) * size].astype(np.int64))[None] for n in range(a.texts)]
        plain = load_unoptimized(path, torch.float32)
        references = [through_prefill(plain, text) for text in texts]
        del plain
        for name, logits in _variants(path):
            divergence = Divergence()
            for text, reference in zip(texts, references, strict=True):
                divergence.add(logits(text[0].tolist()), reference[PROMPT:], text[0, PROMPT:])
            found = divergence.summary()
            print(f"| {title} | {name:36} | {found['kl_mean']:.5f} | {found['same_top_percent']:.1f}% |", flush=True)


def _variants(path: Path) -> Iterator[tuple[str, Any]]:
    """Names, and functions from a text to the logits after its prompt."""
    for precision in OTHERS:
        model = load_model(path, precision=precision, mtp="off", calibration=None)
        plan = model.dso.plan
        yield precision, lambda ids, model=model, plan=plan: after_prompt(model, ids, PROMPT, plan, plan)
    model = load_model(path, precision=NESTED, mtp="off")
    plans = {quality: model.dso.compile(model.dso.graph, quality) for quality in QUALITIES}
    for first, then in (*((prompt_quality(quality), quality) for quality in QUALITIES), *OTHER_PROMPTS):
        name = f"{NESTED}, {then}" + (f", prompt {first}" if first != prompt_quality(then) else "")
        yield name, lambda ids, a=plans[first], b=plans[then]: after_prompt(model, ids, PROMPT, a, b)


def _print_speeds(a: argparse.Namespace) -> None:
    source = models.model(a.model, "bf16")
    engines = {name: make_engine(load_model(source, precision=name, calibration=None), drafts=False) for name in OTHERS}
    nested = make_engine(load_model(source, precision=NESTED), drafts=False)
    sides: dict[str, tuple[Any, Quality | None]] = {name: (engine, None) for name, engine in engines.items()}
    sides |= {f"{NESTED}, {quality}": (nested, quality) for quality in QUALITIES}
    found: dict[tuple[str, int], list[float]] = {(name, batch): [] for name in sides for batch in (1, 8)}
    for run in range(a.runs + 1):  # the first warms up
        for name, batch in found:
            rate = _rate(*sides[name], batch, a.tokens)
            if run:
                found[name, batch].append(rate)
    for (name, batch), rates in sorted(found.items(), key=lambda item: item[0][1]):
        spread = f"{min(rates):.1f} to {max(rates):.1f}"
        print(f"| {name:24} | {batch} | {statistics.median(rates):.1f} tokens/s | {spread} |", flush=True)


def _rate(engine: Any, quality: Quality | None, batch: int, tokens: int) -> float:
    """Tokens per second of a batch, without its prompts and its first tokens."""
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    requests = [Request([5 + n] * 16, sampling, id=str(n), quality=quality) for n in range(batch)]
    began, count = 0.0, 0
    started: set[str] = set()
    for outputs in engine.steps(requests):
        if len(started) == batch:
            count += sum(len(output.token_ids) for output in outputs)
        else:
            started |= {output.request_id for output in outputs if output.completion_tokens}
            began = time.perf_counter()
    return count / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
