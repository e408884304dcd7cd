"""Special tokens in configs that are not valid tokens: as tolerant as Transformers where the model works, with a warning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepseek_optimizer import ConfigError, load_model
from deepseek_optimizer.engine.request import SamplingParams
from deepseek_optimizer.serving import make_engine
from support.damaged_checkpoints import set_config


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(tiny_model, tmp_path / "m"))
    (copy / "generation_config.json").unlink(missing_ok=True)
    return copy


@pytest.mark.parametrize("value", [-1, 10**9, [-1, 10**9]])
def test_invalid_end_tokens_are_ignored_with_a_warning(folder, value):
    set_config(folder, eos_token_id=value, bos_token_id=-1, pad_token_id=-1)
    model, plain = load_model(folder, precision="fp32"), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert model.generate(ids, **options).tolist() == plain.generate(ids, **options).tolist()
    notes = [note for note in model.report().to_dict()["warnings"] if "vocabulary" in note]
    assert len(notes) == 3 and any("eos_token_id" in note and "no text ends there" in note for note in notes)


def test_an_engine_ignores_them(folder):
    """-1 would be the last token of the vocabulary, and 10^9 out of bounds."""
    set_config(folder, eos_token_id=[-1, 10**9])
    engine = make_engine(load_model(folder, precision="fp32"), drafts=False)
    last = engine.core.facts.vocab_size - 1
    forced = SamplingParams(temperature=0, max_tokens=4, min_tokens=3, logit_bias={last: 100})
    [output] = engine.generate([[5, 6, 7]], forced)
    assert output.token_ids == [last] * 4 and output.finish == "length"


@pytest.mark.parametrize("value", [[1.5], {}, "x", [True], [10**30]])
def test_values_that_are_not_ids_are_errors_with_the_field(folder, value):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ConfigError, match=r"generation_config\.eos_token_id: expected a token id"):
        load_model(folder, backend="reference")
