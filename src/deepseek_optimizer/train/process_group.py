"""Creates the process group of processes that torchrun may restart.

torchrun keeps one store for all attempts, where `torch.distributed` writes the addresses of the processes under the same keys
each time. So a restarted process may read the address of one that has ended, and both wait for each other (torch 2.13;
https://github.com/pytorch/pytorch/issues/135712). Here, the processes of an attempt agree on a prefix of their keys first.
TORCHELASTIC_RESTART_COUNT would not do: machines count their own restarts.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist

_LOOK = 0.02  # seconds between looks at the store


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


def store_of_attempt(store: dist.Store, rank: int, ranks: int, timeout: float) -> dist.Store:
    """Returns the part of a store that only the processes of one attempt use. All of them must call it.

    Each process writes a name of its own. The first one gives all that it finds the name of the attempt, until as many have
    taken it as there are others: what an ended process has written does no harm.

    Args:
        store: what earlier attempts may have written to.
        rank, ranks: the process's number, and how many there are.
        timeout: in seconds.

    Raises:
        torch.distributed.DistError: the other processes have not come in time.
    """
    name, until = uuid.uuid4().hex, time.monotonic() + timeout
    if rank > 0:
        store.set(f"dso/process/{rank}", name)
        attempt = store.get(f"dso/attempt/{name}").decode()
        store.add(f"dso/{attempt}", 1)
        return dist.PrefixStore(attempt, store)
    answered = set()
    while (others := store.add(f"dso/{name}", 0)) < ranks - 1:
        for key in (f"dso/process/{other}" for other in range(1, ranks)):
            if store.check([key]) and (process := store.get(key).decode()) not in answered:
                store.set(f"dso/attempt/{process}", name)
                answered.add(process)
        if time.monotonic() > until:
            raise dist.DistError(f"{others} of {ranks - 1} other processes have come within {timeout:g} seconds")
        time.sleep(_LOOK)
    return dist.PrefixStore(name, store)
