"""A model in two processes answers as the model in one does; what it cannot do is refused; processes that end are noticed."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepseek_optimizer import (
    ConfigError,
    DeepSeekConfig,
    DynamicGraphOptimizer,
    Request,
    SamplingParams,
    load_model,
    make_async_engine,
    make_engine,
)
from deepseek_optimizer.backends.cpu import CpuPlan, unavailable_reason
from deepseek_optimizer.backends.cpu.topology import Cpu
from deepseek_optimizer.backends.prompt_plan import PromptPlan
from deepseek_optimizer.checkpoint import open_checkpoint
from deepseek_optimizer.errors import (
    BackendError,
    CheckpointChangedError,
    EngineDeadError,
    RankLostError,
    UnsupportedModelError,
    UnsupportedRequestError,
)
from deepseek_optimizer.integration.bind.swap import matrices_of
from deepseek_optimizer.integration.load import member, ranks
from deepseek_optimizer.quant.parts import packed_part
from support.divided import SIZES, close, load_divided, save_divisible
from support.family_configs import gemma4_unified_text, llama, olmo2
from support.models import assert_close_rows, random_ids

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason="needs the native backend")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_divisible(tmp_path_factory.mktemp("divided") / "model")


@pytest.fixture(scope="module")
def whole(saved):
    return load_model(saved, precision="fp32", threads=1)


@pytest.fixture(scope="module")
def divided(saved):
    model = load_divided(saved, precision="fp32")
    yield model
    close(model)


def prompt(model, count=50, seed=0):
    return torch.tensor([random_ids(model.config, count, seed)])


def test_logits(whole, divided):
    ids = prompt(whole, 70)
    assert_close_rows(divided(ids).logits[0], whole(ids).logits[0], 1e-5)


def test_inference_mode(whole, divided):
    with torch.inference_mode():
        ids = prompt(whole, 20)
        assert_close_rows(divided(ids).logits[0], whole(ids).logits[0], 1e-5)
        texts = [make_engine(model).generate(requests(model)[:2]) for model in (whole, divided)]
    assert [r.token_ids for r in texts[0]] == [r.token_ids for r in texts[1]]


def test_hidden_states_and_embeddings(whole, divided):
    ids = prompt(whole, 20)
    embeds = whole.get_input_embeddings()(ids)
    expected, got = (m(inputs_embeds=embeds, output_hidden_states=True) for m in (whole, divided))
    assert_close_rows(torch.stack(got.hidden_states), torch.stack(expected.hidden_states), 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
        {"do_sample": False, "prompt_lookup_num_tokens": 3},
        {"do_sample": False, "repetition_penalty": 1.3},
    ],
)
def test_generate(whole, divided, options):
    ids, texts = prompt(whole, 40), []
    for model in (whole, divided):
        torch.manual_seed(1)
        texts.append(model.generate(ids, max_new_tokens=30, **options).tolist())
    assert texts[0] == texts[1]


def test_a_cache_can_be_continued_and_read(whole, divided):
    ids, more = prompt(whole, 40), prompt(whole, 9, seed=1)
    results = []
    for model in (whole, divided):
        cache = model(ids, use_cache=True).past_key_values
        logits = model(more, past_key_values=cache).logits[0]
        results.append((logits, cache.layers[0].keys if hasattr(cache, "layers") else None))
    assert_close_rows(results[1][0], results[0][0], 1e-5)


def requests(model):
    shared = random_ids(model.config, 70, seed=5)
    wanted = []
    for n in range(6):
        own = random_ids(model.config, 10 + 7 * n, seed=20 + n)
        sampling = {"temperature": 0.0} if n % 2 else {"temperature": 0.8, "seed": n}
        params = SamplingParams(max_tokens=20, ignore_eos=True, **sampling)
        wanted.append(Request(shared + own if n % 3 else own, params, id=str(n)))
    return wanted


def test_an_engine_with_prefixes(whole, divided):
    texts, cached = [], []
    for model in (whole, divided):
        engine = make_engine(model)
        first = engine.generate(requests(model))
        again = engine.generate(requests(model))  # continues from the prefix cache
        texts.append([r.token_ids for r in first])
        assert [r.token_ids for r in again] == texts[-1]
        cached.append([r.cached_tokens for r in again])
    assert texts[0] == texts[1]
    assert cached[0] == cached[1] and max(cached[0]) >= 64


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_weight_formats(saved, precision, tmp_path):
    """Parts have the bits of the whole matrices, from a float checkpoint and from a packed one."""
    one = load_model(saved, precision=precision, threads=1)
    one.save_pretrained(tmp_path / "packed")
    ids = prompt(one, 40)
    expected, logits = one(ids).logits[0], []
    for folder in (saved, tmp_path / "packed"):
        two = load_divided(folder, precision=precision)
        matrices = matrices_of(one, one.dso.graph)
        for name, part in matrices_of(two, two.dso.graph).items():
            rows, cols = ((0, n) if n < m else None for n, m in zip(part.shape, matrices[name].shape, strict=True))
            assert torch.equal(part.data, packed_part(matrices[name], rows, cols).data), name
        logits.append(two(ids).logits[0])
        close(two)
    assert torch.equal(*logits)
    assert_close_rows(logits[0], expected, 2e-2)


@pytest.mark.parametrize("setting", [{"calibration": "auto"}, {"precision": "auto", "kl_budget": 0.1}])
def test_settings_that_a_conversion_has_carried_out(saved, setting, tmp_path):
    """A packed checkpoint keeps what its formats were chosen by, and can be divided all the same."""
    load_model(saved, precision="int4", threads=1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] |= setting
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    one, two = load_model(tmp_path, threads=1), load_divided(tmp_path)
    ids = prompt(one, 40)
    assert_close_rows(two(ids).logits[0], one(ids).logits[0], 2e-2)
    close(two)


@pytest.mark.parametrize(
    "config", [lambda **f: llama(**f, tie_word_embeddings=True), lambda **f: llama(**f, attention_bias=True, mlp_bias=True)]
)
def test_tied_heads_and_biases(config, tmp_path):
    folder = save_divisible(tmp_path / "model", config)
    one, two = load_model(folder, precision="fp32", threads=1), load_divided(folder, precision="fp32")
    ids = prompt(one, 40)
    assert_close_rows(two(ids).logits[0], one(ids).logits[0], 1e-5)
    close(two)


def test_a_model_with_a_plan_for_prompts(tmp_path):
    """The last layers read the cache of earlier ones, so prompts run through a plan of their own."""
    folder = save_divisible(tmp_path / "model", gemma4_unified_text, global_head_dim=32)
    one, two = load_model(folder, precision="fp32", threads=1), load_divided(folder, precision="fp32")
    assert isinstance(two.dso.plan, PromptPlan)
    ids = prompt(one, 70)
    assert_close_rows(two(ids, logits_to_keep=2).logits[0], one(ids, logits_to_keep=2).logits[0], 1e-5)
    texts = [model.generate(ids, max_new_tokens=5, do_sample=False).tolist() for model in (one, two)]
    assert texts[0] == texts[1]
    with pytest.raises(UnsupportedRequestError, match="have its own plan only; load it without parallel"):
        two.dso.compile(two.dso.graph.without_head())
    close(two)


def test_steps_longer_than_any_before(whole, divided):
    """The memory that processes share grows."""
    ids = prompt(whole, 900)
    assert_close_rows(divided(ids).logits[0], whole(ids).logits[0], 1e-5)


def test_what_a_divided_model_cannot_do(divided, tmp_path):
    with pytest.raises(UnsupportedRequestError, match="load it without parallel"):
        divided.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedRequestError, match="load it without parallel"):
        divided.to(torch.bfloat16)
    with pytest.raises(UnsupportedRequestError, match="only its plan can run"), pytest.warns(UserWarning):
        divided(prompt(divided, 4), output_attentions=True)
    with pytest.raises(ConfigError, match="tensor=2 is for load_model"):
        DynamicGraphOptimizer(divided)
    with pytest.raises(BackendError, match="cannot be copied"):
        copy.deepcopy(divided)
    with pytest.raises(ValueError):  # an invalid batch ends neither process
        divided(torch.tensor([[SIZES["vocab_size"] + 5]]))
    assert divided(prompt(divided, 4)).logits.isfinite().all()


def test_refused_before_memory_is_taken(saved, tmp_path):
    for fields, text in (
        ({"parallel": {"tensor": 3}}, "tensor=3 does not divide the model's 2 key and value heads"),
        ({"backend": "reference"}, 'runs on backend "cpu" only'),
        ({"kl_budget": 0.1}, "need the whole model"),
        ({"adapter": "adapter"}, "tensor=2 has no adapters; merge the adapter"),
    ):
        with pytest.raises(ConfigError, match=text):
            load_divided(saved, **fields)
    save_divisible(tmp_path / "norms", olmo2)
    with pytest.raises(UnsupportedModelError, match="rms_norm needs all elements"):
        load_divided(tmp_path / "norms")


@pytest.mark.parametrize("ways", [{"tensor": 2}, {"pipeline": 2}])
def test_other_systems_are_refused(ways, monkeypatch):
    monkeypatch.setattr(ranks.sys, "platform", "win32")
    settings = DeepSeekConfig(parallel=ways)
    with pytest.raises(BackendError, match="=2 needs Linux; load the model without parallel"):
        ranks.check_divisible(settings, torch.device("cpu"), None, packed=False)


def test_none_is_left_if_one_cannot_be_started(saved, monkeypatch):
    started, start = [], ranks._start

    def first_only(*arguments):
        if started:
            raise BackendError("a further process cannot be started (none is left)")
        started.append(start(*arguments))
        return started[0]

    monkeypatch.setattr(ranks, "_start", first_only)
    with open_checkpoint(saved) as checkpoint, pytest.raises(BackendError, match="cannot be started"):
        ranks.start_ranks(checkpoint, DeepSeekConfig(parallel={"tensor": 3}, threads=1))
    assert started[0].returncode == -signal.SIGKILL


def test_files_of_the_working_directory_are_not_imported(saved, tmp_path, monkeypatch):
    (tmp_path / "random.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    close(load_divided(saved, precision="fp32"))


def test_a_service_manager_that_ends_all_processes_leaves_requests_to_the_leader(divided):
    for pid in divided.dso.backend.leader.pids:
        os.kill(pid, signal.SIGTERM)
    assert divided(prompt(divided, 4)).logits.isfinite().all()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_on_several_memory_nodes_each_process_runs_on_one(saved, whole, monkeypatch):
    first, second = sorted(os.sched_getaffinity(0))[:2]
    machine = [Cpu(first, 0, 0, 0, 0, 1024), Cpu(second, 1, 1, 1, 1, 1024)]
    monkeypatch.setattr(member, "machine_cpus", lambda: machine)
    before, seen = os.sched_getaffinity(0), []
    model = load_divided(saved, precision="fp32")
    decode = CpuPlan.decode
    monkeypatch.setattr(CpuPlan, "decode", lambda *given: (seen.append(os.sched_getaffinity(0)), decode(*given))[1])
    try:
        ids = prompt(whole, 9)
        texts = [m.generate(ids, max_new_tokens=6, do_sample=False).tolist() for m in (model, whole)]
        (pid,) = model.dso.backend.leader.pids
        assert os.sched_getaffinity(pid) == {second}
    finally:
        close(model)
    assert texts[0] == texts[1]
    assert seen[0] == {first} and seen[-1] == before == os.sched_getaffinity(0)


def test_variables_of_memory_nodes(saved, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("DSO_NUMA", "sideways")
    with pytest.raises(ConfigError, match="DSO_NUMA must be off, move or copy"):
        load_divided(saved, precision="fp32")
    (tmp_path / "machine.json").write_text(json.dumps({"nodes": [{"l3_groups": [{"cores": 2}]}] * 4}))
    monkeypatch.setenv("DSO_TOPOLOGY", str(tmp_path / "machine.json"))
    ids = prompt(whole, 20)
    for nodes, expected in (("off", [2]), ("move", [1, 1])):
        monkeypatch.setenv("DSO_NUMA", nodes)
        model = load_divided(saved, precision="fp32", threads=2)
        try:
            assert model.dso.backend.context.nodes == expected
            assert_close_rows(model(ids).logits[0], whole(ids).logits[0], 1e-5)
        finally:
            close(model)


def test_only_load_model_divides(saved):
    """Other ways to an optimized model would ignore the setting silently."""
    config = DeepSeekConfig(parallel={"tensor": 2})
    with pytest.raises(ConfigError, match=r"tensor=2 is for load_model .*; use load_model\(path, config\)"):
        AutoModelForCausalLM.from_pretrained(saved, quantization_config=config)
    with pytest.raises(ConfigError, match="tensor=2 is for load_model"):
        DynamicGraphOptimizer(AutoModelForCausalLM.from_pretrained(saved), config=config)


def test_a_killed_process_ends_all_requests(saved):
    model = load_divided(saved, precision="fp32")
    engine, ids = make_engine(model), prompt(model, 20)
    assert engine.generate(requests(model)[:1])[0].token_ids
    (pid,) = model.dso.backend.leader.pids
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RankLostError, match=rf"rank 1 of 2, process {pid}, was killed by SIGKILL.*Load the model again"):
        model.generate(ids, max_new_tokens=5)
    start = time.monotonic()
    with pytest.raises(RankLostError, match="rank 1 of 2"):
        engine.generate(requests(model))
    assert time.monotonic() - start < 60
    with pytest.raises(EngineDeadError) as caught:  # what a server's health depends on
        make_async_engine(model, None, model_name="divided").check_alive()
    assert isinstance(caught.value.__cause__, RankLostError)
    close(model)


def test_a_changed_file_is_named_in_every_call(saved, tmp_path):
    """Whichever process finds it first: none waits for one that has stopped."""
    load_model(saved, precision="fp32", threads=1).save_pretrained(tmp_path)
    model = load_divided(tmp_path)
    ids = prompt(model, 20)
    assert model.generate(ids, max_new_tokens=3).shape == (1, 23)
    (file,) = tmp_path.glob("*.safetensors")
    with open(file, "r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"x")
    for _ in range(2):
        with pytest.raises(CheckpointChangedError, match=file.name):
            model.generate(ids, max_new_tokens=3)
    close(model)


_LEADER = """
import os, sys
sys.path.insert(0, {tests!r})
from support.divided import load_divided
model = load_divided({folder!r}, precision="fp32")
print(*model.dso.backend.leader.pids, flush=True)
{end}
"""


_USED = "import torch; model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2); sys.exit(0)"


@pytest.mark.parametrize("end", ["sys.exit(0)", _USED, "os.kill(os.getpid(), 9)", "del model"])
def test_the_others_end_with_the_leader(saved, end):
    code = _LEADER.format(tests=os.path.dirname(os.path.dirname(os.path.dirname(__file__))), folder=str(saved), end=end)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert run.stdout.strip(), run.stderr
    assert "Exception ignored" not in run.stderr, run.stderr
    pid = int(run.stdout)
    for _ in range(300):
        if not os.path.exists(f"/proc/{pid}"):
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} runs on")
