"""`OcrModel`: a model that sees reads the pictures of pages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ..chat.local import answer, image_prompt
from ..chat.pictures import load_processor
from ..engine.engine import Engine
from ..engine.pictures import PictureRows
from ..engine.request import SamplingParams
from ..errors import ConfigError
from ..integration.multimodal import PictureEncoder, is_multimodal
from ..optimized_model import load_model, load_tokenizer
from ..serving import make_engine
from .document import Box
from .recognized import RecognizedLine

_QUESTION = "Write down all text in this picture, in reading order. Answer with the text only."
_GROUNDED = "<|grounding|>Convert the document to markdown."  # DeepSeek-OCR's; its answers have boxes
_MARK = re.compile(r"<\|ref\|>(.{0,2000}?)<\|/ref\|><\|det\|>([\d\s,\[\].]{0,2000}?)<\|/det\|>", re.S)
_CONTROL = re.compile(r"<[|\uff5c][^|\uff5c<>\n]{1,64}[|\uff5c]>")  # tokens such as the end of the text
_LABELS = ("text", "title", "sub_title", "table", "image", "image_caption", "table_caption", "figure", "equation")
_SCALE = 999  # of DeepSeek-OCR's coordinates


class OcrModel:
    """Reads pictures of pages with a model that sees. The model is loaded by `load`, or when the first page is read. Nothing is
    kept of a page, since the clients of a server share the model: the time to read one must not tell that another has sent it.

    Args:
        model: path or name of a multimodal checkpoint.
        prompt: the question about each picture; None: DeepSeek-OCR's own for its models, and otherwise a request for the text.
        max_tokens: maximum length of the text of a page, in tokens.
        fields: fields of `DeepSeekConfig`.

    Attributes:
        truncated: how many pages were longer than `max_tokens`.
    """

    def __init__(self, model: str, *, prompt: str | None = None, max_tokens: int = 4096, **fields: Any) -> None:
        if max_tokens < 1:
            raise ConfigError(f"max_tokens must be 1 or more, got {max_tokens}")
        self.model, self.prompt, self.max_tokens, self.truncated = model, prompt, max_tokens, 0
        self._fields = fields
        self._loaded: tuple[Any, PictureEncoder] | None = None

    def read(self, image: Any) -> list[RecognizedLine]:
        """The text of a page, see `PageReader`.

        Raises:
            ConfigError: the model reads text only, or cannot be loaded.
            MissingPackageError, RequestError, BackendError: see `load_processor`, `PictureEncoder.prompt` and `answer`.
        """
        engine, encoder = self.load()
        tokens, rows = self._prompt(encoder, image)
        sampling = SamplingParams(temperature=0.0, max_tokens=self.max_tokens, skip_special_tokens=False)
        found = answer(engine, tokens, lambda _: None, sampling, pictures=rows)
        self.truncated += found.finish_reason == "length"
        return lines_of(found.text)

    def close(self) -> None:
        """Releases the model."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            loaded[0].close()

    def __enter__(self) -> OcrModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(self) -> tuple[Engine, PictureEncoder]:
        """Loads the model, unless that has been done; returns its engine, and what encodes its pictures.

        Raises:
            ConfigError, MissingPackageError: see `read`.
        """
        if self._loaded is None:
            tokenizer = load_tokenizer(self.model)
            model = load_model(self.model, **self._fields)
            if not is_multimodal(model):
                raise ConfigError(f"{self.model}: this model reads text only; --ocr needs one that sees")
            encoder = PictureEncoder(model, load_processor(self.model), kept_bytes=0)
            self._loaded = make_engine(model, tokenizer, prefix_cache=False), encoder
        return self._loaded

    def _prompt(self, encoder: PictureEncoder, image: Any) -> tuple[list[int], PictureRows | None]:
        processor = encoder.processor
        tokenizer = processor.tokenizer
        question = self.prompt or (_GROUNDED if "<|grounding|>" in tokenizer.get_vocab() else _QUESTION)
        if getattr(processor, "chat_template", None) or tokenizer.chat_template:
            return image_prompt(encoder, [{"role": "user", "content": question, "pictures": [""]}], [image])
        place = tokenizer.convert_ids_to_tokens(encoder.placeholder)
        return encoder.prompt(tokenizer(f"{place}\n{question}")["input_ids"], [image])


def lines_of(text: str) -> list[RecognizedLine]:
    """The lines in a model's answer, with their places if it writes them as DeepSeek-OCR does: `<|ref|>a label or the
    text<|/ref|><|det|>[[left, top, right, bottom]]<|/det|>`, and then the text that the label is of."""
    return [line for line in _lines(text) if line.text.strip()]


def _lines(text: str) -> Iterator[RecognizedLine]:
    at, box, named = 0, None, ""
    for mark in _MARK.finditer(text):
        yield from _blocks(text[at : mark.start()], named, box)
        at, box, named = mark.end(), _box(mark[2]), mark[1].strip()
    yield from _blocks(text[at:], named, box)


def _blocks(text: str, named: str, box: Box | None) -> Iterator[RecognizedLine]:
    """The text that follows a mark or, if there is none, the text in the mark itself."""
    said = _CONTROL.sub("", text).strip("\n")
    if said.strip():
        yield RecognizedLine(said, box)
    elif named and named.lower() not in _LABELS:
        yield RecognizedLine(named, box)


def _box(coordinates: str) -> Box | None:
    numbers = [min(float(number) / _SCALE, 1.0) for number in re.findall(r"\d{1,6}", coordinates)]
    if not numbers or len(numbers) % 4:
        return None
    left, top, right, bottom = min(numbers[0::4]), min(numbers[1::4]), max(numbers[2::4]), max(numbers[3::4])
    return (left, top, right, bottom) if left < right and top < bottom else None
