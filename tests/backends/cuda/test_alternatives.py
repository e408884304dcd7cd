"""Which alternatives to kernels are used: what is installed, fits and was measured to be faster. Needs no Triton, no card."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from deepseek_optimizer.backends.base import CompileOptions
from deepseek_optimizer.backends.cuda import alternatives, cost_table, tuning
from deepseek_optimizer.backends.cuda.alternative import Alternative, Choice, Chosen, ProductShape
from deepseek_optimizer.backends.cuda.alternatives import ALTERNATIVES, available, choice_of, chosen, named, why_not, with_rows
from deepseek_optimizer.backends.cuda.cost_table import Card, choices_for, content, division_for, read_choices
from deepseek_optimizer.backends.cuda.division import DEFAULT
from deepseek_optimizer.backends.cuda.scaled_mm import SCALED_MM
from deepseek_optimizer.backends.cuda.sizes import CudaSizes
from deepseek_optimizer.errors import BackendError, DataError
from deepseek_optimizer.models import build_graph
from support.family_configs import llama
from support.pretended_card import pretend

CARD = Card("a card", (9, 0), 132, "580.1", "3.9.0", "1.0")
GPU = torch.device("cuda", 0)
FAKE = Alternative(
    "fast", "products", "fast-kernels", "0.4", (9, 10), True, lambda product: True, lambda *a: 0, lambda *a: None
)
FITTING = ProductShape("fp8", True, 128, 256, 384)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def installed(monkeypatch):
    """The version of every package, which a test may change."""
    found = {"version": "0.4.2"}
    monkeypatch.setattr(alternatives, "versions", lambda name: {name: found["version"]})
    pretend(monkeypatch)
    return found


@pytest.mark.parametrize(
    ("version", "capability", "reason"),
    [
        ("0.4", (9, 0), None),
        ("1.0+cu130", (10, 3), None),
        ("not installed", (9, 0), "fast needs fast-kernels 0.4 or later, which is not installed"),
        ("0.3.9", (9, 0), "fast needs fast-kernels 0.4 or later, but 0.3.9 is installed"),
        ("0.4rc1", (9, 0), "but 0.4rc1 is installed"),
        ("0.5", (8, 9), "fast needs compute capability 9.x or 10.x, but a card has 8.9"),
    ],
)
def test_what_an_alternative_requires(monkeypatch, installed, version, capability, reason):
    pretend(monkeypatch, capability=capability)
    installed["version"] = version
    found = why_not(FAKE, GPU)
    assert found is None if reason is None else reason in found
    assert available(GPU, [FAKE]) == ([FAKE] if reason is None else [])
    used, texts = chosen([Choice("fast", 64, version)], GPU, [FAKE])
    assert used == ((Chosen(FAKE, 64),) if reason is None else ())
    assert texts == ["fast for products from 64 rows"] if reason is None else reason in texts[0]


def test_nothing_else_is_used(installed):
    """Without a record, or with one of another version or an unknown alternative, kernels are this package's own."""
    assert chosen([], GPU, [FAKE]) == ((), [])
    assert chosen([Choice("fast", 64, "0.4.1")], GPU, [FAKE]) == (
        (), ["fast not used (measured with fast-kernels 0.4.1, not 0.4.2)"]
    )  # fmt: skip
    assert chosen([Choice("gone", 64, "0.4.2")], GPU, [FAKE]) == ((), ["gone not used (unknown)"])
    assert "the device is cpu" in why_not(FAKE, torch.device("cpu"))
    further = replace(FAKE, why_not=lambda device: "a reason of its own")
    assert chosen([choice_of(FAKE, 64)], GPU, [further]) == ((), ["fast not used (a reason of its own)"])
    with pytest.raises(BackendError, match="no alternative 'gone'; choose among scaled_mm"):
        named("gone")


def test_what_cannot_be_captured_is_not_used_in_captured_steps():
    assert with_rows(FAKE, 64).rows == 64 and with_rows(replace(FAKE, captured=False), 64).rows == 257
    assert Chosen(FAKE, 64).takes(64, FITTING) and not Chosen(FAKE, 64).takes(63, FITTING)


def times(faster_from, impossible=0):
    """Seconds of a card on which an alternative is faster from a number of rows on."""

    def measure(name, rows):
        if name is not None and rows < impossible:
            raise RuntimeError("no such kernel")
        return 1.0 if name is None else 0.8 if rows >= faster_from else 1.2

    return measure


def test_alternatives_are_measured():
    notes = []
    assert tuning.faster_rows(times(64), "fast", notes.append) == (64, 0.25)
    assert notes[-2:] == ["fast, 64 rows: 25.0% faster than the kernel", "fast, 16 rows: not faster"]
    assert tuning.faster_rows(times(1), "fast") == (16, 0.25)
    assert tuning.faster_rows(times(600), "fast") is None
    assert tuning.faster_rows(times(1, impossible=256), "fast", notes.append) == (256, 0.25)
    assert notes[-1] == "fast, 64 rows: impossible"
    assert tuning.faster_rows(times(1, impossible=600), "fast") is None


def test_choices_are_kept_for_this_card():
    choices = (Choice("scaled_mm", 64, "2.13.0"), Choice("fast", 512, "0.4"))
    assert choices_for(CARD) == ()
    CARD.path.parent.mkdir(parents=True)
    CARD.path.write_bytes(content(CARD, DEFAULT, {}, choices))
    assert read_choices(CARD) == choices == choices_for(CARD)
    value = json.loads(CARD.path.read_bytes())
    del value["alternatives"]  # of a version without them
    CARD.path.write_text(json.dumps(value))
    assert choices_for(CARD) == () and division_for(CARD) == (DEFAULT, "kernels tuned on this card")


@pytest.mark.parametrize(
    "damaged", [5, [5], [{"name": "a", "rows": 0, "version": "1"}], [{"name": "a", "rows": True, "version": "1"}]]
)
def test_damaged_choices_are_not_used(damaged):
    """Nor is anything else in their file."""
    value = json.loads(content(CARD, replace(DEFAULT, tile_warps=8), {}))
    value["alternatives"] = damaged
    CARD.path.parent.mkdir(parents=True)
    CARD.path.write_text(json.dumps(value))
    with pytest.raises(DataError, match="alternatives.*run dso tune --kernels again"):
        read_choices(CARD)
    division, source = division_for(CARD)
    assert choices_for(CARD) == () and division == cost_table.shipped((9, 0), 132)
    assert source.startswith("kernels not tuned (")


def test_scaled_mm(monkeypatch):
    """Whole blocks in FP8, on Hopper, with a torch for CUDA 12.9."""
    assert ALTERNATIVES == (SCALED_MM,) and named("scaled_mm") is SCALED_MM
    assert SCALED_MM.fits(FITTING)
    for change in ({"format": "int8"}, {"coded": False}, {"first": 16}, {"outputs": 144}, {"columns": 160}):
        assert not SCALED_MM.fits(replace(FITTING, **change))
    pretend(monkeypatch)
    assert why_not(SCALED_MM, GPU) is None
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "CUDA 12.9 or later" in why_not(SCALED_MM, GPU)
    pretend(monkeypatch, capability=(10, 0))
    assert "needs compute capability 9.x, but a card has 10.0" in why_not(SCALED_MM, GPU)


def test_its_memory_is_counted():
    """Once, as other scratch memory, and only with rows in FP8 and steps that are large enough."""
    sizes, graph = (
        CudaSizes(),
        build_graph(
            llama(
                hidden_size=256, intermediate_size=1024, vocab_size=512, num_attention_heads=4, num_key_value_heads=2
            ).to_dict()
        ),
    )
    formats, options = {name: "fp8" for name in graph.weights()}, CompileOptions("fp8")
    plain = sizes.buffer_bytes(graph, formats, options, 512, 1)
    sizes.alternatives = (Chosen(SCALED_MM, 512),)
    more = sizes.buffer_bytes(graph, formats, options, 512, 1) - plain
    own = 4 * 512 * 1024  # rows of the widest product in bf16, an upper bound, and results of up
    largest = SCALED_MM.scratch_bytes(512, 1024, 256, 2)
    assert 0 < more <= largest and largest < more + 4 * own
    assert sizes.buffer_bytes(graph, formats, CompileOptions(), 512, 1) == plain
    sizes.alternatives = (Chosen(SCALED_MM, 513),)
    assert sizes.buffer_bytes(graph, formats, options, 512, 1) == plain
