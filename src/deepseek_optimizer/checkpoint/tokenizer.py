"""The tokenizer of a checkpoint."""

from __future__ import annotations

from typing import Any

from ..errors import CheckpointError
from .base import Checkpoint
from .gguf import GgufCheckpoint


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Transformers' tokenizer of an opened (so validated) checkpoint; no code of the checkpoint is run.

    Raises:
        CheckpointError: there is none, it can't be read, or it has more tokens than the embedding has rows.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # seconds to import

    try:
        if checkpoint.path.is_dir():
            tokenizer = AutoTokenizer.from_pretrained(str(checkpoint.path), trust_remote_code=False)
        else:
            # AutoTokenizer would first read the whole header with gguf's slow reader (3 s), only to choose this class.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(checkpoint.path.parent), gguf_file=checkpoint.path.name)
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
