"""Which formats of weights are searched, and the copies of a model in them."""

from __future__ import annotations

import pytest

from deepseek_optimizer import load_model
from deepseek_optimizer.integration.load import pack_checkpoint as packing
from deepseek_optimizer.tune.formats import PRECISIONS, PackedCopies, WeightFormats, weight_formats
from deepseek_optimizer.tune.replay import ModelMeasure
from deepseek_optimizer.tune.settings import Settings
from deepseek_optimizer.tune.traces import TraceRequest

TRACE = (TraceRequest(0.0, 40, 3), TraceRequest(0.0, 30, 3))
QUALITIES = ("exact", "balanced", "fast")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "deepseek-optimizer"


@pytest.fixture(scope="module")
def nested(tiny_model, byte_tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("nested") / "model"
    packing.pack_checkpoint(tiny_model, out, {"precision": "int8_nested"}, tokenizer=byte_tokenizer)
    return out


def test_a_model_in_floats_is_searched_in_several_formats(tiny_model):
    assert weight_formats(tiny_model, {}) == WeightFormats(("auto", *PRECISIONS))
    assert "precision is given: int4" in weight_formats(tiny_model, {"precision": "int4"}).note
    assert weight_formats(tiny_model, {"precision": "int8_nested"}) == WeightFormats(qualities=QUALITIES)


def test_a_packed_model_has_its_qualities_or_one_format(tiny_model, nested, tmp_path):
    assert weight_formats(nested, {}) == WeightFormats(qualities=QUALITIES)
    packing.pack_checkpoint(tiny_model, tmp_path / "packed", {"precision": "int4"})
    found = weight_formats(tmp_path / "packed", {})
    assert found.precisions == ("auto",) and found.qualities == ("exact",)
    assert found.note == "formats of weights are not searched, since packed is packed in int4; give the original model"


def test_copies_are_packed_once_and_removed(tiny_model, cache, monkeypatch):
    packed, pack = [], packing.pack_checkpoint

    def record(path, out, fields, **options):
        packed.append(fields["precision"])
        pack(path, out, fields, **options)

    monkeypatch.setattr(packing, "pack_checkpoint", record)
    with PackedCopies(tiny_model) as copies:
        for precision in ("int8", "auto", "int8"):
            formats = set(load_model(copies(precision)).dso.manifest.formats().values())
            assert ("int8" in formats) == (precision == "int8")
        assert packed == ["int8", "auto"] and len(list(cache.iterdir())) == 1
        copied, loaded = load_model(copies("int8")).state_dict(), load_model(tiny_model, precision="int8").state_dict()
        assert all((copied[name] == loaded[name]).all() for name in loaded)  # what the profile's user gets
    assert list(cache.iterdir()) == []


def figures_of(measure, settings):
    measured = measure(settings)
    figures = next(measured)
    measured.close()
    return figures


def test_each_format_has_its_memory_and_quality(tiny_model):
    with PackedCopies(tiny_model) as copies:
        measure = ModelMeasure(tiny_model, {}, TRACE, copies=copies)
        found = [figures_of(measure, Settings(1, precision=precision)) for precision in ("auto", "int8", "int4", "auto")]
    given, int8, int4, again = found
    assert given.memory_bytes == again.memory_bytes > int8.memory_bytes > int4.memory_bytes
    assert given.kl == again.kl == 0 < int8.kl < int4.kl


def test_each_quality_has_its_own(nested):
    measure = ModelMeasure(nested, {}, TRACE)
    exact, balanced, fast = (figures_of(measure, Settings(1, quality=quality)) for quality in QUALITIES)
    assert exact.kl == 0 < balanced.kl < fast.kl
    assert exact.memory_bytes == balanced.memory_bytes == fast.memory_bytes
