"""Native attention of models without a plan: the same as Transformers' `sdpa`, which computes the rest, on the model's own
backend."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import GPT2LMHeadModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from deepseek_optimizer import DeepSeekConfig, load_model
from deepseek_optimizer.backends.cpu import CpuBackend, unavailable_reason
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.integration.attention.native_attention import attention_of, native_attention
from support.general_models import inputs_of, random_general

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason="needs the native library")


class Layer(torch.nn.Module):
    num_key_value_groups = 2
    is_causal = True


def tensors(queries=1, dtype=torch.float32, keys=40):
    torch.manual_seed(queries)
    return (
        torch.randn(2, 4, queries, 16, dtype=dtype), torch.randn(2, 2, keys, 16, dtype=dtype),
        torch.randn(2, 2, keys, 16, dtype=dtype),
    )  # fmt: skip


@pytest.fixture
def native_calls(monkeypatch):
    """Records the backends that compute attention, one for each call."""
    calls = []

    def recorded(backend, *arguments, **options):
        calls.append(backend)
        return original(backend, *arguments, **options)

    original = CpuBackend.attend
    monkeypatch.setattr(CpuBackend, "attend", recorded)
    return calls


def compare(q, k, v, mask=None, *, native, calls, bound=1e-6, **kwargs):
    layer = Layer().eval()
    with attention_of(CpuBackend(threads=2)):
        out, weights = native_attention(layer, q, k, v, mask, **kwargs)
    expected, _ = sdpa_attention_forward(layer, q, k, v, mask, **kwargs)
    assert weights is None and out.dtype == expected.dtype and bool(calls) is native
    torch.testing.assert_close(out, expected, atol=bound, rtol=bound)


def test_one_query(native_calls):
    compare(*tensors(), native=True, calls=native_calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_and_biases(native_calls, dtype):
    q, k, v = tensors(3, dtype)
    hidden = torch.rand(2, 1, 3, 40) < 0.3
    bound = 1e-6 if dtype == torch.float32 else 2e-2
    compare(q, k, v, ~hidden, native=True, calls=native_calls, bound=bound)
    numbers = torch.zeros(2, 1, 3, 40, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
    compare(q, k, v, numbers, native=True, calls=native_calls, scaling=1.0, bound=bound)
    bias = torch.randn(1, 4, 3, 40, dtype=dtype)
    compare(q, k, v, ~hidden, native=True, calls=native_calls, position_bias=bias, bound=bound)


@pytest.mark.parametrize("queries", [3, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_queries_whose_keys_are_all_masked_alike(native_calls, dtype, queries):
    """As rows of padding have them: the lowest number everywhere."""
    q, k, v = tensors(queries, dtype)
    mask = torch.zeros(2, 1, queries, 40, dtype=dtype)
    mask[:, :, 1] = torch.finfo(dtype).min
    compare(q, k, v, mask, native=True, calls=native_calls, bound=2e-6 if dtype == torch.float32 else 2e-2)


def test_in_training_sdpa_computes(native_calls):
    """Also without gradients, as the first run of a layer whose activations are computed again for the backward pass."""
    layer, (q, k, v) = Layer().train(), tensors(20)
    with torch.no_grad(), attention_of(CpuBackend(threads=2)):
        out, _ = native_attention(layer, q, k, v, None, is_causal=False)
    assert not native_calls
    assert torch.equal(out, sdpa_attention_forward(layer, q, k, v, None, is_causal=False)[0])


@pytest.mark.parametrize("queries", [4, 20, 130])
@pytest.mark.parametrize("causal", [None, True, False])
@pytest.mark.parametrize("biased", [False, True])
def test_several_queries_without_a_mask(native_calls, causal, queries, biased):
    bias = {"position_bias": torch.randn(1, 4, queries, queries)} if biased else {}
    compare(*tensors(queries, keys=queries), native=True, calls=native_calls, is_causal=causal, bound=2e-6, **bias)


def test_an_empty_static_cache(native_calls):
    """sdpa leaves out the keys after the prompt."""
    compare(*tensors(20), native=False, calls=native_calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prompts_with_masks_and_biases(native_calls, dtype):
    q, k, v = tensors(100, dtype, keys=140)
    hidden = torch.rand(2, 1, 100, 140) < 0.3
    bound = 2e-6 if dtype == torch.float32 else 2e-2
    compare(q, k, v, ~hidden, native=True, calls=native_calls, bound=bound)
    bias = torch.randn(1, 4, 100, 140, dtype=dtype)
    compare(q, k, v, ~hidden, native=True, calls=native_calls, position_bias=bias, bound=bound)


@pytest.mark.parametrize("queries", [1, 20])
def test_keys_of_all_sequences(native_calls, queries):
    q, k, v = tensors(queries, keys=queries)
    compare(q, k[:1], v[:1], native=False, calls=native_calls)


@pytest.mark.parametrize("case", ["float64", "gradient", "autocast"])
def test_sdpa_computes_the_rest(native_calls, case):
    q, k, v = tensors(1, torch.float64 if case == "float64" else torch.float32)
    if case == "gradient":
        q.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        compare(q, k, v, native=False, calls=native_calls)


@pytest.mark.parametrize("name", ["gpt2", "opt", "t5", "bart", "whisper"])
def test_generate_equals_transformers(tmp_path, native_calls, name):
    plain = random_general(name)
    plain.save_pretrained(tmp_path)
    fast = load_model(tmp_path, precision="fp32")
    assert fast.report().native_attention and "attention" in str(fast.report())
    call = {k: v for k, v in inputs_of(plain).items() if not k.startswith("decoder")}
    kwargs = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    ours, theirs = fast.generate(**call, **kwargs), plain.generate(**call, **kwargs)
    assert native_calls and torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.scores, theirs.scores, strict=True):
        finite = b.isfinite()
        assert (a - b)[finite].abs().max() <= 1e-4 * b[finite].abs().max()


def loaded(path, name, **settings):
    plain = random_general(name)
    plain.save_pretrained(path)
    return load_model(path, precision="fp32", **settings), inputs_of(plain)


def test_runs_on_the_backend_of_the_model(tmp_path, native_calls):
    """Also where one model calls another one with other settings, and in threads."""
    outer, call = loaded(tmp_path / "outer", "gpt2", threads=1)
    inner, _ = loaded(tmp_path / "inner", "gpt2", threads=2, isa="avx2")

    def hook(*arguments):
        inner(**call)

    outer.transformer.h[1].register_forward_hook(hook)
    assert outer.dso.backend.context is not inner.dso.backend.context
    with torch.no_grad(), ThreadPoolExecutor(2) as pool:
        for model in (outer, inner):
            results = list(pool.map(lambda _, model=model: model(**call).logits, range(4)))
            assert all(torch.equal(result, results[0]) for result in results)
        native_calls.clear()
        outer(**call)
    own, other = outer.dso.backend, inner.dso.backend
    assert native_calls == [own, own, other, other]


def test_memory_of_results_is_that_of_the_models_backend(tmp_path, monkeypatch):
    """It is returned to the system after the model's forward."""
    fast, call = loaded(tmp_path, "gpt2", threads=1)
    outputs, sizes, trimmed = fast.dso.backend.context.outputs, [], []
    empty = outputs.empty
    monkeypatch.setattr(outputs, "empty", lambda *a, **k: sizes.append(a[0]) or empty(*a, **k))
    monkeypatch.setattr(outputs, "trim", lambda: trimmed.append(len(sizes)))
    with torch.no_grad():
        fast(**call)
    batch, tokens = call["input_ids"].shape
    heads = fast.config.n_head
    assert sizes.count((batch, tokens, heads, fast.config.n_embd // heads)) == fast.config.n_layer
    assert trimmed == [len(sizes)]


def test_outside_of_the_models_methods_sdpa_computes(tmp_path, native_calls):
    fast, call = loaded(tmp_path, "gpt2")
    with torch.no_grad():
        alone = fast.transformer(**call)[0]
        assert not native_calls
        with attention_of(ReferenceBackend()):
            assert torch.equal(fast.transformer(**call)[0], alone)
        assert not native_calls
        states = fast(**call, output_hidden_states=True).hidden_states[-1]
    assert len(native_calls) == fast.config.n_layer
    torch.testing.assert_close(states, alone, rtol=1e-4, atol=1e-5)


def test_other_implementations_are_kept(tmp_path):
    plain = random_general("gpt2")
    plain.save_pretrained(tmp_path)
    config = DeepSeekConfig(precision="fp32")
    fast = GPT2LMHeadModel.from_pretrained(tmp_path, quantization_config=config, attn_implementation="eager")
    assert fast.config._attn_implementation == "eager" and not fast.report().native_attention
