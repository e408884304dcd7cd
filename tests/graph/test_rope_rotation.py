"""The rotation of cached keys, read from graphs of every family, fused or not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from deepseek_optimizer.errors import UnsupportedModelError, UnsupportedRequestError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.ir import LatentSpec
from deepseek_optimizer.graph.rope_rotation import Pairs, key_rotation
from deepseek_optimizer.models import build_graph
from support.family_configs import llama
from support.models import CASES

# Layers without RoPE, with two of them, or with a norm after it.
WITHOUT_A_ROTATION = (
    "smollm3", "exaone4-types", "cohere2", "olmo3", "gemma3_text", "gemma4_", "hunyuan_v1_dense", "llama4",
)  # fmt: skip
INTERLEAVED = ("glm-", "glm4-", "ernie4_5")  # besides latent attention
DYNAMIC = {"llama-dynamic": 4096, "phi3-longrope": 256}


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(WITHOUT_A_ROTATION)])
def test_families_whose_keys_cannot_be_moved(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="have no RoPE|the same RoPE in all layers"):
        key_rotation(build_graph(CASES[name]()))


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(WITHOUT_A_ROTATION)])
def test_every_other_family_has_a_rotation(name: str) -> None:
    plain = build_graph(CASES[name]())
    if plain.states or name.startswith("deepseek_v4"):
        with pytest.raises(UnsupportedModelError, match="recurrent layers|compressed attention"):
            key_rotation(plain)
        return
    actual, fused = key_rotation(plain), key_rotation(rules.apply(plain)[0])
    rope = next(n for n in plain.nodes if n.op == "rope_table").attrs["rope"]
    assert (fused.key, fused.index, fused.context) == (actual.key, actual.index, actual.context)
    assert np.array_equal(actual.inv_freq, rope.inv_freq) and np.array_equal(fused.inv_freq, rope.inv_freq)
    latent = isinstance(plain.cache, LatentSpec)
    interleaved = name.startswith(INTERLEAVED) or (latent and not name.endswith("halves"))
    assert actual.key == Pairs(rope.rot, 0, interleaved)
    indexed = name.startswith(("deepseek_v32", "glm_moe_dsa"))
    assert actual.index == (Pairs(rope.rot, 0, "glm" in name) if indexed else None)
    assert actual.context == DYNAMIC.get(name)


def test_dynamic_frequencies_are_valid_up_to_the_trained_context() -> None:
    rotation = key_rotation(build_graph(CASES["llama-dynamic"]()))
    rotation.check(4096)
    with pytest.raises(UnsupportedRequestError, match="dynamic.*at most 4096 tokens"):
        rotation.check(4097)
    key_rotation(build_graph(llama())).check(1 << 30)


def test_layers_with_different_rope_are_rejected() -> None:
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
