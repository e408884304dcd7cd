"""Drafts by a model's own multi-token prediction layers (DeepSeek-V3's report, section 2.2).

Layer k (from 0) has at row i the previous layer's hidden state of row i (the model's own, for layer 0) and token i + k + 1, and
predicts token i + k + 2. Its cache is its own layer of the model's blocks: row i lies at token i. So it follows the model by a
row less than it has tokens, and k rows of layer k are guesses until the tokens they need are known: those are run again.

More drafts than layers are made by applying the last layer to its own hidden state again, a row further, as vLLM does; those
rows are guesses too. The model overwrites nothing of this: its own layers are others.

A layer that was not there from the first token on sees only blocks that it has written itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...cache.block_manager import BLOCK_TOKENS
from ..draft import Draft
from ..sequence import Part, Sequence, rows_of

if TYPE_CHECKING:
    from ..runner import Runner

# (sequence's index, tokens drafted so far, logits [V]) -> token, and the distribution it was drawn from or None
Choose = Callable[[int, list[int], Any], "tuple[int, Any]"]
_FLUSH = 256  # rows of hidden states that may wait: so many cost little more than one where they run at once. A cache that
# forgets keeps what those need (`cache.forgetting.Forgetting.spare`)


@dataclass
class _Track:
    """What a sequence's MTP layers have seen.

    Attributes:
        base: rows before it are not there; a multiple of a block.
        seen: rows whose states have come from the model, those before `base` included.
        done: of each layer, rows in its cache that will stay.
        waiting: of each layer, input states of rows from `done` on that will stay as they are.
    """

    base: int
    seen: int
    done: list[int]
    waiting: list[list[Any]] = field(default_factory=list)

    def first_block(self, sequence: Sequence) -> int:
        """The first block that the layers may see. Where a cache has forgotten, they see no sinks but the text's own, all of
        them: what lies between those that they began behind and the window is not a beginning of theirs."""
        first, holes = self.base // BLOCK_TOKENS, sequence.blocks.holes
        return holes.stop if holes and (first in holes or 0 < first < holes.start) else first


class _Drafting:
    """A sequence while drafts are made for it. guessed: hidden states that rest on drafts, the input of rows to come."""

    def __init__(self, sequence: Sequence, most: int, track: _Track | None) -> None:
        self.sequence, self.most = sequence, most
        self.ready = track is not None and track.done[0] < track.seen
        if track is not None:
            self.track = track
        self.tokens: list[int] = []
        self.q: list[Any] = []
        self.guessed: Any = None

    def add(self, choose: Choose, logits: Any) -> None:
        token, q = choose(self.sequence.index, self.tokens, logits)
        self.tokens.append(token)
        self.q.append(q)

    def draft(self) -> Draft:
        q = self.q[: self.most]
        return Draft(self.tokens[: self.most], None if any(d is None for d in q) else q)


class MtpProposer:
    """
    Args:
        layers: runners of the MTP layers' plans, over the model's own cache.
        choose: how drafts are chosen from a layer's logits.
    """

    name = "mtp"
    wants_states = True

    def __init__(self, layers: list[Runner], choose: Choose) -> None:
        self._layers, self._choose = layers, choose
        self._tracks: dict[int, _Track] = {}

    def follow(self, sequence: Sequence, states: Any) -> None:
        count = len(states)
        track = self._tracks.get(sequence.index)
        if track is None:
            before = sequence.cached - count
            base = -(-before // BLOCK_TOKENS) * BLOCK_TOKENS
            layers = len(self._layers)
            track = self._tracks[sequence.index] = _Track(base, before, [base] * layers, [[] for _ in range(layers)])
        hidden = max(0, min(track.base - track.seen, count))
        track.seen += count
        if hidden < count:
            track.waiting[0].append(states[hidden:])
        if track.seen - track.done[0] >= _FLUSH:
            self._catch_up(sequence, track)

    def fork(self, sequence: Sequence, twin: Sequence) -> None:
        track = self._tracks[sequence.index]
        self._tracks[twin.index] = _Track(track.base, track.seen, list(track.done), [list(w) for w in track.waiting])

    def ready(self, sequence: Sequence) -> bool:
        track = self._tracks.get(sequence.index)
        return track is not None and track.done[0] < track.seen

    def forget(self, sequence: Sequence) -> None:
        self._tracks.pop(sequence.index, None)

    def _catch_up(self, sequence: Sequence, track: _Track) -> None:
        """Runs the rows whose tokens are known, for the cache alone."""
        for k, runner in enumerate(self._layers):
            begin = track.done[k]
            ready = track.done[k - 1] if k else track.seen - 1  # the last row waits: a draft comes from it
            end = min(ready, len(sequence.tokens) - 1 - k)
            if end <= begin:
                return
            part = Part(sequence, sequence.tokens[begin + k + 1 : end + k + 1], begin, track.first_block(sequence))
            states, rest = _split(track.waiting[k], end - begin)
            made = runner.draft([part], states, logits=False).last_hidden
            track.waiting[k], track.done[k] = rest, end
            if k + 1 < len(self._layers):
                track.waiting[k + 1].append(made)

    def propose(self, sequences: list[Sequence], most: list[int]) -> list[Draft]:
        found = [_Drafting(s, n, self._tracks.get(s.index)) for s, n in zip(sequences, most, strict=True)]
        active = [d for d in found if d.most and d.ready]
        if active:
            for k in range(len(self._layers)):
                self._layer(k, active)
            for further in range(max(d.most for d in active) - len(self._layers)):
                self._again(further, [d for d in active if d.most > len(d.tokens)])
        return [d.draft() for d in found]

    def _layer(self, k: int, active: list[_Drafting]) -> None:
        """Layer k over the rows that wait for it and, behind them, those that rest on drafts; adds a draft to each."""
        parts, inputs = [], []
        for d in active:
            begin, count = d.track.done[k], d.track.seen - d.track.done[k]
            first = begin + k + 1
            ids = [*d.sequence.tokens[first:], *d.tokens[max(0, first - len(d.sequence.tokens)) :]][:count]
            parts.append(Part(d.sequence, ids, begin, d.track.first_block(d.sequence)))
            inputs += [*d.track.waiting[k], d.guessed] if d.guessed is not None else d.track.waiting[k]
        made = self._layers[k].draft(parts, inputs, logits=True)
        last = k + 1 == len(self._layers)
        for d, logits, rows in zip(active, made.logits, rows_of(made.last_hidden, parts), strict=True):
            d.add(self._choose, logits)
            stay = max(0, len(rows) - k)  # those whose token is known
            d.track.done[k] += stay
            d.track.waiting[k] = _split(d.track.waiting[k], stay)[1]
            if not last:
                d.track.waiting[k + 1].append(rows[:stay])
            d.guessed = rows[-1:] if last else rows[stay:]

    def _again(self, further: int, active: list[_Drafting]) -> None:
        """The last layer over its own hidden state, `further` rows behind the model's."""
        parts = [Part(d.sequence, d.tokens[-1:], d.track.seen + further, d.track.first_block(d.sequence)) for d in active]
        made = self._layers[-1].draft(parts, [d.guessed for d in active], logits=True)
        for d, logits, rows in zip(active, made.logits, rows_of(made.last_hidden, parts), strict=True):
            d.add(self._choose, logits)
            d.guessed = rows


def _split(rows: list[Any], count: int) -> tuple[list[Any], list[Any]]:
    """The first `count` rows of tensors [n, H], and those behind."""
    first, rest = [], []
    for tensor in rows:
        take = min(count, len(tensor))
        count -= take
        if take:
            first.append(tensor[:take])
        if take < len(tensor):
            rest.append(tensor[take:])
    return first, rest
