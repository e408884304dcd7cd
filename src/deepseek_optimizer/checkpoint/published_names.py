"""Names of tensors in published checkpoints that differ from the parameters' names in Transformers.

Transformers renames them when it loads (`conversion_mapping.py`); both forms are read here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from ..errors import CheckpointError
from .base import TensorInfo

Renames = tuple[tuple[str, str], ...]  # pattern -> replacement, applied in order

_NUMBERED: Final[Renames] = (
    (r"\.experts\.(\d+)\.w1\.", r".experts.\1.gate_proj."),
    (r"\.experts\.(\d+)\.w3\.", r".experts.\1.up_proj."),
    (r"\.experts\.(\d+)\.w2\.", r".experts.\1.down_proj."),
)
_MIXTRAL: Final[Renames] = ((r"\.block_sparse_moe\.", ".mlp."), *_NUMBERED)
_GRANITE: Final[Renames] = (
    (r"\.block_sparse_moe\.input_linear\.weight$", ".block_sparse_moe.experts.gate_up_proj"),
    (r"\.block_sparse_moe\.output_linear\.weight$", ".block_sparse_moe.experts.down_proj"),
    (r"\.block_sparse_moe\.router\.layer\.weight$", ".block_sparse_moe.router.weight"),
)
_RENAMES: Final[Mapping[str, Renames]] = {
    "mixtral": _MIXTRAL, "minimax_m2": _MIXTRAL, "granitemoe": _GRANITE, "lfm2_moe": _NUMBERED,
}  # fmt: skip


def with_parameter_names(tensors: Mapping[str, TensorInfo], model_type: Any) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint by the names that the model's parameters have.

    Raises:
        CheckpointError: two tensors have the same name then.
    """
    renames = _RENAMES.get(model_type, ()) if isinstance(model_type, str) else ()
    renamed: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise CheckpointError(
                f"is also stored as {renamed[name].name}; remove one of them", file=info.file, tensor=info.name
            )
        renamed[name] = info
    return renamed
