"""Peak memory of every way to load: at most the packed size, the largest tensor and a little; of `dso convert`, which loads
nothing: at most the largest packed matrix, or some experts of a layer, and a little. Each in its own process.

DSO_TEST_MODEL=<directory with a float checkpoint of some GB> adds the slow test, on a model of real size.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.bench.peak_memory import PeakMemory
from support.checkpoint_files import ARRAY, F32, STRING, U32, gguf_bytes, gguf_tensor, model_values
from support.models import NATIVE_FAMILIES

pytestmark = [
    pytest.mark.skipif(PeakMemory().bytes() is None, reason="the system does not report a process's peak memory"),
    pytest.mark.skipif(unavailable_reason() is not None, reason="no native build: the reference packer's panels are larger"),
]

LAYERS, HIDDEN, INTERMEDIATE, VOCAB = 4, 1024, 8192, 16384
EXPERTS = 48  # of HIDDEN x HIDDEN: if they were merged as floats, they would need far more than the slack
SLACK = 150_000_000  # the float file is three times as large, so that keeping it in memory fails
CONVERT_SLACK = 100_000_000
BIG, BIG_SLACK = os.environ.get("DSO_TEST_MODEL"), 500_000_000

PROGRAM = """
import json, sys
import torch, transformers
import transformers.models.auto.modeling_auto, transformers.core_model_loading
import transformers.models.llama.modeling_llama, transformers.models.qwen2.modeling_qwen2
import transformers.models.deepseek_v4.modeling_deepseek_v4
import deepseek_optimizer, deepseek_optimizer_cli.app
from deepseek_optimizer.bench.peak_memory import PeakMemory
from deepseek_optimizer.checkpoint import open_checkpoint

way, path, out, precision = sys.argv[1:]
memory = PeakMemory()
if way == "load_model":
    model = deepseek_optimizer.load_model(path, precision="int4")
elif way == "from_pretrained":
    config = deepseek_optimizer.DeepSeekConfig(precision="int4")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
else:
    sys.argv[1:] = ["convert", path, out, "--precision", precision]
    try:
        deepseek_optimizer_cli.app.main()
    except SystemExit as stop:
        assert not stop.code
peak = memory.bytes()
if way == "convert":
    model = deepseek_optimizer.load_model(out)
tensors = [p.numel() * p.element_size() for p in model.parameters()]
with open_checkpoint(path) as checkpoint:
    sizes = [info.nbytes for info in checkpoint.tensors.values()]
pieces = [min(size, 64 << 20) if p.ndim == 4 else size for size, p in zip(tensors, model.parameters())]  # stacks have four axes
print(json.dumps({
    "peak": peak, "packed": sum(tensors), "largest packed": max(tensors), "largest piece": max(pieces), "largest": max(sizes),
    "file": sum(sizes),
}))
"""


def check(way: str, model: Path | str, out: Path, slack: int, precision: str = "bf16") -> None:
    """`precision`: of `dso convert`."""
    command = [sys.executable, "-c", PROGRAM, way, str(model), str(out), precision]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    if way == "convert":  # from file to file
        assert result["packed"] > result["largest piece"] + CONVERT_SLACK  # otherwise the test would show nothing
        assert result["peak"] <= result["largest piece"] + CONVERT_SLACK, result
        return
    assert result["file"] > result["largest"] + slack
    assert result["peak"] <= result["packed"] + result["largest"] + slack, result


def shapes() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Transformers' name -> GGUF's name and shape."""
    square, wide, tall = (HIDDEN, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
    block = {
        "self_attn.q_proj": ("attn_q", square), "self_attn.k_proj": ("attn_k", square), "self_attn.v_proj": ("attn_v", square),
        "self_attn.o_proj": ("attn_output", square), "mlp.gate_proj": ("ffn_gate", wide), "mlp.up_proj": ("ffn_up", wide),
        "mlp.down_proj": ("ffn_down", tall), "input_layernorm": ("attn_norm", (HIDDEN,)),
        "post_attention_layernorm": ("ffn_norm", (HIDDEN,)),
    }  # fmt: skip
    top = {"model.embed_tokens": ("token_embd", (VOCAB, HIDDEN)), "model.norm": ("output_norm", (HIDDEN,))}
    top["lm_head"] = ("output", (VOCAB, HIDDEN))
    layers = {
        f"model.layers.{i}.{name}": (f"blk.{i}.{short}", shape) for i in range(LAYERS) for name, (short, shape) in block.items()
    }
    return {f"{name}.weight": (f"{short}.weight", shape) for name, (short, shape) in {**top, **layers}.items()}


def completed(folder, config):
    """A folder of weights with a config and a tokenizer; the weights are large, so they are removed afterwards."""
    (folder / "config.json").write_text(json.dumps(config))
    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    yield folder
    (folder / "model.safetensors").unlink()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same sizes as a directory of safetensors and as GGUF: 0.6 GB, deleted after the tests."""
    folder = tmp_path_factory.mktemp("models")
    weights = {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, (_, shape) in shapes().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
        "intermediate_size": INTERMEDIATE, "vocab_size": VOCAB, "num_attention_heads": 16, "num_key_value_heads": 16,
        "max_position_embeddings": 256, "dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)  # `dso convert` copies it
    values = {
        **model_values("llama", LAYERS), "llama.embedding_length": (U32, HIDDEN),
        "llama.feed_forward_length": (U32, INTERMEDIATE), "llama.attention.head_count": (U32, 16),
        "llama.attention.head_count_kv": (U32, 16), "llama.rope.dimension_count": (U32, HIDDEN // 16),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, [f"t{i}" for i in range(VOCAB)])),
        "tokenizer.ggml.scores": (ARRAY, (F32, [0.0] * VOCAB)),
    }  # fmt: skip
    kinds = {1: "F32", 2: "F16"}
    stored = {shape: gguf_tensor("", torch.full(shape, 0.01), kinds[len(shape)]) for _, shape in shapes().values()}
    tensors = [(short, *stored[shape][1:]) for short, shape in shapes().values()]
    (folder / "model.gguf").write_bytes(gguf_bytes(values, tensors))
    yield {"safetensors": folder, "gguf": folder / "model.gguf"}
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    "way, kind",
    [("load_model", "safetensors"), ("load_model", "gguf"), ("convert", "safetensors"), ("from_pretrained", "safetensors")],
)
def test_peak_memory_stays_at_the_packed_size(models, tmp_path, way, kind):
    check(way, models[kind], tmp_path / "out", SLACK)


@pytest.fixture
def experts(tmp_path):
    """One layer of experts, as published by DeepSeek: 0.3 GB."""
    square = torch.full((HIDDEN, HIDDEN), 0.01, dtype=torch.bfloat16)
    layer, attention = "model.layers.0", {"q_proj": (96, HIDDEN), "kv_a_proj_with_mqa": (96, HIDDEN), "kv_b_proj": (128, 64)}
    shapes = {f"{layer}.self_attn.{name}": shape for name, shape in {**attention, "o_proj": (HIDDEN, 64)}.items()}
    shapes |= {f"{layer}.{name}_layernorm": (HIDDEN,) for name in ("input", "post_attention")}
    shapes |= {f"{layer}.mlp.gate": (EXPERTS, HIDDEN), f"{layer}.self_attn.kv_a_layernorm": (64,), "model.norm": (HIDDEN,)}
    shapes |= {"model.embed_tokens": (256, HIDDEN), "lm_head": (256, HIDDEN)}
    weights = {f"{name}.weight": torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}
    for role in ("gate", "up", "down"):
        weights |= {f"{layer}.mlp.experts.{e}.{role}_proj.weight": square.clone() for e in range(EXPERTS)}
        weights[f"{layer}.mlp.shared_experts.{role}_proj.weight"] = square.clone()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "hidden_size": HIDDEN, "num_hidden_layers": 1,
        "intermediate_size": HIDDEN, "moe_intermediate_size": HIDDEN, "n_routed_experts": EXPERTS, "n_shared_experts": 1,
        "num_experts_per_tok": 4, "first_k_dense_replace": 0, "num_attention_heads": 1, "num_key_value_heads": 1,
        "q_lora_rank": None, "kv_lora_rank": 64, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
        "vocab_size": 256, "max_position_embeddings": 256, "dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip
    yield from completed(tmp_path, config)


@pytest.mark.skipif("deepseek_v2" not in NATIVE_FAMILIES, reason="the native backend does not run these models yet")
@pytest.mark.parametrize("way", ["load_model", "from_pretrained", "convert"])
def test_experts_are_packed_one_by_one(experts, tmp_path, way):
    check(way, experts, tmp_path / "out", SLACK)


def write_zeros(folder: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """A safetensors file of zeros, which takes no space: dtype and shape of each tensor."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * {"BF16": 2, "F32": 4}.get(dtype, 1)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture
def v4(tmp_path):
    """A layer of DeepSeek-V4 as published, with FP8 matrices and FP4 experts: 0.3 GB of zeros."""
    count, heads, dim, rank = 192, 4, 64, 64

    def fp8(name: str, rows: int, cols: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        scales = ("F8_E8M0", (-(-rows // 128), -(-cols // 128)))
        return {f"layers.0.{name}.weight": ("F8_E4M3", (rows, cols)), f"layers.0.{name}.scale": scales}

    tensors = {name: ("BF16", (256, HIDDEN)) for name in ("embed.weight", "head.weight")}
    tensors |= {"hc_head_fn": ("F32", (2, 2 * HIDDEN)), "hc_head_base": ("F32", (2,)), "hc_head_scale": ("F32", (1,))}
    tensors |= fp8("attn.wq_a", rank, HIDDEN) | fp8("attn.wq_b", heads * dim, rank) | fp8("attn.wkv", dim, HIDDEN)
    tensors |= fp8("attn.wo_a", 2 * rank, heads * dim // 2) | fp8("attn.wo_b", HIDDEN, 2 * rank)
    vectors = {"attn.q_norm": rank, "attn.kv_norm": dim, "attn_norm": HIDDEN, "ffn_norm": HIDDEN}
    tensors |= {f"layers.0.{name}.weight": ("BF16", (size,)) for name, size in vectors.items()}
    tensors |= {"norm.weight": ("BF16", (HIDDEN,)), "layers.0.attn.attn_sink": ("F32", (heads,))}
    for block in ("attn", "ffn"):
        shapes = {"fn": (8, 2 * HIDDEN), "base": (8,), "scale": (3,)}
        tensors |= {f"layers.0.hc_{block}_{name}": ("F32", shape) for name, shape in shapes.items()}
    tensors |= {"layers.0.ffn.gate.weight": ("BF16", (count, HIDDEN)), "layers.0.ffn.gate.bias": ("F32", (count,))}
    for role in ("w1", "w2", "w3"):
        tensors |= fp8(f"ffn.shared_experts.{role}", HIDDEN, HIDDEN)
        for e in range(count):
            name = f"layers.0.ffn.experts.{e}.{role}"
            tensors |= {f"{name}.weight": ("I8", (HIDDEN, HIDDEN // 2)), f"{name}.scale": ("F8_E8M0", (HIDDEN, HIDDEN // 32))}
    write_zeros(tmp_path, tensors)
    config = {
        "model_type": "deepseek_v4", "architectures": ["DeepseekV4ForCausalLM"], "vocab_size": 256, "hidden_size": HIDDEN,
        "moe_intermediate_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": heads, "num_key_value_heads": 1,
        "head_dim": dim, "qk_rope_head_dim": 16, "q_lora_rank": rank, "o_groups": 2, "o_lora_rank": rank, "hc_mult": 2,
        "n_routed_experts": count, "num_experts_per_tok": 4, "num_hash_layers": 0, "compress_ratios": [0], "sliding_window": 32,
        "max_position_embeddings": 256, "num_nextn_predict_layers": 0, "dtype": "bfloat16", "tie_word_embeddings": False,
        "expert_dtype": "fp4", "quantization_config": {
            "quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128],
            "activation_scheme": "dynamic",
        },
    }  # fmt: skip
    yield from completed(tmp_path, config)


@pytest.mark.skipif("deepseek_v4" not in NATIVE_FAMILIES, reason="the native backend does not run these models yet")
def test_a_layer_of_deepseek_v4_is_converted_in_pieces(v4, tmp_path):
    check("convert", v4, tmp_path / "out", SLACK, precision="auto")


@pytest.mark.slow
@pytest.mark.skipif(BIG is None, reason="DSO_TEST_MODEL names no model")
@pytest.mark.parametrize("way", ["load_model", "convert", "from_pretrained"])
def test_peak_memory_of_a_large_model(tmp_path, way):
    check(way, BIG, tmp_path / "out", BIG_SLACK)
