"""Tiny multimodal models of every family with random weights, and prompts with pictures for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

TEXT = {
    "vocab_size": 151, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
IMAGE, START, END = 140, 141, 142  # token ids
_LIMITS = {"input_min": -0.4, "input_max": 0.5, "output_min": -0.2, "output_max": 0.3}  # of Gemma 4's clipped products
SIZES = [(2, 2), (3, 2), (1, 4), (5, 3), (2, 1)]  # of pictures: height and width in tokens


@dataclass
class Prompts:
    """A batch of prompts. Attributes: arguments of `forward`; `ids`: of each prompt without padding."""

    arguments: dict[str, torch.Tensor]
    ids: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Multimodal:
    """One family: its Transformers class and config, and how a prompt's pictures become arguments.

    Attributes:
        pictures: (number per prompt, generator) -> number of tokens of each picture, and the arguments that hold pixels.
        types: name of the argument with 1 for tokens of pictures; "": there is none.
    """

    model_class: str
    config_class: str
    config: dict[str, Any]
    pictures: Callable[[Sequence[int], torch.Generator], tuple[list[int], dict[str, torch.Tensor]]]
    types: str = ""
    image: int = IMAGE


def make_model(family: Multimodal, seed: int = 0, **text: Any) -> Any:
    """A float model with random weights."""
    import transformers

    fields = dict(family.config)
    fields["text_config"] = {**fields["text_config"], **text}
    config = getattr(transformers, family.config_class)(**fields)
    torch.manual_seed(seed)
    model = getattr(transformers, family.model_class)(config).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, so that an op that leaves them out is noticed
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            for limit, value in _LIMITS.items():
                if name.endswith(limit):
                    buffer.fill_(value)
    return model


def make_prompts(family: Multimodal, counts: Sequence[int], seed: int = 0, tail: int = 5) -> Prompts:
    """Prompts with so many pictures each, with text before, between and after them; padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    sizes, arguments = family.pictures(counts, generator)
    ids: list[list[int]] = []
    rest = iter(sizes)
    for count in counts:
        row = text_ids(generator, 1 + 2 * len(ids))
        for _ in range(count):
            row += [START, *[family.image] * next(rest), END, *text_ids(generator, 2)]
        ids.append(row + text_ids(generator, tail))
    width = max(map(len, ids))
    padded = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    arguments |= {"input_ids": padded, "attention_mask": mask}
    if family.types:
        arguments[family.types] = (padded == family.image).long()
    return Prompts(arguments, ids)


def text_ids(generator: torch.Generator, count: int) -> list[int]:
    return torch.randint(3, 139, (count,), generator=generator).tolist()


def _patches(counts: Sequence[int], generator: torch.Generator, patch: int, merge: int) -> Any:
    """Pictures of odd shapes as rows of patches, as in Qwen2-VL."""
    shapes = [SIZES[i % len(SIZES)] for i in range(sum(counts))]
    grid = torch.tensor([[1, merge * h, merge * w] for h, w in shapes]).reshape(-1, 3)
    pixels = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * patch * patch, generator=generator)
    return [h * w for h, w in shapes], {"pixel_values": pixels, "image_grid_thw": grid} if shapes else {}


def _padded_patches(counts: Sequence[int], generator: torch.Generator, patch: int, pool: int) -> Any:
    """Pictures of odd shapes as rows of patches with their places, padded to the same number, as in Gemma 4."""
    shapes = [SIZES[i % len(SIZES)] for i in range(sum(counts))]
    most = max((h * w for h, w in SIZES)) * pool * pool
    pixels = torch.zeros(len(shapes), most, 3 * patch * patch)
    places = torch.full((len(shapes), most, 2), -1)
    for i, (h, w) in enumerate(shapes):
        grid = torch.cartesian_prod(torch.arange(h * pool), torch.arange(w * pool)).flip(-1)
        places[i, : len(grid)] = grid
        pixels[i, : len(grid)] = torch.rand(len(grid), 3 * patch * patch, generator=generator)
    return [h * w for h, w in shapes], {"pixel_values": pixels, "image_position_ids": places} if shapes else {}


def _squares(tokens: int, size: int) -> Any:
    """Pictures of one size, each with so many tokens."""

    def make(counts: Sequence[int], generator: torch.Generator) -> Any:
        total = sum(counts)
        return [tokens] * total, {"pixel_values": torch.randn(total, 3, size, size, generator=generator)} if total else {}

    return make


def _rows_of_squares(tokens: int, size: int) -> Any:
    """The same, [prompts, most pictures of a prompt, ...], with zeros where a prompt has fewer."""

    def make(counts: Sequence[int], generator: torch.Generator) -> Any:
        pixels = torch.zeros(len(counts), max(counts), 3, size, size)
        for row, count in zip(pixels, counts, strict=True):
            row[:count] = torch.randn(count, 3, size, size, generator=generator)
        return [tokens] * sum(counts), {"pixel_values": pixels} if max(counts) else {}

    return make


def _with_large(made: Any, count: int, generator: torch.Generator) -> Any:
    """Also the pictures at a higher resolution."""
    sizes, arguments = made
    return sizes, {**arguments, "high_res_pixel_values": torch.randn(count, 3, 32, 32, generator=generator)} if count else {}


_SIGLIP = {
    "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "num_channels": 3,
}  # fmt: skip

FAMILIES: dict[str, Multimodal] = {
    "qwen2_5_vl": Multimodal(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 3]}},
            "vision_config": {
                "depth": 3, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "patch_size": 4, "out_hidden_size": 48,
                "window_size": 16, "fullatt_block_indexes": [1], "spatial_merge_size": 2, "temporal_patch_size": 2,
            },
            "image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END, "video_token_id": 143,
        },
        lambda counts, generator: _patches(counts, generator, 4, 2),
        "mm_token_type_ids",
    ),
    "smolvlm": Multimodal(
        "SmolVLMForConditionalGeneration",
        "SmolVLMConfig",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**_SIGLIP, "image_size": 24, "patch_size": 4},
            "scale_factor": 2, "image_token_id": IMAGE, "pad_token_id": 0,
        },
        _rows_of_squares(9, 24),
    ),
    "gemma3": Multimodal(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": {
                **TEXT, "head_dim": 14, "query_pre_attn_scalar": 14, "sliding_window": 13, "num_hidden_layers": 3,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            "vision_config": {**_SIGLIP, "image_size": 24, "patch_size": 4, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 9, "image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END,
        },
        _squares(9, 24),
        "token_type_ids",
    ),
    "qwen3_vl": Multimodal(
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {
            "text_config": {
                **TEXT, "head_dim": 12,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
            },
            "vision_config": {
                "depth": 3, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "patch_size": 4, "out_hidden_size": 48,
                "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 36,
                "deepstack_visual_indexes": [0, 2],
            },
            "image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END, "video_token_id": 143,
        },
        lambda counts, generator: _patches(counts, generator, 4, 2),
        "mm_token_type_ids",
    ),
    "janus": Multimodal(
        "JanusForConditionalGeneration",
        "JanusConfig",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {
                "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 12, "patch_size": 4,
                "mlp_ratio": 2.0, "projection_dim": 48, "num_image_tokens": 9, "depth": 2,
            },
            "vq_config": {
                "embed_dim": 8, "num_embeddings": 16, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1,
                "num_patches": 4, "projection_dim": 48, "image_token_embed_dim": 48, "latent_channels": 8,
                "double_latent": False,
            },
            "image_token_id": IMAGE,
        },
        _squares(9, 12),
    ),
    "deepseek_vl": Multimodal(
        "DeepseekVLForConditionalGeneration",
        "DeepseekVLConfig",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**_SIGLIP, "image_size": 12, "patch_size": 4, "model_type": "siglip_vision_model"},
            "image_token_id": IMAGE,
        },
        _squares(9, 12),
    ),
    "deepseek_vl_hybrid": Multimodal(
        "DeepseekVLHybridForConditionalGeneration",
        "DeepseekVLHybridConfig",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**_SIGLIP, "image_size": 12, "patch_size": 4, "model_type": "siglip_vision_model"},
            "high_res_vision_config": {
                "hidden_size": 24, "output_channels": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
                "patch_size": 4, "mlp_dim": 20, "window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 12,
                "model_type": "sam_vision_model",
            },
            "image_token_id": IMAGE,
        },
        lambda counts, generator: _with_large(_squares(9, 12)(counts, generator), sum(counts), generator),
    ),
    "deepseek_ocr2": Multimodal(
        "DeepseekOcr2ForConditionalGeneration",
        "DeepseekOcr2Config",
        {
            "text_config": {
                **TEXT, "mlp_layer_types": ["dense", "sparse", "sparse"], "n_routed_experts": 5, "n_shared_experts": 2,
                "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_key_value_heads": 4,
            },
            "vision_config": {
                "sam_config": {
                    "hidden_size": 24, "output_channels": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "image_size": 1024, "patch_size": 64, "window_size": 3, "global_attn_indexes": [1], "mlp_dim": 20,
                    "downsample_channels": [16, 24],
                },
                "encoder_config": {
                    "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "num_key_value_heads": 2, "vocab_size": 3, "max_position_embeddings": 256,
                },
            },
            "image_token_id": IMAGE,
        },
        _squares(145, 1024),
    ),
    "qwen3_5": Multimodal(
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Config",
        {
            "text_config": {
                **TEXT, "head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 12, "linear_num_key_heads": 2,
                "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
                "rope_parameters": {
                    "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5,
                },
            },
            "vision_config": {
                "depth": 2, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "patch_size": 4, "out_hidden_size": 48,
                "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 36,
            },
            "image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END, "video_token_id": 143,
        },
        lambda counts, generator: _patches(counts, generator, 4, 2),
        "mm_token_type_ids",
    ),
    "gemma4": Multimodal(
        "Gemma4ForConditionalGeneration",
        "Gemma4Config",
        {
            "text_config": {
                **TEXT, "head_dim": 12, "sliding_window": 37, "global_head_dim": 20, "num_global_key_value_heads": 1,
                "attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "final_logit_softcapping": 5.0,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "use_bidirectional_attention": "vision",
            },
            "vision_config": {
                "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 2, "head_dim": 12, "patch_size": 4, "position_embedding_size": 64,
                "pooling_kernel_size": 3,
            },
            "audio_config": None, "image_token_id": IMAGE, "boi_token_id": START, "eoi_token_id": END,
            "video_token_id": 143, "audio_token_id": 144,
        },
        lambda counts, generator: _padded_patches(counts, generator, 4, 3),
        "mm_token_type_ids",
    ),
}  # fmt: skip
_GEMMA4 = FAMILIES["gemma4"]
# Gemma 4 E2B and E4B: embeddings per layer, layers that read the keys of others, causal attention to pictures, and limits in
# the tower's products.
FAMILIES["gemma4_small"] = replace(
    _GEMMA4,
    config={
        **_GEMMA4.config,
        "text_config": {
            **_GEMMA4.config["text_config"], "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 151,
            "use_bidirectional_attention": None, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "use_double_wide_mlp": True,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "vision_config": {**_GEMMA4.config["vision_config"], "use_clipped_linears": True},
    },
)  # fmt: skip
