"""The toy backend as an installed package: found by its entry point, chosen by name, held to the contract.

PYTHONPATH=src pytest examples/toy_backend/tests
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[1]
ROOT = HERE.parents[1]
METADATA = "Metadata-Version: 2.1\nName: toy-backend\nVersion: 0.1.0\n"

SERVE = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from deepseek_optimizer import BackendError, DeepSeekConfig, DynamicGraphOptimizer, report

def optimized(**fields):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                         num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)).eval()
    DynamicGraphOptimizer(model, config=DeepSeekConfig(**fields)).optimize()
    return model

ids = torch.tensor([[5, 6, 7]])
toy = optimized(backend="toy", precision="int8")
assert report(toy).backend == "toy" and type(toy.dso.backend).__module__ == "toy_backend"
plain = optimized(backend="reference", precision="int8")
assert toy.generate(ids, max_new_tokens=5).tolist() == plain.generate(ids, max_new_tokens=5).tolist()
try:
    optimized(backend="toy", precision="int4")
except BackendError as error:
    assert "the toy backend does not support weight format 'int4'" in str(error), error
else:
    sys.exit("int4 was not refused")
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """The package as an installer would leave it: its module, and metadata with the entry point."""
    site = tmp_path_factory.mktemp("site")
    (site / "toy_backend.py").write_text((HERE / "toy_backend.py").read_text())
    information = site / "toy_backend-0.1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(METADATA)
    (information / "entry_points.txt").write_text("[deepseek_optimizer.backends]\ntoy = toy_backend:SPEC\n")
    paths = [str(site), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def test_it_serves_a_model(environment):
    subprocess.run([sys.executable, "-c", SERVE], env=environment, check=True, timeout=300)


def test_it_keeps_the_contract(environment):
    """The package's own tests of backends, which find it among the registered ones."""
    tests = ["-q", "-p", "no:cacheprovider", "tests/backends/test_protocol.py", "-k", "toy"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *tests], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout and "no tests ran" not in done.stdout


def test_the_entry_point_is_the_one_that_is_declared():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["deepseek_optimizer.backends"] == {"toy": "toy_backend:SPEC"}
