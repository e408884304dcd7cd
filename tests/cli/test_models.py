"""`dso models`: families, and memory of well-known models."""

from __future__ import annotations

import json


def test_one_family(dso):
    result = dso("models", "mistral", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert [row["family"] for row in facts["families"]] == ["mistral"] and facts["families"][0]["path"] == "plan"
    (model,) = facts["models"]
    assert model["context"] == 8192 and model["weights"]["int4"] < model["total"]["int4"] < model["total"]["bf16"]
    text = dso("models", "mistral").stdout
    assert "Mistral-7B" in text and "int4" in text and "8,192" in text


def test_an_unknown_family(dso):
    result = dso("models", "nothing")
    assert result.exit_code == 2 and "'nothing'" in result.stderr
