"""The structures of `native/include/dso.h` for ctypes, by their names there without `dso_`."""

from __future__ import annotations

import ctypes as C

from .topology import Cpu

I32, I64, PTR = C.c_int32, C.c_int64, C.c_void_p


class Weight(C.Structure):
    """dso_weight."""

    _fields_ = [("format", I32), ("rows", I32), ("cols", I32), ("count", I32), ("data", PTR), ("bytes", I64)]


class NativeCpu(C.Structure):
    """dso_cpu."""

    _fields_ = [(n, I32) for n in Cpu._fields]


class RunCounts(C.Structure):
    """dso_run_counts."""

    _fields_ = [(n, I64) for n in ("handovers", "sleeps", "pages_there", "pages_moved", "pages_left", "pages_copied")]


class Slot(C.Structure):
    """dso_slot."""

    _fields_ = [("kind", I32), ("width", I32), ("selected", I32), ("repeat", I32)]


class Step(C.Structure):
    """dso_step. `inputs` is the header's `in`, a keyword in Python."""

    _fields_ = [
        ("op", I32), ("flags", I32), ("inputs", I32 * 4), ("outputs", I32 * 3), ("w", I32 * 3), ("b", I32 * 3), ("layer", I32),
        ("heads", I32), ("kv_heads", I32), ("head_dim", I32), ("window", I32), ("sinks", I32),
        ("offset", I32), ("nope", I32), ("rope", I32), ("rank", I32), ("v_dim", I32), ("index", I32), ("experts", I32),
        ("top_k", I32), ("groups", I32), ("top_groups", I32), ("state", I32), ("eps", C.c_float), ("scale", C.c_float),
        ("softcap", C.c_float), ("grid_rows", I32), ("grid_cols", I32),
    ]  # fmt: skip


class CacheShape(C.Structure):
    """dso_cache_shape."""

    _fields_ = [
        *((n, I32) for n in ("kv_type", "layers", "kv_heads", "head_dim", "rank", "rope", "index", "summaries")),
        ("heads", C.POINTER(I32)),
        ("groups", C.POINTER(I32)),
        ("newest", I32),
        ("newest_groups", C.POINTER(I32)),
        ("rows", C.POINTER(I32)),
    ]


class Rotation(C.Structure):
    """dso_rotation."""

    _fields_ = [("inv_freq", PTR), ("rot", I32), ("offset", I32), ("flags", I32), ("reserved", I32)]


class Batch(C.Structure):
    """dso_batch."""

    _fields_ = [
        ("T", I32), ("S", I32), ("R", I32), ("max_blocks", I32), ("token_ids", PTR), ("positions", PTR),
        ("query_len", PTR), ("context_len", PTR), ("phase", PTR), ("block_table", PTR), ("logit_rows", PTR),
        ("inputs_embeds", PTR), ("states", PTR), ("logits", PTR), ("hidden", PTR), ("last_hidden", PTR),
        ("draft_states", PTR), ("cache", PTR), ("inv_freq", PTR), ("recurrent", PTR), ("state_from", PTR), ("state_to", PTR),
        ("n_state_to", I32), ("adapter_of", PTR), ("adapters", PTR), ("axes", PTR), ("visible_to", PTR), ("features", PTR),
    ]  # fmt: skip


class Choice(C.Structure):
    """dso_choice."""

    _fields_ = [
        ("temperature", C.c_float), ("top_k", I32), ("top_p", C.c_double), ("min_p", C.c_double), ("repetition", C.c_float),
        ("frequency", C.c_float), ("presence", C.c_float), ("window", I32), ("n_tokens", I32), ("n_prompt", I32),
        ("tokens", PTR), ("numbers", PTR), ("noise", PTR), ("noise_stride", I64),
        ("first_variate", I64), ("n_barred", I32), ("barred_steps", I32), ("barred", PTR),
    ]  # fmt: skip


class Decode(C.Structure):
    """dso_decode."""

    _fields_ = [
        ("steps", I32), ("n_stops", I32), ("stops", PTR), ("seconds", C.c_double), ("choices", PTR),
        ("generator", PTR), ("variates", I64), ("tokens", PTR), ("done", I32), ("undecided", I32),
        ("token_of", PTR), ("keep_logits", I32), ("reserved", I32),
    ]  # fmt: skip


class Stages(C.Structure):
    """dso_stages."""

    _fields_ = [("first", PTR), ("batch", PTR), ("links", PTR), ("n_links", I32), ("lost", I32)]


class DraftedDecode(C.Structure):
    """dso_drafted_decode."""

    _fields_ = [
        ("rounds", I32), ("drafts", I32), ("room", I32), ("n_stops", I32), ("stops", PTR), ("seconds", C.c_double),
        ("least", C.c_float), ("reserved", I32), ("choice", PTR), ("token_of", PTR), ("tokens", PTR),
        ("drafted", PTR), ("chosen", PTR), ("took", PTR), ("done", I32), ("undecided", I32),
    ]  # fmt: skip


class StateShape(C.Structure):
    """dso_state_shape."""

    _fields_ = [("heads", I32), ("rows", I32), ("cols", I32)]


class DenseHeads(C.Structure):
    """dso_dense_heads."""

    _fields_ = [("data", PTR), ("batch", I64), ("head", I64), ("token", I64)]


class DenseAttention(C.Structure):
    """dso_dense_attention."""

    _fields_ = [
        ("type", I32), ("mask_type", I32),
        *((n, I64) for n in ("batch", "heads", "kv_heads", "queries", "keys", "qk_width", "v_width")),
        *((n, DenseHeads) for n in ("q", "k", "v", "o", "mask")), ("scale", C.c_float), ("rounded", I32),
    ]  # fmt: skip


class FeedForward(C.Structure):
    """dso_feed_forward."""

    _fields_ = [
        *((n, C.POINTER(Weight)) for n in ("gate", "up", "down")), *((n, PTR) for n in ("gate_bias", "up_bias", "down_bias")),
        *((n, PTR) for n in ("norm_weight", "norm_bias")), *((n, I32) for n in ("op", "activation", "inner", "residual")),
        ("eps", C.c_float), ("reserved", I32),
    ]  # fmt: skip


class Site(C.Structure):
    """dso_adapter_site."""

    _fields_ = [("rows", I32), ("cols", I32), ("heads", I32)]
