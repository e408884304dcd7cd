"""Multimodal RoPE: which axis each frequency takes."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer.errors import ConfigError, UnsupportedModelError
from deepseek_optimizer.models import check_config
from deepseek_optimizer.models.fields import Fields
from deepseek_optimizer.models.mrope import with_axes
from deepseek_optimizer.models.rope import read_rope

HEAD_DIM = 24


def axes(section, interleaved, **parameters):
    fields = Fields({"rope_parameters": {"rope_type": "default", "mrope_section": section, **parameters}})
    return with_axes(fields, read_rope(fields, HEAD_DIM, 512), (4, 4, 4), interleaved).axes


def by_transformers(rotary_class, section):
    """The axis of each frequency, from Transformers' recomposition of angles that are the number of their axis."""
    module = rotary_class.__new__(rotary_class)
    torch.nn.Module.__init__(module)
    module.mrope_section = section
    angles = torch.arange(3.0)[:, None, None, None].expand(3, 1, 1, HEAD_DIM // 2).clone()
    return tuple(module.recomposition_frequencies(angles)[0, 0, : HEAD_DIM // 2].int().tolist())


@pytest.mark.parametrize("section", [[2, 4, 6], [12, 0, 0], [0, 5, 7]])
def test_consecutive_axes(section):
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

    assert axes(section, False) == by_transformers(Qwen2_5_VLRotaryEmbedding, section)


@pytest.mark.parametrize("section", [[4, 4, 4], [6, 3, 3], [10, 1, 1], [2, 5, 5], [12, 0, 0], [11, 11, 10]])
def test_alternating_axes(section):
    """The last is the default, for more frequencies than there are."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    assert axes(section, True) == by_transformers(Qwen3VLTextRotaryEmbedding, section)


def test_errors():
    for section in ([1, 2], [1, 2, -1], "abc", [1, 2, 3.0], [2, 4, 7]):
        with pytest.raises(ConfigError, match="mrope_section"):
            axes(section, False)
    with pytest.raises(UnsupportedModelError, match="dynamic"):
        axes([4, 4, 4], True, rope_type="dynamic", factor=2.0)
    with pytest.raises(UnsupportedModelError, match="part of a multimodal model"):
        check_config({"model_type": "qwen3_vl_text"})
