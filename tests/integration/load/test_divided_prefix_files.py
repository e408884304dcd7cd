"""`prefix_cache_dir` of a model in two processes: the first one keeps the parts of all, for models that are divided equally."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from deepseek_optimizer import SamplingParams, make_engine
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.integration.generation.fingerprint import fingerprint
from deepseek_optimizer.integration.generation.saved_prefix import load_prefix, save_prefix
from support.divided import SIZES, close, load_divided, save_divisible
from support.family_configs import deepseek_v3, gemma3_text
from support.models import random_ids
from support.mtp_files import save_with_mtp

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason="needs the native backend")

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=5)


LATENT = {
    "kv_lora_rank": 64, "q_lora_rank": 48, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "num_key_value_heads": 4, "head_dim": 16, "moe_intermediate_size": 96,
}  # fmt: skip


def save_latent(folder: Path) -> Path:
    """A model with latents, which all processes have if each layer is divided, and an MTP layer."""
    save_with_mtp(folder, deepseek_v3(**{**SIZES, **LATENT}))
    return folder


@pytest.mark.parametrize(
    ("save", "parallel", "restart"),
    [
        (save_divisible, {"tensor": 2}, True),
        (save_latent, {"expert": 2}, False),
        (save_latent, {"pipeline": 2}, True),
        (partial(save_divisible, config=gemma3_text), {"pipeline": 2}, False),
    ],
    ids=["tensor", "expert, latent", "pipeline, latent", "pipeline, windows"],
)
def test_another_engine_gives_the_same_bits(save, parallel, restart, tmp_path):
    """Of the model that is loaded again, or of the same one."""
    folder, answers = save(tmp_path / "model"), []
    model = load_divided(folder, precision="fp32", parallel=parallel)
    try:
        for times in (2, 1):
            if restart and times == 1:
                close(model)
                model = load_divided(folder, precision="fp32", parallel=parallel)
            arena = model.dso.new_arena(1 << 23)
            with make_engine(model, arena=arena, prefix_cache_dir=str(tmp_path / "cache")) as engine:
                answers += [engine.generate([random_ids(model.config, 200)], GREEDY)[0] for _ in range(times)]
    finally:
        close(model)
    whole, again, other = answers
    assert [one.cached_tokens for one in answers] == [0, 192, 192]
    assert other.token_ids == again.token_ids == whole.token_ids and other.logprobs == again.logprobs


def changed(source: Path, target: Path) -> Path:
    """A copy of a model with another element in the middle of a matrix of its last layer, whose 224 rows two processes have."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(target / "model.safetensors")
    name = max(name for name in weights if name.endswith("mlp.up_proj.weight"))
    weights[name][200, 50] += 1
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2}], ids=["tensor", "pipeline"])
def test_weights_of_other_processes_and_the_division_count(parallel, tmp_path):
    folder = save_divisible(tmp_path / "model")
    facts = []
    for one in (folder, changed(folder, tmp_path / "changed")):
        model = load_divided(one, precision="fp32", parallel=parallel)
        facts.append(fingerprint(model.dso, whole=True))
        close(model)
    first, second = facts
    assert {name for name in first if first[name] != second[name]} == {"parts"}
    assert first["division"] == ("tensor=2" if "tensor" in parallel else "layers [(0,), (1, 2)]")


def test_saved_prefixes(tmp_path):
    model = load_divided(save_divisible(tmp_path / "model"), precision="fp32")
    try:
        prompt, file = random_ids(model.config, 200), tmp_path / "prefix"
        engines = [make_engine(model, arena=model.dso.new_arena(1 << 23)) for _ in range(2)]
        expected = [engines[0].generate([prompt], GREEDY)[0] for _ in range(2)][1]
        first, second = (engine.core for engine in engines)
        assert save_prefix(file, model.dso, first.memory, first.prefix, prompt) == 192
        assert load_prefix(file, model.dso, second.memory, second.prefix, prompt) == 192
        [actual] = engines[1].generate([prompt], GREEDY)
    finally:
        close(model)
    assert actual.cached_tokens == 192 and actual.token_ids == expected.token_ids and actual.logprobs == expected.logprobs
