"""GGUF files in K-quants, IQ4 and 5-bit blocks: loaded without loss, with Transformers' logits on the file's own numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from deepseek_optimizer import load_model
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.errors import CheckpointError, ConfigError
from deepseek_optimizer.integration.load.pack_checkpoint import pack_checkpoint
from support.gguf_deepseek2 import v2_lite
from support.gguf_kquants import VOCAB, llama_file
from support.models import CASES, assert_close_rows, random_model

Q4_K_M = {"": "Q4_K", "attn_v": "Q6_K", "ffn_down": "Q6_K", "output": "Q6_K"}
MIXED = {
    "": "Q2_K", "attn_q": "Q3_K", "attn_k": "Q5_K", "attn_v": "IQ4_NL", "ffn_down": "IQ4_XS", "ffn_gate": "Q5_0",
    "ffn_up": "Q5_1", "output": "Q8_0",
}  # fmt: skip
ONE_TYPE = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "Q5_0", "Q5_1", "MXFP4"]
FILES = {"Q4_K_M": Q4_K_M, "mixed": MIXED} | {kind: {"": kind} for kind in ONE_TYPE}
IDS = torch.arange(2 * 37).view(2, 37) * 31 % VOCAB
NATIVE = pytest.mark.skipif(unavailable_reason() is not None, reason="no native build")


def save(folder: Path, kinds: dict[str, str]) -> Path:
    (folder / "m.gguf").write_bytes(llama_file(kinds))
    return folder / "m.gguf"


@torch.no_grad()
def transformers_logits(file: Path) -> torch.Tensor:
    """The logits of Transformers' model with the weights that gguf-py dequantizes."""
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(gguf_file=file.name, dequantize=True),
        dtype=torch.float32,
    )
    return model.eval()(IDS).logits


def formats(model: torch.nn.Module) -> set[str]:
    return {module.format for module in model.modules() if isinstance(getattr(module, "format", None), str)}


@torch.no_grad()
@pytest.mark.parametrize("kinds", FILES)
def test_the_reference_has_transformers_logits(tmp_path: Path, kinds: str) -> None:
    """Nothing is rounded in loading: the bound is that of fp32 sums."""
    file = save(tmp_path, FILES[kinds])
    model = load_model(file, backend="reference", kv_cache="fp32")
    assert formats(model) == {"int8" if kind == "Q8_0" else kind.lower() for kind in FILES[kinds].values()}
    assert not model.report().warnings
    assert_close_rows(model(IDS).logits, transformers_logits(file), 1e-4)


@NATIVE
@torch.no_grad()
@pytest.mark.parametrize("kinds", FILES)
def test_native_products_stay_within_the_error_of_activations(tmp_path: Path, kinds: str) -> None:
    """16-bit activations: kernels alone; 8-bit ones, the default: as int4's."""
    file = save(tmp_path, FILES[kinds])
    expected = transformers_logits(file)
    for activation, tolerance in ("int16", 3e-4), ("auto", 6e-2):
        model = load_model(file, backend="cpu", kv_cache="fp32", activation=activation)
        assert_close_rows(model(IDS).logits, expected, tolerance)
    past = model(IDS[:, :30], use_cache=True).past_key_values
    steps = [model(IDS[:, i : i + 1], past_key_values=past, use_cache=True).logits for i in range(30, 37)]
    assert_close_rows(torch.cat(steps, 1), expected[:, 30:], 6e-2)


@NATIVE
@torch.no_grad()
def test_converted_and_reported(tmp_path: Path) -> None:
    """The report names the formats; `dso convert` keeps them, and the packed checkpoint is the same model."""
    file = save(tmp_path, Q4_K_M)
    model = load_model(file, backend="cpu")
    assert model.report().to_dict()
    text = str(model.report())
    assert "q4_k" in text and "q6_k" in text
    told: list[str] = []
    pack_checkpoint(file, tmp_path / "packed", {}, tell=told.append)
    again = load_model(tmp_path / "packed", backend="cpu")
    assert told == [] and formats(again) == {"q4_k", "q6_k"}
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_model(tmp_path / "saved", backend="cpu")(IDS).logits, model(IDS).logits)


@NATIVE
@torch.no_grad()
def test_experts(tmp_path: Path) -> None:
    """Stacks of experts in superblocks, few and many tokens, against the reference on the same values."""
    random_model(
        v2_lite(hidden_size=256, num_attention_heads=4, num_key_value_heads=4, moe_intermediate_size=256, num_hidden_layers=2)
    ).save_pretrained(tmp_path)
    formats = {"*.mlp.experts.gate_up_proj": "q4_k", "*.mlp.experts.down_proj": "q6_k", "*.kv_b_proj": "fp32"}
    settings = {"formats": formats, "precision": "int8", "kv_cache": "fp32"}
    native, reference = (
        load_model(tmp_path, backend=backend, activation=activation, **settings)
        for backend, activation in (("cpu", "int16"), ("reference", "auto"))
    )
    for ids in (IDS, IDS[:, :1]):
        assert_close_rows(native(ids).logits, reference(ids).logits, 1e-3)


def test_other_iq_types_are_converted_with_a_line(tmp_path: Path) -> None:
    file = save(tmp_path, {"": "Q4_K", "ffn_up": "IQ3_S", "ffn_down": "TQ2_0"})
    with pytest.warns(UserWarning, match="2 matrices stored as IQ3_S converted to q4_1, which rounds them again"):
        model = load_model(file, backend="reference")
    assert formats(model) == {"q4_k", "q4_1", "int8"}


def test_a_type_that_nobody_reads(tmp_path: Path) -> None:
    data = llama_file({"": "Q4_K"})
    head = data.index(b"output.weight") + len(b"output.weight") + 4 + 2 * 8
    assert data[head] == 12, "Q4_K"
    (tmp_path / "m.gguf").write_bytes(data[:head] + b"\x0f" + data[head + 1 :])  # Q8_K, whose blocks are larger
    with pytest.raises(CheckpointError):
        load_model(tmp_path / "m.gguf")


def test_superblocks_need_whole_ones(tmp_path: Path) -> None:
    random_model(CASES["llama-gqa"]()).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="q4_k needs a multiple of 256 columns, but a matrix has"):
        load_model(tmp_path, formats={"lm_head": "q4_k"})
