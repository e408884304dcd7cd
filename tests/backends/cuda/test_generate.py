"""A loaded model generates by replayed steps, with the same tokens as the reference backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from support import triton_interpreter

triton_interpreter.require()

from deepseek_optimizer import load_model, make_engine
from deepseek_optimizer.backends import cuda
from deepseek_optimizer.backends.cpu import CpuBackend
from deepseek_optimizer.backends.cuda.backend import CudaBackend
from deepseek_optimizer.engine.request import SamplingParams
from deepseek_optimizer.integration.bind.host_experts import Placement
from deepseek_optimizer.integration.bind.packed_experts import PackedExperts
from support import family_configs as configs
from support.models import random_model
from support.recording_device import RecordingDevice


@pytest.fixture
def device(monkeypatch):
    """A device that records in the place of a card, on which backend `cuda` runs models."""
    made = RecordingDevice()
    spec = replace(
        cuda.SPEC,
        device_types=("cpu",),
        create=lambda where, settings: CudaBackend(where, settings.cuda_graphs, made, lambda: CpuBackend(threads=1)),
    )
    monkeypatch.setattr(cuda, "SPEC", spec)
    return made


def test_generate_and_engine(tiny_model, device):
    ids = torch.tensor([[5, 6, 7, 8]])
    exact = load_model(tiny_model, backend="reference").generate(ids, max_new_tokens=4, do_sample=False)
    model = load_model(tiny_model, backend="cuda", kv_cache_memory=1 << 20)
    assert "steps of up to 256 rows as CUDA graphs" in model.report().detail
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), exact)
    assert device.events.count("capture") == 1 and device.events.count("replay 0") == 2  # of three steps of decoding
    engine = make_engine(model, drafts=False)
    device.events.clear()
    (answer,) = engine.generate([ids[0].tolist()], SamplingParams(temperature=0.0, max_tokens=4))
    assert answer.token_ids == exact[0, 4:].tolist()
    assert any(event.startswith("replay") for event in device.events)


def test_generate_with_experts_on_the_cpu(tmp_path, device):
    tiny = {"vocab_size": 31, "hidden_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    random_model(configs.qwen3_moe(**tiny, num_experts=4, moe_intermediate_size=20)).save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    exact = load_model(tmp_path, backend="reference").generate(ids, max_new_tokens=4, do_sample=False)
    model = load_model(tmp_path, backend="cuda", kv_cache_memory=1 << 20)
    Placement(tuple(module for module in model.modules() if isinstance(module, PackedExperts)), 1, "").mark()
    model.dso.rebind()
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), exact)
    assert "arrived" in device.events and "experts on the CPU" in model.report().detail
