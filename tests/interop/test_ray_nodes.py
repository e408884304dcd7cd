"""A replica whose model is divided among two nodes of a cluster, which are processes of this machine."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

import httpx
import psutil
import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster

from deepseek_optimizer import load_model
from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer.ray import deployment
from deepseek_optimizer_cli.serve_ray import RayOptions
from support.saved_llama import saved_llama

_START = 300  # seconds
_LOADED = {"precision": "fp32", "threads": 1, "kv_cache_memory": 1 << 26}
_DIVIDED = {"parallel": {"tensor": 2}}


@pytest.fixture(scope="module")
def model(byte_tokenizer, tmp_path_factory):
    return saved_llama(tmp_path_factory.mktemp("nodes") / "model", byte_tokenizer, max_position_embeddings=512)


@pytest.fixture(scope="module")
def port():
    """Of a proxy of Ray on two nodes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "180")
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        made.add_node(num_cpus=1)
        ray.init(address=made.address, log_to_driver=False)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield port
        serve.shutdown()
        ray.shutdown()
        made.shutdown()


def complete(port: int) -> httpx.Response:
    body = {"prompt": "count", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    return httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)


def answer(port: int, end: float) -> str:
    """What the replica answers when it is ready."""
    while True:
        try:
            response = complete(port)
            if response.status_code == 200:
                return str(response.json()["choices"][0]["text"])
        except httpx.HTTPError:
            pass
        assert time.monotonic() < end, serve.status()
        time.sleep(0.5)


def ranks_of_nodes() -> list[psutil.Process]:
    """The processes of the second node."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any("ray::RankProcess" in part for part in process.info["cmdline"] or ()):
            found.append(process)
    return found


@pytest.mark.parametrize("ways", ["tensor", "pipeline"])
def test_a_replica_on_two_nodes(ways, port, model, byte_tokenizer) -> None:
    application = deployment(str(model), cpus=0.5, nodes=2, config={**_LOADED, "parallel": {ways: 2}})
    serve.run_many([serve.RunTarget(application, "dso", "/")], wait_for_applications_running=False)
    text = answer(port, time.monotonic() + _START)
    ids = byte_tokenizer("count", return_tensors="pt").input_ids
    alone = load_model(model, precision="fp32", threads=1).generate(ids, min_new_tokens=12, max_new_tokens=12, do_sample=False)
    assert text == byte_tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)

    [group] = [group for group in ray.util.placement_group_table().values() if group["state"] == "CREATED"]
    assert len(set(group["bundles_to_node_id"].values())) == 2 and group["strategy"] == "STRICT_SPREAD"
    [rank] = ranks_of_nodes()

    os.kill(rank.pid, signal.SIGKILL)  # Ray starts the replica again, and its other process
    end = time.monotonic() + _START
    while not [other for other in ranks_of_nodes() if other.pid != rank.pid]:
        assert time.monotonic() < end, serve.status()
        time.sleep(0.5)
    assert answer(port, end) == text
    serve.delete("dso")
    while ranks_of_nodes():
        assert time.monotonic() < end
        time.sleep(0.5)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"nodes": 3, "config": _DIVIDED}, "a replica on 3 nodes needs a model that is divided among as many processes, got"),
        ({"nodes": 2}, "a replica on 2 nodes needs a model that is divided among as many processes, got"),
        ({"nodes": 2, "gpus": 1, "config": _DIVIDED}, "with gpus exactly 1"),
        ({"nodes": 0}, "a replica needs 1 node or more"),
    ],
)
def test_nodes_that_do_not_suit_the_model(options, text) -> None:
    with pytest.raises(ConfigError, match=text):
        deployment("model", **options)


def test_the_cores_of_a_node_are_one_process_s() -> None:
    bound = deployment("model", cpus=4, nodes=2, config={"parallel": {"tensor": 2}})._bound_deployment
    assert bound.init_args[0].config["threads"] == 4 and bound.init_args[2] == 2


def test_a_ray_that_is_started_here_has_one_node() -> None:
    with pytest.raises(ConfigError, match="--replica-nodes needs --ray-address"):
        RayOptions(True, None, 1, None, 2.0, None, 2).check({})
