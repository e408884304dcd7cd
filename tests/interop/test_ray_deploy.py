"""Options of applications, without a cluster."""

from __future__ import annotations

import os
from typing import Any

import pytest
import ray

from deepseek_optimizer.errors import CheckpointError, ConfigError
from deepseek_optimizer.ray import deployment, haproxy
from deepseek_optimizer.ray.start import start
from deepseek_optimizer.server.served_model import ServedModel
from deepseek_optimizer.server.settings import ServerSettings
from deepseek_optimizer_cli.serve_ray import RayOptions, gpus_of_each, serve_on_ray


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("state_dir", {"server": {"state_dir": "states"}}),
        ("prefix_cache_dir", {"engine": {"prefix_cache_dir": "cache"}}),
        ("allow_lora_loading", {"server": {"allow_lora_loading": True, "lora_dir": "adapters"}}),
        ("sleep_mode", {"server": {"sleep_mode": True}}),
        ("port", {"server": {"port": 80}}),
    ],
)
def test_options_that_would_change_one_replica_are_refused(name: str, options) -> None:
    with pytest.raises(ConfigError, match=name):
        deployment("model", **options)


def test_a_model_that_is_missing_is_reported_before_ray_starts(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        serve_on_ray(RayOptions(True, None, 2, None, None), ServedModel(str(tmp_path / "none")), ServerSettings())
    assert not ray.is_initialized()


def test_one_replica_that_is_started_here_is_behind_haproxy(tiny_model, monkeypatch, capsys) -> None:
    asked = []
    monkeypatch.setattr("deepseek_optimizer.ray.run.serve_until_stopped", lambda *_, by_haproxy: asked.append(by_haproxy))
    for options in (
        RayOptions(True, None, 1, None, None),
        RayOptions(True, None, 2, None, None),
        RayOptions(True, None, 1, 2, None),
    ):
        serve_on_ray(options, ServedModel(str(tiny_model)), ServerSettings())
    assert asked == [True, False, False]


@pytest.mark.parametrize(
    ("by_haproxy", "given", "there", "used"),
    [
        (True, None, True, True), (True, "1", True, True), (True, "0", True, False), (True, None, False, False),
        (False, None, True, False), (False, "1", True, True),
    ],
)  # fmt: skip
def test_when_haproxy_is_used(by_haproxy, given, there, used, monkeypatch) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, **({} if given is None else {haproxy.VARIABLE: given})})
    monkeypatch.setattr(haproxy, "available", lambda: there)
    monkeypatch.setattr(ray, "init", lambda *_, **__: None)
    start(None, by_haproxy)
    assert haproxy.in_use() == used
    router = deployment("model")._bound_deployment._deployment_config.request_router_config.request_router_class
    assert ("PrefixRouter" in str(router)) != used
    ports = [value for name, value in os.environ.items() if name.endswith("_PORT") and "RAY_SERVE" in name]
    assert len(set(ports)) == len(ports) == (4 if by_haproxy and used else 0)


def started(
    monkeypatch, capsys, model, config: dict[str, Any], options: RayOptions
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """What `dso serve --ray` asks Ray for, the settings that replicas load the model with, and the banner."""
    made = []

    def serve_until_stopped(application, address, host, port, banner, note, by_haproxy) -> None:
        made.append(application())
        banner()

    monkeypatch.setattr("deepseek_optimizer.ray.run.serve_until_stopped", serve_until_stopped)
    serve_on_ray(options, ServedModel(str(model), config=config), ServerSettings())
    bound = made[0]._bound_deployment
    return bound.ray_actor_options, bound.init_args[0].config, capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "gpus"),
    [({}, 0), ({"device": "cpu"}, 0), ({"device": "cuda"}, 1), ({"device": "cuda:0"}, 1), ({"backend": "cuda"}, 1)],
)
def test_a_replica_on_a_cuda_device_has_a_gpu(config, gpus, tiny_model, monkeypatch, capsys) -> None:
    options, _, banner = started(monkeypatch, capsys, tiny_model, config, RayOptions(True, None, 1, None, 2.0))
    assert (options["num_cpus"], options["num_gpus"]) == (2, gpus) and gpus_of_each(config) == gpus
    assert ("1 replicas of 2 cores and 1 GPU" if gpus else "1 replicas of 2 cores\n") in banner


@pytest.mark.parametrize(
    ("config", "threads"),
    [
        ({}, 8),
        ({"parallel": {"tensor": 2}}, 4),
        ({"parallel": {"tensor": 2, "expert": 2}}, 2),
        ({"parallel": {"pipeline": 2}}, 8),  # one process computes at a time
        ({"parallel": {"tensor": 16}}, 1),
        ({"parallel": {"tensor": 2}, "threads": 3}, 3),
    ],
)
def test_the_processes_of_a_divided_model_share_the_cores_of_a_replica(
    config, threads, tiny_model, monkeypatch, capsys
) -> None:
    options, settings, _ = started(monkeypatch, capsys, tiny_model, config, RayOptions(True, None, 1, None, 8.0))
    assert options["num_cpus"] == 8 and settings["threads"] == threads


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((False, "auto", 1, None, None), "need --ray"),
        ((True, "auto", 1, None, None), "--ray-address needs --replica-cpus"),
        ((True, None, 1, None, 0.0), "greater than 0"),
        ((True, None, 2, 1, None), "must be --replicas or more"),
    ],
)
def test_options_that_contradict_each_other(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        RayOptions(*options).check({})
    RayOptions(True, "auto", 1, 2, 4.0).check({})
