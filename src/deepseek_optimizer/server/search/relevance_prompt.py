"""The prompt by which a language model judges a document: Qwen3-Reranker's, answered with "yes" or "no".

Source: the model card of Qwen/Qwen3-Reranker-0.6B. The score is the probability of "yes" among these two tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import RequestError
from ..tokens.prompt_size import too_long
from .texts import Tokens, Truncation

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
_BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. Note "
    'that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def answer_tokens(tokenizer: Any, stored: tuple[int, int] | None) -> tuple[int, int]:
    """Ids of the tokens of the answers "yes" and "no".

    Args:
        tokenizer: of Transformers.
        stored: those that the checkpoint names; None: it names none.

    Raises:
        RequestError: the tokenizer has no such tokens.
    """
    if stored is not None:
        return stored
    ids = [tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no")]
    if any(token is None or token == tokenizer.unk_token_id for token in ids):
        raise RequestError(
            "model", 'scores need a tokenizer with the tokens "yes" and "no"; start the server with --reranker cosine'
        )
    return ids[0], ids[1]


def judge_tokens(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], instruction: str | None, room: int, truncate: Truncation
) -> list[Tokens]:
    """The prompts of (query, document) pairs. Control tokens in the texts are encoded as ordinary text.

    Args:
        tokenizer: of Transformers.
        pairs: the texts.
        instruction: the task; None: that of the model card.
        room: maximum number of tokens of a prompt.
        truncate: shortens the end of the document if its `tokens` is not None.

    Raises:
        RequestError: a prompt does not fit.
    """
    before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (_BEFORE, _AFTER))
    limit = room if truncate.tokens is None else min(room, truncate.tokens)
    texts = [f"<Instruct>: {instruction or INSTRUCTION}\n<Query>: {query}\n<Document>: {document}" for query, document in pairs]
    bodies = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    space = limit - len(before) - len(after)
    if truncate.tokens is None and any(len(body) > space for body in bodies):
        longest = max(map(len, bodies)) + len(before) + len(after)
        raise RequestError("documents", f"{too_long(room, longest)}, or send truncate_prompt_tokens: -1")
    if space < 1:
        raise RequestError("truncate_prompt_tokens", f"must be more than the {len(before) + len(after)} tokens of the template")
    return [Tokens([*before, *body[:space], *after]) for body in bodies]
