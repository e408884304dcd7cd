"""`make bench-amx` without AMX: what is found in the times, and what is written. The products: native/tests/test_amx.cpp."""

from __future__ import annotations

import json

import pytest
from benchmarks import amx

from deepseek_optimizer.errors import BackendError

TOKENS = [1, 2, 4, 8, 16]


def row(tiles, format_name="INT4", kernel="linear"):
    vectors = [10, 20, 40, 80, 160]
    return {"kernel": kernel, "format": format_name, "kind": 2, "tokens": TOKENS, "tiles": tiles, "vectors": vectors}


@pytest.mark.parametrize(
    ("tiles", "first"),
    [
        ([30, 30, 30, 30, 30], 4),
        ([5, 5, 5, 5, 5], 1),
        ([5, 25, 5, 5, 5], 4),  # faster again with one token: not "from there on"
        ([30, 30, 30, 30, 160], None),
    ],
)
def test_crossover(tiles, first):
    assert amx.crossover(row(tiles)) == first


def test_vectors_compute_what_is_below_the_median_crossover():
    fast, slow, never = row([5] * 5), row([50] * 5), row([500] * 5)
    other = [row([5] * 5, "BF16"), row([5] * 5, "FP8"), row([5] * 5, "bf16", "absorbed")]  # which have no choice
    assert amx.recommended([fast, slow, slow, *other]) == 7
    assert amx.recommended([never, never, fast]) == 16


def why_not(**missing):
    return lambda isa: missing.get(isa.replace("-", "_"))


def test_the_best_panel_is_kept(tmp_path, capsys):
    times = {8: [50] * 5, 16: [30] * 5, 32: [60, 60, 60, 29, 60]}
    amx.main([], lambda panel, isa: [row(times[panel])] if isa == "amx" else [], why_not(), tmp_path)
    [path] = tmp_path.iterdir()
    assert path.name.startswith("amx-")
    entry = json.loads(path.read_text())["kernels"]
    assert (entry["panel_groups"], entry["vector_tokens"], sorted(entry["panels"])) == (16, 3, ["32", "8"])
    assert "vectors up to 3 tokens" in capsys.readouterr().out


def test_emulated_times_are_not_kept(tmp_path, capsys):
    ran = []
    run = lambda panel, isa: ran.append(isa) or [row([5] * 5)]  # noqa: E731
    amx.main(["--panels", "16"], run, why_not(amx="this CPU lacks amx_tile"), tmp_path)
    assert ran == ["amx-emulated"] and not list(tmp_path.iterdir())
    assert "lacks amx_tile" in capsys.readouterr().out


def test_without_avx512_the_error_names_what_is_missing(tmp_path):
    missing = why_not(amx="this CPU lacks amx_tile", amx_emulated="this CPU lacks avx512f, avx512_bf16")
    with pytest.raises(BackendError, match="lacks avx512f, avx512_bf16"):
        amx.main([], lambda *_: [], missing, tmp_path)
