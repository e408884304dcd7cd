"""8-bit moments of sharded parameters (FSDP2), whose scales cover blocks of one shard, in checkpoints of full tensors.

If every shard begins at a multiple of the block size, the blocks of the shards are those of the full tensor, and the codes and
scales of the shards are joined as they are: the usual case, in which nothing is rounded. Otherwise, the checkpoint has what the
codes stand for, m and the root of v, in fp32: the same shards give the same codes again, and other shards, other codes.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.distributed as dist

from ...errors import ConfigError
from ..ops.moments import BLOCK, Moments

M, V, M_SCALE, V_SCALE = "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"
ROOT: Final = "exp_avg_root"  # the root of v in fp32, in a checkpoint, in place of codes and scales
NAMES: Final = (M, V, M_SCALE, V_SCALE)


class Shards:
    """Where the shards of a parameter lie in its full tensor: FSDP2 divides the first dimension.

    Args:
        parameter: a DTensor.

    Raises:
        ConfigError: another dimension is divided, or several times.
    """

    def __init__(self, parameter: Any) -> None:
        mesh, places = parameter.device_mesh, [i for i, each in enumerate(parameter.placements) if each.is_shard()]
        if len(places) != 1 or not parameter.placements[places[0]].is_shard(0):
            raise ConfigError(
                f'optimizer_state="int8" needs weights that are divided in their first dimension, once, but a weight of shape '
                f'{list(parameter.shape)} has the placements {parameter.placements}; use optimizer_state="bf16"'
            )
        self.count, self.rank, self.group = mesh.size(places[0]), mesh.get_local_rank(places[0]), mesh.get_group(places[0])
        self.rows, self.width = parameter.shape[0], parameter.shape[1:].numel()
        self._chunk = -(-self.rows // self.count)  # as torch.chunk does

    def bounds(self, rank: int) -> tuple[int, int]:
        """The first element of a rank's shard, and that after its last."""
        first, end = (min(each * self._chunk, self.rows) * self.width for each in (rank, rank + 1))
        return first, end

    @property
    def aligned(self) -> bool:
        """Whether each shard begins at a block of the full tensor."""
        return all(begin % BLOCK == 0 or begin == end for begin, end in map(self.bounds, range(self.count)))

    def gather_scales(self, scales: torch.Tensor) -> torch.Tensor:
        """The scales of all shards' blocks, fp32 [blocks], in order. Called by all processes."""
        lengths = [-(-(end - begin) // BLOCK) for begin, end in map(self.bounds, range(self.count))]
        own = torch.nn.functional.pad(scales, (0, max(lengths) - len(scales)))
        parts = [torch.empty_like(own) for _ in lengths]
        dist.all_gather(parts, own, group=self.group)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def is_coded(state: dict[str, Any]) -> bool:
    """Whether a parameter's state has 8-bit moments, as codes or as values."""
    return M_SCALE in state or ROOT in state


def gathered_moments(state: dict[str, Any], parameter: Any, whole: Any) -> dict[str, torch.Tensor]:
    """The moments of a sharded parameter as a checkpoint has them. Called by all processes.

    Args:
        state: the parameter's state, with local tensors.
        whole: from a shard of the parameter's shape to the full tensor.
    """
    shards = Shards(parameter)
    moments = Moments(*(state[name] for name in NAMES))
    if shards.aligned:
        scales = {name: shards.gather_scales(state[name]) for name in (M_SCALE, V_SCALE)}
        return {M: whole(moments.m), V: whole(moments.v), **scales}
    values, roots = moments.read_roots()
    return {M: whole(values.view_as(moments.m)), ROOT: whole(roots.view_as(moments.v))}


def scattered_moments(state: dict[str, Any], parameter: Any | None) -> dict[str, torch.Tensor]:
    """The moments of this process's shard, from those of a checkpoint; codes and scales.

    Args:
        state: the parameter's state in the checkpoint.
        parameter: the sharded parameter; None: it is not sharded.
    """
    full = state[M]
    shards = None if parameter is None else Shards(parameter)
    begin, end = (0, full.numel()) if shards is None else shards.bounds(shards.rank)
    shape = full.shape if parameter is None else parameter.to_local().shape
    if ROOT not in state and (shards is None or shards.aligned):
        blocks = slice(begin // BLOCK, -(-end // BLOCK)) if begin < end else slice(0)
        codes = {name: state[name].reshape(-1)[begin:end].reshape(shape).clone() for name in (M, V)}
        return {**codes, **{name: state[name][blocks].clone() for name in (M_SCALE, V_SCALE)}}
    if ROOT in state:
        values, roots = full.reshape(-1), state[ROOT].reshape(-1)
    else:
        values, roots = Moments(*(state[name] for name in NAMES)).read_roots()
    coded = Moments.zeros(shape, "int8")
    coded.write_roots(values[begin:end], roots[begin:end])
    return {M: coded.m, V: coded.v, M_SCALE: coded.m_scale, V_SCALE: coded.v_scale}  # type: ignore[dict-item]
