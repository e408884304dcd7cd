"""Words of a request as sequences of tokens, for `SamplingParams.bad_words` and `dry_breakers`. Imports no tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Encode = Callable[[str], list[int]]

_MAX_BREAKER_BYTES, _MAX_TAIL = 40, 20  # llama.cpp's limits


def bad_words(words: Sequence[str], encode: Encode) -> tuple[tuple[int, ...], ...]:
    """The token sequences of words, at the beginning of a text and after a space, as in vLLM
    (`SamplingParams.update_from_tokenizer` in vllm/sampling_params.py).

    Args:
        words: none may be empty.
        encode: tokenizes a text without special tokens.
    """
    sequences: list[tuple[int, ...]] = []
    for word in words:
        plain = tuple(encode(word.lstrip() or word))
        after_space = tuple(encode(" " + word.lstrip()))
        sequences.append(plain)
        if after_space and plain and after_space[0] != plain[0] and len(after_space) == len(plain):
            sequences.append(after_space)
    return tuple(dict.fromkeys(sequence for sequence in sequences if sequence))


class BreakerIndex:
    """Finds the token sequences in which a DRY sequence breaker can occur, as llama.cpp does
    (`get_overlapping_token_sequences` in src/llama-sampler.cpp): a token that contains it, or one that ends with its beginning,
    followed by the tokens of the rest.

    Args:
        words: bytes of each token.
    """

    def __init__(self, words: Sequence[bytes]) -> None:
        self._words = words
        self._with_byte: list[list[int]] = [[] for _ in range(256)]  # tokens that contain each byte
        for token, word in enumerate(words):
            for byte in set(word):
                self._with_byte[byte].append(token)

    def breakers(self, strings: Sequence[str], encode: Encode) -> dict[int, tuple[tuple[int, ...], ...]]:
        """`SamplingParams.dry_breakers` for these strings; only their first 40 bytes count.

        Args:
            strings: the breakers.
            encode: tokenizes a text without special tokens.
        """
        tails: dict[int, dict[tuple[int, ...], None]] = {}
        for string in strings:
            target = string.encode(errors="replace")[:_MAX_BREAKER_BYTES]
            for token in self._with_byte[target[0]] if target else ():
                for tail in _tails(self._words[token], target, encode):
                    tails.setdefault(token, {})[tail] = None
        return {token: tuple(found) for token, found in tails.items()}


def _tails(word: bytes, target: bytes, encode: Encode) -> list[tuple[int, ...]]:
    """The tokens that may follow a token to complete the target: an empty sequence if it contains the target."""
    if target in word:
        return [()]
    lengths = (length for length in range(1, min(len(word), len(target) - 1) + 1) if word.endswith(target[:length]))
    tails = (tuple(encode(target[length:].decode(errors="ignore"))[:_MAX_TAIL]) for length in lengths)
    return [tail for tail in tails if tail]
