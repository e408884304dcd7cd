"""How many parameters a model has, and their bytes."""

from __future__ import annotations

import math
from typing import Any

from ..bind.instance_method import Replacement
from ..bind.modules import Packed, PackedEmbedding


class ParameterCount(Replacement):
    """`model.num_parameters`: a packed matrix counts as many as the float one has, not the bytes of its tiles."""

    replaces = "num_parameters"

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        model = self.runtime.model
        count: int = self._original(model, only_trainable, exclude_embeddings)
        if only_trainable:  # packed weights are not
            return count
        packed = [module for module in model.modules() if isinstance(module, Packed)]
        counted = {id(m.weight) for m in packed if exclude_embeddings and isinstance(m, PackedEmbedding)}
        for module in packed:
            for leaf, weight in module.held().items():
                if id(module._parameters[leaf]) not in counted:  # a tied one counts once
                    counted.add(id(module._parameters[leaf]))
                    count += math.prod(weight.shape) - weight.data.numel()
        return count


def parameter_bytes(model: Any) -> int:
    """Bytes of the parameters, shared ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
