"""Several documents in a row, none seeing another, and rows to batches.

In a packed row positions begin again at each document: by that Transformers' masks and this package's attention keep documents
apart. A document's first label is never trained, so no loss crosses from one into the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ...errors import ConfigError
from .store import IGNORED


def best_fit(lengths: Sequence[int] | np.ndarray, row: int) -> list[list[int]]:
    """Indices of documents that share a row of so many tokens: from the longest to the shortest, each into the row where it
    leaves least room (best fit decreasing; at most 11/9 of the fewest rows possible and 1, Johnson 1973). The same lengths give
    the same rows.

    Raises:
        ConfigError: a document is longer than a row.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(row + 1)]  # tokens that are free -> numbers of rows
    free = 0  # bit n: there is a row with n free tokens
    for index in np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist():
        length = int(lengths[index])
        if length > row:
            raise ConfigError(f"sequence {index:,} has {length:,} tokens, and a row {row:,}; make rows longer or split it")
        fitting = free >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = with_room[room].pop()
            if not with_room[room]:
                free &= ~(1 << room)
        else:
            room, number = row, len(rows)
            rows.append([])
        rows[number].append(index)
        left = room - length
        if left:
            with_room[left].append(number)
            free |= 1 << left
    return rows


LEAST_ROW = 1024  # tokens of a row where nothing is said and the model has positions for it


def row_for(longest: int, context: int) -> int:
    """Tokens of a row for documents of up to `longest` tokens."""
    return min(context, max(LEAST_ROW, longest))


class PackedRows(Dataset[dict[str, torch.Tensor]]):
    """A data set's documents in rows: `input_ids`, `labels` and `position_ids`, int64 [n], n at most `row`.

    Args:
        documents: has `input_ids` and `labels`, as `TokenDataset` and any map-style data set of Transformers' Trainer.
        row: tokens of a row.
        lengths: of the documents; None: `documents.lengths`, or what looking at each tells.

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
    """Gives a Trainer its training data in rows, and batches that keep the documents of a row apart.

    Raises:
        ConfigError: the data has no length, no tokens or no labels; or a collator was given, which would make other batches.
    """
    from transformers import DataCollatorWithPadding, default_data_collator

    if isinstance(trainer.train_dataset, PackedRows) or trainer.train_dataset is None:
        return
    given = trainer.data_collator
    if not isinstance(given, (Collator, DataCollatorWithPadding)) and given is not default_data_collator:
        raise ConfigError(f"packing=True makes its own batches, and data_collator={type(given).__name__} would make others; "
                          "leave it out, or set packing=False")  # fmt: skip
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
    """Sequences to a batch, for `Trainer(data_collator=...)`.

    Rows with `position_ids` are packed: what fills them up is a document of its own without labels, and there is no attention
    mask, for which Transformers would forget the documents. Others are padded on the right with an attention mask.

    Args:
        pad_token_id: what fills rows up; it is never trained nor seen.
        padding_free: all sequences of a batch become one row [1, T], so that nothing is filled up.
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
    """One document of any data set. Its first label is left out, whatever the data set says: nothing stands before it."""
    out = {name: torch.as_tensor(document[name], dtype=torch.int64, device="cpu") for name in ("input_ids", "labels")}
    if "position_ids" in document:
        out["position_ids"] = torch.as_tensor(document["position_ids"], dtype=torch.int64, device="cpu")
        starts = out["position_ids"] == 0
    else:
        starts = torch.zeros(len(out["labels"]), dtype=torch.bool, device="cpu")
        starts[:1] = True
    out["labels"] = out["labels"].masked_fill(starts, IGNORED)
    return out
