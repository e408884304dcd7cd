"""The rows of a prompt that belong to pictures: what they have instead of, or besides, the embeddings of their token ids. Does
not import torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..backends.base import Int32

if TYPE_CHECKING:
    import torch

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PictureRows:
    """What a prompt's pictures are to the language model.

    Attributes:
        positions: int32 [P], the RoPE position of each of the prompt's tokens. Those of generated tokens follow the last one.
        places: int64 [n], ascending: which of them belong to pictures.
        embeds: float32 [n, H], their embeddings.
        axes: int32 [P, 3], positions in time, height and width; None: `positions` on each axis.
        of: int32 [P], the picture that a token belongs to, -1: none, if the tokens of a picture see each other; None: they see
            those up to themselves.
        features: for each `add_features` of the model's graph float32 [n, H].
        token: the id by which other tables than the embeddings are read for these rows; None: their own.
    """

    positions: Int32
    places: Int64
    embeds: torch.Tensor
    axes: Int32 | None = None
    of: Int32 | None = None
    features: tuple[torch.Tensor, ...] = ()
    token: int | None = None
    _of_rows: list[bytes] = field(default_factory=list, init=False, repr=False)
    _digests: dict[tuple[int, int], bytes] = field(default_factory=dict, init=False, repr=False)

    @property
    def tokens(self) -> int:
        """P."""
        return len(self.positions)

    def positions_of(self, start: int, count: int) -> Int32:
        """The positions of tokens [start, start + count) of prompt and text."""
        after = np.arange(start, start + count, dtype=np.int32) - self.tokens + 1 + self.positions[-1]
        known = self.positions[start : start + count]
        return np.concatenate([known, after[len(known) :]])

    def followed_by(self, count: int) -> PictureRows:
        """The rows of the prompt with `count` of the tokens that were generated after it."""
        positions = self.positions_of(0, self.tokens + count)
        new = positions[self.tokens :]
        axes = None if self.axes is None else np.concatenate([self.axes, np.repeat(new[:, None], 3, axis=1)])
        of = None if self.of is None else np.concatenate([self.of, np.full(count, -1, dtype=np.int32)])
        return replace(self, positions=positions, axes=axes, of=of)

    def rows(self, start: int, count: int) -> slice:
        """Which of `places` are among tokens [start, start + count)."""
        first, last = np.searchsorted(self.places, (start, start + count))
        return slice(int(first), int(last))

    def whole(self, start: int, count: int) -> int:
        """How many tokens from `start` on a step processes, `count` or so, such that no picture whose tokens see each other is
        divided: a picture that does not fit is left for the next step, or is processed whole if it is the first."""
        end = start + count
        if self.of is None or end >= self.tokens or self.of[end] < 0 or self.of[end - 1] != self.of[end]:
            return count
        same = np.flatnonzero(self.of == self.of[end])
        return int(same[0]) - start if same[0] > start else int(same[-1]) + 1 - start

    def _rows_digests(self) -> list[bytes]:
        """Identifies each row of `places` by its content, so that `digest` does not read the rows once for each end."""
        if not self._of_rows:
            layers = [values.contiguous().numpy() for values in (self.embeds, *self.features)]
            self._of_rows[:] = [
                hashlib.blake2b(b"".join(values.tobytes() for values in row), digest_size=16).digest()
                for row in zip(*layers, strict=True)
            ]
        return self._of_rows

    def digest(self, begin: int, end: int) -> bytes:
        """Identifies what tokens [begin, end) are besides their ids; b"" where no token belongs to a picture and all positions
        are those of a text without pictures. For the keys of the prefix cache."""
        if (known := self._digests.get((begin, end))) is not None:
            return known
        rows = self.rows(begin, end - begin)
        positions = self.positions_of(begin, end - begin)
        if rows.start == rows.stop and (positions == np.arange(begin, end)).all():
            return b""
        content = hashlib.blake2b(positions.tobytes(), digest_size=16)
        if self.axes is not None:
            axes = self.axes[begin:end]
            content.update(axes.tobytes() + np.repeat(positions[len(axes) :], 3).tobytes())
        if self.of is not None:
            of = np.concatenate([self.of[begin:end], np.full(max(0, end - max(begin, self.tokens)), -1, np.int32)])
            content.update((of - np.int32(self.of[:begin].max(initial=-1))).tobytes())
        content.update((self.places[rows] - begin).tobytes() + b"".join(self._rows_digests()[rows]))
        self._digests[begin, end] = content.digest()
        return content.digest()
