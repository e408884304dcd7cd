"""The models in a directory, by name."""

from __future__ import annotations

import json

import pytest

from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer.server.pool.model_list import ModelFile, models_at, models_of


def write(path, size=0, **config):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json.dumps(config).encode() if config else bytes(size))


def test_directories_and_gguf_files(tmp_path):
    write(tmp_path / "llama" / "config.json", max_position_embeddings=2048)
    write(tmp_path / "llama" / "model.safetensors", 500)
    write(tmp_path / "nested" / "config.json", text_config={"max_position_embeddings": 64})
    write(tmp_path / "single.gguf", 300)
    write(tmp_path / "split-00001-of-00002.gguf", 100)
    write(tmp_path / "split-00002-of-00002.gguf", 150)
    write(tmp_path / "inside" / "weights-Q4_0.gguf", 70)
    write(tmp_path / "inside" / "mmproj-weights.gguf", 10)
    for other in ("notes.txt", "two/a.gguf", "two/b.gguf", ".hidden/config.json", "mmproj.gguf", "empty/readme"):
        write(tmp_path / other, 1)
    folder = str(tmp_path)
    assert models_of(tmp_path) == {
        "llama": ModelFile("llama", f"{folder}/llama", 500, 2048),
        "nested": ModelFile("nested", f"{folder}/nested", 0, 64),
        "single": ModelFile("single", f"{folder}/single.gguf", 300),
        "split": ModelFile("split", f"{folder}/split-00001-of-00002.gguf", 250),
        "inside": ModelFile("inside", f"{folder}/inside/weights-Q4_0.gguf", 70),
    }


@pytest.mark.parametrize("config", [b"{", b"[]", b'"a"', b'{"max_position_embeddings": "x"}', b"\xff", b"[" * 100_000])
def test_damaged_configs_have_no_context(tmp_path, config):
    write(tmp_path / "a" / "config.json", 1)
    (tmp_path / "a" / "config.json").write_bytes(config)
    assert models_of(tmp_path) == {"a": ModelFile("a", f"{tmp_path}/a")}


def test_given_models(tmp_path):
    write(tmp_path / "llama" / "config.json", max_position_embeddings=2048)
    write(tmp_path / "x.gguf", 3)
    models = models_at([f"{tmp_path}/llama/", f"{tmp_path}/x.gguf", "org/on-the-hub"])
    assert list(models) == ["llama", "x", "on-the-hub"] and models["on-the-hub"].path == "org/on-the-hub"
    assert models["llama"].context == 2048 and models["x"].bytes == 3
    with pytest.raises(ConfigError, match="two models have the name x"):
        models_at([f"{tmp_path}/x.gguf", "org/x"])


def test_a_missing_directory(tmp_path):
    with pytest.raises(ConfigError, match="--models-dir: .* cannot be read"):
        models_of(tmp_path / "missing")
