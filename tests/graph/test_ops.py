"""The table of ops is consistent, matches the graphs that families build, and is completely documented."""

from __future__ import annotations

import inspect
import runpy

import pytest

from deepseek_optimizer.errors import GraphError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.ir import Node
from deepseek_optimizer.graph.ops import OPS, OpSpec, spec_of
from deepseek_optimizer.graph.ops.markdown import markdown
from deepseek_optimizer.graph.ops.spec import NAME, NAMES
from deepseek_optimizer.models import build_graph
from support.models import CASES


@pytest.mark.parametrize("spec", OPS.values(), ids=OPS)
def test_specs_are_consistent(spec: OpSpec) -> None:
    for operands in (spec.inputs, spec.outputs, spec.weights):
        assert not any(o.many for o in operands) or len(operands) == 1
        optional = [o.optional for o in operands]
        assert optional == sorted(optional)  # the last ones
    names = [attr.name for attr in spec.attrs]
    assert len(set(names)) == len(names)
    assert all(out < len(spec.outputs) and source < len(spec.inputs) for out, source in spec.in_place)
    assert all(i < len(spec.inputs) for i in spec.repeated_inputs) and all(i < len(spec.outputs) for i in spec.repeated_outputs)
    assert spec.any_kind is None or spec.any_kind < len(spec.outputs)
    assert not spec.stacked or len(spec.weights) == 1
    if spec.reads or spec.writes:
        assert "layer" in names and spec.rows == "tokens"


def test_parameter_names_are_only_in_bias_and_biases() -> None:
    """`Graph.weights` and `Graph.renamed` rely on this. `beside` and `weight` are set by lowering, and name another node's
    weight."""
    for spec in OPS.values():
        assert {a.name for a in spec.attrs if a.type in (NAME, NAMES)} <= {"bias", "biases", "beside", "weight"}


def test_origins() -> None:
    of_models = {node.op for case in CASES for node in build_graph(CASES[case]()).nodes}
    after_rules = {node.op for case in CASES for node in rules.apply(build_graph(CASES[case]()))[0].nodes}
    assert of_models <= {name for name, spec in OPS.items() if spec.origin == "model"}
    assert after_rules - of_models <= {name for name, spec in OPS.items() if spec.origin == "rule"}


def test_an_unknown_op_is_named() -> None:
    with pytest.raises(GraphError, match="no such op: 'softmax'; known: embedding,"):
        spec_of(Node("softmax"))


def test_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_module("deepseek_optimizer.graph.ops", run_name="__main__")
    printed = capsys.readouterr().out
    assert printed == markdown()
    headings = [line.removeprefix("### ") for line in printed.splitlines() if line.startswith("### ")]
    assert sorted(headings) == sorted(OPS)
    for name, spec in OPS.items():
        section = printed.split(f"### {name}\n")[1].split("\n#")[0]
        assert inspect.cleandoc(spec.doc) in section
        assert all(f"`{attr.name}` ({attr.type.text}" in section for attr in spec.attrs)
