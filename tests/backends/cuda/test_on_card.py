"""What only a card can show (`make test-gpu`): graphs that are captured, two models at once, memory that is full."""

from __future__ import annotations

import threading

import pytest
import torch

from support import triton_interpreter

DEVICE = triton_interpreter.require_card()

from deepseek_optimizer import load_model, make_engine
from deepseek_optimizer.engine.request import SamplingParams
from deepseek_optimizer.errors import NotEnoughMemoryError

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], list(range(20, 60)), [3]]


def answers(model, tokens=40):
    made = make_engine(model, drafts=False).generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=tokens))
    return [answer.token_ids for answer in made]


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_replayed_steps_give_the_tokens_of_launched_ones(tiny_model, precision):
    """And in fp32 those of the reference on the host."""
    fields = {"device": "cuda", "precision": precision, "kv_cache_memory": 1 << 26}
    replayed, launched = (answers(load_model(tiny_model, cuda_graphs=on, **fields)) for on in (True, False))
    assert replayed == launched
    if precision == "fp32":
        assert replayed == answers(load_model(tiny_model, backend="reference", precision="fp32"))


def test_two_models_at_once(tiny_model):
    """Each captures and replays on its own stream."""
    models = [load_model(tiny_model, device="cuda", kv_cache_memory=1 << 26) for _ in range(2)]
    alone, found = answers(models[0]), {}
    threads = [threading.Thread(target=lambda i=i, m=m: found.update({i: answers(m)})) for i, m in enumerate(models)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: alone, 1: alone}


def test_logits_are_on_the_card_and_may_be_looked_at(tiny_model):
    model = load_model(tiny_model, device="cuda", kv_cache_memory=1 << 26)
    ids = torch.tensor([[5, 6, 7, 8]], device=DEVICE)
    out = model(ids).logits
    assert out.device.type == "cuda" and torch.equal(out.argmax(-1), model(ids).logits.argmax(-1))


def test_a_cache_larger_than_the_card(tiny_model):
    with pytest.raises(NotEnoughMemoryError, match="kv_cache_memory"):
        load_model(tiny_model, device="cuda", kv_cache_memory=1 << 50)
    model = load_model(tiny_model, device="cuda", kv_cache_memory=torch.cuda.mem_get_info(DEVICE)[0] // 2)
    held = torch.empty(torch.cuda.mem_get_info(DEVICE)[0] * 3 // 4, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(NotEnoughMemoryError, match="the KV cache of .* set a smaller kv_cache_memory"):
        model.generate(torch.tensor([[5, 6, 7]], device=DEVICE), max_new_tokens=2)
    del held
