"""Digests of a tiny model's outputs through every entry point of the native library, under other default dtypes and devices of
torch. For `tests/test_default_dtype.py`, in its own process, since a bug would corrupt its memory.

python -m support.answers FOLDER [DEFAULT ...]     a default dtype, or device:NAME; one JSON object per line, in their order
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from deepseek_optimizer import load_model
from deepseek_optimizer.engine.request import SamplingParams
from deepseek_optimizer.integration.load.pack_checkpoint import pack_checkpoint
from deepseek_optimizer.serving import make_engine
from deepseek_optimizer.train.optimizer import DeepSeekAdamW
from deepseek_optimizer.train.prepare import prepare


def _digest(*tensors: torch.Tensor | None) -> str:
    result = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            result.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            result.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


def _files(folder: Path) -> str:
    return _digest(
        *(torch.frombuffer(bytearray(f.read_bytes()), dtype=torch.uint8) for f in sorted(folder.glob("*.safetensors")))
    )


def inference(model: Any) -> dict[str, str]:
    """Digests of a forward, generation alone and in a batch, a cache's contents, and a layer's forward and gradient."""
    ids = torch.arange(2 * 40, dtype=torch.int64, device="cpu").view(2, 40) * 7 % 250
    made = model(ids, output_hidden_states=True, use_cache=True)
    greedy = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True)
    torch.manual_seed(1)
    sampled = model.generate(ids[:1], max_new_tokens=8, do_sample=True)
    sampling = SamplingParams(max_tokens=6, seed=3, ignore_eos=True)
    engine = make_engine(model).generate([ids[0].tolist(), ids[1, :9].tolist()], sampling)
    x = torch.linspace(-1, 1, 3 * 64, dtype=torch.float32, device="cpu").view(3, 64).requires_grad_()
    y = model.model.layers[0].mlp.gate_proj(x)
    y.square().sum().backward()
    return {
        "forward": _digest(made.logits, *made.hidden_states),
        "cache": _digest(made.past_key_values.layers[0].keys, made.past_key_values.layers[1].values),
        "generate": _digest(greedy.sequences, *greedy.logits, sampled),
        "engine": str([completion.token_ids for completion in engine]),
        "layer": _digest(y, x.grad),
    }


def training(model: Any) -> dict[str, str]:
    """Digests of a loss, its gradients and the weights after two steps."""
    model = copy.deepcopy(model).train()
    prepared = prepare(model)
    optimizer = DeepSeekAdamW(model.parameters(), state="int8")
    batch = torch.arange(2 * 24, dtype=torch.int64, device="cpu").view(2, 24) * 5 % 250
    losses = []
    for _ in range(2):
        with prepared.saved:
            losses.append(model(input_ids=batch, labels=batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    prepared.undo()
    return {"losses": _digest(*losses), "weights": _digest(*model.parameters())}


def answers(path: Path, default: str) -> dict[str, str]:
    """Digests of models loaded before and after torch's default changed, on both backends, converted, saved and trained."""
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("cpu")
    before = load_model(path, precision="int8")
    float_model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if default.startswith("device:"):
        torch.set_default_device(default.removeprefix("device:"))
    else:
        torch.set_default_dtype(getattr(torch, default))
    result = {f"loaded before: {k}": v for k, v in inference(before).items()}
    for backend, precision, kv in (("cpu", "int8", "int8"), ("cpu", "fp32", "fp32"), ("reference", "int4", "int8")):
        model = load_model(path, precision=precision, backend=backend, kv_cache=kv)
        result |= {f"{backend}, {precision}: {k}": v for k, v in inference(model).items()}
    with tempfile.TemporaryDirectory() as folder:
        pack_checkpoint(path, Path(folder) / "packed", {"precision": "int4"})
        result["converted"] = _files(Path(folder) / "packed")
        model.save_pretrained(Path(folder) / "saved")
        result["saved"] = _files(Path(folder) / "saved")
    return result | training(float_model)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        print(json.dumps(answers(Path(sys.argv[1]), name)), flush=True)
