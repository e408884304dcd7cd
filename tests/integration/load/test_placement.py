"""Models on CUDA devices: how they get there, and what is said where they cannot. There is no card: nothing runs on it."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from deepseek_optimizer import DeepSeekConfig, load_model
from deepseek_optimizer.backends.cuda import backend as cuda_backend
from deepseek_optimizer.backends.cuda import supported
from deepseek_optimizer.backends.cuda.layouts import LAYOUTS
from deepseek_optimizer.errors import BackendError, ConfigError, NotEnoughMemoryError
from deepseek_optimizer.integration.load import loader, placement, quantizer
from deepseek_optimizer.integration.load.quantizer import PackingQuantizer
from support import family_configs
from support.models import random_model
from support.pretended_card import OLD_DRIVER, pretend

pytest.importorskip("triton")
CARD = torch.device("cuda:0")


@pytest.fixture
def card(monkeypatch):
    """card(...): see `pretended_card.pretend`."""
    return partial(pretend, monkeypatch)


def ways(path):
    """The ways to a model on a card, by name; each loads one."""
    fields = {"precision": "int8", "backend": "cuda"}
    quantization = DeepSeekConfig(**fields)
    return {
        "device": lambda: load_model(path, device="cuda"),
        "backend": lambda: load_model(path, **fields),
        "device_map": lambda: LlamaForCausalLM.from_pretrained(path, device_map="cuda", quantization_config=quantization),
        "no device_map": lambda: LlamaForCausalLM.from_pretrained(path, quantization_config=quantization),
    }


@pytest.mark.parametrize("way", ["device", "backend", "device_map", "no device_map"])
def test_why_a_model_cannot_be_there(tiny_model, card, way):
    load = ways(tiny_model)[way]
    for state, said in (
        ({"failure": OLD_DRIVER}, "NVIDIA's driver is too old for torch .* update the driver"),
        ({"build": None}, "is a build for the CPU: install a build for CUDA"),
        ({"triton": False}, r'Triton is not installed: pip install "deepseek-optimizer\[cuda\]"'),
        ({"capability": (7, 5)}, 'a card has compute capability 7.5, but 8.0 .* use backend="reference"'),
    ):
        card(**state)
        with pytest.raises((BackendError, ConfigError), match=said):
            load()


def test_weights_that_do_not_fit_are_refused_before_any_are_read(tiny_model, card, monkeypatch):
    card(free=1000)
    monkeypatch.setattr(loader, "weights_for", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(NotEnoughMemoryError, match=r"the model's weights: .*cuda:0 has 80,000 MB, of which 0 MB are free"):
        load_model(tiny_model, device="cuda")
    card(free=10_000_000)
    said = "the model's weights and a KV cache of 20 MB: .* set a smaller kv_cache_memory, choose a smaller precision"
    with pytest.raises(NotEnoughMemoryError, match=said):
        load_model(tiny_model, device="cuda", kv_cache_memory=20_000_000)


def test_transformers_reads_no_weights_that_do_not_fit(tiny_model, card, monkeypatch):
    card(free=10_000_000)
    settings = DeepSeekConfig(backend="cuda", kv_cache_memory=20_000_000)
    for device_map in ("cuda", "auto", None):
        with pytest.raises(NotEnoughMemoryError, match="the model's weights and a KV cache of 20 MB: .*cuda:0 has 80,000 MB"):
            LlamaForCausalLM.from_pretrained(tiny_model, device_map=device_map, quantization_config=settings)


def test_auto_is_a_card_for_a_backend_that_needs_one(tiny_model, card):
    card(build=None)
    with pytest.raises(ConfigError, match="names a CUDA device, but none is available.*install a build for CUDA"):
        LlamaForCausalLM.from_pretrained(tiny_model, device_map="auto", quantization_config=DeepSeekConfig(backend="cuda"))
    assert PackingQuantizer(DeepSeekConfig()).update_device_map("auto") == {"": "cpu"}
    card()
    assert PackingQuantizer(DeepSeekConfig(backend="cuda")).update_device_map("auto") == {"": "cuda:0"}


def test_what_the_backend_does_not_have_is_said_before_weights_are_read(tiny_model, card, monkeypatch, tmp_path):
    """Op, family, format and cache, each with what to use instead."""
    monkeypatch.setattr(supported, "OPS", tuple(op for op in supported.OPS if op != "short_conv"))
    monkeypatch.delitem(LAYOUTS, "int3")  # as if there were no kernels for these
    random_model(family_configs.lfm2()).save_pretrained(tmp_path)
    op = "op 'short_conv' of family 'lfm2' yet; load the model with backend=.reference"
    model = load_model(tmp_path, backend="reference")
    card()
    monkeypatch.setattr(loader, "weights_for", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr(quantizer.PackWeight, "convert", lambda *_, **__: pytest.fail("weights were read"))
    for path, fields, said in (
        (tmp_path, {}, op),
        (tiny_model, {"precision": "int3"}, "cuda backend does not support weight format 'int3'; choose precision among fp32,"),
        (tiny_model, {"kv_cache": "int4"}, "cuda backend does not support KV cache dtype 'int4'; choose kv_cache among fp32,"),
    ):
        with pytest.raises(BackendError, match=said):
            load_model(path, device="cuda", **fields)
        settings = DeepSeekConfig(backend="cuda", **fields)
        with pytest.raises(BackendError, match=said):
            AutoModelForCausalLM.from_pretrained(path, device_map="cuda", quantization_config=settings)
    model.dso.config.backend = "cuda"
    with pytest.raises(BackendError, match=op):
        model._apply(lambda tensor: SimpleNamespace(device=CARD) if not tensor.numel() else pytest.fail("a weight moved"))


def test_calibration_runs_on_the_cpu(tiny_model, card):
    card()
    with pytest.raises(ConfigError, match="convert it first with `dso convert`, and load the result with device='cuda:0'"):
        load_model(tiny_model, device="cuda", kl_budget=0.1)


def test_weights_go_to_the_device_one_by_one(tiny_model):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    model.all_tied_weights_keys = {"b.weight": "a.weight"}

    def weights():
        yield "a.weight", torch.ones(2, 2)
        assert model.a.weight.is_meta
        yield "a.bias", torch.ones(2)

    loader._fill(model, weights(), torch.device("meta"))
    assert model.a.bias.is_meta and model.b.weight is model.a.weight


def test_where_models_are_placed(card):
    card()
    settings, device = placement.placed(DeepSeekConfig(), "cuda")
    assert (settings.backend, device) == ("cuda", CARD)
    assert placement.placed(DeepSeekConfig(backend="reference"), "cuda:0")[0].backend == "reference"
    assert placement.placed(DeepSeekConfig(backend="cuda"), None)[1] == CARD
    assert placement.placed(DeepSeekConfig(), None) == (DeepSeekConfig(), torch.device("cpu"))
    assert placement.placed(DeepSeekConfig(), "cpu")[0].backend == "auto"
    with pytest.raises(ConfigError, match="device='cuda:3': there are 1 CUDA devices, numbered from 0"):
        placement.parse_device("cuda:3")
    with pytest.raises(BackendError, match=r"the cpu backend cannot run a model on cuda:0; move it with model.to\('cpu'\)"):
        placement.placed(DeepSeekConfig(backend="cpu"), "cuda")
    quantizer = PackingQuantizer(DeepSeekConfig(backend="cuda"))
    assert quantizer.update_device_map(None) == {"": "cuda"} and quantizer.update_device_map({"": 0}) == {"": 0}
    assert PackingQuantizer(DeepSeekConfig()).update_device_map(None) is None


def test_graphs_are_chosen_in_the_settings(card):
    card()
    for on in (True, False):
        backend = placement.choose_backend(DeepSeekConfig(backend="cuda", cuda_graphs=on), CARD)[0]
        assert isinstance(backend, cuda_backend.CudaBackend)
        assert ("of up to 256 rows as CUDA graphs" in backend.detail) == on


def test_moving_a_model(tiny_model, card):
    """`model.to("cuda")`, which calls `_apply`: everything is checked before a weight moves."""
    model = load_model(tiny_model, kv_cache_memory=20_000_000)
    no_driver = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU."
    for state, raised, said in (
        ({"build": None}, AssertionError("Torch not compiled with CUDA enabled"), "torch .* is a build for the CPU"),
        ({"failure": no_driver}, RuntimeError(no_driver), "torch finds no CUDA device: .*Found no NVIDIA driver"),
    ):
        card(**state)
        with pytest.raises(BackendError, match=f"the model cannot move to a CUDA device: {said}"):
            model.to("cuda")  # whichever build of torch is installed
        with pytest.raises(BackendError, match=f"the model cannot move to a CUDA device: {said}"):
            model._apply(partial(_raise, raised))
    with pytest.raises(RuntimeError, match="device string: here"):
        model.to("here")
    card(free=10_000_000)
    with pytest.raises(NotEnoughMemoryError, match="the model's weights and a KV cache of 20 MB"):
        model._apply(lambda tensor: SimpleNamespace(device=CARD))
    native = load_model(tiny_model, backend="reference")
    native.dso.config.backend = "cpu"
    with pytest.raises(BackendError, match="the cpu backend cannot run a model on cuda:0"):
        native._apply(lambda tensor: SimpleNamespace(device=CARD))
    assert model.device.type == native.device.type == "cpu"
    moved = []
    native.dso.config.backend = "cuda"
    card()
    with pytest.raises(RuntimeError, match="the first weight"):
        native._apply(lambda tensor: moved.append(tensor) or _moved(tensor))
    assert [tensor.numel() > 0 for tensor in moved].count(True) == 1


def _raise(error, _):
    raise error


def _moved(tensor):
    if tensor.numel():
        raise RuntimeError("the first weight")
    return SimpleNamespace(device=CARD, dtype=tensor.dtype)
