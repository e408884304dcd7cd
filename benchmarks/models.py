"""What is measured on, made once in the user's cache directory: two models, each in every form that an engine reads.

smol: SmolLM2-135M-Instruct, real weights, from a package registry. r1q15: the shape of R1-Distill-Qwen-1.5B with random
weights; right for speed, meaningless as text.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from deepseek_optimizer.bench import smollm2
from deepseek_optimizer.bench.peers import get_peer
from deepseek_optimizer.bench.peers.environments import setup
from deepseek_optimizer.bench.peers.openvino import export_command
from deepseek_optimizer.bench.plain import dequantised

from . import gguf_file

TITLES = {"smol": "SmolLM2-135M", "r1q15": "R1-Distill-Qwen-1.5B shape"}


def model(name: str, form: str) -> Path:
    """Where a model lies; makes it where it is missing, whole or not at all.

    Args:
        name: of `TITLES`.
        form: "bf16" (a Transformers directory), "int4" or another precision (packed by us), "Q4_0" or another ggml type (a
            GGUF file), "openvino" (exported in int4); of smol also "gguf", the file it comes in.
    """
    if form == "gguf" and name == "smol":
        return smollm2.fetch()
    bf16 = dequantised(smollm2.fetch()) if name == "smol" else _once(smollm2.cache_directory() / name, _random_qwen2)
    if form == "bf16":
        return bf16
    if form.startswith("Q"):
        return _once(bf16.with_name(f"{bf16.name}-{form}.gguf"), lambda target: gguf_file.write(bf16, target, form))
    if form == "openvino":
        python = setup(get_peer("openvino"))
        return _once(bf16.with_name(f"{bf16.name}-openvino"), lambda target: _quietly(export_command(python, bf16, target)))
    return _once(bf16.with_name(f"{bf16.name}-{form}"), lambda target: _pack(bf16, target, form))


def _once(target: Path, make: Callable[[Path], None]) -> Path:
    if target.exists():
        return target
    part = target.with_name(f"partial-{target.name}")
    shutil.rmtree(part, ignore_errors=True)
    part.unlink(missing_ok=True)
    print(f"making {target}", file=sys.stderr)
    make(part)
    return part.rename(target)


def _quietly(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")


def _pack(source: Path, target: Path, precision: str) -> None:
    """By the command a user would type."""
    command = [sys.executable, "-m", "deepseek_optimizer", "convert", str(source), str(target), "--precision", precision]
    _quietly(command)


def _random_qwen2(target: Path) -> None:
    """Weights ~ N(0, 0.02), norms 1; SmolLM2's tokenizer stands in, since some engines want one."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960,
        vocab_size=151936, max_position_embeddings=131072, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    made = Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.fill_(1) if "norm" in name else p.zero_() if name.endswith("bias") else p.normal_(0, 0.02)
    made.save_pretrained(target)
    AutoTokenizer.from_pretrained(model("smol", "bf16")).save_pretrained(target)
