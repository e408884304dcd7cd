"""A part of torchrun's store that only the processes of one attempt use.

torchrun keeps one store while it restarts processes, so that a restarted process may read what one that has ended has written.
TORCHELASTIC_RESTART_COUNT does not tell attempts apart: machines count their own restarts. So the processes of an attempt
agree on a prefix of their keys first.
"""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

_LOOK = 0.02  # seconds between looks at the store


def store_of_attempt(store: Store, rank: int, ranks: int, timeout: float) -> Store:
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
    import torch.distributed as dist

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
