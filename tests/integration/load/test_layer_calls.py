"""Single layers, called as the decoder calls them, give the decoder's result."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer.integration.load.layer_calls import LayerCalls
from support.models import CASES, random_model


@pytest.mark.parametrize("case", ["llama-gqa", "gemma3_text", "deepseek_v3-groups", "qwen3_next"])
def test_layers_in_turn_equal_the_decoder(case):
    name = next(name for name in CASES if name.startswith(case))
    model = random_model(CASES[name]()).eval()
    decoder = model.model
    texts = [
        torch.randint(3, model.config.vocab_size, (1, n), generator=torch.Generator().manual_seed(n)) for n in (9, 9, 9, 5)
    ]
    with torch.inference_mode():
        calls = LayerCalls(decoder, list(decoder.layers), texts)
        for index, ids in enumerate(texts):
            hidden = calls.inputs[index]
            for i, layer in enumerate(decoder.layers):
                hidden = calls.run(layer, i, index, hidden)
            assert torch.equal(decoder.norm(hidden), decoder(ids, use_cache=False)[0])
    assert not any(layer._forward_pre_hooks for layer in decoder.layers)


def test_a_failing_forward_leaves_no_hooks():
    model = random_model(CASES["llama-gqa"]())
    with pytest.raises(IndexError):
        LayerCalls(model.model, list(model.model.layers), [torch.tensor([[model.config.vocab_size]])])
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)


@pytest.mark.parametrize(
    "case, added",
    [
        ("llama-gqa", {"mlp.down_proj"}),
        ("cohere2", {"mlp.down_proj", "self_attn.o_proj"}),  # attention and MLP are parallel
        ("gemma3_text", set()),  # results are normalized first
        ("granite", set()),  # and scaled
    ],
)
def test_which_results_are_added_to_the_output(case, added):
    model = random_model(CASES[next(name for name in CASES if name.startswith(case))]()).eval().bfloat16()
    layers = list(model.model.layers)
    with torch.no_grad():
        calls = LayerCalls(model.model, layers, [torch.arange(3, 40)[None]])
        found = {
            name
            for name, module in layers[0].named_modules()
            if isinstance(module, torch.nn.Linear) and calls.adds(layers[0], 0, module, calls.inputs[0])
        }
    assert found == added and not any(module._forward_hooks for module in layers[0].modules())


def test_a_layer_runs_until_a_module():
    model = random_model(CASES["llama-gqa"]()).eval()
    layer, called = model.model.layers[0], []
    with torch.no_grad():
        calls = LayerCalls(model.model, list(model.model.layers), [torch.arange(3, 40)[None]])
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda module, args, name=name: called.append(name))
        calls.run_until(layer, 0, 0, calls.inputs[0], layer.self_attn.o_proj)
        assert called == [f"self_attn.{letter}_proj" for letter in "qkvo"]
        calls.run(layer, 0, 0, calls.inputs[0])
    assert called[4:] == [*called[:4], "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"], "no hook is left"
