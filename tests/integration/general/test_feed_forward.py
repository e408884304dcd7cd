"""Feed-forward blocks and norms that run natively: which are recognized, and when Transformers' own forward runs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel, Gemma3nForCausalLM, Gemma3nTextConfig

from deepseek_optimizer import BackendError, load_model
from deepseek_optimizer.backends.cpu import CpuBackend, unavailable_reason
from deepseek_optimizer.integration.bind.packed_model import NoCopyCallable
from deepseek_optimizer.integration.general.feed_forward import FusedFeedForward, fuse_feed_forward
from deepseek_optimizer.integration.general.modules import GeneralLinear
from deepseek_optimizer.integration.general.norms import FusedNorm, fuse_norms
from support.general_models import inputs_of, random_general

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason="needs the native library")


def loaded(name, tmp_path, **fields):
    plain = random_general(name, **fields)
    plain.save_pretrained(tmp_path)
    return plain, load_model(tmp_path, precision="fp32")


@pytest.mark.parametrize(
    ("name", "fields", "blocks", "norms"),
    [
        ("gpt2", {}, 2, 5), ("t5", {}, 4, 12), ("t5", {"feed_forward_proj": "gated-gelu"}, 4, 12), ("gpt_neox", {}, 2, 5),
        ("phi", {}, 2, 3), ("bloom", {}, 0, 6), ("opt", {}, 0, 5),
    ],
)  # fmt: skip
def test_what_is_recognized(tmp_path, name, fields, blocks, norms):
    plain, fast = loaded(name, tmp_path, **fields)
    assert sum(isinstance(module, FusedFeedForward) for module in fast.modules()) == blocks
    assert sum(isinstance(module, FusedNorm) for module in fast.modules()) == norms
    kinds = [type(module).__name__ for module in plain.modules() if not isinstance(module, nn.Linear)]
    ours = [type(module).__name__ for module in fast.modules() if isinstance(module, (FusedFeedForward, FusedNorm))]
    assert set(ours) <= set(kinds)
    with torch.no_grad():
        call = inputs_of(plain)
        ours, theirs = fast(**call)[0], plain(**call)[0]
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


class Block(nn.Module):
    """A feed-forward block whose forward has something more."""

    def __init__(self, extra, cpu):
        super().__init__()
        self.up, self.down, self.act = packed(cpu, 32, 48), packed(cpu, 48, 32), nn.ReLU()
        self.drop = nn.Dropout(0.0)
        self.extra, self.calls = extra, 0

    def forward(self, x):
        self.calls += 1
        return self.extra(x, self.drop(self.down(self.act(self.up(x)))))


def packed(cpu, cols, rows, seed=0, scale=1.0):
    layer = GeneralLinear(cols, rows, "fp32", bias=True, dtype=torch.float32)
    generator = torch.Generator().manual_seed(cols + seed)
    weight = scale * torch.randn(rows, cols, generator=generator)
    layer._parameters["weight"] = nn.Parameter(cpu.pack(weight, "fp32"), requires_grad=False)
    layer.bias.data = torch.randn(rows, generator=generator)
    layer.product = NoCopyCallable(cpu.linear)
    return layer


@pytest.mark.parametrize(
    ("extra", "fits"),
    [
        (lambda x, y: y, True), (lambda x, y: x + y, False), (lambda x, y: 1.1 * y, False), (lambda x, y: (y,), False),
        (lambda x, y: y.to(torch.bfloat16), False), (lambda x, y: y[..., :3], False),
    ],
    ids=["block", "residual", "scaled", "tuple", "dtype", "shape"],
)  # fmt: skip
def test_blocks_that_compute_something_else_stay(extra, fits):
    cpu = CpuBackend(threads=1)
    model = nn.Sequential(Block(extra, cpu)).eval()
    fuse_feed_forward(model, cpu.feed_forward)
    assert isinstance(model[0], FusedFeedForward) is fits and isinstance(model[0], Block)


class Gated(nn.Module):
    """A gated block whose gate is not its first layer."""

    def __init__(self, cpu):
        super().__init__()
        self.up, self.gate, self.down, self.act = (
            packed(cpu, 32, 48),
            packed(cpu, 32, 48, seed=1),
            packed(cpu, 48, 32),
            nn.SiLU(),
        )

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("bias", [0.0, 1e6])
def test_blocks_without_effect_tell_nothing_about_others(bias):
    """The first block of a kind shows how its class connects the layers, unless its results are equal for all rows."""
    cpu = CpuBackend(threads=1)
    model = nn.Sequential(Gated(cpu), Gated(cpu)).eval()
    model[0].down = packed(cpu, 48, 32, scale=0.0)
    model[0].down.bias.data.fill_(bias)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model[1](x)
        fuse_feed_forward(model, cpu.feed_forward)
        torch.testing.assert_close(model[1](x), expected)
        fuse_feed_forward(whole := nn.Sequential(Gated(cpu)).eval(), cpu.feed_forward)
    assert isinstance(whole[0], FusedFeedForward)


class Sparse(Block):
    """A block with a setting of its own, which its parts do not show."""

    def __init__(self, cpu, sparsity):
        super().__init__(None, cpu)
        self.sparsity = sparsity

    def forward(self, x):
        return self.down(self.act(self.up(x) - self.sparsity))


@pytest.mark.parametrize("sparsities", [(0.0, 0.95), (0.95, 0.0)])
def test_blocks_with_other_settings_are_not_alike(sparsities):
    cpu = CpuBackend(threads=1)
    model = nn.Sequential(*(Sparse(cpu, sparsity) for sparsity in sparsities)).eval()
    fuse_feed_forward(model, cpu.feed_forward)
    assert [isinstance(block, FusedFeedForward) for block in model] == [sparsity == 0 for sparsity in sparsities]


def test_gemma_3n_with_sparse_layers_after_dense_ones(tmp_path):
    config = Gemma3nTextConfig(
        vocab_size=99, vocab_size_per_layer_input=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, hidden_size_per_layer_input=8, laurel_rank=4,
        layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=0, activation_sparsity_pattern=[0.0, 0.95],
    )  # fmt: skip
    torch.manual_seed(0)
    plain = Gemma3nForCausalLM(config).eval()
    plain.save_pretrained(tmp_path)
    fast, x = load_model(tmp_path, precision="fp32"), torch.randn(1, 5, 32)
    for ours, theirs, fused in zip(fast.model.layers, plain.model.layers, (True, False), strict=True):
        assert isinstance(ours.mlp, FusedFeedForward) is fused
        with torch.no_grad():
            torch.testing.assert_close(ours.mlp(x), theirs.mlp(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "t5", "phi"])
def test_blocks_of_a_loaded_model_run_natively(tmp_path, name):
    """With activations that run on several threads elsewhere."""
    plain = random_general(name)
    plain.save_pretrained(tmp_path)
    fast, calls = load_model(tmp_path, precision="fp32", threads=2), []
    for module in fast.modules():
        if isinstance(module, FusedFeedForward):
            fused = module.fused
            module.fused = NoCopyCallable(lambda *a, fused=fused, **k: calls.append(a) or fused(*a, **k))
    with torch.no_grad():
        fast(**inputs_of(plain))
    assert len(calls) == sum(isinstance(module, FusedFeedForward) for module in fast.modules())


def hooked(block):
    block.up.register_forward_hook(lambda *arguments: None)


def activation_hooked(block):
    block.act.register_forward_pre_hook(lambda *arguments: None)


def dropout_alone(block):
    """As for estimates of uncertainty from several samples."""
    block.drop.train()


def wrapped(block):
    block.down = nn.Sequential(block.down)


def without_function(block):
    block.fused = None


@pytest.mark.parametrize(
    "change", [hooked, activation_hooked, dropout_alone, wrapped, without_function, nn.Module.train, "gradient", None]
)
def test_when_the_original_forward_runs(change):
    cpu = CpuBackend(threads=1)
    block = Block(lambda x, y: y, cpu).eval()
    fuse_feed_forward(nn.Sequential(block), cpu.feed_forward)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = block(x)
        block = copy.deepcopy(block)
        before = block.calls
        if callable(change):
            change(block)
    x.requires_grad_(change == "gradient")
    result = block(x)
    assert block.calls - before == (change is not None)
    torch.testing.assert_close(result.detach(), expected)
    if change == "gradient":
        result.sum().backward()
        assert x.grad.abs().sum() > 0


class Norm(nn.Module):
    def __init__(self, offset):
        super().__init__()
        self.weight, self.eps, self.offset, self.calls = nn.Parameter(torch.linspace(-1, 1, 64)), 1e-6, offset, 0

    def forward(self, x):
        self.calls += 1
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (self.offset + self.weight)


@pytest.mark.parametrize("offset", [0, 1])
def test_rms_norms_are_recognized_by_their_results(offset):
    module = Norm(offset).requires_grad_(False)
    fuse_norms(nn.Sequential(module), CpuBackend(threads=1).norm)
    assert isinstance(module, FusedNorm) is (offset == 0)
    x = torch.randn(1024, 64, generator=torch.Generator().manual_seed(0))
    before, result = module.calls, module(x)
    assert module.calls - before == offset
    torch.testing.assert_close(result, Norm.forward(module, x))
    for other in (x[:3], x.double(), x.clone().requires_grad_()):  # small, of another dtype, with a gradient
        before, result = module.calls, module(other)
        assert module.calls == before + 1
        torch.testing.assert_close(result, Norm.forward(module, other))
        assert result.requires_grad is other.requires_grad


def test_the_cache_of_a_prompt_is_not_copied(tmp_path):
    plain, fast = loaded("t5", tmp_path)
    call = inputs_of(plain)
    with torch.no_grad():
        ours, theirs = fast(**call, use_cache=True), plain(**call, use_cache=True)
        token = {"decoder_input_ids": call["decoder_input_ids"][:, -1:], "encoder_outputs": (ours.encoder_last_hidden_state,)}
        for cache, expected in zip(_states(ours.past_key_values), _states(theirs.past_key_values), strict=True):
            torch.testing.assert_close(cache, expected, rtol=1e-4, atol=1e-5)
        next_ours = fast(**token, past_key_values=ours.past_key_values).logits
        next_theirs = plain(**token, past_key_values=theirs.past_key_values).logits
        torch.testing.assert_close(next_ours, next_theirs, rtol=1e-4, atol=1e-4)
        assert fast(**call, use_cache=False).past_key_values is None


def test_a_loss_has_no_cache_and_pairs_of_models_create_their_own(tmp_path):
    plain, fast = loaded("bart", tmp_path / "bart")
    call = inputs_of(plain)
    call["labels"] = call.pop("decoder_input_ids").clone()
    with torch.no_grad():
        assert fast(**call).keys() == plain(**call).keys()
    side = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 64}
    decoder = BertConfig(is_decoder=True, add_cross_attention=True, **side)
    pair = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**side), decoder)).eval()
    pair.save_pretrained(tmp_path / "pair")
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        ours = load_model(tmp_path / "pair", precision="fp32")(input_ids=ids, decoder_input_ids=ids)
        theirs = pair(input_ids=ids, decoder_input_ids=ids)
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)


def test_pickles_are_refused_with_a_remedy(tmp_path):
    _, fast = loaded("gpt2", tmp_path)
    assert isinstance(fast.transformer.h[0].mlp, FusedFeedForward) and isinstance(fast.transformer.ln_f, FusedNorm)
    for module in (fast, fast.transformer.h[0].mlp, fast.transformer.ln_f):
        with pytest.raises(BackendError, match="save_pretrained"):
            pickle.dumps(module)


def _states(cache):
    return [
        states for side in (cache.self_attention_cache, cache.cross_attention_cache) for layer in side.layers
        for states in (layer.keys, layer.values)
    ]  # fmt: skip
