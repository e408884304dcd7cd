"""The table of families."""

from __future__ import annotations

from deepseek_optimizer.catalog.families import EVERY_OTHER, families
from deepseek_optimizer.catalog.known import MODELS
from deepseek_optimizer.models import ENCODERS, FAMILIES, MULTIMODAL, PARTS, SUPPORTED
from deepseek_optimizer.quant import FORMATS


def test_every_family_is_listed_once():
    rows = list(families())
    names = [row.family for row in rows]
    assert len(set(names)) == len(names) and names[-1] == EVERY_OTHER
    known = (set(FAMILIES) - set(PARTS)) | set(ENCODERS) | set(MULTIMODAL) | {model.family for model in MODELS}
    assert known == set(names) - {EVERY_OTHER}
    assert {row.family for row in rows if row.path == "plan"} == {*SUPPORTED, *ENCODERS}
    assert all(row.formats == tuple(FORMATS) for row in rows)


def test_what_families_support():
    rows = {row.family: row for row in families()}
    assert rows["llama"].attention == ("flash", "eager", "sliding", "sparse") and "dso train" in rows["llama"].training
    assert "MTP layers" in rows["deepseek_v3"].drafts and "MTP layers" not in rows["gemma2"].drafts
    assert "sparse" not in rows["deepseek_v32"].attention  # its layers choose tokens as they were trained to
    assert rows["bert"].attention == ("bidirectional",) and rows["bert"].training == ("heads", "adapters")
    assert rows[EVERY_OTHER].path == "general" and rows[EVERY_OTHER].training == ("heads", "adapters")
