"""The language model of a multimodal model as a causal language model of its own."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin

from ..compat import causal_output, take_cache
from .parts import decoder_path, language_config


class LanguageModel(PreTrainedModel, GenerationMixin):
    """Shares the modules of a multimodal model, whose text it continues; a plan is bound to it as to any causal model.

    Args:
        whole: the multimodal model, with all modules in place.
    """

    base_model_prefix = "model"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # the modules have checked what they use
    _supports_attention_backend = True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def __init__(self, whole: Any) -> None:
        super().__init__(language_config(whole.config))
        self.model = whole.get_submodule(decoder_path(whole))
        self.lm_head = whole.lm_head
        self.all_tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"} if self.config.tie_word_embeddings else {}
        if whole.generation_config is not None:
            self.generation_config = whole.generation_config
        self.train(whole.training)

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Transformers' own forward, for calls that the plan cannot serve."""
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        if (limit := getattr(self.config, "final_logit_softcapping", None)) is not None:
            logits = limit * torch.tanh(logits / limit)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return causal_output(loss=loss, logits=logits, cache=take_cache(dict(output)), hidden_states=output.hidden_states)
