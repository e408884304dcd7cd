"""The conda recipe names what pyproject.toml names: it cannot be built here, so this is what keeps the two alike."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
CONDA_NAMES = {"torch": "pytorch"}  # where they differ from PyPI's


def _named(lines: list[str]) -> dict[str, str]:
    """The constraints of packages by their conda names."""
    needs = map(Requirement, lines)
    return {CONDA_NAMES.get(need.name, need.name): str(need.specifier) for need in needs}


@pytest.fixture(scope="module")
def recipe():
    return yaml.safe_load((ROOT / "conda" / "recipe.yaml").read_text("utf-8"))


@pytest.fixture(scope="module")
def project():
    if sys.version_info < (3, 11):
        pytest.skip("tomllib needs Python 3.11")
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_it_needs_what_the_package_needs(recipe, project):
    run = _named([line.replace("  ", " ") for line in recipe["requirements"]["run"]])
    python = f"python{project['project']['requires-python']}"
    assert run == _named([python, *project["project"]["dependencies"]])


def test_it_is_built_with_what_the_package_is_built_with(recipe, project):
    host = _named(recipe["requirements"]["host"])
    assert host == _named(["pip", "python", *project["build-system"]["requires"]])


def test_it_installs_the_same_commands(recipe, project):
    scripts = {f"{name} = {function}" for name, function in project["project"]["scripts"].items()}
    assert set(recipe["build"]["python"]["entry_points"]) == scripts
    assert recipe["about"]["summary"] == project["project"]["description"]
    assert recipe["about"]["license"] == project["project"]["license"]
