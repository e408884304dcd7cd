"""A model whose quality depends on calibration, with a tokenizer and a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepseek_optimizer.calibration.inputs import Inputs
from deepseek_optimizer.calibration.text import sample_text
from deepseek_optimizer.integration.bind.graphs import decoder_path, whole_graph
from deepseek_optimizer.integration.bind.swap import sites
from deepseek_optimizer.integration.load.rounding import listening

from .models import CASES, random_model


def save_unequal(folder: Path, case: str, tokenizer: Any, characters: int) -> Path:
    """Saves a random fp32 model whose columns differ widely in importance; the text is `text.txt` in `folder`'s parent."""
    config = CASES[case]()
    config.vocab_size = len(tokenizer)
    model = random_model(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).exp())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder.parent / "text.txt").write_text(sample_text()[:characters], encoding="utf-8")
    return folder


def inputs_of(plain: Any, texts: Any) -> dict[str, torch.Tensor]:
    """Parameter name -> inputs of every linear module of Transformers' model, float32 [rows, K]."""
    seen: dict[str, list[torch.Tensor]] = {}
    names = {module: f"{name}.weight" for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    for module, name in names.items():
        module.register_forward_pre_hook(lambda _, x, name=name: seen.setdefault(name, []).append(x[0][0]))
    with torch.inference_mode():
        for ids in texts:
            plain(ids)
    if plain.config.tie_word_embeddings:
        seen["model.embed_tokens.weight"] = seen.pop("lm_head.weight")
    return {name: torch.cat(rows) for name, rows in seen.items()}


def inputs_read(model: Any, texts: Any) -> dict[str, torch.Tensor]:
    """Parameter name -> inputs of every linear module and stack of experts in an optimized model's decoder, [rows, K]: those
    that rounding listens to."""
    inputs = Inputs()
    with torch.no_grad(), listening(sites(model, whole_graph(model)), inputs):
        for ids in texts:
            model.get_submodule(decoder_path(model))(ids, use_cache=False)
    found: dict[str, list[torch.Tensor]] = {}
    for name, rows in inputs.rows.items():
        stack, _, index = name.rpartition(".")
        if index == "weight":
            found[name] = rows
        elif stack.endswith("down_proj") or int(index) % 2 == 0:  # gate and up read the same
            found.setdefault(stack, []).extend(rows)
    return {name: torch.cat(rows).float() for name, rows in found.items()}


def squares_read(model: Any, texts: Any) -> dict[str, torch.Tensor]:
    """The sums of the squares of these inputs, [K]."""
    return {name: rows.square().sum(0) for name, rows in inputs_read(model, texts).items()}
