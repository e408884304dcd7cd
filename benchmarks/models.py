"""What is measured on, made once in the user's cache directory, each model in every form that an engine reads.

smol: SmolLM2-135M-Instruct, real weights, from a package registry. The others are shapes with random weights, right for speed,
meaningless as text: r1q15 that of R1-Distill-Qwen-1.5B, v2l6 that of DeepSeek-V2-Lite with 6 of its 27 layers, v2lite all of
them, as random blocks of a GGUF file: in floats it would not fit. v32 has two layers of DeepSeek-V3.2, a dense one and one of
experts, packed from the start, like v4 with three layers of DeepSeek-V4-Flash: one for each form of attention, and experts
chosen by token id as well as by score. v4l1 has one, which Transformers can run too. Their vocabulary is cut like their layers,
so that the head has the same share of a token's bytes as in the whole model.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepseek_optimizer.bench import smollm2
from deepseek_optimizer.bench.peers import get_peer
from deepseek_optimizer.bench.peers.environments import setup
from deepseek_optimizer.bench.peers.openvino import export_command
from deepseek_optimizer.bench.unoptimized_model import dequantized
from deepseek_optimizer.checkpoint.manifest import VERSION

from . import gguf_file, gguf_shapes, gguf_v2lite, random_packed

TITLES = {
    "smol": "SmolLM2-135M", "r1q15": "R1-Distill-Qwen-1.5B shape", "v2l6": "DeepSeek-V2-Lite shape, 6 layers",
    "v2lite": "DeepSeek-V2-Lite shape", "v32": "DeepSeek-V3.2 shape, 2 layers", "v4": "DeepSeek-V4-Flash shape, 3 layers",
    "v4l1": "DeepSeek-V4-Flash shape, 1 layer",
}  # fmt: skip


def model(name: str, form: str) -> Path:
    """Where a model lies; makes it where it is missing, whole or not at all.

    Args:
        name: of `TITLES`, or of `gguf_shapes.SHAPES`: those are GGUF files only.
        form: "bf16" (a Transformers directory), "int4" or another precision (packed by us), "Q4_0" or another ggml type (a
            GGUF file), "openvino" (exported in int4); of smol also "gguf", the file it comes in. With "-long" behind it, a
            directory's config claims 131,072 positions: right for speed, meaningless as text beyond what it was trained for.
    """
    if form.endswith("-long"):
        short = model(name, form.removesuffix("-long"))
        return _once(short.with_name(f"{short.name}-long"), lambda target: _with_long_context(short, target))
    if form == "gguf" and name == "smol":
        return smollm2.fetch()
    if name in gguf_shapes.SHAPES:
        return _once(smollm2.cache_directory() / f"{name}.gguf", lambda target: gguf_shapes.write(name, target))
    if name == "v2lite":
        return _v2lite(form)
    if name == "v32":
        return _v32(form)
    if name in _V4_KINDS:
        return _v4(name, form)
    random = {"r1q15": _random_qwen2, "v2l6": _random_deepseek_v2}
    bf16 = dequantized(smollm2.fetch()) if name == "smol" else _once(smollm2.cache_directory() / name, random[name])
    if form == "bf16":
        return bf16
    if form.startswith("Q"):
        return _once(bf16.with_name(f"{bf16.name}-{form}.gguf"), lambda target: gguf_file.write(bf16, target, form))
    if form == "openvino":
        python = setup(get_peer("openvino"))
        return _once(bf16.with_name(f"{bf16.name}-openvino"), lambda target: _quietly(export_command(python, bf16, target)))
    return _once(_packed(bf16, form), lambda target: _pack(bf16, target, form))


def _with_long_context(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=os.link)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 131072}))


def _v2lite(form: str) -> Path:
    """Random blocks of Q4_0, or the same blocks packed."""
    blocks = smollm2.cache_directory() / "v2lite-Q4_0.gguf"
    _once(blocks, lambda target: gguf_v2lite.write(target, "Q4_0"))
    if form == "Q4_0":
        return blocks
    if form != "int4":
        raise ValueError(f"v2lite is there as Q4_0 and as int4, not as {form}")
    return _once(_packed(blocks.with_name("v2lite"), "int4"), lambda target: _pack(blocks, target, "auto"))


def _v32(form: str) -> Path:
    from transformers import DeepseekV32Config

    if form != "int4":
        raise ValueError(f"v32 is there as int4 alone, not as {form}")
    yarn = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32,
        "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
    }  # fmt: skip
    config = DeepseekV32Config(num_hidden_layers=2, first_k_dense_replace=1, rope_parameters=yarn)  # the rest is V3.2's own
    target = _packed(smollm2.cache_directory() / "v32", "int4")
    return _once(target, lambda path: random_packed.write(config, path, "DeepseekV32ForCausalLM"))


_SPARSE, _HEAVY = "compressed_sparse_attention", "heavily_compressed_attention"
_V4_KINDS = {"v4": ("sliding_attention", _HEAVY, _SPARSE), "v4l1": (_SPARSE,)}


def _v4(name: str, form: str) -> Path:
    """As published: experts in MXFP4, other matrices in FP8; but the head in int8, which is published in bf16."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    kinds = _V4_KINDS[name]
    config = DeepseekV4Config(
        num_hidden_layers=len(kinds), layer_types=list(kinds), vocab_size=3008 * len(kinds), bos_token_id=1, eos_token_id=2,
        mlp_layer_types=["hash_moe", "moe", "moe"][-len(kinds) :],
    )  # fmt: skip
    target = smollm2.cache_directory() / name
    if form == "bf16" and name == "v4l1":
        return _once(target, lambda path: _random_model(DeepseekV4ForCausalLM, config, path))
    if form != "mxfp4":
        raise ValueError(f"{name} is there as mxfp4 alone, not as {form}")
    formats = {"lm_head.weight": "int8", "model.embed_tokens.weight": "int8"}

    def format_of(matrix: str) -> str:
        return formats.get(matrix, "mxfp4" if ".experts." in matrix else "fp8")

    return _once(_packed(target, form), lambda path: random_packed.write(config, path, "DeepseekV4ForCausalLM", format_of))


def _packed(source: Path, form: str) -> Path:
    """Where `source` lies packed. With the layout's version, since an earlier commit packs and reads its own."""
    return source.with_name(f"{source.name}-{form}-v{VERSION}")


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
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960,
        vocab_size=151936, max_position_embeddings=131072, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    _random_model(Qwen2ForCausalLM, config, target)


def _random_deepseek_v2(target: Path) -> None:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    config = DeepseekV2Config(
        num_hidden_layers=6, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, n_routed_experts=64,
        n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1, kv_lora_rank=512, q_lora_rank=None,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, num_attention_heads=16, num_key_value_heads=16,
        vocab_size=102400, topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0, norm_topk_prob=False,
        max_position_embeddings=32768, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    _random_model(DeepseekV2ForCausalLM, config, target)


def _random_model(kind: Any, config: Any, target: Path) -> None:
    """Weights ~ N(0, 0.02), norms 1; SmolLM2's tokenizer stands in, since some engines want one."""
    import torch
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    made = kind._from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.fill_(1) if "norm" in name else p.zero_() if name.endswith("bias") else p.normal_(0, 0.02)
    made.save_pretrained(target)
    AutoTokenizer.from_pretrained(model("smol", "bf16")).save_pretrained(target)
