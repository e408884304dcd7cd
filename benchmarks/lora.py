"""What LoRA adapters cost an engine: tokens per second of 64 requests with 16 adapters of rank 16 at random, over those of the
same requests without adapters, in alternating rounds in one process. Bar of issue 17: at least 0.8x.

The adapters have random matrices for every linear module that may have one. Prompts are random tokens, new in every round.

    python -m benchmarks.lora [smol r1q15 | MODEL_DIRECTORY ...] [--form int4] [--requests 64] [--adapters 16] [--rank 16]
                              [--prompt 128] [--new 64] [--batch 64] [--rounds 5] [--lora-dtype auto] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from . import models
from .prompts import random_prompts
from .verdict import MISSED, REACHED

BAR = 0.8  # times the throughput without adapters


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", default=["smol", "r1q15"])
    parser.add_argument("--form", default="int4", help="of a named model: bf16, int4, ...")
    for name, default in (
        ("requests", 64), ("adapters", 16), ("rank", 16), ("prompt", 128), ("new", 64), ("batch", 64), ("rounds", 5)
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lora-dtype", default="auto")
    parser.add_argument("--threads", type=int, default=None)
    a = parser.parse_args()
    for name in a.models:
        path = models.model(name, a.form) if name in models.TITLES else Path(name)
        result = measure(path, a)
        print(json.dumps({"model": name, "form": a.form, **result}), flush=True)


def measure(path: Path, a: argparse.Namespace) -> dict[str, Any]:
    """The figures of one model."""
    from deepseek_optimizer import load_model
    from deepseek_optimizer.serving import make_engine

    model = load_model(path, **({} if a.threads is None else {"threads": a.threads}))
    with tempfile.TemporaryDirectory() as directory:
        names = write_adapters(model, Path(directory), a.adapters, a.rank)
        options = {"prefix_cache": False, "drafts": False, "batch_size_range": (a.batch, a.batch)}
        adapters = {name: str(Path(directory) / name) for name in names}
        engines = {
            "none": make_engine(model, None, **options),
            "adapters": make_engine(
                model, None, **options, adapters=adapters, max_lora_rank=max(a.rank, 16), lora_dtype=a.lora_dtype
            ),
        }
        loaded = engines["adapters"].core.adapters
        assert loaded is not None
        sizes = [adapter.nbytes for adapter in loaded.loaded]
        speeds: dict[str, list[float]] = {side: [] for side in engines}
        for turn in range(-1, a.rounds):  # the first one warms up
            for side in sorted(engines, reverse=bool(turn % 2)):
                speed = _round(engines[side], names if side == "adapters" else [""], turn + 1, a)
                if turn >= 0:
                    speeds[side].append(speed)
    ratios = [with_ / without for with_, without in zip(speeds["adapters"], speeds["none"], strict=True)]
    ratio = statistics.median(ratios)
    return {
        "tok_s": {side: statistics.median(values) for side, values in speeds.items()},
        "ratios": ratios,
        "ratio": ratio,
        "adapter_mb": statistics.mean(sizes) / 1e6,
        "verdict": REACHED if ratio >= BAR else MISSED,
    }


def _round(engine: Any, names: Sequence[str], seed: int, a: argparse.Namespace) -> float:
    """Generated tokens per second of all requests together, prompts included in the time."""
    from deepseek_optimizer.engine.request import Request, SamplingParams

    chosen = random.Random(seed)
    sampling = SamplingParams(temperature=0, max_tokens=a.new, ignore_eos=True)
    prompts = random_prompts(seed, a.requests, a.prompt, engine.core.facts.vocab_size)
    requests = [Request(prompt, sampling, id=f"{seed}-{n}", adapter=chosen.choice(names)) for n, prompt in enumerate(prompts)]
    began = time.perf_counter()
    answers = engine.generate(requests)
    return sum(len(answer.token_ids) for answer in answers) / (time.perf_counter() - began)


def write_adapters(model: Any, directory: Path, count: int, rank: int) -> list[str]:
    """Writes adapters as PEFT does, and returns their names."""
    shapes: dict[str, tuple[int, int]] = {}  # (outputs, inputs)
    for site in model.dso.adapter_graph(rank).adapter_sites:
        shapes[site.module] = site.module_shape
    names = [f"adapter-{n}" for n in range(count)]
    for n, name in enumerate(names):
        generator = torch.Generator().manual_seed(n)
        tensors = {}
        for module, (outputs, inputs) in shapes.items():
            prefix = f"base_model.model.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.01
        folder = directory / name
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return names


if __name__ == "__main__":
    main()
