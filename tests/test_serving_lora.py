"""Engines with LoRA adapters: each text is PEFT's own, whatever other requests use, and while adapters come and go."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepseek_optimizer import (
    ConfigError,
    DeepSeekConfig,
    Request,
    RequestError,
    SamplingParams,
    load_model,
    make_async_engine,
    make_engine,
)
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.errors import AdapterError, NotEnoughMemoryError
from deepseek_optimizer.train.lora import add_adapter, targets_of
from support.family_configs import llama
from support.lora import adapted, logits_of, random_adapter, save_adapter
from support.models import CASES, random_ids, random_model
from support.tiny_v3 import documents, tiny_v3

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason="needs the native backend")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def base():
    return random_model(llama())


@pytest.fixture(scope="module")
def checkpoint(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "model"
    base.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """16 adapters of several ranks and targets."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        f"a{n}": save_adapter(base, root / f"a{n}", seed=n, targets=TARGETS[n % 3 :: 1 + n % 3], r=(4, 8, 16)[n % 3])
        for n in range(16)
    }


def greedy(ids, count, name="", **fields):
    return Request(ids, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True), adapter=name, **fields)


def check_texts(requests, completions, references, tolerance=0.0):
    """Each token is the most likely one of the reference, which sees the same text before it."""
    for request, completion in zip(requests, completions, strict=True):
        assert completion.finish == "length", completion.error
        ids, text = request.prompt, completion.token_ids
        logits = logits_of(references[request.adapter], ids + text[:-1])[len(ids) - 1 :]
        chosen = logits.gather(1, torch.tensor(text)[:, None])[:, 0]
        assert (chosen >= logits.amax(-1) - tolerance * logits.abs().amax(-1)).all(), request.adapter


def mixed(config, names, count, seed=0, length=14):
    rng = random.Random(seed)
    shared = random_ids(config, 70, seed=9)  # prompts that begin alike, with different adapters
    prompts = [random_ids(config, rng.randrange(1, 60), seed=n) for n in range(count)]
    return [
        greedy(shared + ids[:5] if n % 3 == 0 else ids, length, rng.choice(names), id=str(n)) for n, ids in enumerate(prompts)
    ]


def test_sixteen_adapters_over_64_requests(base, checkpoint, folders):
    engine = make_engine(load_model(checkpoint, precision="fp32"), adapters=folders, max_lora_rank=16)
    requests = mixed(base.config, [*folders, ""], 64)
    references = {name: adapted(base, folders.get(name)) for name in [*folders, ""]}
    completions = engine.generate(requests)
    check_texts(requests, completions, references)
    assert len({tuple(c.token_ids) for c in completions}) > 40
    again = engine.generate(requests)  # from the prefix cache
    assert [c.token_ids for c in again] == [c.token_ids for c in completions]
    assert sum(c.cached_tokens for c in again) > 1000
    with_drafts = [*(greedy(r.prompt, 40, r.adapter, id=r.id) for r in requests[:6])]
    check_texts(with_drafts, engine.generate(with_drafts), references)


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_packed_models_with_adapters(base, checkpoint, folders, precision):
    """The reference: the dequantized model, with PEFT. Activations are rounded to 16 bits."""
    model = load_model(checkpoint, precision=precision, activation="int16")
    dequantized = random_model(base.config)
    stored = {
        f"{name}.weight": module.dequantized() for name, module in model.named_modules() if hasattr(module, "dequantized")
    }
    dequantized.load_state_dict({**dequantized.state_dict(), **stored})
    names = list(folders)[:5]
    engine = make_engine(model, adapters={name: folders[name] for name in names}, lora_dtype="fp32")
    requests = mixed(base.config, [*names, ""], 16)
    references = {name: adapted(dequantized, folders.get(name)) for name in [*names, ""]}
    check_texts(requests, engine.generate(requests), references, 2e-3)


def test_without_adapters_nothing_changes(base, checkpoint, folders):
    """Tokens and log probabilities are the same, bit for bit, in an engine that supports adapters and in one that does not."""
    prompts = [random_ids(base.config, n, seed=n) for n in (3, 40, 70)]
    results = []
    for options in ({}, {"adapters": {"a": folders["a0"]}}):
        engine = make_engine(load_model(checkpoint, precision="int4"), **options)
        sampling = SamplingParams(temperature=0, max_tokens=12, logprobs=3, ignore_eos=True)
        results.append([(c.token_ids, c.logprobs) for c in engine.generate(prompts, sampling)])
    assert results[0] == results[1]


def test_adapters_that_were_trained_on_a_packed_model(checkpoint, tmp_path):
    """As `dso train --lora` saves them; the texts are those of the trained model itself."""
    model = load_model(checkpoint, precision="int4", activation="int16")
    wrapped = add_adapter(model, 4, 16.0, 0.0, targets_of(model))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05)
    wrapped.save_pretrained(tmp_path / "trained")
    fresh = load_model(checkpoint, precision="int4", activation="int16")
    engine = make_engine(fresh, adapters={"t": str(tmp_path / "trained")}, lora_dtype="fp32")
    requests = [greedy(random_ids(model.config, 20, seed=n), 10, "t", id=str(n)) for n in range(3)]
    check_texts(requests, engine.generate(requests), {"t": wrapped.eval()}, 2e-2)


def test_adapters_of_latent_attention_as_training_saves_them(tmp_path):
    """With the layers that `dso train --lora` adapts by default, kv_b_proj among them; prompts in either form of attention."""
    plain = AutoModelForCausalLM.from_pretrained(tiny_v3(), dtype=torch.float32).eval()
    targets = targets_of(plain)
    assert "kv_b_proj" in targets
    wrapped = add_adapter(plain, 4, 16.0, 0.0, targets).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.5)
    wrapped.save_pretrained(tmp_path / "trained")
    model = load_model(tiny_v3(), DeepSeekConfig(precision="fp32", kv_cache="fp32"))
    engine = make_engine(model, adapters={"t": str(tmp_path / "trained")})
    texts = enumerate(documents(tiny_v3(), 3, 60))
    requests = [greedy(ids, 10, name, id=f"{n}{name}") for n, ids in texts for name in ("t", "")]
    completions = engine.generate(requests)
    check_texts(requests[::2], completions[::2], {"t": wrapped}, 1e-4)
    with wrapped.disable_adapter():
        check_texts(requests[1::2], completions[1::2], {"": wrapped}, 1e-4)
    assert any(a.token_ids != b.token_ids for a, b in zip(completions[::2], completions[1::2], strict=True))


@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_batch_invariance(base, checkpoint, folders, precision):
    """Alone and beside requests with other adapters: the same log probabilities, bit for bit."""
    names = list(folders)[:4]
    engine = make_engine(
        load_model(checkpoint, precision=precision, batch_invariant=True), adapters={name: folders[name] for name in names}
    )
    rng = random.Random(5)
    sampling = SamplingParams(temperature=0.8, seed=1, max_tokens=10, logprobs=1, ignore_eos=True)
    requests = [
        Request(random_ids(base.config, rng.randrange(1, 50), seed=n), sampling, id=str(n), adapter=rng.choice([*names, ""]))
        for n in range(12)
    ]
    together = engine.generate(requests)
    for request, completion in zip(requests, together, strict=True):
        alone = engine.generate([request])[0]
        assert (alone.token_ids, alone.logprobs) == (completion.token_ids, completion.logprobs)


def test_drafts_of_mtp_layers_do_not_change_texts(tmp_path):
    """Verification uses the adapter; the MTP layers, which have none, only propose."""
    model = load_model(tiny_v3(), precision="fp32")
    folders = {f"a{n}": str(random_adapter(model, tmp_path / f"a{n}", seed=n, size=0.3)) for n in range(2)}
    prompts = documents(tiny_v3(), 4, 40)
    texts = []
    for drafts in (True, False):
        engine = make_engine(model, adapters=folders, drafts=drafts, prefix_cache=False)
        if drafts:
            engine.core.drafting._proposers.pop(0)  # prompt lookup
        requests = [greedy(ids, 30, name, id=f"{n}{name}") for n, ids in enumerate(prompts) for name in ("", "a0", "a1")]
        texts.append([completion.token_ids for completion in engine.generate(requests)])
        if drafts:
            assert engine.core.drafting.proposed > 0
    assert texts[0] == texts[1]
    assert len({tuple(text) for text in texts[0]}) > 8


def test_prefixes_are_apart(base, checkpoint, folders):
    """Blocks are shared between requests with the same adapter only, or with equal ones."""
    engine = make_engine(load_model(checkpoint, precision="fp32"), adapters={"a": folders["a0"]}, max_loras=2)
    ids = random_ids(base.config, 100, seed=3)
    assert engine.generate([greedy(ids, 2)])[0].cached_tokens == 0
    assert engine.generate([greedy(ids, 2, "a")])[0].cached_tokens == 0
    assert engine.generate([greedy(ids, 2, "a")])[0].cached_tokens == 96
    assert engine.generate([greedy(ids, 2)])[0].cached_tokens == 96
    engine.load_adapter("b", folders["a1"])
    assert engine.generate([greedy(ids, 2, "b")])[0].cached_tokens == 0
    engine.unload_adapter("b")
    engine.load_adapter("b", folders["a0"])  # the content of "a"
    assert engine.generate([greedy(ids, 2, "b")])[0].cached_tokens == 96


def test_loading_and_unloading_while_requests_run(base, checkpoint, folders):
    """A text continues with its adapter after that was unloaded; then the slot takes another one."""
    engine = make_engine(load_model(checkpoint, precision="fp32"), max_loras=2)
    core, references = engine.core, {name: adapted(base, folders[name]) for name in ("a0", "a1", "a2")}
    engine.load_adapter("a0", folders["a0"])
    engine.load_adapter("a1", folders["a1"])
    requests = [greedy(random_ids(base.config, 20, seed=n), 30, f"a{n % 2}", id=str(n)) for n in range(6)]
    steps, texts = engine.steps(requests), {request.id: [] for request in requests}

    def advance(count):
        for _ in range(count):
            for output in next(steps, ()):
                texts[output.request_id] += output.token_ids

    advance(2)  # a step of decoding may write many tokens
    engine.unload_adapter("a0")
    assert [adapter.name for adapter in core.adapters.loaded] == ["a1"]
    with pytest.raises(RequestError, match="no adapter 'a0'"):
        core.check(greedy([1], 1, "a0"))
    with pytest.raises(RequestError, match=r"slots are taken, and requests still use 1 unloaded"):
        engine.load_adapter("a2", folders["a2"])
    advance(100)
    engine.load_adapter("a2", folders["a2"])
    for request in requests:
        logits = logits_of(references[request.adapter], request.prompt + texts[request.id][:-1])[19:]
        assert logits.argmax(-1).tolist() == texts[request.id]
    later = [greedy(random_ids(base.config, 20, seed=7), 10, "a2")]
    check_texts(later, engine.generate(later), references)
    engine.unload_adapter("a1")
    engine.unload_adapter("a2")
    assert not core.adapters.loaded
    with pytest.raises(RequestError, match="no adapter 'a1'"):
        engine.unload_adapter("a1")


def test_an_async_engine_loads_while_it_runs(base, checkpoint, folders):
    async def run():
        engine = make_async_engine(load_model(checkpoint, precision="fp32"), None, model_name="base", max_loras=4)
        await engine.start()
        try:
            running = engine.submit(greedy(random_ids(base.config, 20), 60, id="plain"))
            await asyncio.to_thread(engine.load_adapter, "a0", folders["a0"])
            request = greedy(random_ids(base.config, 25, seed=4), 20, "a0", id="adapted")
            answers = engine.submit(request)
            engine.unload_adapter("a0")  # possibly before the engine's thread has seen the request
            with pytest.raises(RequestError, match="no adapter 'a0'"):
                engine.submit(request)
            text, finish = [], None
            async for output in answers:
                text += output.token_ids
                finish = output.finish
            with pytest.raises(RequestError):
                await asyncio.to_thread(engine.load_adapter, "base", folders["a0"])
            async for output in running:
                assert output.finish in (None, "length")
            assert not engine.adapters and len(engine.core.adapters._free) == 4
            return text, finish, request
        finally:
            await engine.close()

    text, finish, request = asyncio.run(run())
    assert finish == "length"
    logits = logits_of(adapted(base, folders["a0"]), request.prompt + text[:-1])[len(request.prompt) - 1 :]
    assert logits.argmax(-1).tolist() == text


def test_refused_adapters(base, checkpoint, folders, monkeypatch, tmp_path):
    engine = make_engine(load_model(checkpoint, precision="fp32"), max_loras=3, max_lora_rank=8)
    with pytest.raises(AdapterError, match="rank 16 for .*more than max_lora_rank 8"):
        engine.load_adapter("large", folders["a2"])
    engine.load_adapter("a0", folders["a0"])
    for name in ("a0", "", " ", "x" * 300, "a\nb"):
        with pytest.raises(RequestError, match="lora_name"):
            engine.load_adapter(name, folders["a0"])
    with pytest.raises(RequestError, match="no adapter 'none'; loaded: a0"):
        engine.generate([greedy([1, 2], 2, "none")])
    adapters = engine.core.adapters

    def refuse(size):
        raise NotEnoughMemoryError("the adapter", size, 0, "free memory")

    monkeypatch.setattr(adapters, "_check_memory", refuse)
    with pytest.raises(NotEnoughMemoryError):
        engine.load_adapter("b", folders["a0"])
    monkeypatch.undo()
    engine.load_adapter("b", folders["a0"])  # failures took no slot
    engine.load_adapter("c", folders["a0"])
    plain = make_engine(load_model(checkpoint, precision="fp32"))
    with pytest.raises(RequestError, match="max_loras"):
        plain.load_adapter("a0", folders["a0"])
    with pytest.raises(RequestError, match="max_loras"):
        plain.generate([greedy([1, 2], 2, "a0")])
    for options in ({"max_loras": 2000}, {"max_loras": 1, "max_lora_rank": 0}, {"max_loras": 1, "lora_dtype": "int8"}):
        with pytest.raises(ConfigError):
            make_engine(load_model(checkpoint, precision="fp32"), **options)


@pytest.mark.parametrize("case", ["deepseek_v3-groups", "qwen3_next-experts", "gemma4_text-shared"])
def test_families_with_other_caches(case, tmp_path):
    """Latent attention, recurrent states, groups of layers: with a prefix cache and drafts."""
    model = random_model(CASES[case]())
    model.save_pretrained(tmp_path / "model")
    targets = ["q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj", "in_proj_qkvz", "out_proj", "q_proj", "o_proj"]
    own = sorted({name for name, _ in model.named_modules() if name.split(".")[-1] in targets and ".experts." not in name})
    folders = {f"a{n}": save_adapter(model, tmp_path / f"a{n}", seed=n, targets=own) for n in range(2)}
    config = DeepSeekConfig(precision="fp32", kv_cache="fp32")
    engine = make_engine(load_model(tmp_path / "model", config), adapters=folders)
    references = {name: adapted(model, folders.get(name)) for name in [*folders, ""]}
    shared = random_ids(model.config, 70, seed=1)
    requests = [
        greedy(shared + random_ids(model.config, 5, seed=n), 12, name, id=f"{name}{n}") for n in range(3) for name in references
    ]
    check_texts(requests, engine.generate(requests), references, 1e-4)
