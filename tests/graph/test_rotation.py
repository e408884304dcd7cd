"""How cached keys were turned, read off graphs of every family, fused or not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from deepseek_optimizer.errors import UnsupportedModelError, UnsupportedRequestError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.ir import LatentSpec
from deepseek_optimizer.graph.rotation import Pairs, key_rotation
from deepseek_optimizer.models import build_graph
from support.models import CASES, llama


@pytest.mark.parametrize("name", CASES)
def test_every_family_has_one(name: str) -> None:
    plain = build_graph(CASES[name]())
    if plain.states:
        with pytest.raises(UnsupportedModelError, match="recurrent layers"):
            key_rotation(plain)
        return
    found, fused = key_rotation(plain), key_rotation(rules.apply(plain)[0])
    rope = next(n for n in plain.nodes if n.op == "rope_table").attrs["rope"]
    assert (fused.key, fused.index, fused.context) == (found.key, found.index, found.context)
    assert np.array_equal(found.inv_freq, rope.inv_freq) and np.array_equal(fused.inv_freq, rope.inv_freq)
    latent = isinstance(plain.cache, LatentSpec)
    assert found.key == Pairs(rope.rot, 0, latent and not name.endswith("halves"))
    assert found.index == (Pairs(rope.rot, 0, False) if "v32" in name else None)
    assert found.context == (4096 if name == "llama-dynamic" else None)


def test_dynamic_frequencies_hold_up_to_the_trained_context() -> None:
    rotation = key_rotation(build_graph(CASES["llama-dynamic"]()))
    rotation.check(4096)
    with pytest.raises(UnsupportedRequestError, match="dynamic.*at most 4096 tokens"):
        rotation.check(4097)
    key_rotation(build_graph(llama())).check(1 << 30)


def test_layers_with_different_rope_are_refused() -> None:
    graph = build_graph(llama())
    ropes = [i for i, n in enumerate(graph.nodes) if n.op == "rope" and n.outputs[0].name.endswith("k_rope")]
    nodes = list(graph.nodes)
    nodes[ropes[1]] = nodes[ropes[1]].with_(attrs={**nodes[ropes[1]].attrs, "interleaved": True})
    with pytest.raises(UnsupportedModelError, match="the same RoPE in all layers"):
        key_rotation(replace(graph, nodes=nodes))
    bare = graph.nodes[ropes[1]].inputs[0]
    nodes = [n.with_(inputs=tuple(bare if v == graph.nodes[ropes[1]].outputs[0] else v for v in n.inputs)) for n in graph.nodes]
    with pytest.raises(UnsupportedModelError, match="layer 1: its cached keys have no RoPE"):
        key_rotation(replace(graph, nodes=nodes))
    with pytest.raises(UnsupportedModelError, match="the same RoPE in all layers"):
        key_rotation(replace(graph, nodes=[n for n in graph.nodes if n.op != "cache_write"]))
