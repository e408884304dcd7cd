"""Storage of tokenized sequences in files that are mapped into memory.

A directory contains `tokens.int32` (the ids of all sequences), `trained.uint8` (1: the loss covers the token), `ends.int64`
(the end of each sequence), `places.int64` (file and line of each sequence; -1: no line) and `data.json` (file names and the
report).
"""

from __future__ import annotations

import json
import os
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ...errors import DataError
from .places import Place

IGNORED = -100  # label that Transformers' losses ignore


class TokenDataset(Dataset[dict[str, torch.Tensor]]):
    """A data set of sequences for Transformers' Trainer: `input_ids` and `labels`, int64 [n]. The first label of a sequence is
    ignored, since no token precedes it.

    Args:
        tokens: int32, the ids of all sequences, concatenated.
        trained: uint8 of the same length; 1: the loss covers the token.
        ends: int64 [sequences], the end of each sequence.
        places: int64 [sequences, 2], file index and line of each sequence.
        files: names of the files.
        chosen: indices of the sequences in this data set; None: all.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        trained: np.ndarray,
        ends: np.ndarray,
        places: np.ndarray,
        files: list[str],
        chosen: np.ndarray | None = None,
    ) -> None:
        self._tokens, self._trained, self._ends, self._places, self._files = tokens, trained, ends, places, files
        self._chosen = np.arange(len(ends)) if chosen is None else chosen
        begins = np.concatenate(([0], ends[:-1])) if len(ends) else ends
        self.lengths: np.ndarray = (ends - begins)[self._chosen]

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        number = int(self._chosen[index])
        end = int(self._ends[number])
        begin = end - int(self.lengths[index])
        ids = torch.from_numpy(self._tokens[begin:end].astype(np.int64))
        labels = ids.masked_fill(torch.from_numpy(self._trained[begin:end] == 0), IGNORED)
        labels[:1] = IGNORED
        return {"input_ids": ids, "labels": labels}

    def place(self, index: int) -> Place:
        """The location of a sequence's record."""
        file, line = map(int, self._places[self._chosen[index]])
        return Place(self._files[file], None if line < 0 else line)

    @property
    def tokens(self) -> int:
        """Number of tokens of all sequences."""
        return int(self.lengths.sum())

    @property
    def trained_tokens(self) -> int:
        """Number of tokens that the loss covers."""
        if not len(self):
            return 0
        begins = np.concatenate(([0], self._ends[:-1]))
        counts = np.add.reduceat(self._trained, begins, dtype=np.int64) - self._trained[begins]
        return int(counts[self._chosen].sum())

    def subset(self, indices: np.ndarray) -> TokenDataset:
        """A data set of the sequences with these indices."""
        return TokenDataset(self._tokens, self._trained, self._ends, self._places, self._files, self._chosen[indices])

    def split(self, fraction: float, seed: int) -> tuple[TokenDataset, TokenDataset]:
        """Splits into training and evaluation data, at random, reproducibly for the same seed. The sequences of a record stay
        together, unless there are fewer than ten records.

        Args:
            fraction: fraction of the data to use for evaluation.
            seed: seed of the random split.

        Raises:
            DataError: there are too few sequences.
        """
        _, groups = np.unique(self._places[self._chosen], axis=0, return_inverse=True)
        groups = groups.reshape(-1)
        if groups.max(initial=0) + 1 < 10:
            groups = np.arange(len(self))
        count = int(groups.max(initial=-1)) + 1
        held = max(1, round(count * fraction))
        if count - held < 1:
            raise DataError(
                f"{count} sequence(s) cannot be split into training and evaluation data; use more data, or omit eval_fraction"
            )
        chosen = np.isin(groups, np.random.default_rng(seed).permutation(count)[:held])
        return self.subset(np.flatnonzero(~chosen)), self.subset(np.flatnonzero(chosen))


class TokenWriter:
    """Writes a directory that `open_tokens` reads."""

    def __init__(self, directory: Path, files: list[str]) -> None:
        self._directory, self._files = directory, files
        self._tokens = (directory / "tokens.int32").open("wb")
        self._trained = (directory / "trained.uint8").open("wb")
        self._ends, self._places = array("q"), array("q")

    def add(self, ids: list[int], trained: list[bool], place: Place, file: int) -> None:
        """Appends a sequence; `file` is the index of its file."""
        np.asarray(ids, np.int32).tofile(self._tokens)
        np.asarray(trained, np.uint8).tofile(self._trained)
        self._ends.append((self._ends[-1] if self._ends else 0) + len(ids))
        self._places.extend((file, -1 if place.line is None else place.line))

    def close(self) -> None:
        """Closes the files; needed even without `finish`."""
        self._tokens.close()
        self._trained.close()

    def finish(self, report: dict[str, Any]) -> None:
        """Writes the remaining files and the report."""
        self.close()
        for name, values in (("ends.int64", self._ends), ("places.int64", self._places)):
            with (self._directory / name).open("wb") as file:
                np.frombuffer(values, np.int64).tofile(file) if values else None
        facts = {"files": self._files, "sequences": len(self._ends), "report": report}
        (self._directory / "data.json").write_text(json.dumps(facts), encoding="utf-8")


def open_tokens(directory: Path) -> tuple[TokenDataset, dict[str, Any]]:
    """Opens a data set and its report. The data is mapped into memory, not read.

    Raises:
        DataError: the directory is damaged, or was not written by `TokenWriter`.
    """
    try:
        facts = json.loads((directory / "data.json").read_text(encoding="utf-8"))
        count = int(facts["sequences"])
        ends, places = _mapped(directory / "ends.int64", np.int64), _mapped(directory / "places.int64", np.int64)
        tokens, trained = _mapped(directory / "tokens.int32", np.int32), _mapped(directory / "trained.uint8", np.uint8)
        whole = int(ends[-1]) if count else 0
        if (len(ends), len(places), len(tokens), len(trained)) != (count, 2 * count, whole, whole):
            raise ValueError("the sizes of its files do not match")
        return TokenDataset(tokens, trained, ends, places.reshape(-1, 2), list(facts["files"])), facts["report"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"is damaged ({error}); delete it", file=directory) from error


def _mapped(file: Path, dtype: Any) -> np.ndarray:
    if os.path.getsize(file) == 0:
        return np.empty(0, dtype)
    return np.memmap(file, dtype, mode="r")
