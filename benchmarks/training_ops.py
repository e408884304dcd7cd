"""What each op of training gains beside torch's own form of it, forward and backward, at the sizes of a step of SmolLM2-135M.

    python -m benchmarks.training_ops [--tokens 1024] [--rows 2]

bf16 on both sides; the plain form is what Transformers runs, on all of torch's threads. "times a step" is how often a step has
it. Sides take turns; medians. Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from deepseek_optimizer.bench.hardware import cpu_name, usable_cpus
from deepseek_optimizer.system.threads import one_torch_thread
from deepseek_optimizer.train.ops.attention import attention
from deepseek_optimizer.train.ops.cross_entropy import linear_cross_entropy
from deepseek_optimizer.train.ops.embedding import embedding
from deepseek_optimizer.train.ops.linear import linear, linears
from deepseek_optimizer.train.ops.mlp import mlp
from deepseek_optimizer.train.ops.rms_norm import rms_norm
from deepseek_optimizer.train.ops.rope import rope
from deepseek_optimizer.train.ops.swiglu import swiglu
from deepseek_optimizer.train.optimizer import DeepSeekAdamW

HIDDEN, HEADS, KV_HEADS, HEAD, INNER, LAYERS, VOCABULARY = 576, 9, 3, 64, 1536, 30, 49152
ROUNDS = 5

Run = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """Attributes:
    times: a step.
    ours, plain: forward and backward once.
    """

    name: str
    times: int
    ours: Run
    plain: Run


def cases(rows: int, tokens: int) -> Iterator[Case]:
    T = rows * tokens
    x, upstream = _operand(T, HIDDEN), torch.randn(T, HIDDEN).bfloat16()

    def both(name: str, times: int, ours: Callable, plain: Callable, operands: tuple, gradient: torch.Tensor | None) -> Case:
        return Case(name, times, _backward(ours, operands, gradient), _backward(plain, operands, gradient))

    norm = _operand(HIDDEN)
    yield both("rms_norm", 61, lambda x, w: rms_norm(x, w, 1e-5), _plain_norm, (x, norm), upstream)
    weights = [_operand(n * HEAD, HIDDEN) for n in (HEADS, KV_HEADS, KV_HEADS)]
    yield both(
        "query, key, value", 30, lambda x, *w: torch.cat(linears(x, w), -1),
        lambda x, *w: torch.cat([F.linear(x, each) for each in w], -1), (x, *weights), torch.randn(T, 960).bfloat16(),
    )  # fmt: skip
    yield both("output projection", 30, linear, F.linear, (x, _operand(HIDDEN, HIDDEN)), upstream)
    heads = _operand(rows, HEADS, tokens, HEAD)
    turns = torch.randn(rows, tokens, HEAD // 2).repeat(1, 1, 2)
    cos, sin = turns.cos().bfloat16(), turns.sin().bfloat16()
    yield both("rope (queries)", 30, lambda x: rope(x, cos, sin), lambda x: _plain_rope(x, cos, sin), (heads,),
               torch.randn_like(heads))  # fmt: skip
    q, k, v = (_operand(T, n, HEAD) for n in (HEADS, KV_HEADS, KV_HEADS))
    ends = torch.arange(0, T + 1, tokens, dtype=torch.int32)
    yield both(
        "attention", 30, lambda q, k, v: attention(q, k, v, ends, HEAD**-0.5),
        lambda q, k, v: _plain_attention(q, k, v, rows), (q, k, v), torch.randn(T, HEADS, HEAD).bfloat16(),
    )  # fmt: skip
    gates = _operand(T, INNER), _operand(T, INNER)
    yield both("swiglu", 30, swiglu, lambda g, u: F.silu(g) * u, gates, torch.randn(T, INNER).bfloat16())
    block = x, _operand(INNER, HIDDEN), _operand(INNER, HIDDEN), _operand(HIDDEN, INNER)
    yield both("mlp", 30, mlp, lambda x, g, u, d: F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d), block, upstream)
    table, ids = _operand(VOCABULARY, HIDDEN), torch.randint(VOCABULARY, (rows, tokens))
    labels = torch.randint(VOCABULARY, (T,))
    yield both("head and loss", 1, lambda x, w: linear_cross_entropy(x, w, labels),
               lambda x, w: F.cross_entropy(F.linear(x, w).float(), labels), (x, table), None)  # fmt: skip
    yield both("embedding", 1, lambda w: embedding(ids, w), lambda w: F.embedding(ids, w), (table,),
               upstream.view(rows, tokens, HIDDEN))  # fmt: skip
    yield _optimizer()


def _optimizer() -> Case:
    """A step over all weights; ours in bf16 with masters, beside the fused one of torch in fp32, each with clipping."""
    shapes = [(VOCABULARY, HIDDEN), *LAYERS * [(INNER, HIDDEN)] * 3, *LAYERS * [(HIDDEN, HIDDEN)] * 2]
    ours = [torch.nn.Parameter(torch.randn(shape).bfloat16()) for shape in shapes]
    plain = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for parameter in (*ours, *plain):
        parameter.grad = torch.randn_like(parameter)
    own, theirs = DeepSeekAdamW(ours, max_norm=1.0), torch.optim.AdamW(plain, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(plain, 1.0)
        theirs.step()

    return Case("adamw", 1, lambda: own.step() and None, step)


def _backward(op: Callable, operands: tuple[torch.Tensor, ...], upstream: torch.Tensor | None) -> Run:
    def run() -> None:
        result = op(*operands)
        torch.autograd.grad(result, operands, upstream)

    return run


def _operand(*shape: int) -> torch.Tensor:
    return (torch.randn(shape) * shape[-1] ** -0.5).bfloat16().requires_grad_()


def _plain_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def _plain_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos[:, None] + torch.cat((-x[..., half:], x[..., :half]), -1) * sin[:, None]


def _plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: int) -> torch.Tensor:
    q, k, v = (t.view(rows, -1, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def measure(case: Case, threads: int, rounds: int) -> tuple[float, float]:
    """Median seconds of (ours, plain), in turns."""
    found: tuple[list[float], list[float]] = [], []
    for _ in range(rounds + 1):
        with one_torch_thread():
            found[0].append(_seconds(case.ours))
        torch.set_num_threads(threads)
        found[1].append(_seconds(case.plain))
    return statistics.median(found[0][1:]), statistics.median(found[1][1:])


def _seconds(run: Run) -> float:
    time.sleep(0.05)  # torch's threads spin for some milliseconds after their last work, beside whoever comes next
    run()  # in a step nobody's threads are asleep
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    a = parser.parse_args()
    threads = usable_cpus()
    print(f"{cpu_name()}, {threads} threads, {a.rows} x {a.tokens} tokens, bf16, forward and backward")
    print("| op | times a step | ours, ms a step | torch, ms a step | times as fast |\n|---|---|---|---|---|")
    for case in cases(a.rows, a.tokens):
        ours, plain = (1e3 * case.times * seconds for seconds in measure(case, threads, a.rounds))
        print(f"| {case.name} | {case.times} | {ours:.0f} | {plain:.0f} | {plain / ours:.1f}x |", flush=True)


if __name__ == "__main__":
    main()
