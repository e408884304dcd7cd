"""A model whose layers are divided among two processes answers as the model in one does; each has its layers' weights only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from deepseek_optimizer import ConfigError, Request, SamplingParams, load_model, make_engine
from deepseek_optimizer.backends.cpu import CpuPlan, unavailable_reason
from deepseek_optimizer.errors import RankLostError, UnsupportedModelError, UnsupportedRequestError
from support.divided import close, load_divided, save_divisible
from support.family_configs import deepseek_v3, gemma3_text, lfm2, qwen2
from support.models import assert_close_rows, random_ids
from support.mtp_files import save_with_mtp

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason="needs the native backend")

PIPELINE = {"pipeline": 2}
FAMILIES = {"qwen2": qwen2, "gemma3_text": gemma3_text, "deepseek_v3": deepseek_v3}


def save(folder: Path, family: str) -> Path:
    if family == "deepseek_v3":  # with an MTP layer
        save_with_mtp(folder, deepseek_v3())
        return folder
    return save_divisible(folder, FAMILIES[family])


@pytest.fixture(scope="module", params=FAMILIES)
def models(request, tmp_path_factory):
    """The model as a whole and in two processes."""
    folder = save(tmp_path_factory.mktemp("stages") / "model", request.param)
    whole = load_model(folder, precision="fp32", threads=1, batch_invariant=True)
    divided = load_divided(folder, precision="fp32", batch_invariant=True, parallel=PIPELINE)
    yield whole, divided
    close(divided)


def prompt(model, count, seed=0):
    return torch.tensor([random_ids(model.config, count, seed)])


def test_logits_and_tokens(models):
    whole, divided = models
    ids = prompt(whole, 70)
    assert_close_rows(divided(ids).logits[0], whole(ids).logits[0], 1e-5)
    texts = [m.generate(ids, max_new_tokens=20, do_sample=False).tolist() for m in models]
    assert texts[0] == texts[1]


def test_an_engine_with_prefixes(models):
    texts, cached = [], []
    for model in models:
        engine, params = make_engine(model), SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
        shared = random_ids(model.config, 70, seed=5)
        wanted = [Request(shared + random_ids(model.config, 5 + n, seed=n), params, id=str(n)) for n in range(3)]
        first, again = engine.generate(wanted), engine.generate(wanted)
        texts.append([r.token_ids for r in first])
        assert [r.token_ids for r in again] == texts[-1]
        cached.append([r.cached_tokens for r in again])
    assert texts[0] == texts[1] and cached[0] == cached[1]


def test_drafts(models):
    ids, options = prompt(models[0], 40), {"max_new_tokens": 16, "do_sample": False}
    drafts = {"use_mtp": True} if models[0].config.model_type == "deepseek_v3" else {"prompt_lookup_num_tokens": 3}
    texts = [model.generate(ids, **options, **drafts).tolist() for model in models]
    assert texts[0] == texts[1]


def test_a_step_that_fails_here_leaves_the_others_ready(models, monkeypatch):
    """They have been told of the step before it failed."""
    _, divided = models
    before = divided.generate(prompt(divided, 12), max_new_tokens=4, do_sample=False)
    with monkeypatch.context() as patch:
        patch.setattr(CpuPlan, "run", lambda *_: (_ for _ in ()).throw(MemoryError("none is left")))
        with pytest.raises(MemoryError, match="none is left"):
            divided.generate(prompt(divided, 12), max_new_tokens=4, do_sample=False)
    assert divided.generate(prompt(divided, 12), max_new_tokens=4, do_sample=False).tolist() == before.tolist()


def test_sampled_tokens(models):
    """From torch's generator, with tokens that the first steps bar and penalties."""
    ids, options = prompt(models[0], 9), {"max_new_tokens": 24, "do_sample": True, "temperature": 1.3, "top_k": 40}
    for more in ({"min_new_tokens": 8}, {"repetition_penalty": 1.2}, {"num_return_sequences": 3}):
        texts = []
        for model in models:
            torch.manual_seed(4)
            texts.append(model.generate(ids, **options, **more).tolist())
        assert texts[0] == texts[1], more


def test_each_process_has_its_layers_only(models):
    whole, divided = models
    held = {name for name, p in divided.named_parameters() if not p.is_meta}
    everything = {name for name, _ in whole.named_parameters()}
    assert held < everything
    # Of the others' layers it has at most the norm of the rows that it sends, which is computed together with them.
    attention = [name for name in held if name.startswith("model.layers.") and ".self_attn." in name]
    layers = {int(name.split(".")[2]) for name in attention}
    assert 0 in layers and models[0].config.num_hidden_layers - 1 not in layers
    assert "model.embed_tokens.weight" in held and "model.norm.weight" in held


def test_what_it_cannot_do(models):
    _, divided = models
    ids = prompt(divided, 4)
    with pytest.raises(UnsupportedRequestError, match="load it without parallel for output_hidden_states"):
        divided(ids, output_hidden_states=True)
    with pytest.raises(ValueError):  # an invalid batch ends no process
        divided(torch.tensor([[divided.config.vocab_size + 5]]))
    assert divided(ids).logits.isfinite().all()


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("family", ["qwen2", "deepseek_v3"])
def test_weight_formats(family, precision, tmp_path):
    """Each matrix is whole in one process, so the bits of logits are those of one process."""
    one = load_model(save(tmp_path / "model", family), precision=precision, threads=1)
    one.save_pretrained(tmp_path / "packed")
    ids = prompt(one, 40)
    for folder in (tmp_path / "model", tmp_path / "packed"):
        two = load_divided(folder, precision=precision, parallel=PIPELINE)
        assert_close_rows(two(ids).logits[0], one(ids).logits[0], 1e-5)
        close(two)


def test_refused_before_processes_are_started(tmp_path):
    save_divisible(tmp_path / "model")
    with pytest.raises(ConfigError, match="pipeline=9 processes cannot divide 3 layers; use fewer"):
        load_divided(tmp_path / "model", parallel={"pipeline": 9})
    save_divisible(tmp_path / "states", lfm2)
    with pytest.raises(UnsupportedModelError, match="pipeline=2 cannot divide"):
        load_divided(tmp_path / "states", parallel=PIPELINE)


def test_a_killed_process_ends_all_requests(tmp_path):
    model = load_divided(save_divisible(tmp_path / "model"), precision="fp32", parallel=PIPELINE)
    ids = prompt(model, 20)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False).tolist()
    (pid,) = model.dso.backend.leader.pids
    os.kill(pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(RankLostError, match=rf"rank 1 of 2, process {pid}, was killed by SIGKILL.*Load the model again"):
            model.generate(ids, max_new_tokens=5)
    again = load_divided(tmp_path / "model", precision="fp32", parallel=PIPELINE)
    assert again.generate(ids, max_new_tokens=5, do_sample=False).tolist() == expected
    close(again)


_LIMITED = """
import resource, sys
import torch
from deepseek_optimizer import NotEnoughMemoryError, load_model
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) << 10
limit = int(sys.argv[2]) * 2 // 3  # of the model's weights
assert used < limit // 4, (used, limit)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
options = {"precision": "fp32", "threads": 1, "kv_cache_memory": 4 << 20}
try:
    load_model(sys.argv[1], **options)
except NotEnoughMemoryError:
    print("one process: not enough memory")
model = load_model(sys.argv[1], **options, parallel={"pipeline": 2})
print(model.generate(torch.tensor([[3, 1, 4]]), max_new_tokens=3, do_sample=False).shape)
model.dso.backend.leader.close()
"""


@pytest.mark.slow
def test_a_model_of_one_and_a_half_times_the_memory_of_a_process(tmp_path):
    """Each process may have two thirds of the bytes of the weights: one cannot hold the model, two can."""
    config = qwen2(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=14, num_attention_heads=16, num_key_value_heads=4,
        head_dim=128, vocab_size=301, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        model = type_of(config)(config)
    size = 4 * sum(p.numel() for p in model.parameters())  # in fp32
    save_random(model, config, tmp_path / "model")
    command = [sys.executable, "-c", textwrap.dedent(_LIMITED), str(tmp_path / "model"), str(size)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines() == ["one process: not enough memory", "torch.Size([1, 6])"]


def type_of(config):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM._model_mapping[type(config)]


def save_random(model, config, folder):
    """Writes weights in bf16: few random numbers, repeated, since there are many weights."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    folder.mkdir()
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    numbers = (0.02 * torch.randn(1_000_003)).bfloat16()
    tensors = {
        name: numbers.repeat(-(-p.numel() // len(numbers)))[: p.numel()].view(p.shape).clone()
        for name, p in model.named_parameters()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
