"""Malicious checkpoints and configs of MoE and MLA models: rejected, with the field's name, before memory is allocated."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_optimizer import CheckpointError, ConfigError, load_model
from support.damaged_checkpoints import both_loaders, set_config, set_tensor
from support.models import CASES, random_model
from support.mtp_files import with_mtp

CASE = "deepseek_v3-groups"
EXPERTS = "model.layers.1.mlp.experts"
MTP = "model.layers.3"


def with_mtp_layer(folder: Path) -> None:
    """As published by DeepSeek: an additional layer with two norms, a projection, and copies of the embedding and the head."""
    path = folder / "model.safetensors"
    save_file(with_mtp(load_file(path), CASES[CASE]()), path, {"format": "pt"})


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "model"
    random_model(CASES[CASE]()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(original, tmp_path / "m"))


@both_loaders
@pytest.mark.parametrize(
    ("name", "to", "message"),
    [
        (f"{EXPERTS}.7.up_proj.weight", None, "lacks"),
        (f"{EXPERTS}.11.down_proj.weight", None, "lacks"),
        ("model.layers.2.mlp.gate.e_score_correction_bias", None, "lacks"),
        ("model.layers.2.mlp.gate.weight", None, "lacks"),
        ("model.layers.1.mlp.shared_experts.up_proj.weight", None, "lacks"),
        ("model.layers.0.self_attn.kv_b_proj.weight", None, "lacks"),
        (f"{EXPERTS}.12.down_proj.weight", lambda _: torch.zeros(72, 44), "expert 12, but the config has 12 experts"),
        (f"{EXPERTS}.3.gate_proj.weight", lambda t: t[:-1].clone(), r"\(43, 72\), but the config requires \(44, 72\)"),
        (f"{EXPERTS}.3.down_proj.weight", lambda t: t.t().contiguous(), r"\(44, 72\), but the config requires \(72, 44\)"),
        ("model.layers.2.mlp.gate.e_score_correction_bias", lambda t: t[:-1].clone(), r"the config requires \(12,\)"),
        ("model.layers.1.self_attn.kv_b_proj.weight", lambda t: t[:, :-1].clone(), "the config requires"),
        ("model.layers.1.self_attn.kv_a_proj_with_mqa.weight", lambda t: t[:-1].clone(), "the config requires"),
    ],
)
def test_tensors(folder, load, name, to, message):
    set_tensor(folder, name, to)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert caught.value.tensor == name and str(folder) in str(caught.value)


@both_loaders
@pytest.mark.parametrize(
    "name",
    [f"{EXPERTS}.7.up_proj.weight", f"{EXPERTS}.0.down_proj.weight", "model.layers.1.mlp.gate.e_score_correction_bias"],
)
def test_not_finite(folder, load, name):
    def spoil(tensor):
        tensor.view(-1)[7] = torch.nan
        return tensor

    set_tensor(folder, name, spoil)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\..*NaN"):
        load(folder)


@both_loaders
@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        (f"{EXPERTS}.7.up_proj.weight", torch.float8_e4m3fn, "stored as F8_E4M3.*quantization_config"),  # codes without scales
        ("model.layers.0.mlp.up_proj.weight", torch.int8, "stored as I8"),
        ("model.layers.1.input_layernorm.weight", torch.int32, "stored as I32"),
    ],
)
def test_no_weights(folder, load, name, dtype, message):
    """Transformers alone would cast them."""
    set_tensor(folder, name, lambda t: t.to(dtype))
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert caught.value.tensor == name


@both_loaders
def test_both_forms_of_experts(folder, load):
    set_tensor(folder, f"{EXPERTS}.down_proj", lambda _: torch.zeros(12, 72, 44))
    with pytest.raises(CheckpointError, match="under another name") as caught:
        load(folder)
    assert caught.value.tensor == f"{EXPERTS}.0.down_proj.weight"


@both_loaders
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts_per_tok": 13}, "num_experts_per_tok"),  # more than exist
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),  # more than the chosen groups have
        ({"n_group": 5}, "n_group"),
        ({"topk_group": 4}, "topk_group"),
        ({"n_routed_experts": 0}, "n_routed_experts"),
        ({"n_routed_experts": 1 << 40}, "n_routed_experts"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace"),
        ({"kv_lora_rank": 0}, "kv_lora_rank"),
        ({"qk_rope_head_dim": 11}, "qk_rope_head_dim"),  # an odd number of elements cannot be rotated in pairs
        ({"v_head_dim": 1 << 40}, "v_head_dim"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers"),
    ],
)
def test_configs(folder, load, fields, message):
    set_config(folder, **fields)
    with pytest.raises(ConfigError, match=message):
        load(folder)


@pytest.mark.parametrize("fields", [{"n_routed_experts": "12"}, {"kv_lora_rank": None}, {"moe_intermediate_size": 0.5}])
def test_types_that_transformers_config_rejects_too(folder, fields):
    set_config(folder, **fields)
    with pytest.raises(ConfigError, match=next(iter(fields))):
        load_model(folder)


@both_loaders
@pytest.mark.parametrize(
    ("fields", "tensor"),
    [
        ({"n_routed_experts": 15}, f"{EXPERTS}.12.gate_proj.weight"),
        ({"n_routed_experts": 9}, f"{EXPERTS}.10.down_proj.weight"),
        ({"kv_lora_rank": 48}, "kv_a_proj_with_mqa.weight"),
        ({"qk_nope_head_dim": 24}, "q_b_proj.weight"),
        ({"moe_intermediate_size": 1 << 18}, "experts.0.gate_proj.weight"),
    ],
)
def test_configs_of_another_model(folder, load, fields, tensor):
    set_config(folder, **fields)
    with pytest.raises(CheckpointError, match=tensor):
        load(folder)


class TestMtpLayers:
    @both_loaders
    @pytest.mark.parametrize(
        "name", ["eh_proj.weight", "hnorm.weight", "shared_head.norm.weight", "mlp.experts.5.up_proj.weight",
                 "mlp.gate.e_score_correction_bias", "self_attn.kv_b_proj.weight", "input_layernorm.weight"],
    )  # fmt: skip
    def test_half_present(self, folder, load, name):
        with_mtp_layer(folder)
        set_tensor(folder, f"{MTP}.{name}", None)
        with pytest.raises(CheckpointError, match="others of MTP layer 0") as caught:
            load(folder)
        assert caught.value.tensor == f"{MTP}.{name}"

    @both_loaders
    @pytest.mark.parametrize("name", ["embed_tokens.weight", "shared_head.head.weight"])
    def test_shared_tensors_may_be_missing(self, folder, load, name):
        with_mtp_layer(folder)
        set_tensor(folder, f"{MTP}.{name}", None)
        load(folder)

    @both_loaders
    def test_wrong_shapes(self, folder, load):
        with_mtp_layer(folder)
        set_tensor(folder, f"{MTP}.eh_proj.weight", lambda t: t[:, 1:].clone())
        with pytest.raises(CheckpointError, match=r"\(72, 143\), but the config requires \(72, 144\)") as caught:
            load(folder)
        assert caught.value.tensor == f"{MTP}.eh_proj.weight"

    def test_more_layers_than_in_the_config(self, folder):
        with_mtp_layer(folder)
        set_config(folder, num_nextn_predict_layers=0)
        with pytest.raises(CheckpointError, match=f"contains {MTP}.*does not have"):
            load_model(folder)

    @both_loaders
    def test_a_second_layer_without_the_first(self, folder, load):
        set_config(folder, num_nextn_predict_layers=2)
        set_tensor(folder, "model.layers.4.enorm.weight", lambda _: torch.ones(72))
        with pytest.raises(CheckpointError, match="lacks model.layers.3"):
            load(folder)


class TestPacked:
    @pytest.fixture
    def packed(self, original, tmp_path):
        load_model(original, precision="int4", backend="reference").save_pretrained(tmp_path / "p")
        return tmp_path / "p"

    @both_loaders
    def test_a_missing_expert(self, packed, load):
        set_config(packed, n_routed_experts=9)
        with pytest.raises(CheckpointError, match="the config requires"):
            load(packed)

    @both_loaders
    def test_a_missing_stack(self, packed, load):
        set_tensor(packed, f"{EXPERTS}.down_proj", None)
        with pytest.raises(CheckpointError, match="missing") as caught:
            load(packed)
        assert caught.value.tensor == f"{EXPERTS}.down_proj"

    @both_loaders
    def test_a_truncated_stack(self, packed, load):
        set_tensor(packed, f"{EXPERTS}.down_proj", lambda t: t[:-1].clone())
        with pytest.raises(CheckpointError, match=r"is U8 \(11, 5, 2, 288\); int4 \[12, 72, 44\] must be U8 \(12, 5, 2, 288\)"):
            load(packed)
