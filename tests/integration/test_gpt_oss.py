"""gpt-oss and Llama 4: experts that are stored transposed, loaded in every way and format; MXFP4 codes are kept."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from deepseek_optimizer import CheckpointError, DeepSeekConfig, DynamicGraphOptimizer, SamplingParams, load_model, make_engine
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.integration.load.pack_checkpoint import pack_checkpoint
from support import gguf_gpt_oss as gguf
from support import quantized_files as files
from support.calibrated import squares_read
from support.family_configs import gpt_oss, llama4_text
from support.models import assert_close_rows, random_ids, random_model, transformers_logits

BACKENDS = ["reference", *(["cpu"] if unavailable_reason() is None else [])]
ALL = {"num_experts_per_tok": 6}  # all experts, so that rounding does not change which are chosen
# Of a format's activations, against the model with the dequantized weights.
TOLERANCE = {"fp32": 1e-4, "int8": 1e-2, "int4": 1e-1, "mxfp4": 1e-1}


@pytest.fixture(scope="module", params=[gpt_oss, llama4_text], ids=["gpt_oss", "llama4_text"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only."""
    path = tmp_path_factory.mktemp("transposed") / "model"
    random_model(request.param(**ALL)).save_pretrained(path)
    return path


def plain_model(folder: Path) -> Any:
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **eager)


def by_load_model(folder: Path, **fields: Any) -> Any:
    return load_model(folder, **fields)


def by_from_pretrained(folder: Path, **fields: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=DeepSeekConfig(**fields))


def in_place(folder: Path, **fields: Any) -> Any:
    return DynamicGraphOptimizer(plain_model(folder), config=DeepSeekConfig(**fields)).optimize()


@torch.no_grad()
def logits(model: Any, ids: list[int], **options: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning that Transformers' forward is slower
        return model(torch.tensor([ids]), **options).logits[0].float()


def dequantized(model: Any, plain: Any) -> Any:
    """The plain model with the values of the packed weights."""
    for name, module in model.named_modules():
        if hasattr(module, "dequantized"):
            values = module.dequantized()
            leaves = ("gate_up_proj", "down_proj") if isinstance(values, tuple) else ("weight",)
            for leaf, value in zip(leaves, values if isinstance(values, tuple) else (values,), strict=True):
                plain.get_submodule(name).get_parameter(leaf).data.copy_(value)
    return plain


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_formats_against_their_dequantized_values(folder: Path, backend: str, precision: str) -> None:
    model = load_model(folder, precision=precision, backend=backend)
    plain = dequantized(model, plain_model(folder))
    ids = random_ids(plain.config, 60)
    expected = transformers_logits(plain, ids)
    assert_close_rows(logits(model, ids), expected, TOLERANCE[precision])
    inner = logits(model, ids, output_attentions=True, use_cache=False)  # Transformers' forward over the packed modules
    assert_close_rows(inner, expected, TOLERANCE[precision])


@pytest.mark.parametrize("load", [by_from_pretrained, in_place])
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_every_way_packs_the_same(folder: Path, load: Any, precision: str) -> None:
    one, other = (way(folder, precision=precision, backend="reference").state_dict() for way in (load, by_load_model))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_packed_checkpoints_round_trip(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder, precision="int4")
    model.save_pretrained(tmp_path / "packed")
    again = load_model(tmp_path / "packed")
    ids = random_ids(model.config, 40)
    assert torch.equal(logits(model, ids), logits(again, ids))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_engine_gives_the_tokens_of_transformers(folder: Path, backend: str) -> None:
    """Several texts at once, prompts in chunks, beyond the window of 37 tokens."""
    plain = plain_model(folder)
    engine = make_engine(load_model(folder, precision="fp32", kv_cache="fp32", backend=backend), step_tokens=29)
    prompts = [random_ids(plain.config, n, seed=n) for n in (5, 33, 70)]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = [plain.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p)), **options)[0].tolist() for p in prompts]
    answers = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    assert [p + a.token_ids for p, a in zip(prompts, answers, strict=True)] == expected


@pytest.mark.parametrize("folder", [gpt_oss], indirect=True, ids=["gpt_oss"])
def test_inputs_of_experts_when_rounding(folder: Path) -> None:
    """Down reads the clamped products, as in Transformers' module."""
    plain, model = plain_model(folder), load_model(folder, precision="fp32", backend="reference")
    ids = torch.tensor([random_ids(plain.config, 50)])
    seen: list[torch.Tensor] = []
    experts = plain.model.layers[0].mlp.experts
    apply = type(experts)._apply_gate
    experts._apply_gate = lambda both: seen.append(apply(experts, both)) or seen[-1]
    with torch.no_grad():
        plain(ids)
    squares = torch.cat(seen).square().sum(0)
    measured = squares_read(model, [ids])["model.layers.0.mlp.experts.down_proj"]
    torch.testing.assert_close(measured / squares.mean(), squares / squares.mean(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("folder", [llama4_text], indirect=True, ids=["llama4_text"])
def test_inputs_of_experts_with_weighted_inputs_when_rounding(folder: Path) -> None:
    plain, model = plain_model(folder), load_model(folder, precision="fp32", backend="reference")
    ids = torch.tensor([random_ids(plain.config, 50)])
    name, read = "model.layers.1.feed_forward.experts", []
    experts = plain.get_submodule(name)
    experts.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    with torch.no_grad():
        plain(ids)
        gate, up = torch.bmm(read[0].view(6, 50, -1), experts.gate_up_proj).chunk(2, -1)
    squares = (up * torch.nn.functional.silu(gate)).flatten(0, 1).square().sum(0)
    measured = squares_read(model, [ids])[f"{name}.down_proj"]
    torch.testing.assert_close(measured / squares.mean(), squares / squares.mean(), rtol=1e-3, atol=1e-4)


def test_an_expert_stack_of_another_shape_is_named(folder: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(folder, tmp_path / "m"))
    tensors = load_file(changed / "model.safetensors")
    name = next(name for name in tensors if ".layers.1." in name and name.endswith(".gate_up_proj"))
    tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"gate_up_proj.*\(6, 88, 72\).*requires \(6, 72, 88\)"):
        load_model(changed)


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint whose experts are MXFP4, in bf16 otherwise, and a float one with the values that Transformers gives it."""
    source = tmp_path_factory.mktemp("mxfp4")
    random_model(gpt_oss(hidden_size=96, intermediate_size=64, **ALL), dtype=torch.bfloat16).save_pretrained(source / "float")
    shutil.copytree(source / "float", source / "packed")
    stored, values = {}, {}
    for name, tensor in load_file(source / "float" / "model.safetensors").items():
        stored[name] = values[name] = tensor
        if name.endswith(("gate_up_proj", "down_proj")):
            del stored[name]
            parts, _ = files.mxfp4(tensor.transpose(1, 2))
            stored |= {f"{name}{suffix}": part.contiguous() for suffix, part in parts.items()}
            values[name] = convert_moe_packed_tensors(parts["_blocks"], parts["_scales"], dtype=torch.bfloat16).contiguous()
    save_file(stored, source / "packed" / "model.safetensors", {"format": "pt"})
    save_file(values, source / "float" / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "packed" / "config.json").read_text())
    section = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]}
    (source / "packed" / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    return source / "packed", source / "float"


@pytest.mark.parametrize("backend", BACKENDS)
def test_mxfp4_codes_are_kept(mxfp4: tuple[Path, Path], backend: str) -> None:
    packed, plain = mxfp4
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is rounded
        model = load_model(packed, backend=backend)
    expected = load_file(plain / "model.safetensors")
    for i, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts
        assert (experts.gate_up_format, experts.down_format) == ("mxfp4", "mxfp4")
        for leaf, values in zip(("gate_up_proj", "down_proj"), experts.dequantized(), strict=True):
            assert torch.equal(values, expected[f"model.layers.{i}.mlp.experts.{leaf}"].float())
    ids = random_ids(model.config, 60)
    assert_close_rows(logits(model, ids), transformers_logits(plain_model(plain), ids), TOLERANCE["mxfp4"])


def test_converted_mxfp4_codes_are_kept(mxfp4: tuple[Path, Path], tmp_path: Path) -> None:
    pack_checkpoint(mxfp4[0], tmp_path / "packed", {})
    one, other = (load_model(path, backend="reference").state_dict() for path in (mxfp4[0], tmp_path / "packed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_mxfp4_in_another_precision(mxfp4: tuple[Path, Path], precision: str) -> None:
    packed, plain = mxfp4
    model = load_model(packed, precision=precision)
    assert model.model.layers[0].mlp.experts.down_format == precision
    ids, own = random_ids(model.config, 60), plain_model(plain)
    before = own.model.layers[0].mlp.experts.down_proj.clone()
    expected = transformers_logits(dequantized(model, own), ids)
    assert_close_rows(logits(model, ids), expected, TOLERANCE[precision])
    assert torch.equal(own.model.layers[0].mlp.experts.down_proj, before)  # int8 holds the codes exactly too


@pytest.mark.parametrize("backend", BACKENDS)
def test_gguf(tmp_path: Path, backend: str) -> None:
    """Experts keep their MXFP4 codes; logits in fp32 are those of the dequantized model."""
    plain = random_model(gpt_oss(hidden_size=96, intermediate_size=64, head_dim=32, **ALL))
    path = gguf.write_gguf(tmp_path / "m.gguf", plain)
    plain = gguf.dequantized(plain)
    ids = random_ids(plain.config, 60)
    expected = transformers_logits(plain, ids)
    exact = load_model(path, precision="fp32", backend=backend)
    assert_close_rows(logits(exact, ids), expected)
    model = load_model(path, backend=backend)
    for own, theirs in zip(model.model.layers, plain.model.layers, strict=True):
        assert own.mlp.experts.gate_up_format == own.mlp.experts.down_format == "mxfp4"
        for leaf, values in zip(("gate_up_proj", "down_proj"), own.mlp.experts.dequantized(), strict=True):
            assert torch.equal(values, getattr(theirs.mlp.experts, leaf))
        assert torch.equal(own.mlp.experts.gate_up_proj_bias, theirs.mlp.experts.gate_up_proj_bias)
    assert_close_rows(logits(model, ids), expected, TOLERANCE["mxfp4"])


def test_a_gguf_file_without_the_biases_of_up(tmp_path: Path) -> None:
    model = random_model(gpt_oss(hidden_size=96, intermediate_size=64, head_dim=32))
    path = gguf.write_gguf(tmp_path / "m.gguf", model, without="ffn_up_exps.bias")
    with pytest.raises(CheckpointError, match=r"gate_proj_bias': is present without .*experts\.up_proj_bias"):
        load_model(path)
