"""Small random encoders with odd sizes, by family."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig

from deepseek_optimizer.backends.base import PREFILL, StepBatch

VOCABULARY = 99


def _bert(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 52,
        "max_position_embeddings": 700, **more,
    }  # fmt: skip


# name -> (model_type, name of its classes, fields of the config)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("bert", "Bert", _bert()),
    "bert-tanh": ("bert", "Bert", _bert(hidden_act="gelu_new", hidden_size=80, num_attention_heads=5)),
    "roberta": ("roberta", "Roberta", _bert(type_vocab_size=1)),
    "xlm-roberta": ("xlm-roberta", "XLMRoberta", _bert(type_vocab_size=1)),
    "camembert": ("camembert", "Camembert", _bert()),
    "distilbert": (
        "distilbert", "DistilBert",
        {"dim": 36, "n_layers": 2, "n_heads": 3, "hidden_dim": 52, "max_position_embeddings": 700},
    ),
    "modernbert": ("modernbert", "ModernBert", _bert(local_attention=10)),
    "modernbert-biases": (
        "modernbert", "ModernBert",
        _bert(hidden_size=64, num_attention_heads=2, intermediate_size=48, local_attention=128, attention_bias=True,
              mlp_bias=True, norm_bias=True),
    ),
}  # fmt: skip


def random_encoder(name: str, head: str = "Model", **fields: Any) -> Any:
    """The model with random weights, those of linear layers large enough for every layer to matter.

    Args:
        name: of `CASES`.
        head: end of the class's name, such as "ForMaskedLM".
    """
    model_type, kind, own = CASES[name]
    tokens = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    config = AutoConfig.for_model(model_type, **{"vocab_size": VOCABULARY, **tokens, **own, **fields})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15) if parameter.dim() >= 2 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_sentences(*lengths: int) -> list[list[int]]:
    """Token ids, none of them special."""
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def padded(sentences: list[list[int]], left: bool = False) -> dict[str, torch.Tensor]:
    """The call of a model with these sentences."""
    width = max(map(len, sentences))
    ids = torch.ones(len(sentences), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, kept, sentence in zip(ids, mask, sentences, strict=True):
        at = slice(width - len(sentence), width) if left else slice(0, len(sentence))
        row[at], kept[at] = torch.tensor(sentence), 1
    return {"input_ids": ids, "attention_mask": mask}


def embeddings_of(model: Any, sentences: list[list[int]]) -> torch.Tensor:
    """The output of the embeddings module for all tokens, [tokens, hidden]."""
    with torch.no_grad():
        return torch.cat([model.base_model.embeddings(torch.tensor([ids]))[0] for ids in sentences])


def make_batch(states: torch.Tensor, lengths: list[int]) -> StepBatch:
    """A step of whole sequences, which returns all hidden states."""
    count = len(lengths)
    zeros = np.zeros(count, np.int32)
    return StepBatch(
        np.zeros(sum(lengths), np.int32), np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        np.array(lengths, np.int32), zeros, np.full(count, PREFILL, np.int32), np.zeros((count, 0), np.int32),
        np.zeros(0, np.int32), hidden=True, states=states,
    )  # fmt: skip
