"""Draft vocabularies: the head of a layer that drafts has rows for the most frequent tokens only, as in EAGLE-3 (arXiv
2503.01840).

In a small model, the head is most of what a draft costs. Tokens outside are never drafted, so they end a round of drafts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch

from ...errors import ConfigError
from ...integration.load.mtp_layers import add_head
from ...models import draft_vocab_size
from .mtp import head_of
from .mtp_loss import IGNORED

DEFAULT: Final = 8192  # tokens


def frequent_tokens(rows: Any, size: int, vocab_size: int) -> torch.Tensor:
    """The tokens that are the most frequent labels of training data, int64 [size], ascending.

    Of tokens that are equally frequent as labels, those that are more frequent in the texts come first, then smaller ids.

    Args:
        rows: a data set with a length, whose rows have `input_ids` and perhaps `labels`.
        size: number of tokens.
        vocab_size: number of tokens of the model.
    """
    labels, texts = np.zeros(vocab_size, np.int64), np.zeros(vocab_size, np.int64)
    for n in range(len(rows)):
        row: Mapping[str, Any] = rows[n]
        ids = np.asarray(row["input_ids"]).ravel()
        wanted = np.asarray(row.get("labels", ids)).ravel()
        texts += np.bincount(ids, minlength=vocab_size)
        labels += np.bincount(wanted[wanted != IGNORED], minlength=vocab_size)
    order = np.lexsort((-texts, -labels))  # stable
    return torch.from_numpy(np.sort(order[:size]))


@torch.no_grad()
def set_draft_vocabulary(model: Any, tokens: torch.Tensor) -> None:
    """Gives the MTP layers of a model a draft vocabulary: their own heads, which are rows of those that they have had.

    These heads are not trained. The config then declares the vocabulary's size.

    Args:
        model: a model with MTP layers that have none.
        tokens: int64 [N], ascending; on the meta device for a model on it.
    """
    for layer in model.model.layers[model.config.num_hidden_layers :]:
        weight: Any = head_of(layer, model).weight
        with torch.device(weight.device):
            add_head(layer, weight.shape[1], weight.shape[0], len(tokens))
        if weight.is_meta:
            rows = weight.new_empty(len(tokens), weight.shape[1])
        else:
            rows = weight[tokens.to(weight.device)].clone()
            layer.shared_head.tokens.copy_(tokens)
        layer.shared_head.head.weight = torch.nn.Parameter(rows, requires_grad=False)
    model.config.draft_vocab_size = len(tokens)


def vocabulary_to_add(model: Any, size: int | None, new: bool) -> int | None:
    """The number of tokens of the draft vocabulary that a model's MTP layers are to get; None: their heads stay as they are.

    Args:
        model: a model with MTP layers.
        size: the number that is asked for; 0: all tokens; None: the default.
        new: whether all of these layers are new.

    Raises:
        ConfigError: the layers have a draft vocabulary, and another size is asked for.
    """
    vocab_size, own = int(model.config.vocab_size), draft_vocab_size(model.config)
    if own is not None and size not in (None, own):
        raise ConfigError(
            f"draft_vocabulary={size}: the checkpoint's layer drafts from {own} tokens, and has no head for others; leave "
            "draft_vocabulary out"
        )
    if size is None:
        size = DEFAULT if new and vocab_size >= 4 * DEFAULT else 0
    return size if own is None and 0 < size < vocab_size else None
