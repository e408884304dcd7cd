"""Training configs: read from files, checked field by field."""

from __future__ import annotations

import json

import pytest

from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer.train.config import make_config, read_config

LEAST = {"model": "m", "output": "o", "data": "chats.jsonl"}


def test_short_forms():
    config = make_config({**LEAST, "lora": 8})
    assert config.data.train == ("chats.jsonl",) and config.lora.r == 8 and config.lora.targets == "auto"
    assert make_config({**LEAST, "lora": True}).lora.r == 16 and make_config({**LEAST, "lora": False}).lora is None
    assert make_config({**LEAST, "data": ["a", "b"]}).data.train == ("a", "b")
    assert make_config({**LEAST, "data": {"train": "a", "eval": "b"}}).evaluates


def test_yaml_and_json_are_equivalent(tmp_path):
    text = "model: m\noutput: o\ndata: {train: [a, b], max_length: 64}\nlora: {r: 4}\n"
    text += "arguments: {learning_rate: 1e-4, max_steps: 3}\n"
    (tmp_path / "c.yaml").write_text(text)
    fields = read_config(str(tmp_path / "c.yaml"))
    (tmp_path / "c.json").write_text(json.dumps(fields))
    config = make_config(fields)
    assert config == make_config(read_config(str(tmp_path / "c.json")))
    assert config.arguments == {"learning_rate": 1e-4, "max_steps": 3} and isinstance(config.arguments["learning_rate"], float)
    assert make_config(json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"modle": "m"}, r"unknown field 'modle'; did you mean 'model'\?"),
        ({"model": ""}, r"model: "),
        ({"data": {"train": "a", "max_lenght": 3}}, r"unknown field 'data.max_lenght'; did you mean 'max_length'\?"),
        ({"data": {"train": "a", "eval": "b", "eval_fraction": 0.1}}, r"data: eval and eval_fraction both"),
        ({"data": {"train": "a", "eval_fraction": 1.0}}, r"data.eval_fraction: "),
        ({"data": {"train": "a", "too_long": "cut"}}, r"data.too_long: .*'truncate'"),
        ({"data": {"train": "a", "max_length": 1}}, r"data.max_length: "),
        ({"data": []}, r"data.train: "),
        ({"data": {"eval": "a"}}, r"data.train is missing"),
        ({"data": 3}, r"data: "),
        ({"lora": 0}, r"lora.r: "),
        ({"lora": {"rank": 4}}, r"unknown field 'lora.rank'"),
        ({"lora": {"dropout": 1}}, r"lora.dropout: "),
        ({"precision": "int4"}, r"precision='int4' freezes the weights, so it needs lora"),
        ({"precision": "int2", "lora": 4}, r"precision: .*'int4'"),
        ({"merge": True}, r"merge=True .* needs lora"),
        ({"patience": 2}, r"patience .* needs data.eval"),
        ({"arguments": {"learning_rat": 1}}, r"arguments has no field 'learning_rat'; did you mean 'learning_rate'\?"),
        ({"arguments": {"learning_rate": "fast"}}, r"arguments.learning_rate: .*number.* got 'fast'"),
        ({"arguments": {"max_steps": 1.5}}, r"arguments.max_steps: .*got 1.5"),
        ({"arguments": {"optimizer_state": "int4"}}, r"arguments.optimizer_state: .*'int8'"),
        ({"arguments": {"output_dir": "x"}}, r"arguments.output_dir cannot be set here; use output"),
        ({"arguments": {"packing": True}}, r"arguments.packing cannot be set here; use data.packing"),
        ({"arguments": 3}, r"arguments: "),
    ],
)
def test_errors_name_the_field(changes, error):
    with pytest.raises(ConfigError, match=error):
        make_config({**LEAST, **changes})
    with pytest.raises(ConfigError, match=r"c.yaml: .*" + error):
        make_config({**LEAST, **changes}, "c.yaml")


def test_a_missing_field_is_named():
    with pytest.raises(ConfigError, match="model is missing; output is missing; data is missing"):
        make_config({})


def test_text_is_converted_to_the_types_of_arguments():
    given = {"learning_rate": "1e-4", "max_steps": "7", "bf16": "false", "optim": "adamw_torch", "save_steps": "0.5"}
    made = make_config({**LEAST, "arguments": given}).arguments
    assert made == {"learning_rate": 1e-4, "max_steps": 7, "bf16": False, "optim": "adamw_torch", "save_steps": 0.5}


@pytest.mark.parametrize(
    ("text", "error"),
    [("a: [", "is not valid YAML"), ("- 1", "must contain a mapping"), ("", "must contain a mapping"), ("1: 2", "must")],
)
def test_invalid_config_files(tmp_path, text, error):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"c.yaml.* {error}"):
        read_config(str(tmp_path / "c.yaml"))
    (tmp_path / "c.json").write_text("{")
    for name, what in (("c.json", "Expecting"), ("none.yaml", "cannot be read: No such file"), (".", "cannot be read")):
        with pytest.raises(ConfigError, match=what):
            read_config(str(tmp_path / name))
