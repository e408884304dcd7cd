"""Runs an application on Ray Serve until a signal stops it: `dso serve --ray`."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import Any

from .start import start

_NAME = "dso"  # of the application
_REACHED_SECONDS = 30.0  # that what listens may take to hand requests to replicas that are ready
_LOOK_SECONDS = 0.2  # between two looks at what was asked for, and at replicas that are being replaced


def serve_until_stopped(
    application: Callable[[], Any],
    address: str | None,
    host: str,
    port: int,
    banner: Callable[[], None],
    note: Callable[[str], None] = lambda _: None,
    by_haproxy: bool = False,
) -> None:
    """Deploys an application and waits for SIGINT or SIGTERM; then its requests end, and so does a Ray that was started here.
    SIGUSR1 deploys it again, so that Ray replaces the replicas one after another.

    Args:
        application: returns the application; it is called when Ray is there.
        address: of a Ray that runs; None: one is started here.
        host, port: where the proxies listen.
        banner: called when all replicas are ready.
        note: called with what happens to the replicas later.
        by_haproxy: see `start`.
    """
    asked = _Asked()
    start(address, by_haproxy)
    import ray
    from ray import serve

    asked.listen()  # after ray.init, which installs handlers that end the process at once
    try:
        listen = {"host": host, "port": port}
        try:
            serve.start(http_options=listen)
        except TimeoutError:  # after a minute, which proxies may need on a busy machine: they go on starting
            serve.start(http_options=listen)
        serve.run(application(), name=_NAME, route_prefix="/")
        if address is None and not _reached(host, port, asked):
            note(f"the replicas are ready, but requests to port {port} did not reach them for {_REACHED_SECONDS:.0f} seconds")
        banner()
        replacing = False
        while not asked.stop:
            if asked.replace:
                asked.replace, replacing = False, True
                # This call does not wait, so that a signal can stop replicas that never become ready.
                serve.run_many([serve.RunTarget(application(), _NAME, "/")], wait_for_applications_running=False)
                note("the replicas are replaced, one after another")
            replacing = replacing and not _replaced(serve.status().applications, note)
            time.sleep(_LOOK_SECONDS)
        serve.delete(_NAME)  # waits for the requests in flight
    finally:
        if address is None:
            serve.shutdown()
        ray.shutdown()


@dataclass
class _Asked:
    """What signals have asked for. Handlers only set a field: they interrupt the thread that reads it."""

    stop: bool = False
    replace: bool = False

    def listen(self) -> None:
        for name, field in (("SIGINT", "stop"), ("SIGTERM", "stop"), ("SIGUSR1", "replace")):
            if hasattr(signal, name):  # Windows has no SIGUSR1
                signal.signal(getattr(signal, name), lambda *_, field=field: setattr(self, field, True))


def _reached(host: str, port: int, asked: _Asked) -> bool:
    """Waits until what listens hands requests to a replica: Ray tells it of them after it has said that they are ready. Returns
    whether it does; also if a signal has come meanwhile."""
    end = time.monotonic() + _REACHED_SECONDS
    while not asked.stop and time.monotonic() < end:
        with closing(HTTPConnection({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port, timeout=5)) as connection:
            try:
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return True
            except (OSError, HTTPException):
                pass
        time.sleep(_LOOK_SECONDS)
    return asked.stop


def _replaced(applications: Mapping[str, Any], note: Callable[[str], None]) -> bool:
    """Whether a replacement has ended, by the status that Ray reports."""
    status = applications[_NAME].status
    if status == "RUNNING":
        note("the replicas were replaced")
    elif status in ("DEPLOY_FAILED", "UNHEALTHY"):
        note(f"the replicas could not be replaced; those that are left go on. {applications[_NAME].message}")
    else:
        return False
    return True
