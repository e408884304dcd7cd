"""`attn_implementation="dso_train"`: attention for training Transformers models on packed and padded rows.

    register_train_attention()
    model.set_attn_implementation("dso_train")

Instead of a dense mask, the model's mask function is turned into the bounds of the texts in each row (`Texts`). Texts packed
into one row do not attend to each other; they are recognized by position_ids that restart, without an attention_mask, or by
`cu_seq_lens_q` of Transformers' DataCollatorWithFlattening. Padding at either end of a row has zero outputs and gradients.
Sliding windows and chunked attention follow the model.

Calls that are not training of a causal model (with a KV cache, a 4-D mask from the caller, or non-causal attention) run
Transformers' sdpa unchanged. Anything that changes the softmax (dropout, logit caps, sinks) raises UnsupportedRequestError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from ..errors import UnsupportedRequestError
from ..integration.attention.transformers_sdpa import causal_mask_function, sdpa_attention_forward, sdpa_mask
from .ops.attention import packed_attention

DSO_TRAIN: Final = "dso_train"
_REFUSED = ("softcap", "position_bias", "s_aux", "head_mask", "cache", "output_attentions")

Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Texts:
    """The bounds of the texts in a batch of rows. Passed through Transformers' models in place of an attention mask.

    Attributes:
        begin, end: int64 [n] on the CPU, ascending: text i is tokens [begin[i], end[i]) of the flattened batch.
        window: tokens that a token attends to, itself included; 0: all earlier ones.
        rows: number of rows.
        tokens: tokens per row.
    """

    begin: torch.Tensor
    end: torch.Tensor
    window: int
    rows: int
    tokens: int


def register_train_attention() -> None:
    """Registers the attention `dso_train` and its mask with Transformers. May be called repeatedly."""
    AttentionInterface.register(DSO_TRAIN, train_attention)
    AttentionMaskInterface.register(DSO_TRAIN, train_mask)


def train_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function for Transformers' `AttentionInterface`.

    Args:
        query, key, value: [B, heads, S, Dk], [B, kv_heads, S, Dk] and [B, kv_heads, S, Dv].

    Returns: the output [B, S, heads, Dv], and None for the attention weights.

    Raises:
        UnsupportedRequestError: a variant of softmax that is not supported, or a mask of a different shape.
    """
    _refuse(module, dropout, kwargs)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    plain = attention_mask is None and causal and query.shape[2] == key.shape[2]
    if not plain and not isinstance(attention_mask, Texts):
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            is_causal=is_causal,
            sliding_window=sliding_window,
            **kwargs,
        )
    rows, _, tokens, width = query.shape
    texts = attention_mask if isinstance(attention_mask, Texts) else whole_rows(rows, tokens, sliding_window or 0)
    if kwargs.get("cu_seq_lens_q") is not None:
        texts = _flattened(kwargs["cu_seq_lens_q"], rows, tokens, texts.window)
    if (texts.rows, texts.tokens) != (rows, tokens) or key.shape[2] != tokens:
        raise UnsupportedRequestError(
            f"{type(module).__name__}: the mask has {texts.rows} rows of {texts.tokens} tokens, but the batch has {rows} rows "
            f'of {tokens} queries and {key.shape[2]} keys; use attn_implementation="sdpa"'
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return packed_attention(q, k, v, texts.begin, texts.end, width**-0.5 if scaling is None else scaling, texts.window), None


def train_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Rule | None = None,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Texts | torch.Tensor | None:
    """Mask function for Transformers' `AttentionMaskInterface`; arguments as of `transformers.masking_utils.sdpa_mask`.

    Raises:
        UnsupportedRequestError: padding between the tokens of a text, or a mask that is not causal.
    """
    rule: Any = mask_function or causal_mask_function
    on_cache = q_length != kv_length or not isinstance(q_offset, int) or q_offset != 0 or kv_offset != 0
    if on_cache or use_vmap or "allow_is_bidirectional_skip" in kwargs:  # use_vmap: the caller adds its own pattern
        given: dict[str, Any] = {
            "batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset,
            "kv_offset": kv_offset, "mask_function": rule, "attention_mask": attention_mask, "local_size": local_size,
            "use_vmap": use_vmap, "device": device,
        }  # fmt: skip
        return sdpa_mask(**given, **kwargs)
    return _texts(rule, attention_mask, batch_size, q_length, local_size or 0, device)


def whole_rows(rows: int, tokens: int, window: int = 0) -> Texts:
    """The bounds for one text per row."""
    begin = torch.arange(rows, dtype=torch.int64, device="cpu") * tokens
    return Texts(begin, begin + tokens, window, rows, tokens)


def _texts(rule: Rule, padding: torch.Tensor | None, rows: int, tokens: int, window: int, device: Any) -> Texts:
    """The bounds of the texts. A text begins where a token does not attend to the previous one.

    With chunked attention (Llama 4) that is the first token of a chunk; the window, as long as a chunk, covers all of it.
    """
    row = torch.arange(rows, device=device, dtype=torch.int64)[:, None]
    here = torch.arange(1, tokens, device=device, dtype=torch.int64)[None]
    if bool(rule(row, torch.zeros_like(row), here - 1, here).any()):
        raise UnsupportedRequestError(
            'dso_train is causal, but tokens of this model attend to later ones; use attn_implementation="sdpa"'
        )
    begins = torch.ones(rows, tokens, dtype=torch.bool, device=device)
    if window != 1:
        begins[:, 1:] = ~rule(row, torch.zeros_like(row), here, here - 1)
    starts = begins.flatten().nonzero()[:, 0].cpu()
    ends = torch.cat((starts[1:], starts.new_full((min(1, rows * tokens),), rows * tokens)))
    if padding is None or bool(padding.all()):
        return Texts(starts, ends, window, rows, tokens)
    return _without_padding(starts, ends, padding.to("cpu", torch.bool), window)


def _without_padding(starts: torch.Tensor, ends: torch.Tensor, real: torch.Tensor, window: int) -> Texts:
    before = torch.nn.functional.pad(real.flatten().long().cumsum(0), (1, 0))  # number of real tokens before each token
    count = before[ends] - before[starts]
    at = torch.nn.functional.pad(real.flatten().nonzero()[:, 0], (0, 1))  # positions of the real tokens
    begin = torch.where(count > 0, at[before[starts].clamp(max=len(at) - 1)], starts)
    last = torch.where(count > 0, at[(before[ends] - 1).clamp(min=0)] + 1, starts)
    if bool((last - begin != count).any()):
        row = int(begin[last - begin != count][0]) // real.shape[1]
        raise UnsupportedRequestError(
            f"dso_train: attention_mask has zeros between the tokens of row {row}, but padding is supported only at the ends "
            'of a row; remove those tokens, or use attn_implementation="sdpa"'
        )
    return Texts(begin, last, window, *real.shape)


def _flattened(cu_seqlens: torch.Tensor, rows: int, tokens: int, window: int) -> Texts:
    bounds = cu_seqlens.to("cpu", torch.int64)
    if rows != 1 or bounds.dim() != 1 or int(bounds[0]) != 0 or int(bounds[-1]) != tokens:
        raise UnsupportedRequestError(
            f"cu_seq_lens_q must run from 0 to the number of tokens of a single row, got {bounds.tolist()[:9]} for {rows} rows "
            f"of {tokens} tokens"
        )
    return Texts(bounds[:-1].contiguous(), bounds[1:].contiguous(), window, rows, tokens)


def _refuse(module: Any, dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise UnsupportedRequestError(
            f"{type(module).__name__}: dso_train has no dropout, but attention_dropout is {dropout}; set it to 0, or use "
            'attn_implementation="sdpa"'
        )
    for name in _REFUSED:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise UnsupportedRequestError(f'{type(module).__name__}: dso_train has no {name}; use attn_implementation="eager"')
