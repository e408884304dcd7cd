"""examples/deploy/: the unit and the manifests are valid and agree with the server; the dashboard's metrics exist."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from deepseek_optimizer import load_model, load_tokenizer
from deepseek_optimizer.serving import make_async_engine
from deepseek_optimizer_cli.app import app
from support.live_server import LiveServer

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


@pytest.fixture(scope="module")
def exported(tiny_model) -> set[str]:
    """Names of the metrics of a real server after a request."""
    engine = make_async_engine(load_model(tiny_model, kv_cache_memory=1 << 22), load_tokenizer(tiny_model))
    with LiveServer(engine) as live:
        assert live.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
        text = live.client.get("/metrics").text
    return {base(name) for name in re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE) if METRIC.fullmatch(name)}


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
