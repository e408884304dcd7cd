"""The fuzzed functions: they accept arbitrary bytes and raise only their documented errors.

An input that stands for two files begins with the length of the first, in two bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xgrammar
from starlette.requests import Request

from deepseek_optimizer.chat.picture_job import decode
from deepseek_optimizer.checkpoint import check_tokenizer_beside, load_tokenizer, open_checkpoint
from deepseek_optimizer.checkpoint.lora import LoraFile
from deepseek_optimizer.checkpoint.saved_blocks import open_blocks
from deepseek_optimizer.engine.grammar.job import _ebnf
from deepseek_optimizer.engine.grammar.json_schema import normalize
from deepseek_optimizer.engine.grammar.pattern import to_rules
from deepseek_optimizer.errors import AdapterError, CheckpointError, ConfigError, DocumentError, RequestError
from deepseek_optimizer.longdoc.ocr_model import lines_of
from deepseek_optimizer.longdoc.read import read_upload
from deepseek_optimizer.longdoc.readers import docx, html, pdf, picture, read, text
from deepseek_optimizer.longdoc.recognized import RecognizedLine
from deepseek_optimizer.server.documents.file_store import FileStore
from deepseek_optimizer.server.documents.upload import read_upload_form
from deepseek_optimizer.server.http.json_body import BodyReader
from deepseek_optimizer.server.http.problems import ApiError
from deepseek_optimizer.server.protocol.anthropic.requests import MessagesRequest
from deepseek_optimizer.server.protocol.base import parse
from deepseek_optimizer.server.protocol.chat import ChatRequest
from deepseek_optimizer.server.protocol.completions import CompletionRequest
from deepseek_optimizer.server.protocol.embeddings import EmbeddingRequest, NativeEmbeddingRequest
from deepseek_optimizer.server.protocol.files import check_fields
from deepseek_optimizer.server.protocol.llama_server import ApplyTemplateRequest, InfillRequest, NativeCompletionRequest
from deepseek_optimizer.server.protocol.models import DetokenizeRequest, TokenizeRequest
from deepseek_optimizer.server.protocol.ollama.requests import (
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaPullRequest,
    OllamaShowRequest,
)
from deepseek_optimizer.server.protocol.responses import ResponsesRequest
from deepseek_optimizer.server.protocol.scores import ClassifyRequest, PoolingRequest, RerankRequest, ScoreRequest
from deepseek_optimizer.server.protocol.tgi import TgiRequest
from deepseek_optimizer.server.settings import ServerSettings
from deepseek_optimizer.train.checkpoints.state import read_state

_CONFIG = b'{"model_type": "llama", "vocab_size": 40, "hidden_size": 64}'
_BODIES = (
    ChatRequest, CompletionRequest, EmbeddingRequest, ResponsesRequest, TokenizeRequest, DetokenizeRequest, MessagesRequest,
    OllamaChatRequest, OllamaGenerateRequest, OllamaEmbedRequest, OllamaEmbeddingsRequest, OllamaShowRequest,
    OllamaPullRequest, NativeEmbeddingRequest, NativeCompletionRequest, InfillRequest, ApplyTemplateRequest, TgiRequest,
    RerankRequest, ScoreRequest, ClassifyRequest, PoolingRequest,
)  # fmt: skip
_READERS = (docx, html, pdf, picture, text)  # otherwise imported on demand, which is too late for coverage
_NAMES = ("a.pdf", "a.docx", "a.html", "a.txt", "a.md", "a")
_SETTINGS = ServerSettings()
_root = tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)


@dataclass(frozen=True)
class Target:
    """
    Args:
        run: processes an input.
        errors: the allowed exceptions.
        words: a dictionary for the mutator.
    """

    run: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]
    words: tuple[str, ...] = ()

    def __call__(self, data: bytes) -> None:
        with contextlib.suppress(*self.errors), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.run(data)


def _written(**files: bytes) -> Path:
    """Writes the files into an empty directory; `__` in a name stands for a full stop."""
    folder = Path(_root.name)
    wanted = {name.replace("__", "."): data for name, data in files.items()}
    for name in os.listdir(folder):
        if name not in wanted:
            os.unlink(folder / name)
    for name, data in wanted.items():
        (folder / name).write_bytes(data)
    return folder


def _parts(data: bytes) -> tuple[bytes, bytes]:
    size = int.from_bytes(data[:2], "little")
    return data[2 : 2 + size], data[2 + size :]


def _read_all(path: Path) -> None:
    """Opens a checkpoint, and reads and packs every tensor."""
    with open_checkpoint(path) as checkpoint:
        checkpoint.config()
        for name in checkpoint.tensors:
            with contextlib.suppress(CheckpointError):
                checkpoint.read(name)
                if len(checkpoint.shape(name)) == 2:
                    checkpoint.packed(name, checkpoint.natural_format(name))


def _packed(data: bytes) -> None:
    config, tensors = _parts(data)
    _read_all(_written(config__json=config, model__safetensors=tensors))


def _lora(data: bytes) -> None:
    config, tensors = _parts(data)
    file = LoraFile(_written(adapter_config__json=config, adapter_model__safetensors=tensors))
    try:
        for module in file.pairs:
            file.read(module)
    finally:
        file.close()


def _gguf(data: bytes) -> None:
    path = _written(x__gguf=data) / "x.gguf"
    _read_all(path)
    with open_checkpoint(path) as checkpoint, contextlib.suppress(CheckpointError):
        load_tokenizer(checkpoint)


def _tokenizer(data: bytes) -> None:
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    tensors = len(header).to_bytes(8, "little") + header + bytes(4)
    settings, tokenizer = _parts(data)
    folder = _written(
        config__json=_CONFIG, model__safetensors=tensors, tokenizer__json=tokenizer, tokenizer_config__json=settings
    )
    with open_checkpoint(folder) as checkpoint:
        check_tokenizer_beside(checkpoint)
        load_tokenizer(checkpoint)


def _request(data: bytes, kind: str) -> Request:
    """A request whose body arrives in three chunks."""
    cut = len(data) // 3
    pieces = [data[:cut], data[cut : 2 * cut], data[2 * cut :]]
    messages = [{"type": "http.request", "body": piece, "more_body": i < 2} for i, piece in enumerate(pieces)]

    async def receive() -> Any:
        return messages.pop(0)

    head = {"type": "http", "method": "POST", "headers": [(b"content-type", kind.encode())], "state": {"client": "key"}}
    return Request(head, receive)


def _upload(data: bytes) -> None:
    with FileStore(_SETTINGS).room("key", "client") as room:
        form = asyncio.run(read_upload_form(_request(data, "multipart/form-data; boundary=xx"), _SETTINGS, room))
    check_fields(form.fields, strict=True)
    if form.name is not None:
        read_upload(form.name, bytes(form.data))


def _document(data: bytes) -> None:
    read_upload(_NAMES[data[0] % len(_NAMES)] if data else "a", data[1:])


class _PageReader:
    def read(self, image: Any) -> list[RecognizedLine]:
        return [RecognizedLine(f"{image.size}", (0.0, 0.0, 1.0, 1.0))]


def _scanned(data: bytes) -> None:
    lines_of(data.decode("utf-8", "replace"))
    read(_NAMES[0], data, _PageReader())


def _picture(data: bytes) -> None:
    decode(data, 1 << 16)


def _body(data: bytes) -> None:
    reader = BodyReader(_SETTINGS, max_per_client=1, max_jobs=1)
    try:
        value, _ = asyncio.run(reader.read(_request(data, "application/json")))
    finally:
        reader.queue.close()
    for model in _BODIES:
        with contextlib.suppress(ApiError):
            parse(model, value)


def _schema(data: bytes) -> None:
    enforced = normalize(data.decode("utf-8", "replace"))
    with contextlib.suppress(RuntimeError, ValueError):  # as in the worker that compiles grammars
        _ebnf({"schema": enforced.schema, "rules": enforced.rules}, xgrammar)


def _pattern(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    for json_string in (False, True):
        with contextlib.suppress(ValueError):
            to_rules(text, "name", json_string=json_string)


def _blocks(data: bytes) -> None:
    saved = open_blocks(_written(x__blocks=data) / "x.blocks")
    for _ in saved.blocks():
        pass


def _state(data: bytes) -> None:
    read_state(_written(x__safetensors=data) / "x.safetensors")


_HEADER = ("F32", "BF16", "U8", "I64", "dtype", "shape", "data_offsets", "__metadata__", "format", "int4", "int8", "q4_1")
_MANIFEST = ("packed_manifest", "modules", "quant_method", "version")
_QUANTIZERS = ("bits", "group_size", "num_bits", "weight_block_size", "blocksize", "qweight", "g_idx", "I8", "I32", "F8_E4M3")
_LORA = ("base_model.model.", ".lora_A.weight", ".lora_B.weight", "rank_pattern", "alpha_pattern", "lora_alpha", "use_rslora")
_JSON = ("null", "true", "false", "[]", "{}", "1e999", "-1", "9223372036854775808", "\\ud800", "\\u0000")
_SCHEMA = (
    "type", "properties", "required", "items", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "$defs", "#/$defs/a", "#",
    "pattern", "format", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "minItems", "maxItems", "object",
    "array", "string", "integer", "number", "boolean", "additionalProperties", "prefixItems", "multipleOf", "date-time",
)  # fmt: skip
_REQUEST = (
    "messages", "role", "user", "assistant", "tool", "content", "text", "file", "file_data", "tools", "function", "name",
    "parameters", "tool_calls", "tool_choice", "response_format", "json_schema", "schema", "stream", "stop", "logit_bias",
    "prompt", "input", "instructions", "n", "seed", "max_tokens", "temperature", "top_logprobs", "logprobs", "reasoning",
)  # fmt: skip

TARGETS = {
    "packed": Target(_packed, (CheckpointError, ConfigError), (*_HEADER, *_JSON, *_MANIFEST)),
    "quantized": Target(_packed, (CheckpointError, ConfigError), (*_HEADER, *_JSON, *_QUANTIZERS)),
    "lora": Target(_lora, (AdapterError, CheckpointError), (*_HEADER, *_JSON, *_LORA)),
    "gguf": Target(_gguf, (CheckpointError, ConfigError), ("general.architecture", "llama", "tokenizer.ggml.tokens", "GGUF")),
    "tokenizer": Target(_tokenizer, (CheckpointError, ConfigError), (*_JSON, "model", "vocab", "merges", "BPE", "Unigram")),
    "blocks": Target(_blocks, (CheckpointError,), (*_JSON, "held", "tokens", "block_bytes", "made_with")),
    "state": Target(_state, (CheckpointError,), (*_HEADER, *_JSON, "tensor", "dict", "tuple", "array")),
    "upload": Target(_upload, (ApiError, DocumentError), ("--xx\r\n", "--xx--", "Content-Disposition: form-data; name=")),
    "document": Target(_document, (DocumentError,), ("<p>", "<table>", "<!--", "&#", "endobj", "stream", "/Kids", "word/")),
    "scanned": Target(
        _scanned, (DocumentError,), ("endobj", "/XObject", "/Image", "/DCTDecode", "<|ref|>", "<|det|>[[1, 2, 3, 4]]")
    ),
    "picture": Target(_picture, (ValueError,), ("PNG\r\n", "IHDR", "IDAT", "Exif", "GIF89a", "RIFF", "WEBP", "BM", "II*\x00")),
    "body": Target(_body, (ApiError,), (*_REQUEST, *_JSON)),
    "schema": Target(_schema, (RequestError,), (*_SCHEMA, *_JSON)),
    "pattern": Target(_pattern, (), ("(?:", "(?=", "[^", "\\d", "\\u", "{2,3}", "|", "\\p{L}", "[[:alpha:]]")),
}

torch.set_num_threads(1)
