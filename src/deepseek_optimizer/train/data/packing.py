"""Packing of several documents into a row, without attention between them, and collation of rows into batches.

In a packed row, position_ids restart at each document; Transformers' masks and this package's attention use this to separate
documents. The first label of a document is ignored, so no document is predicted from the previous one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ...errors import ConfigError
from ...models.families import traits
from .store import IGNORED


def best_fit(lengths: Sequence[int] | np.ndarray, row: int) -> list[list[int]]:
    """Assigns documents to rows with best fit decreasing: from the longest to the shortest, each to the row where it leaves the
    least free space. Needs at most 11/9 of the optimal number of rows plus 1 (Johnson 1973). The result is deterministic.

    Args:
        lengths: tokens of each document.
        row: tokens per row.

    Returns: for each row, the indices of its documents.

    Raises:
        ConfigError: a document is longer than a row.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(row + 1)]  # free tokens -> indices of rows
    free = 0  # bit n: there is a row with n free tokens
    for index in np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist():
        length = int(lengths[index])
        if length > row:
            raise ConfigError(f"sequence {index:,} has {length:,} tokens, but a row only {row:,}; use longer rows or split it")
        fitting = free >> length
        if fitting:
            free_tokens = length + (fitting & -fitting).bit_length() - 1
            target = with_room[free_tokens].pop()
            if not with_room[free_tokens]:
                free &= ~(1 << free_tokens)
        else:
            free_tokens, target = row, len(rows)
            rows.append([])
        rows[target].append(index)
        left = free_tokens - length
        if left:
            with_room[left].append(target)
            free |= 1 << left
    return rows


MIN_ROW = 1024  # default minimum of tokens per row, within the model's context


def row_for(longest: int, context: int) -> int:
    """The default number of tokens per row for documents of at most `longest` tokens."""
    return min(context, max(MIN_ROW, longest))


class PackedRows(Dataset[dict[str, torch.Tensor]]):
    """The documents of a data set, packed into rows with `input_ids`, `labels` and `position_ids`, int64 [n], n at most `row`.

    Args:
        documents: a map-style data set with `input_ids` and `labels`, such as `TokenDataset`.
        row: tokens per row.
        lengths: tokens of each document; None: `documents.lengths` if it exists, else all documents are read.

    Raises:
        ConfigError: a document is longer than a row.
    """

    def __init__(self, documents: Any, row: int, lengths: Sequence[int] | np.ndarray | None = None) -> None:
        if lengths is None:
            lengths = getattr(documents, "lengths", None)
        if lengths is None:
            lengths = [len(documents[i]["input_ids"]) for i in range(len(documents))]
        self.row, self._documents, self._rows = row, documents, best_fit(lengths, row)
        self.tokens = int(np.sum(lengths))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        documents = [_tensors(self._documents[i]) for i in self._rows[index]]
        out = {name: torch.cat([document[name] for document in documents]) for name in ("input_ids", "labels")}
        out["position_ids"] = torch.cat(
            [torch.arange(len(document["input_ids"]), dtype=torch.int64, device="cpu") for document in documents]
        )
        return out


def pack_for_trainer(trainer: Any) -> None:
    """Packs a Trainer's training data and sets its collator.

    Raises:
        ConfigError: the data set has no length, no input_ids or no labels; the trainer has a custom collator; or the model
            would join the documents of a row.
    """
    from transformers import DataCollatorWithPadding, default_data_collator

    if isinstance(trainer.train_dataset, PackedRows) or trainer.train_dataset is None:
        return
    if not traits(trainer.model.config).packs:
        raise ConfigError(
            f"packing=True: {trainer.model.config.model_type} would join the documents of a row; set packing=False"
        )
    given = trainer.data_collator
    if not isinstance(given, (Collator, DataCollatorWithPadding)) and given is not default_data_collator:
        raise ConfigError(f"packing=True needs its own collator instead of data_collator={type(given).__name__}; "
                          "omit data_collator, or set packing=False")  # fmt: skip
    documents = trainer.train_dataset
    try:
        lengths = [len(documents[i]["input_ids"]) for i in range(len(documents))]
        documents[0]["labels"]
    except (TypeError, KeyError, IndexError) as error:
        raise ConfigError(f"packing=True needs a train_dataset with a length, whose examples have input_ids and labels "
                          f"({type(error).__name__}: {error})") from None  # fmt: skip
    context = getattr(trainer.model.config, "max_position_embeddings", None) or max(lengths)
    trainer.train_dataset = PackedRows(documents, row_for(max(lengths), context), lengths)
    pad = getattr(trainer.processing_class, "pad_token_id", None)
    trainer.data_collator = Collator(pad or 0)


@dataclass(frozen=True)
class Collator:
    """Collates sequences into a batch, for `Trainer(data_collator=...)`.

    Rows with `position_ids` are packed: their padding is a separate document without labels, and there is no attention mask,
    which would make Transformers ignore the documents. Other rows are padded on the right, with an attention mask.

    Args:
        pad_token_id: the padding token; it is never trained or attended to.
        padding_free: concatenate all sequences of a batch to one row [1, T], without padding.
    """

    pad_token_id: int = 0
    padding_free: bool = False

    def __call__(self, features: Sequence[Any]) -> dict[str, torch.Tensor]:
        rows = [_tensors(feature) for feature in features]
        packed = "position_ids" in rows[0]
        if self.padding_free:
            positions = [
                row.get("position_ids", torch.arange(len(row["input_ids"]), dtype=torch.int64, device="cpu")) for row in rows
            ]
            out = {name: torch.cat([row[name] for row in rows])[None] for name in ("input_ids", "labels")}
            return {**out, "position_ids": torch.cat(positions)[None]}
        width = max(len(row["input_ids"]) for row in rows)
        out = {
            "input_ids": torch.full((len(rows), width), self.pad_token_id, dtype=torch.int64, device="cpu"),
            "labels": torch.full((len(rows), width), IGNORED, dtype=torch.int64, device="cpu"),
        }
        last = "position_ids" if packed else "attention_mask"
        out[last] = torch.zeros((len(rows), width), dtype=torch.int64, device="cpu")
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            out["input_ids"][i, :length], out["labels"][i, :length] = row["input_ids"], row["labels"]
            if packed:
                out[last][i, :length] = row["position_ids"]
                out[last][i, length:] = torch.arange(width - length, dtype=torch.int64, device="cpu")
            else:
                out[last][i, :length] = 1
        return out


def _tensors(document: Any) -> dict[str, torch.Tensor]:
    """A document as tensors. The first label is always ignored, since no token precedes it."""
    out = {name: torch.as_tensor(document[name], dtype=torch.int64, device="cpu") for name in ("input_ids", "labels")}
    if "position_ids" in document:
        out["position_ids"] = torch.as_tensor(document["position_ids"], dtype=torch.int64, device="cpu")
        starts = out["position_ids"] == 0
    else:
        starts = torch.zeros(len(out["labels"]), dtype=torch.bool, device="cpu")
        starts[:1] = True
    out["labels"] = out["labels"].masked_fill(starts, IGNORED)
    return out
