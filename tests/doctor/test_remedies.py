"""A long prompt on a small machine: the prediction, the recommendations, and that both are true."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest
import torch

from deepseek_optimizer import CacheFullError, load_model
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.doctor import examine_symptom
from deepseek_optimizer.doctor.checks import memory
from deepseek_optimizer.doctor.memory_estimate import estimate_memory
from deepseek_optimizer.doctor.remedies import LONGDOC_TOKENS, remedies
from deepseek_optimizer.longdoc.long_document import LongDocument
from deepseek_optimizer.longdoc.material import Limits
from deepseek_optimizer.system.memory import RESERVE_BYTES
from support.family_configs import llama
from support.models import random_ids, random_model

CONTEXT = 16384
SLIDING = {"attention_optimization": "sliding"}
NATIVE = pytest.mark.skipif(unavailable_reason() is not None, reason="no native build")


@pytest.fixture(scope="module")
def long_model(tmp_path_factory):
    """A bf16 model with a context of 16,384 tokens, which need much more memory than its weights."""
    folder = tmp_path_factory.mktemp("long") / "model"
    config = llama(num_attention_heads=4, num_key_value_heads=4, head_dim=64, max_position_embeddings=CONTEXT)
    random_model(config, dtype=torch.bfloat16).save_pretrained(folder)
    return str(folder)


def enough_for(case, path, context=CONTEXT, **fields):
    """Bytes with which a model with these fields just has room for the context."""
    needs = estimate_memory(case(model=path, fields=fields))
    return needs.needed(needs.held(context)) + RESERVE_BYTES


def examined(case, machine, path, free, **fields):
    given = case(model=path, machine=machine(available_bytes=free), context=CONTEXT, **fields)
    result = examine_symptom(given, "out-of-memory")
    json.dumps([f.to_dict() for f in result])
    return result


def taken(result):
    """The recommended remedy."""
    [name] = [f.facts["name"] for f in result if f.check == "out-of-memory" and f.fix.startswith("use ")]
    return name


def test_sparse_attention_is_recommended_if_it_fits(case, machine, long_model, one):
    free = enough_for(case, long_model, sparse_attention=True)
    actual = examined(case, machine, long_model, free)
    error = one(actual, "error", f"1 x {CONTEXT} tokens do not fit")
    assert error.fix.startswith("sparse_attention=True needs")
    assert taken(actual) == "sparse_attention=True"
    fits = {f.facts["name"]: f.facts for f in actual if f.check == "out-of-memory"}
    needs = estimate_memory(case(model=long_model, fields={"sparse_attention": True}))
    assert fits["sparse_attention=True"]["needed"] == needs.needed(CONTEXT) == free - RESERVE_BYTES
    assert needs.kv_cache == "int8" and needs.cache_per_token < 0.6 * estimate_memory(case(model=long_model)).cache_per_token
    assert all(facts["fits"] for facts in fits.values() if facts["needed"] <= free - RESERVE_BYTES)
    # With one byte less it is not a remedy any more.
    assert taken(examined(case, machine, long_model, free - 1)) == 'attention_optimization="sliding"'


def test_nothing_is_recommended_if_it_fits_already(case, machine, long_model, one):
    actual = examined(case, machine, long_model, enough_for(case, long_model))
    one(actual, "ok", f"1 x {CONTEXT} tokens")
    assert not [f for f in actual if f.check == "out-of-memory"]


def test_the_order_of_remedies(case, machine, long_model):
    given = case(model=long_model, machine=machine(available_bytes=1 << 40), context=CONTEXT)
    actual = [remedy.name for remedy in remedies(given, estimate_memory(given), CONTEXT)]
    assert actual == [
        "sparse_attention=True", 'attention_optimization="sliding"', f"dso longdoc {long_model} FILE", "precision='int8'",
        "precision='int4'", "kv_cache='int8'",
    ]  # fmt: skip


def test_a_window_is_bounded(case, long_model):
    needs = estimate_memory(case(model=long_model, fields={**SLIDING, "attention_window": 512}))
    assert 512 + 512 < needs.held(CONTEXT) == needs.held(8192) <= 2048
    assert needs.held(100) == 128


def test_current_settings_are_not_remedies(case, machine, long_model):
    for fields, gone in (({"sparse_attention": True}, "sparse_attention"), (SLIDING, "attention_optimization")):
        given = case(model=long_model, machine=machine(available_bytes=1 << 40), fields=fields)
        assert gone not in " ".join(remedy.name for remedy in remedies(given, estimate_memory(given), CONTEXT))


def test_longdoc_tokens_match_its_limits():
    """A chunk, a reply, and as much again for the question."""
    chunk = inspect.signature(LongDocument).parameters["max_length"].default
    assert chunk + 2 * Limits(room=0).reply == LONGDOC_TOKENS


def test_a_budget_smaller_than_the_required_blocks_is_raised(case, machine, long_model):
    """If attention is not sparse, the budget of the settings does not matter yet."""
    fields = {"attention_budget": 256}
    actual = examined(case, machine, long_model, enough_for(case, long_model, sparse_attention=True), fields=fields)
    assert taken(actual) == "sparse_attention=True, attention_budget=2048"


def test_a_document_in_chunks(case, machine, long_model, one):
    """With a window as large as the text, only splitting the text helps."""
    window = {**SLIDING, "attention_window": CONTEXT, "kv_cache": "int8"}
    free = enough_for(case, long_model, LONGDOC_TOKENS, **window)
    actual = examined(case, machine, long_model, free, fields=window)
    assert taken(actual) == f"dso longdoc {long_model} FILE"
    assert "--strategy retrieve" in one(actual, "error", "do not fit").fix


def test_smaller_weights(case, machine, long_model):
    """A short context, which a window covers entirely."""
    needs = estimate_memory(case(model=long_model, fields={"kv_cache": "int8"}))
    free = needs.weights_in("int8") + needs.buffers + needs.cache_per_token * 64 + RESERVE_BYTES
    assert needs.weights + needs.buffers <= free
    given = case(model=long_model, machine=machine(available_bytes=free), fields={"kv_cache": "int8"}, context=64)
    [finding] = memory.check(given)
    assert finding.severity == "error" and finding.fix.startswith("precision='int8'")


def test_nothing_that_fits(case, machine, long_model, one):
    needs = estimate_memory(case(model=long_model))
    actual = examined(case, machine, long_model, needs.weights + needs.buffers + RESERVE_BYTES // 2)
    assert one(actual, "error", "do not fit").fix.startswith("free memory")
    notes = [f for f in actual if f.check == "out-of-memory"]
    assert notes and not any(f.facts["fits"] or f.fix for f in notes)


def test_a_cgroup_limit_is_the_free_memory(case, machine, long_model):
    limit = enough_for(case, long_model, sparse_attention=True)
    files = {
        "/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": str(limit + 1000), "/sys/fs/cgroup/memory.current": "1000",
    }  # fmt: skip
    given = case(model=long_model, machine=machine(files, available_bytes=1 << 40), context=CONTEXT)
    assert taken(examine_symptom(given, "out-of-memory")) == "sparse_attention=True"


@pytest.mark.filterwarnings("ignore::deepseek_optimizer.integration.bind.runtime.OptimizerWarning")
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=NATIVE)])
@pytest.mark.parametrize(
    "remedy", [{"sparse_attention": True}, {**SLIDING, "attention_window": 512}], ids=["sparse", "sliding"]
)
def test_the_remedy_is_true(case, machine, long_model, remedy, backend):
    """A prompt for which the cache has no room is processed with the remedy, in the predicted memory."""
    tokens = 3000
    prompt = torch.tensor([random_ids(llama(), tokens)])
    needs = estimate_memory(case(model=long_model, fields={**remedy, "backend": backend}))
    held = needs.held(tokens + 8)
    granted = {"kv_cache_memory": needs.cache_per_token * held, "backend": backend}
    given = case(model=long_model, machine=machine(), fields=granted, context=tokens + 8)
    [error] = [f for f in examine_symptom(given, "out-of-memory") if f.check == "memory"]
    assert error.severity == "error" and "kv_cache_memory holds" in error.what
    with pytest.raises(CacheFullError, match="sparse_attention=True"):
        load_model(long_model, **granted).generate(prompt, max_new_tokens=8, do_sample=False)
    model = load_model(long_model, **granted, **remedy)
    made = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert made.shape == (1, tokens + 8)
    assert model.dso.arena.manager.high_water * 32 <= held


_SMALL_PROCESS = """
import resource, sys, warnings
import psutil, torch
from deepseek_optimizer import CacheFullError, load_model
from deepseek_optimizer.doctor import Case, Machine, examine_symptom
from deepseek_optimizer.doctor.memory_estimate import estimate_memory
from deepseek_optimizer.system.memory import RESERVE_BYTES

path, context = sys.argv[1], int(sys.argv[2])
prompt = torch.randint(3, 200, (1, context - 8), generator=torch.Generator().manual_seed(0))
def read(**fields):
    return load_model(path, **fields).generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
load_model(path).generate(prompt[:, :40], max_new_tokens=2)  # imports and threads are there
with Case(Machine.here(), model=path, fields={"sparse_attention": True}) as sparse:
    needs = estimate_memory(sparse).needed(context)
limit = psutil.Process().memory_info().vms + needs + RESERVE_BYTES + (24 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
with Case(Machine.here(), model=path, context=context) as case:
    found = examine_symptom(case, "out-of-memory")
print([f.facts["name"] for f in found if f.fix.startswith("use ")])
try:
    read()
except CacheFullError as error:
    print(error)
print(tuple(read(sparse_attention=True).shape))
"""


@pytest.mark.slow
@NATIVE
def test_a_process_with_little_memory(tmp_path):
    """With a real limit of the system (RLIMIT_AS)."""
    config = llama(hidden_size=64, num_attention_heads=16, num_key_value_heads=16, head_dim=128, max_position_embeddings=8192)
    random_model(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", _SMALL_PROCESS, str(tmp_path / "model"), "8192"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    recommended, refused, read = done.stdout.splitlines()
    assert recommended == "['sparse_attention=True']" and "sparse_attention=True" in refused and read == "(1, 8192)"
