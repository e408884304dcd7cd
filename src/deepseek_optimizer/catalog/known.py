"""Well-known checkpoints of the families, by the fields of their configs that decide shapes.

To add one, write its entry; its memory is computed from the shapes, and its path from `models/families.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class KnownModel:
    """A published checkpoint.

    Attributes:
        name: on the Hugging Face Hub.
        family: `model_type` of its config.json.
        fields: of its config.json, where they decide shapes and are not the family's defaults.
        architecture: Transformers' class; None: the family's with a language model head.
        in_readme: whether the READMEs list it.
    """

    name: str
    family: str
    fields: Mapping[str, Any]
    architecture: str | None = None
    in_readme: bool = False


def _dense(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "tie_word_embeddings": False, **more,
    }  # fmt: skip


def _v2(hidden: int, inner: int, layers: int, heads: int, experts: int, chosen: int, moe: int, **more: Any) -> dict[str, Any]:
    return _dense(
        hidden, inner, layers, heads, heads, 102400, n_routed_experts=experts, num_experts_per_tok=chosen,
        moe_intermediate_size=moe, n_shared_experts=2, first_k_dense_replace=1, kv_lora_rank=512, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, **more,
    )  # fmt: skip


def _deepseek(name: str, family: str, fields: Mapping[str, Any]) -> KnownModel:
    return KnownModel(name, family, fields, in_readme=True)


MODELS = (
    _deepseek("HuggingFaceTB/SmolLM2-135M-Instruct", "llama", _dense(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True)),
    _deepseek("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "qwen2", _dense(1536, 8960, 28, 12, 2, 151936)),
    _deepseek("deepseek-ai/deepseek-llm-7b-chat", "llama", _dense(4096, 11008, 30, 32, 32, 102400)),
    _deepseek("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "qwen2", _dense(3584, 18944, 28, 28, 4, 152064)),
    _deepseek("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "llama", _dense(4096, 14336, 32, 32, 8, 128256)),
    _deepseek("deepseek-ai/DeepSeek-R1-0528-Qwen3-8B", "qwen3", _dense(4096, 12288, 36, 32, 8, 151936, head_dim=128)),
    _deepseek("deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", "qwen2", _dense(5120, 13824, 48, 40, 8, 152064)),
    _deepseek(
        "deepseek-ai/DeepSeek-V2-Lite-Chat", "deepseek_v2",
        _v2(2048, 10944, 27, 16, 64, 6, 1408, q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1,
            routed_scaling_factor=1.0, norm_topk_prob=False),
    ),
    _deepseek("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", "qwen2", _dense(5120, 27648, 64, 40, 8, 152064)),
    _deepseek("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "llama", _dense(8192, 28672, 80, 64, 8, 128256)),
    _deepseek(
        "deepseek-ai/DeepSeek-V2-Chat", "deepseek_v2",
        _v2(5120, 12288, 60, 128, 160, 6, 1536, q_lora_rank=1536, topk_method="group_limited_greedy", n_group=8, topk_group=3,
            routed_scaling_factor=16.0, norm_topk_prob=False),
    ),
    _deepseek("deepseek-ai/DeepSeek-V3, DeepSeek-R1", "deepseek_v3", {}),
    _deepseek(
        "deepseek-ai/DeepSeek-V4-Flash", "deepseek_v4",
        {
            "rope_scaling": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 65536},
            "compress_ratios": [0, 0, *(4 if layer % 2 == 0 else 128 for layer in range(41))],
        },
    ),
    KnownModel("mistralai/Mistral-7B-Instruct-v0.3", "mistral", _dense(4096, 14336, 32, 32, 8, 32768, sliding_window=None)),
    KnownModel("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral", _dense(4096, 14336, 32, 32, 8, 32000, sliding_window=None)),
    KnownModel("mistralai/Ministral-3-8B-Instruct-2512", "ministral3", {}),
    KnownModel("mistralai/Mistral-Small-4-119B-2603", "mistral4", {}, "Mistral4ForCausalLM"),
    KnownModel("meta-llama/Llama-4-Scout-17B-16E-Instruct", "llama4_text", {}),
    KnownModel("HuggingFaceTB/SmolLM3-3B", "smollm3", _dense(2048, 11008, 36, 16, 4, 128256, tie_word_embeddings=True)),
    KnownModel(
        "Qwen/Qwen3-30B-A3B", "qwen3_moe",
        _dense(2048, 6144, 48, 32, 4, 151936, head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8),
    ),
    KnownModel(
        "google/gemma-2-9b-it", "gemma2", _dense(3584, 14336, 42, 16, 8, 256000, head_dim=256, tie_word_embeddings=True)
    ),
    KnownModel("microsoft/phi-4", "phi3", _dense(5120, 17920, 40, 40, 10, 100352, pad_token_id=100349)),
    KnownModel("microsoft/Phi-3.5-mini-instruct", "phi3", _dense(3072, 8192, 32, 32, 32, 32064)),
    KnownModel(
        "google/gemma-3-1b-it", "gemma3_text",
        _dense(1152, 6912, 26, 4, 1, 262144, head_dim=256, sliding_window=512, tie_word_embeddings=True),
    ),
    KnownModel("google/gemma-7b-it", "gemma", _dense(3072, 24576, 28, 16, 16, 256000, head_dim=256, tie_word_embeddings=True)),
    KnownModel("zai-org/glm-4-9b-chat-hf", "glm", {}),
    KnownModel("zai-org/GLM-4-9B-0414", "glm4", {}),
    KnownModel("zai-org/GLM-4.5-Air", "glm4_moe", {"head_dim": 128}),
    KnownModel("zai-org/GLM-4.7-Flash", "glm4_moe_lite", {}),
    KnownModel("zai-org/GLM-5", "glm_moe_dsa", {}),
    KnownModel("Qwen/Qwen1.5-MoE-A2.7B-Chat", "qwen2_moe", {}),
    KnownModel("MiniMaxAI/MiniMax-M2", "minimax_m2", {}),
    KnownModel("openai/gpt-oss-20b", "gpt_oss", {"num_hidden_layers": 24, "num_local_experts": 32}),
    KnownModel("openai/gpt-oss-120b", "gpt_oss", {}),
    KnownModel(
        "ibm-granite/granite-3.3-8b-instruct", "granite", _dense(4096, 12800, 40, 32, 8, 49159, tie_word_embeddings=True)
    ),
    KnownModel(
        "ibm-granite/granite-3.1-3b-a800m-instruct", "granitemoe",
        _dense(1536, 512, 32, 24, 8, 49155, num_local_experts=40, num_experts_per_tok=8, tie_word_embeddings=True),
    ),
    KnownModel("allenai/OLMo-2-1124-7B-Instruct", "olmo2", _dense(4096, 11008, 32, 32, 32, 100352)),
    KnownModel("allenai/Olmo-3-7B-Instruct", "olmo3", _dense(4096, 11008, 32, 32, 32, 100278)),
    KnownModel(
        "LGAI-EXAONE/EXAONE-4.0-1.2B", "exaone4",
        _dense(2048, 4096, 30, 32, 8, 102400, head_dim=64, sliding_window=None, layer_types=["full_attention"] * 30,
               tie_word_embeddings=True),
    ),
    KnownModel("baidu/ERNIE-4.5-0.3B-PT", "ernie4_5", {}),
    KnownModel("ByteDance-Seed/Seed-OSS-36B-Instruct", "seed_oss", _dense(5120, 27648, 64, 80, 8, 155136, head_dim=128)),
    KnownModel(
        "CohereLabs/c4ai-command-r7b-12-2024", "cohere2", _dense(4096, 14336, 32, 32, 8, 256000, tie_word_embeddings=True)
    ),
    KnownModel("stabilityai/stablelm-2-1_6b-chat", "stablelm", _dense(2048, 5632, 24, 32, 32, 100352)),
    KnownModel("bigcode/starcoder2-7b", "starcoder2", _dense(4608, 18432, 32, 36, 4, 49152, tie_word_embeddings=True)),
    KnownModel("google-bert/bert-base-uncased", "bert", {}, "BertModel"),
    KnownModel(
        "BAAI/bge-m3", "xlm-roberta",
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
         "vocab_size": 250002, "max_position_embeddings": 8194, "type_vocab_size": 1}, "XLMRobertaModel",
    ),
    KnownModel("answerdotai/ModernBERT-base", "modernbert", {}, "ModernBertModel"),
    KnownModel("openai-community/gpt2", "gpt2", {}),
    KnownModel(
        "google-t5/t5-base", "t5", {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
        "T5ForConditionalGeneration",
    ),
    KnownModel(
        "openai/whisper-large-v3", "whisper",
        {"d_model": 1280, "encoder_layers": 32, "decoder_layers": 32, "encoder_attention_heads": 20,
         "decoder_attention_heads": 20, "encoder_ffn_dim": 5120, "decoder_ffn_dim": 5120, "num_mel_bins": 128,
         "vocab_size": 51866}, "WhisperForConditionalGeneration",
    ),
)  # fmt: skip
