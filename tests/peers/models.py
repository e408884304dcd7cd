"""The models that take the place of those of the suites: SmolLM2-135M-Instruct, and random encoders.

They are made once, in the user's cache directory. `variant` gives one another context or other defaults, for which both servers
of the suites have flags.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ENCODER_TOKENS = 512
_ENCODER_SIZE = {"hidden_size": 384, "num_attention_heads": 6, "vocab_size": 32_000}  # the tests have ids up to 28,804


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, packed in int8: a directory, which loads faster than the GGUF file."""
    return _once("smollm2-int8", _pack_smollm2)


def smollm2_with_gaps() -> Path:
    """SmolLM2 whose tokens of code repositories, which it seldom uses, have the names of tokens that fill gaps."""
    return _once("smollm2-gaps", _rename_tokens)


def encoder(tokens: int = ENCODER_TOKENS) -> Path:
    """A random BERT whose embeddings are the mean of the hidden states; `tokens`: its context."""
    return _once(f"encoder384-{tokens}", lambda target: _save_encoder(target, "Model", max_position_embeddings=tokens))


def reranker() -> Path:
    """A random BERT that gives pairs of texts a score."""
    return _once("reranker384", lambda target: _save_encoder(target, "ForSequenceClassification", num_labels=1))


def classifier() -> Path:
    """A random BERT with two classes, named as those of the model in vLLM's tests."""
    labels = {0: "Default", 1: "Spoiled"}
    return _once("classifier384", lambda target: _save_encoder(target, "ForSequenceClassification", id2label=labels))


def seeing() -> Path:
    """A random Gemma 3 of a few thousand weights, with a vision tower and a vocabulary of bytes."""
    return _once("gemma3", _save_seeing)


def adapter() -> Path:
    """A random LoRA adapter of SmolLM2, in PEFT's format."""
    return _once("adapter", _save_adapter)


def variant(source: Path, target: Path, *, context: int | None = None, generation: Mapping[str, Any] | None = None) -> Path:
    """A directory with the same weights, as hard links.

    Args:
        source: a model's directory.
        target: a folder of the same file system that does not exist yet.
        context: length of the context in tokens; None: the model's. Encoders have a table of positions, so their tokenizer gets
            it; the model that sees keeps its own.
        generation: fields to add to the generation config.

    Returns: `target`.
    """
    shutil.copytree(source, target, copy_function=os.link)
    if context is not None and source == smollm2():
        _change(target / "config.json", {"max_position_embeddings": context})
    elif context is not None and source != seeing():
        _change(target / "tokenizer_config.json", {"model_max_length": context})
    if generation:
        _change(target / "generation_config.json", generation)
    return target


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for variants."""
    from deepseek_optimizer.bench.smollm2 import cache_directory

    parent = cache_directory() / "peers-tests"
    parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=parent)


def _change(file: Path, fields: Mapping[str, Any]) -> None:
    changed = {**json.loads(file.read_text()), **fields}
    file.unlink()
    file.write_text(json.dumps(changed))


def _once(name: str, make: Callable[[Path], None]) -> Path:
    from deepseek_optimizer.bench.smollm2 import cache_directory
    from deepseek_optimizer.checkpoint.manifest import VERSION

    target = cache_directory() / "peers-tests" / f"{name}-v{VERSION}"
    if not target.exists():
        part = target.with_name(f"partial-{target.name}-{os.getpid()}")
        part.parent.mkdir(parents=True, exist_ok=True)
        make(part)
        part.rename(target)
    return target


def _pack_smollm2(target: Path) -> None:
    from deepseek_optimizer import load_model, load_tokenizer
    from deepseek_optimizer.bench import smollm2 as downloaded

    gguf = downloaded.fetch()
    load_model(gguf, precision="int8").save_pretrained(target)
    load_tokenizer(gguf).save_pretrained(target)


_GAPS = {"<gh_stars>": "<fim_prefix>", "<issue_start>": "<fim_middle>", "<issue_comment>": "<fim_suffix>"}


def _rename_tokens(target: Path) -> None:
    shutil.copytree(smollm2(), target, copy_function=os.link)
    for file in target.glob("*.json"):
        text = file.read_text()
        if any(name in text for name in _GAPS):
            for name, other in _GAPS.items():
                text = text.replace(f'"{name}"', f'"{other}"')
            file.unlink()
            file.write_text(text)


def _save_encoder(target: Path, head: str, **fields: Any) -> None:
    from support.byte_tokenizer import new_byte_tokenizer
    from support.encoders import random_encoder

    tokenizer = new_byte_tokenizer()
    size = {**_ENCODER_SIZE, "max_position_embeddings": ENCODER_TOKENS} | fields
    random_encoder("bert", head, **size).save_pretrained(target)
    tokenizer.save_pretrained(target)


def _save_seeing(target: Path) -> None:
    from safetensors.torch import load_file, save_file

    from support.picture_processors import PLACEHOLDER, save_pair

    save_pair(target)
    weights = load_file(target / "model.safetensors")
    # It writes only what can be seen, "!" to "~": the tests look for some text.
    weights["language_model.model.embed_tokens.weight"][ord("~") - ord("!") + 1 :] = 0
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    file, place = target / "chat_template.jinja", PLACEHOLDER["gemma3"]
    template = file.read_text()
    # vLLM's tests write a picture's place themselves where they compute the number of tokens: Phi-3.5's.
    text = "{{ m.content }}"
    assert place in template and text in template
    changed = template.replace(place, f"{place}\n").replace(text, f"{{{{ m.content.replace('<|image_1|>', '{place}') }}}}")
    file.write_text(changed)


def _save_adapter(target: Path) -> None:
    import torch
    from safetensors.torch import save_file

    config = json.loads((smollm2() / "config.json").read_text())
    hidden, rank = config["hidden_size"], 4
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, hidden, generator=generator) * 0.05
        tensors[f"{name}.lora_B.weight"] = torch.randn(hidden, rank, generator=generator) * 0.05
    target.mkdir()
    save_file(tensors, target / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none",
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
    }  # fmt: skip
    (target / "adapter_config.json").write_text(json.dumps(described))
