"""Experts and latent attention in two processes: what they compute is what one process computes."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer import ConfigError, Request, SamplingParams, load_model, make_engine
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.integration.bind.swap import matrices_of
from deepseek_optimizer.integration.generation import speculation
from deepseek_optimizer.quant.packed import PackedStack
from deepseek_optimizer.quant.parts import stack_part
from support.divided import SIZES, close, load_divided, save_divisible
from support.family_configs import deepseek_v2, deepseek_v3, mixtral, qwen2, qwen2_moe, qwen3_moe
from support.models import assert_close_rows, random_ids
from support.mtp_files import save_with_mtp

from ..generation.test_speculation import Always

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason="needs the native backend")

LATENT = {
    "kv_lora_rank": 64, "q_lora_rank": 48, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "num_key_value_heads": 4, "head_dim": 16, "moe_intermediate_size": 96,
}  # fmt: skip
CONFIGS = {
    "deepseek_v2": lambda **f: deepseek_v2(**{**f, **LATENT}),
    "deepseek_v3": lambda **f: deepseek_v3(**{**f, **LATENT}),
    "mixtral": mixtral,
    "qwen2_moe": lambda **f: qwen2_moe(**{**f, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 160}),
    "qwen3_moe": lambda **f: qwen3_moe(**{**f, "moe_intermediate_size": 96}),
}


@pytest.fixture(scope="module", params=[{"expert": 2}, {"tensor": 2}], ids=["expert", "tensor"])
def models(request, tmp_path_factory):
    """A DeepSeek-V3 with an MTP layer, as a whole and divided."""
    folder = tmp_path_factory.mktemp("v3") / "model"
    save_with_mtp(folder, CONFIGS["deepseek_v3"](**SIZES))
    whole = load_model(folder, precision="fp32", threads=1, batch_invariant=True)
    divided = load_divided(folder, precision="fp32", batch_invariant=True, parallel=request.param)
    yield whole, divided
    close(divided)


def prompt(model, count, seed=0):
    return torch.tensor([random_ids(model.config, count, seed)])


def test_logits_and_tokens(models):
    whole, divided = models
    ids = prompt(whole, 70)
    assert_close_rows(divided(ids).logits[0], whole(ids).logits[0], 1e-5)
    texts = [m.generate(ids, max_new_tokens=20, do_sample=False).tolist() for m in models]
    assert texts[0] == texts[1]


def test_an_engine_with_prefixes(models):
    texts, cached = [], []
    for model in models:
        engine, params = make_engine(model), SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
        shared = random_ids(model.config, 70, seed=5)
        wanted = [Request(shared + random_ids(model.config, 5 + n, seed=n), params, id=str(n)) for n in range(3)]
        first, again = engine.generate(wanted), engine.generate(wanted)
        texts.append([r.token_ids for r in first])
        assert [r.token_ids for r in again] == texts[-1]
        cached.append([r.cached_tokens for r in again])
    assert texts[0] == texts[1]
    assert cached[0] == cached[1] and max(cached[0]) >= 64


def test_a_cache_can_be_read(models):
    ids, rows = prompt(models[0], 40), []
    for model in models:
        cache = model(ids, use_cache=True).past_key_values
        rows.append(cache.layers[0].keys)
    assert_close_rows(rows[1].flatten(0, -2), rows[0].flatten(0, -2), 1e-5)


def test_drafts_of_an_mtp_layer(models, monkeypatch):
    controllers = []

    class Recorded(Always):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            controllers.append(self)

    monkeypatch.setattr(speculation, "DraftLengthController", Recorded)
    ids, texts = prompt(models[0], 40), []
    for model in models:
        texts.append(model.generate(ids, max_new_tokens=20, do_sample=False, use_mtp=True).tolist())
        assert any(outcomes for outcomes in controllers[-1].rounds)
    assert texts[0] == texts[1] == models[0].generate(ids, max_new_tokens=20, do_sample=False).tolist()


@pytest.mark.parametrize("parallel", [{"expert": 2}, {"tensor": 2}], ids=["expert", "tensor"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("family", CONFIGS)
def test_families_and_formats(family, precision, parallel, tmp_path):
    """Parts have the bits of the whole matrices, from a float checkpoint and from a packed one."""
    folder = save_divisible(tmp_path / "model", CONFIGS[family])
    one = load_model(folder, precision=precision, threads=1)
    one.save_pretrained(tmp_path / "packed")
    ids = prompt(one, 40)
    expected, logits = one(ids).logits[0], []
    for source in (folder, tmp_path / "packed"):
        two = load_divided(source, precision=precision, parallel=parallel)
        whole, stacks = matrices_of(one, one.dso.graph), 0
        for name, part in matrices_of(two, two.dso.graph).items():
            if isinstance(part, PackedStack):
                spans = ((0, n) if n < m else None for n, m in zip(part.shape, whole[name].shape, strict=True))
                assert torch.equal(part.data, stack_part(whole[name], *spans).data), name
                assert part.nbytes < whole[name].nbytes
                stacks += 1
        assert stacks
        logits.append(two(ids).logits[0])
        close(two)
    assert torch.equal(*logits)
    assert_close_rows(logits[0], expected, 1e-5 if precision == "fp32" else 2e-2)


def test_experts_need_a_model_that_has_them(tmp_path):
    folder = save_divisible(tmp_path / "model", qwen2)
    with pytest.raises(ConfigError, match="expert=2 needs a model with experts, which qwen2 is not; use tensor"):
        load_divided(folder, parallel={"expert": 2})
