"""`dso serve --ray`: options, and the server as replicas on Ray Serve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import banner_lines

if TYPE_CHECKING:
    from deepseek_optimizer.server.served_model import ServedModel
    from deepseek_optimizer.server.settings import ServerSettings

_RAY: dict[str, Any] = {"rich_help_panel": "Replicas on Ray"}

Ray = Annotated[
    bool,
    typer.Option("--ray", help="Serve replicas of the model on Ray Serve. Ray is started on this machine.", **_RAY),
]
RayAddress = Annotated[
    str | None,
    typer.Option("--ray-address", metavar="ADDRESS", help="Use the Ray cluster at this address; auto: a local one.", **_RAY),
]
Replicas = Annotated[int, typer.Option("--replicas", min=1, metavar="N", help="Number of replicas.", **_RAY)]
MaxReplicas = Annotated[
    int | None,
    typer.Option(
        "--max-replicas",
        min=1,
        metavar="N",
        help="Add replicas under load, up to this number; --replicas: the minimum.",
        **_RAY,
    ),
]
ScaleDownAfter = Annotated[
    float | None,
    typer.Option(
        "--scale-down-after",
        min=0,
        metavar="SECONDS",
        help="With --max-replicas: end a replica after so many seconds of less load. Default: 600.",
        **_RAY,
    ),
]
ReplicaCpus = Annotated[
    float | None,
    typer.Option(
        "--replica-cpus",
        metavar="N",
        help="Processor cores of a replica, on each of its nodes, and its threads. Default: those of this machine, divided "
        "among the replicas.",
        **_RAY,
    ),
]
ReplicaNodes = Annotated[
    int,
    typer.Option(
        "--replica-nodes",
        min=1,
        metavar="N",
        help="Spread each replica over so many nodes of the cluster, with a process of a divided model on each of them.",
        **_RAY,
    ),
]


_HAPROXY = "by HAProxy, to the replica with the fewest connections"
_PROXIES = "by Ray's proxies, to the replica that knows the beginning of the prompt"


@dataclass(frozen=True)
class RayOptions:
    """The options of replicas, by the names of their parameters in `serve`."""

    ray: bool
    ray_address: str | None
    replicas: int
    max_replicas: int | None
    replica_cpus: float | None
    scale_down_after: float | None = None
    replica_nodes: int = 1

    def check(self, others: dict[str, bool]) -> None:
        """Raises a ConfigError for options that need --ray, or that have no effect with it (`others`: those that are given)."""
        from deepseek_optimizer.errors import ConfigError

        if not self.ray:
            if self != RayOptions(False, None, 1, None, None):
                names = "--ray-address, --replicas, --max-replicas, --scale-down-after, --replica-cpus and --replica-nodes"
                raise ConfigError(f"{names} need --ray")
            return
        wrong = [name for name, given in others.items() if given]
        if wrong:
            raise ConfigError(f"{', '.join(wrong)}: not available with --ray; leave it out")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ConfigError(f"--max-replicas must be --replicas or more, got {self.max_replicas} and {self.replicas}")
        if self.scale_down_after is not None and self.max_replicas is None:
            raise ConfigError("--scale-down-after needs --max-replicas: otherwise the number of replicas stays the same")
        if self.ray_address is not None and self.replica_cpus is None:
            raise ConfigError("--ray-address needs --replica-cpus: the cluster's machines may have other cores than this one")
        if self.replica_nodes > 1 and self.ray_address is None:
            raise ConfigError("--replica-nodes needs --ray-address: a Ray that is started here has one node")
        if self.replica_cpus is not None and not self.replica_cpus > 0:
            raise ConfigError(f"--replica-cpus must be greater than 0, got {self.replica_cpus}")
        require_ray()


def require_ray(*packages: str) -> None:
    """Raises MissingPackageError if Ray, or one of the packages of its parts that are used, is not installed. Imports none of
    them: Ray takes a second."""
    import importlib.util

    from deepseek_optimizer.errors import MissingPackageError

    if any(importlib.util.find_spec(package) is None for package in ("ray", *packages)):
        raise MissingPackageError("--ray", "ray[data,serve]", "ray")


def cores_of_each(processes: int) -> int:
    """The threads that a model takes on this machine by default, as far as there are processors, divided among processes; 1 at
    least.

    Raises:
        ConfigError: DSO_THREADS, DSO_TOPOLOGY or DSO_NUMA is invalid.
    """
    from deepseek_optimizer.backends.cpu import thread_limits

    return max(1, min(thread_limits()) // processes)


def gpus_of_each(fields: Mapping[str, Any]) -> float:
    """GPUs of a process: one if its model is loaded to a CUDA device, since Ray hides the others; else none.

    Args:
        fields: the options `device` and `backend`, as far as they are given.
    """
    from deepseek_optimizer.integration.load.placement import device_of

    device = fields.get("device")
    return float(str(device_of(fields.get("backend", "auto")) if device is None else device).startswith("cuda"))


def serve_on_ray(given: RayOptions, served: ServedModel, settings: ServerSettings) -> None:
    """Serves replicas until a signal stops them.

    Args:
        given: the options of replicas.
        served: the model.
        settings: the server's.

    Raises:
        CheckpointError: there is no such model on this machine, where replicas will look for it.
    """
    from deepseek_optimizer.integration.load.resolve import resolve
    from deepseek_optimizer.ray import haproxy
    from deepseek_optimizer.ray.run import serve_until_stopped

    if given.ray_address is None:
        resolve(served.model)  # else each replica fails, or downloads it, minutes later
    highest = given.max_replicas or given.replicas
    cpus, gpus = given.replica_cpus or cores_of_each(highest), gpus_of_each(served.config)

    def application() -> Any:
        from deepseek_optimizer.ray.deploy import SCALE_DOWN_AFTER, Replicas, deploy

        after = SCALE_DOWN_AFTER if given.scale_down_after is None else given.scale_down_after
        return deploy(served, settings, Replicas(given.replicas, given.max_replicas, cpus, gpus, after, given.replica_nodes))

    def banner() -> None:
        lines = [
            f"model     {served.model}, {given.replicas} replicas of {cpus:g} cores"
            + (f" on each of {given.replica_nodes} nodes" if given.replica_nodes > 1 else "")
            + (f" and {gpus:g} GPU" if gpus else "")
            + (f", up to {given.max_replicas}" if given.max_replicas else ""),
            f"requests  {_HAPROXY if haproxy.in_use() else _PROXIES}",
            banner_lines.address_line(settings, settings.host, settings.port),
            *banner_lines.access_warning(settings),
        ]
        typer.echo("\n".join(lines), err=True)

    serve_until_stopped(
        application, given.ray_address, settings.host, settings.port, banner, lambda text: typer.echo(text, err=True),
        by_haproxy=highest == 1,
    )  # fmt: skip
