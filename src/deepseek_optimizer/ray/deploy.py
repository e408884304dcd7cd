"""Applications for Ray Serve: `serve.run(deployment(model))`, or `import_path: deepseek_optimizer.ray:application` in YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from ..chat.sampling_defaults import SOURCES
from ..errors import ConfigError
from ..graph.parallel import Parallel
from ..server.keys import read_keys
from ..server.served_model import ServedModel
from ..server.settings import ServerSettings
from . import haproxy
from .autoscaling import ByLoad
from .replica import Replica
from .router import PrefixRouter

_TARGET = 0.75  # share of the batch that autoscaling aims at
SCALE_DOWN_AFTER = 600.0  # seconds; the next load may come soon, and a replica takes long to start
_STATS_SECONDS = 2.0  # between two looks of the autoscaling at the engines
_RUNNING, _WAITING = 32, 256  # sequences in a batch and requests that wait for it, as in `dso serve`
_OF_PROXIES = frozenset({"host", "port", "ssl_certfile", "ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs"})


@dataclass(frozen=True)
class Replicas:
    """How many replicas there are, and how large they are.

    Attributes:
        lowest: number of replicas; with `highest`, the minimum.
        highest: maximum number of replicas, which then depends on the load; None: as many as `lowest`.
        cpus, gpus: of a replica, on each of its nodes.
        scale_down_after: seconds of less load before a replica ends, with `highest`.
        nodes: of a replica, whose model is divided among them.
    """

    lowest: int = 1
    highest: int | None = None
    cpus: float = 1
    gpus: float = 0
    scale_down_after: float = SCALE_DOWN_AFTER
    nodes: int = 1

    def __post_init__(self) -> None:
        """Raises ConfigError for an invalid value."""
        if self.lowest < 1 or (self.highest is not None and self.highest < self.lowest):
            raise ConfigError(f"the number of replicas must be 1 or more, got {self.lowest} to {self.highest or self.lowest}")
        if not self.cpus > 0 or self.gpus < 0:
            raise ConfigError(f"a replica needs more than 0 cpus, got {self.cpus}, and 0 or more gpus, got {self.gpus}")
        if self.nodes < 1 or (self.nodes > 1 and self.gpus > 0):
            raise ConfigError(
                f"a replica needs 1 node or more, and with gpus exactly 1; got {self.nodes} nodes, {self.gpus} gpus"
            )
        if not 0 <= self.scale_down_after < float("inf"):
            raise ConfigError(f"scale_down_after must be a number of seconds, 0 or more, got {self.scale_down_after}")


def deployment(
    model: str,
    *,
    num_replicas: int = 1,
    max_replicas: int | None = None,
    scale_down_after: float = SCALE_DOWN_AFTER,
    cpus: float = 1,
    gpus: float = 0,
    nodes: int = 1,
    config: Mapping[str, Any] | None = None,
    engine: Mapping[str, Any] | None = None,
    server: Mapping[str, Any] | None = None,
    api_key_file: str | None = None,
    name: str | None = None,
    draft_model: str | None = None,
    draft_precision: str | None = None,
    generation_config: str = "model",
    pooling: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """An application of replicas that serve a model by the API of `dso serve`, for `ray.serve.run`.

    Each replica is a process with an engine of its own, which answers HTTP requests itself. A request goes to the replica
    that knows the longest beginning of its prompt, unless that one has too much to do; requests with the same `X-Session-Id`
    stay at a replica. For this, the processes of Ray need the environment variable that `proxy.CALLBACK` names when they
    start: see docs/how-to/ray.md. If Ray uses HAProxy, that chooses the replica. Uploaded files, batches and stored
    responses are at one replica, where their client's requests go too; they end with it.

    Args:
        model: path or name of the checkpoint, which every node must find.
        num_replicas: number of replicas; with `max_replicas`, the minimum.
        max_replicas: maximum number of replicas, which then depends on the running and waiting sequences.
        scale_down_after: seconds of less load before a replica ends, with `max_replicas`.
        cpus: processor cores of a replica, which its engine uses as threads unless `config` has `threads`. The processes of a
            model that is divided (`config["parallel"]`) share them, unless they are on several nodes.
        gpus: GPUs of a replica.
        nodes: number of nodes that each replica is spread over, with `cpus` cores on each: the model must be divided among as
            many processes (`config["parallel"]`), and each of them runs on a node of its own.
        config: fields of `DeepSeekConfig`, and `device`.
        engine: options of `make_async_engine`.
        server: fields of `ServerSettings`, without those that Ray's proxies decide.
        api_key_file: of API keys, one per line; None: the keys in the environment variable DSO_API_KEYS, if it is set.
        name: by which requests name the model; None: the path's last part.
        draft_model, draft_precision, generation_config, pooling: see `ServedModel`.
        options: further options of `ray.serve.deployment`.

    Raises:
        ConfigError: an option is invalid.
    """
    values = dict(server or {})
    for field in sorted(_OF_PROXIES & values.keys()):
        raise ConfigError(
            f"server: {field} has no effect on Ray, whose proxies accept connections; set it in their http_options"
        )
    try:
        # The proxies listen. With an address that is not of this host, replicas accept any name in the Host header.
        settings = ServerSettings(**{"host": "0.0.0.0", "keys": read_keys(api_key_file), **values})
    except TypeError as error:
        raise ConfigError(f"server: {error}") from None
    served = ServedModel(
        model=model, name=name, config=dict(config or {}), engine=dict(engine or {}), generation_config=generation_config,
        pooling=pooling, draft_model=draft_model, draft_precision=draft_precision,
    )  # fmt: skip
    return deploy(served, settings, Replicas(num_replicas, max_replicas, cpus, gpus, scale_down_after, nodes), options)


def deploy(served: ServedModel, settings: ServerSettings, replicas: Replicas, options: Mapping[str, Any] | None = None) -> Any:
    """The application of a model and settings that are complete; see `deployment`."""
    for name, given in {
        "state_dir": settings.state_dir is not None,
        "prefix_cache_dir": served.engine.get("prefix_cache_dir") is not None,
        "allow_lora_loading": settings.allow_lora_loading,
        "sleep_mode": settings.sleep_mode,
    }.items():
        if given:
            raise ConfigError(f"{name}: not available on Ray: it would be one replica's, and requests go to any; leave it out")
    if served.generation_config not in SOURCES:
        raise ConfigError(f"generation_config must be one of {', '.join(SOURCES)}, got {served.generation_config!r}")
    parallel = Parallel.of(served.config.get("parallel", {}))
    if replicas.nodes > 1 and parallel.ranks != replicas.nodes:
        raise ConfigError(
            f"a replica on {replicas.nodes} nodes needs a model that is divided among as many processes, got parallel: "
            f"{parallel}"
        )
    sharing = 1 if replicas.nodes > 1 else parallel.at_once  # processes that share the cores; `threads` are those of each
    fields = {"threads": max(1, int(replicas.cpus) // sharing), **served.config}
    running = fields.get("batch_size_range", (1, _RUNNING))[1]
    values: dict[str, Any] = {
        "name": "dso",
        "max_ongoing_requests": running + served.engine.get("max_waiting", _WAITING),
        "graceful_shutdown_timeout_s": settings.drain_seconds,
        "ray_actor_options": {"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
    }
    if not haproxy.in_use():
        values["request_router_config"] = RequestRouterConfig(request_router_class=PrefixRouter)
    if replicas.highest is None:
        values["num_replicas"] = replicas.lowest
    else:
        values["autoscaling_config"] = AutoscalingConfig(
            min_replicas=replicas.lowest,
            initial_replicas=replicas.lowest,
            max_replicas=replicas.highest,
            metrics_interval_s=_STATS_SECONDS,
            look_back_period_s=5 * _STATS_SECONDS,
            downscale_delay_s=replicas.scale_down_after,
            policy=AutoscalingPolicy(policy_function=ByLoad, policy_kwargs={"target": _TARGET * running}),
        )
    if replicas.nodes > 1:
        values["placement_group_bundles"] = [{"CPU": replicas.cpus}] * replicas.nodes
        values["placement_group_strategy"] = "STRICT_SPREAD"
    values |= options or {}
    bound = (replace(served, config=fields), settings) + ((replicas.nodes,) if replicas.nodes > 1 else ())
    return serve.deployment(**values)(serve.ingress()(Replica)).bind(*bound)


def application(args: Mapping[str, Any]) -> Any:
    """`deployment` for a YAML file: its `args` are the arguments, with `model`.

    Raises:
        ConfigError: `model` is missing, an argument is unknown, or one is invalid.
    """
    values = dict(args)
    model = values.pop("model", None)
    if not isinstance(model, str):
        raise ConfigError("args: model is missing; give the path or name of a checkpoint")
    try:
        return deployment(model, **values)
    except TypeError as error:
        raise ConfigError(f"args: {error}") from None
