"""Encoders through the plan: the same results as Transformers for any padding, class and argument."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn

from deepseek_optimizer import BackendError, DeepSeekConfig, DynamicGraphOptimizer
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.integration.bind.packed_model import OptimizerWarning
from support.encoders import CASES, padded, random_encoder, random_sentences
from support.models import assert_close_rows

BACKENDS = ["reference", *(["cpu"] if unavailable_reason() is None else [])]
LENGTHS = (5, 17, 1, 40)


def optimized(model, **settings):
    settings = {"precision": "fp32", **settings}
    return DynamicGraphOptimizer(copy.deepcopy(model), config=DeepSeekConfig(**settings)).optimize()


def run(model, call, **more):
    with torch.no_grad():
        return model(**call, **more)


@pytest.fixture
def quiet():
    """Fails if a call takes Transformers' forward."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", OptimizerWarning)
        yield


@pytest.fixture(scope="module")
def bert():
    plain = random_encoder("bert")
    return plain, optimized(plain)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_on_either_side(quiet, backend, case):
    plain = random_encoder(case)
    fast = optimized(plain, backend=backend)
    for left in (False, True):
        call = padded(random_sentences(*LENGTHS), left)
        expected, made = (run(model, call, output_hidden_states=True) for model in (plain, fast))
        assert type(made) is type(expected) and made.keys() == expected.keys()
        kept = call["attention_mask"].bool()
        for mine, other in zip(made.hidden_states, expected.hidden_states, strict=True):
            assert_close_rows(mine[kept], other[kept])
            assert not mine[~kept].any()
        assert torch.equal(made.last_hidden_state, run(fast, call).last_hidden_state)


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"])
@pytest.mark.parametrize("case", ["bert", "roberta", "distilbert", "modernbert"])
def test_heads(quiet, case, head):
    plain = random_encoder(case, head)
    fast = optimized(plain)
    assert type(fast) is type(plain)
    call = padded(random_sentences(*LENGTHS))
    expected, made = run(plain, call).logits, run(fast, call).logits
    kept = ... if made.ndim == 2 else call["attention_mask"].bool()
    assert (made[kept] - expected[kept]).abs().max() <= 1e-4 * expected[kept].abs().max()
    assert isinstance(run(fast, call, return_dict=False), tuple)


def test_arguments(quiet, bert):
    plain, fast = bert
    call = padded(random_sentences(*LENGTHS))
    call["token_type_ids"] = call["input_ids"] % 2
    call["position_ids"] = call["input_ids"].flip(1) + 100
    assert_close_rows(run(fast, call)[0][0, :5], run(plain, call)[0][0, :5])
    assert_close_rows(run(fast, call).pooler_output, run(plain, call).pooler_output)
    embeds = {"inputs_embeds": torch.randn(2, 7, 36), "attention_mask": None}
    assert_close_rows(run(fast, embeds)[0].flatten(0, 1), run(plain, embeds)[0].flatten(0, 1))
    some = run(fast, call, output_hidden_states=True).hidden_states
    assert len(some) == plain.config.num_hidden_layers + 1


@pytest.mark.parametrize("case", ["roberta", "distilbert", "modernbert"])
def test_embeddings_instead_of_ids(quiet, case):
    plain = random_encoder(case)
    call = {"inputs_embeds": torch.randn(2, 7, 36), "attention_mask": torch.tensor([[1] * 7, [1] * 3 + [0] * 4])}
    made, expected = run(optimized(plain), call)[0], run(plain, call)[0]
    assert_close_rows(made[1, :3], expected[1, :3])
    assert_close_rows(made[0], expected[0])


@pytest.mark.parametrize("case", ["bert", "modernbert"])
def test_holes_in_the_mask(case):
    plain = random_encoder(case)
    fast, call = optimized(plain), padded(random_sentences(30, 30))
    call["attention_mask"][0, [0, 3, 4, 11, 29]] = 0
    kept = call["attention_mask"].bool()
    assert_close_rows(run(fast, call)[0][kept], run(plain, call)[0][kept])
    # A window counts columns, so padding within it needs Transformers' forward.
    assert [note for note in fast.dso.notes if "padding lies between" in note] == fast.dso.notes
    assert bool(fast.dso.notes) == (case == "modernbert")


def test_a_row_of_padding_only(quiet, bert):
    _, fast = bert
    call = padded(random_sentences(3, 4))
    call["attention_mask"][0] = 0
    made = run(fast, call)[0]
    assert not made[0].any() and made[1].abs().sum() > 0
    call["attention_mask"][1] = 0
    assert not run(fast, call, output_hidden_states=True)[0].any()


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"output_attentions": True}, "output_attentions"),
        ({"attention_mask": torch.ones(2, 1, 6, 6).bool()}, "attention_mask is not"),
        ({"encoder_hidden_states": torch.zeros(2, 3, 36)}, "'encoder_hidden_states' is given"),
    ],
)
def test_what_transformers_forward_serves(more, reason):
    plain = random_encoder("bert", attn_implementation="eager")
    fast, call = optimized(plain), {**padded(random_sentences(6, 6)), **more}
    with pytest.warns(OptimizerWarning, match=f"{reason}.*Transformers' own forward"):
        made = run(fast, call)
    assert_close_rows(made[0].flatten(0, 1), run(plain, call)[0].flatten(0, 1))
    if "output_attentions" in more:
        assert len(made.attentions) == 3


def test_training_hooks_and_adapters(bert):
    plain, call = bert[0], padded(random_sentences(6, 3))
    fast = optimized(plain)
    embeds = torch.randn(1, 5, 36, requires_grad=True)
    with pytest.warns(OptimizerWarning, match="gradients are needed"):
        fast(inputs_embeds=embeds)[0].sum().backward()
    assert embeds.grad.abs().sum() > 0
    fast.train()
    with pytest.warns(OptimizerWarning, match="training mode"):
        run(fast, call)
    fast.eval()
    seen = []
    handle = fast.encoder.layer[1].register_forward_hook(lambda *args: seen.append(args))
    with pytest.warns(OptimizerWarning, match="forward hooks"):
        run(fast, call)
    handle.remove()
    assert len(seen) == 1 and run(fast, call)[0].isfinite().all() and len(seen) == 1


@pytest.mark.filterwarnings("ignore::deepseek_optimizer.integration.bind.packed_model.OptimizerWarning")
def test_lora():
    peft = pytest.importorskip("peft")
    fast, call = optimized(random_encoder("bert"), precision="int8"), padded(random_sentences(6, 3))
    expected, kept = run(fast, call)[0], call["attention_mask"].bool()
    adapted = peft.get_peft_model(fast, peft.LoraConfig(target_modules=["query", "value"]))
    assert (run(adapted, call)[0][kept] - expected[kept]).abs().max() < 0.01 * expected.abs().max()
    adapted(**call)[0].square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.parameters())
    assert any("adapter" in note for note in fast.dso.notes)


def test_a_head_trains_on_the_plan(quiet):
    fast = optimized(random_encoder("roberta", "ForSequenceClassification"), precision="int8")
    fast(**padded(random_sentences(6, 3)), labels=torch.tensor([0, 1])).loss.backward()
    assert fast.classifier.dense.weight.grad.abs().sum() > 0


def test_ids_and_positions_outside_the_tables(bert):
    _, fast = bert
    with pytest.raises(ValueError, match="input_ids has 99, but the model has 99 rows"):
        run(fast, {"input_ids": torch.tensor([[5, 99]])})
    with pytest.raises(ValueError, match="position_ids has 700, but the model has 700 rows"):
        run(fast, {"input_ids": torch.ones(1, 701, dtype=torch.long)})


@pytest.mark.parametrize("head", ["Model", "ForMaskedLM"])
def test_copies_and_deletion(head):
    plain = random_encoder("bert", head)
    fast, call = optimized(plain), padded(random_sentences(9, 2))
    expected = run(fast, call)[0]
    twin = copy.deepcopy(fast)
    assert twin.dso is not fast.dso and twin.dso.base is twin.base_model
    gone, base = weakref.ref(fast), fast.base_model
    gc.disable()
    try:
        del fast
        assert head == "Model" or gone() is None  # without a collection of cycles
    finally:
        gc.enable()
    assert torch.equal(run(twin, call)[0], expected)
    assert not twin.dso.notes
    if head != "Model":  # what is left of the deleted model: Transformers' forward
        assert_close_rows(run(base, call)[0][0], run(plain.base_model, call)[0][0])
        with pytest.raises(BackendError, match="was deleted"):
            copy.deepcopy(base)


def test_weights_that_change_are_compiled_again(bert):
    plain = copy.deepcopy(bert[0])
    fast, call = optimized(plain), padded(random_sentences(9, 2))
    run(fast, call)
    with torch.no_grad():
        for model in (plain, fast):
            model.encoder.layer[0].output.LayerNorm.weight.mul_(2)
    fast.dso.rebind()
    assert_close_rows(run(fast, call)[0][0], run(plain, call)[0][0])


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4", "q4_1"])
def test_formats(quiet, precision):
    """The plan gives what Transformers gives with the same rounded weights, within the rounding of activations."""
    plain = random_encoder("bert")
    fast, call = optimized(plain, precision=precision), padded(random_sentences(*LENGTHS))
    with torch.no_grad():
        for path, layer in fast.named_modules():
            if hasattr(layer, "packed"):
                plain.get_submodule(path).weight.copy_(layer.weight)
    kept = call["attention_mask"].bool()
    made, expected = run(fast, call)[0][kept], run(plain, call)[0][kept]
    cosine = nn.functional.cosine_similarity(made, expected, dim=-1)
    assert cosine.min() >= 0.999, cosine.min()


@pytest.mark.parametrize("case", ["bert", "roberta", "modernbert"])
def test_int8_embeddings_against_float(case):
    plain = random_encoder(case, hidden_size=96, num_attention_heads=4, intermediate_size=200)
    fast, call = optimized(plain, precision="int8"), padded(random_sentences(*LENGTHS))
    mask = call["attention_mask"][..., None]
    means = [(run(model, call)[0] * mask).sum(1) / mask.sum(1) for model in (plain, fast)]
    assert nn.functional.cosine_similarity(*means).min() >= 0.999


def test_the_model_keeps_its_dtype(quiet):
    plain = random_encoder("bert").bfloat16()
    fast, call = optimized(plain, precision="auto"), padded(random_sentences(4, 3))
    made = run(fast, call)
    assert made[0].dtype == made.pooler_output.dtype == torch.bfloat16
    kept = call["attention_mask"].bool()
    assert (made[0][kept].float() - run(plain, call)[0][kept].float()).abs().max() < 0.2


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_steps_and_one_give_the_same(quiet, backend):
    plain = random_encoder("modernbert")
    call = padded(random_sentences(*range(1, 40)))
    whole, parts = (run(optimized(plain, backend=backend, prefill_chunk=n), call)[0] for n in (1 << 20, 16))
    if backend == "cpu":
        assert torch.equal(whole, parts)
    kept = call["attention_mask"].bool()
    assert_close_rows(whole[kept], parts[kept])
