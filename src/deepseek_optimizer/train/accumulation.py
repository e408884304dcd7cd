"""Gradient accumulation in fp32: a bf16 sum would round small gradients away."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Final

import torch
import torch.distributed as dist

from . import group
from .shards import is_sharded

_BUCKET: Final = 1 << 22  # elements; gradients smaller than this are exchanged together


class Accumulators:
    """Gives each weight that is not fp32 an fp32 `main_grad`, which accumulates its gradients over the passes of a step.

    The ops of this package add to `main_grad` directly and return no gradient. Gradients of torch's own ops are added by a hook
    and freed immediately. The optimizer uses `main_grad` where it exists, and zeroes it after the step.

    With several processes, fp32 weights have a `main_grad` too. Of whole weights (DDP), each process sums its own gradients,
    and `reduce` averages the sums over the processes, in fp32. Of sharded weights (FSDP2), each pass averages its gradients in
    fp32, rounds the result to the weights' dtype, and adds it to the sum of a shard.

    Args:
        parameters: the trainable parameters, at least one of which is not fp32.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        every, parameters = group.size() > 1, list(parameters)
        self._sharded = any(map(is_sharded, parameters))
        self._sums = [(p, torch.zeros_like(p, dtype=torch.float32)) for p in parameters if every or p.dtype != torch.float32]
        self._handles = [] if self._sharded else [p.register_post_accumulate_grad_hook(_add) for p, _ in self._sums]
        self.attach()

    def attach(self) -> None:
        """Sets each parameter's `main_grad`, for the passes that add to it and for the optimizer."""
        for parameter, total in self._sums:
            parameter.main_grad = total  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def around_pass(self, model: Any) -> Iterator[None]:
        """Around a forward and backward pass of a model, wrapped or not, whatever it would do itself to sum gradients."""
        if self._sharded:
            model.set_requires_gradient_sync(True)
            yield
            for parameter, _ in self._sums:
                _add(parameter)
        else:
            with model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext():
                yield

    def reduce(self) -> None:
        """After the passes of a step, averages the sums of whole weights over all processes. Called by all of them."""
        if self._sharded or group.size() == 1:
            return
        for bucket in _buckets([total for _, total in self._sums]):
            flat = bucket[0] if len(bucket) == 1 else torch.cat([total.flatten() for total in bucket])
            dist.all_reduce(flat)
            flat.div_(group.size())
            if len(bucket) > 1:
                for total, part in zip(bucket, flat.split([total.numel() for total in bucket]), strict=True):
                    total.copy_(part.view_as(total))

    def drop(self) -> None:
        """Zeroes the sums and hides them from the optimizer until `attach`, so that its next step changes nothing."""
        for parameter, total in self._sums:
            parameter.main_grad = None  # type: ignore[attr-defined]
            total.zero_()

    def remove(self) -> None:
        """Removes the hooks and the `main_grad` attributes."""
        for handle in self._handles:
            handle.remove()
        for parameter, _ in self._sums:
            del parameter.main_grad  # type: ignore[attr-defined]
        self._sums, self._handles = [], []


def sum_in_fp32(_, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
    """A communication hook of DDP that averages gradients in fp32, whatever their dtype, and rounds the result once."""
    exact = bucket.buffer().float().div_(group.size())
    work = dist.all_reduce(exact, async_op=True).get_future()

    def rounded(done: Any) -> torch.Tensor:
        result: torch.Tensor = bucket.buffer().copy_(done.value()[0])
        return result

    return work.then(rounded)


def _add(parameter: Any) -> None:
    if parameter.grad is not None:
        parameter.main_grad.add_(parameter.grad)
        parameter.grad = None


def _buckets(tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Large tensors by themselves, others of a device together, up to _BUCKET elements."""
    open_buckets: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() >= _BUCKET:
            yield [tensor]
            continue
        bucket = open_buckets.setdefault(tensor.device, [])
        bucket.append(tensor)
        if sum(each.numel() for each in bucket) >= _BUCKET:
            yield open_buckets.pop(tensor.device)
    yield from open_buckets.values()
