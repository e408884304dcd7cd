"""The files that sentence-transformers adds to a checkpoint."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deepseek_optimizer import CheckpointError
from deepseek_optimizer.checkpoint.sentence_transformers import EmbeddingSettings, read_embedding_settings

OLD = "sentence_transformers.models"
NEW = "sentence_transformers.sentence_transformer.modules"


@pytest.fixture
def folder(tmp_path):
    """folder(modules, files) -> path; `files`: JSON by path."""

    def make(modules=None, **files):
        if modules is not None:
            listed = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (kind, path) in enumerate(modules)]
            (tmp_path / "modules.json").write_text(json.dumps(listed))
        for name, content in files.items():
            file = tmp_path / name.replace("__", "/")
            file.parent.mkdir(exist_ok=True)
            file.with_suffix(".json").write_text(json.dumps(content))
        return tmp_path

    return make


def test_without_its_files(tmp_path):
    assert read_embedding_settings(tmp_path) == EmbeddingSettings() == read_embedding_settings(tmp_path / "model.gguf")
    assert EmbeddingSettings().pooling == ("mean",)


@pytest.mark.parametrize(
    "config,pooling",
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls",)),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, ("lasttoken",)),
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}, ("max", "mean")),
        ({"pooling_mode": "weightedmean"}, ("weightedmean",)),
        ({"pooling_mode": ["mean", "cls"]}, ("mean", "cls")),
        ({}, ("mean",)),
    ],
)
def test_pooling(folder, config, pooling):
    modules = [(f"{OLD}.Transformer", ""), (f"{NEW}.pooling.Pooling", "1_Pooling"), (f"{OLD}.Normalize", "2_Normalize")]
    assert read_embedding_settings(folder(modules, **{"1_Pooling__config": config})).pooling == pooling


def test_prompts_and_limits(folder):
    modules = [(f"{OLD}.Transformer", ""), (f"{OLD}.Pooling", "1_Pooling")]
    path = folder(
        modules,
        config_sentence_transformers={"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": "query"},
        sentence_bert_config={"max_seq_length": 256, "do_lower_case": True},
        **{"1_Pooling__config": {"include_prompt": False}},
    )
    settings = read_embedding_settings(path)
    assert settings.prompts == {"query": "query: ", "document": ""} and settings.default_prompt == "query"
    assert settings.max_tokens == 256 and settings.lower_case and not settings.include_prompt and not settings.chat_template


@pytest.mark.parametrize(
    "name,expected", [("torch.nn.modules.linear.Identity", "identity"), ("torch.nn.Sigmoid", "sigmoid"), (None, None)]
)
def test_cross_encoders(folder, name, expected):
    path = folder(
        [(f"{NEW}.Transformer", "")],
        config_sentence_transformers={"activation_fn": name, "prompts": {}},
        sentence_bert_config={"modality_config": {"text": {}, "message": {}}},
    )
    settings = read_embedding_settings(path)
    assert settings.score_activation == expected and settings.chat_template


def test_dense(folder):
    modules = [(f"{OLD}.Transformer", ""), (f"{OLD}.Pooling", "1_Pooling"), (f"{OLD}.Dense", "2_Dense")]
    config = {"in_features": 4, "out_features": 3, "activation_function": "torch.nn.modules.activation.Tanh"}
    path = folder(modules, **{"1_Pooling__config": {}, "2_Dense__config": config})
    weight, bias = torch.randn(3, 4), torch.randn(3)
    save_file({"linear.weight": weight, "linear.bias": bias.half()}, path / "2_Dense" / "model.safetensors")
    settings = read_embedding_settings(path)
    (dense,) = settings.dense
    assert np.array_equal(dense.weight, weight.numpy()) and dense.activation == "Tanh" and dense.residual is None
    np.testing.assert_allclose(dense.bias, bias.numpy(), rtol=1e-3)
    settings.check(4)
    with pytest.raises(CheckpointError, match="takes vectors of 4, but gets 8"):
        settings.check(8)


def test_score_tokens(folder):
    modules = [
        (f"{OLD}.Transformer", ""),
        ("sentence_transformers.cross_encoder.modules.logit_score.LogitScore", "1_LogitScore"),
    ]
    path = folder(modules, **{"1_LogitScore__config": {"true_token_id": 9693, "false_token_id": 2152}})
    assert read_embedding_settings(path).score_tokens == (9693, 2152)


@pytest.mark.parametrize(
    "modules,files,error",
    [
        ([("os.system", "")], {}, "lists the module 'system'"),
        ([(f"{OLD}.Dense", "1_Dense")], {}, "before the pooling"),
        ([(f"{OLD}.Pooling", "../other")], {}, "not inside the checkpoint"),
        ([(f"{OLD}.Pooling", "/etc")], {}, "not inside the checkpoint"),
        ([(f"{OLD}.Pooling", "1_Pooling")], {}, "cannot be opened"),
        ([(f"{OLD}.Pooling", "1_Pooling")], {"1_Pooling__config": {"pooling_mode": "best"}}, "pooling_mode must be"),
        ([(f"{OLD}.Pooling", "1_Pooling")], {"1_Pooling__config": {"pooling_mode": []}}, "pooling_mode must be"),
        ([(f"{OLD}.Pooling", "1_Pooling")], {"1_Pooling__config": {"pooling_mode": [{}]}}, "pooling_mode must be"),
        ([(f"{OLD}.Pooling", "")] * 17, {}, "at most 16 modules"),
        (None, {"config_sentence_transformers": {"prompts": {"a": 1}}}, "prompts must map"),
        (None, {"config_sentence_transformers": {"default_prompt_name": "a"}}, "default_prompt_name must be"),
        (None, {"config_sentence_transformers": {"activation_fn": "os.system"}}, "'system' of scores is not supported"),
        ([("x.LogitScore", "1")], {"1__config": {"true_token_id": -1, "false_token_id": True}}, "must be token ids"),
        ([], {"sentence_bert_config": {"max_seq_length": 0}}, "max_seq_length must be"),
    ],
)
def test_hostile_files(folder, modules, files, error):
    with pytest.raises(CheckpointError, match=error):
        read_embedding_settings(folder(modules, **files))


@pytest.mark.parametrize("content", ["{}", "[1]", '[{"type": 1}]', "[", '[{"type": "a", "path": 1}]'])
def test_damaged_lists(tmp_path, content):
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(CheckpointError):
        read_embedding_settings(tmp_path)


@pytest.mark.parametrize(
    "config,tensors,error",
    [
        ({"activation_function": "os.system"}, {"linear.weight": torch.zeros(2, 2)}, "'system' is not supported"),
        ({}, {"weight": torch.zeros(2, 2)}, "must have linear.weight"),
        ({}, {"linear.weight": torch.zeros(2, 2), "linear.bias": torch.zeros(3)}, "must have linear.weight"),
        ({}, {"linear.weight": torch.zeros(2, 2, dtype=torch.int8)}, "must be a float tensor"),
        ({"use_residual": True}, {"linear.weight": torch.zeros(2, 3)}, "residual.weight"),
    ],
)
def test_damaged_dense_layers(folder, config, tensors, error):
    modules = [(f"{OLD}.Pooling", "1_Pooling"), (f"{OLD}.Dense", "2_Dense")]
    path = folder(modules, **{"1_Pooling__config": {}, "2_Dense__config": config})
    save_file(tensors, path / "2_Dense" / "model.safetensors")
    with pytest.raises(CheckpointError, match=error):
        read_embedding_settings(path)
