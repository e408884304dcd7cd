"""DeepSeek's GGUF files, loaded and converted: the logits of Transformers with the file's values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepseek_optimizer import load_model
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.integration.load.pack_checkpoint import pack_checkpoint
from support.gguf_deepseek2 import dequantized, v2, v2_lite, v3, write_gguf, youtu
from support.models import assert_close_rows, random_ids, random_model, transformers_logits

MODELS = {"v2": v2, "v2_lite": v2_lite, "v3": v3, "youtu": youtu}
MIXED = {"": "Q4_0", "token_embd": "Q8_0", "ffn_down_exps": "Q4_1", "attn_output": "Q8_0", "attn_k_b": "F16", "attn_v_b": "F16"}
KINDS = {"F32": {"": "F32"}, "Q8_0": {"": "Q8_0"}, "Q4_0": {"": "Q4_0"}, "Q4_1": {"": "Q4_1"}, "mixed": MIXED}
# kv_b_proj is bf16 for any format of its halves, and floats are bf16 by default.
AS_STORED = {"F32": {"precision": "fp32"}}


@pytest.fixture(scope="module")
def models() -> dict:
    return {name: random_model(config()) for name, config in MODELS.items()}


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.filterwarnings("ignore:.*rounds them again")
def test_logits(tmp_path: Path, models: dict, family: str, kinds: str) -> None:
    """On the reference backend, in the file's formats."""
    path = write_gguf(tmp_path / "m.gguf", models[family], KINDS[kinds])
    model = load_model(path, backend="reference", kv_cache="fp32", **AS_STORED.get(kinds, {}))
    theirs = dequantized(models[family], KINDS[kinds])
    if kinds != "F32":  # tensors that no format represents exactly
        for name, parameter in theirs.named_parameters():
            if name.endswith("kv_b_proj.weight"):
                parameter.data = parameter.data.bfloat16().float()
    ids = random_ids(theirs.config, 40)
    with torch.no_grad():
        assert_close_rows(model(torch.tensor([ids])).logits[0], transformers_logits(theirs, ids))


@pytest.mark.skipif(unavailable_reason() is not None, reason="no native build")
@pytest.mark.parametrize("family", MODELS)
def test_logits_natively(tmp_path: Path, models: dict, family: str) -> None:
    """In fp32, so that kernels do not round."""
    path = write_gguf(tmp_path / "m.gguf", models[family], {"": "F32"})
    ids = random_ids(models[family].config, 40)
    with torch.no_grad():
        logits = load_model(path, precision="fp32", backend="cpu")(torch.tensor([ids])).logits[0]
    assert_close_rows(logits, transformers_logits(models[family], ids))


def test_formats_follow_the_file(tmp_path: Path, models: dict) -> None:
    model = load_model(write_gguf(tmp_path / "m.gguf", models["v3"], MIXED), backend="reference")
    actual = {name: module.format for name, module in model.named_modules() if isinstance(getattr(module, "format", None), str)}
    assert actual["model.embed_tokens"] == actual["model.layers.0.self_attn.o_proj"] == "int8"
    assert actual["model.layers.0.self_attn.q_b_proj"] == "int4" and actual["model.layers.2.self_attn.kv_b_proj"] == "bf16"
    weights = model.model.layers[1].mlp.experts.held()
    assert {leaf: weight.format for leaf, weight in weights.items()} == {"gate_up_proj": "int4", "down_proj": "q4_1"}
    assert not model.report().warnings


@pytest.mark.parametrize("family", ["v2_lite", "v3"])
@pytest.mark.filterwarnings("ignore:.*rounds them again")
def test_converted(tmp_path: Path, models: dict, family: str) -> None:
    """Converted shard by shard, saved by the model, and loaded from the file: the same model."""
    path = write_gguf(tmp_path / "m.gguf", models[family], KINDS["mixed"])
    pack_checkpoint(path, tmp_path / "packed", {"backend": "reference"}, shard_bytes=1)
    model = load_model(path, backend="reference")
    model.save_pretrained(tmp_path / "saved")
    ids = torch.tensor([random_ids(model.config, 20)])
    with torch.no_grad():
        expected = model(ids).logits
        for folder in ("packed", "saved"):
            assert torch.equal(load_model(tmp_path / folder, backend="reference")(ids).logits, expected)
    assert (tmp_path / "packed" / "config.json").read_bytes() == (tmp_path / "saved" / "config.json").read_bytes()


def test_skipped_mtp_layers_are_reported(tmp_path: Path, models: dict) -> None:
    def edit(values, arrays):
        values |= {"block_count": 4, "nextn_predict_layers": 1}
        arrays["blk.3.nextn.eh_proj.weight"] = arrays["blk.2.attn_output.weight"]

    path = write_gguf(tmp_path / "m.gguf", models["v3"], {"": "F16"}, edit=edit)
    with pytest.warns(UserWarning, match="multi-token prediction are left out"):
        load_model(path, backend="reference")
    messages: list[str] = []
    pack_checkpoint(path, tmp_path / "packed", {}, tell=messages.append)
    assert len(messages) == 1 and "multi-token prediction" in messages[0]
