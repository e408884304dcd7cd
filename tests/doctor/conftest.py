"""A machine made of files that a test writes, and small models with faults."""

from __future__ import annotations

import json
import shutil

import pytest

from deepseek_optimizer.doctor import Case, Machine
from deepseek_optimizer.system.files import read_sizes
from deepseek_optimizer.system.memory import FreeMemory, Limit, cgroup_limits

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path):
    """machine({"/proc/meminfo": text}, usable_cpus=1, ...) -> a Machine with exactly these files."""

    def make(files=None, **fields):
        root = tmp_path / "machine"
        for path, text in (files or {}).items():
            file = root / path.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        given = {"environ": {}, "usable_cpus": 4, "online_cpus": 4, "usable_cores": 4, **fields}
        free = given.pop("available_bytes", 8 * GIB)
        total = read_sizes(root, "/proc/meminfo").get("MemTotal", 0)
        limits = [Limit("machine", "this machine", "memory", total, free), *cgroup_limits(root, {})]
        return Machine(root=root, memory=FreeMemory(tuple(limits)), **given)

    return make


@pytest.fixture
def model_copy(tiny_model, tmp_path):
    """A copy of the tiny model that a test may damage; `.edit(file, **fields)` changes a JSON file, None removes a field."""

    class Copy:
        path = tmp_path / "model"

        def edit(self, file, **fields):
            content = json.loads((self.path / file).read_text()) | fields
            (self.path / file).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

        def edit_weights(self, change):
            from safetensors.torch import load_file, save_file

            weights = load_file(self.path / "model.safetensors")
            change(weights)
            save_file(weights, self.path / "model.safetensors", metadata={"format": "pt"})

    shutil.copytree(tiny_model, Copy.path)
    return Copy()


@pytest.fixture
def case(machine):
    """case(model=..., machine=..., **fields of Case) -> a Case, closed after the test."""
    made = []

    def make(**fields):
        made.append(Case(**{"machine": machine(), **fields}))
        return made[-1]

    yield make
    for one in made:
        one.__exit__()


@pytest.fixture
def one():
    """one(findings, "warning", "text") -> the only finding of that severity whose sentence contains the text; it must have an
    explanation."""

    def pick(findings, severity, text):
        findings = list(findings)
        result = [f for f in findings if f.severity == severity and text in f.what]
        assert len(result) == 1, [f"{f.severity}: {f.what}" for f in findings]
        json.dumps(result[0].to_dict())
        if severity in ("warning", "error"):
            assert result[0].cause and result[0].fix
        return result[0]

    return pick
