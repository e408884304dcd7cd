"""Small random models of families without an execution plan, by name: model_type, then the class where there are several."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig

VOCABULARY = 99


def _bert(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 52,
        "max_position_embeddings": 64, **more,
    }  # fmt: skip


def _gpt(**more: Any) -> dict[str, Any]:
    return {"n_embd": 36, "n_layer": 2, "n_head": 3, "n_positions": 64, **more}


def _bart(**more: Any) -> dict[str, Any]:
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
             (("layers", 2), ("attention_heads", 3), ("ffn_dim", 52))}  # fmt: skip
    return {"d_model": 36, "max_position_embeddings": 64, "decoder_start_token_id": 0, **sides, **more}


_T5: dict[str, Any] = {"d_model": 36, "d_kv": 12, "d_ff": 52, "num_layers": 2, "num_heads": 3, "decoder_start_token_id": 0}

# name -> (class, fields of the config)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "albert": ("AlbertModel", _bert(embedding_size=20)),
    "aria_text": (
        "AriaTextForCausalLM",
        _bert(num_key_value_heads=3, head_dim=12, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
    ),
    "bart": ("BartForConditionalGeneration", _bart()),
    "bert": ("BertModel", _bert()),
    "bert-mlm": ("BertForMaskedLM", _bert()),
    "bloom": ("BloomForCausalLM", {"hidden_size": 36, "n_layer": 2, "n_head": 3}),
    "codegen": ("CodeGenForCausalLM", _gpt(n_embd=48, n_head=4, rotary_dim=4)),
    "ctrl": ("CTRLLMHeadModel", _gpt(dff=52)),
    "deberta": ("DebertaModel", _bert(relative_attention=True, pos_att_type=["c2p", "p2c"])),
    "deberta-v2": ("DebertaV2Model", _bert(relative_attention=True, pos_att_type=["c2p", "p2c"])),
    "distilbert": ("DistilBertModel", {"dim": 36, "n_layers": 2, "n_heads": 3, "hidden_dim": 52}),
    "electra": ("ElectraForSequenceClassification", _bert(embedding_size=20)),
    "falcon": ("FalconForCausalLM", {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3}),
    "flex_olmo": ("FlexOlmoForCausalLM", _bert(num_key_value_heads=3, num_experts=6, num_experts_per_tok=2)),
    "gpt2": ("GPT2LMHeadModel", _gpt()),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", _gpt()),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {"hidden_size": 36, "num_layers": 2, "num_heads": 3, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", _bert()),
    "gptj": ("GPTJForCausalLM", _gpt(rotary_dim=4)),
    "mamba": ("MambaForCausalLM", {"hidden_size": 36, "num_hidden_layers": 2, "state_size": 4}),
    "modernbert": ("ModernBertModel", _bert(pad_token_id=0)),
    "mpnet": ("MPNetModel", _bert()),
    "mpt": ("MptForCausalLM", {"d_model": 36, "n_layers": 2, "n_heads": 3}),
    "olmoe": ("OlmoeForCausalLM", _bert(num_key_value_heads=3, num_experts=6, num_experts_per_tok=2)),
    "opt": ("OPTForCausalLM", {**_bert(), "ffn_dim": 52, "word_embed_proj_dim": 20}),
    "pegasus": ("PegasusForConditionalGeneration", _bart()),
    "phi": ("PhiForCausalLM", _bert()),
    "roberta": ("RobertaForSequenceClassification", _bert(num_labels=3)),
    "rwkv": ("RwkvForCausalLM", {"hidden_size": 36, "num_hidden_layers": 2}),
    "t5": ("T5ForConditionalGeneration", _T5),
    "umt5": ("UMT5ForConditionalGeneration", _T5),
    "whisper": ("WhisperForConditionalGeneration", _bart(num_mel_bins=8, max_source_positions=20, max_target_positions=64)),
    "xlm-roberta": ("XLMRobertaForTokenClassification", _bert()),
}


def random_general(name: str, **fields: Any) -> Any:
    """The model with random weights, those of linear layers large enough for every layer to matter."""
    class_name, own = CASES[name]
    kind = class_name.removesuffix("Model")
    model_type = next((t for t in (name, name.rpartition("-")[0]) if t in transformers.CONFIG_MAPPING), kind)
    tokens = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    config = AutoConfig.for_model(model_type, **{"vocab_size": VOCABULARY, **tokens, **own, **fields})
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.15)
    return model


def inputs_of(model: Any, rows: int = 2, tokens: int = 11) -> dict[str, torch.Tensor]:
    """Arguments of the model's forward: random tokens, the second row with padding at the end."""
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1:, tokens - 3 :] = 0
    if model.config.model_type == "whisper":
        features = torch.randn(rows, 8, 40, generator=torch.Generator().manual_seed(2))
        return {"input_features": features, "decoder_input_ids": ids[:, :5]}
    call = {"input_ids": ids, "attention_mask": mask}
    return {**call, "decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else call
