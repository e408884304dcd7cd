"""Latent attention in native plans: absorbed and expanded, formats, caches and batches, with youtu (dense) as the model."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer.backends.base import DECODE, PREFILL
from deepseek_optimizer.backends.cpu import CpuBackend, exact, unavailable_reason
from deepseek_optimizer.backends.cpu.mla_weights import absorbed_stacks
from deepseek_optimizer.backends.kv_b import key_stack, value_stack
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.models import build_graph
from deepseek_optimizer.quant import get_format
from support.family_configs import youtu
from support.models import assert_close_rows, random_ids, random_model, transformers_logits, weights_of
from support.steps import Part, run_step, runner

from .packing import dequantized, packed_weights

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason="no native build")

SHAPES = {  # heads, rank, nope, rope, v_dim
    "odd": (3, 40, 20, 12, 18),
    "one-head": (1, 34, 6, 2, 4),
    "tiles": (16, 64, 32, 16, 16),
    "two-sets": (20, 96, 16, 64, 48),
}
FORMATS = {
    "fp32": 1e-5,
    "bf16": 2e-2,
    "int8": 1e-2,
    "int4": 6e-2,
    "fp8": 4e-2,
}  # relative to the row's largest, against the dequantized values


def latent_model(shape, **fields):
    heads, rank, nope, rope, v_dim = SHAPES[shape]
    sizes = {"kv_lora_rank": rank, "qk_nope_head_dim": nope, "qk_rope_head_dim": rope, "v_head_dim": v_dim}
    return random_model(youtu(**{"num_attention_heads": heads, "num_hidden_layers": 2, **sizes, **fields}))


def graph_of(model, form="absorbed"):
    """The graph with all rules, or all but mla_absorb."""
    return rules.apply(build_graph(model.config), [n for n in rules.RULES if form == "absorbed" or n != "mla_absorb"])[0]


# Forms of attention: the graph's form, the phase. Prefill of an absorbed graph uses the cheaper form.
WAYS = {"absorbed": ("absorbed", DECODE), "expanded": ("expanded", PREFILL), "cheaper": ("absorbed", PREFILL)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_fp32_equals_transformers(backend, shape, way):
    model, (form, phase) = latent_model(shape), WAYS[way]
    r = runner(backend, graph_of(model, form), packed_weights(weights_of(model), "fp32"))
    ids = random_ids(model.config, 600)
    expected = transformers_logits(model, ids)
    assert_close_rows(r.logits(ids, phase=phase), expected)
    assert_close_rows(r.logits(ids, chunks=(1, 7, 64, 300), phase=phase), expected)


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("shape", ["odd", "tiles"])
def test_formats_against_their_dequantized_values(backend, shape, format_name):
    model = latent_model(shape)
    weights = packed_weights(weights_of(model), format_name)
    ids = random_ids(model.config, 70)
    expected = runner(ReferenceBackend(), graph_of(model), dequantized(weights)).logits(ids)
    for form, phase in WAYS.values():
        r = runner(backend, graph_of(model, form), weights)
        assert_close_rows(r.logits(ids, phase=phase), expected, FORMATS[format_name])


@pytest.mark.parametrize("kv, tolerance", [("fp32", 1e-5), ("bf16", 2e-2), ("int8", 2e-2)])
def test_cache_types(backend, kv, tolerance):
    """Against the reference with a cache of the same type."""
    model = latent_model("two-sets")
    weights = packed_weights(weights_of(model), "fp32")
    ids = random_ids(model.config, 300)
    expected = runner(ReferenceBackend(), graph_of(model), dequantized(weights), kv=kv).logits(ids)
    for form, phase in WAYS.values():
        r = runner(backend, graph_of(model, form), weights, kv=kv)
        assert_close_rows(r.logits(ids, phase=phase), expected, tolerance)


@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("format_name", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("form, phase", [WAYS["absorbed"], WAYS["expanded"], ("expanded", DECODE)])
def test_a_row_does_not_depend_on_the_batch(backend, format_name, kv, form, phase):
    """Rows of a form are torch.equal for any chunks, positions, threads and other sequences."""
    model = latent_model("two-sets")
    graph, weights = graph_of(model, form), packed_weights(weights_of(model), format_name)
    r = runner(backend, graph, weights, kv=kv)
    ids = random_ids(model.config, 330)
    alone = r.logits(ids, phase=phase)
    assert torch.equal(alone, r.logits(ids, chunks=(1, 30, 5, 240), phase=phase))
    one_thread = runner(CpuBackend(exact(backend.isa), threads=1), graph, weights, kv=kv)
    assert torch.equal(alone, one_thread.logits(ids, phase=phase))
    others = [r.sequence() for _ in range(2)]
    for other, n in zip(others, (40, 270), strict=True):
        run_step(r.plan, r.store, [Part(other, random_ids(model.config, n, seed=n))])
    mine, rows = r.sequence(), []
    for begin, end in ((0, 290), (290, 293), (293, 330)):
        before, after = Part(others[0], [5], DECODE), Part(others[1], random_ids(model.config, 35, seed=begin), PREFILL)
        parts = [before, Part(mine, ids[begin:end], phase), after]
        rows.append(run_step(r.plan, r.store, parts).logits[1 : 1 + end - begin])
    assert torch.equal(alone, torch.cat(rows))


@pytest.mark.parametrize("shape", ["tiles", "two-sets"])
def test_prefill_uses_the_form_with_fewer_multiply_adds(backend, shape):
    """The last bits show which form was used: with a bf16 cache the two differ. One layer, so that the cache does not depend on
    the form. fp32 weights, whose products use one kernel family in both phases, on every ISA."""
    model = latent_model(shape, num_hidden_layers=1)
    _, rank, nope, rope, v_dim = SHAPES[shape]
    weights = packed_weights(weights_of(model), "fp32")
    absorbing, expanding = (runner(backend, graph_of(model, form), weights, kv="bf16") for form in ("absorbed", "expanded"))
    for context, rows in ((0, 5), (0, 300), (100, 1), (300, 2), (300, 20), (400, 64), (400, 200)):
        made, pairs = context + rows, rows * context + rows * (rows + 1) // 2
        cheaper = made * rank * (nope + v_dim) + pairs * (nope + rope + v_dim) < (
            rows * rank * (nope + v_dim) + pairs * (2 * rank + rope)
        )
        ids = random_ids(model.config, made)
        actual = after(absorbing, ids, context, PREFILL)
        absorbed, expanded = after(absorbing, ids, context, DECODE), after(expanding, ids, context, PREFILL)
        assert not torch.equal(absorbed, expanded)
        assert torch.equal(actual, expanded if cheaper else absorbed), f"{rows} rows after {context}"


def after(r, ids, context, phase):
    """Logits of ids[context:] in a separate step."""
    mine = r.sequence()
    if context:
        run_step(r.plan, r.store, [Part(mine, ids[:context], DECODE)])
    logits = run_step(r.plan, r.store, [Part(mine, ids[context:], phase)]).logits
    mine.free()
    return logits


@pytest.mark.parametrize("way", WAYS)
def test_a_nan_does_not_affect_earlier_rows(backend, way):
    """Neither from the same step nor from the end of a block that another sequence has used."""
    model, (form, phase) = latent_model("tiles"), WAYS[way]
    for kv in ("fp32", "bf16", "int8"):
        r = runner(backend, graph_of(model, form), packed_weights(weights_of(model), "bf16"), kv=kv, blocks=12)
        embeds = model.get_input_embeddings().weight[random_ids(model.config, 70)].detach().clone()
        expected = prefill_embeds(r, embeds, phase)
        embeds[41] = torch.nan
        actual = prefill_embeds(r, embeds, phase)
        assert torch.equal(actual[:41], expected[:41])
        assert actual[41:].isnan().all()
        embeds[41] = 0.0
        assert torch.equal(prefill_embeds(r, embeds, phase)[:41], expected[:41])


def prefill_embeds(r, embeds, phase):
    mine = r.sequence()
    logits = run_step(r.plan, r.store, [Part(mine, [0] * len(embeds), phase)], inputs_embeds=embeds).logits
    mine.free()
    return logits


def test_crop_and_shared_blocks(backend):
    """A cropped or forked sequence continues like a new one."""
    model = latent_model("odd")
    r = runner(backend, graph_of(model), packed_weights(weights_of(model), "bf16"), kv="bf16")
    ids, other = random_ids(model.config, 100), random_ids(model.config, 60, seed=7)
    expected = r.logits(ids[:50] + other, phase=DECODE)
    mine = r.sequence()
    run_step(r.plan, r.store, [Part(mine, ids, DECODE)])
    branch = mine.fork()
    for blocks in (mine, branch):
        blocks.crop(50)
        actual = run_step(r.plan, r.store, [Part(blocks, other, DECODE)]).logits
        assert torch.equal(actual, expected[50:])


def test_stacks_of_heads():
    """Keys are kv_b's values transposed, in bf16; values are its tiles if a head's rows fill whole tiles."""
    model = latent_model("tiles")
    heads, rank, nope, _, v_dim = SHAPES["tiles"]
    graph, context = graph_of(model), CpuBackend().context
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    for format_name in FORMATS:
        weights = packed_weights(weights_of(model), format_name)
        stacks = absorbed_stacks(context, graph, weights)
        keys, values = stacks[key_stack(name)], stacks[value_stack(name)]
        assert (keys.format, values.format) == ("fp32" if format_name == "fp32" else "bf16", format_name)
        whole = get_format(format_name).unpack(weights[name].data, weights[name].rows, rank).unflatten(0, (heads, -1))
        for head in range(heads):
            k = get_format(keys.format).unpack(keys.matrix(head).data, rank, nope)
            assert torch.equal(k, whole[head, :nope].T if format_name == "fp32" else whole[head, :nope].T.bfloat16().float())
            assert torch.equal(get_format(format_name).unpack(values.matrix(head).data, v_dim, rank), whole[head, nope:])
    plan_rows = runner(CpuBackend(), graph, weights).plan.describe()
    forms = {row["op"]: row for row in plan_rows if row["op"].startswith("mla_")}
    assert forms["mla_attention"]["form"] == "absorbed (decode), cheaper form (prefill)"
    assert forms["mla_absorb"]["bytes"] == keys.nbytes and forms["mla_value"]["bytes"] == values.nbytes


def test_values_that_are_not_multiples_of_tiles_are_bf16():
    model = latent_model("odd")
    weights = packed_weights(weights_of(model), "int4")
    stacks = absorbed_stacks(CpuBackend().context, graph_of(model), weights)
    assert {s.format for s in stacks.values()} == {"bf16"}


def test_a_kv_b_of_the_wrong_shape_is_named():
    model = latent_model("odd")
    weights = packed_weights(weights_of(model), "bf16")
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    for wrong in (None, torch.zeros(3, 3), weights["model.layers.1.self_attn.o_proj.weight"]):
        with pytest.raises(BackendError, match=rf"needs '{name}' as a packed matrix of 114 x 40"):
            CpuBackend().compile(graph_of(model), {**weights, name: wrong})
