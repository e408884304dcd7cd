"""The processes of a replica whose model is divided among nodes: one on each, in the bundles of the replica's placement group.

The replica has rank 0 and the first bundle. It creates an actor in each of the others, and tells it what torchrun would tell by
environment variables. Ray ends the actors with the replica.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..checkpoint import open_checkpoint
from ..errors import BackendError, DeepSeekOptimizerError
from ..integration.load.resolve import resolve
from ..server.loading import load_served_model
from ..server.served_model import ServedModel
from ..server.settings import ServerSettings
from ..system.interpreter import switch_often

logger = logging.getLogger("deepseek_optimizer.ray")

_START_SECONDS = 120  # until Ray has started a process and it has found the checkpoint


class RankProcess:
    """The class of the actors. Ray calls its methods."""

    def prepare(self, served: ServedModel, variables: dict[str, str]) -> str | None:
        """Called before rank 0 waits for this process; returns why it cannot load the model, as far as that is known."""
        os.environ.update(variables)
        switch_often()
        try:
            with open_checkpoint(resolve(served.model)):
                return None
        except DeepSeekOptimizerError as error:
            return f"{type(error).__name__}: {error}"

    def run(self, served: ServedModel, settings: ServerSettings) -> None:
        """Loads this process's part of the model, and runs it until rank 0 ends."""
        try:
            load_served_model(served, settings, logger.warning)
        except SystemExit as ended:  # the process of a rank ends so
            logger.info("rank %s has ended with status %s", os.environ["RANK"], ended.code)


def start_ranks(served: ServedModel, settings: ServerSettings, nodes: int) -> list[Any]:
    """Starts the processes of ranks 1 and higher in the placement group of this process, which gets rank 0: from now on, it
    loads models as on several machines.

    Args:
        served, settings: of the replica.
        nodes: how many nodes the model is divided among.

    Returns:
        The actors, which end when this list does.

    Raises:
        BackendError: a process cannot be started, or does not find the model.
    """
    group = ray.util.get_current_placement_group()
    assert group is not None, "a replica on several nodes has a placement group"
    common = {
        "WORLD_SIZE": str(nodes),
        "MASTER_ADDR": ray.util.get_node_ip_address(),
        "MASTER_PORT": str(_free_port()),
        "DSO_RANK_KEY": secrets.token_hex(32),
    }
    actors = [_actor(group, rank) for rank in range(1, nodes)]
    told = [actor.prepare.remote(served, {**common, "RANK": str(rank)}) for rank, actor in enumerate(actors, 1)]
    try:
        failures = ray.get(told, timeout=_START_SECONDS)
    except ray.exceptions.RayError as error:
        raise BackendError(f"the processes of the other nodes cannot be started: {error}") from error
    for rank, failure in enumerate(failures, 1):
        if failure is not None:
            raise BackendError(f"rank {rank} of {nodes}, on another node, cannot load its part of the model: {failure}")
    os.environ.update({**common, "RANK": "0"})
    for actor in actors:
        actor.run.remote(served, settings)
    return actors


def _actor(group: PlacementGroup, bundle: int) -> Any:
    place = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=bundle)
    cpus = group.bundle_specs[bundle].get("CPU", 0)
    return ray.remote(RankProcess).options(num_cpus=cpus, scheduling_strategy=place).remote()


def _free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])
