"""Quality at equal sizes: our formats and llama.cpp's, each with its own way of using the same calibration text.

    python -m benchmarks.formats smol  --llama-cpp package/bins/linux-x64 --dialogues dialogues.jsonl
    python -m benchmarks.formats tiny-v3 --llama-cpp package/bins/linux-x64

The KL divergence from the original is measured on text that nothing was calibrated on: for SmolLM2, half of it dialogues that
it wrote itself (`benchmarks.own_dialogues`). llama.cpp's weights are dequantized and run in fp32, ours with 16-bit activations,
so that only the weights differ. Its importance matrix has what its own tool computes, the mean squares of all inputs.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoTokenizer

from deepseek_optimizer import load_model
from deepseek_optimizer.bench.hardware import cpu_name
from deepseek_optimizer.bench.quality import Divergence, through_prefill
from deepseek_optimizer.bench.unoptimized_model import load_unoptimized
from deepseek_optimizer.calibration.built_in import built_in_stretches
from deepseek_optimizer.calibration.text import sample_text, stretches
from deepseek_optimizer.quant import get_format

from . import gguf_file, models
from .llama_cpp_quantizer import FTYPES, LlamaCppQuantizer
from .quality import TINY_V3
from .weight_error import importance_of

BUDGETS = (0.3, 0.1, 0.05, 0.03, 0.02, 0.01)
LENGTH, COUNT = 512, 8  # tokens of a stretch, and the number of stretches to calibrate on


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=("smol", "tiny-v3"))
    parser.add_argument("--llama-cpp", type=Path, required=True, help="folder of its shared libraries")
    parser.add_argument("--dialogues", type=Path, help="JSON lines with messages; needed for smol")
    parser.add_argument(
        "--calibration-dialogues", type=Path, help="others, to calibrate on, with as many tokens of the built-in text"
    )
    parser.add_argument("--tiny-v3", type=Path, default=TINY_V3)
    parser.add_argument("--texts", type=int, default=4, help=f"stretches of {LENGTH} tokens to evaluate")
    parser.add_argument("--only", nargs="*", help="names of rows")
    a = parser.parse_args()
    case = _smol(a) if a.model == "smol" else _tiny_v3(a)
    print(f"{a.model}, {cpu_name()}, {time.strftime('%Y-%m-%d')}")
    print(f"| {'format':34} | bits per weight | KL divergence | same next token |\n|---|---|---|---|")
    for name, bits, found in case.rows(a.only):
        print(f"| {name:34} | {bits:.2f} | {found['kl_mean']:.4f} | {found['same_top_percent']:.1f}% |", flush=True)


class Case:
    """One model, the texts to calibrate and to evaluate on, and the files that are compared.

    Args:
        path: a directory in floats.
        evaluated: token ids, int64 [1, n] each.
        text: the text to calibrate on.
        folder: for files.
        quantizer: llama.cpp's.
    """

    def __init__(
        self,
        path: Path,
        evaluated: Sequence[torch.Tensor],
        text: str,
        folder: Path,
        quantizer: LlamaCppQuantizer,
    ) -> None:
        self.path, self._evaluated, self._folder, self._quantizer = path, evaluated, folder, quantizer
        self._text = folder / "calibration.txt"
        self._text.write_text(text, encoding="utf-8")
        self._plain = load_unoptimized(path, torch.float32)
        self._reference = [through_prefill(self._plain, ids) for ids in evaluated]
        tokenizer = AutoTokenizer.from_pretrained(path)
        self._importance = importance_of(self._plain, stretches(tokenizer, text, LENGTH))

    def rows(self, only: Sequence[str] | None) -> Iterator[tuple[str, float, dict[str, float]]]:
        """Name, bits per weight of all matrices, and `Divergence.summary`."""
        source = self._folder / "float.gguf"
        importance = self._in_floats(source)
        for ftype in FTYPES:
            if not only or ftype in only:
                target = self._folder / f"{ftype}.gguf"
                self._quantizer.quantize(source, target, ftype, importance)
                yield f"llama.cpp {ftype}", _bits(target), self._compared(load_model(target, precision="fp32"))
        tied = self._plain.config.tie_word_embeddings
        heads = ("model.embed_tokens",) if tied else ("model.embed_tokens", "lm_head")
        ours: dict[str, dict[str, Any]] = {
            "int3": {"precision": "int3", "calibration": None},
            "int3, calibrated": {"precision": "int3"},
            "int3, head int4, calibrated": {"precision": "int3", "formats": dict.fromkeys(heads, "int4")},
            "int4": {"precision": "int4", "calibration": None},
            "int4, calibrated": {"precision": "int4"},
            "q4_1": {"precision": "q4_1", "calibration": None},
            "q4_1, calibrated": {"precision": "q4_1"},
            **{f"kl_budget {budget}": {"kl_budget": budget} for budget in BUDGETS},
        }
        for name, options in ours.items():
            if not only or name in only:
                model = load_model(
                    self.path, **{"activation": "int16", "mtp": "off", "calibration": str(self._text), **options}
                )
                yield name, _own_bits(model), self._compared(model)

    def _in_floats(self, target: Path) -> dict[str, np.ndarray[Any, Any]]:
        """Writes the model as a GGUF file in floats; returns the importance of columns by the names in it."""
        by_name = {name.removesuffix(".weight"): values.numpy() for name, values in self._importance.items()}
        if self._plain.config.model_type == "llama":
            gguf_file.write(self.path, target, "F32")
            linear = {name: values for name, values in by_name.items() if "embed" not in name and "lm_head" not in name}
            return {gguf_file.renamed(f"{name}.weight"): values for name, values in linear.items()}
        from tests.support.gguf_deepseek2 import write_gguf

        write_gguf(target, self._plain, {"": "F32"}, tokenizer=lambda writer: _stand_in(writer, self._plain.config.vocab_size))
        return _latent_names(by_name, self._plain.config)

    def _compared(self, model: Any) -> dict[str, float]:
        divergence = Divergence()
        for ids, reference in zip(self._evaluated, self._reference, strict=True):
            divergence.add(through_prefill(model, ids), reference, ids[0])
        return divergence.summary()


def _stand_in(writer: Any, tokens: int) -> None:
    gguf_file.stand_in_tokenizer(writer, tokens)


def _latent_names(by_name: Mapping[str, Any], config: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Importance by the names of a GGUF file of DeepSeek-V3. Its key part of kv_b is stored transposed, so that its columns,
    which llama.cpp's tool would measure, are others: they count alike here."""
    from tests.support.gguf_deepseek2 import LAYER

    found: dict[str, np.ndarray[Any, Any]] = {}
    for name, values in by_name.items():
        if not name.startswith("model.layers."):
            continue
        _, _, layer, *path = name.split(".")
        block, part = f"blk.{layer}.", ".".join(path)
        heads = config.num_attention_heads
        if part == "self_attn.kv_b_proj":
            found[f"{block}attn_v_b.weight"] = np.tile(values, heads)
            found[f"{block}attn_k_b.weight"] = np.ones(heads * config.qk_nope_head_dim, np.float32)
        elif part.startswith("mlp.experts."):
            _, _, stack, _ = part.split(".")
            for leaf in ("ffn_gate_exps", "ffn_up_exps") if stack == "gate_up_proj" else ("ffn_down_exps",):
                found.setdefault(f"{block}{leaf}.weight", np.empty(0, np.float32))
        else:
            found[f"{block}{LAYER[part]}.weight"] = values
    for name in [name for name in found if "_exps" in name]:
        layer, stack = name.split(".")[1], "down_proj" if "down" in name else "gate_up_proj"
        prefix = f"model.layers.{layer}.mlp.experts.{stack}"
        width = config.moe_intermediate_size if stack == "down_proj" else config.hidden_size
        parts = [by_name.get(f"{prefix}.{i}", np.ones(width, np.float32)) for i in range(config.n_routed_experts)]
        found[name] = np.concatenate(parts)
    return found


def _own_bits(model: Any) -> float:
    """Bits per weight of the matrices of a model, except routers."""
    entries = model.dso.manifest.modules.values()
    sizes = [math.prod(entry.shape) for entry in entries]
    return sum(get_format(entry.format).bits * size for entry, size in zip(entries, sizes, strict=True)) / sum(sizes)


def _bits(path: Path) -> float:
    """Bits per weight of the matrices in a GGUF file that llama.cpp quantizes."""
    matrices = [t for t in gguf.GGUFReader(path).tensors if len(t.shape) > 1 and "gate_inp" not in t.name]
    return float(8 * sum(t.n_bytes for t in matrices) / sum(t.n_elements for t in matrices))


def _smol(a: argparse.Namespace) -> Case:
    path = models.model("smol", "bf16")
    tokenizer = AutoTokenizer.from_pretrained(path)
    half = a.texts // 2
    evaluated = stretches(tokenizer, _talk(tokenizer, a.dialogues), LENGTH, half)
    evaluated += stretches(tokenizer, sample_text(), LENGTH, a.texts - half)
    text = str(tokenizer.decode(torch.cat(built_in_stretches(tokenizer, LENGTH, COUNT), 1)[0]))
    if a.calibration_dialogues is not None:
        own = stretches(tokenizer, _talk(tokenizer, a.calibration_dialogues), LENGTH, COUNT)
        text += str(tokenizer.decode(torch.cat(own, 1)[0]))
    return Case(path, evaluated, text, Path(tempfile.mkdtemp()), LlamaCppQuantizer(a.llama_cpp))


def _talk(tokenizer: Any, file: Path) -> str:
    chats = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
    return "\n".join(str(tokenizer.apply_chat_template(chat, tokenize=False)) for chat in chats)


def _tiny_v3(a: argparse.Namespace) -> Case:
    tokenizer = AutoTokenizer.from_pretrained(a.tiny_v3)
    tokens = torch.from_numpy(np.load(a.tiny_v3 / "val_tokens.npy").astype(np.int64))[None]
    pieces = list(tokens.split(LENGTH, dim=1)[:-1])
    text = str(tokenizer.decode(torch.cat(pieces[a.texts : a.texts + 16], 1)[0]))
    return Case(a.tiny_v3, pieces[: a.texts], text, Path(tempfile.mkdtemp()), LlamaCppQuantizer(a.llama_cpp))


if __name__ == "__main__":
    main()
