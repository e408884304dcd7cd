"""Ragged steps of a plan over sequences: from Python lists to a `StepBatch`, and the blocks that a step writes into."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch

from ..backends.base import BLOCK_TOKENS, PREFILL, Int32, Plan, StepBatch, StepOutput
from ..backends.sampling import Floats, TokenChoice
from .scheduling.memory import Memory
from .sequence import Part, Sequence

_FEW = 16  # rows of a sequence up to which the decode family serves where either may


class Runner:
    """A plan over a memory.

    Args:
        vocab_size: for `step` to keep memory for the logits of a plan on the CPU; 0: they get fresh memory each time.

    Attributes:
        on_host: whether the plan's logits are in the host's memory.
    """

    def __init__(self, plan: Plan, memory: Memory, vocab_size: int = 0) -> None:
        self.plan, self.memory, self.on_host = plan, memory, plan.device.type == "cpu"
        self._vocab_size = vocab_size if self.on_host else 0
        self._logits: torch.Tensor | None = None  # a big batch over a big vocabulary would pay for fresh pages at every step

    def check_weights(self) -> None:
        """See `Plan.check_weights`."""
        self.plan.check_weights()

    def reserve(self, sequences: Iterable[Sequence], counts: Iterable[int]) -> None:
        """Room for so many more tokens of each.

        Raises: CacheFullError, with nothing changed.
        """
        sequences, counts = list(sequences), list(counts)
        if all(
            s.blocks.fits(n) for s, n in zip(sequences, counts, strict=True)
        ):  # the common step: nothing to ask the manager for
            for sequence, count in zip(sequences, counts, strict=True):
                sequence.blocks.tokens += count
            return
        done: list[tuple[Sequence, int]] = []
        with self.memory.locked():
            try:
                for sequence, count in zip(sequences, counts, strict=True):
                    before = sequence.cached
                    self.memory.copy_blocks(sequence.blocks.append(count))
                    done.append((sequence, before))
            except BaseException:
                for sequence, before in done:
                    sequence.blocks.crop(before)
                raise

    def crop(self, sequences: Iterable[Sequence], tokens: Iterable[int]) -> None:
        """Keeps the first so many tokens of each."""
        pairs = [(s, n) for s, n in zip(sequences, tokens, strict=True) if n != s.cached]
        if not pairs:
            return
        with self.memory.locked():
            for sequence, count in pairs:
                sequence.blocks.crop(count)

    def forget(self, sequences: Iterable[Sequence]) -> None:
        """Lets go of the blocks that none of their later tokens sees."""
        found = [sequence.blocks for sequence in sequences if sequence.blocks.forgettable]
        if found:
            with self.memory.locked():
                for blocks in found:
                    blocks.forget()

    def verify(self, parts: list[Part], *, last_hidden: bool) -> StepOutput:
        """Logits of every row, by the decode family: to the bit those that plain decoding gives."""
        return self._run(parts, np.arange(sum(len(p.ids) for p in parts), dtype=np.int32), last_hidden=last_hidden)

    def step(self, parts: list[Part], rows: list[int], *, last_hidden: bool) -> StepOutput:
        """A step over parts of both phases. Its logits lie where those of the step before were.

        Args:
            parts: those of phase DECODE first.
            rows: ascending rows, of all parts' together, whose logits are wanted.
        """
        logits = None
        if self._vocab_size:
            if self._logits is None or len(self._logits) < len(rows):
                self._logits = torch.empty(max(len(rows), 16), self._vocab_size, dtype=torch.float32, device="cpu")
            logits = self._logits[: len(rows)]
        return self._run(parts, np.array(rows, np.int32), last_hidden=last_hidden, logits=logits)

    def choose_tokens(
        self, logits: torch.Tensor, choices: list[TokenChoice | None]
    ) -> tuple[list[int | None], Floats | Mapping[int, Floats]]:
        """What the backend chooses of a step's logits, and the rows that are left to the caller.

        Args:
            logits: float32 [R, V].
            choices: one for each row; None: its logits are wanted.

        Returns: see `Plan.choose_tokens`; and float32 [V] on the host by row, of those whose choice is None at least.
        """
        tokens = self.plan.choose_tokens(logits, choices)
        if self.on_host:
            return tokens, logits.numpy()
        wanted = [row for row, choice in enumerate(choices) if choice is None]
        return tokens, dict(zip(wanted, logits[wanted].cpu().numpy(), strict=True))

    def draft(self, parts: list[Part], states: list[torch.Tensor], *, logits: bool) -> StepOutput:
        """A step of a drafting plan: logits of each sequence's last row if asked for, hidden states of all rows.

        Args:
            states: hidden states that go in, float32 [n, H] each; together a row for every token.
        """
        counts = [len(p.ids) for p in parts]
        rows = np.cumsum(counts, dtype=np.int32) - 1 if logits else np.zeros(0, np.int32)
        if max(counts) > _FEW:  # nothing but speed depends on it
            parts = [replace(part, phase=PREFILL) for part in parts]
        return self._run(parts, rows.astype(np.int32), torch.cat(states), last_hidden=True)

    def _run(
        self,
        parts: list[Part],
        rows: Int32,
        states: torch.Tensor | None = None,
        *,
        last_hidden: bool,
        logits: torch.Tensor | None = None,
    ) -> StepOutput:
        counts = np.array([len(p.ids) for p in parts], np.int32)
        starts = np.array([p.start for p in parts], np.int32)
        hidden_from = np.array([p.first_block * BLOCK_TOKENS for p in parts], np.int32)
        first = np.array([p.sequence.first_position for p in parts], np.int32)
        before = np.cumsum(counts) - counts
        batch = StepBatch(
            token_ids=np.array([token for p in parts for token in p.ids], np.int32),
            positions=np.repeat(starts + first - before.astype(np.int32), counts) + np.arange(counts.sum(), dtype=np.int32),
            query_len=counts,
            context_len=starts - hidden_from,
            phase=np.array([p.phase for p in parts], np.int32),
            block_table=_tables([p.sequence.blocks.blocks[p.first_block :] for p in parts]),
            logit_rows=rows,
            states=states,
            last_hidden=last_hidden,
            logits=logits,
            reach=_reach(parts),
        )
        return self.memory.run(self.plan, batch)


def _reach(parts: list[Part]) -> Int32 | None:
    """int32 [S]; None where the sequences leave it to each step."""
    reach = [part.sequence.reach for part in parts]
    return None if None in reach else np.array(reach, np.int32)


def _tables(blocks: list[list[int]]) -> Int32:
    """int32 [S, max_blocks]; zero past a sequence's own."""
    table = np.zeros((len(blocks), max(map(len, blocks))), np.int32)
    for row, own in zip(table, blocks, strict=True):
        row[: len(own)] = own
    return table
