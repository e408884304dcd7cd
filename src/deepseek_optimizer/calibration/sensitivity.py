"""Measures the sensitivity of each group of matrices: the KL divergence that each format of the group alone causes.

KL(p || q) = sum p (log p - log q), averaged over all tokens of the calibration text, where p is the distribution of the
original model and q that with one group in another format. The running model is not changed: a trial is a separate plan,
compiled from the same weights except those of the group. It starts at the hidden state before the group, which was saved when
the original model ran, so that only later layers are computed, on average half of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..backends.base import (
    BLOCK_TOKENS,
    DEFAULTS,
    PREFILL,
    Backend,
    CompileOptions,
    KvStore,
    StepBatch,
    states_of_new,
)
from ..graph import rules
from ..graph.ir import Graph
from ..graph.partial_graph import graph_from_hidden_state, latest_start
from ..quant import PackedWeight
from .budget import Option
from .groups import Group

Float32 = npt.NDArray[np.float32]
Repack = Callable[[str, str], PackedWeight]  # name of a matrix, format -> the matrix in that format; the model's if it has it

FORMATS = ("int3", "int4", "q4_1", "int8", "bf16")  # formats to try, the smallest first

_KL_ROWS = 4  # rows of logits processed at a time, so that intermediate results fit in the second-level cache


class Probe:
    """A model with its distributions on the calibration text, to measure changed weights against.

    Args:
        backend: compiles and runs the trials.
        graph: the model's graph, without fusion rules applied.
        weights: the model's weights by name: packed matrices, and vectors as tensors.
        texts: stretches of token ids, int64 [1, n] each, which run in one step.
        kv_dtype: storage of the model's cache.
        options: options of `Backend.compile`.
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
        """Returns the mean KL divergence, in nats per token, with some matrices replaced.

        Args:
            replaced: name -> matrix to use instead of the model's.
            start: index of the last hidden state that does not depend on these matrices; None: run the whole model.
            kv_dtype: storage of the cache; None: the model's. With another storage, `start` must be None.
        """
        start = None if start is None else latest_start(self.graph, start)
        if start not in self._fused:
            self._fused[start] = rules.apply(graph_from_hidden_state(self.graph, start))[0]  # type: ignore[arg-type]  # None is always a key
        self._batch.inputs_embeds = None if start is None else self._hidden[start]
        logits, _ = self._run(self._fused[start], replaced, kv_dtype or self.kv_dtype)
        return _mean_kl(self._reference, logits)

    def size(self, group: Group) -> int:
        """Returns the size of a group in the model, in bytes."""
        return sum(self.weights[name].nbytes for name in group.matrices)

    def _run(self, graph: Graph, replaced: Mapping[str, PackedWeight], kv_dtype: str) -> tuple[Float32, Any]:
        plan = self.backend.compile(graph, {**self.weights, **replaced}, self._options)
        if kv_dtype not in self._stores:
            slots = len(self._batch.query_len) if graph.states else 0
            self._stores[kv_dtype] = self.backend.new_store(graph, kv_dtype, self._batch.block_table.size, slots)
        output = plan.run(self._batch, self._stores[kv_dtype])
        return output.logits.cpu().numpy(), output.hidden


def measure(
    probe: Probe,
    groups: Sequence[Group],
    held: Callable[[str, str | None], str],
    repack: Repack,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Option]]:
    """Measures every group in every useful combination of formats.

    Any change of weights, even an exact one, changes the rounding of later activations. This noise does not add up: two changes
    cause no more of it than one. It is therefore measured and counted once for the whole model: the noise in each group's KL is
    divided by the number of groups. If a format of a group causes no more than noise, larger formats are not tried.

    Args:
        probe: the model and the calibration text.
        groups: the groups to measure.
        held: name of a matrix, format of its group (None: the model's) -> format that the matrix then has.
        repack: returns the matrices of a trial, which are in memory during the trial only.
        progress: called after each group with the number of groups measured and their total number.

    Returns: for each group its options in ascending size; one of them is the model's own, without loss.
    """
    noise = _noise(probe, groups, repack)
    options = []
    for done, group in enumerate(groups, 1):
        options.append(_options(probe, group, held, repack, noise.get(group.start or 0, 0.0), 1 / len(groups)))
        if progress is not None:
            progress(done, len(groups))
    return options


def _options(
    probe: Probe, group: Group, held: Callable[[str, str | None], str], repack: Repack, noise: float, share: float
) -> list[Option]:
    """Measures the options of one group; `share` is the fraction of the noise to attribute to it."""
    original, *others = dict.fromkeys(tuple(held(n, f) for n in group.matrices) for f in (None, *FORMATS))
    options, within_noise = [], False
    for formats in (*others, original):
        if within_noise and formats != original:
            continue
        matrices = {n: repack(n, f) for n, f in zip(group.matrices, formats, strict=True)}
        changed = {n: m for n, m in matrices.items() if m is not probe.weights[n]}
        kl = probe.kl(changed, group.start) if changed else 0.0
        within_noise |= kl <= noise
        charged = max(kl - noise, 0.0) + share * min(kl, noise)
        options.append(Option(formats, sum(m.nbytes for m in matrices.values()), charged))
    return sorted(options, key=lambda o: o.bytes)


def _noise(probe: Probe, groups: Sequence[Group], repack: Repack) -> dict[int, float]:
    """Returns the noise by the hidden state before a change: the KL with exactly the same weights in fp32, so that only the
    products' rounding differs.

    The smallest group after each state represents all of them. After the last state there is only the head, whose results are
    not rounded again.
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
    """Returns a prefill step over all stretches, each from position 0, with logits for every token."""
    lengths = [len(text) for text in texts]
    max_blocks = -(-max(lengths) // BLOCK_TOKENS)
    sequences, tokens = len(texts), sum(lengths)
    state_from, state_to = states_of_new(np.array(lengths, np.int32))
    return StepBatch(
        token_ids=np.concatenate(texts),
        positions=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        query_len=np.array(lengths, np.int32),
        context_len=np.zeros(sequences, np.int32),
        phase=np.full(sequences, PREFILL, np.int32),
        block_table=np.arange(sequences * max_blocks, dtype=np.int32).reshape(sequences, max_blocks),
        logit_rows=np.arange(tokens, dtype=np.int32),
        state_from=state_from,
        state_to=state_to,
    )


def _mean_kl(reference: Float32, logits: Float32) -> float:
    """Returns the mean KL divergence of T tokens, in nats.

    Args:
        reference: log p, float32 [T, V], computed by `_log_softmax`, so that equal logits have a KL of exactly 0.
        logits: logits of q, float32 [T, V].
    """
    total = 0.0
    for i in range(0, len(logits), _KL_ROWS):
        p = reference[i : i + _KL_ROWS]
        terms = p - _log_softmax(logits[i : i + _KL_ROWS])
        terms *= np.exp(p)
        total += float(terms.sum(-1).sum(dtype=np.float64))
    return max(0.0, total / len(logits))


def _log_softmax(logits: Float32) -> Float32:
    """Computes log softmax with numpy on the calling thread: torch's threads would compete with the backend's for the cores."""
    rows: Float32 = logits - logits.max(-1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
    return rows
