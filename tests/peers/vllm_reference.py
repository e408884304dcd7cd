"""In place of the fixtures of vLLM's tests that compute what a server should answer: plain Transformers on the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from .pictures import picture_of, url_of


class HfRunner:
    """In place of vLLM's class of this name, for sentence encoders and cross-encoders.

    Args:
        model_name: name of the model.
        is_cross_encoder: whether it gives pairs of texts a score.
    """

    def __init__(self, model_name: str, *_: Any, is_cross_encoder: bool = False, **__: Any) -> None:
        import transformers

        from .vllm_server import directory_of

        directory = directory_of(model_name)
        kind = transformers.AutoModelForSequenceClassification if is_cross_encoder else transformers.AutoModel
        self._model = kind.from_pretrained(directory, dtype=torch.float32).eval()
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(directory)

    def __enter__(self) -> HfRunner:
        return self

    def __exit__(self, *_: Any) -> None:
        """Nothing is running."""

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Any:
        """The mean of the hidden states, with length 1: float32 [texts, hidden]."""
        rows = []
        for text in texts:
            hidden = self._model(**self._tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            rows.append(torch.nn.functional.normalize(hidden.mean(0), dim=0))
        return torch.stack(rows).numpy()

    @torch.inference_mode()
    def predict(self, pairs: Sequence[Sequence[str]]) -> torch.Tensor:
        """The score of each pair, between 0 and 1: float32 [pairs]."""
        scores = [self._model(**self._tokenizer(*pair, return_tensors="pt")).logits[0, 0] for pair in pairs]
        return torch.stack(scores).sigmoid()


@pytest.fixture(scope="session")
def hf_runner() -> type[HfRunner]:
    return HfRunner


class LocalAssetServer:
    """In place of vLLM's server of images: data URLs of other pictures."""

    def url_for(self, name: str) -> str:
        return url_of(picture_of(name))


@pytest.fixture(scope="session")
def local_asset_server() -> LocalAssetServer:
    return LocalAssetServer()
