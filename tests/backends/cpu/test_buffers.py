"""Memory passed to the native library: which buffers are rejected, and detection of writes past a buffer's end."""

from __future__ import annotations

import ast
import ctypes
import gc
from pathlib import Path

import numpy as np
import pytest
import torch

import deepseek_optimizer
from deepseek_optimizer import BackendError
from deepseek_optimizer.backends.cpu import CpuBackend, native, packer
from deepseek_optimizer.backends.cpu.buffers import ZONE, Outputs, address, optional, strided
from deepseek_optimizer.quant.packed import PackedMatrix
from deepseek_optimizer.quant.tiles import empty_tiles
from deepseek_optimizer.train.ops import native as train_native

SOURCE = Path(deepseek_optimizer.__file__).parent
POINTERS = {"data_ptr", "ctypes", "__array_interface__", "from_buffer", "untyped_storage"}
# Files that take an address only to identify memory, never to access it.
IDENTITY = {
    "backends/cpu/kept_rows.py", "backends/cpu/mapped_file.py", "integration/load/mapped.py", "integration/multimodal/tower.py",
    "integration/bind/runtime.py", "integration/general/head.py", "integration/generation/fingerprint.py", "train/precision.py",
    "train/saved_activations.py", "calibration/inputs.py", "integration/load/rounding.py",
    "backends/cuda/plan.py", "backends/cuda/store.py", "backends/cuda/ops.py",
    "backends/cuda/adapter_ops.py",
}  # fmt: skip
DEVICE_TABLES = {"backends/cuda/adapters.py"}  # addresses on a device, which its kernels read


def pointers(tree: ast.AST) -> list[int]:
    """Lines that take the address of a tensor or an array."""
    return sorted(n.lineno for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in POINTERS)


@pytest.mark.every_run
def test_addresses_are_taken_in_one_function():
    actual = {str(f.relative_to(SOURCE)) for f in SOURCE.rglob("*.py") if pointers(ast.parse(f.read_text()))}
    assert actual - IDENTITY - DEVICE_TABLES == {"backends/cpu/buffers.py"}
    assert actual >= IDENTITY | DEVICE_TABLES, "the exceptions name files that have none"


def test_addresses_taken_elsewhere_are_detected():
    assert pointers(ast.parse("f(x.data_ptr())\ny = a.ctypes.data")) == [1, 2]


F32 = torch.float32


@pytest.mark.parametrize(
    "memory",
    [
        torch.zeros(2, 3, dtype=torch.bfloat16),
        torch.zeros(3, 3, dtype=F32),
        torch.zeros(3, 2, dtype=F32).t(),
        torch.zeros(2, 3, dtype=F32, device="meta"),
    ],
)
def test_unexpected_memory_is_rejected(memory):
    with pytest.raises(ValueError, match=r"^logits must be contiguous float32 \[2, 3\] on the CPU, and is "):
        address(memory, "logits", F32, (2, 3))


def test_unexpected_arrays_are_rejected():
    whole = np.zeros((2, 3), np.int32)
    assert address(whole, "ids", np.int32, (2, 3)) == whole.ctypes.data
    for array in (whole.astype(np.int64), whole[:1], whole.T, np.zeros((2, 6), np.int32)[:, ::2]):
        with pytest.raises(ValueError, match="^ids must be contiguous"):
            address(array, "ids", np.int32, (2, 3))


def test_only_row_strides_are_accepted():
    whole = torch.zeros(4, 6, dtype=F32)
    assert strided(whole[:, 1:4], "x", F32, (4, 3)) == whole.data_ptr() + 4
    for tensor in (whole[:, ::2], whole.t(), whole.double()):
        with pytest.raises(ValueError, match="^x must be"):
            strided(tensor, "x", F32, tuple(tensor.shape))
    assert optional(None, "x", F32, (1,)) is None


@pytest.fixture
def context():
    made = native.Context(threads=1)
    assert made.outputs.checked, "tests/conftest.py sets DSO_CHECK=1"
    return made


class Overwriting:
    """The library with one function that afterwards writes a byte outside its output."""

    def __init__(self, lib, name, argument, offset):
        self._lib, self._name, self._argument, self._offset = lib, name, argument, offset

    def __getattr__(self, name):
        function = getattr(self._lib, name)
        if name != self._name:
            return function

        def call(*arguments):
            code = function(*arguments)
            ctypes.memset(arguments[self._argument] + self._offset, 0x11, 1)
            return code

        return call


@pytest.mark.parametrize(("offset", "byte"), [(-1, -1), (-ZONE, -ZONE), (640, 640), (640 + ZONE - 1, 640 + ZONE - 1)])
def test_a_write_outside_an_output_is_reported(context, offset, byte):
    matrix = PackedMatrix("fp32", 16, 10, packer.pack(context, torch.ones(16, 10, dtype=F32), "fp32"))
    packer.unpack(context, matrix)
    context.lib = Overwriting(context.lib, "dso_unpack", 4, offset)
    with pytest.raises(BackendError, match=rf"dso_unpack wrote outside out \(torch.float32 \[16, 10\].*at byte {byte}$"):
        packer.unpack(context, matrix)


def test_a_write_past_packed_tiles_is_reported(context):
    context.lib = Overwriting(context.lib, "dso_pack", 8, 544)
    with pytest.raises(BackendError, match="dso_pack wrote outside tiles .* at byte 544"):
        packer.pack(context, torch.ones(16, 32, dtype=F32), "int8")


def test_a_write_past_a_gradient_is_reported(monkeypatch):
    made = native.Context(threads=1)
    made.lib = Overwriting(made.lib, "dso_train_rms_norm_backward", 8, 4 * 24)
    monkeypatch.setattr(train_native, "context", lambda: made)
    from deepseek_optimizer.train.ops.rms_norm import rms_norm

    x, weight = torch.ones(5, 24, dtype=F32, requires_grad=True), torch.ones(24, dtype=F32, requires_grad=True)
    y = rms_norm(x, weight, 1e-5)
    with pytest.raises(BackendError, match="dso_train_rms_norm_backward wrote outside dw .* at byte 96"):
        y.sum().backward()


def test_tiles_of_another_matrix_are_rejected():
    with pytest.raises(BackendError, match="packed data must be contiguous"):
        packer.weight_struct(PackedMatrix("int8", 32, 32, empty_tiles(16, 32, 544)))


def test_red_zones_are_freed_with_their_tensor():
    outputs = Outputs(True)
    tensor = outputs.empty((3, 5), torch.bfloat16)
    assert tensor.shape == (3, 5) and tensor.data_ptr() % 64 == 0 and tensor.untyped_storage().nbytes() == 30
    row = tensor[0]
    del tensor
    gc.collect()
    assert len(outputs._zones) == 1  # a view keeps it alive
    del row
    gc.collect()
    assert not outputs._zones


def test_without_dso_check_there_are_no_red_zones(monkeypatch):
    monkeypatch.delenv("DSO_CHECK")
    assert not native.Context(threads=1).outputs.checked


def test_short_lived_outputs_share_memory():
    outputs, many = Outputs(False), (1 << 20,)
    first = outputs.empty(many, torch.float32, short_lived=True)
    place, part = first.data_ptr(), first[7:]
    del first
    assert outputs.empty(many, torch.float32, short_lived=True).data_ptr() != place  # `part` uses it
    del part
    assert outputs.empty(many, torch.float32, short_lived=True).data_ptr() == place
    assert outputs.empty((3, 0), torch.float32, short_lived=True).shape == (3, 0)
    assert outputs.empty(many, torch.float32).untyped_storage().resizable()


def test_much_memory_is_not_kept():
    outputs = Outputs(False)
    tensors = [outputs.empty((40 << 20,), torch.uint8, short_lived=True) for _ in range(8)]
    outputs.trim()
    tensors[0].fill_(7)
    del tensors[1:]
    outputs.trim()
    assert outputs._short_lived.held() == outputs._short_lived.used() == 40 << 20
    assert bool((tensors[0] == 7).all())


def test_much_memory_is_not_kept_after_an_error(monkeypatch):
    backend, outputs = CpuBackend(threads=1), Outputs(False)
    monkeypatch.setattr(backend.context, "outputs", outputs)
    with pytest.raises(KeyError), backend.thread_context():
        tensors = [outputs.empty((40 << 20,), torch.uint8, short_lived=True) for _ in range(8)]
        assert outputs._short_lived.held() == 320 << 20
        del tensors
        raise KeyError
    assert outputs._short_lived.held() == 0
