"""How work is divided on cards, and the search for better divisions. No Triton and no card is needed."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

from deepseek_optimizer.backends.cuda import cost_table, tuning
from deepseek_optimizer.backends.cuda.cost_table import ALLOWED, FACTS, Card, card_of, content, division_for, read, shipped
from deepseek_optimizer.backends.cuda.division import DEFAULT, Division
from deepseek_optimizer.errors import DataError

CARD = Card("a card", (9, 0), 132, "580.1", "3.9.0", "1.0")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def written(division, card=CARD):
    card.path.parent.mkdir(parents=True, exist_ok=True)
    card.path.write_bytes(content(card, division, {}))


def test_defaults_are_derived_from_the_card():
    """Four programs for each processor; later generations that are not in the table are like the last one."""
    assert {capability: shipped(capability).programs for capability in FACTS} == {
        (8, 0): 432, (8, 6): 328, (8, 9): 512, (9, 0): 528, (10, 0): 592,
    }  # fmt: skip
    assert shipped((9, 0), 114).programs == 456  # an H100 PCIe
    assert shipped((12, 0)) == shipped((10, 0)) and shipped((8, 7)) == shipped((8, 6))
    assert replace(shipped((8, 0)), programs=DEFAULT.programs) == DEFAULT


def test_division_of_matrices_and_caches():
    narrow = Division(programs=64, most_splits=4, chunk_blocks=4)
    assert DEFAULT.splits(4, 10**6) == 8 and narrow.splits(4, 10**6) == 4 and narrow.splits(64, 10**6) == 1
    assert DEFAULT.chunks(1, 64, 8) == 8 and narrow.chunks(1, 64, 8) == 8 and narrow.chunks(1, 8, 8) == 2


def test_settings_are_kept_for_this_card_only(cache):
    assert division_for(CARD) == (shipped((9, 0)), "kernels not tuned")
    found = Division(programs=264, most_splits=16, vector_warps=2, block_n=32, tile_warps=8, tile_stages=1, chunk_blocks=4)
    written(found)
    assert division_for(CARD) == (found, "kernels tuned on this card")
    assert CARD.path.is_relative_to(cache / "deepseek-optimizer" / "kernels")
    for name, other in (("name", "another"), ("driver", "590.2"), ("triton", "4.0"), ("package", "2.0"), ("processors", 114)):
        assert division_for(replace(CARD, **{name: other}))[1] == "kernels not tuned"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda value: value.pop("version"), "not settings of kernels of this version"),
        (lambda value: value.update(division=[]), "not settings of kernels of this version"),
        (lambda value: value["division"].update(tile_warps=3), "tile_warps.*has the value 3"),
        (lambda value: value["division"].update(programs=0), "programs.*has the value 0"),
        (lambda value: value["division"].pop("block_n"), "block_n.*has the value None"),
        (lambda value: value["division"].update(most_splits=True), "most_splits.*has the value True"),
    ],
)
def test_damaged_settings_are_not_used(change, said):
    value = json.loads(content(CARD, DEFAULT, {}))
    change(value)
    CARD.path.parent.mkdir(parents=True)
    CARD.path.write_text(json.dumps(value))
    with pytest.raises(DataError, match=said):
        read(CARD)
    division, source = division_for(CARD)
    assert division == shipped((9, 0)) and source.startswith("kernels not tuned (") and "run dso tune --kernels again" in source


def test_settings_that_are_no_json():
    CARD.path.parent.mkdir(parents=True)
    CARD.path.write_text("{")
    with pytest.raises(DataError, match="not settings of kernels .*; run dso tune --kernels again"):
        read(CARD)


def test_what_a_card_is(monkeypatch, tmp_path):
    properties = SimpleNamespace(name="NVIDIA L4", major=8, minor=9, multi_processor_count=58)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(cost_table, "versions", lambda *names: dict.fromkeys(names, "1.2"))
    file = tmp_path / "version"
    wanted = Card("NVIDIA L4", (8, 9), 58, "550.54.15", "1.2", "1.2")
    for text in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build\n",
    ):
        file.write_text(text)
        assert card_of(torch.device("cuda"), file) == wanted
    assert card_of(torch.device("cuda"), tmp_path / "none") == replace(wanted, driver="")


class Timer:
    """Seconds of a card that has a best value for each setting. calls: what was measured."""

    def __init__(self, best, noise=()):
        self.best, self.noise, self.calls = best, list(noise), []

    def __call__(self, division, work):
        self.calls.append((division, work))
        seconds = 1.0
        for name, of_work in tuning.WORK.items():
            if of_work == work and getattr(division, name) != self.best[name]:
                seconds += 0.1
        return seconds + (self.noise.pop() if self.noise else 0.0)


BEST = {
    "programs": 1024, "most_splits": 16, "vector_warps": 2, "chunk_blocks": 8, "block_n": 32, "tile_warps": 8, "tile_stages": 1,
}  # fmt: skip


def test_the_best_value_of_each_setting_is_found():
    timer, notes = Timer(BEST), []
    best, gains = tuning.tune(timer, DEFAULT, notes.append)
    assert best == Division(**BEST)
    assert {gain.setting for gain in gains} == set(BEST) - {"chunk_blocks"}
    assert next(gain for gain in gains if gain.setting == "tile_warps").before == 4
    assert any(note.startswith("programs=1024: ") and note.endswith("faster than 512") for note in notes)
    assert set(ALLOWED) == set(tuning.WORK) == {each.name for each in fields(Division)}


def test_measurements_are_paired():
    """Each side comes first in about half of the pairs, after one call of each that compiles."""
    timer = Timer({**vars(DEFAULT), "vector_warps": 2})
    tuning._gain(timer, DEFAULT, other := replace(DEFAULT, vector_warps=2), "decode")
    order = [division is other for division, _ in timer.calls]
    assert order == [True, False, *[False, True, True, False] * 2, False, True]


def test_noise_changes_nothing():
    """A value that is slower in one of the pairs, or hardly faster, is not taken."""
    same = vars(DEFAULT)
    assert tuning.tune(Timer(same), DEFAULT) == (DEFAULT, [])
    noisy = Timer({**same, "vector_warps": 2}, noise=[0.0, 0.0, 0.0, 0.5] + [0.0] * 8)
    assert tuning._gain(noisy, DEFAULT, replace(DEFAULT, vector_warps=2), "decode") == 0.0


def test_what_cannot_run_is_ruled_out():
    def measure(division, work):
        if division.tile_warps > 4:
            raise RuntimeError("out of resource: shared memory")
        return 1.0

    notes = []
    assert tuning.tune(measure, DEFAULT, notes.append) == (DEFAULT, [])
    assert "tile_warps=8: impossible" in notes and "tile_stages=1: not faster" in notes
