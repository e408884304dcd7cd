"""Captured steps: they have the bits of plain ones, and a replay does nothing but copy integers, launch and wait."""

from __future__ import annotations

import threading
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from support import triton_interpreter

triton_interpreter.require()

from deepseek_optimizer.backends.base import DECODE
from deepseek_optimizer.backends.cuda import captured
from deepseek_optimizer.backends.cuda.backend import CudaBackend
from deepseek_optimizer.backends.cuda.buckets import Bucket
from deepseek_optimizer.backends.cuda.device import CudaDevice
from deepseek_optimizer.backends.sampling import GREEDY, NOT_FINITE, TokenChoice, choose_token
from deepseek_optimizer.errors import BackendError, NotEnoughMemoryError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.cache_groups import group_layers
from deepseek_optimizer.models import build_graph
from support import family_configs as configs
from support.models import random_ids, random_model, weights_of
from support.recording_device import RecordingDevice
from support.steps import Part, Runner, run_step

from ..cpu.packing import packed_weights
from .test_deepseek_v4 import FAMILIES as V4_FAMILIES
from .test_deepseek_v4 import TINY as V4

CPU = torch.device("cpu")
TINY = {
    "vocab_size": 31, "hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 10,
}  # fmt: skip
FAMILIES = {
    "llama-dynamic": lambda: configs.llama(**TINY | {"max_position_embeddings": 16} | configs.rope("dynamic", factor=4.0)),
    "qwen3-groups": lambda: configs.qwen3(
        **TINY | {"num_hidden_layers": 2}, use_sliding_window=True, sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "deepseek_v3-experts": lambda: configs.deepseek_v3(
        **{name: value for name, value in TINY.items() if name != "head_dim"} | {"num_key_value_heads": 2}, n_routed_experts=6,
        num_experts_per_tok=2, moe_intermediate_size=20, first_k_dense_replace=0,
    ),
    "qwen3_5_text-states": lambda: configs.qwen3_5_text(
        num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], vocab_size=31
    ),
    "deepseek_v4-entries": lambda: configs.deepseek_v4(**V4 | {"num_hidden_layers": 1} | V4_FAMILIES["sparse-by-table"]),
}  # fmt: skip


def runner_of(model, seam=None, captured=True, **options):
    backend = CudaBackend(CPU, captured, seam)
    graph = group_layers(rules.apply(build_graph(model.config))[0])
    plan = backend.compile(graph, packed_weights(weights_of(model), options.get("format_name", "fp32")))
    return Runner(
        plan, backend.new_store(graph, options.get("kv", "fp32"), 24, 16 if graph.states else 0), (None,) * graph.cache.groups
    )


@pytest.fixture(scope="module")
def model():
    return random_model(FAMILIES["llama-dynamic"]())


def texts(run, model, *counts):
    return [(run.sequence(), random_ids(model.config, count, seed)) for seed, count in enumerate(counts)]


def decoding(run, model):
    """Three steps of three sequences, which are padded to four rows, after a step of their prompts."""
    yield from decoding_of(run, texts(run, model, 36, 5, 9))


def decoding_of(run, parts):
    yield run_step(run.plan, run.store, [Part(s, ids[:-3], rows=[]) for s, ids in parts])
    for place in (-3, -2, -1):
        yield run_step(run.plan, run.store, [Part(s, [ids[place]], DECODE) for s, ids in parts], last_hidden=True)


def short(run, model):
    """As `decoding`, after shorter prompts. Each step completes entries of some sequences and not of others."""
    yield from decoding_of(run, texts(run, model, 8, 4, 6))


def mixed(run, model):
    """Three steps of a sequence that decodes, one with a draft, and a prompt: eight or seven rows, padded to eight."""
    first, second, *prompts = texts(run, model, 36, 7, 5, 4, 5)
    yield run_step(run.plan, run.store, [Part(s, ids[: 33 if s is first[0] else 1], rows=[]) for s, ids in (first, second)])
    for step, (sequence, ids) in enumerate(prompts):
        parts = [
            Part(first[0], [first[1][33 + step]], DECODE), Part(second[0], second[1][1 + 2 * step : 3 + 2 * step], DECODE),
            Part(sequence, ids, rows=[len(ids) - 1]),
        ]  # fmt: skip
        yield run_step(run.plan, run.store, parts)


@pytest.mark.parametrize(
    ("family", "steps", "formats"),
    [
        ("llama-dynamic", decoding, {}),
        ("llama-dynamic", mixed, {"format_name": "int8", "kv": "bf16"}),
        ("qwen3-groups", decoding, {"kv": "fp8"}),
        ("qwen3-groups", mixed, {}),
        ("deepseek_v3-experts", decoding, {}),
        ("deepseek_v3-experts", mixed, {"kv": "int8"}),
        ("qwen3_5_text-states", decoding, {}),
        ("qwen3_5_text-states", mixed, {}),
        ("deepseek_v4-entries", short, {}),
    ],
)
def test_captured_steps_have_the_bits_of_plain_steps(family, steps, formats):
    """Padding changes neither other rows nor the cache, and a replay sees the new step."""
    model, device = random_model(FAMILIES[family]()), RecordingDevice()
    plain, padded = runner_of(model, **formats), runner_of(model, device, **formats)
    for ours, exact in zip(steps(padded, model), steps(plain, model), strict=True):
        assert torch.equal(ours.logits, exact.logits)
        choices = [GREEDY] * len(exact.logits)
        assert padded.plan.choose_tokens(ours.logits, choices) == plain.plan.choose_tokens(exact.logits, choices)
        assert ours.last_hidden is exact.last_hidden is None or torch.equal(ours.last_hidden, exact.last_hidden)
    assert torch.equal(padded.store.data[: padded.store.scratch], plain.store.data[: plain.store.scratch])
    assert device.events.count("capture") == 1 and device.events.count("replay 0") == 2


def test_what_a_replay_does(model):
    """The integers are copied before the replay, and results after it. Nothing is allocated, compiled or read."""
    device = RecordingDevice()
    run, logits = runner_of(model, device), torch.zeros(1, 31)
    sequence, seen = run.sequence(), []
    for token in range(4):
        device.events.clear()
        output = run_step(run.plan, run.store, [Part(sequence, [token], DECODE)], logits=logits)
        assert output.logits is logits
        seen.append(list(device.events))
    first, second, *later = seen
    assert "embedding_rows" in first and "capture" not in first and first[-3:] == ["torch.copy_", "download", "wait"]
    assert second == ["upload", "capture", "replay 0", "torch.copy_", "download", "wait"]
    assert later == [["upload", "replay 0", "torch.copy_", "download", "wait"]] * 2
    (bucket,) = run.plan.captured.buckets(run.store)
    assert bucket == Bucket(rows=1, one_row=1, tiles=0, blocks=8, logit_rows=1, states=False)
    assert run.plan.captured.buckets(runner_of(model).store) == ()


def test_steps_in_and_outside_of_inference_mode(model):
    """They share tensors that the first of them makes."""
    run, plain, texts = runner_of(model, RecordingDevice()), runner_of(model), []
    for one in (run, plain):
        sequence, logits = one.sequence(), []
        for token in range(5):
            with torch.inference_mode(token in (0, 1, 3)):
                logits.append(run_step(one.plan, one.store, [Part(sequence, [token], DECODE)]).logits.clone())
        texts.append(torch.cat(logits))
    assert torch.equal(*texts)


def test_a_later_step_that_is_not_captured_is_not_mistaken_for_it(model):
    """Its logits may be in the same tensor; kernels do not count as changes of it."""
    run, logits = runner_of(model, RecordingDevice()), torch.zeros(1, 31)
    sequence = run.sequence()
    for token in range(3):
        run_step(run.plan, run.store, [Part(sequence, [token], DECODE)], logits=logits)
    before = logits.argmax(-1).tolist()
    for token in range(3, 12):
        run_step(run.plan, run.store, [Part(sequence, [token], DECODE)], logits=logits, hidden=True)  # never captured
        assert run.plan.choose_tokens(logits, [GREEDY]) == logits.argmax(-1).tolist()
        if logits.argmax(-1).tolist() != before:
            return
    raise AssertionError("all steps chose the same token")


def test_tokens_are_chosen_from_what_came_back(model):
    """Greedy tokens are on the host when a replay is done. Logits that were changed since, or are others, are looked at."""
    device = RecordingDevice()
    run, sequence = runner_of(model, device), None
    for _ in range(2):
        sequence = run.sequence()
        logits = run_step(run.plan, run.store, [Part(sequence, [3, 4, 5], DECODE)]).logits
    greedy = logits.argmax(-1).tolist()
    run.plan._chosen = (*run.plan._chosen[:2], [7, NOT_FINITE, 9])  # others, so that it shows which ones are taken
    assert run.plan.choose_tokens(logits, [GREEDY, GREEDY, None]) == [7, NOT_FINITE, None]
    drawn = TokenChoice(0.7, top_k=5, u=0.4)
    assert run.plan.choose_tokens(logits, [GREEDY, GREEDY, drawn])[2] == choose_token(logits[2].numpy(), drawn)
    assert run.plan.choose_tokens(logits.clone(), [GREEDY] * 3) == greedy
    logits[0, 11] = 99.0
    assert run.plan.choose_tokens(logits, [GREEDY] * 3) == [11, *greedy[1:]]


@pytest.fixture
def asked(monkeypatch):
    """What is asked of torch on a card that is not there, in order."""
    made, asked, current = [], [], ["the caller's"]

    class Stream:
        def __init__(self, on):
            self.name = f"{on} {len(made)}"
            made.append(self.name)

        def wait_stream(self, other):
            asked.append(f"{self.name} after {other}")

        def synchronize(self):
            asked.append(f"wait for {self.name}")

    @contextmanager
    def on_stream(stream):
        current.append(stream.name)
        yield
        current.pop()

    @contextmanager
    def graph(made, pool, stream, **options):
        assert captures.acquire(blocking=False), "two captures at once"
        asked.append((pool, stream.name, options))
        yield
        captures.release()

    captures = threading.Lock()
    graphs = SimpleNamespace(replay=lambda: asked.append(f"replay on {current[-1]}"))
    for name, value in {
        "Stream": Stream, "stream": on_stream, "current_stream": lambda on: current[-1], "graph": graph,
        "CUDAGraph": lambda: graphs, "graph_pool_handle": lambda: f"pool {len(made)}", "device": lambda on: nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return asked


def test_a_cuda_device_captures_into_one_pool_on_its_own_stream(asked):
    """What is asked of torch: one pool for all graphs, other threads left alone, and one wait for one stream."""
    device = CudaDevice(torch.device("cuda:0"))
    for _ in range(2):
        with device.step():
            device.capture(lambda: asked.append("launch"))()
            device.wait()
    step = [
        "cuda:0 0 after the caller's", ("pool 1", "cuda:0 0", {"capture_error_mode": "thread_local"}), "launch",
        "replay on cuda:0 0", "wait for cuda:0 0",
    ]  # fmt: skip
    assert asked == step * 2


def test_a_step_that_fails_waits_for_its_copies(asked, monkeypatch):
    """The next step overwrites the integers on the host, from which the device may still be copying."""
    device = CudaDevice(torch.device("cuda:0"))
    with pytest.raises(torch.OutOfMemoryError, match="first"), device.step():
        raise torch.OutOfMemoryError("first")
    assert asked == ["cuda:0 0 after the caller's", "wait for cuda:0 0"]

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(device._stream, "synchronize", broken)
    with pytest.raises(torch.OutOfMemoryError, match="second"), device.step():
        raise torch.OutOfMemoryError("second")


def test_two_models_on_a_card_neither_share_a_stream_nor_capture_at_once(asked):
    """A capture on a stream that both use would record the launches of both."""
    devices = [CudaDevice(torch.device("cuda:0")) for _ in range(2)]

    def step(device, launch):
        with device.step():
            device.capture(launch)

    def launch():
        second.start()
        second.join(0.1)  # it has to wait until this capture ends
        assert second.is_alive()

    second = threading.Thread(target=step, args=(devices[1], lambda: asked.append("second")))
    step(devices[0], launch)
    second.join()
    streams = [each[1] for each in asked if isinstance(each, tuple)]
    assert len(set(streams)) == 2 and asked[-1] == "second"


def test_captured_steps_end_with_the_memory_of_the_cache(model, monkeypatch):
    """A released cache may be at another address when it is used again; and only so many graphs are held."""
    monkeypatch.setattr(captured, "MOST_CAPTURED", 1)
    device = RecordingDevice()
    run, plain = runner_of(model, device), runner_of(model)

    def decode(made, count=1):
        parts = [Part(made.sequence(), [3], DECODE) for _ in range(count)]
        output = run_step(made.plan, made.store, parts)
        for part in parts:
            part.blocks.free()
        return output.logits

    exact = decode(plain)
    assert torch.equal(decode(run), exact) and torch.equal(decode(run), exact)
    held = run.store.data  # so that the address is not used again at once
    run.store.release(0)
    assert len(run.store.data) == 0
    held.fill_(torch.nan)
    device.events.clear()
    assert all(torch.equal(decode(run), exact) for _ in range(2)) and device.events.count("replay 1") == 1
    decode(run, 2)
    device.events.clear()
    decode(run)
    assert "capture" not in device.events and not any(event.startswith("replay") for event in device.events)


def test_large_buffers_replace_those_of_captured_steps(model):
    """A captured step goes on with the memory that it was captured with."""
    device = RecordingDevice()
    run, plain = runner_of(model, device), runner_of(model)
    for made in (run, plain):
        made.results = []
        for ids, rows in (([1], [0]), ([1], [0]), ([2] * 9, range(9)), ([1], [0])):
            sequence = made.sequence()
            made.results.append(run_step(made.plan, made.store, [Part(sequence, list(ids), DECODE, rows=list(rows))]).logits)
            sequence.free()
    assert all(map(torch.equal, run.results, plain.results))
    assert device.events.count("replay 0") == 2


def test_reserved_buffers_hold_padded_steps(model):
    """Otherwise captured steps would keep the smaller ones beside those that replace them, which no size counts."""
    run, plain = runner_of(model, RecordingDevice()), runner_of(model, RecordingDevice(), captured=False)
    plan = run.plan
    for each in (plan, plain.plan):
        each.reserve(17, 5)
    held = [buffer.data_ptr() for buffer in (*plan._buffers, plan._captured_logits)]
    for count in (17, 17, 1):
        run_step(run.plan, run.store, [Part(run.sequence(), [1] * count, DECODE, rows=list(range(min(5, count))))])
    assert held == [buffer.data_ptr() for buffer in (*plan._buffers, plan._captured_logits)]
    assert len(plan._captured_logits) == 8 and max(map(len, plan._buffers)) == 32
    values = sum(buffer.nbytes for buffer in (*plan._buffers, plan._captured_logits))
    of_prompts, both = (sum(b.nbytes for b in plain.plan._buffers), plain.plan.buffer_bytes(17, 5)), plan.buffer_bytes(17, 5)
    assert both - values > of_prompts[1] - of_prompts[0] + 32 * 40 * 4  # scratch memory once more, and hidden states


def test_capturing_can_be_turned_off(model):
    device = RecordingDevice()
    run = runner_of(model, device, captured=False)
    assert run.plan.captured is None and runner_of(model).plan.captured is None
    assert "CUDA graphs" not in CudaBackend(CPU, False, device).detail
    assert CudaBackend(CPU, True, device).detail.endswith("; steps of up to 256 rows as CUDA graphs")


def test_steps_that_cannot_be_captured_are_errors(model, monkeypatch):
    device = RecordingDevice()
    run = runner_of(model, device)
    sequence = run.sequence()
    run_step(run.plan, run.store, [Part(sequence, [1], DECODE)])

    def capture(launch):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(device, "capture", capture)
    with pytest.raises(BackendError, match="captured as a CUDA graph .operation not permitted.*load .* with cuda_graphs=False"):
        run_step(run.plan, run.store, [Part(sequence, [1], DECODE)])


FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which 1.00 GiB is free."


def test_memory_that_runs_out_is_a_typed_error(model, monkeypatch):
    device = RecordingDevice()
    run = runner_of(model, device)

    def full(*_):
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(device, "wait", full)
    with pytest.raises(NotEnoughMemoryError, match="a step of 2 tokens on cpu: Tried to allocate 2.00 GiB; set a smaller kv_c"):
        run_step(run.plan, run.store, [Part(run.sequence(), [1, 2])])
    run.store.release(0)
    monkeypatch.setattr(run.store, "_resize", full)
    with pytest.raises(NotEnoughMemoryError, match="no memory for the KV cache of .* on cpu: Tried .*; set a smaller kv_c"):
        run_step(run.plan, run.store, [Part(run.sequence(), [1, 2])])
