"""This package on a CUDA card against other engines, in turns in one process: decoding and prompts, and the share of the card's
bandwidth that decoding reaches. Transformers is always there; vLLM and SGLang where they are installed; llama.cpp for the
formats that a GGUF file is given for.

    python -m benchmarks.gpu MODEL [--formats bf16 int4] [--batches 1 16 64] [--tokens 128] [--prompt 512] [--seconds 40]
        [--gguf bf16=FILE int4=FILE]

Results go to benchmarks/results/gpu-CARD.json. Not run yet: there was no card.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer.system.cuda_device import why_no_cuda

from . import results
from .alternating import alternate, speedup
from .gpu_llama_cpp import files_of, side_of

OURS = "ours "  # followed by the format
_COPIED = 1 << 30  # bytes that bandwidth is measured with
_ROUNDS = 9
_THEIRS, _OUR_CACHE = 0.35, 0.1  # of the card: vLLM and SGLang each, and our cache, which lie beside each other


class Side(Protocol):
    """An engine with a model."""

    def generate(self, prompts: list[list[int]], tokens: int) -> None:
        """Generates exactly this number of tokens after each prompt, greedily; returns when the device is done."""


class Ours:
    """`model`: its path or name; `precision`: the format of its weights."""

    def __init__(self, model: str, precision: str) -> None:
        import torch

        from deepseek_optimizer import load_model, make_engine

        cache = int(_OUR_CACHE * torch.cuda.mem_get_info()[1])
        self.model = load_model(model, device="cuda", precision=precision, kv_cache_memory=cache)
        self._engine = make_engine(self.model, drafts=False, prefix_cache=False)  # every round has the same prompts

    def generate(self, prompts: list[list[int]], tokens: int) -> None:
        from deepseek_optimizer.engine.request import SamplingParams

        self._engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True))

    def floor_bytes(self, contexts: list[int]) -> int:
        """Bytes that a step of decoding has to read; see `backends.cuda.traffic`."""
        from deepseek_optimizer.backends.cuda.traffic import decode_traffic
        from deepseek_optimizer.integration.bind.swap import matrices_of

        runtime = self.model.dso
        formats = {name: matrix.format for name, matrix in matrices_of(runtime.model, runtime.graph).items()}
        return decode_traffic(runtime.graph, formats, runtime.kv_dtype, contexts).floor


class Transformers:
    """In bf16, with its own attention and cache."""

    def __init__(self, model: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, device_map="cuda")

    def generate(self, prompts: list[list[int]], tokens: int) -> None:
        import torch

        ids = torch.tensor(prompts, device="cuda")
        self._model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        torch.cuda.synchronize()


class Vllm:
    def __init__(self, model: str) -> None:
        from vllm import LLM

        self._model: Any = LLM(model, dtype="bfloat16", gpu_memory_utilization=_THEIRS, enable_prefix_caching=False)

    def generate(self, prompts: list[list[int]], tokens: int) -> None:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        self._model.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


class Sglang:
    def __init__(self, model: str) -> None:
        import sglang

        self._model: Any = sglang.Engine(
            model_path=model, dtype="bfloat16", mem_fraction_static=_THEIRS, disable_radix_cache=True
        )

    def generate(self, prompts: list[list[int]], tokens: int) -> None:
        params = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}
        self._model.generate(input_ids=prompts, sampling_params=params)


OTHERS: Mapping[str, tuple[str, Callable[[str], Side]]] = {  # by name: the package, and the side
    "transformers": ("transformers", Transformers),
    "vllm": ("vllm", Vllm),
    "sglang": ("sglang", Sglang),
}


def available(has: Callable[[str], object] = find_spec) -> dict[str, Callable[[str], Side]]:
    """The other engines whose packages are installed."""
    return {name: side for name, (package, side) in OTHERS.items() if has(package) is not None}


def slug(card: str) -> str:
    """A card's name as part of a file's: "NVIDIA H100 80GB HBM3" -> "h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower().removeprefix("nvidia")).strip("-")


def measure(
    sides: Mapping[str, Side],
    batch: int,
    prompt: int,
    tokens: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Medians by side: tokens per second of decoding, milliseconds of the prompts, and the ratios of decoding to ours.

    A call with one token takes the time of the prompts; one with more tokens takes that and the time of decoding.
    """
    prompts = [[1 + (7 * row + 13 * i) % 1000 for i in range(prompt)] for row in range(batch)]
    found: dict[str, Any] = {}
    times = {}
    for count in (1, 1 + tokens):
        calls = {name: lambda s=side, n=count: s.generate(prompts, n) for name, side in sides.items()}
        times[count] = alternate(calls, _ROUNDS, seconds, clock)
    decoding: dict[str, list[float]] = {}
    for name in sides:
        first = statistics.median(times[1][name])
        decoding[name] = [max(long - first, 1e-9) for long in times[1 + tokens][name]]
        speed = batch * tokens / statistics.median(decoding[name])
        found[name] = {"prompt_ms": 1e3 * first, "decode_tok_s": speed}
    ours = next(name for name in sides if name.startswith(OURS))
    for name in sides:
        found[name]["against_ours"] = speedup(decoding, name, ours) if name != ours else None
    return found


def bandwidth_gb_s(seconds: float = 2.0) -> float:
    """What a copy within the card's memory reaches, reads and writes together, in GB/s."""
    import torch

    source = torch.zeros(_COPIED, dtype=torch.uint8, device="cuda")
    target, best, begin = torch.empty_like(source), float("inf"), time.perf_counter()
    while time.perf_counter() - begin < seconds:
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * _COPIED / best / 1e9


def bandwidth_percent(floor: int, batch: int, decode_tok_s: float, gb_s: float) -> float:
    """The share of the bandwidth that the necessary reads of decoding take."""
    return 100 * floor * decode_tok_s / batch / (gb_s * 1e9)


def main(argv: list[str] | None = None, directory: Path = results.DIRECTORY) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a directory of a checkpoint, or a name on the Hub")
    parser.add_argument("--formats", nargs="+", default=["bf16", "int4"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=40.0, help="per row and length, after which no further round begins")
    parser.add_argument("--gguf", nargs="+", default=[], help="FORMAT=FILE: llama.cpp runs this file beside that format")
    a = parser.parse_args(argv)
    files = files_of(a.gguf)
    if (reason := why_no_cuda()) is not None:
        raise ConfigError(f"the benchmark needs a card: {reason}")
    import torch

    card, gb_s = torch.cuda.get_device_name(), bandwidth_gb_s()
    for format_name in a.formats:
        ours = Ours(a.model, format_name)
        sides: dict[str, Side] = {f"{OURS}{format_name}": ours, **{n: make(a.model) for n, make in available().items()}}
        theirs = side_of(files, format_name, find_spec, max(a.batches), a.prompt + 1 + a.tokens)
        foreign = {name: make() for name, make in theirs.items()}
        sides.update(foreign)
        for batch in a.batches:
            found = measure(sides, batch, a.prompt, a.tokens, a.seconds)
            mine = found[f"{OURS}{format_name}"]
            floor = ours.floor_bytes([a.prompt + a.tokens // 2] * batch)
            mine["bandwidth_percent"] = bandwidth_percent(floor, batch, mine["decode_tok_s"], gb_s)
            row = f"{Path(a.model).name} {format_name}, {batch} of {a.prompt}+{a.tokens}"
            entry = {"card": card, "copy_gb_s": gb_s, "torch": torch.__version__, "sides": found}
            results.merge(f"gpu-{slug(card)}", {row: entry}, directory)
            print(row, found, flush=True)
        for side in foreign.values():
            side.close()
        del ours, sides
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
