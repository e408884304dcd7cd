"""A small random Llama on disk, with a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase


def saved_llama(folder: Path, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Path:
    """Saves a model of two layers, width 64 and 256 positions, always with the same weights.

    Args:
        changes: fields of its config.
    """
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": len(tokenizer), "max_position_embeddings": 256, "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "tie_word_embeddings": True,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**{**fields, **changes})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
