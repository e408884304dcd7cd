"""The machine's topology, and files that describe another machine (DSO_TOPOLOGY); what DSO_NUMA does on it."""

from __future__ import annotations

import json

import pytest
import torch

from deepseek_optimizer import ConfigError, load_model
from deepseek_optimizer.backends.cpu import CpuBackend, native
from deepseek_optimizer.backends.cpu.topology import Cpu, cpus_of_rank, describe, read_topology

SERVER = {
    "nodes": [
        {"package": 0, "l3_groups": [{"cores": 2, "threads_per_core": 2}, {"cores": 1}]},
        {"package": 1, "l3_groups": [{"cores": 3, "capacity": 512}]},
    ]
}


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "machine.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return str(path)

    return write


def test_a_described_machine(write):
    cpus = read_topology(write(SERVER))
    assert [tuple(c) for c in cpus] == [
        (0, 0, 0, 0, 0, 1024), (1, 0, 0, 0, 0, 1024), (2, 1, 0, 0, 0, 1024), (3, 1, 0, 0, 0, 1024),
        (4, 2, 1, 0, 0, 1024), (5, 3, 2, 1, 1, 512), (6, 4, 2, 1, 1, 512), (7, 5, 2, 1, 1, 512),
    ]  # fmt: skip
    assert describe(cpus, [3, 3], "a file") == {
        "packages": 2, "memory nodes": 2, "L3 groups": 3, "cores": 6, "CPUs": 8, "fast cores": 3,
        "threads per memory node": [3, 3], "source": "a file",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ("[" * 100000, "not JSON"),
        ([], "the file must be an object"),
        ({}, "nodes must be a list"),
        ({"nodes": []}, "nodes must be a list of at least one"),
        ({"nodes": [3]}, r"nodes\[0\] must be an object"),
        ({"nodes": [{"l3_groups": [{"cores": 1}]}, {}]}, r"nodes\[1\].l3_groups must be a list"),
        ({"nodes": [{"l3_groups": [{"cores": 0}]}]}, r"nodes\[0\].l3_groups\[0\].cores must be a whole number from 1"),
        ({"nodes": [{"l3_groups": [{"cores": True}]}]}, r"cores must be a whole number.*is True"),
        ({"nodes": [{"l3_groups": [{}]}]}, r"cores must be a whole number.*is None"),
        ({"nodes": [{"l3_groups": [{"cores": 1, "threads_per_core": 9}]}]}, "threads_per_core must be .* to 8, is 9"),
        ({"nodes": [{"l3_groups": [{"cores": 1, "capacity": "x"}]}]}, "capacity must be .* is 'x'"),
        ({"nodes": [{"l3_groups": [{"cores": 1, "speed": 2}]}]}, "unknown field 'speed'"),
        ({"nodes": [{"l3_groups": [{"cores": 4000, "threads_per_core": 2}]}]}, "more than 4096 CPUs"),
    ],
)
def test_an_invalid_file_names_the_field(monkeypatch, write, content, words):
    path = write(content)
    with pytest.raises(ConfigError, match=words):
        read_topology(path)
    monkeypatch.setenv("DSO_TOPOLOGY", path)
    with pytest.raises(ConfigError, match=f"DSO_TOPOLOGY={path}"):
        CpuBackend()


def test_a_missing_file(monkeypatch, tmp_path):
    monkeypatch.setenv("DSO_TOPOLOGY", str(tmp_path / "absent.json"))
    with pytest.raises(ConfigError, match=r"absent\.json.*cannot be read"):
        CpuBackend()


def test_this_machine():
    cpus = native.machine_cpus()
    backend = CpuBackend()
    assert len(cpus) >= len({c.core for c in cpus}) >= backend.threads >= 1 or backend.threads > len(cpus)
    assert backend.topology["CPUs"] == len(cpus) and backend.topology["source"] == "the system"


def test_threads_are_placed_as_on_the_described_machine(monkeypatch, write):
    monkeypatch.setenv("DSO_TOPOLOGY", write(SERVER))
    backend = CpuBackend()
    assert backend.threads == 6 and backend.context.nodes == [3, 3]
    assert backend.topology["threads per memory node"] == [3, 3]
    assert CpuBackend(threads=3).context.nodes == [3]  # the fast cores, all on one node
    monkeypatch.setenv("DSO_NUMA", "off")
    assert CpuBackend().context.nodes == [6]
    monkeypatch.setenv("DSO_NUMA", "spread")
    with pytest.raises(ConfigError, match="DSO_NUMA must be off, move or copy, got 'spread'"):
        CpuBackend()


@pytest.mark.parametrize("nodes", [2, 4])
@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_nodes_change_no_bits(monkeypatch, write, tiny_model, nodes, precision):
    from deepseek_optimizer import DeepSeekConfig

    ids = torch.arange(1, 41)[None]
    config = DeepSeekConfig(precision=precision)
    with torch.inference_mode():
        want = load_model(tiny_model, config)(ids).logits
        monkeypatch.setenv("DSO_TOPOLOGY", write({"nodes": [{"l3_groups": [{"cores": 1}]}] * nodes}))
        model = load_model(tiny_model, config)
        assert model.dso.backend.context.nodes == [1] * nodes
        assert torch.equal(model(ids).logits, want)


def machine(*cores: int) -> list[Cpu]:
    """Memory nodes with so many cores of two CPUs each; second CPUs have the higher numbers, as on Linux."""
    nodes = [node for node, count in enumerate(cores) for _ in range(count)]
    return [Cpu(n, n % len(nodes), node, node, node, 1024) for n, node in enumerate(2 * nodes)]


@pytest.mark.parametrize(
    "cores,ranks,expected",
    [
        ((4,), 2, [None, None]),
        ((2, 2), 2, [{0, 1, 4, 5}, {2, 3, 6, 7}]),
        ((2, 2), 4, [{0, 4}, {1, 5}, {2, 6}, {3, 7}]),
        ((1, 1, 1, 1), 2, [{0, 1, 4, 5}, {2, 3, 6, 7}]),
        ((3, 3), 4, [{0, 6}, {1, 2, 7, 8}, {3, 9}, {4, 5, 10, 11}]),
        ((2, 2, 2), 2, [None, None]),
        ((1, 1), 4, [None] * 4),
        ((1, 2), 4, [None] * 4),
    ],
)
def test_processes_that_divide_a_model_are_divided_among_the_memory_nodes(cores, ranks, expected):
    found = [cpus_of_rank(machine(*cores), rank, ranks) for rank in range(ranks)]
    assert [own and {cpu.number for cpu in own} for own in found] == expected
