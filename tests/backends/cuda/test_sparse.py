"""Block-sparse attention: summaries of blocks, the choice among them, attention to the chosen ones, and whole plans."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from support import triton_interpreter

triton_interpreter.require()

from deepseek_optimizer.backends.base import DECODE, PREFILL
from deepseek_optimizer.backends.cuda import division
from deepseek_optimizer.backends.cuda.backend import CudaBackend
from deepseek_optimizer.backends.cuda.kernels import attention, blocks, rope
from deepseek_optimizer.backends.cuda.store import CudaStore
from deepseek_optimizer.backends.reference import ReferenceBackend, choose, ops
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.attention_mode import AttentionMode, apply_mode
from deepseek_optimizer.graph.ir import CacheSpec
from deepseek_optimizer.graph.rope_rotation import key_rotation
from deepseek_optimizer.models import build_graph
from support import family_configs as configs
from support.models import assert_close_rows, random_ids, random_model, weights_of
from support.recording_device import RecordingDevice
from support.steps import Part, run_step, runner

from ..cpu.packing import packed_weights
from .plans import FORMAT_TOLERANCE
from .test_attention import BOUND, SCALE, Case, on_device
from .test_captured import TINY
from .values import ints, random

CPU = torch.device("cpu")
MODE = AttentionMode("sparse", window=20, sinks=0, budget=96)


def filled(kv_dtype, tokens, kv_heads, head):
    """A store with summaries of one layer after another one, with keys and values of a sequence in blocks in reverse order."""
    store = CudaStore(CacheSpec(2, kv_heads, head, summaries=True), kv_dtype, 12, CPU)
    store.ensure(12)
    store.data.view(torch.uint8).fill_(255)
    table = np.arange(11, 11 - -(-tokens // 32), -1, dtype=np.int32)
    at = np.arange(tokens)
    slots = torch.from_numpy(ints(table[at // 32] * 32 + at % 32))
    k, v = (random(tokens, kv_heads * head, seed=seed) for seed in (1, 2))
    rope.rope_cache(None, k, v, None, None, store.data, slots, store.offsets[1], heads=0, kv_heads=kv_heads)
    blocks.summarize(store.data, slots, store.offsets[1], kv_heads, head)
    return store, table


@pytest.mark.parametrize(("kv_dtype", "heads", "kv_heads", "head"), [("fp32", 4, 2, 12), ("bf16", 3, 1, 20), ("int8", 2, 2, 8)])
def test_choice(kv_dtype, heads, kv_heads, head):
    """Of rows that see fewer blocks than may be chosen, as many, and more, some at the ends of blocks."""
    (store, table), (count, sinks, window) = filled(kv_dtype, 330, kv_heads, head), (5, 33, 40)
    keys = store.read(1, table, 330)[0].transpose(0, 1)
    largest, smallest = choose.summaries(keys, kv_dtype == "fp32")
    assert torch.equal(store._summaries_of(1)[table[:10].astype(int)], torch.stack((largest, smallest), 1).to(
        store._summaries_of(1).dtype
    ))  # fmt: skip
    tokens = [159, 160, 192, 329]
    q, ends = random(len(tokens), heads * head, seed=3), torch.tensor(tokens, dtype=torch.int32) + 1
    made = torch.full((len(tokens), kv_heads * count), torch.nan)
    sizes = {"heads": heads, "kv_heads": kv_heads, "blocks": count, "sinks": sinks, "window": window}
    pages, of_first = torch.from_numpy(table)[None].contiguous(), torch.zeros(len(tokens), dtype=torch.int32)
    blocks.choose(q, store.data, store.offsets[1], pages, of_first, ends, made, **sizes)
    for row, token in enumerate(tokens):
        own = q[row].view(1, kv_heads, -1, head)
        exact = choose.choose_blocks(own, keys[: token + 1], token, count, sinks, window, kv_dtype == "fp32")
        assert torch.equal(made[row].view(1, kv_heads, count), exact), token


def test_rotated_keys_have_new_summaries():
    for kv_dtype in ("fp32", "fp8"):
        store, table = filled(kv_dtype, 64, 1, 12)
        before = store._summaries_of(1).clone()
        rotation = key_rotation(build_graph(configs.llama(**TINY | {"head_dim": 12})))
        store.data[:, : store.offsets[1]] = 0
        store.rotate(rotation, table, 64, 0, 3)
        keys = store.read(1, table, 64)[0].transpose(0, 1)
        largest, smallest = choose.summaries(keys, kv_dtype == "fp32")
        made = store._summaries_of(1)[table.astype(int)]
        assert torch.equal(made, torch.stack((largest, smallest), 1).to(made.dtype))
        assert not torch.equal(made, before[table.astype(int)])


@pytest.mark.parametrize("kv_dtype", ["fp32", "fp8"])
def test_attention_reads_the_chosen_blocks_only(kv_dtype):
    """In chunks, where a row decodes; other blocks of the cache are not numbers."""
    case = Case([(DECODE, 700, 1), (PREFILL, 90, 3)], 4, 2, 16, kv_dtype)
    most, at = 17, on_device(case.batch, 1)
    chosen = torch.full((4, 2, most), -1.0)
    for row, numbers in enumerate(([*range(0, 16), 21], [0, 2], [1, 2], [2])):
        for head in range(2):
            own = [n for n in numbers if n != head]
            chosen[row, head, : len(own)] = torch.tensor(own, dtype=torch.float32)
    assert division.chunks_of(1, min(at.phases[0].blocks, most), 2) > 1
    k, v, masks = [], [], []
    for s, (rows, context) in enumerate(((slice(0, 1), 700), (slice(1, 4), 90))):
        total = context + rows.stop - rows.start
        k_own, v_own = (x.transpose(0, 1).double() for x in case.store.read(0, case.batch.block_table[s], total))
        k.append(k_own), v.append(v_own)
        mask = ops.visible(rows.stop - rows.start, context, torch.arange(total), 0, 0)
        masks.append(mask[:, None] & choose.chosen_tokens(chosen[rows], total))
    read = {int(case.batch.block_table[min(row, 1), int(n)]) for row in range(4) for n in chosen[row].unique() if n >= 0}
    case.store.data[[block for block in range(case.store.num_blocks) if block not in read]].view(torch.uint8).fill_(255)
    out = torch.full_like(case.q, torch.nan)
    for tiles in at.phases:
        attention.attention(
            case.q, case.store.data, 0, at.tables[0], tiles, at.ends, out, heads=4, kv_heads=2, scale=SCALE,
            chosen=chosen.flatten(1),
        )  # fmt: skip
    for s, rows in enumerate((slice(0, 1), slice(1, 4))):
        q = case.q[rows].double().unflatten(-1, (2, -1, 16))
        exact = ops.attention(q, k[s], v[s], masks[s], SCALE).flatten(1)
        assert (out[rows].double() - exact).abs().max() <= BOUND[kv_dtype] * exact.abs().max()


def test_plans():
    """A prompt in two chunks, of which the second one's rows choose, and decoding, captured at the end."""
    model, device, results = random_model(configs.llama(**TINY)), RecordingDevice(), []
    graph, places = apply_mode(rules.apply(build_graph(model.config))[0], MODE)
    assert places == ["layer 0"] and graph.cache.summaries
    weights, ids = packed_weights(weights_of(model), "fp32"), random_ids(model.config, 106)
    for backend in (CudaBackend(CPU, True, device), ReferenceBackend()):
        run, logits = runner(backend, graph, weights, blocks=5), []
        sequence = run.sequence()
        for begin, end, phase in ((0, 97, PREFILL), (97, 103, PREFILL), *((i, i + 1, DECODE) for i in range(103, 106))):
            rows = [end - begin - 1]
            logits.append(run_step(run.plan, run.store, [Part(sequence, ids[begin:end], phase, rows)]).logits.clone())
        results.append(torch.cat(logits))
    assert_close_rows(*results, FORMAT_TOLERANCE["fp32"])
    assert device.events.count("capture") == 1 and device.events.count("replay 0") == 2
    assert "sparse" in CudaBackend(CPU).capabilities.attention_modes


def test_latents_are_refused():
    fields = {name: value for name, value in TINY.items() if name != "head_dim"} | {"num_key_value_heads": 2}
    model = random_model(configs.deepseek_v3(**fields, n_routed_experts=6, num_experts_per_tok=2))
    graph, _ = apply_mode(rules.apply(build_graph(model.config))[0], MODE)
    with pytest.raises(BackendError, match="does not run op 'latent_choose' of family 'deepseek_v3' yet"):
        CudaBackend(CPU).compile(graph, packed_weights(weights_of(model), "fp32"))
    with pytest.raises(BackendError, match=r"a choice among blocks of latents .*attention_optimization='sparse' without"):
        CudaBackend(CPU).new_store(graph, "fp32", 2)
