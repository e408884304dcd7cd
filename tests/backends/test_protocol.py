"""Every registered backend implements all of `backends/base.py` on the CPU, and no code asks for a backend by name.

A package that adds a backend can run this file too: a registered backend is one of the parameters.
"""

from __future__ import annotations

import ast
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import deepseek_optimizer
from deepseek_optimizer.backends import registry
from deepseek_optimizer.backends.base import DECODE, PHASES, PREFILL, CompileOptions, check_supported
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.backends.reference.dense_attention import attend
from deepseek_optimizer.backends.reference.device_choice import choose_on_device
from deepseek_optimizer.backends.reference.ops import FUNCTIONS
from deepseek_optimizer.backends.sampling import GREEDY, NOT_FINITE, TokenChoice, choose_tokens
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.attention_mode import AttentionMode, apply_mode
from deepseek_optimizer.models import build_graph
from deepseek_optimizer.quant import FORMATS, SUPERBLOCKS, ColumnOrder, PackedMatrix, reference_packer, unpack
from deepseek_optimizer.system.backend_entries import BUILT_IN, names
from support.family_configs import llama
from support.models import assert_close_rows, random_ids, random_model, weights_of
from support.steps import runner

from .cpu.packing import dequantized, packed_weights

CPU = torch.device("cpu")
# What the arithmetic may cost against the same values in fp32, of a row's largest logit.
FORMAT_TOLERANCE = dict.fromkeys(FORMATS, 6e-2) | {
    "fp32": 1e-5,
    "bf16": 2e-2,
    "int8": 1e-3,
    "int8_nested": 1e-3,
    "q4_1": 1e-3,
    "fp8": 2e-2,
}
KV_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "int8": 5e-2, "fp8": 0.1, "int4": 0.5}
MODES = {
    "flash": AttentionMode(),
    "eager": AttentionMode(),
    "sliding": AttentionMode("sliding", window=40, sinks=4),
    "sparse": AttentionMode("sparse", window=32, sinks=4, budget=160),
}
CHOICES = [GREEDY, None, TokenChoice(1.0, u=0.3), TokenChoice(0.7, top_k=5, top_p=0.9, min_p=0.01, u=0.99), GREEDY]


def settings(name: str) -> SimpleNamespace:
    return SimpleNamespace(backend=name, isa=None, threads=2)


@pytest.fixture(params=names())
def spec(request):
    found = registry.find(request.param)
    if not found.runs_on("cpu"):
        pytest.skip(f"the {found.name} backend does not run on the CPU")
    if (reason := found.unavailable_reason(settings(found.name))) is not None:
        pytest.skip(reason)
    return found


@pytest.fixture
def backend(spec):
    return spec.create(CPU, settings(spec.name))


@pytest.fixture(scope="module")
def model():
    return random_model(llama(num_hidden_layers=2))


def graph_of(model, mode="flash"):
    names = [name for name in rules.RULES if name != "attention_softmax"] if mode == "eager" else None
    return apply_mode(rules.apply(build_graph(model.config), names)[0], MODES[mode])[0]


def test_capabilities(spec, backend):
    able = backend.capabilities
    assert able.name == backend.name == spec.name and able.device_type == backend.device.type == "cpu"
    assert able.phases and set(able.phases) <= set(PHASES)
    assert able.weight_formats and set(able.weight_formats) <= FORMATS.keys()
    assert able.kv_dtypes and set(able.kv_dtypes) <= KV_TOLERANCE.keys()
    assert able.attention_modes and set(able.attention_modes) <= MODES.keys()
    assert "auto" in able.activations
    assert backend.isa in able.isas if able.isas else backend.isa is None
    assert backend.threads is None or backend.threads >= 1
    assert backend.detail and (backend.note is None or backend.note)


@pytest.mark.parametrize("format_name", FORMATS)
def test_weight_formats(backend, model, format_name):
    """Each supported format packs like its definition, and its plan equals the reference with the same values."""
    able = backend.capabilities
    if format_name not in able.weight_formats:
        pytest.skip("not among its formats")
    if format_name in SUPERBLOCKS:
        model = random_model(llama(num_hidden_layers=1, hidden_size=256, intermediate_size=512, num_attention_heads=4))
    graph, weights = graph_of(model), packed_weights(weights_of(model), format_name)
    ids = random_ids(model.config, 40)
    expected = runner(ReferenceBackend(), graph, dequantized(weights)).logits(ids)
    made = runner(backend, graph, weights)
    for phase, name in ((DECODE, "decode"), (PREFILL, "prefill")):
        if name in able.phases:
            assert_close_rows(made.logits(ids, phase=phase), expected, FORMAT_TOLERANCE[format_name])
    weight = weights_of(model)["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(backend.pack(weight, format_name), reference_packer(weight, format_name))


def test_kv_dtypes_and_modes(backend, model):
    able, ids = backend.capabilities, random_ids(model.config, 260)
    weights = packed_weights(weights_of(model), "fp32")
    for mode in able.attention_modes:
        graph = graph_of(model, mode)
        expected = runner(ReferenceBackend(), graph, dequantized(weights)).logits(ids)
        assert_close_rows(runner(backend, graph, weights).logits(ids, chunks=(100,)), expected)
    graph = graph_of(model)
    exact = runner(ReferenceBackend(), graph, dequantized(weights)).logits(ids)
    for kv in able.kv_dtypes:
        assert_close_rows(runner(backend, graph, weights, kv=kv).logits(ids), exact, KV_TOLERANCE[kv])


def test_supported_activations_change_the_result(backend, model):
    if backend.capabilities.activations == ("auto",):
        pytest.skip("it has one kind of activation")
    able, graph, ids, changed = backend.capabilities.activations, graph_of(model), random_ids(model.config, 20), set()
    for format_name, kinds in (("int8", {"int8", "int16"}), ("fp8", {"fp8"})):
        weights = packed_weights(weights_of(model), format_name)
        made = {
            name: runner(backend, graph, weights, options=CompileOptions(activation=name)).logits(ids)
            for name in kinds.intersection(able) | {"auto"}
        }
        changed |= {name for name, logits in made.items() if not torch.equal(made["auto"], logits)}
    assert changed and ("fp8" in changed) == ("fp8" in able)


def test_sizes(spec, backend, model):
    """The sizes are known before the backend is created, and equal its allocations."""
    graph, sizes = graph_of(model), spec.sizes()
    weights = packed_weights(weights_of(model), backend.capabilities.weight_formats[0])
    formats = {name: w.format for name, w in weights.items() if isinstance(w, PackedMatrix)}
    for kv in backend.capabilities.kv_dtypes:
        store = backend.new_store(graph, kv, 3)
        assert sizes.block_bytes(graph, kv) == backend.block_bytes(graph, kv) == store.block_bytes > 0
        assert store.num_blocks == 3
    plan = backend.compile(graph, weights)
    plan.reserve(64, 4)
    predicted = sizes.buffer_bytes(graph, formats, CompileOptions(), 64, 4)
    assert predicted == backend.buffer_bytes(graph, formats, CompileOptions(), 64, 4)
    logits = 4 * (model.config.vocab_size * 4 + 64)
    assert 0 < plan.buffer_bytes(64, 4) <= predicted <= plan.buffer_bytes(64, 4) + logits
    assert backend.free_memory().free > 0


def test_blocks_can_be_saved(backend, model):
    weights = packed_weights(weights_of(model), backend.capabilities.weight_formats[0])
    made = runner(backend, graph_of(model), weights, blocks=4)
    made.logits(random_ids(model.config, 30))
    data = made.store.read_block(0)
    assert len(data) == made.store.saved_bytes
    made.store.write_block(1, data)
    table = [np.array([block], np.int32) for block in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(*(made.store.read(0, t, 30) for t in table), strict=True))
    with pytest.raises(ValueError):
        made.store.write_block(1, data[1:])


@pytest.mark.parametrize("order", [None, ColumnOrder(2, 4)])
@pytest.mark.parametrize("format_name", FORMATS)
def test_products_of_packed_matrices(backend, format_name, order):
    """Against float64 with the dequantized weights, within the format's bound."""
    if format_name not in backend.capabilities.weight_formats:
        pytest.skip("not among its formats")
    torch.manual_seed(1)
    cols = 256 if format_name in SUPERBLOCKS else 72
    matrix = PackedMatrix(format_name, 200, cols, backend.pack(torch.randn(200, cols), format_name), order)
    dense, x, grad, bias = unpack(matrix), torch.randn(2, 5, cols), torch.randn(3, 200), torch.randn(200)
    assert torch.equal(backend.unpack(matrix), dense) and torch.equal(backend.unpack(matrix, 48, 131), dense[48:131])
    made, exact = backend.linear(x, matrix, bias), x.double() @ dense.double().T + bias.double()
    assert made.dtype == torch.float32 and made.shape == (2, 5, 200)
    assert_close_rows(made.flatten(0, 1).double(), exact.flatten(0, 1), FORMAT_TOLERANCE[format_name])
    for activation in backend.capabilities.activations:
        rounded = backend.linear(x, matrix, bias, CompileOptions(activation))
        coarse = activation == "int8" or activation == format_name == "fp8"
        tolerance = max(FORMAT_TOLERANCE[format_name], FORMAT_TOLERANCE["int4"] if coarse else 0)
        assert_close_rows(rounded.flatten(0, 1).double(), exact.flatten(0, 1), tolerance)
        assert activation != "auto" or torch.equal(rounded, made)
    made = backend.linear_gradient(grad, matrix)
    assert made.dtype == torch.float32
    assert_close_rows(made.double(), grad.double() @ dense.double(), 1e-5)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [0, 1, 13, 70])
@pytest.mark.parametrize(("op", "count"), [("relu", 1), ("gelu", 1), ("gelu_erf", 1), ("geglu", 2), ("swiglu", 2)])
def test_feed_forward_blocks(backend, op, count, rows):
    width, inner, out = 72, 50, 33
    able = backend.capabilities
    for format_name in {"fp32", "int8"} & set(able.weight_formats):
        shapes = [(inner, width)] * count + [(out, inner)]
        pairs = [
            (PackedMatrix(format_name, *shape, backend.pack(random(*shape, seed=i), format_name)), random(shape[0], seed=9))
            for i, shape in enumerate(shapes)
        ]
        first, down = [(w, bias if i else None) for i, (w, bias) in enumerate(pairs[:-1])], pairs[-1]
        x = random(2, rows, width, seed=7)
        hidden = FUNCTIONS[op](*(F.linear(x.double(), unpack(w).double(), _wide(bias)) for w, bias in first))
        exact = F.linear(hidden, unpack(down[0]).double(), _wide(down[1]))
        for activation in able.activations:
            made = backend.feed_forward(x, first, op, down, CompileOptions(activation))
            assert made.dtype == torch.float32 and made.shape == (2, rows, out)
            coarse = format_name != "fp32" and activation == "int8"
            if rows:
                bound = FORMAT_TOLERANCE["int4" if coarse else format_name]
                assert_close_rows(made.flatten(0, 1).double(), exact.flatten(0, 1), bound)


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("biased", [False, True], ids=["rms", "layer"])
def test_feed_forward_blocks_with_what_is_around_them(backend, biased, rows):
    shapes = (40, 72), (72, 40)
    up, down = (
        (PackedMatrix("fp32", *shape, backend.pack(random(*shape, seed=i), "fp32")), None) for i, shape in enumerate(shapes)
    )
    x, weight, bias = random(2, rows, 72, seed=7), random(72, seed=8), random(72, seed=9) if biased else None
    for norm in (None, (weight, bias, 1e-5)):
        rows_read = x if norm is None else backend.norm(x, *norm)
        exact = F.linear(F.relu(F.linear(rows_read.double(), unpack(up[0]).double())), unpack(down[0]).double())
        for residual in (False, True):
            made = backend.feed_forward(x, [up], "relu", down, norm=norm, residual=residual)
            expected = exact + x.double() if residual else exact
            assert_close_rows(made.flatten(0, 1).double(), expected.flatten(0, 1), 1e-5)


def _wide(bias):
    return None if bias is None else bias.double()


@pytest.mark.parametrize("shape", [(0, 16), (1, 7), (3, 5, 100), (300, 768)])
def test_norms(backend, shape):
    x, weight, bias = random(*shape), random(shape[-1], seed=1), random(shape[-1], seed=2)
    exact = F.layer_norm(x.double(), shape[-1:], weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(backend.norm(x, weight, bias, 1e-5).double(), exact, rtol=1e-5, atol=1e-5)
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6) * weight.double()
    torch.testing.assert_close(backend.norm(x, weight, None, 1e-6).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "numbers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "widths"), [(1, 1, (16, 16)), (1, 130, (20, 7)), (5, 33, (64, 64)), (70, 150, (8, 80)), (0, 3, (4, 4))]
)
def test_attention_over_tensors(backend, mask, dtype, queries, keys, widths):
    """Against the formula in float64, for masks of each kind with queries that see nothing, and layouts of projections."""
    q, k, v = (
        random(2, tokens, heads, width, seed=i).to(dtype).transpose(1, 2)
        for i, (tokens, heads, width) in enumerate(((queries, 6, widths[0]), (keys, 2, widths[0]), (keys, 2, widths[1])))
    )
    given = None
    if mask == "bool":
        given = random(2, 1, queries, keys, seed=4) > -0.5
        given[:, :, :1] = False
    elif mask == "numbers":
        given = random(1, 6, queries, keys, seed=4).to(dtype)
        given[:, :3, :1], given[:, 3:, :1] = -torch.inf, torch.finfo(dtype).min
    causal, options = mask == "causal", CompileOptions("int8" if "int8" in backend.capabilities.activations else "auto")
    made = backend.attend(q, k, v, 0.3, given, causal=causal)
    wide = None if given is None else given.double() if mask == "numbers" else given
    rounded = backend.attend(q, k, v, 0.3, given, causal=causal, options=options)
    exact = attend(q.double(), k.double(), v.double(), 0.3, wide, causal=causal)
    assert made.dtype == dtype and made.shape == exact.shape == (2, 6, queries, widths[1])
    if queries:
        bound = 2e-5 if dtype == torch.float32 else 2**-7
        scale = max(1.0, float(exact.abs().max()))
        assert (made.double() - exact).abs().max() <= bound * scale
        assert rounded.dtype == dtype and (rounded.double() - exact).abs().max() <= 2**-6 * scale
        shown = {"bool": 0.0, "numbers": 0.0, "none": None, "causal": None}[mask]
        assert shown is None or bool((made[:, :3, 0] == shown).all())
        if mask == "numbers":
            mean = v[:, 1:].double().mean(2).expand(2, 3, -1)
            torch.testing.assert_close(made[:, 3:, 0].double(), mean, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)


def logits_with_ties() -> torch.Tensor:
    logits = torch.randn(len(CHOICES), 500, generator=torch.Generator().manual_seed(3))
    logits[0, [17, 400]] = 9.0
    logits[4, 3] = float("nan")
    return logits


def test_token_choice_follows_its_definition(backend, model):
    plan = backend.compile(graph_of(model), packed_weights(weights_of(model), backend.capabilities.weight_formats[0]))
    assert plan.device == backend.device
    logits = logits_with_ties()
    before = logits.clone()
    chosen = plan.choose_tokens(logits, CHOICES)
    assert chosen == choose_tokens(logits.numpy(), CHOICES)
    assert chosen[0] == 17 and chosen[1] is None and chosen[4] == NOT_FINITE and all(type(t) is int for t in chosen[2:])
    assert torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0))


def test_the_reference_chooses_the_same_on_a_device():
    logits = logits_with_ties()
    assert choose_on_device(logits, CHOICES) == choose_tokens(logits.numpy(), CHOICES)


def test_files_are_mapped_or_rejected(backend, tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(200)))
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        if not backend.maps_files:
            with pytest.raises(BackendError, match="weights"):
                backend.map_file(file.fileno(), status.st_size, status.st_mtime_ns, path)
            return
        mapping = backend.map_file(file.fileno(), status.st_size, status.st_mtime_ns, path)
    tensor = torch.frombuffer(mapping, dtype=torch.uint8)
    assert tensor.tolist() == list(range(200)) and mapping.replaced() is None
    backend.check_tensor(tensor)
    backend.check_tensor(torch.zeros(3))
    path.unlink()
    assert mapping.replaced() == path


def test_torch_threads_are_restored(backend):
    before = torch.get_num_threads()
    with backend.thread_context():
        assert 1 <= torch.get_num_threads() <= before
    assert torch.get_num_threads() == before


def test_unsupported_options_are_named():
    able = ReferenceBackend().capabilities
    check_supported(able, ["int8", "fp32"], "bf16", "flash")
    for asked, said in (
        ((["int2"], "bf16", "flash"), "weight format 'int2'; choose precision among"),
        ((["int8"], "int3", "flash"), "KV cache dtype 'int3'; choose kv_cache among"),
        ((["int8"], "bf16", "local"), "attention mode 'local'; choose attention_optimization among"),
    ):
        with pytest.raises(BackendError, match=f"the reference backend does not support {said}"):
            check_supported(able, *asked)
    check_supported(able, ["fp8"], "bf16", "flash", "fp8")
    other = replace(able, name="other", activations=("auto", "int8"))
    check_supported(other, ["fp8"], "bf16", "flash", "int16")  # which a backend that does not round rows ignores
    with pytest.raises(
        BackendError, match="the other backend does not support activation 'fp8'; choose activation among auto, int8"
    ):
        check_supported(other, ["fp8"], "bf16", "flash", "fp8")


@pytest.mark.parametrize(
    "line",
    ['runtime.backend.name == "cpu"', 'config.backend != "reference"', '"cpu" != self.name', 'getattr(backend, "pack", None)',
     'hasattr(self.backend, "linear")'],
)  # fmt: skip
def test_the_search_detects_backend_names(line):
    (node,) = (n for n in ast.walk(ast.parse(line)) if isinstance(n, (ast.Compare, ast.Call)))
    assert names_a_backend(node) if isinstance(node, ast.Compare) else asks_a_backend(node)
    assert not names_a_backend(ast.parse('device.type == "cpu"', mode="eval").body)


def sources():
    for package in ("deepseek_optimizer", "deepseek_optimizer_cli"):
        yield from sorted((Path(deepseek_optimizer.__file__).parents[1] / package).rglob("*.py"))


@pytest.mark.every_run
def test_no_code_asks_for_a_backend_by_name():
    """No comparison with a backend's name and no getattr of the protocol's members, outside the backends' folders."""
    found, count = [], 0
    for path in sources():
        count += 1
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            place = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Compare) and names_a_backend(node):
                found.append(f"{place}: {ast.unparse(node)}")
            if isinstance(node, ast.Call) and asks_a_backend(node):
                found.append(f"{place}: {ast.unparse(node)}")
    assert count > 400 and not found, found


def names_a_backend(node: ast.Compare) -> bool:
    sides = [node.left, *node.comparators]
    named = any(isinstance(side, ast.Constant) and side.value in BUILT_IN for side in sides)
    return named and any(isinstance(s, ast.Attribute) and s.attr in ("name", "backend") or _called_backend(s) for s in sides)


def asks_a_backend(node: ast.Call) -> bool:
    function = node.func.id if isinstance(node.func, ast.Name) else ""
    return function in ("getattr", "hasattr") and bool(node.args) and _called_backend(node.args[0])


def _called_backend(node: ast.expr) -> bool:
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name in ("backend", "_backend", "plan", "_plan", "store")
