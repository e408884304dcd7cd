"""Processors for the tiny multimodal models of `multimodal.py`, with a byte-level tokenizer."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from .byte_tokenizer import new_byte_tokenizer
from .multimodal import FAMILIES, make_model

_TOKENS = {
    "gemma4": ["<|image>", "<|image|>", "<image|>", "<|audio>", "<|audio|>", "<audio|>"],
    "gemma4_small": ["<|image>", "<|image|>", "<image|>", "<|audio>", "<|audio|>", "<audio|>"],
    "gemma3": ["<start_of_image>", "<image_soft_token>", "<end_of_image>"],
    "qwen3_vl": ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"],
    "qwen2_5_vl": ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"],
    "deepseek_vl": ["<image_placeholder>"],
}
PLACEHOLDER = {
    "gemma3": "<start_of_image>",
    "gemma4": "<|image|>",
    "gemma4_small": "<|image|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "deepseek_vl": "<image_placeholder>",
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}PLACEHOLDER{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_processor(family: str) -> Any:
    """The family's own processor."""
    import transformers

    tokenizer = new_byte_tokenizer()
    tokenizer.add_tokens(_TOKENS[family], special_tokens=True)
    template = CHAT_TEMPLATE.replace("PLACEHOLDER", PLACEHOLDER[family])
    if family == "gemma3":
        tokenizer.boi_token, tokenizer.image_token, tokenizer.eoi_token = _TOKENS[family]
        for name in ("boi", "image", "eoi"):
            setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(getattr(tokenizer, f"{name}_token")))
        pictures = transformers.Gemma3ImageProcessorPil(size={"height": 24, "width": 24})
        return transformers.Gemma3Processor(pictures, tokenizer, chat_template=template, image_seq_length=9)
    if family in ("gemma4", "gemma4_small"):
        for name, token in zip(("boi", "image", "eoi", "boa", "audio", "eoa"), _TOKENS[family], strict=True):
            setattr(tokenizer, f"{name}_token", token)
            setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
        pictures = transformers.Gemma4ImageProcessorPil(patch_size=4, pooling_kernel_size=3, max_soft_tokens=70)
        try:
            processor = transformers.Gemma4Processor
        except ModuleNotFoundError as error:  # some releases of Transformers need torchvision for it
            pytest.skip(f"Gemma 4's processor of this Transformers needs another package: {error}")
        return _unchecked(processor)(None, pictures, tokenizer, None, chat_template=template)
    if family == "deepseek_vl":
        tokenizer.image_token = _TOKENS[family][0]
        pictures = transformers.DeepseekVLImageProcessorPil(size={"height": 12, "width": 12}, min_size=2)
        return transformers.DeepseekVLProcessor(pictures, tokenizer, chat_template=template, num_image_tokens=9)
    size = {"shortest_edge": 64, "longest_edge": 1024}  # pixels
    pictures = transformers.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size)
    kind = {"qwen2_5_vl": transformers.Qwen2_5_VLProcessor, "qwen3_vl": transformers.Qwen3VLProcessor}[family]
    return _unchecked(kind)(pictures, tokenizer, None, chat_template=template)


def _unchecked(kind: Any) -> Any:
    """A class of processors that need not have all parts: one for videos would need torchvision."""

    class Unchecked(kind):
        def check_argument_for_proper_class(self, *args: Any) -> None:
            pass

    return Unchecked


def make_pair(family: str, **text: Any) -> tuple[Any, Any]:
    """A float model and its processor."""
    processor = make_processor(family)
    tokenizer = processor.tokenizer
    ids = dict(zip(("start", "image", "end"), tokenizer.convert_tokens_to_ids(_TOKENS[family][:3]), strict=False))
    if family == "gemma4_small":
        text = {"vocab_size_per_layer_input": len(tokenizer), **text}
    model = make_model(FAMILIES[family], vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **text)
    config = model.config
    config.image_token_id = ids["start" if family == "deepseek_vl" else "image"]
    if family.startswith("qwen"):
        config.vision_start_token_id, config.vision_end_token_id = ids["start"], ids["end"]
        config.video_token_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    if family.startswith("gemma4"):
        config.video_token_id, config.audio_token_id = map(tokenizer.convert_tokens_to_ids, ("<|video|>", "<|audio|>"))
        with torch.no_grad():  # so that they are not generated: Gemma 4's own forward embeds a generated one as padding
            for token in (config.image_token_id, config.video_token_id, config.audio_token_id):
                model.get_input_embeddings().weight[token] *= 0.01
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, processor


def save_pair(folder: Path) -> None:
    """A checkpoint of Gemma 3 with its processor, as published ones are."""
    model, processor = make_pair("gemma3")
    model.save_pretrained(folder)
    processor.tokenizer.chat_template = processor.chat_template
    processor.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    names = dict(zip(("boi_token", "image_token", "eoi_token"), _TOKENS["gemma3"], strict=True))
    file.write_text(json.dumps({**json.loads(file.read_text()), "extra_special_tokens": names}))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with random colors."""
    import numpy as np

    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def count_encoded(monkeypatch: pytest.MonkeyPatch, model: Any) -> list[int]:
    """A list that gets an item for each call of a multimodal model's vision tower."""
    kind, calls = type(model.model), []
    original = kind.get_image_features

    @functools.wraps(original)  # the encoder reads the signature
    def counted(*args: Any, **more: Any) -> Any:
        calls.append(1)
        return original(*args, **more)

    monkeypatch.setattr(kind, "get_image_features", counted)
    return calls
