"""Elementwise activations on several threads.

torch's threads are off while a model on the general path runs, because they compete with the backend's (`system/threads.py`). A
large activation would then run on one core. So chunks that fit in a core's cache are computed on the threads of a pool, which
sleep between calls. Values may differ from torch's in the last bit at the ends of chunks, where it uses scalar code.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from ..bind.packed_model import NoCopyCallable

_CHUNK = 1 << 16  # elements
_SMALLEST = 1 << 18  # elements, below which starting the threads costs more than it saves
_ELEMENTWISE = (  # classes of `transformers.activations` and torch without parameters
    "AccurateGELUActivation", "FastGELUActivation", "GELU", "GELUActivation", "GELUTanh", "Mish", "MishActivation",
    "NewGELUActivation", "QuickGELUActivation", "ReLUSquaredActivation", "SiLU", "SiLUActivation",
)  # fmt: skip


class Workers:
    """Runs a function over chunks of a tensor.

    Args:
        threads: number of threads, including the caller's.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        # A new thread adopts the process's number of torch threads, which is 1 where this is used.
        self._pool = ThreadPoolExecutor(threads - 1, "dso-activations", torch.get_num_threads)

    def __call__(self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """function(x) for an elementwise function and a contiguous tensor, without gradient."""
        with torch.inference_mode(False):  # which threads do not inherit: only a plain tensor can be written by all
            out = torch.empty_like(x)
            pairs = list(zip(x.view(-1).split(_CHUNK), out.view(-1).split(_CHUNK), strict=True))

        def compute(first: int) -> None:
            with torch.no_grad():
                for source, target in pairs[first :: self.threads]:
                    target.copy_(function(source))

        others = [self._pool.submit(compute, first) for first in range(1, self.threads)]
        compute(0)
        for other in others:
            other.result()
        return out


class ParallelActivation(nn.Module):
    """An elementwise activation that runs on several threads if its input is large and no gradient is needed.

    Args:
        inner: Transformers' or torch's module.
        workers: a `Workers`, wrapped in a `NoCopyCallable`.
    """

    def __init__(self, inner: nn.Module, workers: NoCopyCallable) -> None:
        super().__init__()
        self.inner, self.workers = inner, workers
        self.training = inner.training  # a module in training mode turns off the native call of its block

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        graph = torch.is_grad_enabled() and input.requires_grad
        if input.numel() < _SMALLEST or graph or not input.is_contiguous() or input.device.type != "cpu":
            return self.inner(input)
        return self.workers(self.inner, input)


def parallelize_activations(model: nn.Module, threads: int | None) -> None:
    """Replaces the model's elementwise activations, if the backend has several threads."""
    if threads is None or threads < 2:
        return
    workers = NoCopyCallable(Workers(threads))
    replaced: dict[int, ParallelActivation] = {}
    for parent in list(model.modules()):
        for name, module in list(parent._modules.items()):
            if module is None or module._forward_hooks or module._forward_pre_hooks or isinstance(parent, ParallelActivation):
                continue
            if type(module).__name__ in _ELEMENTWISE:
                setattr(parent, name, replaced.setdefault(id(module), ParallelActivation(module, workers)))
