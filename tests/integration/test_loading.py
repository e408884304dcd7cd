"""from_pretrained with a DeepSeekConfig, load_model, save_pretrained: the same packed model in every way."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepseek_optimizer import CheckpointError, ConfigError, DeepSeekConfig, UnsupportedModelError, load_model
from deepseek_optimizer.integration.bind.modules import PackedEmbedding, PackedLinear
from support.models import CASES, assert_close_rows, random_ids, random_model

FORMATS = ["fp32", "bf16", "int8", "int4"]
FAMILIES = ["llama-tied", "llama-biases", "qwen2-gqa", "qwen3-tied"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """case -> (a float checkpoint, its model), created once."""
    made = {}

    def get(case, dtype=torch.float32):
        if (case, dtype) not in made:
            folder = tmp_path_factory.mktemp("float") / case
            model = random_model(CASES[case](), dtype=dtype)
            model.save_pretrained(folder)
            made[case, dtype] = folder, model
        return made[case, dtype]

    return get


def config(**fields):
    return DeepSeekConfig(**{"backend": "reference", **fields})


def ids_for(model):
    return torch.tensor([random_ids(model.config, 30)])


def same(a, b):
    x, y = a.state_dict(), b.state_dict()
    return (
        x.keys() == y.keys()
        and all(torch.equal(x[k], y[k]) for k in x)
        and torch.equal(a(ids_for(a)).logits, b(ids_for(a)).logits)
    )


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("case", FAMILIES)
@torch.no_grad()
def test_every_way_loads_the_same_model(saved, tmp_path, case, precision):
    folder, plain = saved(case)
    first = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config(precision=precision))
    second = load_model(folder, config(), precision=precision)
    assert type(first) is type(second) is type(plain)
    assert same(first, second)
    first.save_pretrained(tmp_path / "packed")
    for again in (load_model(tmp_path / "packed"), AutoModelForCausalLM.from_pretrained(tmp_path / "packed")):
        assert type(again) is type(plain)
        assert same(again, first)
        assert again.config.quantization_config.precision == precision
        assert not again.training
    if precision == "fp32":
        assert_close_rows(first(ids_for(plain)).logits, plain(ids_for(plain)).logits)


def test_packed_and_unpacked_tensors(saved):
    folder, plain = saved("qwen2-gqa")
    model = load_model(folder, config(precision="int4"))
    kinds = {type(m) for m in model.modules()}
    assert PackedLinear in kinds and PackedEmbedding in kinds
    assert not {torch.nn.Linear, torch.nn.Embedding} & kinds
    for name, parameter in model.named_parameters():
        assert (parameter.dtype == torch.uint8) == (plain.get_parameter(name).ndim == 2)
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.bias"):
        assert torch.equal(model.get_parameter(name), plain.get_parameter(name))


def test_tied_weights_are_one_tensor(saved, tmp_path):
    folder, _ = saved("llama-tied")
    model = load_model(folder, config(precision="int8"))
    model.save_pretrained(tmp_path / "packed")
    for tied in (
        model,
        load_model(tmp_path / "packed"),
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config(precision="int8")),
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed"),
        copy.deepcopy(model),
    ):
        assert tied.lm_head.weight is tied.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_keeps_the_stored_weights(saved, dtype):
    folder, plain = saved("llama-gqa", dtype)
    for model in (
        load_model(folder, config()),
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config()),
    ):
        assert model.dtype == dtype
        for name, module in model.named_modules():
            if isinstance(module, (PackedLinear, PackedEmbedding)):
                assert torch.equal(module.dequantized(dtype), plain.get_submodule(name).weight)


@torch.no_grad()
def test_the_articles_arguments(saved):
    folder, _ = saved("llama-gqa")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            torch_dtype=torch.bfloat16,
            device_map="auto",
            low_cpu_mem_usage=True,
            quantization_config=config(precision="bf16"),
        )
    assert model.dtype == torch.bfloat16
    assert model.generate(ids_for(model), max_new_tokens=3, do_sample=False).shape == (1, 33)


def test_the_users_config_is_unchanged(saved):
    folder, _ = saved("llama-gqa")
    mine = config(precision="int8")
    before = copy.deepcopy(mine)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=mine)
    model = load_model(folder, mine)
    assert mine == before == model.dso.config
    assert model.dso.manifest.modules and model.config.packed_manifest == model.dso.manifest.to_dict()


def test_fields_override_the_config(saved):
    folder, _ = saved("llama-gqa")
    model = load_model(folder, config(precision="int8", kv_cache="int8"), precision="int4", prefill_chunk=7)
    settings = model.dso.config
    assert (settings.precision, settings.kv_cache, settings.prefill_chunk) == ("int4", "int8", 7)
    with pytest.raises(ConfigError, match="prefill_chunk"):
        load_model(folder, prefil_chunk=7)
    with pytest.raises(ConfigError, match="must be a DeepSeekConfig"):
        load_model(folder, {"precision": "int4"})


def test_a_packed_checkpoint_keeps_its_settings_by_default(saved, tmp_path):
    folder, _ = saved("llama-gqa")
    load_model(folder, config(precision="int8", kv_cache="int8")).save_pretrained(tmp_path / "p")
    assert load_model(tmp_path / "p").dso.config.kv_cache == "int8"
    assert load_model(tmp_path / "p", kv_cache="fp32").dso.config.kv_cache == "fp32"
    with pytest.raises(CheckpointError, match="is packed as int8, not int4; convert the original"):
        load_model(tmp_path / "p", precision="int4")
    with pytest.raises(ConfigError, match="precision must be one of 'auto', 'int3', 'int4'.*got 'int5'; did you mean 'int"):
        load_model(tmp_path / "p", precision="int5")
    with pytest.raises(ConfigError, match="kl_budget"):
        load_model(tmp_path / "p", kl_budget="much")


def test_the_generation_config_is_loaded(saved, tmp_path):
    folder, _ = saved("llama-gqa")
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    (source / "generation_config.json").write_text(json.dumps({"temperature": 0.25, "do_sample": True, "eos_token_id": [2, 9]}))
    model = load_model(source, config(precision="int8"))
    assert (model.generation_config.temperature, model.generation_config.eos_token_id) == (0.25, [2, 9])
    model.save_pretrained(tmp_path / "packed")
    assert load_model(tmp_path / "packed").generation_config.temperature == 0.25
    (source / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="generation_config.json"):
        load_model(source)


def test_sharded_checkpoint(saved, tmp_path):
    folder, plain = saved("llama-gqa")
    plain.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert same(load_model(tmp_path / "shards", config(precision="int4")), load_model(folder, config(precision="int4")))


# ---- saving


def test_saving_keeps_the_tokenizer_and_removes_old_shards(saved, tmp_path):
    folder, plain = saved("llama-gqa")
    plain.save_pretrained(tmp_path, max_shard_size="100KB")
    (tmp_path / "tokenizer.json").write_text("{}")
    model = load_model(folder, config(precision="int4"))
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert same(load_model(tmp_path), model)


def test_saving_over_the_mapped_checkpoint(saved, tmp_path):
    load_model(saved("llama-gqa")[0], config(precision="int4")).save_pretrained(tmp_path / "p")
    model = load_model(tmp_path / "p")
    before = model(ids_for(model)).logits
    model.save_pretrained(tmp_path / "p")
    assert torch.equal(model(ids_for(model)).logits, before)
    assert same(load_model(tmp_path / "p"), model)


def test_an_interrupted_save_leaves_nothing(saved, tmp_path, monkeypatch):
    from deepseek_optimizer.integration.model import save

    model = load_model(saved("llama-gqa")[0], config(precision="int4"))
    model.save_pretrained(tmp_path / "there")
    before = {p.name: p.read_bytes() for p in (tmp_path / "there").iterdir()}
    monkeypatch.setattr(save, "write_safetensors", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    for name in ("new", "there"):
        with pytest.raises(OSError, match="No space"):
            model.save_pretrained(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "there").iterdir()} == before


def test_writing_to_weights_does_not_reach_the_file(saved, tmp_path):
    load_model(saved("llama-gqa")[0], config(precision="int4")).save_pretrained(tmp_path / "p")
    before = (tmp_path / "p" / "model.safetensors").read_bytes()
    model = load_model(tmp_path / "p")
    model.load_state_dict({k: torch.zeros_like(v) for k, v in model.state_dict().items()})
    assert not model(ids_for(model)).logits.any()
    assert (tmp_path / "p" / "model.safetensors").read_bytes() == before


# ---- rejected calls


def change(folder, target, **fields):
    shutil.copytree(folder, target)
    raw = json.loads((target / "config.json").read_text())
    raw.update(fields)
    (target / "config.json").write_text(json.dumps(raw))
    return target


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"num_hidden_layers": -1}, ConfigError, "num_hidden_layers"),
        ({"num_attention_heads": 0}, ConfigError, "num_attention_heads"),
        ({"num_key_value_heads": 4}, ConfigError, "num_key_value_heads"),
        ({"num_hidden_layers": 4}, CheckpointError, "layers.3"),
        ({"num_hidden_layers": 2}, CheckpointError, "layers.2"),
        ({"vocab_size": 212}, CheckpointError, "embed_tokens"),
        ({"model_type": "unknown"}, UnsupportedModelError, "unknown.*llama"),
        ({"model_type": "bert"}, CheckpointError, "self.query.*is missing"),
        ({"quantization_config": {"quant_method": "hqq"}}, CheckpointError, "hqq"),
    ],
)
def test_load_model_rejects(saved, tmp_path, fields, error, message):
    folder = change(saved("llama-gqa")[0], tmp_path / "m", **fields)
    with pytest.raises(error, match=message):
        load_model(folder)


def test_from_pretrained_rejects(saved, tmp_path):
    folder, _ = saved("llama-gqa")
    with pytest.raises(UnsupportedModelError, match="gpt2.*llama"):
        from transformers import GPT2Config, GPT2LMHeadModel

        GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64)).save_pretrained(tmp_path / "gpt2")
        AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2", quantization_config=config(strict=True))
    with pytest.raises(ConfigError, match="float16|float32|bfloat16"):
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, quantization_config=config())
    with pytest.raises(ConfigError, match="one device"):
        AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config(), device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=tmp_path
        )
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    os.truncate(cut / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match="truncated"):
        AutoModelForCausalLM.from_pretrained(cut, quantization_config=config())


def drop(folder, target, name):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    del tensors[name]
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_missing_tensor_is_named(saved, tmp_path, name):
    folder = drop(saved("llama-gqa")[0], tmp_path / "m", name)
    with pytest.raises(CheckpointError, match=name):
        load_model(folder)


def test_a_missing_matrix_is_named_by_from_pretrained(saved, tmp_path):
    folder = drop(saved("llama-gqa")[0], tmp_path / "m", "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config())


@pytest.mark.parametrize("equal", [True, False])
def test_a_stored_head_despite_tying(saved, tmp_path, equal):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "m"
    shutil.copytree(saved("llama-tied")[0], folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if equal else 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if equal:
        assert same(load_model(folder, config()), load_model(saved("llama-tied")[0], config()))
    else:
        with pytest.raises(CheckpointError, match="lm_head.weight.*tie_word_embeddings"):
            load_model(folder, config())
        with pytest.raises(ConfigError, match="tie_word_embeddings"):
            AutoModelForCausalLM.from_pretrained(folder, quantization_config=config())


def test_paths_and_names(tmp_path):
    for name in (tmp_path / "none", "./none", "none.gguf", "a/b/c"):
        with pytest.raises(CheckpointError, match="does not exist"):
            load_model(name)
    with pytest.raises(CheckpointError, match="neither a local path nor a model that the hub provides"):
        load_model("nobody-here/no-such-model")


def test_a_config_of_another_class_for_a_packed_checkpoint(saved, tmp_path):
    from transformers import BitsAndBytesConfig

    load_model(saved("llama-gqa")[0], config(precision="int4")).save_pretrained(tmp_path / "p")
    with pytest.raises(ValueError, match="quantized with DeepSeekConfig"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "p", quantization_config=BitsAndBytesConfig(load_in_8bit=True))


@torch.no_grad()
def test_calls_on_a_temporary_model(saved, tmp_path):
    folder, plain = saved("llama-gqa")
    ids = ids_for(plain)
    expected = plain.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(load_model(folder, config()).generate(ids, max_new_tokens=5, do_sample=False), expected)
    assert torch.equal(load_model(folder, config()).forward(ids).logits.argmax(-1), plain(ids).logits.argmax(-1))
    generate = load_model(folder, config()).generate
    for options in ({"do_sample": False}, {"num_beams": 2, "do_sample": False}):
        assert torch.equal(generate(ids, max_new_tokens=5, **options), plain.generate(ids, max_new_tokens=5, **options))
    twin = copy.deepcopy(load_model(folder, config())).generate
    assert torch.equal(twin(ids, max_new_tokens=5, do_sample=False), expected)
    assert load_model(folder, config()).report().family == "llama"


def test_importing_does_no_work():
    """Only names are registered: no library is loaded, no model code imported, no thread started."""
    code = (
        "import sys, threading, deepseek_optimizer as d\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m\n"
        "assert 'deepseek_optimizer' in m\n"
        "assert 'peft' not in sys.modules and 'transformers.models.llama.modeling_llama' not in sys.modules\n"
        "assert threading.active_count() == 1\n"
        "from deepseek_optimizer.integration.load.quantizer import register; register()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
