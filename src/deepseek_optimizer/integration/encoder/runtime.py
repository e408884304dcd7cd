"""The runtime of an encoder: that of the general path, and the plan of its base model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from ...backends.base import CompileOptions, Plan
from ...errors import UnsupportedRequestError
from ...graph import rules
from ...models import build_encoder_graph
from ..bind.graphs import with_eps_of
from ..bind.module_tree import ModuleTree
from ..bind.swap import weights_of
from ..general import GeneralRuntime
from .embed import embed
from .forward import EncoderForward, OnBase
from .report import EncoderReport, make_report
from .rows import Rows, rows_of, step_batch, steps_of


class EncoderRuntime(GeneralRuntime):
    """`model.dso` of an encoder. Calls that the plan cannot serve run Transformers' forward over the packed layers.

    Args: as in `GeneralRuntime`.

    Attributes: those of `GeneralRuntime`, and
        graph, rules: the graph of the base model, and what the fusion rules changed in it.
    """

    def __init__(self, model: Any, *args: Any, **options: Any) -> None:
        super().__init__(model, *args, **options)
        graph, self.rules = rules.apply(build_encoder_graph(model.config), self.config.rules)
        self.graph = with_eps_of(model.base_model, graph)
        self._plan: Plan | None = None
        self._tree: ModuleTree | None = None

    @property
    def base(self) -> Any:
        """The module whose forward the plan replaces: the encoder without its head."""
        return self.model.base_model

    def own_methods(self) -> dict[str, Any]:
        methods = super().own_methods()
        return {**methods, "forward": EncoderForward(OnBase(self))} if self.base is self.model else methods

    def own_report(self) -> EncoderReport:
        return make_report(self)

    def attach_plan(self) -> None:
        """Call once, when all modules are in place: makes the base model run the plan."""
        self._tree = ModuleTree(self.base)
        if self.base is not self.model:
            self.base.__dict__["forward"] = EncoderForward(OnBase(self))

    @property
    def plan(self) -> Plan:
        """The compiled plan; recompiled after the storage of the weights has changed."""
        with self._making:
            if self._plan is None:
                options = CompileOptions(activation=self.config.activation)
                self._plan = self.backend.compile(self.graph, weights_of(self.base, self.graph), options)
            return self._plan

    def why_no_plan(self) -> str | None:
        """Why the plan cannot serve the model as it is now (an adapter, a hook, training); None if it can."""
        return None if self._tree is None else self._tree.unserved(self.base)

    @torch.no_grad()
    def encode(
        self, input_ids: Sequence[Sequence[int]], token_type_ids: Sequence[Sequence[int]] | None = None
    ) -> list[torch.Tensor]:
        """The last hidden states of texts, without padding: in steps of whole texts with at most `config.prefill_chunk` tokens
        together. The result of a text does not depend on the others. A pooler or a head can be applied to it, such as
        `model.pooler(states[None])`.

        Args:
            input_ids: the token ids of each text, special tokens included; at least one each.
            token_type_ids: for each text the type of each token (BERT's pairs of sentences); None: as Transformers' default.

        Returns: for each text a tensor [tokens, hidden] in the model's dtype, on its device, all in one block of memory.

        Raises:
            ValueError: a text is empty, too long for the model's positions, or has an id outside the vocabulary.
            UnsupportedRequestError: the plan cannot serve the model as it is now, because of adapters, hooks or training mode.
        """
        if (reason := self.why_no_plan()) is not None:
            raise UnsupportedRequestError(f"encode needs the plan, but {reason}; call the model with padded batches instead")
        if not input_ids:
            return []
        lengths = [len(ids) for ids in input_ids]
        if 0 in lengths:
            raise ValueError(f"text {lengths.index(0)} has no tokens; leave it out")
        device = self.model.device
        columns = torch.arange(max(lengths), dtype=torch.int64, device=device)
        kept = columns < torch.tensor(lengths, dtype=torch.int64, device=device)[:, None]
        call = {"input_ids": _padded(input_ids, kept)}
        if token_type_ids is not None:
            if [len(types) for types in token_type_ids] != lengths:
                raise ValueError("token_type_ids must have as many numbers for each text as input_ids")
            call["token_type_ids"] = _padded(token_type_ids, kept)
        with self.backend.thread_context():
            hidden = self.run(rows_of(self.base.embeddings, call, kept), hidden=False)[0]
        ends = list(accumulate(lengths))
        return [hidden[end - length : end] for end, length in zip(ends, lengths, strict=True)]

    def run(self, rows: Rows, hidden: bool) -> torch.Tensor:
        """Hidden states [states, tokens, hidden size] of the rows, in the model's dtype: all, or only the last.

        Args:
            rows: from `rows_of`.
            hidden: whether all are wanted.
        """
        states = embed(self.base.embeddings, rows, self.graph.hidden_size, self.backend.threads or 1)
        count = self.graph.hidden_states if hidden else 1
        result = torch.empty(count, *states.shape, dtype=self.base.dtype, device=states.device)
        starts = [0, *accumulate(rows.lengths)]
        for begin, end in steps_of(rows.lengths, self.config.prefill_chunk):
            part = slice(starts[begin], starts[end])
            output = self.plan.run(step_batch(states[part], rows.positions[part], rows.lengths[begin:end], hidden), None)
            made = output.hidden if hidden else output.last_hidden
            assert made is not None
            result[:, part] = made
        return result

    def move(self) -> None:
        super().move()
        self._plan = None

    def rebind(self) -> None:
        """Discards the compiled plan; the next call compiles it from the modules' current storage."""
        self._plan = None

    def __deepcopy__(self, memo: dict[int, Any]) -> EncoderRuntime:
        twin = super().__deepcopy__(memo)
        twin._plan = None
        twin._tree = None if self._tree is None else self._tree.of_copy()
        return twin


def _padded(sequences: Sequence[Sequence[int]], kept: torch.Tensor) -> torch.Tensor:
    """The numbers of all sequences in the columns that are kept, padded with 0: int64 [batch, columns]."""
    flat = torch.tensor([number for sequence in sequences for number in sequence], dtype=torch.long, device=kept.device)
    return torch.zeros(kept.shape, dtype=torch.long, device=kept.device).masked_scatter(kept, flat)
