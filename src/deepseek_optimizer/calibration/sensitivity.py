"""How much each group of matrices costs in each format: the KL divergence that it alone causes.

KL(p || q) = sum p (log p - log q), the mean over every token of the calibration text; p are the distributions of the model as
it is, q those with one group in another format. The running model is not touched: a trial is a plan of its own, compiled from
the same weights but for the group's. It begins at the hidden state before the group, which the model as it is has left
behind, so that only what comes after is computed again: half of the layers, on average.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..backends.base import BLOCK_TOKENS, DEFAULTS, PREFILL, Backend, CompileOptions, KvStore, StepBatch
from ..graph import rules
from ..graph.ir import Graph
from ..graph.resume import resumed
from ..quant import PackedWeight
from .budget import Option
from .groups import Group

Float32 = npt.NDArray[np.float32]
Repack = Callable[[str, str], PackedWeight]  # a matrix's name, format -> that matrix in it; the model's own where it has it

FORMATS = ("int4", "q4_1", "int8", "bf16")  # that a group may be given, the smallest first

_KL_ROWS = 4  # of logits at a time: what is made of them stays in the second-level cache's reach


class Probe:
    """A model, the calibration text, and its distributions there.

    Args:
        backend: compiles and runs the trials.
        graph: the model's, unfused.
        weights: the model's, by name: matrices packed, vectors as tensors.
        texts: stretches of token ids, int64 [1, n] each; they run as one step.
        kv_dtype: storage of the cache as the model itself has it.
        options: of `Backend.compile`.
    """

    def __init__(
        self,
        backend: Backend,
        graph: Graph,
        weights: Mapping[str, Any],
        texts: Sequence[torch.Tensor],
        kv_dtype: str,
        options: CompileOptions = DEFAULTS,
    ) -> None:
        self.backend, self.graph, self.weights, self.kv_dtype, self._options = backend, graph, weights, kv_dtype, options
        self._batch = _step([text[0].numpy().astype(np.int32) for text in texts])
        self._stores: dict[str, KvStore] = {}
        self._fused: dict[int | None, Graph] = {None: rules.apply(graph)[0]}
        self._batch.hidden = True
        logits, self._hidden = self._run(self._fused[None], {}, kv_dtype)
        self._batch.hidden = False
        self._reference = logits
        for i in range(0, len(logits), _KL_ROWS):
            logits[i : i + _KL_ROWS] = _log_softmax(logits[i : i + _KL_ROWS])

    def kl(self, replaced: Mapping[str, PackedWeight], start: int | None = None, kv_dtype: str | None = None) -> float:
        """Mean KL divergence, in nats a token, with some matrices replaced.

        Args:
            start: index of the last hidden state that does not depend on them.
            kv_dtype: storage of the cache; None: the model's own. With another, `start` must be None.
        """
        if start not in self._fused:
            self._fused[start] = rules.apply(resumed(self.graph, start))[0]  # type: ignore[arg-type]  # None is there
        self._batch.inputs_embeds = None if start is None else self._hidden[start]
        logits, _ = self._run(self._fused[start], replaced, kv_dtype or self.kv_dtype)
        return _mean_kl(self._reference, logits)

    def size(self, group: Group) -> int:
        """Bytes of a group as it is."""
        return sum(self.weights[name].nbytes for name in group.matrices)

    def _run(self, graph: Graph, replaced: Mapping[str, PackedWeight], kv_dtype: str) -> tuple[Float32, Any]:
        plan = self.backend.compile(graph, {**self.weights, **replaced}, self._options)
        if kv_dtype not in self._stores:
            self._stores[kv_dtype] = self.backend.new_store(graph, kv_dtype, self._batch.block_table.size)
        output = plan.run(self._batch, self._stores[kv_dtype])
        return output.logits.cpu().numpy(), output.hidden


def measure(
    probe: Probe,
    groups: Sequence[Group],
    held: Callable[[str, str | None], str],
    repack: Repack,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Option]]:
    """Every group in every combination of formats that may help it, the smallest first; as it is, without loss, is one of them.

    Any change, however exact, makes later activations round another way. This noise does not add up: two changes make no more
    of it than one. So it is measured, and counted once for the whole model: of each group's KL, what is noise is divided by the
    number of groups. A group that is down to noise in one format is not tried in larger ones.

    Args:
        held: a matrix's name, its group's format (None: as it is) -> the format that the matrix then has.
        repack: makes the matrices of one trial, which are in memory as long as that.
        progress: called after each group with how many are done, and how many there are.
    """
    noise = _noise(probe, groups, repack)
    found = []
    for done, group in enumerate(groups, 1):
        found.append(_options(probe, group, held, repack, noise.get(group.start or 0, 0.0), 1 / len(groups)))
        if progress is not None:
            progress(done, len(groups))
    return found


def _options(
    probe: Probe, group: Group, held: Callable[[str, str | None], str], repack: Repack, noise: float, share: float
) -> list[Option]:
    """One group's; `share` is that of the noise which it is charged with."""
    as_it_is, *others = dict.fromkeys(tuple(held(n, f) for n in group.matrices) for f in (None, *FORMATS))
    options, within_noise = [], False
    for formats in (*others, as_it_is):
        if within_noise and formats != as_it_is:
            continue
        matrices = {n: repack(n, f) for n, f in zip(group.matrices, formats, strict=True)}
        changed = {n: m for n, m in matrices.items() if m is not probe.weights[n]}
        kl = probe.kl(changed, group.start) if changed else 0.0
        within_noise |= kl <= noise
        charged = max(kl - noise, 0.0) + share * min(kl, noise)
        options.append(Option(formats, sum(m.nbytes for m in matrices.values()), charged))
    return sorted(options, key=lambda o: o.bytes)


def _noise(probe: Probe, groups: Sequence[Group], repack: Repack) -> dict[int, float]:
    """By the hidden state that a change begins after: the KL of exactly the same weights in fp32, whose products alone differ.

    The smallest group after each state stands for all of them. After the last state there is but the head: nothing rounds its
    results again.
    """
    smallest: dict[int, Group] = {}
    for group in groups:
        if group.start is not None and group.start < probe.graph.hidden_states - 1:
            smallest[group.start] = min(group, smallest.get(group.start, group), key=probe.size)
    noise = {}
    for start, group in smallest.items():
        exact = {n: repack(n, "fp32") for n in group.matrices if probe.weights[n].format != "fp32"}
        noise[start] = probe.kl(exact, start) if exact else 0.0
    return noise


def _step(texts: Sequence[Any]) -> StepBatch:
    """All stretches in one step of prefill, from position 0 each, with logits for every token."""
    lengths = [len(text) for text in texts]
    most = -(-max(lengths) // BLOCK_TOKENS)
    sequences, tokens = len(texts), sum(lengths)
    return StepBatch(
        token_ids=np.concatenate(texts),
        positions=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        query_len=np.array(lengths, np.int32),
        context_len=np.zeros(sequences, np.int32),
        phase=np.full(sequences, PREFILL, np.int32),
        block_table=np.arange(sequences * most, dtype=np.int32).reshape(sequences, most),
        logit_rows=np.arange(tokens, dtype=np.int32),
    )


def _mean_kl(reference: Float32, logits: Float32) -> float:
    """reference: log p, [T, V], made by `_log_softmax`, so that equal logits have a KL of exactly 0; logits: [T, V] of q."""
    total = 0.0
    for i in range(0, len(logits), _KL_ROWS):
        p = reference[i : i + _KL_ROWS]
        terms = p - _log_softmax(logits[i : i + _KL_ROWS])
        terms *= np.exp(p)
        total += float(terms.sum(-1).sum(dtype=np.float64))
    return max(0.0, total / len(logits))


def _log_softmax(logits: Float32) -> Float32:
    """In numpy, on this thread alone: torch's threads and the backend's would take the cores from each other at each change."""
    rows: Float32 = logits - logits.max(-1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
    return rows
