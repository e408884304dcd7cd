"""Sampling parameters: a generation config, overridden by the caller's."""

from __future__ import annotations

import math

import pytest
from transformers import GenerationConfig

from deepseek_optimizer.chat.sampling import ignored_settings, sampling_params
from deepseek_optimizer.engine.request import SamplingParams
from deepseek_optimizer.errors import RequestError

SAMPLES = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.95, repetition_penalty=1.1, max_new_tokens=77)


def test_defaults():
    assert sampling_params() == sampling_params(GenerationConfig()) == SamplingParams(temperature=0.0)


def test_values_of_the_generation_config():
    actual = sampling_params(SAMPLES)
    assert (actual.temperature, actual.top_p, actual.repetition_penalty, actual.max_tokens) == (0.6, 0.95, 1.1, 77)
    assert actual.top_k == 50  # the default of `generate`


def test_the_caller_overrides_the_generation_config():
    actual = sampling_params(SAMPLES, temperature=1.5, top_k=0, max_new_tokens=5, seed=3)
    assert (actual.temperature, actual.top_k, actual.max_tokens, actual.seed, actual.top_p) == (1.5, 0, 5, 3, 0.95)


@pytest.mark.parametrize("given", [{"temperature": 0}, {"temperature": 0.0, "top_k": 4}, {"do_sample": False}])
def test_greedy_on_request(given):
    assert sampling_params(SAMPLES, **given).greedy


@pytest.mark.parametrize(
    "given", [{"seed": 1}, {"top_k": 4}, {"top_p": 0.5}, {"min_p": 0.1}, {"temperature": 1.0}, {"do_sample": True}]
)
def test_sampling_parameters_enable_sampling(given):
    actual = sampling_params(GenerationConfig(), **given)
    assert not actual.greedy and actual.temperature == 1.0


def test_greedy_keeps_the_penalty():
    assert sampling_params(GenerationConfig(repetition_penalty=1.2)).repetition_penalty == 1.2


def test_transformers_names_and_ours():
    stops = GenerationConfig(stop_strings=["\n\n"], min_new_tokens=2)
    assert sampling_params(stops).stop == ("\n\n",) and sampling_params(stops).min_tokens == 2
    assert sampling_params(stops, stop="END", min_tokens=0).stop == ("END",)
    assert sampling_params(stop_strings=["a", "b"], stop_token_ids=[7]).stop_token_ids == (7,)
    assert sampling_params(max_tokens=3) == sampling_params(max_new_tokens=3)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": -1, "do_sample": False}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_new_tokens": 0}, "max_tokens"),
        ({"seed": 1 << 64}, "seed"),
        ({"do_sample": "yes"}, "do_sample"),
        ({"stop": [1]}, "stop"),
        ({"stop": 1.5}, "stop"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"num_beams": 4}, "num_beams"),
    ],
)
def test_invalid_values_are_named(given, field):
    with pytest.raises(RequestError) as caught:
        sampling_params(SAMPLES, **given)
    assert caught.value.field == field


def test_a_misspelt_name_suggests_the_closest():
    with pytest.raises(RequestError, match="did you mean 'temperature'"):
        sampling_params(temprature=1)


def test_options_that_only_generate_supports():
    asks = GenerationConfig(num_beams=4, no_repeat_ngram_size=3, typical_p=1.0, suppress_tokens=[], temperature=0.3)
    assert ignored_settings(asks) == ["num_beams", "no_repeat_ngram_size"]
    assert ignored_settings(GenerationConfig()) == [] == ignored_settings(SAMPLES)
