"""Whether the processes of a model have loaded the same one: those of other machines read files of their own."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence

from ...checkpoint import Checkpoint
from ...config import DeepSeekConfig
from ...graph.ir import Graph
from ...graph.parallel.pipeline import Stage
from ...versions import versions

_SAMPLE = 1024  # bytes hashed at the beginning of each tensor: distinguishes models of the same shape without reading them
_OF_A_MACHINE = ("threads", "isa")  # settings that may differ


def fingerprint(stages: Sequence[Stage], graph: Graph | None, settings: DeepSeekConfig, checkpoint: Checkpoint) -> str:
    """The same in all processes that divide the same model in the same way, with the same settings and version of this package.

    Args:
        stages: of all processes of a pipeline; otherwise ().
        graph: of the whole model.
        settings: of the model.
        checkpoint: all its tensors count, not only those of this process.

    Returns:
        64 hexadecimal digits.
    """
    shapes = [(stage.cached, stage.groups, [repr(node) for node in stage.graph.nodes]) for stage in stages]
    whole = [repr(node) for node in graph.nodes] if graph is not None and not stages else []
    shared = {name: value for name, value in settings.to_dict().items() if name not in _OF_A_MACHINE}
    digest = hashlib.sha256(repr((shapes, whole, sorted(shared.items()), versions("deepseek-optimizer"))).encode())
    for fact in sorted(_tensors(checkpoint)):
        digest.update(repr(fact).encode())
    return digest.hexdigest()


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, str, tuple[int, ...], str]]:
    """The name, dtype, shape and a hash of the first bytes of each tensor, in the order of the files."""
    infos = sorted(checkpoint.tensors.items(), key=lambda item: (item[1].file, item[1].offset))
    for file, inside in itertools.groupby(infos, key=lambda item: item[1].file):
        with open(file, "rb") as opened:
            for name, info in inside:
                opened.seek(info.offset)
                first = opened.read(min(_SAMPLE, info.nbytes))
                yield name, info.dtype, tuple(info.shape), hashlib.sha256(first).hexdigest()
