"""A small model of each family, tested by Transformers' mixins; runs from the folder to which `stage.py` copies it."""

from __future__ import annotations

import unittest
from typing import Any, ClassVar

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from .generation.test_utils import GenerationTesterMixin
from .test_modeling_common import ModelTesterMixin, ids_tensor
from .test_training_mixin import TrainingTesterMixin

SMALL: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 512, "initializer_range": 0.02,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LATENT = {
    **SMALL, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}  # fmt: skip
EXPERTS = {
    **LATENT, "moe_intermediate_size": 16, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}  # fmt: skip
# At most as many experts per token as the chosen groups have: Transformers' own tester requests 8 of 4, so that torch.topk
# breaks ties among masked experts, which no checkpoint does and `models/experts.py` rejects.
GROUPS = {**EXPERTS, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5, "num_experts_per_tok": 4}

GELU = {**{name: value for name, value in SMALL.items() if name != "hidden_act"}, "head_dim": 8}
PLAIN_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
TYPES = ["sliding_attention", "full_attention"]

_WITHOUT_ACTIVATION = {name: value for name, value in SMALL.items() if name != "hidden_act"}
DELTA_NETS = {
    **SMALL, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_num_value_heads": 4, "linear_value_head_dim": 8,
}  # fmt: skip

GROWING = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 64.0, "original_max_position_embeddings": 8, "mscale": 1.0,
    "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.4,
}  # fmt: skip

FIELDS: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen2": SMALL,
    "qwen3": {**SMALL, "head_dim": 8},
    "mistral": SMALL,
    "deepseek_v2": EXPERTS,
    "deepseek_v3": GROUPS,
    # With fewer index heads, several keys would get a score of exactly 0 from all heads, which are ties.
    "deepseek_v32": {**GROUPS, "index_topk": 8, "index_head_dim": 32, "index_n_heads": 20},
    "deepseek_v4": {
        **{name: value for name, value in SMALL.items() if name not in ("intermediate_size", "num_key_value_heads")},
        "head_dim": 16, "qk_rope_head_dim": 8, "q_lora_rank": 32, "o_groups": 2, "o_lora_rank": 16, "sliding_window": 16,
        "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2, "hc_sinkhorn_iters": 3,
        "index_topk": 4, "index_head_dim": 16, "index_n_heads": 20, "mlp_layer_types": ["hash_moe", "moe"],
        "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "glm_moe_dsa": {
        **GROUPS, "index_topk": 8, "index_head_dim": 32, "index_n_heads": 20, "indexer_types": ["full", "shared"],
    },
    # Transformers counts padding in the position that decides the queries' factor, so that a padded text has other results
    # than by itself; with the default `floor_scale`, all factors here are 1.
    "llama4_text": {
        **SMALL, "head_dim": 8, "intermediate_size": 16, "intermediate_size_mlp": 32, "num_local_experts": 8,
        "num_experts_per_tok": 2, "interleave_moe_layer_step": 2, "no_rope_layers": [1, 0], "attention_chunk_size": 8,
    },
    "youtu": LATENT,
    "ministral": {**SMALL, "head_dim": 8, "sliding_window": 32},
    "ministral3": {**SMALL, "head_dim": 8, "rope_parameters": GROWING},
    "mistral4": {**GROUPS, "rope_parameters": GROWING},
    "smollm3": {**SMALL, "no_rope_layers": [1, 0]},
    "olmo2": SMALL,
    "olmo3": {**SMALL, "layer_types": TYPES, "sliding_window": 32},
    "phi3": SMALL,
    "glm": {**SMALL, "head_dim": 8},
    "glm4": {**SMALL, "head_dim": 8},
    "granite": {**SMALL, "attention_multiplier": 0.4, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    "gemma": {**GELU, "hidden_act": "gelu_pytorch_tanh"},
    "gemma2": {**GELU, "sliding_window": 32, "query_pre_attn_scalar": 8},
    "gemma3_text": {**GELU, "layer_types": TYPES, "sliding_window": 32, "query_pre_attn_scalar": 8},
    "gemma4_text": {
        **GELU, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": [*TYPES, *TYPES], "sliding_window": 32,
        "global_head_dim": 16, "vocab_size_per_layer_input": 99, "hidden_size_per_layer_input": 16, "use_double_wide_mlp": True,
    },
    "gemma4_unified_text": {
        **GELU, "layer_types": TYPES, "sliding_window": 32, "global_head_dim": 16, "attention_k_eq_v": True,
    },
    "ernie4_5": {**SMALL, "head_dim": 8},
    "exaone4": {**SMALL, "layer_types": TYPES, "sliding_window": 32, "sliding_window_pattern": 2},
    "seed_oss": {**SMALL, "head_dim": 8, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "hunyuan_v1_dense": {**SMALL, "head_dim": 8},
    "stablelm": {**SMALL, "partial_rotary_factor": 0.5},
    "starcoder2": {**SMALL, "hidden_act": "gelu_pytorch_tanh"},
    "cohere2": {**SMALL, "layer_types": TYPES, "sliding_window": 32},
    "mixtral": {**SMALL, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {**SMALL, **PLAIN_EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**SMALL, **PLAIN_EXPERTS, "head_dim": 8},
    "glm4_moe": {
        **SMALL, "head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 8, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "num_mtp_layers": 0,
    },
    "glm4_moe_lite": {**GROUPS, "mlp_layer_types": ["dense", "sparse"]},
    "minimax_m2": {**SMALL, "head_dim": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    "granitemoe": {**SMALL, "num_local_experts": 8, "num_experts_per_tok": 2},
    "gpt_oss": {
        **SMALL, "head_dim": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "layer_types": TYPES, "sliding_window": 32,
    },
    "lfm2": {**_WITHOUT_ACTIVATION, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "lfm2_moe": {
        **_WITHOUT_ACTIVATION, **PLAIN_EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1,
    },
    "kimi_linear": {
        **LATENT, "q_lora_rank": None, "moe_intermediate_size": 16, "num_local_experts": 8, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "layer_types": ["linear_attention", "full_attention"], "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "qwen3_next": {**DELTA_NETS, **PLAIN_EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": DELTA_NETS,
    "qwen3_5_moe_text": {**DELTA_NETS, **PLAIN_EXPERTS, "shared_expert_intermediate_size": 32},
}  # fmt: skip


_BERT = {**{name: value for name, value in SMALL.items() if name != "num_key_value_heads"}, "hidden_act": "gelu"}
ENCODER_FIELDS: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "distilbert": {
        "vocab_size": 99, "dim": 32, "hidden_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 512,
        "pad_token_id": 0,
    },
    "modernbert": {**_WITHOUT_ACTIVATION, "layer_types": TYPES, "local_attention": 8},
}  # fmt: skip


class ModelTester:
    """Provides a config and inputs to the mixins; the mask is lower triangular, as in Transformers' own testers."""

    batch_size, seq_length, is_training = 5, 7, True

    def __init__(self, family: str) -> None:
        self.family = family
        names = MODEL_FOR_PRETRAINING_MAPPING_NAMES | MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        self.causal_lm_class = getattr(transformers, names[family])
        for name, value in FIELDS[family].items():
            setattr(self, name, value)

    def get_config(self) -> Any:
        return transformers.CONFIG_MAPPING[self.family](**FIELDS[self.family])

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}


class _FamilyTest(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    family: ClassVar[str]
    model_tester: Any = None
    test_all_params_have_gradient = False  # experts without tokens have none
    model_split_percents = [0.5, 0.7, 0.8]

    def setUp(self) -> None:
        self.model_tester = ModelTester(self.family)
        self.all_model_classes = (self.model_tester.causal_lm_class,)


class EncoderTester:
    """As `ModelTester`, for the base model of an encoder; the mask has padding on the right."""

    batch_size, seq_length, is_training = 5, 7, False
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, 99

    def __init__(self, family: str) -> None:
        self.family, self.base_model_class = family, getattr(transformers, MODEL_MAPPING_NAMES[family])

    def get_config(self) -> Any:
        return transformers.CONFIG_MAPPING[self.family](**ENCODER_FIELDS[self.family])

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        mask = torch.ones_like(ids)
        mask[1:, -2:] = 0
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class _EncoderTest(ModelTesterMixin):
    family: ClassVar[str]
    model_tester: Any = None
    model_split_percents = [0.5, 0.7, 0.8]

    def setUp(self) -> None:
        self.model_tester = EncoderTester(self.family)
        self.all_model_classes = (self.model_tester.base_model_class,)


for _family in (*FIELDS, *ENCODER_FIELDS):
    _name = f"Test_{_family}"
    _base = _FamilyTest if _family in FIELDS else _EncoderTest
    globals()[_name] = type(_name, (_base, unittest.TestCase), {"family": _family})
