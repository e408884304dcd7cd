"""SentencePiece tokenizers of GGUF files (Gemma's, Phi-3's, ERNIE's) against a direct implementation of the algorithm."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from deepseek_optimizer import load_tokenizer
from deepseek_optimizer.errors import CheckpointError
from support.family_configs import gemma
from support.gguf_converter import write_gguf
from support.gguf_families import CASES
from support.models import random_model

SPACE = "\u2581"
CONTROL, USER_DEFINED, BYTE, NORMAL, UNKNOWN = 3, 4, 6, 1, 2
TEXT = "the theory of the other weather: they gather there, then rather; 12 hers  and   his\nlather"


def vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types: special tokens, bytes, and the text's characters and substrings."""
    tokens = [("<unk>", 0.0, UNKNOWN), ("<bos>", 0.0, CONTROL), ("<eos>", 0.0, CONTROL), ("<turn>", 0.0, CONTROL)]
    tokens += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    tokens += [("  ", -1000.0, USER_DEFINED), ("   ", -1000.0, USER_DEFINED), ("\n", -1000.0, USER_DEFINED)]
    text = (" " + TEXT).replace(" ", SPACE)
    found = {text[i : i + n] for n in (2, 3, 4, 5) for i in range(len(text) - n) if "\n" not in text[i : i + n]}
    found = {piece for piece in found if text.count(piece) > 1 and SPACE not in piece[1:]}
    ranked = sorted(found, key=lambda piece: (-text.count(piece) * len(piece), piece))
    rng = random.Random(1)
    tokens += [(piece, -float(i) - rng.random() / 2, NORMAL) for i, piece in enumerate(ranked)]
    tokens += [(char, -float(len(ranked) + i), NORMAL) for i, char in enumerate(sorted(set(text) - {"\n"}))]
    return tuple(map(list, zip(*tokens, strict=True)))


def reference(text: str, prefix: bool) -> list[str]:
    """Cuts out user-defined and special tokens, longest first; then merges the best neighbors, the leftmost of equal ones."""
    tokens, scores, types = vocabulary()
    fixed = sorted((t for t, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)), key=len, reverse=True)
    score = {token: s for token, s, kind in zip(tokens, scores, types, strict=True) if kind == NORMAL}
    result, rest = [], ""
    i = 0

    def flush() -> None:
        nonlocal rest
        pieces = list((" " * prefix + rest).replace(" ", SPACE)) if rest else []
        while pairs := [(score[a + b], -k) for k, (a, b) in enumerate(zip(pieces, pieces[1:], strict=False)) if a + b in score]:
            k = -max(pairs)[1]
            pieces[k : k + 2] = [pieces[k] + pieces[k + 1]]
        for piece in pieces:
            result.extend([piece] if piece in score else [f"<0x{byte:02X}>" for byte in piece.encode()])
        rest = ""

    while i < len(text):
        special = next((token for token in fixed if text.startswith(token, i)), None)
        if special:
            flush()
            result.append(special)
        else:
            rest += text[i]
        i += len(special or "x")
    flush()
    return result


def save(path: Path, case: str, **changes: Any) -> Path:
    tokens, scores, types = vocabulary()
    values: dict[str, Any] = {
        "model": "llama", "pre": "default", "tokens": tokens, "scores": scores, "token_type": types, "bos_token_id": 1,
        "eos_token_id": 2, "unknown_token_id": 0, **changes,
    }  # fmt: skip

    def edit(metadata: dict[str, Any], arrays: dict[str, Any]) -> None:
        metadata |= {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}

    config = gemma(hidden_size=32, num_hidden_layers=1, intermediate_size=32, vocab_size=len(tokens))
    return write_gguf(path, CASES[case], random_model(config), edit=edit)


@pytest.mark.parametrize("prefix", [False, True])
def test_tokens_equal_the_algorithm(tmp_path: Path, prefix: bool) -> None:
    path = save(tmp_path / "m.gguf", "gemma", add_space_prefix=None if prefix else False)
    tokenizer = load_tokenizer(path)
    rng = random.Random(0)
    pieces = [TEXT, "the ", "other", "  ", "   ", "\n", "<turn>", "é🦙", " w", "hers", "12"]
    for _ in range(60):
        text = "".join(rng.choice(pieces)[rng.randrange(8) :] for _ in range(rng.randrange(1, 8)))
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.convert_ids_to_tokens(ids) == reference(text, prefix), text
        assert tokenizer.encode(text) == [1, *ids]
        if not prefix:
            assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode("the<turn>other"), skip_special_tokens=True).replace(" ", "") == "theother"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<bos>", "<eos>", "<unk>")


def test_no_marker_in_front(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save(tmp_path / "m.gguf", "gemma", add_bos_token=False))
    assert tokenizer.encode("the") == tokenizer.encode("the", add_special_tokens=False)


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"scores": None}, "no score for each token"),
        ({"scores": [0.0]}, "no score"),
        ({"token_type": [1]}, "of token types differ"),
    ],
)
def test_damaged_tokenizers(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        load_tokenizer(save(tmp_path / "m.gguf", "gemma", **changes))


def test_gemma4_merges_characters(tmp_path: Path) -> None:
    """Merges in the file's order, not across line breaks; bytes of characters without a token."""
    special = [("<pad>", CONTROL), ("<eos>", CONTROL), ("<bos>", CONTROL), ("<unk>", UNKNOWN), ("<turn>", CONTROL)]
    pieces = [SPACE, "t", "h", "e", "\n", "\nt", "th", "he", "the", f"{SPACE}the", "\n\n", 2 * SPACE]
    merges = ["\n t", "t h", "h e", "th e", f"{SPACE} the", "\n \n", f"{SPACE} {SPACE}"]
    tokens = [*special, *((f"<0x{byte:02X}>", BYTE) for byte in range(256)), *((piece, NORMAL) for piece in pieces)]
    values = {
        "tokenizer.ggml.model": "gemma4", "tokenizer.ggml.pre": "gemma4", "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.tokens": [token for token, _ in tokens], "tokenizer.ggml.token_type": [kind for _, kind in tokens],
        "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_bos_token": True,
    }  # fmt: skip
    case = CASES["gemma4"]
    config = case.config()
    config.vocab_size = len(tokens)
    path = write_gguf(tmp_path / "m.gguf", case, random_model(config), edit=lambda metadata, arrays: metadata.update(values))
    tokenizer = load_tokenizer(path)
    text = "<turn>the the\n\nthe  \u00e9"
    ids = tokenizer(text).input_ids
    expected = ["<bos>", "<turn>", "the", f"{SPACE}the", "\n\n", "the", 2 * SPACE, "<0xC3>", "<0xA9>"]
    assert tokenizer.convert_ids_to_tokens(ids) == expected
    assert tokenizer.decode(ids[1:]) == text
