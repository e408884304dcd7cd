"""A model's memory estimated from file headers, compared with the free memory; and other processes that use memory."""

from __future__ import annotations

import re

import pytest

from deepseek_optimizer import load_model
from deepseek_optimizer.doctor.checks import checkpoint, memory
from deepseek_optimizer.doctor.memory_estimate import estimate_memory
from deepseek_optimizer.doctor.symptoms import out_of_memory
from deepseek_optimizer.system.memory import RESERVE_BYTES
from support.models import CASES, random_model


@pytest.mark.parametrize("fields", [{}, {"precision": "int4"}, {"precision": "int8", "kv_cache": "int8"}, {"kv_cache": "int4"}])
def test_the_estimate_equals_the_memory_of_loading(case, tiny_model, fields):
    needs = estimate_memory(case(model=str(tiny_model), fields=fields))
    model = load_model(tiny_model, **fields)
    report = model.report()
    assert needs.weights == report.bytes_after
    assert needs.kv_cache == report.kv_cache and needs.cache_per_token == report.kv_block_bytes // 32
    if report.backend == "cpu":
        row = -(-model.config.vocab_size * 4 // 64) * 64  # logits are in the caller's memory, and counted too
        assert needs.buffers == model.dso.plan.buffer_bytes(512, 32) + 32 * row


def test_the_size_in_other_formats(case, tiny_model):
    needs = estimate_memory(case(model=str(tiny_model)))
    for name in memory.SMALLER:
        assert needs.weights_in(name) == estimate_memory(case(model=str(tiny_model), fields={"precision": name})).weights


def test_fits(case, tiny_model, one):
    finding = one(memory.check(case(model=str(tiny_model))), "ok", "1 x 256 tokens")
    assert finding.facts["needed"] < finding.facts["free"]


def free_for(case, path, tokens):
    """Bytes of weights, buffers, `tokens` cached tokens and the reserve of a small machine."""
    return estimate_memory(case(model=str(path))).needed(tokens) + RESERVE_BYTES


def test_weights_do_not_fit(case, machine, tiny_model, one):
    needs = estimate_memory(case(model=str(tiny_model)))
    box = machine(available_bytes=needs.weights_in("int8") + needs.buffers + 100)
    finding = one(memory.check(case(model=str(tiny_model), machine=box)), "error", "weights do not fit")
    assert "precision='int8'" in finding.fix


def test_no_remedy_fits(case, machine, tiny_model, one):
    box = machine(available_bytes=1000)
    finding = one(memory.check(case(model=str(tiny_model), machine=box)), "error", "weights do not fit")
    assert "smaller model" in finding.fix


@pytest.mark.parametrize(("context", "severity"), [(None, "warning"), (200, "error")])
def test_context_does_not_fit(case, machine, tiny_model, one, context, severity):
    box = machine(available_bytes=free_for(case, tiny_model, 128))
    finding = one(memory.check(case(model=str(tiny_model), machine=box, context=context)), severity, "tokens do not fit")
    assert "128 tokens" in finding.fix and "kv_cache='int8'" in finding.fix and finding.facts["max_tokens"] == 128


def test_batch_does_not_fit(case, machine, tiny_model, one):
    box = machine(available_bytes=free_for(case, tiny_model, 150))
    finding = one(memory.check(case(model=str(tiny_model), machine=box, context=60, batch=4)), "error", "4 x 60 tokens")
    assert "batch_size_range" in finding.fix and "32 tokens" in finding.fix


def test_beyond_the_models_context(case, tiny_model, one):
    one(memory.check(case(model=str(tiny_model), context=300)), "error", "beyond the model's 256")


@pytest.mark.parametrize(("context", "severity"), [(None, "warning"), (200, "error")])
def test_too_small_a_cache_limit(case, tiny_model, one, context, severity):
    given = case(model=str(tiny_model), context=context, fields={"kv_cache_memory": 1 << 16})
    finding = one(memory.check(given), severity, "kv_cache_memory holds")
    assert f"kv_cache_memory={estimate_memory(given).cache_per_token * (224 if context else 256)}" in finding.fix


def test_a_container_limit_counts(case, machine, tiny_model, one):
    files = {"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": "5000", "/sys/fs/cgroup/memory.current": "1000"}
    given = case(model=str(tiny_model), machine=machine(files))
    assert one(memory.check(given), "error", "weights do not fit").facts["free"] == 4000
    one(out_of_memory.measure(given), "warning", "the cgroup / limits memory to")


def test_overcommit_is_off(case, machine, one):
    box = machine({"/proc/sys/vm/overcommit_memory": "2\n"})
    one(out_of_memory.measure(case(machine=box)), "warning", "reserved but not used")


def test_other_processes_are_named(case, machine, one, monkeypatch):
    import psutil

    class Other:
        info = {"pid": -1, "name": "browser", "memory_info": psutil.Process().memory_info()}

    monkeypatch.setattr(psutil, "process_iter", lambda attrs: [Other])
    actual = one(out_of_memory.measure(case(machine=machine({"/proc/meminfo": "MemTotal:  1024 kB\n"}))), "note", "browser")
    assert actual.facts["bytes"] > 1 << 20


def test_a_quiet_machine(case):
    assert list(out_of_memory.measure(case())) == []


@pytest.fixture(scope="module")
def experts_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts") / "model"
    random_model(CASES["deepseek_v3-groups"]()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fields", [{}, {"precision": "int4"}])
def test_the_estimate_for_experts_and_latents(case, experts_model, fields):
    fields = {**fields, "backend": "reference"}
    needs = estimate_memory(case(model=str(experts_model), fields=fields))
    model = load_model(experts_model, **fields)
    assert needs.weights == model.report().bytes_after
    assert needs.cache_per_token == model.report().kv_token_bytes
    assert (
        needs.weights_in("int4")
        == estimate_memory(case(model=str(experts_model), fields={**fields, "precision": "int4"})).weights
    )


def test_a_checkpoint_with_experts_is_complete(case, experts_model, one):
    one(checkpoint.check(case(model=str(experts_model), fields={"backend": "reference"})), "ok", "all that the model needs")


@pytest.mark.parametrize("batch", [1, 3])
def test_recurrent_states_are_counted(case, tmp_path, batch):
    """The size that the finding recommends holds the tokens."""
    random_model(CASES["qwen3_5_text-mixed"]()).save_pretrained(tmp_path)
    fields = {"backend": "reference"}
    needs = estimate_memory(case(model=str(tmp_path), fields=fields, batch=batch))
    store = load_model(tmp_path, **fields).dso.arena.store
    assert needs.states == 4 * batch * store.state_bytes > 0
    tokens = needs.held(640) * batch
    small = case(model=str(tmp_path), fields={**fields, "kv_cache_memory": needs.states}, context=640, batch=batch)
    (finding,) = memory.check(small)
    recommended = int(re.search(r"kv_cache_memory=(\d+)", finding.fix).group(1))
    arena = load_model(tmp_path, kv_cache_memory=recommended, **fields).dso.arena
    assert arena.manager.num_blocks * 32 >= tokens and arena.manager.slots.num_blocks >= 4 * batch
