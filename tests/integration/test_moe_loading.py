"""Models with experts and latent attention: loaded from merged and separate experts in every way, saved, and still
Transformers models."""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deepseek_optimizer import CheckpointError, ConfigError, DeepSeekConfig, DynamicGraphOptimizer, load_model
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.min_formats import exact_weights, min_formats
from deepseek_optimizer.integration.bind.packed_experts import PackedExperts
from deepseek_optimizer.models import build_graph
from deepseek_optimizer.quant import FORMATS, SUPERBLOCKS, get_format, unpack
from support.models import CASES, assert_close_rows, random_ids, random_model, transformers_logits

FAMILIES = ["deepseek_v2-greedy", "deepseek_v3-groups", "deepseek_v32-indexer", "youtu-tied"]
WITH_EXPERTS = FAMILIES[:3]


def saved(folder: Path, case: str, dtype: torch.dtype = torch.float32) -> Path:
    """A random model saved by Transformers, with experts one by one."""
    random_model(CASES[case](), dtype=dtype).save_pretrained(folder)
    return folder


def merge_experts(folder: Path) -> None:
    """The other form: Transformers' parameters as in memory."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    save_file(
        {n: t.contiguous().clone() for n, t in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"}
    )


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory) -> Path:
    """Read-only."""
    return saved(tmp_path_factory.mktemp("moe") / request.param, request.param)


def by_load_model(folder: Path, **fields: Any) -> Any:
    return load_model(folder, backend="reference", **fields)


def by_from_pretrained(folder: Path, **fields: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=DeepSeekConfig(backend="reference", **fields))


def in_place(folder: Path, **fields: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return DynamicGraphOptimizer(model, config=DeepSeekConfig(backend="reference", **fields)).optimize()


ways = pytest.mark.parametrize("load", [by_load_model, by_from_pretrained, in_place])


def assert_same_weights(one: Any, other: Any) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@ways
def test_logits_equal_transformers(folder, load):
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", experts_implementation="eager")
    fast = load(folder)
    assert type(fast) is type(plain)
    ids = random_ids(plain.config, 40)
    expected = transformers_logits(plain, ids)
    with torch.no_grad():
        assert_close_rows(fast(torch.tensor([ids])).logits[0], expected)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning that this is slower
            inner = fast(torch.tensor([ids]), output_attentions=True, use_cache=False).logits[0]
    assert_close_rows(inner, expected)  # Transformers' forward over the packed modules


@ways
@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_every_way_packs_the_same(folder, load, precision):
    assert_same_weights(load(folder, precision=precision), by_load_model(folder, precision=precision))


@pytest.mark.parametrize("case", WITH_EXPERTS)
@pytest.mark.parametrize("load", [by_load_model, by_from_pretrained])
def test_merged_experts_load_too(tmp_path, case, load):
    apart = saved(tmp_path / "apart", case)
    merged = Path(shutil.copytree(apart, tmp_path / "merged"))
    merge_experts(merged)
    assert "model.layers.2.mlp.experts.gate_up_proj" in load_file(merged / "model.safetensors")
    assert "model.layers.2.mlp.experts.3.gate_proj.weight" in load_file(apart / "model.safetensors")
    assert_same_weights(load(merged, precision="int4"), load(apart, precision="int4"))


def test_the_stack_holds_each_expert_in_its_place(tmp_path):
    folder = saved(tmp_path, "deepseek_v3-groups")
    stored = load_file(folder / "model.safetensors")
    experts = by_load_model(folder, precision="int8").model.layers[1].mlp.experts
    assert isinstance(experts, PackedExperts)
    for e in range(experts.num_experts):
        found = [experts.gate_up.matrix(2 * e), experts.gate_up.matrix(2 * e + 1), experts.down.matrix(e)]
        for matrix, role in zip(found, ("gate", "up", "down"), strict=True):
            weight = stored[f"model.layers.1.mlp.experts.{e}.{role}_proj.weight"]
            assert torch.equal(unpack(matrix), unpack(type(matrix)("int8", *weight.shape, get_format("int8").pack(weight))))


@pytest.mark.parametrize("load", [by_load_model, by_from_pretrained])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_routers_stay_exact(tmp_path, load, stored):
    folder = saved(tmp_path, "deepseek_v3-groups", torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[bias] = tensors[bias].to(stored)
    tensors["model.layers.1.mlp.gate.weight"] = (
        tensors["model.layers.1.mlp.gate.weight"].float() * 1.001
    )  # values that bf16 cannot represent
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = load(folder, precision="int4")
    gate = model.model.layers[1].mlp.gate
    assert type(gate).__name__ == "DeepseekV3TopkRouter" and gate.weight.dtype == torch.float32
    assert torch.equal(gate.weight, tensors["model.layers.1.mlp.gate.weight"])
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(gate.e_score_correction_bias, tensors[bias].float())
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("case", FAMILIES)
def test_packed_checkpoints_round_trip(tmp_path, case):
    model = by_load_model(saved(tmp_path / "float", case), precision="int4")
    model.save_pretrained(tmp_path / "packed")
    mapped = by_load_model(tmp_path / "packed")
    assert_same_weights(mapped, model)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), model)
    mapped.save_pretrained(tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "packed" / file).read_bytes()
    ids = torch.tensor([random_ids(model.config, 9)])
    with torch.no_grad():
        assert torch.equal(mapped(ids).logits, model(ids).logits)


def test_transformers_save_keeps_the_packed_experts(tmp_path):
    model = by_load_model(saved(tmp_path / "float", "deepseek_v3-groups"), precision="int4")
    type(model).save_pretrained(model, tmp_path / "packed")  # as called for uploads and adapters
    assert_same_weights(by_load_model(tmp_path / "packed"), model)


def test_optimizing_in_place_frees_the_float_experts(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved(tmp_path, "deepseek_v3-groups"))
    floats = [layer.mlp.experts for layer in model.model.layers[1:]]
    DynamicGraphOptimizer(model, config=DeepSeekConfig(backend="reference", precision="int4")).optimize()
    assert all(not list(module.parameters()) for module in floats), "whoever still holds the modules holds no weights"


def test_a_copy_of_a_model(tmp_path):
    model = by_load_model(saved(tmp_path, "deepseek_v3-groups"), precision="int8")
    twin = copy.deepcopy(model)
    ids = torch.tensor([random_ids(model.config, 9)])
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, model(ids).logits)
    assert twin.dso.changed() is None
    twin.model.layers[1].mlp.experts.register_forward_hook(lambda *_: None)
    assert "experts" in twin.dso.changed() and model.dso.changed() is None


def test_adapters_on_attention_train_through_experts(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = by_load_model(saved(tmp_path, "deepseek_v3-groups"), precision="int8")
    with pytest.raises(ValueError, match="only 2d and 3d are supported"):  # experts, which PEFT includes in all linear modules
        get_peft_model(copy.deepcopy(model), LoraConfig(target_modules="all-linear", r=2))
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"], r=2))
    assert isinstance(wrapped.base_model.model.model.layers[1].mlp.experts, PackedExperts)
    ids = torch.tensor([random_ids(model.config, 12)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped(ids, labels=ids).loss.backward()
    grads = [p.grad for n, p in wrapped.named_parameters() if "lora_B" in n and "layers.0" in n]
    assert grads and all(g is not None and g.isfinite().all() and g.any() for g in grads)


@pytest.fixture(scope="module")
def v3(tmp_path_factory) -> Path:
    """Read-only."""
    return saved(tmp_path_factory.mktemp("formats"), "deepseek_v3-groups")


class TestFormats:
    def formats(self, v3, **fields):
        formats = by_load_model(v3, **fields).dso.manifest.formats()
        return {name.removeprefix("model.layers."): format for name, format in formats.items()}

    def test_a_name_overrides_patterns_and_the_first_pattern_wins(self, v3):
        found = self.formats(
            v3,
            precision="int4",
            formats={
                "model.layers.*.mlp.experts.*": "int8",
                "model.layers.2.*": "bf16",
                "model.layers.1.mlp.experts.down_proj": "q4_1",
            },
        )
        assert found["1.mlp.experts.down_proj"] == "q4_1"
        assert found["1.mlp.experts.gate_up_proj"] == found["2.mlp.experts.down_proj"] == "int8"
        assert found["2.mlp.shared_experts.up_proj"] == found["2.self_attn.q_b_proj"] == "bf16"
        assert found["1.mlp.shared_experts.up_proj"] == found["lm_head"] == "int4"

    @pytest.mark.parametrize("entry", ["model.layers.*.mlp.expert.*", "model.layers.1.mlp.experts", "model.layers.9.*"])
    def test_an_entry_that_matches_nothing(self, v3, entry):
        with pytest.raises(ConfigError, match=r"not a matrix of this model; did you mean 'model\.layers"):
            by_load_model(v3, formats={entry: "int8"})

    @pytest.mark.parametrize("entry", ["model.layers.1.mlp.gate", "*.mlp.gate"])
    def test_an_entry_for_a_router(self, v3, entry):
        with pytest.raises(ConfigError, match="always stays in its stored precision"):
            load_model(v3, formats={entry: "int4"}, backend="reference")

    def test_a_packed_checkpoint_accepts_its_own_settings(self, v3, tmp_path):
        by_load_model(v3, precision="int4").save_pretrained(tmp_path / "p")  # in which kv_b is int8
        assert by_load_model(tmp_path / "p", precision="int4").dso.config.precision == "int4"
        with pytest.raises(CheckpointError, match="is packed as int4, int8, not q4_1"):
            by_load_model(tmp_path / "p", precision="q4_1")

    @pytest.mark.parametrize("precision, kept", [("int4", "int8"), ("q4_1", "int8"), ("int8", "int8"), ("bf16", "bf16")])
    def test_kv_b_is_at_least_int8(self, v3, precision, kept):
        found = self.formats(v3, precision=precision)
        assert {f for n, f in found.items() if n.endswith("kv_b_proj")} == {kept}
        assert {f for n, f in found.items() if not n.endswith("kv_b_proj")} == {precision}

    def test_kv_b_may_be_smaller_on_request(self, v3):
        found = self.formats(v3, precision="int4", formats={"*.kv_b_proj": "int4"})
        assert set(found.values()) == {"int4"}

    def test_the_report_shows_the_minimum_format(self, v3):
        report = by_load_model(v3, precision="int4").report()
        assert any("3 x kv_b_proj kept in int8" in note for note in report.warnings)
        assert not any("kept in" in note for note in by_load_model(v3, precision="int8").report().warnings)
        named = by_load_model(v3, precision="int4", formats={"*.kv_b_proj": "bf16"})
        assert not any("kept in" in note for note in named.report().warnings)

    def test_a_packed_checkpoint_and_patterns(self, v3, tmp_path):
        by_load_model(v3, precision="int4", formats={"*.experts.*": "int8"}).save_pretrained(tmp_path / "m")
        by_load_model(tmp_path / "m", formats={"*.experts.*": "int8"})
        for other in ({"*.experts.*": "int4"}, {"*.nobody.*": "int8"}):
            with pytest.raises(CheckpointError, match="already packed in other formats"):
                by_load_model(tmp_path / "m", formats=other)


def test_tensors_with_minimum_formats():
    graph = build_graph(CASES["deepseek_v32-indexer"]())
    least = min_formats(graph)
    large = ("kv_b_proj", "indexer.wq_b", "indexer.wk")
    assert least == {f"model.layers.{i}.self_attn.{name}.weight": "int8" for i in range(3) for name in large}
    assert min_formats(rules.apply(graph, None)[0]) == least
    assert exact_weights(rules.apply(graph, None)[0]) == exact_weights(graph)
    routers = {f"model.layers.{i}.mlp.gate.{leaf}" for i in (1, 2) for leaf in ("weight", "e_score_correction_bias")}
    assert exact_weights(graph) == routers | {f"model.layers.{i}.self_attn.indexer.weights_proj.weight" for i in range(3)}
    dense = build_graph(CASES["llama-gqa"]())
    assert (min_formats(dense), exact_weights(dense)) == ({}, frozenset())


@pytest.mark.parametrize("format", [name for name in FORMATS if name not in SUPERBLOCKS])
def test_any_format(tmp_path, format):
    model = by_load_model(saved(tmp_path, "deepseek_v2-greedy"), formats={"*": format})
    ids = torch.tensor([random_ids(model.config, 7)])
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()
    assert set(model.dso.manifest.formats().values()) == {format}


def test_report_of_experts_and_latents(tmp_path):
    model = by_load_model(saved(tmp_path, "deepseek_v3-groups"), precision="int4")
    report = model.report()
    assert (report.experts.layers, report.experts.experts, report.experts.chosen) == (2, 12, 4)
    assert report.experts.bytes == sum(p.numel() for n, p in model.named_parameters() if ".experts." in n and "shared" not in n)
    assert report.kv_token_bytes == 3 * 2 * (40 + 12) and report.latent
    assert "bf16 latents, 312 bytes per token" in str(report) and "2 layers of 12, 4 per token" in str(report)
    stacks = next(row for row in report.formats if row.format == "int4")
    assert stacks.matrices == 1 + 1 + 3 * 4 + 3 + 2 * (
        3 * 12 + 3
    )  # embedding and head, attention without kv_b, dense MLP, experts and shared experts
    assert report.to_dict()["experts"]["experts"] == 12


def test_the_base_model_is_saved_with_its_experts_packed(tmp_path):
    model = DynamicGraphOptimizer(random_model(CASES["deepseek_v3-groups"]())).optimize()
    model.model.save_pretrained(tmp_path)
    written, own = load_file(tmp_path / "model.safetensors"), model.model.state_dict()
    assert written.keys() == own.keys()
    assert all(torch.equal(written[name], own[name]) for name in own)
