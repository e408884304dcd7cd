"""Proposers that need no model."""

from __future__ import annotations

import ast
import random
from pathlib import Path

import pytest

import deepseek_optimizer.engine
from deepseek_optimizer.cache import BlockManager, SequenceBlocks
from deepseek_optimizer.engine.sequence import Sequence
from deepseek_optimizer.engine.speculative.prompt_lookup import PromptLookupProposer
from support.scripted_proposer import ScriptedProposer


def sequence(tokens, index=0):
    return Sequence(index, list(tokens), SequenceBlocks(BlockManager(4)))


def looked_up(tokens, count, longest=3, shortest=2):
    """The definition: the longest n-gram, its latest earlier occurrence."""
    for size in range(longest, shortest - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if size <= len(tokens) and tokens[end - size : end] == tokens[-size:]:
                return tokens[end : end + count]
    return []


def test_prompt_lookup_equals_its_definition_incrementally():
    rng = random.Random(0)
    for _ in range(30):
        proposer = PromptLookupProposer()
        s, other = sequence(rng.choices(range(4), k=rng.randint(1, 12))), sequence([9], 1)
        for _ in range(25):
            counts = [rng.randint(1, 5), 3]
            drafts = proposer.propose([s, other], counts)
            assert drafts[0].tokens == looked_up(s.tokens, counts[0])
            assert drafts[1].tokens == []
            s.tokens += rng.choices(range(4), k=rng.randint(1, 4))


def test_prompt_lookup_of_single_tokens():
    proposer = PromptLookupProposer(1)
    assert proposer.propose([sequence([1, 2, 3, 1])], [2])[0].tokens == [2, 3]


@pytest.mark.parametrize("agree", [0.0, 0.8, 1.0])
def test_scripted_drafts_have_the_given_acceptance(agree):
    script = [random.Random(1).randrange(50) for _ in range(4000)]
    proposer = ScriptedProposer({7: script}, agree, 50)
    right = []
    for begin in range(10, 3990, 4):
        draft = proposer.propose([sequence(script[:begin], 7)], [4])[0]
        right += [a == b for a, b in zip(draft.tokens, script[begin:], strict=False)]
        assert all(0 <= t < 50 for t in draft.tokens)
    assert sum(right) / len(right) == pytest.approx(agree, abs=0.02)
    assert proposer.propose([sequence(script[:3998], 7)], [4])[0].q is None
    assert len(proposer.propose([sequence(script[:3998], 7)], [4])[0].tokens) == 2  # ends with the script


def test_torch_is_imported_only_where_steps_run():
    folder = Path(deepseek_optimizer.engine.__file__).parent
    users = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] in ("torch", "transformers") for name in names):
                users.add(path.name)
    assert users == {"runner.py", "picture_steps.py", "pictures.py", "torch_sampler.py"}  # pictures.py: for types only
