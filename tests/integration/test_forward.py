"""model(...): the same outputs as Transformers, by the plan or by Transformers' forward over packed modules."""

from __future__ import annotations

import copy
import gc
import inspect
import warnings

import pytest
import torch
from transformers import DynamicCache

from deepseek_optimizer import DeepSeekConfig, DynamicGraphOptimizer, PagedCache, UnsupportedRequestError
from deepseek_optimizer.backends.base import DECODE, PREFILL
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.integration.bind.runtime import OptimizerWarning
from deepseek_optimizer.integration.compat import cache_name
from support.models import CASES, assert_close_rows, native_cases, random_model

from .conftest import check_indexed_hidden_states, make_pair


def cache_of(output):
    return getattr(output, cache_name())


@pytest.fixture
def phases(monkeypatch):
    """Records the phase of every step of the plan."""
    seen = []

    def watch(model):
        run = model.dso.plan.run
        monkeypatch.setattr(
            model.dso.plan, "run", lambda batch, store: (seen.append(batch.phase.tolist()), run(batch, store))[1]
        )
        return seen

    return watch


@pytest.mark.parametrize("case", native_cases())
@torch.no_grad()
def test_logits_equal_transformers_on_every_family(case):
    pair = make_pair(case)
    ids = pair.ids(60, 60)
    fast, plain = pair.fast(ids), pair.plain(ids)
    assert type(fast) is type(plain)
    assert_close_rows(fast.logits, plain.logits)


@torch.no_grad()
def test_outputs_have_transformers_fields(pair):
    ids = pair.ids(9)
    fast, plain = pair.fast(ids), pair.plain(ids)
    assert type(fast) is type(plain)
    assert fast.keys() == plain.keys()
    assert fast.logits.shape == plain.logits.shape
    assert isinstance(cache_of(fast), PagedCache)
    assert cache_of(pair.fast(ids, use_cache=False)) is None


def test_the_signature_is_that_of_the_class(pair):
    assert inspect.signature(pair.fast.forward) == inspect.signature(pair.plain.forward)
    assert inspect.signature(pair.fast.generate) == inspect.signature(pair.plain.generate)


@torch.no_grad()
def test_positional_arguments_and_tuple(pair):
    ids = pair.ids(7)
    made = pair.fast(ids, torch.ones_like(ids), return_dict=False)
    assert isinstance(made, tuple)
    assert_close_rows(made[0], pair.plain(ids, return_dict=False)[0])


@pytest.mark.parametrize("keep", [0, 1, 3, 100, -4, -11, torch.tensor([0, 4]), torch.tensor([5, 2, 2]), torch.tensor([-1])])
@torch.no_grad()
def test_logits_to_keep(pair, keep):
    ids = pair.ids(11, 11)
    assert_close_rows(pair.fast(ids, logits_to_keep=keep).logits, pair.plain(ids, logits_to_keep=keep).logits)


@torch.no_grad()
def test_inputs_embeds(pair):
    ids = pair.ids(8, 8)
    embeds = pair.plain.get_input_embeddings()(ids)
    assert torch.equal(pair.fast.get_input_embeddings()(ids), embeds)
    assert_close_rows(pair.fast(inputs_embeds=embeds).logits, pair.plain(ids).logits)


@torch.no_grad()
def test_labels_give_transformers_loss(pair):
    ids = pair.ids(12, 12)
    labels = ids.clone()
    labels[:, :3] = -100
    fast, plain = pair.fast(ids, labels=labels), pair.plain(ids, labels=labels)
    torch.testing.assert_close(fast.loss, plain.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        pair.fast(ids, labels=labels, num_items_in_batch=7).loss, pair.plain(ids, labels=labels, num_items_in_batch=7).loss
    )


@torch.no_grad()
def test_hidden_states(pair):
    ids = pair.ids(6, 6)
    fast, plain = (m(ids, output_hidden_states=True).hidden_states for m in (pair.fast, pair.plain))
    assert isinstance(fast, tuple)
    assert len(fast) == len(plain)
    for a, b in zip(fast, plain, strict=True):
        assert a.dtype == b.dtype
        assert_close_rows(a, b)


@pytest.mark.parametrize("requested", [[1], [0, -1], 2, [7], []])
@torch.no_grad()
def test_hidden_states_by_index(pair, requested):
    check_indexed_hidden_states(pair, requested)


@torch.no_grad()
def test_position_ids(pair):
    ids = pair.ids(5, 5)
    positions = torch.tensor([[3, 4, 5, 6, 7], [0, 2, 4, 6, 8]])
    assert_close_rows(pair.fast(ids, position_ids=positions).logits, pair.plain(ids, position_ids=positions).logits)
    assert_close_rows(pair.fast(ids, position_ids=positions[:1]).logits, pair.plain(ids, position_ids=positions[:1]).logits)


@torch.no_grad()
def test_fractional_positions_are_not_rounded(fresh_pair):
    ids, positions = fresh_pair.ids(5), torch.tensor([[0.5, 1.5, 2.5, 3.5, 4.75]])
    with pytest.warns(OptimizerWarning, match="position_ids is not a 2-D tensor of integers"):
        fast = fresh_pair.fast(ids, position_ids=positions, use_cache=False).logits
    assert_close_rows(fast, fresh_pair.plain(ids, position_ids=positions, use_cache=False).logits)


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@torch.no_grad()
def test_padding_is_skipped_and_changes_nothing(pair, side):
    ids, mask = pair.ids(13, 5, 9), pair.mask(13, 5, 9)
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    if side == "holes":
        mask[:, 6] = 0
        mask[0] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    fast, plain = (m(ids, attention_mask=mask, position_ids=positions).logits for m in (pair.fast, pair.plain))
    real = mask.bool()
    assert_close_rows(fast[real], plain[real])
    assert not fast[~real].any()


@torch.no_grad()
def test_a_row_is_the_same_alone_and_padded(pair):
    ids, mask = pair.ids(13, 5), pair.mask(13, 5)
    together = pair.fast(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits[1, -5:]
    assert torch.equal(together, pair.fast(ids[1:, -5:]).logits[0])


@pytest.mark.parametrize("chunk", [1, 7, 32, 50])
@torch.no_grad()
def test_chunked_prefill_is_the_same_bit_for_bit(chunk):
    whole, chunked = make_pair().fast, make_pair(prefill_chunk=chunk).fast
    ids = torch.randint(0, 211, (2, 45), generator=torch.Generator().manual_seed(1))
    a, b = (m(ids, output_hidden_states=True) for m in (whole, chunked))
    assert_close_rows(b.logits, a.logits)
    assert_close_rows(torch.stack(b.hidden_states), torch.stack(a.hidden_states))
    assert_close_rows(chunked(ids, logits_to_keep=2).logits, a.logits[:, -2:])


@torch.no_grad()
def test_continuing_with_a_cache_equals_one_call(pair):
    ids = pair.ids(40, 40)
    whole = pair.plain(ids).logits
    first = pair.fast(ids[:, :21])
    cache = cache_of(first)
    second = pair.fast(ids[:, 21:39], **{cache_name(): cache})
    third = pair.fast(ids[:, 39:], **{cache_name(): cache})
    assert cache_of(third) is cache
    assert cache.get_seq_length() == 40
    assert_close_rows(torch.cat([first.logits, second.logits, third.logits], 1), whole)


@torch.no_grad()
def test_both_names_of_the_cache_work(pair):
    ids = pair.ids(6)
    for name in ("cache", "past_key_values"):
        cache = PagedCache(pair.fast)
        assert cache_of(pair.fast(ids, **{name: cache})) is cache


@torch.no_grad()
def test_continuing_with_padding(pair):
    ids, mask = pair.ids(10, 4), pair.mask(10, 4)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = PagedCache(pair.fast)
    pair.fast(ids[:, :8], attention_mask=mask[:, :8], position_ids=positions[:, :8], cache=cache)
    end = pair.fast(ids[:, 8:], attention_mask=mask, position_ids=positions[:, 8:], cache=cache)
    whole = pair.plain(ids, attention_mask=mask, position_ids=positions)
    assert_close_rows(end.logits, whole.logits[:, 8:])
    with pytest.raises(UnsupportedRequestError, match="differs from the one"):
        pair.fast(ids[:, :1], attention_mask=torch.ones(2, 11), cache=cache)


@torch.no_grad()
def test_phases(fresh_pair, phases):
    model, ids = fresh_pair.fast, fresh_pair.ids(5)
    seen = phases(model)
    cache = PagedCache(model)
    model(ids, cache=cache)
    model(ids[:, :1], cache=cache)
    model(ids[:, :3], cache=cache)
    cache.activate_past_recording()
    model(ids[:, :3], cache=cache)  # the prompt of an assisted call
    model(ids[:, :3], cache=cache)  # verification
    assert [s[0] for s in seen] == [PREFILL, DECODE, PREFILL, PREFILL, DECODE]


@torch.no_grad()
def test_batch_invariant_is_all_decode(phases):
    pair = make_pair(batch_invariant=True)
    seen = phases(pair.fast)
    pair.fast(pair.ids(5))
    assert seen == [[DECODE]]


# ---- calls that the plan does not support


def fallback(pair, reason, *args, **kwargs):
    """Transformers' forward is used, with one warning that gives the reason; a second call has none."""
    with pytest.warns(OptimizerWarning, match=reason):
        made = pair.fast(*args, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error", OptimizerWarning)
        pair.fast(*args, **kwargs)
    assert any(reason in note for note in pair.fast.dso.notes)
    return made


@torch.no_grad()
def test_output_attentions(fresh_pair):
    ids = fresh_pair.ids(6)
    made = fallback(fresh_pair, "output_attentions", ids, output_attentions=True)
    plain = fresh_pair.plain(ids, output_attentions=True)
    assert len(made.attentions) == len(plain.attentions)
    torch.testing.assert_close(made.attentions[0], plain.attentions[0])
    assert_close_rows(made.logits, plain.logits)


@torch.no_grad()
def test_the_plan_is_used_again_after_output_attentions(fresh_pair):
    """Transformers does not remove its recording hooks from the modules."""
    ids = fresh_pair.ids(6)
    fresh_pair.fast(ids, output_attentions=True)
    assert isinstance(cache_of(fresh_pair.fast(ids)), PagedCache)


@torch.no_grad()
def test_attention_to_later_tokens(fresh_pair):
    ids = fresh_pair.ids(6)
    made = fallback(fresh_pair, "is_causal", ids, is_causal=False)
    assert_close_rows(made.logits, fresh_pair.plain(ids, is_causal=False).logits)
    fresh_pair.fast.config.is_causal = False
    assert cache_of(fresh_pair.fast(ids, use_cache=False)) is None
    assert_close_rows(fresh_pair.fast(ids, use_cache=False).logits, made.logits)


@torch.no_grad()
def test_router_logits():
    pair = make_pair("deepseek_v3-groups")
    for model in (pair.fast, pair.plain):
        model.config.output_router_logits = True
    ids = pair.ids(6)
    expected = getattr(pair.plain(ids), "router_logits", None)
    with pytest.warns(OptimizerWarning, match="output_router_logits"):
        made = getattr(pair.fast(ids), "router_logits", None)
    assert (made is None) == (expected is None)  # Transformers before 5.24 returned none
    assert expected is None or len(made) == len(expected) > 0


@torch.no_grad()
def test_four_dimensional_mask(fresh_pair):
    ids = fresh_pair.ids(6)
    mask = torch.zeros(1, 1, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), torch.finfo(torch.float32).min)
    mask[..., 3:, 0] = torch.finfo(torch.float32).min
    made = fallback(fresh_pair, "2-D", ids, attention_mask=mask)
    assert_close_rows(made.logits, fresh_pair.plain(ids, attention_mask=mask).logits)


@torch.no_grad()
def test_foreign_cache(fresh_pair):
    ids = fresh_pair.ids(9)
    with pytest.warns(OptimizerWarning, match="DynamicCache"):
        first = fresh_pair.fast(ids[:, :5], **{cache_name(): DynamicCache()})
    second = fresh_pair.fast(ids[:, 5:], **{cache_name(): cache_of(first)})
    assert isinstance(cache_of(second), DynamicCache)
    assert_close_rows(second.logits, fresh_pair.plain(ids).logits[:, 5:])


@torch.no_grad()
def test_hooks_on_inner_modules_run_and_can_be_removed(fresh_pair):
    ids, seen = fresh_pair.ids(4), []
    handle = fresh_pair.fast.model.layers[1].mlp.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    made = fallback(fresh_pair, "hooks", ids)
    assert seen
    assert_close_rows(made.logits, fresh_pair.plain(ids).logits)
    handle.remove()
    count = len(seen)
    assert isinstance(cache_of(fresh_pair.fast(ids)), PagedCache)
    assert len(seen) == count


@torch.no_grad()
def test_hooks_on_the_model_itself_keep_the_plan(fresh_pair):
    seen = []
    fresh_pair.fast.register_forward_hook(lambda m, args, out: seen.append(1))
    assert isinstance(cache_of(fresh_pair.fast(fresh_pair.ids(4))), PagedCache)
    assert seen == [1]


@torch.no_grad()
def test_replaced_module(fresh_pair):
    class Twice(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    for model in (fresh_pair.plain, fresh_pair.fast):
        model.model.layers[0].mlp.down_proj = Twice(model.model.layers[0].mlp.down_proj)
    ids = fresh_pair.ids(4)
    assert_close_rows(fallback(fresh_pair, "replaced", ids).logits, fresh_pair.plain(ids).logits)


def test_gradients_in_the_input(fresh_pair):
    ids = fresh_pair.ids(5)
    grads = []
    for model in (fresh_pair.plain, fresh_pair.fast):
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embeds, labels=ids).loss.backward()
        grads.append(embeds.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-5)


def test_no_gradient_by_default(pair):
    """Grad mode is on outside `no_grad`, but no parameter of an optimized model is trainable, so the plan is used."""
    assert torch.is_grad_enabled()
    made = pair.fast(pair.ids(4))
    assert isinstance(cache_of(made), PagedCache)
    assert not made.logits.requires_grad


@torch.no_grad()
def test_a_paged_cache_cannot_be_used_by_transformers_forward(fresh_pair):
    cache, ids = PagedCache(fresh_pair.fast), fresh_pair.ids(4)
    fresh_pair.fast(ids, cache=cache)
    with pytest.raises(UnsupportedRequestError, match="output_attentions.*DynamicCache"):
        fresh_pair.fast(ids, cache=cache, output_attentions=True)
    with pytest.raises(UnsupportedRequestError, match="DynamicCache"):
        fresh_pair.plain(ids, **{cache_name(): cache})


# ---- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"input_ids": torch.empty(1, 0, dtype=torch.long)}, "empty"),
        ({"input_ids": torch.tensor([[0, 211]])}, "211 is outside the vocabulary of 211"),
        ({"input_ids": torch.tensor([[-1]])}, "-1 is outside the vocabulary"),
        ({"input_ids": torch.tensor([[1.5]])}, "must be integers, got torch.float32"),
        ({"input_ids": [[1]]}, "must be a tensor"),
        ({}, "exactly one"),
        ({"input_ids": torch.tensor([[1]]), "inputs_embeds": torch.zeros(1, 1, 72)}, "exactly one"),
        ({"input_ids": torch.tensor([[1]]), "position_ids": torch.tensor([[4096]])}, "context of 4096"),
        ({"input_ids": torch.tensor([[1]]), "position_ids": torch.tensor([[-1]])}, "position -1 is outside"),
        ({"input_ids": torch.zeros(1, 4097, dtype=torch.long)}, "context of 4096"),
        ({"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 3)}, "attention_mask has shape"),
        (
            {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.tensor([[1, torch.nan]])},
            "attention_mask contains NaN",
        ),
        ({"input_ids": torch.tensor([[1, 2]]), "logits_to_keep": torch.tensor([2])}, "outside the 2"),
    ],
)
@torch.no_grad()
def test_invalid_calls(pair, call, message):
    with pytest.raises(ValueError, match=message):
        pair.fast(**call)


@torch.no_grad()
def test_an_error_does_not_change_the_cache(fresh_pair, monkeypatch):
    model, ids = fresh_pair.fast, fresh_pair.ids(50)
    cache = PagedCache(model)
    model(ids[:, :40], cache=cache)
    run = model.dso.plan.run
    monkeypatch.setattr(model.dso.plan, "run", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    free = model.dso.arena.manager.free_blocks
    with pytest.raises(RuntimeError, match="broken"):
        model(ids[:, 40:], cache=cache)
    assert cache.get_seq_length() == 40
    assert model.dso.arena.manager.free_blocks == free
    monkeypatch.setattr(model.dso.plan, "run", run)
    assert_close_rows(model(ids[:, 40:], cache=cache).logits, fresh_pair.plain(ids).logits[:, 40:])


# ---- the model as an object


@torch.no_grad()
def test_deepcopy_is_independent(fresh_pair):
    ids = fresh_pair.ids(6)
    twin = copy.deepcopy(fresh_pair.fast)
    before = twin(ids).logits
    assert twin.dso is not fresh_pair.fast.dso
    assert twin.dso.model is twin
    fresh_pair.fast.model.norm.weight.data.zero_()
    fresh_pair.fast.dso.rebind()
    assert not fresh_pair.fast(ids).logits.any()
    assert torch.equal(twin(ids).logits, before)
    handle = twin.model.layers[0].register_forward_hook(lambda *a: None)
    with pytest.warns(OptimizerWarning, match="hooks"):
        twin(ids)
    handle.remove()


@torch.no_grad()
def test_state_dict_round_trip(fresh_pair):
    ids = fresh_pair.ids(6)
    other = make_pair().fast
    for parameter in other.parameters():
        parameter.data.zero_()
    other.dso.rebind()
    assert not torch.equal(other(ids).logits, fresh_pair.fast(ids).logits)
    for assign in (False, True):
        other.load_state_dict(copy.deepcopy(fresh_pair.fast.state_dict()), assign=assign)
        assert torch.equal(other(ids).logits, fresh_pair.fast(ids).logits)


def test_casts_are_rejected_and_moves_are_not(fresh_pair):
    model = fresh_pair.fast
    for cast in (lambda: model.to(torch.float16), lambda: model.to(dtype=torch.bfloat16), lambda: model.double()):
        with pytest.raises(UnsupportedRequestError, match="packed as fp32.*load the original checkpoint"):
            cast()
    for cast in (model.half, model.float):
        with pytest.raises(ValueError, match="quantized"):
            cast()
    assert {p.dtype for p in model.parameters()} == {torch.uint8, torch.float32}
    assert model.to("cpu") is model
    assert model.to(torch.float32) is model
    assert_close_rows(model(fresh_pair.ids(4)).logits, fresh_pair.plain(fresh_pair.ids(4)).logits)


def test_pickle_is_rejected(pair, tmp_path):
    with pytest.raises(BackendError, match="save_pretrained"):
        torch.save(pair.fast, tmp_path / "model.pt")


def test_a_dropped_model_frees_everything_at_once(fresh_pair):
    import weakref

    fresh_pair.fast(fresh_pair.ids(4))
    gc.collect()
    gc.disable()
    try:
        gone = [weakref.ref(x) for x in (fresh_pair.fast, fresh_pair.fast.dso, fresh_pair.fast.dso.plan)]
        del fresh_pair.fast
        assert [ref() for ref in gone] == [None] * 3
    finally:
        gc.enable()


@torch.no_grad()
def test_nothing_global_changes(pair):
    assert "forward" not in pair.plain.__dict__
    assert type(pair.plain) is type(pair.fast)
    assert "forward" in pair.fast.__dict__


def test_a_shared_config_is_unchanged():
    plain = random_model(CASES["llama-gqa"]())
    shared = plain.config
    fast = DynamicGraphOptimizer(plain, config=DeepSeekConfig(precision="fp32", backend="reference")).optimize()
    assert not hasattr(shared, "quantization_config")
    assert all(module.config is fast.config for module in fast.modules() if hasattr(module, "config"))
