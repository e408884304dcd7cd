"""Dense layers, norms and encodings of embeddings."""

from __future__ import annotations

import base64

import numpy as np
import orjson
import pytest
import torch

from deepseek_optimizer.checkpoint.sentence_transformers import Dense, EmbeddingSettings
from deepseek_optimizer.server.search.vectors import cosine, dimensions_of, embedding, encoded, normalized, sigmoid, softmax

RANDOM = np.random.default_rng(0)
VECTOR = RANDOM.standard_normal(12).astype(np.float32)


@pytest.mark.parametrize("norm", [1, 2, 3, 64])
def test_p_norms(norm):
    assert np.linalg.norm(normalized(VECTOR, norm).astype(np.float64), norm) == pytest.approx(1, abs=1e-6)
    assert np.isfinite(normalized(VECTOR * np.float32(1e30), norm)).all()


def test_other_norms():
    assert normalized(VECTOR, -1) is VECTOR
    assert np.abs(normalized(VECTOR, 0)).max() == pytest.approx(32760)
    assert not normalized(np.zeros(3, np.float32), 2).any()


@pytest.mark.parametrize("activation,function", [
    ("Identity", torch.nn.Identity()), ("Tanh", torch.nn.Tanh()), ("ReLU", torch.nn.ReLU()), ("Sigmoid", torch.nn.Sigmoid()),
])  # fmt: skip
@pytest.mark.parametrize("residual", [None, "projected"])
def test_dense_layers(activation, function, residual):
    linear, other = torch.nn.Linear(12, 5), torch.nn.Linear(12, 5, bias=False)
    weights = [value.detach().numpy() for value in (linear.weight, linear.bias, other.weight)]
    layer = Dense(weights[0], weights[1], activation, None if residual is None else weights[2])
    settings = EmbeddingSettings(dense=(layer,))
    with torch.no_grad():
        x = torch.tensor(VECTOR)
        expected = function(linear(x)) + (0 if residual is None else other(x))
    np.testing.assert_allclose(embedding(VECTOR, settings, None, -1), expected.numpy(), atol=1e-6)
    assert dimensions_of(12, settings) == 5


def test_fewer_dimensions_are_normalized_again():
    short = embedding(VECTOR, EmbeddingSettings(), 3, 2)
    assert short.shape == (3,) and np.linalg.norm(short) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(short, VECTOR[:3] / np.linalg.norm(VECTOR[:3]), rtol=1e-6)


def test_encodings():
    assert orjson.loads(orjson.dumps({"v": encoded(VECTOR, False)}))["v"] == pytest.approx(VECTOR.tolist())
    assert np.array_equal(np.frombuffer(base64.b64decode(encoded(VECTOR[::2], True)), "<f4"), VECTOR[::2])


def test_functions():
    values = torch.tensor([[-1e4, 0.5, 1e4], [1.0, 2.0, 3.0]])
    np.testing.assert_allclose(sigmoid(values.numpy()), torch.sigmoid(values).numpy(), atol=1e-6)
    np.testing.assert_allclose(softmax(values.numpy()), torch.softmax(values.double(), -1).numpy(), atol=1e-6)
    assert cosine(VECTOR, -2 * VECTOR) == pytest.approx(-1) and cosine(VECTOR, 0 * VECTOR) == 0
