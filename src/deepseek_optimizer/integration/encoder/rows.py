"""The tokens of a batch as rows without padding, and steps of whole sequences within a budget of tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...backends.base import PREFILL, Int32, StepBatch


@dataclass
class Rows:
    """The tokens of a batch that are not padding, sequence after sequence.

    Attributes:
        arguments: of the embeddings module, by name: each [1, tokens] or [1, tokens, hidden].
        positions: int32 [tokens], for RoPE.
        lengths: number of tokens of each sequence that has any.
    """

    arguments: dict[str, torch.Tensor]
    positions: Int32
    lengths: list[int]


def rows_of(embeddings: Any, call: dict[str, Any], kept: torch.Tensor) -> Rows:
    """The rows of a padded batch.

    Args:
        embeddings: the model's embeddings module.
        call: the arguments of the model's forward: input_ids [batch, columns] or inputs_embeds; position_ids and token_type_ids
            [batch or 1, columns] or None.
        kept: bool [batch, columns], False for padding.

    Raises:
        ValueError: a token id or position is outside its table.
    """
    ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
    positions = _positions(embeddings, call, kept.shape)
    given = {
        "input_ids": ids, "inputs_embeds": embeds, "position_ids": positions, "token_type_ids": call.get("token_type_ids")
    }  # fmt: skip
    takes = inspect.signature(type(embeddings).forward).parameters
    rows = {name: value.expand(*kept.shape, *value.shape[2:])[kept] for name, value in given.items() if value is not None}
    _check_tables(embeddings, rows)
    arguments = {name: value[None] for name, value in rows.items() if name in takes}
    if ids is None and "input_ids" in takes:
        arguments["input_ids"] = None  # DistilBERT's has no default
    places = rows["position_ids"].cpu().numpy().astype(np.int32)
    return Rows(arguments, places, [n for n in kept.sum(1).tolist() if n])


def _positions(embeddings: Any, call: dict[str, Any], shape: Any) -> torch.Tensor:
    """Positions as Transformers counts them: by column, or in RoBERTa from the first token on."""
    if (given := call.get("position_ids")) is not None:
        return given
    ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
    if hasattr(embeddings, "create_position_ids_from_input_ids"):
        padding = embeddings.padding_idx
        if ids is not None:
            return embeddings.create_position_ids_from_input_ids(ids, padding)
        return embeddings.create_position_ids_from_inputs_embeds(embeds, padding)
    source: Any = embeds if ids is None else ids
    return torch.arange(shape[1], device=source.device, dtype=torch.int64)[None]


def _check_tables(embeddings: Any, rows: dict[str, torch.Tensor]) -> None:
    """Raises ValueError unless all indices are within the tables of the embeddings."""
    tables = {"input_ids": ("word_embeddings", "tok_embeddings"), "position_ids": ("position_embeddings",)}
    tables["token_type_ids"] = ("token_type_embeddings",)
    for argument, names in tables.items():
        table = next((getattr(embeddings, name) for name in names if hasattr(embeddings, name)), None)
        values = rows.get(argument)
        if table is None or values is None or not values.numel():
            continue
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= table.num_embeddings:
            raise ValueError(
                f"{argument} has {low if low < 0 else high}, but the model has {table.num_embeddings} rows for them; shorten "
                "the text, or use the tokenizer that belongs to this model"
            )


def steps_of(lengths: list[int], budget: int) -> Iterator[tuple[int, int]]:
    """Sequences [begin, end) of each step: as many as have at most `budget` tokens together, at least one."""
    begin, tokens = 0, 0
    for i, length in enumerate(lengths):
        if i > begin and tokens + length > budget:
            yield begin, i
            begin, tokens = i, 0
        tokens += length
    if begin < len(lengths):
        yield begin, len(lengths)


def step_batch(states: torch.Tensor, positions: Int32, lengths: list[int], hidden: bool) -> StepBatch:
    """A step of whole sequences.

    Args:
        states: float32 [tokens, hidden], the embeddings.
        positions: int32 [tokens].
        lengths: number of tokens of each sequence.
        hidden: whether all hidden states are wanted, or only the last.
    """
    count = len(lengths)
    return StepBatch(
        token_ids=np.zeros(len(positions), np.int32),
        positions=positions,
        query_len=np.array(lengths, np.int32),
        context_len=np.zeros(count, np.int32),
        phase=np.full(count, PREFILL, np.int32),
        block_table=np.zeros((count, 0), np.int32),
        logit_rows=np.zeros(0, np.int32),
        states=states,
        hidden=hidden,
        last_hidden=not hidden,
    )
