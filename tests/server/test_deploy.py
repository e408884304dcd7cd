"""examples/deploy/: the unit and the manifests are valid and agree with the server; the dashboard's metrics exist."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from typer.main import get_command

from deepseek_optimizer import DeepSeekConfig, load_model, load_tokenizer
from deepseek_optimizer.serving import make_async_engine
from deepseek_optimizer_cli.app import app
from support.live_server import LiveServer
from support.lora import random_adapter

FOLDER = Path(__file__).parents[2] / "examples" / "deploy"
OPTIONS = {name for parameter in get_command(app).commands["serve"].params for name in parameter.opts}
METRIC = re.compile(r"\b(?:vllm|dso):[a-z0-9_]+|\bhttp_[a-z_]+")


def base(name: str) -> str:
    """A metric's name without the suffixes of a sample."""
    return re.sub(r"(_(total|bucket|sum|count|created))+$", "", name)


def unit() -> str:
    return (FOLDER / "dso.service").read_text(encoding="utf-8")


def manifests() -> dict[str, dict]:
    return {doc["kind"]: doc for doc in yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text(encoding="utf-8"))}


def container() -> dict:
    (one,) = manifests()["Deployment"]["spec"]["template"]["spec"]["containers"]
    return one


def drain(arguments: list[str]) -> float:
    text = " ".join(arguments).replace("=", " ").split()
    return float(text[text.index("--drain-seconds") + 1])


def test_the_unit_has_valid_options():
    (line,) = re.findall(r"^ExecStart=((?:.*\\\n)*.*)", unit(), re.MULTILINE)
    words = shlex.split(line.replace("\\\n", " "))
    assert words[1] == "serve" and {word for word in words if word.startswith("--")} <= OPTIONS
    assert float(re.search(r"^TimeoutStopSec=(\d+)", unit(), re.MULTILINE)[1]) > drain(words)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_systemd_accepts_the_unit(tmp_path):
    file = tmp_path / "dso.service"
    file.write_text(unit().replace("/opt/dso/bin/dso", "/bin/true"), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(file)], capture_output=True, text=True, timeout=60)
    ours = [line for line in done.stderr.splitlines() if "dso.service" in line]
    assert not ours, ours


def test_the_manifests(live):
    kinds = manifests()
    assert list(kinds) == ["Secret", "PersistentVolumeClaim", "Deployment", "Service", "ServiceMonitor"]
    arguments = container()["args"]
    assert arguments[0] == "serve" and {word.partition("=")[0] for word in arguments if word.startswith("--")} <= OPTIONS
    (port,) = container()["ports"]
    assert f"--port={port['containerPort']}" in arguments
    pod = kinds["Deployment"]["spec"]["template"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > drain(arguments)
    assert kinds["Service"]["spec"]["selector"] == pod["metadata"]["labels"] == {"app": "dso"}
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container()["volumeMounts"]} == volumes
    (endpoint,) = kinds["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["port"] == kinds["Service"]["spec"]["ports"][0]["name"]
    paths = [container()[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")]
    for path in [*paths, endpoint["path"]]:
        assert live.client.get(path).status_code == 200
    assert set(paths) <= {"/health", "/ready"}  # which need no key


def documents(name: str) -> dict[str, dict]:
    return {doc["kind"]: doc for doc in yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8"))}


def test_the_gateway_routes_to_the_deployment():
    kinds = documents("inference-gateway.yaml")
    (rule,) = kinds["HTTPRoute"]["spec"]["rules"]
    (backend,) = rule["backendRefs"]
    assert backend == {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": "dso"}
    assert kinds["HTTPRoute"]["spec"]["parentRefs"] == [{"name": kinds["Gateway"]["metadata"]["name"]}]
    policy = kinds["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == manifests()["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert policy["ingress"][0]["ports"] == [{"port": container()["ports"][0]["containerPort"]}]
    gateway, router, prometheus = policy["ingress"][0]["from"]
    assert gateway["podSelector"]["matchLabels"] == {
        "gateway.networking.k8s.io/gateway-name": kinds["Gateway"]["metadata"]["name"]
    }
    assert router["podSelector"]["matchLabels"] == {"llm-d-router-gateway": "dso-epp"}
    # both selectors in one entry: pods of Prometheus in that namespace, not either
    assert prometheus == {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}},
    }


def test_the_ray_service_has_valid_arguments():
    spec = documents("rayservice.yaml")["RayService"]["spec"]
    served = yaml.safe_load(spec["serveConfigV2"])
    (application,) = served["applications"]
    module = (FOLDER.parents[1] / "src/deepseek_optimizer/ray/deploy.py").read_text(encoding="utf-8")
    (signature,) = re.findall(r"^def deployment\((.*?)\n\)", module, re.MULTILINE | re.DOTALL)
    assert application["args"].keys() <= {"model", *re.findall(r"^    (\w+):", signature, re.MULTILINE)}
    assert application["import_path"] == "deepseek_optimizer.ray:application"
    assert application["args"]["config"].keys() <= {field.name for field in dataclasses.fields(DeepSeekConfig)}
    (workers,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    assert float(workers["rayStartParams"]["num-cpus"]) == application["args"]["cpus"]
    assert (workers["minReplicas"], workers["maxReplicas"]) == (
        application["args"]["num_replicas"], application["args"]["max_replicas"]
    )  # fmt: skip
    for group in (spec["rayClusterConfig"]["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        (one,) = pod["containers"]
        assert {mount["name"] for mount in one["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert served["http_options"]["port"] in [port["containerPort"] for port in one["ports"]]
        names = {variable["name"]: variable.get("value") for variable in one["env"]}
        table = (FOLDER.parents[1] / "docs/how-to/ray.md").read_text(encoding="utf-8")
        needed = dict(re.findall(r"^\| `(RAY_\w+)` \| `(\S+)` \|$", table, re.MULTILINE))  # "on every node"
        assert needed["RAY_worker_niceness"] == "0" and needed.items() <= names.items()


@pytest.fixture(scope="module")
def scraped(tiny_model, tmp_path_factory) -> str:
    """The metrics of a real server that has an adapter, after requests for it and for the model."""
    model, tokenizer = load_model(tiny_model, kv_cache_memory=1 << 22), load_tokenizer(tiny_model)
    adapter = random_adapter(model, tmp_path_factory.mktemp("adapters") / "mine")
    engine = make_async_engine(model, tokenizer, max_loras=2, policy="latency", adapters={"mine": str(adapter)})
    bodies = {
        "/v1/completions": {"prompt": "a", "max_tokens": 2},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    }
    with LiveServer(engine) as live:
        # "MUST implement" Completions and Chat, and "support serving a LoRA adapter specified in the `model` argument"
        for name in (engine.model_name, "mine"):
            for path, body in bodies.items():
                answer = live.client.post(path, json={"model": name, **body})
                assert answer.status_code == 200 and answer.json()["model"] == name
        return live.client.get("/metrics").text


@pytest.fixture
def exported(scraped) -> set[str]:
    """Names of the metrics."""
    return {base(name) for name in re.findall(r"^# TYPE (\S+) ", scraped, re.MULTILINE) if METRIC.fullmatch(name)}


def test_routers_find_the_metrics_of_the_model_server_protocol(scraped):
    """https://github.com/llm-d/llm-d-router/blob/b40411275b19cb0892d787d2c485614ba25007ae/docs/model-server-protocol.md, which
    is quoted here and in `scraped`, with vLLM's names, its default: "the metric types and semantics MUST follow this doc"."""
    families = {family.name: family for family in text_string_to_metric_families(scraped)}

    def gauge(name: str) -> Any:
        assert families[name].type == "gauge"
        (sample,) = families[name].samples
        return sample

    # "The current total number of requests in the queue", and "actively being served": all have been answered
    assert gauge("vllm:num_requests_waiting").value == gauge("vllm:num_requests_running").value == 0
    # "The current KV cache utilization in percentage", which vLLM gives as a fraction
    assert 0 <= gauge("vllm:kv_cache_usage_perc").value <= 1
    # "The block size in tokens to allocate memory", and "The total number of blocks in the HBM KV cache"
    cache = gauge("vllm:cache_config_info").labels
    assert int(cache["block_size"]) * int(cache["num_gpu_blocks"]) >= int(cache["kv_cache_size_tokens"]) > 0
    adapters = gauge("vllm:lora_requests_info")
    assert adapters.value == pytest.approx(time.time(), abs=3600)  # "The last updated timestamp"
    # "The maximum number of adapters that can be loaded", and "comma separated list[s]" of those that are and that wait to be
    names = {"max_lora": "2", "running_lora_adapters": "mine", "waiting_lora_adapters": ""}
    assert names.items() <= adapters.labels.items()


def test_the_dashboard_has_all_metrics_and_no_other(exported):
    dashboard = json.loads((FOLDER / "grafana-dashboard.json").read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(queries) > 20
    assert {base(name) for query in queries for name in METRIC.findall(query)} == exported


def test_the_dashboard_is_generated():
    spec = importlib.util.spec_from_file_location("make_dashboard", FOLDER / "make_dashboard.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (FOLDER / "grafana-dashboard.json").read_text(encoding="utf-8") == module.text(), "run make_dashboard.py"
