"""Runs an application on Ray Serve until a signal stops it: `dso serve --ray`."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from .proxy import CALLBACK, IMPORT_PATH

_SLOW_START = {  # seconds; the proxy imports this package, which takes longer than Ray expects on a busy machine
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}


def set_up_environment() -> None:
    """Sets what Ray's processes read when they start, unless it is set. Only a Ray that this process starts sees it."""
    os.environ.setdefault(CALLBACK, IMPORT_PATH)
    for name, value in _SLOW_START.items():
        os.environ.setdefault(name, value)


def serve_until_stopped(
    application: Callable[[], Any], address: str | None, host: str, port: int, banner: Callable[[], None]
) -> None:
    """Deploys an application and waits for SIGINT or SIGTERM; then its requests end, and so does a Ray that was started here.

    Args:
        application: returns the application; it is called when Ray is there.
        address: of a Ray that runs; None: one is started here.
        host, port: where the proxies listen.
        banner: called when all replicas are ready.
    """
    if address is None:
        set_up_environment()
    import ray
    from ray import serve

    stopped = threading.Event()
    # "local": not a cluster that an environment variable names, or that somebody started on this machine
    ray.init(address or "local", include_dashboard=False if address is None else None)
    for number in (signal.SIGINT, signal.SIGTERM):  # after ray.init, which installs handlers that end the process at once
        signal.signal(number, lambda *_: stopped.set())
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(application(), name="dso", route_prefix="/")
        banner()
        stopped.wait()
        serve.delete("dso")  # waits for the requests in flight
    finally:
        if address is None:
            serve.shutdown()
        ray.shutdown()
