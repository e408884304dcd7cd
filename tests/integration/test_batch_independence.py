"""A sequence's text must not depend on the other sequences in the batch, nor on when those join or leave.

MoE engines have mixed up tokens when sequences of different lengths met in a batch, were padded, or left at different steps
(MoE-Infinity, issue 191). Here every sequence is run alone first; then in a batch, by `generate` and by steps of a plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from deepseek_optimizer import load_model
from deepseek_optimizer.backends.base import DECODE, PREFILL
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.cache import SequenceBlocks
from deepseek_optimizer.integration.bind.swap import weights_of
from support.models import CASES, NATIVE_FAMILIES, random_ids, random_model
from support.steps import Part, Runner, run_step
from support.tiny_v3 import documents, tiny_v3

FAMILIES = ["deepseek_v2-groups", "deepseek_v3-groups", "deepseek_v32-indexer", "youtu-tied", "tiny-v3"]
FAMILIES += ["mistral4-groups", "glm_moe_dsa-shared", "llama4_text-chunks"]
LENGTHS = (1, 7, 33, 2, 64, 19, 5, 40)  # of eight prompts: below, at and above a block's 32 tokens
TOLERANCE = 1e-4  # relative to the largest logit, for backends whose products depend on the number of rows


def runs_natively(case: str) -> bool:
    family = "deepseek_v3" if case == "tiny-v3" else case.split("-")[0]
    return unavailable_reason() is None and family in NATIVE_FAMILIES


def cases() -> Iterator[Any]:
    """Every family natively, with exact and quantized products; on the reference backend one, and those without another."""
    for case in FAMILIES:
        if case == "deepseek_v2-groups" or not runs_natively(case):
            yield pytest.param((case, "reference", "fp32"), id=f"{case}-reference")
        for precision in ("fp32", "int4") if runs_natively(case) else ():
            yield pytest.param((case, "cpu", precision), id=f"{case}-cpu-{precision}")


@dataclass
class Subject:
    """A model, eight prompts, and the continuation of each when it is alone."""

    model: Any
    prompts: list[list[int]]
    exact: bool  # whether a row's bits do not depend on the batch

    def runner(self, blocks: int) -> Runner:
        runtime = self.model.dso
        groups = runtime.graph.cache.groups
        store = runtime.backend.new_store(runtime.graph, runtime.kv_dtype, groups * blocks)
        return Runner(runtime.plan, store, (None,) * groups)

    def check(self, logits: torch.Tensor, alone: torch.Tensor, who: str) -> None:
        """logits, alone: float32 [steps, V] from which tokens were chosen."""
        assert torch.equal(logits.argmax(-1), alone.argmax(-1)), f"{who} generated a different text"
        if self.exact:
            assert torch.equal(logits, alone), who
        else:
            assert ((logits - alone).abs().amax(-1) <= TOLERANCE * alone.abs().amax(-1)).all(), who


@pytest.fixture(scope="module", params=list(cases()))
def subject(request, tmp_path_factory) -> Subject:
    case, backend, precision = request.param
    if case == "tiny-v3":
        folder = tiny_v3()
        prompts = [ids[:n] for ids, n in zip(documents(folder, len(LENGTHS), max(LENGTHS)), LENGTHS, strict=True)]
    else:
        folder = tmp_path_factory.mktemp("company") / case
        random_model(CASES[case]()).save_pretrained(folder)
        prompts = [random_ids(CASES[case](), n, seed=i) for i, n in enumerate(LENGTHS)]
    fields = {"kv_cache": "fp32"} if precision == "fp32" else {}
    model = load_model(folder, backend=backend, precision=precision, **fields)
    return Subject(model, prompts, exact=backend == "cpu")


@dataclass
class Member:
    """One sequence of a schedule: joins at step `at`, and leaves after `count` tokens."""

    number: int
    at: int
    count: int
    blocks: SequenceBlocks | None = None
    rows: list[torch.Tensor] = field(default_factory=list)


def together(runner: Runner, prompts: list[list[int]], members: list[Member]) -> None:
    """Runs the schedule: each step's batch has the prompts of joining sequences, and one token of each other sequence."""
    step = 0
    while any(len(member.rows) < member.count for member in members):
        parts, present = [], []
        for joins in (False, True):  # decode sequences come first
            for member in members:
                if (member.at == step) == joins and member.at <= step and len(member.rows) < member.count:
                    if joins:
                        member.blocks = runner.sequence()
                    ids = prompts[member.number] if joins else [int(member.rows[-1].argmax())]
                    assert member.blocks is not None
                    parts.append(Part(member.blocks, ids, PREFILL if joins else DECODE, rows=[len(ids) - 1]))
                    present.append(member)
        if parts:
            for member, row in zip(present, run_step(runner.plan, runner.store, parts).logits, strict=True):
                member.rows.append(row.clone())
                if len(member.rows) == member.count:
                    member.blocks.free()  # the next sequence gets these blocks with their old content
        step += 1


@pytest.fixture(scope="module")
def alone(subject) -> list[torch.Tensor]:
    """The logits of twelve greedy tokens of each prompt, float32 [12, V]."""
    runner = subject.runner(blocks=8)
    return [runner.decode(prompt, 12)[1] for prompt in subject.prompts]


SCHEDULES = {
    "all at once": [(i, 0, 12) for i in range(8)],
    "one after the other": [(i, 2 * i, 12) for i in range(8)],
    "leaving at every step": [(i, 0, 1 + i) for i in range(8)],
    "coming and leaving": [(0, 0, 9), (1, 1, 2), (2, 1, 12), (3, 3, 4), (4, 5, 1), (5, 5, 7), (6, 6, 3), (7, 9, 12)],
    "a long prompt among many short texts": [(3, 0, 12), (1, 0, 12), (0, 0, 12), (4, 4, 3), (2, 5, 3), (4, 8, 3)],
    "the same prompt many times": [(5, i, 8) for i in range(8)],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sequences_join_and_leave_at_any_step(subject, alone, schedule):
    members = [Member(*entry) for entry in SCHEDULES[schedule]]
    together(subject.runner(blocks=24), subject.prompts, members)
    for member in members:
        who = f"prompt {member.number}, who came at step {member.at}"
        subject.check(torch.stack(member.rows), alone[member.number][: member.count], who)


def test_experts_get_only_their_own_tokens(subject, alone):
    """Chunks of prompts together with decoding sequences: each step groups the experts of all tokens."""
    runner = subject.runner(blocks=24)
    other = runner.sequence()
    first = run_step(runner.plan, runner.store, [Part(other, subject.prompts[2], rows=[len(subject.prompts[2]) - 1])])
    rows, last, prompt = [first.logits[0]], first.logits[0], subject.prompts[4]
    blocks, begin = runner.sequence(), 0
    for size in (1, 30, 2, 31):
        parts = [Part(other, [int(last.argmax())], DECODE), Part(blocks, prompt[begin : begin + size], rows=[size - 1])]
        made = run_step(runner.plan, runner.store, parts).logits
        last, begin = made[0], begin + size
        rows.append(last)
    subject.check(torch.stack(rows), alone[2][:5], "the sequence that decoded")
    token, expected = int(made[1].argmax()), alone[4][0]
    assert expected.max() - expected[token] <= 0.03 * expected.abs().max()  # chunks may swap near ties


def generated(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """The text that `generate` adds to each prompt of a batch, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12, pad_token_id=0, **options)
    return [row[width:].tolist() for row in out]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_generate_of_padded_batches(subject, alone, size):
    prompts = subject.prompts[-size:]
    for row, logits in zip(generated(subject.model, prompts, eos_token_id=[]), alone[-size:], strict=True):
        assert row == logits.argmax(-1).tolist()


def test_generate_of_rows_that_finish_at_different_times(subject, alone):
    texts = [logits.argmax(-1).tolist() for logits in alone]
    ends = [texts[0][3], texts[2][0], texts[5][7]]  # a row that generates one of these is finished
    actual = generated(subject.model, subject.prompts, eos_token_id=ends)
    lengths = set()
    for row, text in zip(actual, texts, strict=True):
        length = next((i + 1 for i, token in enumerate(text) if token in ends), len(text))
        assert row[:length] == text[:length] and not any(row[length:])
        lengths.add(length)
    assert len(lengths) > 1, "the test needs rows that end at different steps"


def test_weights_equal_the_model(subject):
    """The plan uses the modules' storage, including stacks, so that the saved weights are those tested above."""
    for name, weight in weights_of(subject.model, subject.model.dso.graph).items():
        own = subject.model.get_submodule(name.rpartition(".")[0])
        assert weight.data.data_ptr() == getattr(own, name.rpartition(".")[2]).data_ptr()
