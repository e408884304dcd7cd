"""Models without a family file, int8 by the general path, against Transformers in bf16 and fp32: one forward, sides in turns.

bert-base, t5-base and gpt2 are their shapes with random weights. BERT has a plan for encoders; it is measured here too, since
issue 16 names it. Bar: 1.5 times the speed of bf16 on batches of 1 and 16, results within int8's bound. A CPU without products
in bf16 (AVX-512 BF16, AMX) computes them in torch by converting to fp32, so fp32 is shown too.

    python -m benchmarks.general_path [bert t5 gpt2] [--batches 1 16] [--tokens 128] [--threads N] [--seconds 35]
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from typing import Any

from deepseek_optimizer import DeepSeekConfig, DynamicGraphOptimizer
from deepseek_optimizer.bench.hardware import usable_cpus

from .alternating import alternate, clock_of, shown, speedup
from .verdict import MISSED, REACHED

FAST = 1.5
ERROR = 0.05  # of a row's largest output; int8 weights differ from fp32 by about a hundredth after twelve layers
OURS: dict[str, dict[str, Any]] = {
    "int8": {"precision": "int8"}, "int8-int8": {"precision": "int8", "activation": "int8"},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", help=", ".join(MODELS) + "; all by default")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=35.0, help="per batch size; no further round begins after this time")
    parser.add_argument("--busy", action="store_true", help="measure processor time, since the machine is busy")
    a = parser.parse_args()
    if unknown := sorted(set(a.models) - MODELS.keys()):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(MODELS)}")
    for name in a.models or MODELS:
        for found in measure(name, a):
            print(json.dumps(found), flush=True)


def measure(name: str, a: argparse.Namespace) -> list[dict[str, Any]]:
    """What was found for each batch size."""
    import torch

    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    make, call = MODELS[name]
    exact = make().eval()
    models = {"fp32": exact, "bf16": copy.deepcopy(exact).to(torch.bfloat16)}
    models |= {
        form: DynamicGraphOptimizer(copy.deepcopy(exact), config=DeepSeekConfig(**fields, threads=a.threads)).optimize()
        for form, fields in OURS.items()
    }
    found = []
    for batch in a.batches:
        ids = torch.randint(5, exact.config.vocab_size, (batch, a.tokens))
        results: dict[str, Any] = {}
        sides = {form: _side(results, form, model, call, ids) for form, model in models.items()}
        times = alternate(sides, a.rounds, a.seconds, clock_of(a.busy))
        scale = results["fp32"].abs().amax(-1, keepdim=True)
        row: dict[str, Any] = {"model": name, "batch": batch, "tokens": a.tokens, "times": times}
        for form in ("bf16", *OURS):
            error = float(((results[form].float() - results["fp32"]).abs() / scale).max())
            row[form] = {
                "error": error,
                **{f"to_{side}": speedup(times, form, side) for side in ("bf16", "fp32") if side != form},
            }
        for form in OURS:
            ratio = row[form]["to_bf16"]
            row[form]["verdict"] = REACHED if ratio["median"] >= FAST and row[form]["error"] <= ERROR else MISSED
            against = f"{shown('bf16', ratio)}, {shown('fp32', row[form]['to_fp32'])}"
            print(f"{name}, batch {batch}, {form}: {against}, error {row[form]['error']:.4f}", flush=True)
        found.append(row)
    return found


def _side(results: dict[str, Any], name: str, model: Any, call: Callable[[Any, Any], Any], ids: Any) -> Callable[[], None]:
    import torch

    def run() -> None:
        with torch.inference_mode():
            results[name] = call(model, ids)

    return run


def _bert() -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig())


def _t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "d_kv": 64}
    config = T5Config.from_dict({**sizes, "decoder_start_token_id": 0})
    return T5ForConditionalGeneration(config)


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config())


# name -> (makes the model, its output for token ids: an encoder reads all of them, T5's decoder the first quarter)
MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any, Any], Any]]] = {
    "bert": (_bert, lambda model, ids: model(input_ids=ids).last_hidden_state),
    "t5": (_t5, lambda model, ids: model(input_ids=ids, decoder_input_ids=ids[:, : ids.shape[1] // 4]).logits),
    "gpt2": (_gpt2, lambda model, ids: model(input_ids=ids, logits_to_keep=1, use_cache=False).logits),
}


if __name__ == "__main__":
    main()
