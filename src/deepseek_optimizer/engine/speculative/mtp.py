"""Drafts by a model's own multi-token prediction layers (DeepSeek-V3 technical report, section 2.2).

The input of layer k (from 0) at row i is the previous layer's state of row i (the model's own, for layer 0) and token
i + k + 1; it predicts token i + k + 2. A state is the last hidden state, or, in DeepSeek-V4, all residual streams of the row
(`StepOutput.draft_states`). The layer's cache is its own layer in the model's blocks, with row i in the slot of token i. It
thus has one row less than the model has tokens, and k rows of layer k depend on drafts until the tokens that they need are
known; these rows are then recomputed.

To draft more tokens than there are layers, the last layer is applied to its own state again, one row further, as in vLLM;
those rows depend on drafts too. The model does not overwrite these rows, since its own layers are separate.

A layer that did not process a sequence from its first token attends only to blocks that it has written itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ...backends.decoding import DecodeCall, RowChoice
from ...cache.block_manager import BLOCK_TOKENS
from ..draft import Draft, DraftVocabulary
from ..sequence import Part, Sequence, rows_of

if TYPE_CHECKING:
    from ..runner import Runner

# (sequence's index, tokens drafted so far, logits [V] or those of a draft vocabulary [N], the draft vocabulary or None) ->
# token, and the distribution [V] it was sampled from or None
Choose = Callable[[int, list[int], Any, "DraftVocabulary | None"], "tuple[int, Any]"]
# Maximum number of pending rows of hidden states: processed together, they cost little more than a single row. A cache that
# frees blocks keeps those that pending rows need (`cache.forgetting.Forgetting.spare`).
_FLUSH = 256
_MANY = 16  # pending rows, more than those of a round with drafts
# After this many rows without drafts, the layers begin anew with the newest rows: texts without drafts should lose little.
_IDLE, _NEWEST = 100, 2 * BLOCK_TOKENS
_NO_STOPS = np.zeros(0, np.int32)


@dataclass
class _Track:
    """Progress of the MTP layers in a sequence.

    Attributes:
        base: first row that the layers have processed; a multiple of the block size.
        seen: number of rows whose states the model has delivered, including those before `base`.
        tried: `seen` when drafts were last made; None: never.
        done: for each layer, number of final rows in its cache.
        waiting: for each layer, final input states of the rows from `done` on.
    """

    base: int
    seen: int
    done: list[int]
    waiting: list[list[Any]] = field(default_factory=list)
    tried: int | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing has been drafted for long."""
        return self.tried is not None and self.seen - self.tried > _IDLE

    def begin_anew(self) -> None:
        """Continues as if the layers had not processed rows before the newest ones."""
        base = -(-(self.seen - _NEWEST) // BLOCK_TOKENS) * BLOCK_TOKENS
        if base > self.done[0]:
            self.waiting = [_split(self.waiting[0], base - self.done[0])[1], *([] for _ in self.waiting[1:])]
            self.base, self.done = base, [base] * len(self.done)

    def first_block(self, sequence: Sequence) -> int:
        """Returns the first block that the layers may attend to.

        If the cache has freed blocks, layers that did not start at the beginning of the text have no sinks: their first block
        is then the one after the freed blocks.
        """
        first, holes = self.base // BLOCK_TOKENS, sequence.blocks.holes
        return holes.stop if holes and (first in holes or 0 < first < holes.start) else first


class _Drafting:
    """State of drafting for one sequence.

    Attributes:
        ready: whether drafts can be made.
        tokens, q: drafts so far, and their distributions.
        guessed: states that depend on drafts, the input of further rows.
    """

    def __init__(self, sequence: Sequence, max_drafts: int, track: _Track | None) -> None:
        self.sequence, self.max_drafts = sequence, max_drafts
        self.ready = track is not None and track.done[0] < track.seen
        if track is not None:
            self.track = track
        self.tokens: list[int] = []
        self.q: list[Any] = []
        self.guessed: Any = None

    def add(self, choose: Choose, logits: Any, vocabulary: DraftVocabulary | None) -> None:
        token, q = choose(self.sequence.index, self.tokens, logits, vocabulary)
        self.tokens.append(token)
        self.q.append(q)

    def draft(self) -> Draft:
        q = self.q[: self.max_drafts]
        return Draft(self.tokens[: self.max_drafts], None if any(d is None for d in q) else q)


class MtpProposer:
    """Proposes drafts by MTP layers.

    Args:
        layers: runners of the MTP layers' plans, over the model's own cache.
        choose: chooses a draft from a layer's logits.
        greedy: whether `choose` takes the largest logit, so that the backend may do it.
        vocabularies: of each layer, the tokens that it has logits for, or None: all; None: all layers have those of all tokens.
    """

    name = "mtp"
    wants_states = True

    def __init__(
        self,
        layers: list[Runner],
        choose: Choose,
        greedy: bool = False,
        vocabularies: list[DraftVocabulary | None] | None = None,
    ) -> None:
        self._layers, self._choose = layers, choose
        self._vocabularies = vocabularies or [None] * len(layers)
        self._several = greedy and layers[-1].decodes
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
        self._tracks[twin.index] = _Track(
            track.base, track.seen, list(track.done), [list(w) for w in track.waiting], track.tried
        )  # fmt: skip

    def ready(self, sequence: Sequence) -> bool:
        track = self._tracks.get(sequence.index)
        return track is not None and track.done[0] < track.seen

    def forget(self, sequence: Sequence) -> None:
        self._tracks.pop(sequence.index, None)

    def catch_up(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            track = self._tracks.get(sequence.index)
            if track is not None and track.seen - track.done[0] > _MANY:
                self._catch_up(sequence, track)

    def _catch_up(self, sequence: Sequence, track: _Track) -> None:
        """Processes the rows whose tokens are known, only to fill the cache; leaves out old ones if nothing was drafted for
        long."""
        if track.idle:
            track.begin_anew()
        for k, runner in enumerate(self._layers):
            begin = track.done[k]
            ready = track.done[k - 1] if k else track.seen - 1  # not the last row, which predicts a draft
            end = min(ready, len(sequence.tokens) - 1 - k)
            if end <= begin:
                return
            part = Part(sequence, sequence.tokens[begin + k + 1 : end + k + 1], begin, track.first_block(sequence))
            states, rest = _split(track.waiting[k], end - begin)
            result = runner.draft([part], states, logits=False).draft_states
            track.waiting[k], track.done[k] = rest, end
            if k + 1 < len(self._layers):
                track.waiting[k + 1].append(result)

    def propose(self, sequences: list[Sequence], max_drafts: list[int]) -> list[Draft]:
        drafting = [_Drafting(s, n, self._tracks.get(s.index)) for s, n in zip(sequences, max_drafts, strict=True)]
        active = [d for d in drafting if d.max_drafts and d.ready]
        for d in active:
            d.track.tried = d.track.seen
        if active:
            for k in range(len(self._layers)):
                self._layer(k, active)
            while active := [d for d in active if d.max_drafts > len(d.tokens)]:
                if self._several:
                    self._repeat_last_greedily(active)
                else:
                    self._repeat_last(active)
        return [d.draft() for d in drafting]

    @property
    def calls(self) -> bool:
        """Whether rounds can be run by `Plan.decode_drafted`: there is one layer, and drafts are its most likely tokens."""
        return self._several and len(self._layers) == 1

    def begin_call(self, sequence: Sequence, cached: int) -> tuple[Runner, Part, list[Any], DraftVocabulary | None]:
        """What a call of `Plan.decode_drafted` begins with, if `calls` and `ready`; `end_call` must follow it if it succeeds.

        Args:
            sequence: the sequence. Its cache has room for the tokens of the call.
            cached: number of its tokens in the cache before the call.

        Returns: the layer's runner, its pending rows, their states, and its draft vocabulary.
        """
        track = self._tracks[sequence.index]
        track.tried = track.seen
        begin = track.done[0]
        part = Part(sequence, sequence.tokens[begin + 1 : cached + 1], begin, track.first_block(sequence))
        return self._layers[0], part, track.waiting[0], self._vocabularies[0]

    def end_call(self, sequence: Sequence, states: Any) -> None:
        """Continues after a call.

        Args:
            sequence: the sequence, with the tokens of the call.
            states: the model's draft states of the tokens of the last round, [n, D].
        """
        track = self._tracks[sequence.index]
        track.seen = track.tried = sequence.cached
        track.done, track.waiting = [track.seen - len(states)], [[states]]

    def _layer(self, k: int, active: list[_Drafting]) -> None:
        """Runs layer k over its pending rows and then those that depend on drafts; adds a draft to each sequence."""
        parts, inputs = [], []
        for d in active:
            begin, count = d.track.done[k], d.track.seen - d.track.done[k]
            first = begin + k + 1
            ids = [*d.sequence.tokens[first:], *d.tokens[max(0, first - len(d.sequence.tokens)) :]][:count]
            parts.append(Part(d.sequence, ids, begin, d.track.first_block(d.sequence)))
            inputs += [*d.track.waiting[k], d.guessed] if d.guessed is not None else d.track.waiting[k]
        result = self._layers[k].draft(parts, inputs, logits=True)
        last = k + 1 == len(self._layers)
        for d, logits, rows in zip(active, result.logits, rows_of(result.draft_states, parts), strict=True):
            d.add(self._choose, logits, self._vocabularies[k])
            stay = max(0, len(rows) - k)  # rows whose token is known
            d.track.done[k] += stay
            d.track.waiting[k] = _split(d.track.waiting[k], stay)[1]
            if not last:
                d.track.waiting[k + 1].append(rows[:stay])
            d.guessed = rows[-1:] if last else rows[stay:]

    def _further(self, active: list[_Drafting]) -> list[Part]:
        """The next row of the last layer, whose input is its own state."""
        further = len(active[0].tokens) - len(self._layers)  # rows after the model's last one; equal for all
        return [Part(d.sequence, d.tokens[-1:], d.track.seen + further, d.track.first_block(d.sequence)) for d in active]

    def _repeat_last_greedily(self, active: list[_Drafting]) -> None:
        """As `_repeat_last`, for all drafts that every sequence still needs, in one call of the backend if possible."""
        vocabulary = self._vocabularies[-1]
        call = DecodeCall(
            min(d.max_drafts - len(d.tokens) for d in active), [RowChoice()] * len(active), _NO_STOPS, math.inf,
            token_of=None if vocabulary is None else vocabulary.token_of,
        )  # fmt: skip
        decoded = self._layers[-1].draft_several(self._further(active), [d.guessed for d in active], call)
        assert decoded.draft_states is not None
        for i, d in enumerate(active):
            tokens = decoded.tokens[:, i].tolist()
            d.tokens += tokens
            d.q += [None] * len(tokens)
            if decoded.logits is not None:  # the backend leaves it to the caller
                d.add(self._choose, decoded.logits[i], vocabulary)
            d.guessed = decoded.draft_states[-1, i : i + 1]

    def _repeat_last(self, active: list[_Drafting]) -> None:
        """Applies the last layer to its own state, for one more draft."""
        parts = self._further(active)
        result = self._layers[-1].draft(parts, [d.guessed for d in active], logits=True)
        for d, logits, rows in zip(active, result.logits, rows_of(result.draft_states, parts), strict=True):
            d.add(self._choose, logits, self._vocabularies[-1])
            d.guessed = rows


def _split(rows: list[Any], count: int) -> tuple[list[Any], list[Any]]:
    """Splits the rows of tensors [n, D] into the first `count` and the rest."""
    first, rest = [], []
    for tensor in rows:
        take = min(count, len(tensor))
        count -= take
        if take:
            first.append(tensor[:take])
        if take < len(tensor):
            rest.append(tensor[take:])
    return first, rest
