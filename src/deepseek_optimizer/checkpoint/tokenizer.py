"""The tokenizer of a checkpoint."""

from __future__ import annotations

import json
import re
from typing import Any

from ..errors import CheckpointError
from .base import Checkpoint
from .files import DataFile, inside
from .gguf import GgufCheckpoint

_MAX_BYTES = 256 << 20
_NUMBER = re.compile(rb'"\s*:\s*(\d{1,18})')  # what stands after a key: every id of a vocabulary, and a few other numbers


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Transformers' tokenizer of an opened (so validated) checkpoint; no code of the checkpoint is run.

    Raises:
        CheckpointError: there is none, it can't be read, or it has more tokens than the embedding has rows.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # seconds to import

    try:
        if checkpoint.path.is_dir():
            tokenizer = AutoTokenizer.from_pretrained(str(checkpoint.path), trust_remote_code=False)
        elif not isinstance(checkpoint, GgufCheckpoint) or (tokenizer := checkpoint.tokenizer()) is None:
            # AutoTokenizer would first read the whole header with gguf's slow reader (3 s), only to choose this class.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(checkpoint.path.parent), gguf_file=checkpoint.path.name)
    except CheckpointError:
        raise
    except Exception as error:  # Transformers and tokenizers raise whatever a damaged file leads them to
        raise CheckpointError(f"has no tokenizer that can be read: {error}", file=checkpoint.path) from error
    # Transformers may add its class's default end marker to a GGUF vocabulary: what the file itself lists is what counts.
    tokens = checkpoint.vocabulary_size if isinstance(checkpoint, GgufCheckpoint) else None
    check_tokenizer_size(tokens or len(tokenizer), checkpoint.config().get("vocab_size"), checkpoint.path)
    return tokenizer


def check_tokenizer_size(tokens: int, vocab_size: Any, file: object) -> None:
    """CheckpointError if the tokenizer can make ids that the embedding has no row for."""
    if isinstance(vocab_size, int) and tokens > vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokens} tokens, but the embedding only {vocab_size} rows; "
            "fetch the tokenizer that belongs to these weights",
            file=file,
        )


def check_tokenizer_beside(checkpoint: Checkpoint) -> None:
    """CheckpointError if the tokenizer that lies with the weights is too large for them. One that is missing, or that can't be
    read, is nothing to the model: `load_tokenizer` speaks of it.

    Costs milliseconds: the ids of a vocabulary are numbers after keys, and where none of these is too large, nothing is parsed.
    """
    size = checkpoint.config().get("vocab_size")
    if isinstance(checkpoint, GgufCheckpoint):
        check_tokenizer_size(checkpoint.vocabulary_size or 0, size, checkpoint.path)
        return
    if not isinstance(size, int) or not (checkpoint.path / "tokenizer.json").is_file():
        return
    file = DataFile(inside(checkpoint.path, "tokenizer.json"))
    try:
        text = file.read(0, file.size) if file.size <= _MAX_BYTES else b""
    finally:
        file.close()
    if b"Unigram" in text or max(map(int, _NUMBER.findall(text)), default=0) >= size:  # Unigram's ids are places in a list
        check_tokenizer_size(_largest_id(text) + 1, size, file.path)


def _largest_id(text: bytes) -> int:
    """The largest id of a tokenizer.json, -1 where there is none."""
    try:
        whole = json.loads(text)
        vocabulary = whole["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
        return max(-1, *ids, *(token["id"] for token in whole.get("added_tokens") or ()))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return -1
