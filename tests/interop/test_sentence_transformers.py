"""sentence-transformers: pooling over a packed decoder."""

from __future__ import annotations

import copy

import pytest
import torch

from deepseek_optimizer import DeepSeekConfig
from support.saved_llama import saved_llama

TEXTS = ["a short text", "and one that is longer than that, so there is padding", "c"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, byte_tokenizer):
    return saved_llama(tmp_path_factory.mktemp("st") / "model", byte_tokenizer)


@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_embeddings_equal_the_float_model(folder, tmp_path, pooling, side):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    def embedder(**model_kwargs):
        body = Transformer(str(folder), model_kwargs=model_kwargs)
        body.tokenizer.padding_side = side
        return SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension(), pooling)], device="cpu")

    plain = embedder()
    fast = embedder(quantization_config=DeepSeekConfig(precision="fp32", backend="reference"))
    expected = plain.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(fast.encode(TEXTS, convert_to_tensor=True), expected, rtol=1e-4, atol=1e-4)
    fast.save_pretrained(str(tmp_path / "packed"))
    again = SentenceTransformer(str(tmp_path / "packed"), device="cpu")
    for twin in (again, copy.deepcopy(fast)):
        assert twin[0].model.dso.changed() is None
        torch.testing.assert_close(twin.encode(TEXTS, convert_to_tensor=True), expected, rtol=1e-4, atol=1e-4)
    assert not any("slower" in note for note in fast[0].model.dso.notes)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory, byte_tokenizer):
    """Folders of float encoders by family; a classifier with one label is a reranker."""
    from support.encoders import random_encoder

    made = {}
    for case, head, fields in (
        ("bert", "Model", {}),
        ("modernbert", "Model", {}),
        ("roberta", "ForSequenceClassification", {}),
    ):
        fields = {"vocab_size": len(byte_tokenizer), "num_labels": 1, **fields}
        made[case] = tmp_path_factory.mktemp(case)
        random_encoder(case, head, **fields).save_pretrained(made[case])
        byte_tokenizer.save_pretrained(made[case])
    return made


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("case", ["bert", "modernbert"])
@pytest.mark.filterwarnings("error::deepseek_optimizer.integration.bind.packed_model.OptimizerWarning")
def test_encoders_run_their_plan(encoders, tmp_path, case, pooling):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    def embedder(**model_kwargs):
        body = Transformer(str(encoders[case]), model_kwargs=model_kwargs)
        return SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension(), pooling)], device="cpu")

    expected = embedder().encode(TEXTS, convert_to_tensor=True)
    fast = embedder(quantization_config=DeepSeekConfig(precision="fp32"))
    assert fast[0].model.report().path == "plan"
    torch.testing.assert_close(fast.encode(TEXTS, convert_to_tensor=True), expected, rtol=1e-4, atol=1e-4)
    fast.save_pretrained(str(tmp_path / "packed"))
    for twin in (SentenceTransformer(str(tmp_path / "packed"), device="cpu"), copy.deepcopy(fast)):
        assert twin[0].model.report().path == "plan"
        torch.testing.assert_close(twin.encode(TEXTS, convert_to_tensor=True), expected, rtol=1e-4, atol=1e-4)


def test_rerankers(encoders):
    from sentence_transformers import CrossEncoder

    pairs = [(TEXTS[0], text) for text in TEXTS]
    expected = CrossEncoder(str(encoders["roberta"]), device="cpu").predict(pairs)
    settings = {"quantization_config": DeepSeekConfig(precision="fp32")}
    fast = CrossEncoder(str(encoders["roberta"]), device="cpu", model_kwargs=settings)
    assert fast[0].model.report().path == "plan" and not fast[0].model.dso.notes
    assert abs(fast.predict(pairs) - expected).max() < 1e-4
