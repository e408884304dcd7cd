"""Exchanges in lowered graphs: a part is published, and the next node receives all parts; logits are scaled before that."""

from __future__ import annotations

import pytest

from deepseek_optimizer.backends.cpu.lower import lower
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.parallel import Parallel
from deepseek_optimizer.graph.parallel.tensor import split
from deepseek_optimizer.models import build_graph
from support.models import CASES
from support.ranks import any_part


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("case", "tail"),
    [("llama-gqa", []), ("cohere2-types", ["scale"]), ("gemma2-limits", ["softcap"]), ("granite-factors", ["scale"])],
)
def test_logits_are_joined_last(case, tail, fused):
    graph = build_graph(CASES[case]())
    graph = rules.apply(graph)[0] if fused else graph
    shard = split(graph, 0, Parallel(2), any_part).graph
    nodes = lower(shard, lambda name: "f32", lambda name: "fp32").nodes
    ops = [node.op for node in nodes]
    selected = [] if fused else ["select_rows"]
    assert ops[ops.index("lm_head") :] == ["lm_head", *selected, *tail, "publish", "join_parts"]
    joined = nodes[-1].outputs[0]
    assert joined.width == graph.vocab_size and nodes[-2].inputs == nodes[-3].outputs
    assert joined.selected and nodes[-2].inputs[0].selected


def test_every_part_is_received_at_once():
    shard = split(rules.apply(build_graph(CASES["qwen3-gqa"]()))[0], 1, Parallel(2), any_part).graph
    ops = [node.op for node in lower(shard, lambda name: "f32", lambda name: "fp32").nodes]
    for at, op in enumerate(ops):
        if op == "publish":
            assert ops[at + 1] in ("sum_parts", "join_parts")
    assert ops.count("publish") == ops.count("sum_parts") + ops.count("join_parts") > 2
