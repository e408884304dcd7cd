"""A model in several processes against one process with as many threads: speed of prompts and of decoding, in turns.
Bars of issue 22: with two processes of one thread each, 0.95x in prompts and 0.92x in decoding.

Both models are loaded in turns of one program; the processes of the one that waits are asleep. Nothing else may run meanwhile.

    python -m benchmarks.ranks [r1q15 | MODEL_DIRECTORY ...] [--form int4] [--tensor 2] [--expert 1] [--pipeline 1]
        [--prompt 512] [--new 64] [--rounds 7]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import models
from .alternating import alternate, shown, speedup
from .prompts import random_prompts
from .verdict import MISSED, REACHED

BARS = {"prompt": 0.95, "decode": 0.92}
WHOLE, DIVIDED = "one process", "several processes"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", default=["r1q15"])
    parser.add_argument("--form", default="int4", help="of a named model: bf16, int4, ...")
    for name, default in (("tensor", 0), ("expert", 1), ("pipeline", 1), ("prompt", 512), ("new", 64), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    a.tensor = a.tensor or (2 if a.expert * a.pipeline == 1 else 1)
    for name in a.models:
        path = models.model(name, a.form) if name in models.TITLES else Path(name)
        print(json.dumps({"model": name, "form": a.form, **measure(path, a)}), flush=True)


def measure(path: Path, a: argparse.Namespace) -> dict[str, Any]:
    """The figures of one model; the tokens of both are compared too."""
    from deepseek_optimizer import load_model

    dividing = {name: getattr(a, name) for name in ("tensor", "expert", "pipeline")}
    # Of a pipeline one process computes at a time, so each has all threads.
    threads = a.tensor * a.expert * a.pipeline
    loaded = {
        WHOLE: load_model(path, threads=threads),
        DIVIDED: load_model(path, threads=1 if a.pipeline == 1 else threads, parallel=dividing),
    }
    ids = torch.tensor(random_prompts(1, 1, a.prompt, loaded[WHOLE].config.vocab_size))
    texts: dict[str, list[int]] = {}
    result: dict[str, Any] = {}
    for phase, tokens in (("prompt", 1), ("decode", a.new)):
        given = ids if phase == "prompt" else ids[:, :8]
        times = alternate({name: _run(model, given, tokens, texts, name) for name, model in loaded.items()}, a.rounds, 600.0)
        ratio = speedup(times, DIVIDED, WHOLE)
        done = a.prompt if phase == "prompt" else a.new
        speeds = {name: round(done / sorted(values)[len(values) // 2], 1) for name, values in times.items()}
        print(shown(f"{phase}, several processes over one", ratio), speeds, flush=True)
        result[phase] = {
            "ratio": ratio,
            "tokens_per_second": speeds,
            "same_tokens": texts[WHOLE] == texts[DIVIDED],
            "verdict": REACHED if ratio["median"] >= BARS[phase] else MISSED,
        }
    return result


def _run(model: Any, ids: torch.Tensor, tokens: int, texts: dict[str, list[int]], name: str) -> Callable[[], None]:
    def run() -> None:
        output = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        texts[name] = output[0, ids.shape[1] :].tolist()

    return run


if __name__ == "__main__":
    main()
