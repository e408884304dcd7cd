"""The router of Ray Serve that sends a request to the replica that knows the beginning of its prompt."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from .prefix_policy import PrefixPolicy
from .routing_header import Routing, read


class PrefixRouter(RequestRouter):
    """Ray creates one in each proxy, and tells it of replicas and requests. The policy is `PrefixPolicy`."""

    def initialize_state(self, **options: Any) -> None:
        """Called by Ray with `request_router_kwargs`, the arguments of `PrefixPolicy`."""
        self._policy: PrefixPolicy[ReplicaID] = PrefixPolicy(**options)
        self._own: Counter[ReplicaID] = Counter()  # requests that this router sent and that have not ended

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas for a request in the order of the policy; Ray takes the first one that accepts it."""
        if pending_request is None:
            return [list(candidate_replicas)]
        pending_request.routing_context.should_backoff = True  # all replicas are in the answer: wait before the next attempt
        loads = {replica.replica_id: self._load(replica.replica_id) for replica in candidate_replicas}
        routing = routing_of(pending_request)
        ranked = self._policy.rank(routing, loads)
        replicas = self.curr_replicas
        return [[replicas[replica_id]] for replica_id in ranked if replica_id in replicas]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._policy.sent(routing_of(pending_request), replica_id)

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Counted here, not when the replica has accepted the request: `on_request_completed` also follows a refusal, and can
        come before `on_request_routed`."""
        super().on_send_request(replica_id)
        self._own[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._own[replica_id] -= 1
        if self._own[replica_id] <= 0:
            del self._own[replica_id]

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._forget_others()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._forget_others()

    def _forget_others(self) -> None:
        self._policy.keep(self.curr_replicas)

    def _load(self, replica_id: ReplicaID) -> int:
        """Requests at a replica: those that it last told of, from all proxies, or those that were sent from here if more."""
        return max(self.replica_queue_len_cache.get(replica_id) or 0, self._own[replica_id])


def routing_of(pending_request: PendingRequest) -> Routing:
    return read(pending_request.metadata.session_id)
