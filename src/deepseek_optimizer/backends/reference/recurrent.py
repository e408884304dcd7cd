"""Ops with a recurrent state, each written as its formula over the rows of one sequence. See `graph/ops/recurrent.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

CHUNK = 64  # rows that the chunked form computes together


def short_conv(
    x: torch.Tensor, state: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A causal convolution of each column.

    Args:
        x: float [T, N].
        state: float [K - 1, N], the rows before x.
        weight: float [N, K].
        bias: float [N], or None.
        activation: "silu" or "none".

    Returns: outputs [T, N], and the last K - 1 rows.
    """
    rows = torch.cat((state, x))
    out = F.conv1d(rows.T[None], weight[:, None], bias, groups=x.shape[1])[0].T
    return F.silu(out) if activation == "silu" else out, rows[len(x) :]


def unit_length(x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(x . x + 1e-6) over the last axis."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def log_decay(alpha: torch.Tensor, a_log: torch.Tensor, dt_bias: torch.Tensor) -> torch.Tensor:
    """g = -e^a_log * log(1 + e^(alpha + dt_bias)); a state is multiplied by e^g.

    Args:
        alpha: float [T, heads], or [T, heads * k_dim] for a decay of each row of a state.
        a_log: float [heads].
        dt_bias: float, as a row of alpha.

    Returns: float [T, heads] or [T, heads, k_dim].
    """
    steps = F.softplus(alpha + dt_bias).unflatten(-1, (len(a_log), -1))
    return (-a_log.exp()[:, None] * steps).squeeze(-1)


def delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor, rate: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated delta rule in its recurrent form, token by token: S <- e^g S; S <- S + k (rate (v - S^T k))^T; o = S^T q.

    Args:
        q, k: float [T, k_heads, k_dim], normalized and scaled; heads is a multiple of k_heads.
        v: float [T, heads, v_dim].
        gate: float [T, heads], g, or [T, heads, k_dim] for a decay of each row.
        rate: float [T, heads], the step size of the update.
        state: float [heads, k_dim, v_dim].

    Returns: outputs [T, heads, v_dim], and the state after them.
    """
    q, k = _per_value_head(q, k, v.shape[1])
    outputs = []
    for q_t, k_t, v_t, g_t, b_t in zip(q, k, v, gate, rate, strict=True):
        state = state * g_t.exp().reshape(len(state), -1, 1)
        delta = b_t[:, None] * (v_t - torch.einsum("hkv,hk->hv", state, k_t))
        state = state + k_t[:, :, None] * delta[:, None]
        outputs.append(torch.einsum("hkv,hk->hv", state, q_t))
    return torch.stack(outputs), state


def chunked_delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor, rate: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`delta_rule` for `CHUNK` tokens at a time. Arguments and results as there; one decay per head.

    With G_i = e^(g_1 + ... + g_i) and D_ij = G_i / G_j for j <= i, else 0, the updates u_i = rate_i (v_i - S_i^T k_i) of a
    chunk solve a triangular system, from which outputs and the next state follow (Yang et al. 2024, "Parallelizing Linear
    Transformers with the Delta Rule", section 3; with the gate: Gated Delta Networks, section 3.3):

        (I + strictly_lower(diag(rate) (K K^T * D))) U = diag(rate) (V - diag(G) K S)
        O = diag(G) Q S + (Q K^T * D) U
        S' = G_C S + (diag(G_C / G) K)^T U
    """
    q, k = _per_value_head(q, k, v.shape[1])
    outputs = []
    for begin in range(0, len(q), CHUNK):
        chunk = slice(begin, begin + CHUNK)
        q_c, k_c, v_c = (x[chunk].transpose(0, 1) for x in (q, k, v))  # [heads, C, dim]
        total, rate_c = gate[chunk].T.cumsum(-1), rate[chunk].T[..., None]
        decay = (total[:, :, None] - total[:, None]).tril().exp().tril()
        grown = total.exp()[..., None]
        system = (rate_c * (k_c @ k_c.mT) * decay).tril(-1)
        updates = torch.linalg.solve_triangular(system, rate_c * (v_c - grown * k_c @ state), upper=False, unitriangular=True)
        outputs.append((grown * q_c @ state + (q_c @ k_c.mT * decay) @ updates).transpose(0, 1))
        left = (total[:, -1:] - total).exp()[..., None]
        state = state * grown[:, -1:] + (left * k_c).mT @ updates
    return torch.cat(outputs), state


def _per_value_head(q: torch.Tensor, k: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k of each value head, [T, heads, k_dim]."""
    shared = heads // q.shape[1]
    return q.repeat_interleave(shared, 1), k.repeat_interleave(shared, 1)
