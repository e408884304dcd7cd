"""Contexts beyond the trained length: for every way to load a model, its graph, Transformers' modules and saved copies agree,
and equal what Transformers computes with the same config."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepseek_optimizer import ConfigError, DeepSeekConfig, DynamicGraphOptimizer, PagedCache, load_model
from deepseek_optimizer.backends.base import PREFILL
from deepseek_optimizer.integration.bind.context_extension import extend_context, room_of
from deepseek_optimizer.integration.bind.runtime import OptimizerWarning
from deepseek_optimizer.integration.compat import cache_name
from deepseek_optimizer.models import build_graph
from support.checkpoint_files import gguf_bytes, model_tensors, model_values
from support.family_configs import llama, rope
from support.models import CASES, assert_close_rows, random_ids, random_model, transformers_logits
from support.steps import Part, Runner, run_step

TRAINED, ROOM, READ = 64, 256, 200
FAMILIES = ["llama-gqa", "qwen3-gqa", "deepseek_v2-groups", "deepseek_v3-direct", "youtu-tied"]
FIELDS: dict[str, Any] = {"context_length": ROOM, "backend": "reference", "precision": "fp32"}
pytestmark = pytest.mark.filterwarnings("ignore:.*quality is not assured", "ignore:.*own forward over the packed modules")


def short(case: str) -> Any:
    """A config of the case with a short trained length."""
    config = CASES[case]()
    config.max_position_embeddings = TRAINED
    return config


def theirs(model: Any, config: Any) -> Any:
    """A new Transformers model with this config, so that nothing in it comes from another config."""
    own = copy.deepcopy(config)
    if hasattr(own, "quantization_config"):
        del own.quantization_config
    fresh = random_model(own)
    fresh.load_state_dict(model.state_dict())
    return fresh


@dataclass
class Saved:
    plain: Any
    folder: Path
    ids: list[int]
    kind: str

    def expected(self) -> torch.Tensor:
        """Logits with a config written by hand."""
        config = copy.deepcopy(self.plain.config)
        parameters = {"rope_type": self.kind, "rope_theta": config.rope_parameters["rope_theta"], "factor": ROOM / TRAINED}
        if self.kind == "yarn":
            config.max_position_embeddings = ROOM
            parameters["original_max_position_embeddings"] = TRAINED
            if hasattr(config, "kv_lora_rank"):
                parameters |= {"mscale": 1.0, "mscale_all_dim": 1.0}
        config.rope_parameters = parameters
        return transformers_logits(theirs(self.plain, config), self.ids)

    def check(self, model: Any, expected: torch.Tensor) -> None:
        """Checks the plan, and Transformers' forward over the same modules."""
        tensor = torch.tensor([self.ids])
        assert model.dso.graph.max_positions == ROOM == room_of(model.config)
        assert_close_rows(model(tensor).logits[0], expected)
        hook = model.model.layers[0].register_forward_hook(lambda *_: None)
        assert_close_rows(model(tensor).logits[0].detach(), expected, 1e-3)
        hook.remove()


@pytest.fixture(scope="module", params=[(case, kind) for case in FAMILIES for kind in ("yarn", "dynamic")], ids="-".join)
def saved(request: Any, tmp_path_factory: Any) -> Saved:
    case, kind = request.param
    plain = random_model(short(case))
    folder = tmp_path_factory.mktemp("extension") / "model"
    plain.save_pretrained(folder)
    return Saved(plain, folder, random_ids(plain.config, READ), kind)


def test_every_way_of_loading_and_saving(saved: Saved, tmp_path: Path) -> None:
    fields, expected = {**FIELDS, "context_extension": saved.kind}, saved.expected()
    unextended = transformers_logits(saved.plain, saved.ids)
    assert not torch.allclose(expected, unextended, rtol=1e-2)  # so that a missing extension is detected
    saved.check(load_model(saved.folder, **fields), expected)
    saved.check(AutoModelForCausalLM.from_pretrained(saved.folder, quantization_config=DeepSeekConfig(**fields)), expected)
    converted = copy.deepcopy(saved.plain)
    DynamicGraphOptimizer(converted, config=DeepSeekConfig(**fields)).optimize()
    saved.check(converted, expected)
    saved.check(copy.deepcopy(converted), expected)
    converted.save_pretrained(tmp_path / "packed")
    reopened = load_model(tmp_path / "packed", DeepSeekConfig(backend="reference"))  # without an extension in the config
    assert (reopened.dso.config.context_extension, reopened.dso.config.context_length) == (saved.kind, ROOM)
    saved.check(reopened, expected)
    saved.check(
        load_model(tmp_path / "packed", **{**fields, "precision": "auto"}), expected
    )  # with the settings it was saved with
    saved.check(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), expected)


@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
def test_gguf(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(model_values(layers=2), model_tensors(layers=2)))
    ids = [5, *range(3, 39)] * 8
    fields: dict[str, Any] = {"backend": "reference", "precision": "fp32", "context_extension": kind, "context_length": 512}
    model = load_model(path, **fields)
    dense = load_model(path, backend="reference", precision="fp32")
    assert (dense.dso.graph.max_positions, model.dso.graph.max_positions) == (128, 512)
    hook = model.model.layers[0].register_forward_hook(lambda *_: None)
    own = model(torch.tensor([ids])).logits[0].detach()
    hook.remove()
    assert_close_rows(model(torch.tensor([ids])).logits[0], own)
    config = {"yarn": (512, 4.0), "dynamic": (128, 4.0)}[kind]
    assert (model.config.max_position_embeddings, model.config.rope_parameters["factor"]) == config


def test_an_optimized_model_can_be_extended_afterwards() -> None:
    plain = random_model(short("deepseek_v3-direct"))
    ids = random_ids(plain.config, READ)
    config = copy.deepcopy(plain.config)
    extend_context(config, DeepSeekConfig(context_extension="yarn", context_length=ROOM))
    expected = transformers_logits(theirs(plain, config), ids)
    fields: dict[str, Any] = {"backend": "reference", "precision": "fp32"}
    DynamicGraphOptimizer(plain, config=DeepSeekConfig(**fields)).optimize()
    more = DeepSeekConfig(**fields, context_extension="yarn", context_length=ROOM)
    DynamicGraphOptimizer(plain, config=more).optimize()
    Saved(plain, Path(), ids, "yarn").check(plain, expected)


@pytest.mark.parametrize("name", ["llama-linear", "llama-dynamic", "llama-yarn", "llama-llama3", "deepseek_v3-groups"])
@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
def test_already_scaled_models_are_rejected(name: str, kind: str, tmp_path: Path) -> None:
    plain = random_model(CASES[name]())
    plain.save_pretrained(tmp_path / "m")
    fields: dict[str, Any] = {"context_extension": kind, "context_length": 1 << 15}
    before = dict(plain.config.rope_parameters)
    for attempt in (
        lambda: load_model(tmp_path / "m", **fields),
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=DeepSeekConfig(**fields)),
        lambda: DynamicGraphOptimizer(plain, config=DeepSeekConfig(**fields)),
    ):
        with pytest.raises(ConfigError, match=f"{kind}.*already scales its RoPE .*{before['rope_type']}.*leave it out"):
            attempt()
    assert plain.config.rope_parameters == before


@pytest.mark.parametrize("length", [1, TRAINED - 1, TRAINED])
def test_a_length_that_extends_nothing_is_rejected(length: int) -> None:
    settings = DeepSeekConfig(context_extension="yarn", context_length=length)
    with pytest.raises(ConfigError, match=f"context_length={length} does not exceed the {TRAINED} tokens.*set a larger length"):
        DynamicGraphOptimizer(random_model(short("llama-gqa")), config=settings)


def test_a_model_without_rope_is_refused() -> None:
    settings = DeepSeekConfig(context_extension="yarn", context_length=ROOM)
    with pytest.raises(ConfigError, match="kimi_linear model has no rotary position embeddings"):
        DynamicGraphOptimizer(random_model(CASES["kimi_linear-experts"]()), config=settings)


def test_a_missing_length_is_rejected() -> None:
    settings = DeepSeekConfig()
    settings.context_extension = "yarn"  # set later, one by one
    with pytest.raises(ConfigError, match="needs context_length"):
        DynamicGraphOptimizer(random_model(short("llama-gqa")), config=settings)


def test_another_length_of_a_packed_copy_is_rejected(tmp_path: Path) -> None:
    model = random_model(short("llama-gqa"))
    fields: dict[str, Any] = {"context_extension": "yarn", "context_length": ROOM}
    DynamicGraphOptimizer(model, config=DeepSeekConfig(backend="reference", **fields)).optimize()
    model.save_pretrained(tmp_path / "packed")
    with pytest.raises(ConfigError, match="already scales its RoPE"):
        load_model(tmp_path / "packed", context_extension="yarn", context_length=2 * ROOM)
    with pytest.raises(ConfigError, match="needs context_extension"):
        load_model(tmp_path / "packed", DeepSeekConfig(), context_length=2 * ROOM)


def test_odd_lengths_are_exact() -> None:
    for trained, length in ((48, 1000), (4096, 4097), (100, 131071), (2048, (1 << 31) - 1)):
        for kind in ("yarn", "dynamic"):
            config = llama(max_position_embeddings=trained)
            extend_context(config, DeepSeekConfig(context_extension=kind, context_length=length))
            twice = copy.deepcopy(config)
            extend_context(twice, DeepSeekConfig(context_extension=kind, context_length=length))
            assert twice.to_dict() == config.to_dict()
            assert build_graph(config).max_positions == room_of(config) == length


def test_the_warning_is_given_once() -> None:
    model = random_model(short("llama-gqa"))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        settings = DeepSeekConfig(backend="reference", context_extension="dynamic", context_length=ROOM)
        DynamicGraphOptimizer(model, config=settings).optimize()
        for _ in range(2):
            model.generate(torch.tensor([[5] * 80]), max_new_tokens=3)
    messages = [str(w.message) for w in seen if issubclass(w.category, OptimizerWarning)]
    assert [
        t for t in messages if "beyond the 64 tokens the model was trained for is not assured; measure it with dso bench" in t
    ] == messages
    assert len(messages) == 1 and messages[0] in model.dso.notes


# ---- generate: one set of frequencies for the whole text


@pytest.fixture(scope="module", params=["llama-gqa", "deepseek_v3-direct"])
def dynamic(request: Any) -> Any:
    model = random_model(short(request.param))
    settings = DeepSeekConfig(
        precision="fp32", backend="reference", context_extension="dynamic", context_length=ROOM, prefill_chunk=37
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        DynamicGraphOptimizer(model, config=settings).optimize()
    model.generation_config.eos_token_id = None
    return model


def greedy(model: Any, ids: list[int], new: int) -> list[int]:
    """Greedy decoding by the model's plan, with the frequencies of the final length from the first token on."""
    runtime, result = model.dso, list(ids)
    run = Runner(runtime.plan, runtime.backend.new_store(runtime.graph, runtime.kv_dtype, 16))
    blocks, reach = run.sequence(), torch.tensor([min(len(ids) + new, ROOM)], dtype=torch.int32).numpy()
    piece = result
    for _ in range(new):
        logits = run_step(run.plan, run.store, [Part(blocks, piece, PREFILL, rows=[len(piece) - 1])], reach=reach).logits
        piece = [int(logits[0].argmax())]
        result = result + piece
    return result


LENGTHS = (50, 90, 3, 61)  # of prompts: with their answers within the trained length, and beyond it


@pytest.mark.parametrize("how", [{}, {"prompt_lookup_num_tokens": 4}, {"num_beams": 1, "output_hidden_states": True}], ids=str)
def test_generate_alone_and_in_batches(dynamic: Any, how: dict[str, Any]) -> None:
    ids = [random_ids(dynamic.config, n, seed=n) for n in LENGTHS]
    expected = [greedy(dynamic, text, 12) for text in ids]
    for text, whole in zip(ids, expected, strict=True):
        assert dynamic.generate(torch.tensor([text]), max_new_tokens=12, do_sample=False, **how)[0].tolist() == whole
        total = dynamic.generate(torch.tensor([text]), max_length=len(text) + 12, do_sample=False, **how)
        assert total[0].tolist() == whole
    longest = max(LENGTHS)
    rows = torch.tensor([[0] * (longest - len(text)) + text for text in ids])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in ids])
    together = dynamic.generate(rows, attention_mask=mask, max_new_tokens=12, do_sample=False, **how)
    for row, text, whole in zip(together.tolist(), ids, expected, strict=True):
        assert row[longest - len(text) :] == whole


def test_generate_to_the_end_of_the_context(dynamic: Any) -> None:
    text = random_ids(dynamic.config, ROOM - 5)
    with pytest.warns(OptimizerWarning, match=f"stopped at the model's context of {ROOM} tokens"):
        actual = dynamic.generate(torch.tensor([text]), max_new_tokens=20, do_sample=False)[0].tolist()
    assert len(actual) == ROOM + 1  # the last token is not cached
    assert actual == greedy(dynamic, text, 6)
    with pytest.raises(ValueError, match=f"context of {ROOM};.*context_extension"):
        dynamic.generate(torch.tensor([random_ids(dynamic.config, ROOM + 1)]))


def test_generate_by_default_goes_beyond_the_trained_length(dynamic: Any) -> None:
    text = random_ids(dynamic.config, 100)
    assert dynamic.generate(torch.tensor([text]), do_sample=False)[0].tolist() == greedy(dynamic, text, 20)


def test_samples_of_one_prompt_share_its_frequencies(dynamic: Any) -> None:
    text = random_ids(dynamic.config, 70)
    torch.manual_seed(3)
    actual = dynamic.generate(torch.tensor([text]), max_new_tokens=10, do_sample=True, top_k=1, num_return_sequences=3)
    assert actual.tolist() == [greedy(dynamic, text, 10)] * 3


def test_a_cache_keeps_its_initial_frequencies(dynamic: Any) -> None:
    text, cache = random_ids(dynamic.config, 30), PagedCache(dynamic)
    first = dynamic.generate(torch.tensor([text]), max_new_tokens=10, do_sample=False, **{cache_name(): cache})
    assert cache.state.reach.tolist() == [40]
    with pytest.warns(OptimizerWarning, match="frequencies for 40 tokens, but may grow to 140"):
        dynamic.generate(first, max_new_tokens=100, do_sample=False, **{cache_name(): cache})
    assert cache.state.reach.tolist() == [40]
    assert copy.deepcopy(cache).state.reach.tolist() == [40]
    cache.reset()
    dynamic.generate(torch.tensor([text]), max_new_tokens=100, do_sample=False, **{cache_name(): cache})
    assert cache.state.reach.tolist() == [130]


def test_transformers_loop_reports_the_end_of_the_context(dynamic: Any) -> None:
    hook = dynamic.model.layers[0].register_forward_hook(lambda *_: None)
    try:
        with pytest.warns(OptimizerWarning, match=f"continues beyond the model's context of {ROOM}"):
            dynamic.generate(torch.tensor([[5] * (ROOM - 1)]), max_new_tokens=4, do_sample=False)
    finally:
        hook.remove()


def test_a_model_with_dynamic_rope_has_its_own_context() -> None:
    config = llama(max_position_embeddings=TRAINED, **rope("dynamic", factor=4.0))
    model = random_model(config)
    ids = random_ids(config, READ)
    expected = transformers_logits(random_model(llama(max_position_embeddings=TRAINED, **rope("dynamic", factor=4.0))), ids)
    DynamicGraphOptimizer(model, config=DeepSeekConfig(precision="fp32", backend="reference", prefill_chunk=37)).optimize()
    assert_close_rows(model(torch.tensor([ids])).logits[0], expected)  # in six chunks


def test_layers_with_different_ropes_are_refused():
    config = CASES["gemma3_text-two-ropes"]()
    with pytest.raises(ConfigError, match="gemma3_text model have different rotary position embeddings"):
        extend_context(config, DeepSeekConfig(context_extension="yarn", context_length=10_000))
