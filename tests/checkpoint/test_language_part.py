"""Published checkpoints of multimodal models: their language model is loaded, and what is left out is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    Llama4Config,
    Llama4ForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)

from deepseek_optimizer import load_model
from deepseek_optimizer.checkpoint import open_checkpoint
from support.family_configs import (
    gemma4_shared,
    gemma4_unified_text,
    llama4_text,
    ministral3,
    mistral,
    mistral4,
    qwen3_5_moe_text,
    qwen3_5_text,
)
from support.models import assert_close_rows, random_ids, randomize

VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 72}
PIXELS = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
          "patch_size": 14}  # fmt: skip
LLAMA4 = {**PIXELS, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
KINDS = {
    "dense": (Qwen3_5Config, Qwen3_5ForConditionalGeneration, qwen3_5_text, VISION),
    "experts": (Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration, qwen3_5_moe_text, VISION),
    "llama4": (Llama4Config, Llama4ForConditionalGeneration, llama4_text, LLAMA4),
    "mistral": (Mistral3Config, Mistral3ForConditionalGeneration, mistral, PIXELS),
    "ministral3": (Mistral3Config, Mistral3ForConditionalGeneration, ministral3, PIXELS),
    "mistral4": (Mistral3Config, Mistral3ForConditionalGeneration, mistral4, PIXELS),
}


VISION_4 = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
AUDIO_4 = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 16}
GEMMA_4 = {
    "towers": (
        Gemma4Config, Gemma4ForConditionalGeneration, gemma4_shared, {"vision_config": VISION_4, "audio_config": AUDIO_4},
    ),
    "unified": (
        Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration, gemma4_unified_text,
        {"vision_config": {"mm_embed_dim": 16, "mm_posemb_size": 8, "output_proj_dims": 72}, "audio_config": {}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", GEMMA_4)
def test_gemma_4(kind: str, tmp_path: Path) -> None:
    """Layers that share keys and values have some of their own in published files, which Transformers does not load either."""
    config_class, model_class, text, others = GEMMA_4[kind]
    config = config_class(text_config=text(pad_token_id=0).to_dict(), **others)
    config._attn_implementation = "eager"
    whole = randomize(model_class(config).eval())
    whole.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    unused = {f"model.language_model.layers.3.self_attn.{name}.weight": torch.zeros(2, 2) for name in ("k_proj", "v_norm")}
    save_file({**tensors, **unused}, tmp_path / "model.safetensors", {"format": "pt"})
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config()["model_type"] == text().model_type
        assert [line.split(" is not loaded")[0] for line in checkpoint.remarks()] == [
            "the vision tower",
            "the audio tower",
            "the unused key and value part of shared layers",
        ]
        assert all(name.startswith(("model.layers", "model.", "lm_head")) for name in checkpoint.tensors)
    model = load_model(tmp_path, precision="fp32", backend="reference", vision="off")
    ids = torch.tensor([random_ids(text(), 45)])
    with torch.no_grad():
        assert_close_rows(model(ids, use_cache=False).logits[0], whole(ids, use_cache=False).logits[0].float())


@pytest.mark.parametrize("kind", KINDS)
def test_the_language_model_of_a_multimodal_checkpoint(kind: str, tmp_path: Path) -> None:
    config_class, model_class, text, vision = KINDS[kind]
    config = config_class(text_config=text().to_dict(), vision_config=vision, tie_word_embeddings=kind == "ministral3")
    config._attn_implementation = "eager"
    whole = randomize(model_class(config).eval())
    whole.save_pretrained(tmp_path)
    left_out = ["the vision tower"]
    if "qwen" in config.model_type:
        tensors = load_file(tmp_path / "model.safetensors")
        save_file({**tensors, "mtp.fc.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors", {"format": "pt"})
        left_out.append("multi-token prediction")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config()["model_type"] == text().model_type
        assert [line.split(" is not loaded")[0] for line in checkpoint.remarks()] == left_out
        assert all(name.startswith(("model.layers", "model.embed", "model.norm", "lm_head")) for name in checkpoint.tensors)
    model = load_model(tmp_path, precision="fp32", backend="reference", vision="off")
    ids = torch.tensor([random_ids(text(), 40)])
    plain = whole.language_model if kind == "llama4" else whole  # whose own forward, in 5.24, needs images
    with torch.no_grad():
        assert_close_rows(model(ids, use_cache=False).logits[0], plain(ids, use_cache=False).logits[0].float())
