"""A model of DeepSeek-V3's shape, small enough to be trained in minutes on two cores, and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    f"{{% elif message['role'] == 'user' %}}{USER}{{{{ message['content'] }}}}"
    f"{{% else %}}{ASSISTANT}{{% generation %}}{{{{ message['content'] }}}}{{{{ eos_token }}}}{{% endgeneration %}}"
    "{% endif %}"
    f"{{% endfor %}}{{% if add_generation_prompt %}}{ASSISTANT}{{% endif %}}"
)


@dataclass(frozen=True)
class Size:
    """Widths of a model, and how it is trained.

    Attributes:
        heads: of 32 columns that do not turn, 16 that do, and values of 32.
        length: tokens of a row in training; the model can read four times as many.
        batch: rows of a step.
        rate: the largest learning rate.
    """

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    experts: int
    inner: int
    length: int
    batch: int
    rate: float


SIZES = {
    "small": Size(8192, 256, 4, 4, 16, 128, length=256, batch=8, rate=4e-3),
    "smallest": Size(512, 64, 2, 2, 8, 32, length=64, batch=4, rate=4e-3),
}


def make_tokenizer(texts: list[str], vocabulary: int, length: int) -> Any:
    """Byte-level BPE with DeepSeek's control tokens, as a Transformers tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), [BOS, EOS, PAD, USER, ASSISTANT]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=BOS, eos_token=EOS, pad_token=PAD, additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE, model_max_length=4 * length,
    )  # fmt: skip


def make_model(size: Size, tokenizer: Any) -> Any:
    """A random `DeepseekV3ForCausalLM` with one MTP layer promised: the trainer makes it."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=len(tokenizer), hidden_size=size.hidden, intermediate_size=3 * size.hidden, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.heads, q_lora_rank=size.hidden // 2,
        kv_lora_rank=size.hidden // 4, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, first_k_dense_replace=1,
        n_routed_experts=size.experts, num_experts_per_tok=2, n_group=4, topk_group=2, n_shared_experts=1,
        moe_intermediate_size=size.inner, norm_topk_prob=True, routed_scaling_factor=1.0, num_nextn_predict_layers=1,
        max_position_embeddings=4 * size.length, tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config)
