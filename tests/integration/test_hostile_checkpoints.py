"""Malicious checkpoints: rejected by `load_model` and `from_pretrained`, with the tensor's name, before memory is allocated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from deepseek_optimizer import CheckpointError, ConfigError, DeepSeekConfig, load_model
from support.damaged_checkpoints import both_loaders, set_config, set_tensor


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that may be damaged."""
    return Path(shutil.copytree(tiny_model, tmp_path / "m"))


@both_loaders
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),  # Transformers alone would build layers until memory runs out
        ({"hidden_size": 1 << 40}, "hidden_size"),
        ({"vocab_size": 100}, "pad_token_id"),
        ({"pad_token_id": 10**6}, "pad_token_id"),
    ],
)
def test_configs(folder, load, fields, message):
    set_config(folder, **fields)
    with pytest.raises(ConfigError, match=message):
        load(folder)


@pytest.mark.parametrize(
    "fields", [{"eos_token_id": "x"}, {"use_cache": "x"}, {"id2label": "x"}, {"num_labels": 10**9}, {"text_config": {"a": 1}}]
)
def test_fields_that_only_transformers_reads(folder, fields):
    set_config(folder, **fields)
    with pytest.raises(ConfigError, match=str(folder) if "num_labels" not in fields else "num_labels"):
        load_model(folder)


@both_loaders
@pytest.mark.parametrize("fields", [{"vocab_size": 1 << 24}, {"hidden_size": 1 << 20, "head_dim": 16}])
def test_shapes_are_compared_before_anything_is_read(folder, load, fields):
    set_config(folder, **fields)
    with pytest.raises(CheckpointError, match="embed_tokens.weight.*the config requires"):
        load(folder)


@both_loaders
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_not_finite(folder, load, name):
    def spoil(tensor):
        tensor.view(-1)[7] = torch.nan
        return tensor

    set_tensor(folder, name, spoil)
    with pytest.raises(CheckpointError, match=f"{name}.*NaN"):
        load(folder)


@both_loaders
def test_missing_biases(folder, load):
    set_config(folder, mlp_bias=True)
    with pytest.raises(CheckpointError, match=r"mlp\.gate_proj\.bias"):
        load(folder)


@both_loaders
@pytest.mark.parametrize("where", ["added", "vocabulary", "unigram"])
def test_a_tokenizer_larger_than_the_embedding(folder, load, where):
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    if where == "added":
        whole["added_tokens"][-1]["id"] = rows
    elif where == "vocabulary":
        whole["model"]["vocab"]["x" * 9] = rows
    else:
        whole["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [[f"t{i}", 0.0] for i in range(rows + 1)]}
    path.write_text(json.dumps(whole))
    with pytest.raises(CheckpointError, match=f"{rows + 1} tokens, but the embedding only {rows} rows"):
        load(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"model": 3, "x": 999999}', '{"truncation": {"max_length": 999999}}'])
def test_an_unreadable_tokenizer_does_not_affect_the_model(folder, text):
    (folder / "tokenizer.json").write_text(text)
    load_model(folder, backend="reference")


@both_loaders
def test_pickles_are_never_opened(folder, load):
    class Evil:
        def __reduce__(self):
            return Path.touch, (folder / "ran",)

    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin.*pickled|pickled.*pytorch_model.bin"):
        load(folder)
    assert not (folder / "ran").exists()


@both_loaders
@pytest.mark.parametrize("name", ["../other/model.safetensors", "/model.safetensors", 3, None])
def test_an_index_with_paths_outside_the_directory(folder, tiny_model, load, name):
    shutil.copytree(tiny_model, folder.parent / "other")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(load_file(folder / "model-00001-of-00001.safetensors"), "model-00001-of-00001.safetensors")
    index = {} if name is None else {"weight_map": names | {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not inside the checkpoint|weight_map must map"):
        load(folder)


def test_a_config_from_a_directory_without_weights(folder, tiny_model):
    (folder / "model.safetensors").unlink()
    config = AutoConfig.from_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(tiny_model, config=config, quantization_config=DeepSeekConfig(backend="reference"))


@both_loaders
def test_code_of_the_checkpoint_is_not_run(folder, load):
    set_config(folder, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    load(folder)
    assert not (folder / "ran").exists()
