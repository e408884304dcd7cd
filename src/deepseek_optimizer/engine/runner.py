"""Runs steps of a plan over ragged batches: builds a `StepBatch` from Python lists and reserves the blocks to write to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import torch

from ..backends.base import BLOCK_TOKENS, PREFILL, AdapterStore, Int32, Plan, StepBatch, StepOutput
from ..backends.decoding import DecodeCall, Decoded, DraftedCall, DraftedRounds
from ..backends.device_logits import changed_logits, log_probabilities
from ..backends.qualities import Quality
from ..backends.sampling import NOT_FINITE, ChangedChoice, Floats, TokenChoice
from ..cache import states_of_step
from ..errors import NotEnoughMemoryError
from .picture_steps import Embed, step_fields
from .request import TokenLogprob
from .scheduling.memory import Memory
from .sequence import Part, Sequence

_FIRST = np.zeros(1, np.int32)
_FEW = 16  # up to this many rows per sequence, drafting uses the decode kernels


class Runner:
    """Runs a plan over cache memory.

    Args:
        plan: the compiled plan.
        memory: cache memory of the sequences.
        vocab_size: if not 0, steps reuse a buffer for the logits of a plan on the CPU instead of allocating one each time.
        adapted: a plan for steps with adapters, with the same results for other sequences, and the store of the adapters; None:
            the sequences' adapters are not used.
        decodes: whether `decode` and `draft_several` run several steps (`Capabilities.decode_calls`).
        embed: the model's embeddings of token ids, for steps with pictures; None: sequences have none.
        lower: by quality, plans for sequences of a lower one than "exact": the plan, and one for steps with adapters.

    Attributes:
        on_host: whether the plan's logits are in host memory.
    """

    def __init__(
        self,
        plan: Plan,
        memory: Memory,
        vocab_size: int = 0,
        adapted: tuple[Plan, AdapterStore] | None = None,
        decodes: bool = False,
        embed: Embed | None = None,
        lower: Mapping[Quality, tuple[Plan, Plan | None]] | None = None,
    ) -> None:
        self._adapted, self._embed, self._lower = adapted, embed, lower or {}
        self.plan, self.memory, self.on_host = plan, memory, plan.device.type == "cpu"
        self._vocab_size = vocab_size if self.on_host else 0
        self.decodes = decodes and self._vocab_size > 0
        self._logits: torch.Tensor | None = None  # reused: new pages at every step would be slow for large batches

    def check_weights(self) -> None:
        """See `Plan.check_weights`."""
        self.plan.check_weights()

    def reserve(self, sequences: Iterable[Sequence], counts: Iterable[int], *, undo: bool = False) -> None:
        """Reserves room in the cache for more tokens of each sequence.

        Args:
            sequences: the sequences.
            counts: number of tokens to add for each.
            undo: whether these tokens may be cropped afterwards, also with recurrent states.

        Raises:
            CacheFullError: too few blocks are free; nothing was changed.
        """
        sequences, counts = list(sequences), list(counts)
        if all(s.blocks.fits(n) for s, n in zip(sequences, counts, strict=True)):  # the usual case: no new block is needed
            for sequence, count in zip(sequences, counts, strict=True):
                sequence.blocks.tokens += count
            return
        done: list[tuple[Sequence, int]] = []
        with self.memory.locked():
            try:
                for sequence, count in zip(sequences, counts, strict=True):
                    before = sequence.cached
                    self.memory.copy_blocks(sequence.blocks.append(count, count if undo else 0))
                    done.append((sequence, before))
            except BaseException:
                for sequence, before in done:
                    sequence.blocks.crop(before)
                raise

    def crop(self, sequences: Iterable[Sequence], tokens: Iterable[int]) -> None:
        """Crops each sequence in the cache to its first tokens.

        Args:
            sequences: the sequences.
            tokens: number of tokens to keep of each.
        """
        pairs = [(s, n) for s, n in zip(sequences, tokens, strict=True) if n != s.cached]
        if not pairs:
            return
        with self.memory.locked():
            for sequence, count in pairs:
                sequence.blocks.crop(count)

    def forget(self, sequences: Iterable[Sequence]) -> None:
        """Frees the blocks that are not visible to any later token of the sequences."""
        forgettable = [sequence.blocks for sequence in sequences if sequence.blocks.forgettable]
        if forgettable:
            with self.memory.locked():
                for blocks in forgettable:
                    blocks.forget()

    def verify(self, parts: list[Part], *, draft_states: bool) -> StepOutput:
        """Runs a step with logits for every row, by the decode kernels: bit for bit the logits of plain decoding. With
        `vocab_size`, they overwrite those of the previous step."""
        rows = np.arange(sum(len(p.ids) for p in parts), dtype=np.int32)
        return self._run(parts, rows, draft_states=draft_states, logits=self._reused(len(rows)))

    def step(self, parts: list[Part], rows: list[int], *, last_hidden: bool = False, draft_states: bool = False) -> StepOutput:
        """Runs a step over parts of both phases: of each quality its own plan. Its logits overwrite those of the previous step.

        Args:
            parts: the sequences' tokens, those of a quality together, and among them those of phase DECODE first.
            rows: ascending indices, into the rows of all parts together, of the rows whose logits are needed.
            last_hidden: whether to return the last hidden states.
            draft_states: whether to return what MTP layers take as states.
        """
        wanted: dict[str, Any] = {"last_hidden": last_hidden, "draft_states": draft_states}
        return self._run(parts, np.array(rows, np.int32), **wanted, logits=self._reused(len(rows)))

    def _reused(self, rows: int) -> torch.Tensor | None:
        if not self._vocab_size:
            return None
        if self._logits is None or len(self._logits) < rows:
            self._logits = torch.empty(max(rows, 16), self._vocab_size, dtype=torch.float32, device="cpu")
        return self._logits[:rows]

    def decode(self, parts: list[Part], call: DecodeCall, *, draft_states: bool = False) -> Decoded:
        """Runs several decode steps, of the sequences' last blocks, if `decodes`. The logits overwrite those of other steps.

        Args:
            parts: a token of each sequence, for which there is room in the cache.
            call: the call; its steps fit into the sequences' last blocks.
            draft_states: whether to return what MTP layers take as states.
        """
        rows = np.arange(len(parts), dtype=np.int32)
        logits = self._reused(len(parts) * (call.steps if call.keep_logits else 1))
        plan, batch = self._batch(parts, rows, draft_states=draft_states, logits=logits)
        decoded = self.memory.decode(plan, batch, call)
        for part in parts:
            part.sequence.blocks.tokens += decoded.steps - 1
        return decoded

    def choose_tokens(
        self, logits: torch.Tensor, choices: list[TokenChoice | ChangedChoice | None]
    ) -> tuple[list[int | None], Floats | Mapping[int, Floats | TokenLogprob]]:
        """Lets the backend choose tokens from a step's logits.

        Args:
            logits: float32 [R, V].
            choices: how to choose the token of each row, with changes only if the logits are on a device; None: the caller
                needs the row's logits.

        Returns: see `choose_rows`; logits in host memory are returned as they are, float32 [R, V].
        """
        if self.on_host:
            return self.plan.choose_tokens(logits, choices), logits.numpy()  # type: ignore[arg-type]  # without changes
        try:
            return choose_rows(self.plan.choose_tokens, logits, choices)
        except torch.OutOfMemoryError as error:
            raise NotEnoughMemoryError(
                f"there is no memory on {logits.device} to choose tokens from {len(logits)} rows of logits",
                None,
                None,
                "set a smaller kv_cache_memory, which leaves more for steps, or a smaller batch_size_range",
            ) from error

    def draft(self, parts: list[Part], states: list[torch.Tensor], *, logits: bool) -> StepOutput:
        """Runs a step of a drafting plan; the output has the draft states of all rows. With `vocab_size`, the logits overwrite
        those of the previous step.

        Args:
            parts: the sequences' tokens.
            states: input states, float32 [n, D] each; together one row per token.
            logits: whether to compute the logits of each sequence's last row.
        """
        counts = [len(p.ids) for p in parts]
        rows = np.cumsum(counts, dtype=np.int32) - 1 if logits else np.zeros(0, np.int32)
        if max(counts) > _FEW:  # affects speed only
            parts = [replace(part, phase=PREFILL) for part in parts]
        reused = self._reused(len(rows)) if logits else None
        return self._run(parts, rows.astype(np.int32), torch.cat(states), draft_states=True, logits=reused)

    def draft_several(self, parts: list[Part], states: list[torch.Tensor], call: DecodeCall) -> Decoded:
        """Runs several steps of a drafting plan, each over its own states of the step before; the result has those of all.

        Args:
            parts: a token of each sequence. The cache has room for those of all steps, which its length counts already.
            states: input states of the first step, float32 [1, D] each.
            call: the call.
        """
        rows = np.arange(len(parts), dtype=np.int32)
        plan, batch = self._batch(parts, rows, torch.cat(states), draft_states=True, logits=self._reused(len(parts)))
        return self.memory.decode(plan, batch, call)

    def decode_drafted(
        self, part: Part, drafter: Runner, pending: Part, states: list[torch.Tensor], call: DraftedCall
    ) -> DraftedRounds:
        """Runs several rounds with drafts of one sequence. The logits overwrite those of other steps.

        Args:
            part: the sequence's last token. The cache has room for `call.room` tokens from it on, which its length counts
                already.
            drafter: runs the drafting plan.
            pending: the rows that this plan has not processed.
            states: the model's draft states of these, float32 [n, D] each.
            call: the call.
        """
        plan, batch = self._batch([part], _FIRST, None, draft_states=True, logits=self._reused(1 + call.drafts))
        last = np.array([len(pending.ids) - 1], np.int32)
        drafting, first = drafter._batch([pending], last, torch.cat(states), draft_states=True, logits=drafter._reused(1))
        return self.memory.decode_drafted(plan, batch, drafting, first, call)

    def _run(self, parts: list[Part], rows: Int32, states: torch.Tensor | None = None, **wanted: Any) -> StepOutput:
        """Runs a step; `wanted`: as in `_batch`. `states` are None if there are plans of several qualities."""
        runs = [list(run) for _, run in groupby(parts, lambda part: part.quality)]
        if len(runs) == 1 or not self._lower:
            return self.memory.run(*self._batch(parts, rows, states, **wanted))
        logits = wanted.pop("logits", None)
        outputs: list[StepOutput] = []
        begin = first = 0
        for run in runs:
            end = begin + sum(len(part.ids) for part in run)
            own = rows[(rows >= begin) & (rows < end)] - np.int32(begin)
            to = None if logits is None else logits[first : first + len(own)]
            outputs.append(self.memory.run(*self._batch(run, own, logits=to, **wanted)))
            begin, first = end, first + len(own)
        return _joined(outputs, logits)

    def _batch(
        self, parts: list[Part], rows: Int32, states: torch.Tensor | None = None, **wanted: Any
    ) -> tuple[Plan, StepBatch]:
        """The plan that runs a step, and the step.

        Args:
            wanted: the fields of `StepBatch` that say which results to return, and where to write logits.
        """
        counts = np.array([len(p.ids) for p in parts], np.int32)
        starts = np.array([p.start for p in parts], np.int32)
        hidden_from = np.array([p.first_block * BLOCK_TOKENS for p in parts], np.int32)
        first = np.array([p.sequence.first_position for p in parts], np.int32)
        before = np.cumsum(counts) - counts
        state_from, state_to = states_of_step((p.sequence.blocks.states, p.start, len(p.ids)) for p in parts)
        batch = StepBatch(
            token_ids=np.array([token for p in parts for token in p.ids], np.int32),
            positions=np.repeat(starts + first - before.astype(np.int32), counts) + np.arange(counts.sum(), dtype=np.int32),
            query_len=counts,
            context_len=starts - hidden_from,
            phase=np.array([p.phase for p in parts], np.int32),
            block_table=_tables(parts),
            logit_rows=rows,
            states=states,
            reach=_reach(parts),
            state_from=state_from,
            state_to=state_to,
            **wanted,
        )
        if self._embed is not None and any(p.sequence.pictures is not None for p in parts):
            batch = replace(batch, **step_fields(parts, batch.positions, self._embed))
        plan, adapted = self._lower.get(parts[0].quality) or (self.plan, self._adapted and self._adapted[0])
        if self._adapted is not None and adapted is not None and (slots := _adapter_of(parts)) is not None:
            plan, store = adapted, self._adapted[1]
            batch = replace(batch, adapters=store, adapter_of=slots)
        return plan, batch


def _joined(outputs: list[StepOutput], logits: torch.Tensor | None) -> StepOutput:
    """The results of steps one after the other; `logits`: those of all, which they were written to."""

    def rows_of(name: str) -> torch.Tensor | None:
        found = [getattr(output, name) for output in outputs]
        return None if found[0] is None else torch.cat(found)

    return StepOutput(
        torch.cat([output.logits for output in outputs]) if logits is None else logits,
        last_hidden=rows_of("last_hidden"),
        draft_states=rows_of("draft_states"),
    )


def _reach(parts: list[Part]) -> Int32 | None:
    """Returns `reach` of each sequence, int32 [S]; None if a sequence has none."""
    reach = [part.sequence.reach for part in parts]
    return None if None in reach else np.array(reach, np.int32)


def _adapter_of(parts: list[Part]) -> Int32 | None:
    """Returns the slot of each sequence's adapter, int32 [S]; None if no sequence has one."""
    slots = [part.sequence.adapter for part in parts]
    return np.array(slots, np.int32) if max(slots) >= 0 else None


def _tables(parts: list[Part]) -> Int32:
    """Returns `StepBatch.block_table`, padded with zeros."""
    groups = len(parts[0].sequence.blocks.tables)
    lengths = [len(part.sequence.blocks.blocks) - part.first_block for part in parts]
    tables = np.zeros((groups, len(parts), max(lengths)), np.int32)
    for group, rows in enumerate(tables):
        for row, part, length in zip(rows, parts, lengths, strict=True):
            row[:length] = part.sequence.blocks.tables[group].blocks[part.first_block :]
    return tables if groups > 1 else tables[0]


def choose_rows(
    choose: Callable[[torch.Tensor, Items[TokenChoice | None]], list[int | None]],
    logits: torch.Tensor,
    choices: list[TokenChoice | ChangedChoice | None],
) -> tuple[list[int | None], dict[int, Floats | TokenLogprob]]:
    """Chooses tokens from logits on a device.

    Args:
        choose: `Plan.choose_tokens`.
        logits: float32 [R, V]; not changed.
        choices: one per row; None: the caller needs the row's logits.

    Returns: the tokens, see `Plan.choose_tokens`, and None also where the changes leave none; and by row the logits on the
        host, float32 [V], if the token is None, or what is to be reported of the token.
    """
    given = {row: choice for row, choice in enumerate(choices) if isinstance(choice, ChangedChoice)}
    changed = [row for row, choice in given.items() if choice.changes]
    tokens = choose(logits, [None if n in changed else given[n].choice if n in given else c for n, c in enumerate(choices)])  # type: ignore[misc]
    if changed:
        own = changed_logits(logits, changed, [given[row].changes for row in changed])
        for row, token in zip(changed, choose(own, [given[row].choice for row in changed]), strict=True):
            tokens[row] = None if token == NOT_FINITE else token  # the caller finds out which logits are not finite
    needed = [row for row, token in enumerate(tokens) if token is None]
    rows: dict[int, Floats | TokenLogprob] = dict(zip(needed, logits[needed].cpu().numpy(), strict=True))
    wanted = [(row, token, given[row].logprobs) for row in given if (token := tokens[row]) is not None and token >= 0]
    reported = [(row, token, count) for row, token, count in wanted if count is not None]
    if reported:
        found = log_probabilities(logits, reported)
        for (row, token, _), (logprob, top) in zip(reported, found, strict=True):
            rows[row] = TokenLogprob(token, logprob, top)
    return tokens, rows
