"""Loading and checking the tokenizer of a checkpoint."""

from __future__ import annotations

import json
import re
from typing import Any

from ..errors import CheckpointError
from .base import Checkpoint
from .chat_template import published_template
from .files import DataFile, inside
from .gguf import GgufCheckpoint

_MAX_BYTES = 256 << 20
_NUMBER = re.compile(rb'"\s*:\s*(\d{1,18})')  # a number after a key: every id of a vocabulary, and a few others


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Loads Transformers' tokenizer of an open, and therefore validated, checkpoint. No code of the checkpoint is run.

    If the checkpoint has no chat template, and the prompts of its model type are published in another form, the tokenizer gets
    the template of `published_template`.

    Raises:
        CheckpointError: there is none, it cannot be read, or it has more tokens than the embedding has rows.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # seconds to import

    try:
        if checkpoint.path.is_dir():
            tokenizer = AutoTokenizer.from_pretrained(str(checkpoint.path), trust_remote_code=False)
        elif not isinstance(checkpoint, GgufCheckpoint) or (tokenizer := checkpoint.tokenizer()) is None:
            # AutoTokenizer would choose this class, after reading the whole header with gguf's slow reader (3 s).
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(checkpoint.path.parent), gguf_file=checkpoint.path.name)
    except CheckpointError:
        raise
    except Exception as error:  # for a damaged file, Transformers and tokenizers raise errors of many types
        raise CheckpointError(f"has no tokenizer that can be read: {error}", file=checkpoint.path) from error
    # Transformers may add the default end marker of its class to a GGUF vocabulary, so the file's own tokens are counted.
    tokens = checkpoint.vocabulary_size if isinstance(checkpoint, GgufCheckpoint) else None
    config = checkpoint.config()
    check_tokenizer_size(tokens or len(tokenizer), config.get("vocab_size"), checkpoint.path)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = published_template(config.get("model_type"))
    return tokenizer


def check_tokenizer_size(tokens: int, vocab_size: Any, file: object) -> None:
    """Checks that the embedding has a row for each token id.

    Args:
        tokens: number of tokens of the tokenizer.
        vocab_size: rows of the embedding, as in the config; not checked unless it is an int.
        file: for errors.

    Raises:
        CheckpointError: the tokenizer has more tokens than the embedding has rows.
    """
    if isinstance(vocab_size, int) and tokens > vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokens} tokens, but the embedding only {vocab_size} rows; "
            "use the tokenizer that belongs to these weights",
            file=file,
        )


def check_tokenizer_beside(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError if the tokenizer in the checkpoint is too large for the weights. One that is missing or cannot be
    read does not affect the model, and is reported by `load_tokenizer`.

    Takes milliseconds: the ids of a vocabulary are numbers after keys, and if none of those is too large, nothing is parsed.
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
    if b"Unigram" in text or max(map(int, _NUMBER.findall(text)), default=0) >= size:  # Unigram's ids are positions in a list
        check_tokenizer_size(_largest_id(text) + 1, size, file.path)


def _largest_id(text: bytes) -> int:
    """The largest id in a tokenizer.json; -1 if there is none."""
    try:
        content = json.loads(text)
        vocabulary = content["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
        return max(-1, *ids, *(token["id"] for token in content.get("added_tokens") or ()))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return -1
