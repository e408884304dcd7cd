"""The CUDA backend: graphs of decoders, encoders and vision towers by Triton's kernels, on packed weights and a paged cache.

Importing this package loads neither Triton nor the kernels. Its kernels have not run on a card yet (docs/gpu.md), so
backend="auto" does not choose it.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from ...errors import BackendError
from ...graph.ir import Graph
from ...system.cuda_device import why_no_cuda
from ..base import Backend, Sizes
from ..registry import BY_NAME, BackendSettings, BackendSpec, find

__all__ = ["SPEC", "unavailable_reason"]

_OLDEST = (8, 0)  # compute capability: tensor cores that multiply bf16


def unavailable_reason(device: torch.device) -> str | None:
    """Why the backend cannot run on a device, with the remedy; None: it can."""
    if find_spec("triton") is None:
        return 'Triton is not installed: pip install "deepseek-optimizer[cuda]"'
    if (reason := why_no_cuda()) is not None:
        return reason
    found = torch.cuda.get_device_capability(device)
    if found < _OLDEST:
        name = torch.cuda.get_device_name(device)
        return f'{name} has compute capability {found[0]}.{found[1]}, but 8.0 (Ampere) is needed: use backend="reference"'
    return None


def _create(device: torch.device, settings: BackendSettings) -> Backend:
    reason = unavailable_reason(device)
    if reason is not None:
        raise BackendError(f"the cuda backend cannot run: {reason}")
    from .alternatives import chosen
    from .backend import CudaBackend  # imports Triton
    from .cost_table import card_of, choices_for, division_for

    card = card_of(device)
    division, source = division_for(card)
    alternatives, texts = chosen(choices_for(card), device)
    host = lambda: find("cpu").create(torch.device("cpu"), settings)  # noqa: E731
    return CudaBackend(
        device, settings.cuda_graphs, host=host, division=division, source="; ".join((source, *texts)),
        alternatives=alternatives,
    )  # fmt: skip


def _sizes() -> Sizes:
    from .sizes import CudaSizes

    return CudaSizes()


def _check_graph(graph: Graph, kv_dtype: str) -> None:
    from .supported import check_graph_ops

    check_graph_ops(graph, kv_dtype)


SPEC = BackendSpec("cuda", _create, _sizes, device_types=("cuda",), check_graph=_check_graph, priority=BY_NAME)
