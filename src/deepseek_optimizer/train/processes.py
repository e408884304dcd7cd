"""Sharding over processes on CPUs. Accelerate knows FSDP on GPUs alone: asked for it on CPUs, it trains with DDP and says
nothing. FSDP2 itself runs on gloo, so the accelerator that a trainer has made is told to shard."""

from __future__ import annotations

from typing import Any

from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def shard_on_cpus(trainer: Any) -> None:
    """For a trainer whose arguments ask for `fsdp` and whose processes are on CPUs; for any other nothing changes."""
    state = trainer.accelerator.state
    if trainer.args.fsdp_plugin_args is None or state.distributed_type != DistributedType.MULTI_CPU:
        return
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    state.distributed_type = DistributedType.FSDP
    trainer.is_fsdp_enabled = True
