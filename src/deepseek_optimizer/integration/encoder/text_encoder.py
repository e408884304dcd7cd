"""An encoder as the engine runs it: whole texts in, hidden states or class logits out. Also for encoders without a plan, whose
texts are padded to one length."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from ...checkpoint.sentence_transformers import score_activation
from ...engine.encoder_core import Classifier
from ..general import GeneralRuntime
from .runtime import EncoderRuntime

_Texts = Sequence[Sequence[int]]
_HEAD = "ForSequenceClassification"


class TextEncoder:
    """Implements `engine.encoder_core.Encoder`.

    Args:
        model: an optimized encoder, whose `dso` is a `GeneralRuntime`.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._runtime = model, model.dso
        types = getattr(model.config, "type_vocab_size", 0) or 0
        self._takes_types = types > 1 and "token_type_ids" in inspect.signature(type(model).forward).parameters

    def check_weights(self) -> None:
        """See `PackedModel.check_weights`."""
        self._runtime.check_weights()

    def states(self, texts: _Texts, types: _Texts | None) -> list[npt.NDArray[np.float32]]:
        """The last hidden states of each text, float32 [n, H].

        Args:
            texts: token ids.
            types: type of each token; None: all 0.
        """
        types = types if self._takes_types else None
        runtime = self._runtime
        with torch.no_grad():
            planned = isinstance(runtime, EncoderRuntime) and runtime.why_no_plan() is None
        if planned:
            return [states.float().cpu().numpy() for states in runtime.encode(texts, types)]
        with torch.inference_mode():
            hidden = self._model.base_model(**self._call(texts, types)).last_hidden_state.float().cpu().numpy()
        return [row[: len(text)] for row, text in zip(hidden, texts, strict=True)]

    def logits(self, texts: _Texts, types: _Texts | None) -> npt.NDArray[np.float32]:
        """The logits of the classes for each text, float32 [texts, classes]; arguments as for `states`."""
        with torch.inference_mode():
            logits: torch.Tensor = self._model(**self._call(texts, types if self._takes_types else None)).logits
        values: npt.NDArray[np.float32] = logits.float().cpu().numpy()
        return values

    def _call(self, texts: _Texts, types: _Texts | None) -> dict[str, torch.Tensor]:
        padding = self._model.config.pad_token_id or 0
        call = {"input_ids": _padded(texts, padding), "attention_mask": _padded([[1] * len(text) for text in texts], 0)}
        if types is not None:
            call["token_type_ids"] = _padded(types, 0)
        return {name: value.to(self._model.device) for name, value in call.items()}


def is_encoder_runtime(runtime: Any) -> bool:
    """Whether an optimized model's `dso` is that of an encoder: it has no plan for decoding, and does not generate text."""
    return isinstance(runtime, GeneralRuntime) and not runtime.model.can_generate()


def max_tokens(model: Any, tokenizer: Any) -> int:
    """Maximum number of tokens of a text, special tokens included."""
    positions = getattr(model.config, "max_position_embeddings", None)
    embeddings: Any = getattr(model.base_model, "embeddings", None)
    if positions is not None and hasattr(embeddings, "create_position_ids_from_input_ids"):  # they begin after that of padding
        positions -= embeddings.padding_idx + 1
    limits = [limit for limit in (positions, getattr(tokenizer, "model_max_length", None)) if limit]
    return int(min(limits)) if limits else 512


def classifier_of(model: Any) -> Classifier | None:
    """The classification head of an encoder; None: it has none.

    The activations are those of Transformers' text-classification pipeline, and for one class that of sentence-transformers'
    `CrossEncoder`: the sigmoid, unless the config names another.

    Raises:
        CheckpointError: the config names an activation function that is not supported.
    """
    if not type(model).__name__.endswith(_HEAD):
        return None
    config = model.config
    labels = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    several: Literal["identity", "sigmoid", "softmax"] = "softmax"
    if config.problem_type == "multi_label_classification":
        several = "sigmoid"
    elif config.problem_type == "regression":
        several = "identity"
    named = (getattr(config, "sentence_transformers", None) or {}).get("activation_fn")
    named = named or getattr(config, "sbert_ce_default_activation_function", None)
    score = score_activation(named, Path(str(config.name_or_path))) or "sigmoid"
    return Classifier(labels, "sigmoid" if len(labels) == 1 and several == "softmax" else several, score)


def _padded(rows: _Texts, value: int) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.int64, device="cpu")
