"""`attn_implementation="dso_train"` in Transformers' models: losses and gradients of sdpa, packed rows, padding, errors."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, MistralConfig
from transformers.models.auto import AutoModelForCausalLM

from deepseek_optimizer import UnsupportedRequestError
from deepseek_optimizer.train import attention_function as module
from deepseek_optimizer.train.attention_function import DSO_TRAIN, register_train_attention, train_mask
from deepseek_optimizer.train.ops import native
from support.models import CASES, random_model

FAMILIES = [
    "llama-gqa",
    "llama-mqa",
    "qwen2-gqa",
    "qwen2-windows",
    "qwen3-layer-types",
    "deepseek_v2-greedy",
    "deepseek_v3-groups",
]
TOKENS = 45
needs_native = pytest.mark.skipif(not native.built(), reason="no native library on this machine")


@pytest.fixture(autouse=True)
def _registered():
    register_train_attention()
    register_train_attention()  # more than once does no harm


def made(name="llama-gqa", dtype=torch.float32):
    return random_model(CASES[name]()).to(dtype)


def ids_of(model, rows=2, tokens=TOKENS):
    return torch.randint(3, model.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(2))


def step(model, implementation, ids, labels=None, **given):
    """Loss and gradients, one vector."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    loss = model(ids, labels=ids if labels is None else labels, use_cache=False, **given).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def assert_same_step(result, expected, tolerance):
    torch.testing.assert_close(result[0].float(), expected[0].float(), rtol=tolerance, atol=tolerance)
    assert float((result[1] - expected[1]).norm() / expected[1].norm()) < tolerance


def padded(ids):
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    mask[1, :3] = mask[1, -11:] = 0
    return {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def packed(ids):
    positions = torch.arange(TOKENS).repeat(2, 1)
    positions[0, 17:] -= 17
    positions[1, 1:] -= 1
    positions[1, 30:] -= 29
    return {"position_ids": positions}


@pytest.mark.parametrize("rows", [lambda ids: {}, padded, packed], ids=["whole", "padded", "packed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_equals_sdpa(name, rows):
    model = made(name)
    ids = ids_of(model)
    given = rows(ids)
    assert_same_step(step(model, DSO_TRAIN, ids, **given), step(model, "sdpa", ids, **given), 1e-5)


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3-layer-types", "deepseek_v3-direct"])
def test_a_step_in_bf16_equals_eager(name):
    """Within bf16: both round weights and results at places of their own."""
    model = made(name, torch.bfloat16)
    ids = ids_of(model)
    actual, expected = step(model, DSO_TRAIN, ids), step(model, "eager", ids)
    exact = step(model.float(), "eager", ids)
    assert float((actual[0] - exact[0]).abs() / exact[0]) < 5e-3
    if "deepseek" not in name:  # where rounding sends a token to another expert, gradients are of another network
        ours, theirs = (float((g - exact[1]).norm() / exact[1].norm()) for g in (actual[1], expected[1]))
        assert ours < 1.2 * theirs


def test_a_packed_text_equals_one_alone():
    model = made("llama-gqa")
    ids = ids_of(model, rows=1)
    labels = ids.clone()
    labels[0, [0, 17]] = -100  # a text's first token has nothing that predicts it
    positions = torch.cat((torch.arange(17), torch.arange(TOKENS - 17)))[None]
    loss, gradient = step(model, DSO_TRAIN, ids, labels, position_ids=positions)
    parts = [step(model, DSO_TRAIN, part) for part in (ids[:, :17], ids[:, 17:])]
    weights = [16 / (TOKENS - 2), (TOKENS - 18) / (TOKENS - 2)]
    alone = tuple(sum(w * p[i] for w, p in zip(weights, parts, strict=True)) for i in (0, 1))
    assert_same_step((loss, gradient), alone, 1e-5)
    bounds = torch.tensor([0, 17, TOKENS], dtype=torch.int32)
    mask = torch.ones_like(ids)  # with it Transformers doesn't look for packing; the collator's own bounds say it
    given = {
        "position_ids": positions,
        "attention_mask": mask,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": 28,
        "max_length_k": 28,
    }
    assert_same_step(step(model, DSO_TRAIN, ids, labels, **given), alone, 1e-5)


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max(
            [self.numel, *(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor))]
        )
        return out


@needs_native
@pytest.mark.parametrize(
    "rows",
    [
        lambda n: {"attention_mask": torch.tensor([[0] * 5 + [1] * (n - 5)])},
        lambda n: {"position_ids": torch.arange(n)[None] % 200},
    ],
)
def test_no_dense_mask_or_scores(rows):
    model = made("llama-gqa").base_model
    tokens = 1200
    model.set_attn_implementation(DSO_TRAIN)
    with LargestTensor() as seen:
        model(ids_of(model, 1, tokens), use_cache=False, **rows(tokens))
    assert tokens < seen.numel < tokens * tokens // 3


def test_padding_has_zero_outputs_and_gradients():
    mask = torch.tensor([[0, 0, 1, 1, 1, 0]])
    texts = train_mask(1, 6, 6, attention_mask=mask.bool())
    q, k, v = (torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3))
    out, weights = module.train_attention(torch.nn.Module(), q, k, v, texts)
    out.sum().backward()
    assert weights is None and out.shape == (1, 6, 2, 8)
    assert not out[0, mask[0] == 0].any() and out[0, mask[0] == 1].all()
    assert not v.grad[0, :, mask[0] == 0].any() and v.grad[0, :, 2].all()


def test_windows_and_chunks_follow_the_model():
    from transformers.masking_utils import chunked_causal_mask_function, sliding_window_causal_mask_function

    q, k, v = (torch.randn(2, 2, 23, 8) for _ in range(3))
    chunks = chunked_causal_mask_function(5, torch.zeros(2, dtype=torch.int64))
    for size, rule in ((5, sliding_window_causal_mask_function(5)), (5, chunks), (1, sliding_window_causal_mask_function(1))):
        row, i = torch.arange(2)[:, None, None, None], torch.arange(23)
        dense = rule(row, torch.zeros_like(row), i[:, None], i)
        given = {"mask_function": rule, "local_size": size}
        actual = module.train_attention(torch.nn.Module(), q, k, v, train_mask(2, 23, 23, **given))[0]
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, dense)
        torch.testing.assert_close(actual.transpose(1, 2), expected, rtol=1e-5, atol=1e-6)


def test_a_window_of_every_layer_and_recomputed_layers():
    torch.manual_seed(0)
    config = MistralConfig(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=2, head_dim=8, sliding_window=7)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    ids = ids_of(model)
    expected = step(model, "sdpa", ids)
    assert_same_step(step(model, DSO_TRAIN, ids), expected, 1e-5)
    model.gradient_checkpointing_enable()
    model.train()
    assert_same_step(step(model, DSO_TRAIN, ids), expected, 1e-5)


def test_generation_and_callers_masks_use_sdpa():
    model = made("llama-gqa").eval()
    ids = ids_of(model)
    full = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    full[:, :, :, 3] = False
    full[:, :, 3, 3] = True
    actual = []
    for implementation in (DSO_TRAIN, "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            model(ids[:, :20], past_key_values=cache)
            later = model(ids[:, 20:], past_key_values=cache).logits
            masked = model(ids, attention_mask=full, use_cache=False).logits
        texts = model.generate(
            ids[:, :9], attention_mask=padded(ids)["attention_mask"][:, :9], max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        actual.append((later, masked, texts))
    for a, b in zip(*actual, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_rejected_calls():
    model = made("llama-gqa").train()
    model.set_attn_implementation(DSO_TRAIN)
    ids = ids_of(model)
    mask = torch.ones_like(ids)
    mask[1, 7:9] = 0
    with pytest.raises(UnsupportedRequestError, match="zeros between the tokens of row 1"):
        model(ids, attention_mask=mask)
    with pytest.raises(UnsupportedRequestError, match="cu_seq_lens_q"):
        model(ids, cu_seq_lens_q=torch.tensor([0, TOKENS]))
    layer = model.model.layers[0].self_attn
    layer.attention_dropout = 0.1
    with pytest.raises(UnsupportedRequestError, match="LlamaAttention: dso_train has no dropout"):
        model(ids)
    q = torch.zeros(1, 2, 6, 8)
    for name in ("softcap", "s_aux", "position_bias"):
        with pytest.raises(UnsupportedRequestError, match=f"has no {name}"):
            module.train_attention(layer, q, q, q, None, **{name: 1.0})
    with pytest.raises(UnsupportedRequestError, match="the mask has 1 rows of 5 tokens"):
        module.train_attention(layer, q, q, q, train_mask(1, 5, 5))
    with pytest.raises(UnsupportedRequestError, match="causal"):
        train_mask(1, 5, 5, mask_function=lambda b, h, i, j: j <= i + 1)
