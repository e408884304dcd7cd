"""FSDP on CPUs. Accelerate supports FSDP on GPUs only, and silently falls back to DDP on CPUs. FSDP2 itself runs on gloo, so
the trainer's accelerator is reconfigured for it."""

from __future__ import annotations

from typing import Any

from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def shard_on_cpus(trainer: Any) -> None:
    """Makes a trainer with the argument `fsdp` shard its model when its processes run on CPUs; changes no other trainer."""
    state = trainer.accelerator.state
    if trainer.args.fsdp_plugin_args is None or state.distributed_type != DistributedType.MULTI_CPU:
        return
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    state.distributed_type = DistributedType.FSDP
    trainer.is_fsdp_enabled = True
