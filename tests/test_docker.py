"""The Dockerfiles, as far as they can be checked without an engine: their sources, pins, user and default command."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
FILES = ("Dockerfile", "Dockerfile.cuda")


@pytest.fixture(params=FILES)
def text(request):
    return (ROOT / request.param).read_text()


def sources(text):
    return [s for line in re.findall(r"^COPY (?!--)(.*)$", text, re.M) for s in line.split()[:-1]]


def test_copied_files_exist_and_are_not_ignored(text):
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert sources(text) and set(sources(text)) == sent
    assert all((ROOT / source).exists() for source in sources(text))


def test_versions_are_pinned_within_the_packages_bounds(text):
    if sys.version_info < (3, 11):
        pytest.skip("tomllib needs Python 3.11")
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    pins = dict(re.findall(r"^ARG (\w+)=([\d.]+)$", text, re.M))
    assert pins["TORCH"] in needs["torch"] and pins["TRANSFORMERS"] in needs["transformers"]
    assert pins["PYTHON"] in Requirement(f"python{project['requires-python']}").specifier


def test_base_images_are_pinned_and_exclude_the_compiler(text):
    bases = re.findall(r"^FROM (\S+)", text, re.M)
    assert bases == ["python:${PYTHON}-bookworm", "python:${PYTHON}-slim-bookworm"]


def test_it_does_not_run_as_root(text):
    last = re.findall(r"^USER (\S+)$", text, re.M)[-1]
    assert last.isdigit() and last != "0"


def test_the_default_command_exists(text):
    from typer.testing import CliRunner

    from deepseek_optimizer_cli.app import app

    command = json.loads(re.findall(r"^CMD (.*)$", text, re.M)[-1])
    shown = CliRunner().invoke(app, [*command, "--help"])
    assert shown.exit_code == 0 and command[0] in shown.stdout


def test_it_has_what_the_probes_of_kuberay_call(text):
    """KubeRay adds probes with wget to the pods of a RayService, which the slim base image lacks."""
    shipped = text.rpartition("\nFROM ")[2]
    assert re.search(r"^RUN apt-get .*\bapt-get install .*\bwget\b", shipped, re.M)
    assert shipped.index("wget") < shipped.index("\nUSER "), "installed as root"


def test_it_can_serve(text):
    (extras,) = re.findall(r"^ARG EXTRAS=\[(.*)\]$", text, re.M)
    assert "serve" in extras.split(",") and "/wheels/*.whl)${EXTRAS}" in text


def test_both_build_the_wheel_the_same_way():
    cpu, cuda = (re.search(r"^FROM.*? AS wheel$.*?(?=^FROM)", (ROOT / f).read_text(), re.M | re.S)[0] for f in FILES)
    assert cpu == cuda


@pytest.mark.parametrize("name", FILES)
def test_lint(name):
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, name], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
