"""Creates the process group of processes that torchrun may restart.

`torch.distributed` writes the addresses of the processes to torchrun's store under the same keys in each attempt. So a
restarted process may read the address of one that has ended, and both wait for each other (torch 2.13;
https://github.com/pytorch/pytorch/issues/135712). Here, the processes of an attempt have a part of the store for themselves.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from ..system.attempt_store import store_of_attempt


def create(backend: str | None, timeout: float, *, on_cpu: bool) -> None:
    """Creates the default process group if torchrun has started this process as one of several, and there is none yet.

    Args:
        backend: of `torch.distributed`; None: gloo for the CPU, and NCCL for CUDA unless `on_cpu`.
        timeout: of the group's operations, in seconds.
        on_cpu: whether nothing is computed on a GPU.

    Raises:
        torch.distributed.DistError: the other processes have not come in time.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not dist.is_available() or dist.is_initialized():
        return
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if ranks == 1:
        return
    if backend is None:
        backend = "gloo" if on_cpu or not torch.cuda.is_available() else "cpu:gloo,cuda:nccl"
    patience = timedelta(seconds=timeout)
    kept = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=patience)
    store = store_of_attempt(kept, rank, ranks, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=patience)
