"""What FSDP2 cannot shard is refused before it tries."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer.train.fsdp import shard_exact_weights
from deepseek_optimizer.train.precision import set_training_dtype
from support.family_configs import deepseek_v4
from support.models import random_model


def test_weights_of_two_dtypes_in_a_layer_are_refused():
    model = random_model(deepseek_v4()).float()
    plugin = SimpleNamespace(fsdp_version=2)
    trainer = SimpleNamespace(model=model, accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    shard_exact_weights(trainer)
    set_training_dtype(model, torch.bfloat16)
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.sinks, which stays torch.float32.*bf16=False"):
        shard_exact_weights(trainer)
    plugin.fsdp_version = 1
    shard_exact_weights(trainer)
