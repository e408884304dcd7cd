"""The router's counts of requests, without a cluster."""

from __future__ import annotations

import asyncio

from ray.serve._private.common import DeploymentHandleSource, DeploymentID
from ray.serve.request_router import ReplicaID

from deepseek_optimizer.ray.router import PrefixRouter


def test_refused_requests_and_those_that_end_at_once_leave_no_load() -> None:
    async def check() -> None:
        deployment = DeploymentID("dso")
        router = PrefixRouter(deployment, DeploymentHandleSource.PROXY)
        router.initialize_state()
        replica = ReplicaID("r", deployment)
        for _ in range(3):
            router.on_send_request(replica)
        router.on_request_completed(replica, "refused")
        assert router._load(replica) == 2
        router.on_request_completed(replica, "answered")
        router.on_request_completed(replica, "cancelled")
        assert router._load(replica) == 0 and not router._own

    asyncio.run(check())
