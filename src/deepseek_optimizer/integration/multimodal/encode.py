"""Pictures for an engine: the embeddings of each picture, kept by its content, and the rows of a prompt."""

from __future__ import annotations

import hashlib
import inspect
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...backends.base import Int32
from ...engine.picture_pace import PicturePace
from ...engine.picture_steps import Embed
from ...engine.pictures import PictureRows
from ...errors import ConfigError, RequestError
from ..bind.packed_model import packed_model_of
from ..generation.steps import PictureColumns
from .runtime import MultimodalRuntime

KEPT_BYTES = 256 << 20  # of the embeddings of pictures, by default
_FEATURES = ("pooler_output", "deepstack_features")  # of what the vision tower returns, what the language model gets
_TYPES = ("token_type_ids", "mm_token_type_ids")
_OF_TEXT = ("input_ids", "attention_mask", "num_local_patches")  # of the placeholder alone, or of the tower only


def is_multimodal(model: Any) -> bool:
    """Whether an optimized model's prompts may have pictures."""
    return isinstance(packed_model_of(model), MultimodalRuntime)


def language_model_of(model: Any) -> Any:
    """The language model of a multimodal model, which shares its modules; any other optimized model itself."""
    runtime = packed_model_of(model)
    return runtime.language_model if isinstance(runtime, MultimodalRuntime) else model


def embeddings_of(model: Any) -> Embed:
    """The embeddings of token ids of a multimodal model."""
    table = model.get_input_embeddings()

    def embed(ids: Int32) -> torch.Tensor:
        with torch.no_grad():
            rows: torch.Tensor = table(torch.from_numpy(ids).long()[None])[0].float()
        return rows

    return embed


@dataclass(frozen=True)
class _Picture:
    """A picture that was encoded.

    Attributes:
        ids: the tokens that stand for it in a prompt.
        others: the processor's further results that the language model's positions depend on, such as its size.
        types: names of the arguments with 1 for the tokens of pictures.
        features: what the vision tower makes of it.
    """

    ids: list[int]
    others: dict[str, torch.Tensor]
    types: tuple[str, ...]
    features: Any


class PictureEncoder:
    """Makes prompts with pictures for an engine. Thread-safe: pictures are encoded one after the other.

    Args:
        model: an optimized multimodal model.
        processor: its processor (`AutoProcessor.from_pretrained`).
        kept_bytes: how much memory the embeddings of pictures may take that are kept for later prompts; the last one is
            always kept, unless this is 0.

    Attributes:
        placeholder: the token that stands for a picture in a rendered chat.
        pace: divides the time between pictures and the steps of the engine that has this encoder.

    Raises:
        ConfigError: the model is not multimodal.
    """

    def __init__(self, model: Any, processor: Any, kept_bytes: int = KEPT_BYTES) -> None:
        runtime = packed_model_of(model)
        if not isinstance(runtime, MultimodalRuntime):
            raise ConfigError(f"{type(model).__name__} has no vision tower with a plan for its language model")
        self.model, self.processor, self.kept_bytes = model, processor, kept_bytes
        self._runtime, self.pace = runtime, PicturePace()
        self._kept: OrderedDict[bytes, _Picture] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()
        self._feature_arguments = set(inspect.signature(type(model.model).get_image_features).parameters)
        self._forward_arguments = set(inspect.signature(type(model).forward).parameters)
        of_gemma3 = hasattr(processor, "full_image_sequence")  # its `image_token` was another one in early releases
        self._text = processor.boi_token if of_gemma3 else processor.image_token
        self.placeholder: int = processor.tokenizer.convert_tokens_to_ids(self._text)

    def prompt(self, ids: Sequence[int], images: Sequence[Any], salt: str = "") -> tuple[list[int], PictureRows | None]:
        """A prompt with the tokens of its pictures in place of the placeholders, and its rows of pictures.

        Args:
            ids: the prompt's token ids, with a placeholder for each picture.
            images: PIL images in RGB, in order.
            salt: only prompts with the same salt share pictures that are kept.

        Raises:
            RequestError: there is another number of placeholders, or a picture that the model cannot use.
        """
        count = sum(token == self.placeholder for token in ids)
        if count != len(images):
            raise RequestError("messages", f"the prompt has places for {count} pictures, but there are {len(images)}")
        if not images:
            return list(ids), None
        with self._lock:
            pictures = [self._encoded(image, salt) for image in images]
        rest = iter(pictures)
        whole = [t for token in ids for t in (next(rest).ids if token == self.placeholder else (token,))]
        return whole, self._rows(whole, pictures)

    def _rows(self, ids: list[int], pictures: Sequence[_Picture]) -> PictureRows:
        tokens = torch.tensor([ids], dtype=torch.long, device=self.model.device)
        seen = tokens == self.model.config.image_token_id
        arguments: dict[str, Any] = {name: seen.long() for name in pictures[0].types}
        arguments |= {name: torch.cat([p.others[name] for p in pictures]) for name in pictures[0].others}
        features = {"image": _merged([picture.features for picture in pictures])}
        try:
            call = self._runtime.language_call(
                {**arguments, "input_ids": tokens, "mm_encoder_outputs": features, "use_cache": False}
            )
        except ValueError as error:  # Transformers' check
            raise RequestError("messages", f"the pictures do not fit the prompt: {' '.join(str(error).split())}") from error
        if call.reason is not None:
            raise RequestError("messages", f"these pictures cannot be used: {call.reason}")
        positions, besides = call.arguments.get("position_ids"), call.pictures or PictureColumns()
        known = torch.arange(len(ids), dtype=torch.int32, device="cpu") if positions is None else positions[0].int().cpu()
        places = np.flatnonzero(seen[0].cpu().numpy())
        of_layers = call.arguments.get("ids_of_layers")
        return PictureRows(
            known.numpy(),
            places,
            call.arguments["inputs_embeds"][0, torch.from_numpy(places)].float().cpu(),
            None if besides.axes is None else np.ascontiguousarray(besides.axes[0]),
            None if besides.of is None else np.ascontiguousarray(besides.of[0]),
            tuple(layer.float().cpu() for layer in besides.features or ()),
            None if of_layers is None else int(of_layers[0, places[0]]),
        )

    def _encoded(self, image: Any, salt: str) -> _Picture:
        head = repr((salt, image.mode, image.size)).encode()
        key = hashlib.blake2b(head + image.tobytes(), digest_size=16).digest()
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        try:
            inputs = self.processor(text=[self._text], images=[[image]], add_special_tokens=False, return_tensors="pt")
        except ValueError as error:  # too narrow for the model, for example
            raise RequestError("messages", f"the model cannot use this picture: {' '.join(str(error).split())}") from error
        arguments = {
            name: value.to(self.model.dtype) if torch.is_tensor(value) and value.is_floating_point() else value
            for name, value in inputs.items()
            if name in self._feature_arguments
        }
        with torch.no_grad(), self._runtime.running(), self._runtime.pace.between(self.pace.next_piece):
            output = self.model.model.get_image_features(**arguments, return_dict=True)
        features = type(output)(**{name: output[name] for name in _FEATURES if name in output})
        types = tuple(name for name in _TYPES if name in inputs and name in self._forward_arguments)
        others = {
            name: value
            for name, value in inputs.items()
            if name in self._forward_arguments and name not in (*_TYPES, *_OF_TEXT) and "pixel" not in name
        }
        self._kept[key] = picture = _Picture(inputs["input_ids"][0].tolist(), others, types, features)
        always = 1 if self.kept_bytes else 0
        while len(self._kept) > always and sum(_bytes_of(kept.features) for kept in self._kept.values()) > self.kept_bytes:
            self._kept.popitem(last=False)
        return picture


def _bytes_of(value: Any) -> int:
    if torch.is_tensor(value):
        return int(value.nbytes)
    parts = value.values() if hasattr(value, "values") else value
    return sum(_bytes_of(part) for part in parts)


def _merged(outputs: Sequence[Any]) -> Any:
    """What the vision tower makes of several pictures, given what it makes of each."""

    def joined(name: str, values: list[Any]) -> Any:
        if torch.is_tensor(values[0]):
            return torch.cat(values)
        if name == "deepstack_features":  # by layer, then by picture
            return [[picture for pictures in layer for picture in pictures] for layer in zip(*values, strict=True)]
        return [part for value in values for part in value]

    names = outputs[0].keys()
    return type(outputs[0])(**{name: joined(name, [output[name] for output in outputs]) for name in names})
