"""Models whose files change while they are in use. A separate program, since a fault would kill the test process.

    python changed_files.py PACKED FLOAT WORK

prints the outcome of each case as one JSON object: the tokens of a call, or the type and text of its error.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from deepseek_optimizer import DeepSeekConfig, SamplingParams, load_model, make_engine
from deepseek_optimizer.checkpoint import Checkpoint
from deepseek_optimizer.integration.load.pack_op import PackWeight
from deepseek_optimizer.integration.model import save

IDS = torch.arange(60, 80)[None]
LOADERS: dict[str, Callable[[Path], Any]] = {"load_model": load_model, "from_pretrained": AutoModelForCausalLM.from_pretrained}


def overwritten(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    with open(file, "r+b") as handle:
        handle.write(data)


def replaced(file: Path) -> None:
    new = file.with_suffix(".new")
    new.write_bytes(bytes(file.stat().st_size))
    os.replace(new, file)


CHANGES: dict[str, Callable[[Path], None]] = {
    "emptied": lambda file: os.truncate(file, 0),
    "halved": lambda file: os.truncate(file, file.stat().st_size // 2),
    "overwritten": overwritten,
    "replaced": replaced,
    "removed": os.remove,
}


def outcome(call: Callable[[], Any]) -> Any:
    try:
        value = call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return value.tolist() if isinstance(value, torch.Tensor) else "ok"


def tokens(model: Any) -> Any:
    rest = {"attention_mask": torch.ones_like(IDS), "do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    return outcome(lambda: model.generate(IDS, **rest))


class Cases:
    """Loads models, each from its own copy of a checkpoint."""

    def __init__(self, packed: Path, work: Path) -> None:
        self.packed, self.work = packed, work

    def copy(self, name: str) -> Path:
        return Path(shutil.copytree(self.packed, self.work / name))

    def changes(self) -> dict[str, Any]:
        """Each kind of change to the file of a model that is in use, while another model uses another file."""
        other, result = load_model(self.packed), {}
        for way, load in LOADERS.items():
            for change, work in CHANGES.items():
                folder = self.copy(f"{way}-{change}")
                model, twin = load(folder), load_model(folder)
                before = tokens(model)
                work(folder / "model.safetensors")
                after = {"before": before, "after": tokens(model), "again": tokens(model), "twin": tokens(twin)}
                shutil.rmtree(folder)
                result[f"{way} {change}"] = {**after, "other": tokens(other), "loaded": tokens(load_model(self.packed))}
        return result

    def readers(self) -> dict[str, Any]:
        """Everything other than the plan that reads weights, with a file that was removed."""
        folder = self.copy("readers")
        model = load_model(folder)
        apart = copy.deepcopy(model)  # its weights are copied to memory
        expected = tokens(model)
        os.truncate(folder / "model.safetensors", 0)
        row, layer = torch.randn(1, 64), model.model.layers[0]
        calls = {
            "embedding": lambda: model.model.embed_tokens(IDS),
            "linear": lambda: layer.mlp.up_proj(row),
            "gradient": lambda: layer.mlp.up_proj(row.clone().requires_grad_()).sum().backward(),
            "dequantized": lambda: layer.mlp.up_proj.dequantized(),
            "table": lambda: model.get_input_embeddings().dequantized(),
            "forward": lambda: model(IDS),
            "save": lambda: model.save_pretrained(self.work / "saved"),
            "engine": lambda: make_engine(model).generate([[60, 61]], SamplingParams(max_tokens=4)),
            "own forward": lambda: model(IDS, output_attentions=True),  # must be last, since Transformers leaves its hooks
            "own save": lambda: model.save_pretrained(self.work / "saved"),
        }
        result = {name: outcome(call) for name, call in calls.items()}
        folder = self.copy("while saving")
        saving = load_model(folder)
        back = _once_before(save, "write_safetensors", lambda: os.truncate(folder / "model.safetensors", 0))
        result["cut while saving"] = outcome(
            lambda: saving.save_pretrained(self.work / "saved")
        )  # OSError: a system call reads
        back()
        return {**result, "saved": (self.work / "saved").exists(), "apart": tokens(apart) == expected}

    def loading(self, floats: Path) -> dict[str, Any]:
        """Files that are truncated or overwritten while they are read."""
        result = {}
        for name, load, packed, owner, hook, change in (
            ("load_model, cut", load_model, False, Checkpoint, "check_finite", CHANGES["halved"]),
            ("load_model, overwritten", load_model, False, Checkpoint, "check_finite", overwritten),
            ("load_model packed, cut", load_model, True, Checkpoint, "check_finite", CHANGES["halved"]),
            ("from_pretrained, cut", _packing, False, PackWeight, "_pack", CHANGES["emptied"]),
            ("from_pretrained, overwritten", _packing, False, PackWeight, "_pack", overwritten),
        ):
            folder = Path(shutil.copytree(self.packed if packed else floats, self.work / name))
            before = _once_before(owner, hook, lambda at=folder, do=change: do(at / "model.safetensors"))
            result[name] = outcome(lambda at=folder, load=load: load(at))
            before()
        return result

    def mapped(self, floats: Path) -> dict[str, bool]:
        """Whether a loaded model maps its file, and whether SIGBUS has a handler."""
        loads = {"float": (load_model, floats), "reference": (lambda path: load_model(path, backend="reference"), self.packed)}
        other = self.copy("other names")  # names that our reader does not look for
        os.rename(other / "model.safetensors", other / "model.x.safetensors")
        loads["other names"] = (lambda path: AutoModelForCausalLM.from_pretrained(path, variant="x"), other)
        loads |= {name: (load, self.packed) for name, load in LOADERS.items()}
        result = {"handler at first": _handled(signal.SIGBUS)}
        for name, (load, path) in loads.items():
            model = load(path)
            result[name] = f"{path}/" in Path("/proc/self/maps").read_text()
            if name == "reference":
                result["handler so far"] = _handled(signal.SIGBUS)
            del model
        return result | {"handler": _handled(signal.SIGBUS)}


def _handled(number: int) -> bool:
    """Whether this process has a handler of a signal."""
    status = Path("/proc/self/status").read_text()
    return bool(int(status.split("SigCgt:")[1].split()[0], 16) >> number - 1 & 1)


def _packing(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=DeepSeekConfig(precision="int8"))


def _once_before(owner: Any, name: str, work: Callable[[], None]) -> Callable[[], None]:
    """Calls `work` before the first call of a function of a class or module. Returns a function that undoes the patch."""
    real, left = getattr(owner, name), [work]

    def call(*args: Any, **kwargs: Any) -> Any:
        if left:
            left.pop()()
        return real(*args, **kwargs)

    setattr(owner, name, call)
    return lambda: setattr(owner, name, real)


if __name__ == "__main__":
    packed, floats, work = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    cases = Cases(packed, work)
    made = {"mapped": cases.mapped(floats), "changes": cases.changes(), "readers": cases.readers()}
    print(json.dumps({**made, "loading": cases.loading(floats)}))
