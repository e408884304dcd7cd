"""A graph bound to torch weights: executes the nodes in order, one small function per op."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ...graph.analysis import hidden_only, weight_shapes
from ...graph.cache_groups import group_spans
from ...graph.ir import Graph, Node, Value
from ...graph.ops import spec_of
from ...graph.ops.products import rows_of
from ...quant.packed import PackedStack, PackedWeight
from ..base import KvStore, Plan, StepBatch, StepOutput, reach_of
from ..decode_one import decode_one
from ..decoding import DecodeCall, Decoded, DraftedCall, DraftedRounds
from ..drafted_round import drafted_round
from ..sampling import TokenChoice, choose_tokens
from . import choose, compressed, grids, latent, moe, ops, recurrent
from .adapters import kv_b_of_sequences
from .checks import check_batch
from .device_choice import choose_on_device
from .scaled_rows import in_fp8
from .step import Step
from .weights import as_dense, rounding_of


class ReferencePlan:
    """Implements `Plan`. Created by `ReferenceBackend.compile`."""

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, PackedWeight | torch.Tensor],
        device: torch.device,
        dtype: torch.dtype,
        rounding: str | None,
    ) -> None:
        self.graph, self.device, self.dtype = graph, device, dtype
        routers = [n for n in graph.nodes if n.op in ("router", "hash_router")]
        exact = {name for n in routers for name in (*n.weights, n.attrs.get("bias"), *n.attrs.get("biases", ()))}
        dense = {n: as_dense(weights[n], device, torch.float32 if n in exact else dtype) for n in graph.weights()}
        ordered = moe.ordered_stacks(graph, dense, {n for n in dense if isinstance(weights[n], PackedStack)})
        shapes = weight_shapes(graph)
        self._weights = {n: ordered[n] if n in ordered else weight.reshape(shapes[n]) for n, weight in dense.items()}
        self._formats = {n: w.format for n in graph.weights() if isinstance(w := weights[n], PackedWeight)}
        self._rounding = {name: rounding_of(self._formats.get(name), rounding) for name in graph.weights()}
        self._spans = group_spans(graph)
        self._only_hidden = hidden_only(graph)
        self._only_earlier = hidden_only(graph, wanted=(graph.hidden_states - 1,))

    @torch.no_grad()
    def run(self, batch: StepBatch, store: KvStore | None) -> StepOutput:
        """Runs one step over a store of this backend."""
        with torch.autocast(self.device.type, enabled=False):  # a plan defines its own dtypes, on every backend
            output = self._run(batch, store)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return output

    def _run(self, batch: StepBatch, store: KvStore | None) -> StepOutput:
        step = self.begin(batch, store)
        for i in self.needed(batch):
            self.compute(step, self.graph.nodes[i])
        return self.result(step)

    def begin(self, batch: StepBatch, store: KvStore | None) -> Step:
        """A step of which no node has been computed."""
        blocks, slots = (0, 0) if store is None else (store.num_blocks, store.num_states)
        check_batch(batch, self.graph, blocks, self._spans, slots)
        return Step.of(batch, store, self.device, self.dtype, len(self._spans))

    def needed(self, batch: StepBatch) -> list[int]:
        """Indices of the nodes that a step computes."""
        unwanted = self._only_earlier if batch.last_hidden or batch.draft_states else self._only_hidden
        return [i for i in range(len(self.graph.nodes)) if batch.hidden or i not in unwanted]

    def compute(self, step: Step, node: Node) -> None:
        """Computes a node's outputs."""
        outputs = _OPS[node.op](self, step, node, *(step.values[v] for v in node.inputs))
        step.values.update(zip(node.outputs, outputs, strict=True))

    def result(self, step: Step) -> StepOutput:
        """The result of a step whose nodes have been computed."""
        batch = step.batch
        asks = batch.last_hidden or batch.draft_states
        logits = self._logits(step)
        hidden = torch.stack([step.hidden[i] for i in range(self.graph.hidden_states)]) if batch.hidden else None
        last = step.hidden[self.graph.hidden_states - 1] if asks else None
        drafts = (last if step.drafts is None else step.drafts) if batch.draft_states else None
        logits = logits.float() if batch.logits is None else batch.logits.copy_(logits)
        return StepOutput(logits, hidden, last if batch.last_hidden else None, drafts)

    def choose_tokens(self, logits: torch.Tensor, choices: Sequence[TokenChoice | None]) -> list[int | None]:
        return choose_tokens(logits.numpy(), choices) if logits.is_cpu else choose_on_device(logits, choices)

    def decode(self, batch: StepBatch, store: KvStore, call: DecodeCall) -> Decoded:
        return decode_one(self, batch, store, call)

    def decode_drafted(
        self, batch: StepBatch, drafter: Plan, pending: StepBatch, store: KvStore, call: DraftedCall
    ) -> DraftedRounds:
        return drafted_round(self, batch, drafter, pending, store, call)

    def check_weights(self) -> None:
        """Does nothing: the weights are dequantized copies."""

    def _logits(self, step: Step) -> torch.Tensor:
        """[R, V]; R is 0 if the graph has no head."""
        head = self.graph.logits
        if head is None:
            return torch.empty(0, self.graph.logits_width, dtype=torch.float32, device=self.device)
        return step.values[head] if head.selected else step.values[head][self._rows(step.batch)]

    def reserve(self, tokens: int, logit_rows: int) -> None:
        """Does nothing: torch allocates during the step."""

    def buffer_bytes(self, tokens: int, logit_rows: int) -> int:
        values = {v for node in self.graph.nodes if spec_of(node).returns != "logits" for v in node.outputs}
        return value_bytes(values, self.dtype, tokens, logit_rows)

    def describe(self) -> list[dict[str, Any]]:
        return [
            {"op": n.op, "kernel": "torch", "output": n.outputs[0].name if n.outputs else None, "weights": list(n.weights),
             "format": ",".join(dict.fromkeys(self._formats.get(w, str(self.dtype).removeprefix("torch.")) for w in n.weights))}
            for n in self.graph.nodes
        ]  # fmt: skip

    def _rows(self, batch: StepBatch) -> torch.Tensor:
        return torch.from_numpy(batch.logit_rows).to(self.device, torch.int64)

    def _product(self, x: torch.Tensor, name: str, bias: str | None, rows: slice = slice(None)) -> torch.Tensor:
        """x W^T + b, of some rows of W and b."""
        vector = None if bias is None else self._weights[bias][rows]
        return F.linear(self.rounded(x, name), self._weights[name][rows], vector)

    def rounded(self, x: torch.Tensor, name: str, finest: bool = False) -> torch.Tensor:
        """x rounded to the kind that the native product with this weight reads, if requested; `finest`: the op rounds rows
        itself, to 16 bits where a choice of 8 or 16 is possible."""
        kind = self._rounding[name]
        if finest and kind == "q8":
            kind = "q16"
        if kind is None:
            return x
        if kind == "e4m3":
            return in_fp8(x)
        from ...quant.activations import fake_quantize

        return fake_quantize(x.float(), kind).to(x.dtype)

    def weight(self, name: str) -> torch.Tensor:
        """A weight as a dense tensor, of the shape that Transformers stores."""
        return self._weights[name]

    def sequences_of(self, step: Step, layer: int) -> list[tuple[slice, int, torch.Tensor]]:
        """The sequences, with their blocks for a layer of the cache."""
        return step.groups[self.graph.cache.group_of(layer)]

    def _sequences_of(self, step: Step, node: Node) -> list[tuple[slice, int, torch.Tensor]]:
        return self.sequences_of(step, node.attrs["layer"])

    # ---- one method per op: inputs as tensors -> outputs as a tuple

    def _embedding(self, step: Step, node: Node) -> tuple[torch.Tensor, ...]:
        if step.batch.inputs_embeds is not None:
            return (step.batch.inputs_embeds.detach().to(self.device, self.dtype),)
        return self._lookup(step, node)

    def _lookup(self, step: Step, node: Node) -> tuple[torch.Tensor, ...]:
        ids = torch.from_numpy(step.batch.token_ids).to(self.device, torch.int64)
        return (F.embedding(ids, self._weights[node.weights[0]]) * node.attrs["scale"],)

    def _scale_by(self, step: Step, node: Node, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x * self._weights[node.weights[0]],)

    def _clamp(self, step: Step, node: Node, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        low, high = (self._weights[name] for name in node.weights)
        return (torch.clamp(x, low, high),)

    def _rms_norm(self, step: Step, node: Node, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (ops.rms_norm(x, self._weights[node.weights[0]], node.attrs["eps"], node.attrs.get("unit_offset", False)),)

    def _head_norm(self, step: Step, node: Node, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, weight = node.attrs, self._weights[node.weights[0]] if node.weights else None
        return (ops.head_norm(x, weight, a["eps"], a["heads"], a.get("unit_offset", False)),)

    def _linear(self, step: Step, node: Node, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(
            self._product(x, w, b, slice(None) if rows is None else slice(*rows[:2]))
            for w, b, rows in zip(node.weights, node.attrs["biases"], rows_of(node), strict=True)
        )

    def _rope_table(self, step: Step, node: Node) -> tuple[torch.Tensor, ...]:
        """The rows of a sequence share its frequencies, which for dynamic RoPE depend on its reach."""
        spec, positions = node.attrs["rope"], step.batch.positions
        parts = []
        for (rows, _, _), length in zip(step.groups[0], reach_of(step.batch), strict=True):
            inv_freq = torch.from_numpy(spec.inv_freq_at(length)).to(self.device)
            at = torch.from_numpy(positions[rows])
            if spec.axes and step.batch.axes is not None:
                at = torch.from_numpy(step.batch.axes[rows])[:, list(spec.axes)]
            parts.append(ops.rope_table(at.to(self.device), inv_freq, spec.scaling))
        return (torch.cat(parts),)

    def _rope(self, step: Step, node: Node, x: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (ops.rope(x, table, node.attrs["heads"], node.attrs["interleaved"], node.attrs.get("offset", 0)),)

    def _position_scale(self, step: Step, node: Node, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (ops.position_scale(x, torch.from_numpy(step.batch.positions).to(self.device), **node.attrs),)

    def _cache_write(self, step: Step, node: Node, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        k, v = (rows.unflatten(-1, (node.attrs["kv_heads"], -1)) for rows in (k, v))
        layer, cache = node.attrs["layer"], self.graph.cache
        for rows, context, table in self._sequences_of(step, node):
            step.store.write(layer, table, context, k[rows], v[rows])
        if cache.newest:
            for rows, context, table in step.groups[cache.newest_groups[layer]]:
                step.store.write(cache.layers + layer, table, context, k[rows], v[rows])
        return ()

    def _rope_cache(
        self, step: Step, node: Node, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        interleaved = node.attrs["interleaved"]
        self._cache_write(step, node, ops.rope(k, table, node.attrs["kv_heads"], interleaved), v)
        return (ops.rope(q, table, node.attrs["heads"], interleaved),)

    def _attention(
        self, step: Step, node: Node, q: torch.Tensor, chosen: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """In float32, whatever the dtype of the rows; the result is rounded to that."""
        a, attend = node.attrs, ops.attention_online if node.attrs["softmax"] == "online" else ops.attention
        q = q.float().unflatten(-1, (a["kv_heads"], -1, a["head_dim"]))
        out = torch.empty_like(q)
        sink = self._weights[node.weights[0]].float().unflatten(0, (a["kv_heads"], -1)) if node.weights else None
        for s, (rows, context, table) in enumerate(self._sequences_of(step, node)):
            blocks, tokens, mask = self._visible(node, rows, context, step.ends(rows, node))
            k, v = step.store.gather(a["layer"], table[blocks], len(tokens))
            if self.graph.cache.newest:
                copies, copied = self._newest(step, node, s)
                k, v = (torch.cat(pair) for pair in zip((k, v), copies, strict=True))
                mask = torch.cat((mask & ~self._reads_copy(step, node, rows, context, tokens), copied), -1)
            if chosen is not None:
                by_head = chosen[rows].unflatten(-1, (a["kv_heads"], -1))
                mask = mask[:, None] & choose.chosen_tokens(by_head, len(tokens))
            out[rows] = attend(q[rows], k, v, mask, a["scale"], a.get("softcap", 0.0), sink)
        return (out.flatten(1).to(self.dtype),)

    def _encoder_attention(
        self, step: Step, node: Node, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """In float32, as `_attention`."""
        a = node.attrs
        q = q.float().unflatten(-1, (a["kv_heads"], -1, a["head_dim"]))
        k, v = (x.float().unflatten(-1, (a["kv_heads"], -1)) for x in (k, v))
        out = torch.empty_like(q)
        for rows, _, _ in step.groups[0]:
            mask = ops.visible_both_sides(rows.stop - rows.start, a["window"], q.device)
            out[rows] = ops.attention(q[rows], k[rows], v[rows], mask, a["scale"])
        return (out.flatten(1).to(self.dtype),)

    def _visible(
        self, node: Node, rows: slice, context: int, ends: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The blocks of a sequence to read, the indices of their tokens, and which of these each row sees. The tokens between
        the sinks and a window are not read: their blocks may be missing."""
        queries, window, sinks = rows.stop - rows.start, node.attrs.get("window", 0), node.attrs.get("sinks", 0)
        blocks, tokens = ops.visible_blocks(queries, context, window, sinks, self.device)
        chunked = node.attrs.get("chunked", False)
        return blocks, tokens, ops.visible(queries, context, tokens, window, sinks, chunked, ends)

    def _newest(self, step: Step, node: Node, sequence: int) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Keys and values of a sequence's newest tokens, from the layer's copy, and which of them each row sees."""
        cache, layer = self.graph.cache, node.attrs["layer"]
        rows, context, table = step.groups[cache.newest_groups[layer]][sequence]
        blocks, tokens = ops.visible_blocks(rows.stop - rows.start, context, cache.newest, 0, self.device)
        read = step.store.gather(cache.layers + layer, table[blocks], len(tokens))
        return read, self._reads_copy(step, node, rows, context, tokens)

    def _reads_copy(self, step: Step, node: Node, rows: slice, context: int, tokens: torch.Tensor) -> torch.Tensor:
        """Which of these tokens each row reads from the copy: the newest ones that are in its window."""
        queries, window, chunked = rows.stop - rows.start, node.attrs.get("window", 0), node.attrs.get("chunked", False)
        ends = step.ends(rows, node)
        newest = ops.newest(queries, context, tokens, self.graph.cache.newest, ends)
        return newest & ops.visible(queries, context, tokens, window, 0, chunked, ends)

    def _block_choose(self, step: Step, node: Node, q: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """In float32, whatever the dtype of the rows, as are the resulting indices of blocks."""
        a, chosen = node.attrs, []
        q = q.float().unflatten(-1, (a["kv_heads"], -1, a["head_dim"]))
        for rows, context, table in self._sequences_of(step, node):
            keys, _ = step.store.gather(a["layer"], table, context + rows.stop - rows.start)
            chosen.append(self._chosen_blocks(step, node, q[rows], keys, context).flatten(1))
        return (torch.cat(chosen),)

    def _latent_choose(self, step: Step, node: Node, q: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A latent row is one key, shared by all heads."""
        a, chosen = node.attrs, []
        q = q.float().unflatten(-1, (a["heads"], -1))
        adapted = kv_b_of_sequences(self._weights[node.weights[0]], step.batch, node)
        for (rows, context, table), kv_b in zip(self._sequences_of(step, node), adapted, strict=True):
            keys = step.store.gather(a["layer"], table, context + rows.stop - rows.start)[:, None]
            absorbed = latent.absorbed(q[rows], kv_b, a["nope"])[:, None]
            chosen.append(choose.tokens_of(self._chosen_blocks(step, node, absorbed, keys, context)[:, 0], context))
        return (torch.cat(chosen),)

    def _chosen_blocks(self, step: Step, node: Node, q: torch.Tensor, keys: torch.Tensor, context: int) -> torch.Tensor:
        a = node.attrs
        exact = step.store.kv_dtype == "fp32"
        return choose.choose_blocks(q, keys, context, a["blocks"], a["sinks"], a["window"], exact)

    def _latent(self, step: Step, node: Node, x: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (latent.latent(x, table, self._weights[node.weights[0]], node.attrs["eps"], node.attrs["interleaved"]),)

    def _latent_write(self, step: Step, node: Node, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for rows, context, table in self._sequences_of(step, node):
            step.store.write(node.attrs["layer"], table, context, x[rows])
        return ()

    def _mla_attention(
        self, step: Step, node: Node, q: torch.Tensor, chosen: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """As `_attention`; in the expanded form, keys and values are ordinary products, rounded to the dtype of the rows."""
        a, name = node.attrs, node.weights[0]
        q = q.float().unflatten(-1, (a["heads"], -1))
        out = q.new_empty(*q.shape[:2], a["v_dim"])
        adapted = kv_b_of_sequences(self._weights[node.weights[0]], step.batch, node)
        for (rows, context, table), kv_b in zip(self._sequences_of(step, node), adapted, strict=True):
            blocks, tokens, mask = self._visible(node, rows, context)
            latents = step.store.gather(a["layer"], table[blocks], len(tokens))
            if chosen is not None:
                mask &= latent.chosen_keys(chosen[rows], len(tokens))
            if a["form"] == "absorbed":
                out[rows] = latent.attend_absorbed(q[rows], latents, kv_b, mask, a["scale"])
            else:
                kv = self._product(latents[:, : a["rank"]].to(self.dtype), name, None).float().unflatten(-1, (a["heads"], -1))
                out[rows] = latent.attend_expanded(q[rows], kv, latents[:, a["rank"] :], mask, a["scale"])
        return (out.flatten(1).to(self.dtype),)

    def _index_write(self, step: Step, node: Node, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for rows, context, table in self._sequences_of(step, node):
            step.store.write_index(node.attrs["layer"], table, context, k[rows])
        return ()

    def _index_choose(self, step: Step, node: Node, q: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """In float32, whatever the dtype of the rows, as are the resulting indices of tokens."""
        a, chosen = node.attrs, []
        q, weights = q.float().unflatten(-1, (a["heads"], -1)), weights.float()
        for rows, context, table in self._sequences_of(step, node):
            keys = context + rows.stop - rows.start
            scores = latent.index_scores(q[rows], weights[rows], step.store.gather_index(a["layer"], table, keys), a["scale"])
            chosen.append(latent.choose(scores, self._visible(node, rows, context)[2], a["top_k"]))
        return (torch.cat(chosen),)

    def _router(self, step: Step, node: Node, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """In float32, whatever the dtype of the rows."""
        options = {name: value for name, value in node.attrs.items() if name not in ("bias", "biases", "experts")}
        bias = node.attrs["bias"] and self._weights[node.attrs["bias"]]
        matrix, *factors = (self._weights[name] for name in node.weights)
        scores = F.linear(x.float(), matrix, self._bias(node))
        return (moe.route(scores, bias, *factors, **options),)

    def _hash_router(self, step: Step, node: Node, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """In float32, whatever the dtype of the rows."""
        matrix, table = (self._weights[name] for name in node.weights)
        options = {name: value for name, value in node.attrs.items() if name in ("scoring", "normalize", "scale")}
        ids = torch.from_numpy(step.batch.token_ids).to(self.device, torch.int64)
        return (moe.route_to(F.linear(x.float(), matrix), table[ids].long(), **options),)

    def _bias(self, node: Node) -> torch.Tensor | None:
        """The one bias in attribute `biases`."""
        (name,) = node.attrs.get("biases", (None,))
        return None if name is None else self._weights[name]

    def _experts_gate_up(self, step: Step, node: Node, x: torch.Tensor, routes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        name, gated, a = node.weights[0], ops.GATED[node.attrs.get("activation", "silu")], node.attrs
        if a.get("limit", 0.0) > 0:
            gated = partial(ops.clamped_swiglu, alpha=a["alpha"], limit=a["limit"], raised=a.get("raised", True))
        how = (a["grouped"], gated, self._bias(node), a.get("weigh_input", False), a.get("first", 0))
        return (moe.gate_up(self.rounded(x, name), routes, self._weights[name], *how),)

    def _experts_down(self, step: Step, node: Node, hidden: torch.Tensor, routes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, name = node.attrs, node.weights[0]
        how = (a["grouped"], self._bias(node), a.get("weigh_input", False), a.get("first", 0))
        out = moe.down(self.rounded(hidden, name), routes, self._weights[name], *how)
        return (out.to(self.dtype),)

    def _short_conv(self, step: Step, node: Node, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, weight = node.attrs, self._weights[node.weights[0]][:, 0]
        bias = None if a["bias"] is None else self._weights[a["bias"]]

        def form(rows: slice, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return recurrent.short_conv(x[rows], state.to(x.dtype), weight, bias, a["activation"])

        return (self._recur(step, node, form),)

    def _delta_rule(
        self, step: Step, node: Node, x: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """In float32, whatever the dtype of the rows. Prefill in the chunked form if heads have one decay, the rest in the
        recurrent one."""
        a = node.attrs
        keys = a["k_heads"] * a["k_dim"]
        q, k, v = x.float().split((keys, keys, a["heads"] * a["v_dim"]), -1)
        q, k = (recurrent.unit_length(rows.unflatten(-1, (a["k_heads"], -1))) for rows in (q, k))
        q, v = q * a["k_dim"] ** -0.5, v.unflatten(-1, (a["heads"], -1))
        gate = recurrent.log_decay(alpha.float(), *(self._weights[name].float().flatten() for name in node.weights))
        rate = torch.sigmoid(beta).float()
        decoding = step.batch.decoding_rows

        def form(rows: slice, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            stepwise = rows.start < decoding or a["channels"]
            rule = recurrent.delta_rule if stepwise else recurrent.chunked_delta_rule
            return rule(q[rows], k[rows], v[rows], gate[rows], rate[rows], state)

        return (self._recur(step, node, form).flatten(1).to(self.dtype),)

    @staticmethod
    def _recur(
        step: Step, node: Node, form: Callable[[slice, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    ) -> torch.Tensor:
        """The outputs of all rows, and the states that the step is to store.

        Args:
            form: (rows of a sequence, the state before them) -> their outputs, the state after them.
        """
        index, states, outputs = node.attrs["state"], step.store.states, []
        for (rows, _, _), source, targets in zip(step.groups[0], step.state_from, step.state_to, strict=True):
            start, state = rows.start, states.read(index, source)
            for row, slot in targets:
                output, state = form(slice(start, row + 1), state)
                states.write(index, slot, state)
                outputs.append(output)
                start = row + 1
        return torch.cat(outputs)

    def _layer_norm(self, step: Step, node: Node, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weight, *bias = (self._weights[name] for name in node.weights)
        return (ops.layer_norm(x, weight, bias[0] if bias else None, node.attrs["eps"]),)

    def _state_in(self, step: Step, node: Node) -> tuple[torch.Tensor, ...]:
        assert step.batch.states is not None  # checked by `check_batch`
        return (step.batch.states.detach().to(self.device, self.dtype),)

    def _add_features(self, step: Step, node: Node, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = step.batch.features
        return (x if features is None else x + features[node.attrs["index"]].detach().to(self.device, self.dtype),)

    def _lora_down(self, step: Step, node: Node, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """In float32, whatever the dtype of the rows."""
        h = torch.zeros(len(x), node.attrs["rank"], dtype=torch.float32, device=x.device)
        for rows, (down, _) in self._adapted(step, node):
            h[rows, : len(down)] = F.linear(x[rows].float(), down.float())
        return (h,)

    def _lora_up(self, step: Step, node: Node, h: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        z = y.clone()
        for rows, (_, up) in self._adapted(step, node):
            z[rows] += F.linear(h[rows, : up.shape[1]], up.float()).to(y.dtype)
        return (z,)

    @staticmethod
    def _adapted(step: Step, node: Node) -> list[tuple[slice, tuple[torch.Tensor, torch.Tensor]]]:
        """The rows of each sequence whose adapter has matrices for the node's site, with these matrices."""
        if step.batch.adapter_of is None:
            return []
        store: Any = step.batch.adapters
        slots = zip(step.groups[0], step.batch.adapter_of.tolist(), strict=True)
        pairs = ((rows, store.pair(slot, node.attrs["site"])) for (rows, _, _), slot in slots if slot >= 0)
        return [(rows, pair) for rows, pair in pairs if pair is not None]

    def _gate_up(self, step: Step, node: Node, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (ops.GATED[node.attrs["activation"]](*self._linear(step, node, x)),)

    def _add_rms_norm(self, step: Step, node: Node, x: torch.Tensor, delta: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = x + delta
        return (total, *self._rms_norm(step, node, total))

    def _select_rows(self, step: Step, node: Node, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x[self._rows(step.batch)],)

    def _hidden_out(self, step: Step, node: Node, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if step.batch.hidden or step.batch.last_hidden or step.batch.draft_states:
            step.hidden[node.attrs["index"]] = x.float()
        return ()

    def _draft_out(self, step: Step, node: Node, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if step.batch.draft_states:
            step.drafts = x.float()
        return ()

    def _lm_head(self, step: Step, node: Node, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a = node.attrs
        logits = self._product(x, node.weights[0], a["bias"])
        if a.get("scale", 1.0) != 1.0:
            logits = logits * a["scale"]
        return (a["softcap"] * torch.tanh(logits / a["softcap"]) if a.get("softcap") else logits,)


def _of_inputs(function: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Adapts a function of `ops.FUNCTIONS` to the signature of the methods above."""
    return lambda plan, step, node, *inputs: (function(*inputs, **node.attrs),)


_OPS: Mapping[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    **{name: _of_inputs(function) for name, function in ops.FUNCTIONS.items()},
    **compressed.OPS,
    **grids.OPS,
    "embedding": ReferencePlan._embedding,
    "lookup": ReferencePlan._lookup,
    "clamp": ReferencePlan._clamp,
    "scale_by": ReferencePlan._scale_by,
    "rms_norm": ReferencePlan._rms_norm,
    "head_norm": ReferencePlan._head_norm,
    "linear": ReferencePlan._linear,
    "rope_table": ReferencePlan._rope_table,
    "rope": ReferencePlan._rope,
    "position_scale": ReferencePlan._position_scale,
    "cache_write": ReferencePlan._cache_write,
    "rope_cache": ReferencePlan._rope_cache,
    "attention": ReferencePlan._attention,
    "encoder_attention": ReferencePlan._encoder_attention,
    "block_choose": ReferencePlan._block_choose,
    "latent": ReferencePlan._latent,
    "latent_write": ReferencePlan._latent_write,
    "mla_attention": ReferencePlan._mla_attention,
    "latent_choose": ReferencePlan._latent_choose,
    "index_write": ReferencePlan._index_write,
    "index_choose": ReferencePlan._index_choose,
    "router": ReferencePlan._router,
    "hash_router": ReferencePlan._hash_router,
    "experts_gate_up": ReferencePlan._experts_gate_up,
    "experts_down": ReferencePlan._experts_down,
    "short_conv": ReferencePlan._short_conv,
    "delta_rule": ReferencePlan._delta_rule,
    "lora_down": ReferencePlan._lora_down,
    "lora_up": ReferencePlan._lora_up,
    "layer_norm": ReferencePlan._layer_norm,
    "state_in": ReferencePlan._state_in,
    "add_features": ReferencePlan._add_features,
    "gate_up": ReferencePlan._gate_up,
    "add_rms_norm": ReferencePlan._add_rms_norm,
    "select_rows": ReferencePlan._select_rows,
    "hidden_out": ReferencePlan._hidden_out,
    "draft_out": ReferencePlan._draft_out,
    "lm_head": ReferencePlan._lm_head,
}


def value_bytes(values: Iterable[Value], dtype: torch.dtype, tokens: int, logit_rows: int) -> int:
    """An upper bound of the bytes of a step: all these values of its graph at once."""
    rows = {False: tokens, True: logit_rows}
    return sum(rows[v.selected] * v.repeat * v.width * dtype.itemsize for v in values)
