"""Tests of `generate` and the caches, an optimized model against a plain one: a replacement for Transformers' generation tests.

Those are only in its repository (`tests/generation/test_utils.py`), not in its source distribution; with a checkout at hand,
`stage.py` uses them instead. Here both models have the same weights, and the same call must return the same from both: the same
class, the same fields, equal sequences and close values.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList, TemperatureLogitsWarper
from transformers.generation.streamers import BaseStreamer

from conformance.plugin import plain_models, treated

ONE, LEFT, RIGHT = "one row", "padded on the left", "lower triangular"
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}

# name of the test: (rows, options)
SCENARIOS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "greedy": (None, {}),
    "greedy_left_padding": (LEFT, {}),
    "greedy_right_padding": (RIGHT, {}),
    "greedy_one_row": (ONE, {}),
    "sample": (None, {"do_sample": True, "top_k": 0}),
    "sample_warped": (LEFT, {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.7}),
    "sample_cutoffs": (None, {"do_sample": True, "min_p": 0.01, "typical_p": 0.95, "epsilon_cutoff": 1e-4}),
    "several_sequences": (LEFT, {"do_sample": True, "num_return_sequences": 3}),
    "beams": (None, {"num_beams": 3}),
    "beams_left_padding": (LEFT, {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True}),
    "beams_right_padding": (RIGHT, {"num_beams": 2}),
    "beams_returned": (None, {"num_beams": 4, "num_return_sequences": 3}),
    "beam_sample": (None, {"num_beams": 2, "do_sample": True}),
    "min_new_tokens": (None, {"min_new_tokens": 5}),
    "max_length": (None, {"max_length": 10, "max_new_tokens": None}),
    "forced_eos": (None, {"forced_eos_token_id": 2}),
    "repetition": (LEFT, {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}),
    "bad_words": (None, {"bad_words_ids": [[5], [6, 7]], "suppress_tokens": [8, 9]}),
    "guidance": (ONE, {"guidance_scale": 1.5}),
    "without_cache": (LEFT, {"use_cache": False}),
    "dynamic_cache": (LEFT, {"cache_implementation": "dynamic"}),
    "static_cache": (LEFT, {"cache_implementation": "static"}),
    "chunked_prefill": (None, {"prefill_chunk_size": 3}),
    "hidden_states": (None, {"output_hidden_states": True}),
    "hidden_states_of_beams": (None, {"output_hidden_states": True, "num_beams": 2}),
    "prompt_lookup": (ONE, {"prompt_lookup_num_tokens": 3}),
}


class GenerationTesterMixin:
    """Used with `ModelTesterMixin`; `self.model_tester` creates configs and inputs."""

    def pair(self) -> tuple[Any, Any]:
        """(plain model, the same model on this side), with logits far enough apart that rounding does not matter."""
        config = self.model_tester.get_config()
        config.initializer_range = 0.2
        torch.manual_seed(0)
        with plain_models():
            plain = self.model_tester.causal_lm_class(config).eval()
        with torch.no_grad():  # otherwise it is zero, and when generated, every index score of DSA would be a tie
            plain.get_input_embeddings().weight[config.pad_token_id].normal_(std=config.initializer_range)
        return plain, treated(copy.deepcopy(plain))

    def rows(self, kind: str | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        ids = torch.randint(3, self.model_tester.vocab_size, (4, 7))
        mask = torch.ones_like(ids)
        if kind == ONE:
            ids, mask = ids[:1], mask[:1]
        elif kind == LEFT:
            mask = torch.tril(mask).flip(1)
        elif kind == RIGHT:
            mask = torch.tril(mask)
        return {"input_ids": ids, "attention_mask": mask}

    def generate_both(self, inputs: dict[str, Any], **options: Any) -> tuple[Any, Any]:
        """Runs both with the same random seed, checks that they agree, and returns both results."""
        pair, answers = self.pair(), []
        fields = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "max_new_tokens": 6}
        for model in pair:
            torch.manual_seed(2)
            answers.append(model.generate(**copy.deepcopy(inputs), **{**fields, **options}))
        self.assert_same(*answers)
        return pair

    def assert_same(self, expected: Any, result: Any, name: str = "output") -> None:
        """Asserts the same structure and close values; caches are compared through their public methods."""
        if hasattr(expected, "get_seq_length"):
            self.assertEqual(expected.get_seq_length(), result.get_seq_length(), name)
        elif hasattr(expected, "keys"):
            self.assertIs(type(expected), type(result), name)
            self.assertEqual(list(expected.keys()), list(result.keys()), name)
            for key in expected:
                self.assert_same(expected[key], result[key], f"{name}.{key}")
        elif isinstance(expected, (tuple, list)):
            self.assertEqual(len(expected), len(result), name)
            for index, (a, b) in enumerate(zip(expected, result, strict=True)):
                self.assert_same(a, b, f"{name}[{index}]")
        elif isinstance(expected, torch.Tensor):
            torch.testing.assert_close(result, expected, **TOLERANCE, msg=lambda text: f"{name}: {text}")
        else:
            self.assertEqual(expected, result, name)

    def test_generate_without_a_prompt(self) -> None:
        self.generate_both({})

    def test_generate_from_embeddings(self) -> None:
        for beams in (1, 2):
            plain, optimized = self.pair()
            inputs = self.rows(LEFT)
            with torch.no_grad():
                inputs["inputs_embeds"] = plain.get_input_embeddings()(inputs.pop("input_ids"))
            self.generate_both(inputs, num_beams=beams)

    def test_generate_assisted(self) -> None:
        plain, optimized = self.pair()
        torch.manual_seed(3)
        with plain_models():
            other = self.model_tester.causal_lm_class(plain.config).eval()
        inputs = self.rows(ONE)
        expected = plain.generate(**inputs, max_new_tokens=8, do_sample=False)
        for assistant in (plain, optimized, other, treated(other)):
            answer = optimized.generate(**inputs, max_new_tokens=8, do_sample=False, assistant_model=assistant)
            self.assertEqual(expected.tolist(), answer.tolist())

    def test_generate_gives_a_tensor(self) -> None:
        _, optimized = self.pair()
        answer = optimized.generate(**self.rows(), max_new_tokens=3)
        self.assertIsInstance(answer, torch.Tensor)
        self.assertEqual(answer.shape[0], 4)

    def test_generate_with_processors_and_criteria(self) -> None:
        calls = []

        def stop(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            calls.append(ids.shape)
            return torch.full((ids.shape[0],), ids.shape[1] >= 9)

        self.generate_both(
            self.rows(),
            logits_processor=LogitsProcessorList([TemperatureLogitsWarper(0.5)]),
            stopping_criteria=StoppingCriteriaList([stop]),
        )
        self.assertEqual(calls[: len(calls) // 2], calls[len(calls) // 2 :])

    def test_generate_streams(self) -> None:
        class Keep(BaseStreamer):
            def __init__(self) -> None:
                self.seen: list[Any] = []

            def put(self, value: torch.Tensor) -> None:
                self.seen.append(value.tolist())

            def end(self) -> None:
                self.seen.append("end")

        streams = Keep(), Keep()
        for model, stream in zip(self.pair(), streams, strict=True):
            model.generate(**self.rows(ONE), max_new_tokens=5, do_sample=False, streamer=stream)
        self.assertEqual(streams[0].seen, streams[1].seen)

    def test_generate_goes_on_from_a_cache(self) -> None:
        self.goes_on_from(self.rows())

    def test_generate_goes_on_from_padded_rows(self) -> None:
        self.goes_on_from(self.rows(LEFT))

    def goes_on_from(self, inputs: dict[str, torch.Tensor]) -> None:
        """Asserts that tokens generated in two calls are those of one."""
        plain, optimized = self.pair()
        whole = plain.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        part = optimized.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        mask = torch.cat([inputs["attention_mask"], torch.ones(4, 3, dtype=torch.long)], 1)
        rest = optimized.generate(
            part.sequences, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False,
            past_key_values=part.past_key_values,
        )  # fmt: skip
        self.assertEqual(whole.tolist(), rest.tolist())

    def test_generate_into_a_cache_of_the_caller(self) -> None:
        plain, optimized = self.pair()
        inputs, caches = self.rows(LEFT), (DynamicCache(config=plain.config), DynamicCache(config=plain.config))
        answers = [
            model.generate(**inputs, max_new_tokens=4, do_sample=False, past_key_values=cache)
            for model, cache in zip((plain, optimized), caches, strict=True)
        ]
        self.assertEqual(answers[0].tolist(), answers[1].tolist())
        self.assertEqual(caches[0].get_seq_length(), caches[1].get_seq_length())

    def test_cache_operations(self) -> None:
        """Each changes both caches equally, as the next token's logits show."""
        operations = {
            "crop": lambda cache: cache.crop(-2),
            "reorder": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0, 1])),
            "select": lambda cache: cache.batch_select_indices(torch.tensor([3, 1])),
            "repeat": lambda cache: cache.batch_repeat_interleave(2),
            "reset": lambda cache: cache.reset(),
        }
        for name, change in operations.items():
            with self.subTest(name), torch.no_grad():
                results = []
                for model in self.pair():
                    cache = model(self.rows()["input_ids"], use_cache=True).past_key_values
                    change(cache)
                    rows = {"select": 2, "repeat": 8}.get(name, 4)
                    token = torch.arange(5, 5 + rows)[:, None]
                    results.append((cache.get_seq_length(), model(token, past_key_values=cache).logits))
                self.assert_same(*results)

    def test_cache_layers_hold_what_transformers_does(self) -> None:
        with torch.no_grad():
            plain, optimized = (m(self.rows()["input_ids"], use_cache=True).past_key_values for m in self.pair())
        self.assertEqual(len(plain), len(optimized))
        for a, b in zip(plain.layers, optimized.layers, strict=True):
            self.assert_same((a.keys, a.values), (b.keys, b.values))

    def test_forward_keeps_logits(self) -> None:
        plain, optimized = self.pair()
        ids = self.rows()["input_ids"]
        with torch.no_grad():
            for keep in (0, 1, 3, torch.tensor([0, 2])):
                self.assert_same(plain(ids, logits_to_keep=keep).logits, optimized(ids, logits_to_keep=keep).logits)

    def test_forward_takes_positions_and_masks(self) -> None:
        plain, optimized = self.pair()
        ids = self.rows()["input_ids"]
        least = torch.finfo(torch.float32).min
        causal = torch.triu(torch.full((7, 7), least), 1)[None, None].expand(4, 1, 7, 7)
        calls = {
            "positions": {"position_ids": torch.arange(3, 10)[None].expand(4, 7)},
            "documents": {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]] * 4), "use_cache": False},
            "four dimensions": {"attention_mask": causal},
        }
        for name, call in calls.items():
            with self.subTest(name), torch.no_grad():
                self.assert_same(plain(ids, **call).logits, optimized(ids, **call).logits)

    def test_forward_takes_padding(self) -> None:
        plain, optimized = self.pair()
        inputs = self.rows(LEFT)
        kept = inputs["attention_mask"].bool()
        with torch.no_grad():
            self.assert_same(plain(**inputs).logits[kept], optimized(**inputs).logits[kept])

    def test_forward_gives_loss_and_tuples(self) -> None:
        plain, optimized = self.pair()
        ids = self.rows()["input_ids"]
        with torch.no_grad():
            self.assert_same(plain(ids, labels=ids).loss, optimized(ids, labels=ids).loss)
            for model in (plain, optimized):
                self.assertIsInstance(model(ids, return_dict=False), tuple)


def _test(rows: str | None, options: dict[str, Any]) -> Any:
    def test(self: Any) -> None:
        self.generate_both(self.rows(rows), **options)

    return test


for _name, (_rows, _options) in SCENARIOS.items():
    setattr(GenerationTesterMixin, f"test_generate_{_name}", _test(_rows, {"do_sample": False, **_options}))
