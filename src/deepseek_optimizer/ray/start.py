"""Starts Ray on this machine, or connects to a cluster that runs."""

from __future__ import annotations

import os
from typing import Any

from . import haproxy
from .proxy import CALLBACK, IMPORT_PATH

_ENVIRONMENT = {
    CALLBACK: IMPORT_PATH,
    # Ray's workers have a niceness of 15, so that on a busy machine a replica would wait for everything else.
    "RAY_worker_niceness": "0",
    # Seconds: the proxy imports this package, which takes longer than Ray expects on a busy machine.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "180",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}


def start(address: str | None, by_haproxy: bool = False, **options: Any) -> None:
    """Connects this process to Ray.

    Args:
        address: of a cluster, "auto" for one of this machine. None: Ray is started here, with environment variables that its
            processes read, unless they are set.
        by_haproxy: whether HAProxy shall hand requests to replicas, if Ray is started here.
        options: more arguments of `ray.init`.
    """
    if address is None:
        wanted = by_haproxy and os.environ.get(haproxy.VARIABLE, "1") == "1" and haproxy.available()
        for name, value in {**_ENVIRONMENT, **(haproxy.environment() if wanted else {})}.items():
            os.environ.setdefault(name, value)
    import ray  # it reads some of them when it is imported

    # "local": not a cluster that an environment variable names, or that somebody started on this machine
    ray.init(address or "local", include_dashboard=False if address is None else None, **options)
