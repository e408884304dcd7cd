"""Classes other than ForCausalLM: the same outputs as in Transformers, with the decoder run by the plan and the class's own
head."""

from __future__ import annotations

import copy
import gc
import inspect
import json
import weakref

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
)

from deepseek_optimizer import (
    CheckpointError,
    ConfigError,
    DeepSeekConfig,
    DynamicGraphOptimizer,
    PagedCache,
    UnsupportedRequestError,
    load_model,
    make_engine,
    report,
)
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.integration.bind.modules import Packed
from deepseek_optimizer.integration.bind.runtime import OptimizerWarning
from deepseek_optimizer.integration.compat import cache_name
from support.models import CASES, assert_close_rows, native_cases, random_ids, random_model, randomize

from ..conftest import BACKENDS, Pair, check_indexed_hidden_states

NATIVE = "reference" if unavailable_reason() else "cpu"
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
HEADS = {
    "sequence": (AutoModelForSequenceClassification, ["llama", "qwen2", "qwen3", "deepseek_v2", "deepseek_v3"]),
    "token": (AutoModelForTokenClassification, ["llama", "qwen2", "qwen3", "deepseek_v3"]),
    "question": (AutoModelForQuestionAnswering, ["llama", "qwen2", "qwen3"]),
}
OF_FAMILY = {case.split("-")[0]: case for case in native_cases()}  # the last case of each family
CLASSIFIERS = [(head, OF_FAMILY[family]) for head, (_, families) in HEADS.items() for family in families]


def settings(**fields):
    return DeepSeekConfig(**{"precision": "fp32", "backend": "reference", **fields})


def make(auto, case, backend=NATIVE, **fields):
    """A float model of an Auto class and its optimized copy."""
    config = CASES[case]()
    config.pad_token_id, config.num_labels = 0, 3
    plain = randomize(auto.from_config(config, **EAGER).eval())
    fast = copy.deepcopy(plain)
    DynamicGraphOptimizer(fast, config=settings(backend=backend, **fields)).optimize()
    return Pair(plain, fast)


def padded(pair, side):
    """Three prompts with id 0 only as padding, their mask, and positions that begin at each first token."""
    lengths = (12, 5, 9)
    ids, mask = pair.ids(*lengths).clamp(min=1), pair.mask(*lengths)
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    return {"input_ids": ids * mask, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@pytest.mark.parametrize("case", native_cases())
@torch.no_grad()
def test_hidden_states_equal_transformers_on_every_family(case):
    pair = make(AutoModel, case)
    ids = pair.ids(40, 40)
    fast, plain = pair.fast(ids), pair.plain(ids)
    assert type(fast) is type(plain) and fast.keys() == plain.keys()
    assert isinstance(getattr(fast, cache_name()), PagedCache)
    assert_close_rows(fast.last_hidden_state, plain.last_hidden_state)
    fast, plain = (m(ids, output_hidden_states=True, use_cache=False) for m in (pair.fast, pair.plain))
    assert fast.keys() == plain.keys()
    for a, b in zip(fast.hidden_states, plain.hidden_states, strict=True):
        assert_close_rows(a, b)
    assert fast.last_hidden_state is fast.hidden_states[-1] or torch.equal(fast.last_hidden_state, fast.hidden_states[-1])


@pytest.fixture(scope="module", params=BACKENDS)
def decoder(request):
    """Shared; do not modify it."""
    return make(AutoModel, "llama-gqa", request.param)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding(decoder, side):
    call = padded(decoder, side)
    real = call["attention_mask"].bool()
    fast, plain = (m(**call).last_hidden_state for m in (decoder.fast, decoder.plain))
    assert_close_rows(fast[real], plain[real])
    assert not fast[~real].any()


@torch.no_grad()
def test_the_decoders_forward_has_the_signature_of_its_class(decoder):
    ids = decoder.ids(20, 20)
    whole = decoder.plain(ids).last_hidden_state
    assert inspect.signature(decoder.fast.forward) == inspect.signature(decoder.plain.forward)
    first = decoder.fast(ids[:, :11])
    second = decoder.fast(ids[:, 11:], **{cache_name(): getattr(first, cache_name())})
    assert_close_rows(torch.cat([first.last_hidden_state, second.last_hidden_state], 1), whole)
    embeds = decoder.plain.get_input_embeddings()(ids)
    assert_close_rows(decoder.fast(inputs_embeds=embeds).last_hidden_state, whole)
    assert_close_rows(decoder.fast(ids, return_dict=False)[0], whole)


@torch.no_grad()
def test_no_product_with_the_vocabulary_is_computed(decoder):
    assert not decoder.fast.dso.graph.has_head
    assert not any(row["op"] == "lm_head" for row in decoder.fast.report().to_dict()["kernels"])


@pytest.mark.parametrize("requested", [[1], [0, -1], 2, [7], [], False])
@torch.no_grad()
def test_hidden_states_by_index(decoder, requested):
    check_indexed_hidden_states(decoder, requested)


@pytest.mark.parametrize(("head", "case"), CLASSIFIERS)
@torch.no_grad()
def test_classifiers_equal_transformers(head, case):
    pair = make(HEADS[head][0], case)
    for side in ("left", "right"):
        call = padded(pair, side)
        real = call["attention_mask"].bool()
        fast, plain = pair.fast(**call), pair.plain(**call)
        assert type(fast) is type(plain) and fast.keys() == plain.keys()
        if head == "question":
            torch.testing.assert_close(fast.start_logits[real], plain.start_logits[real], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(fast.end_logits[real], plain.end_logits[real], rtol=1e-4, atol=1e-4)
        elif head == "token":
            assert_close_rows(fast.logits[real], plain.logits[real])
        else:
            assert_close_rows(fast.logits, plain.logits)
    assert not pair.fast.dso.notes


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_losses(head):
    pair = make(HEADS[head][0], "llama-gqa")
    ids = pair.ids(7, 7).clamp(min=1)
    labels = {
        "sequence": {"labels": torch.tensor([2, 0])},
        "token": {"labels": ids % 3},
        "question": {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([5, 3])},
    }[head]
    fast, plain = (m(ids, **labels).loss for m in (pair.fast, pair.plain))
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_batch_without_a_padding_token_gives_transformers_error():
    pair = make(AutoModelForSequenceClassification, "llama-gqa")
    for model in (pair.plain, pair.fast):
        model.config.pad_token_id = None
        with pytest.raises(ValueError, match="no padding token"):
            model(pair.ids(4, 4))
    assert_close_rows(pair.fast(pair.ids(4)).logits, pair.plain(pair.ids(4)).logits)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_int8_equals_the_model_with_dequantized_weights(backend):
    pair = make(AutoModelForSequenceClassification, "qwen3-gqa", backend, precision="int8", kv_cache="fp32")
    for name, module in pair.fast.named_modules():
        if isinstance(module, Packed):
            pair.plain.get_submodule(name).weight.copy_(module.dequantized())
    assert isinstance(pair.fast.score, torch.nn.Linear) and not isinstance(pair.fast.score, Packed)
    assert_close_rows(pair.fast(pair.ids(9)).logits, pair.plain(pair.ids(9)).logits, 1e-3)  # rows are rounded to 16 bits


# ---- calls that the plan does not support


@torch.no_grad()
def test_unsupported_calls_go_to_transformers(decoder):
    pair = Pair(decoder.plain, copy.deepcopy(decoder.fast))
    ids = pair.ids(6)
    with pytest.warns(OptimizerWarning, match="is_causal"):
        fast = pair.fast(ids, is_causal=False).last_hidden_state
    assert_close_rows(fast, pair.plain(ids, is_causal=False).last_hidden_state)
    with pytest.warns(OptimizerWarning, match="output_attentions"):
        fast = pair.fast(ids, output_attentions=True)
    assert len(fast.attentions) == 3
    assert isinstance(getattr(pair.fast(ids), cache_name()), PagedCache), (
        "the hooks that record attention prevent the use of the plan"
    )
    with pytest.warns(OptimizerWarning, match="DynamicCache"):
        fast = pair.fast(ids, **{cache_name(): DynamicCache()}).last_hidden_state
    assert_close_rows(fast, pair.plain(ids).last_hidden_state)


def test_gradients_come_from_transformers_forward():
    pair = make(AutoModelForSequenceClassification, "llama-gqa", "reference")
    embeds = [pair.plain.get_input_embeddings()(pair.ids(5)).detach().requires_grad_() for _ in range(2)]
    with pytest.warns(OptimizerWarning, match="gradients"):
        pair.fast(inputs_embeds=embeds[0], labels=torch.tensor([1])).loss.backward()
    pair.plain(inputs_embeds=embeds[1], labels=torch.tensor([1])).loss.backward()
    torch.testing.assert_close(embeds[0].grad, embeds[1].grad, rtol=1e-3, atol=1e-6)


def test_a_head_is_trained_on_the_plans_hidden_states():
    pair = make(AutoModelForSequenceClassification, "llama-gqa")
    trainable = [name for name, p in pair.fast.named_parameters() if p.requires_grad]
    assert trainable == ["score.weight"]
    optimizer = torch.optim.SGD(pair.fast.score.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = pair.fast(pair.ids(6, 6), labels=torch.tensor([1, 0])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and not pair.fast.dso.notes


# ---- loading and saving


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A float checkpoint of a causal model, and a packed one."""
    folder = tmp_path_factory.mktemp("classes")
    made = {}

    def get(case):
        if case not in made:
            made[case] = folder / case / "float", folder / case / "packed"
            random_model(CASES[case]()).save_pretrained(made[case][0])
            load_model(made[case][0], settings()).save_pretrained(made[case][1])
        return made[case]

    return get


def hidden(model):
    ids = torch.tensor([random_ids(model.config, 15)])
    with torch.no_grad():
        return (model if not hasattr(model, "score") else model.model)(ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("case", ["llama-gqa", "llama-tied", "deepseek_v3-groups"])
def test_a_causal_checkpoint_loads_as_other_classes(saved, case):
    plain, packed = saved(case)
    expected = hidden(AutoModel.from_pretrained(plain, **EAGER))
    for model in (
        AutoModel.from_pretrained(plain, quantization_config=settings()),
        AutoModel.from_pretrained(packed),
        AutoModelForSequenceClassification.from_pretrained(plain, num_labels=4, quantization_config=settings()),
        AutoModelForSequenceClassification.from_pretrained(packed, num_labels=4),
    ):
        assert_close_rows(hidden(model), expected)
        assert not model.dso.graph.has_head


@pytest.mark.parametrize("case", ["llama-gqa", "deepseek_v3-groups"])
@torch.no_grad()
def test_each_class_is_saved_and_loaded(saved, tmp_path, case):
    for auto in (AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification):
        first = auto.from_pretrained(saved(case)[0], quantization_config=settings(precision="int8"))
        first.save_pretrained(tmp_path / auto.__name__)
        again = auto.from_pretrained(tmp_path / auto.__name__)
        assert type(again) is type(first)
        assert report(again).to_dict()["formats"] == report(first).to_dict()["formats"]
        ids = torch.tensor([random_ids(first.config, 15)])
        assert torch.equal(again(ids)[0], first(ids)[0])
        states = first.state_dict(), again.state_dict()
        assert states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    inner = AutoModelForSequenceClassification.from_pretrained(tmp_path / "AutoModelForSequenceClassification")
    inner.model.save_pretrained(tmp_path / "inner")  # under its own names
    modules = json.loads((tmp_path / "inner" / "config.json").read_text())["packed_manifest"]["modules"]
    assert "embed_tokens" in modules and not any(name.startswith("model.") for name in modules)
    assert torch.equal(hidden(AutoModel.from_pretrained(tmp_path / "inner")), hidden(inner))


def test_a_tied_decoder_loads_as_a_causal_model(saved, tmp_path):
    plain, _ = saved("llama-tied")
    AutoModel.from_pretrained(plain, quantization_config=settings()).save_pretrained(tmp_path / "decoder")
    models = load_model(plain, settings()), AutoModelForCausalLM.from_pretrained(tmp_path / "decoder")
    whole, again = (model(torch.tensor([[1, 2, 3]])).logits for model in models)
    assert torch.equal(whole, again)


@pytest.mark.parametrize("case", ["llama-gqa", "llama-tied"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_class_that_a_checkpoint_does_not_have_is_named(saved, tmp_path, case, packed):
    model = AutoModelForSequenceClassification.from_pretrained(
        saved(case)[0], **({"quantization_config": settings()} if packed else {})
    )
    model.save_pretrained(tmp_path / "m")
    given = {} if packed else {"quantization_config": settings()}
    with pytest.raises(CheckpointError, match="from LlamaForSequenceClassification.*AutoModelForSequenceClassification"):
        load_model(tmp_path / "m", settings())
    if case == "llama-gqa":  # the tied head is the embedding, which is present
        with pytest.raises(CheckpointError, match="lacks lm_head.weight.*load it with AutoModelForSequenceClassification"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "m", **given)


def test_formats_are_kept_through_another_class(saved, tmp_path):
    mixed = {"lm_head": "int8", "model.layers.1.mlp.*": "int4"}
    load_model(saved("llama-gqa")[0], settings(formats=mixed)).save_pretrained(tmp_path / "mixed")
    model = AutoModel.from_pretrained(tmp_path / "mixed")
    assert model.layers[1].mlp.up_proj.format == "int4" and model.layers[0].mlp.up_proj.format == "fp32"
    assert model.config.quantization_config.formats == {"layers.1.mlp.*": "int4"}


def test_a_missing_tensor_is_named(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(saved("llama-gqa")[0] / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    (tmp_path / "m").mkdir()
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    (tmp_path / "m" / "config.json").write_text((saved("llama-gqa")[0] / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        AutoModel.from_pretrained(tmp_path / "m", quantization_config=settings())


def test_calls_that_need_a_head_are_rejected(saved):
    with pytest.raises(ConfigError, match="kl_budget measures logits, but LlamaModel has none"):
        AutoModel.from_pretrained(saved("llama-gqa")[0], quantization_config=DeepSeekConfig(kl_budget=0.1, backend="reference"))
    with pytest.raises(ConfigError, match="LlamaModel has no language model head"):
        make_engine(AutoModel.from_pretrained(saved("llama-gqa")[1]))


# ---- the model as an object


@torch.no_grad()
def test_a_classifier_can_be_copied_and_moved_but_not_cast():
    pair = make(AutoModelForSequenceClassification, "llama-gqa", "reference")
    ids = pair.ids(6)
    before = pair.fast(ids).logits
    twin = copy.deepcopy(pair.fast)
    assert twin.dso is not pair.fast.dso and twin.dso.model is twin.model and twin.save_pretrained.runtime.model is twin
    pair.fast.model.norm.weight.zero_()
    pair.fast.dso.rebind()
    assert torch.equal(twin(ids).logits, before) and not pair.fast(ids).logits.any()
    assert twin.to("cpu") is twin
    with pytest.raises(UnsupportedRequestError, match="packed as fp32"):
        twin.double()
    with pytest.raises(UnsupportedRequestError, match="float model"):
        twin.resize_token_embeddings(300)
    twin.load_state_dict(pair.fast.state_dict())
    assert not twin(ids).logits.any()


def test_a_dropped_classifier_frees_everything_at_once(tmp_path):
    pair = make(AutoModelForSequenceClassification, "llama-gqa", "reference")
    pair.fast(pair.ids(4))
    gc.collect()
    gc.disable()
    try:
        gone = [weakref.ref(x) for x in (pair.fast, pair.fast.model, pair.fast.dso, pair.fast.dso.plan)]
        del pair.fast
        assert [ref() for ref in gone] == [None] * 4
    finally:
        gc.enable()
    make(AutoModelForSequenceClassification, "llama-gqa", "reference").fast.save_pretrained(
        tmp_path / "m"
    )  # no reference is kept
    assert (tmp_path / "m" / "model.safetensors").is_file()


@torch.no_grad()
def test_optimizing_again_changes_rules():
    pair = make(AutoModelForSequenceClassification, "llama-gqa", "reference")
    before = pair.fast(pair.ids(6)).logits
    DynamicGraphOptimizer(pair.fast, fusion_rules=[], config=settings()).optimize()
    assert not pair.fast.report().rules
    assert_close_rows(pair.fast(pair.ids(6)).logits, before)
