"""The forward of an optimized model without a language model head: the plan computes hidden states only.

It is set on the decoder, which is the whole of an `AutoModel` and the inner part of a classifier; the classifier's own code
runs on its output, unchanged.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..compat import cache_name, output_class
from ..generation.steps import Columns
from .forward import PlanForward


class DecoderForward(PlanForward):
    """`model.forward` of a decoder. `last_hidden_state` has the model's dtype, and is zero for padding."""

    def _wanted(self, call: dict[str, Any], q: int) -> Any:
        return np.zeros(0, np.int64)

    def _columns(self, *args: Any) -> Columns:
        columns = super()._columns(*args)
        columns.last_hidden = not columns.hidden
        return columns

    def _output(self, call: dict[str, Any], new: Columns, logits: torch.Tensor, hidden: Any, states: Any, cache: Any) -> Any:
        fields = {"last_hidden_state": hidden[-1], "hidden_states": states, cache_name(): cache}
        return output_class(self.runtime.model)(**fields)
