"""A picture of 1,024 tokens in a prompt: vision tower and prefill, against Transformers in bf16, sides in turns; and streams of
other requests while such a picture is encoded.

The model has the shape of Qwen2.5-VL 3B and random weights. By default it has a quarter of the layers of both parts (one of the
tower's eight attends to the whole picture, as in the original), so that several models fit into memory; all layers cost the
same, and patches, merger and head are small beside them. Bars of issue 19: 3 times the speed of bf16; the 99th percentile of
the time between tokens is at most 4 times that of idle times.

    python -m benchmarks.pictures [--forms int8 bf16] [--layers 8 9] [--side 64] [--threads N] [--seconds 60]
    python -m benchmarks.pictures --streams 4 [--forms int8-int8]
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from deepseek_optimizer import DeepSeekConfig, DynamicGraphOptimizer
from deepseek_optimizer.bench.hardware import usable_cpus

from .alternating import alternate, clock_of, shown, speedup
from .verdict import MISSED, REACHED

FAST, STALL = 3.0, 4.0
TOWER = "model.visual.*"
# The language model is int4; by name, the format of the tower.
FORMS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {"formats": {TOWER: "int8"}},
    "int8-int8": {"formats": {TOWER: "int8"}, "activation": "int8"},
}
IMAGE, START = 151655, 151652  # token ids
PARTS = ("tower", "whole")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--layers", nargs=2, type=int, default=[8, 9], help="of the tower and of the language model")
    parser.add_argument("--side", type=int, default=64, help="patches in each direction; four make a token")
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=60.0, help="per part; no further round begins after this time")
    parser.add_argument(
        "--streams", type=int, default=0, help="number of streams while a picture is encoded; 0: compare speeds"
    )
    parser.add_argument("--busy", action="store_true", help="measure processor time, since the machine is busy")
    a = parser.parse_args()
    print(json.dumps(asyncio.run(measure_streams(a)) if a.streams else measure(a)))


def measure(a: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(a.threads)
    plain = make_model(*a.layers)
    models = {"transformers": plain}
    for form in a.forms:
        config = DeepSeekConfig(precision="int4", **FORMS[form], threads=a.threads)
        models[form] = DynamicGraphOptimizer(copy.deepcopy(plain), config=config).optimize()
    call = prompt(a.side)
    found: dict[str, Any] = {"tokens": call["input_ids"].shape[1], "layers": a.layers}
    for part in PARTS:
        times = alternate(
            {name: side(model, part, call) for name, model in models.items()}, a.rounds, a.seconds, clock_of(a.busy)
        )
        found[part] = {"times": times}
        for form in a.forms:
            ratio = found[part][form] = speedup(times, form, "transformers")
            print(f"{part}, {shown(form, ratio)}, {min(times[form]):.2f} s", flush=True)
            if part == "whole":
                ratio["verdict"] = REACHED if ratio["median"] >= FAST else MISSED  # type: ignore[assignment]
    return found


async def measure_streams(a: argparse.Namespace) -> dict[str, Any]:
    """The times between tokens of streams without a picture, and while one is encoded."""
    import torch

    from deepseek_optimizer.engine.picture_pace import PicturePace
    from deepseek_optimizer.engine.request import Request, SamplingParams
    from deepseek_optimizer.serving import make_async_engine

    torch.set_num_threads(a.threads)
    config = DeepSeekConfig(precision="int4", **FORMS[a.forms[-1]], threads=a.threads, kv_cache_memory=1 << 30)
    model = DynamicGraphOptimizer(make_model(*a.layers), config=config).optimize()
    encoder: Any = SimpleNamespace(pace=PicturePace())
    engine = make_async_engine(model, None, pictures=encoder, model_name="m")
    call = prompt(a.side)
    gaps: dict[bool, list[float]] = {False: [], True: []}
    encoding = False

    def encode() -> float:
        begin = time.perf_counter()
        with model.dso.backend.thread_context(), model.dso.pace.between(encoder.pace.next_piece):
            side(model, "tower", call)()
        return time.perf_counter() - begin

    async def stream(number: int) -> None:
        prompt_ids = [100 * number + i for i in range(32)]
        request = Request(prompt_ids, SamplingParams(max_tokens=4000, temperature=0, ignore_eos=True))
        last = None
        async for output in engine.submit(request):
            now = time.perf_counter()
            if output.token_ids and last is not None:
                gaps[encoding].append(now - last)
            last = now

    await engine.start()
    await asyncio.to_thread(side(model, "tower", call))  # compiles the plans
    with engine.admit(a.streams):
        streams = [asyncio.create_task(stream(n)) for n in range(a.streams)]
        await asyncio.sleep(a.seconds / 4)
        gaps[False].clear()  # prompts
        await asyncio.sleep(a.seconds / 4)
        encoding = True
        seconds = await asyncio.to_thread(encode)
        encoding = False
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    await engine.close()
    idle, busy = (
        {"p50": float(np.percentile(g, 50)), "p99": float(np.percentile(g, 99)), "tokens": len(g)}
        for g in (gaps[False], gaps[True])
    )
    ratio = busy["p99"] / idle["p99"]
    verdict = REACHED if ratio <= STALL else MISSED
    print(f"p99 {idle['p99'] * 1e3:.1f} ms, while encoding {busy['p99'] * 1e3:.1f} ms: {ratio:.2f}x, {verdict}", flush=True)
    return {"idle": idle, "encoding": busy, "seconds": seconds, "ratio": ratio, "verdict": verdict, "streams": a.streams}


def side(model: Any, part: str, call: dict[str, Any]) -> Callable[[], None]:
    """Runs one part: the vision tower, or the whole forward up to the logits of the last token."""
    import torch

    def run() -> None:
        with torch.inference_mode():
            if part == "tower":
                model.model.get_image_features(call["pixel_values"], call["image_grid_thw"])
            else:
                model(**call, use_cache=True, logits_to_keep=1)

    return run


def make_model(tower_layers: int, layers: int) -> Any:
    """A bf16 model of Qwen2.5-VL 3B's shape with random weights."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": layers, "num_attention_heads": 16,
            "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={
            "depth": tower_layers, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
            "out_hidden_size": 2048, "window_size": 112, "fullatt_block_indexes": list(range(7, 32, 8)),
        },
        image_token_id=IMAGE, vision_start_token_id=START, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("meta"):
        model: Any = Qwen2_5_VLForConditionalGeneration(config)
        model.to(torch.bfloat16)
    model.to_empty(device="cpu")
    model.tie_weights()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight") or ".norm" in name or "ln_q" in name:
            parameter.data.fill_(1.0)
        else:
            parameter.data.uniform_(-0.03, 0.03)
    for module in model.modules():  # frequencies, which are not parameters
        if hasattr(module, "compute_axial_rope_parameters"):
            module.inv_freq = module.compute_axial_rope_parameters(module.config)[0]
        elif hasattr(module, "compute_default_rope_parameters"):
            module.inv_freq = module.compute_default_rope_parameters(module.config)[0]
    return model.eval()


def prompt(side: int) -> dict[str, Any]:
    """A prompt with one picture of side x side patches, and what a processor makes of it."""
    import torch

    count = (side // 2) ** 2
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 150000, (16,), generator=generator).tolist()
    ids = torch.tensor([[*text[:8], START, *[IMAGE] * count, *text[8:]]])
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == IMAGE).int(),
        "image_grid_thw": torch.tensor([[1, side, side]]),
        "pixel_values": torch.randn(side * side, 3 * 2 * 14 * 14, generator=generator, dtype=torch.bfloat16),
    }  # fmt: skip


if __name__ == "__main__":
    main()
