"""FSDP on CPUs. Accelerate supports FSDP on GPUs only, and silently falls back to DDP on CPUs. FSDP2 itself runs on gloo, so
the trainer's accelerator is reconfigured for it. Gradients are averaged in fp32."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from ..errors import ConfigError
from .balancing import BIAS
from .shards import is_sharded


def reduce_in_fp32(trainer: Any) -> None:
    """Makes FSDP2 average the gradients of bf16 weights in fp32, and round the result once. Without a policy, it would do so in
    their dtype."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 2 or plugin.mixed_precision_policy is not None:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)


def shard_on_cpus(trainer: Any) -> None:
    """Makes a trainer with the argument `fsdp` shard its model when its processes run on CPUs; changes no other trainer."""
    state = trainer.accelerator.state
    if trainer.args.fsdp_plugin_args is None or state.distributed_type != DistributedType.MULTI_CPU:
        return
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    state.distributed_type = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


def shard_exact_weights(trainer: Any) -> None:
    """With FSDP2, shards routers by themselves if their weights stay fp32 while the others are bf16. FSDP2 needs trained
    weights of one dtype in each of its groups, and would put routers into those of their layers.

    Raises:
        ConfigError: other weights stay fp32 too.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 2:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = trainer.model
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        sizes[parameter.dtype] += parameter.numel() if parameter.requires_grad else 0
    usual = sizes.most_common(1)[0][0]
    for path, module in list(model.named_modules()):
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter.dtype == usual or is_sharded(parameter):
                continue
            if not hasattr(module, BIAS):
                raise ConfigError(
                    f"fsdp cannot shard {path}.{name}, which stays {parameter.dtype} while other weights of its layer are "
                    f"{usual}; use bf16=False, or train without fsdp"
                )
            fully_shard(module, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
            break
