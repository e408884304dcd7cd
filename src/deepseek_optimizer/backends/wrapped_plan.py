"""A plan around another one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .base import KvStore, Plan, StepBatch, StepOutput
from .decoding import DecodeCall, Decoded, DraftedCall, DraftedRounds
from .sampling import TokenChoice


class WrappedPlan:
    """A `Plan` that passes every call to the plan inside it. Subclasses change some."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    @property
    def device(self) -> torch.device:
        """See `Plan.device`."""
        return self._plan.device

    def run(self, batch: StepBatch, store: KvStore | None) -> StepOutput:
        """See `Plan.run`."""
        return self._plan.run(batch, store)

    def choose_tokens(self, logits: torch.Tensor, choices: Sequence[TokenChoice | None]) -> list[int | None]:
        """See `Plan.choose_tokens`."""
        return self._plan.choose_tokens(logits, choices)

    def decode(self, batch: StepBatch, store: KvStore, call: DecodeCall) -> Decoded:
        """See `Plan.decode`."""
        return self._plan.decode(batch, store, call)

    def decode_drafted(
        self, batch: StepBatch, drafter: Plan, pending: StepBatch, store: KvStore, call: DraftedCall
    ) -> DraftedRounds:
        """See `Plan.decode_drafted`."""
        return self._plan.decode_drafted(batch, drafter, pending, store, call)

    def check_weights(self) -> None:
        """See `Plan.check_weights`."""
        self._plan.check_weights()

    def reserve(self, tokens: int, logit_rows: int) -> None:
        """See `Plan.reserve`."""
        self._plan.reserve(tokens, logit_rows)

    def buffer_bytes(self, tokens: int, logit_rows: int) -> int:
        """See `Plan.buffer_bytes`."""
        return self._plan.buffer_bytes(tokens, logit_rows)

    def describe(self) -> list[dict[str, Any]]:
        """See `Plan.describe`."""
        return self._plan.describe()
