"""Memory for the ops' tensors: blocks never overlap, free space is reused, and memory is returned."""

from __future__ import annotations

import gc
import os
import random
import threading

import pytest
import torch

from deepseek_optimizer.errors import NotEnoughMemoryError
from deepseek_optimizer.train.ops import native
from deepseek_optimizer.train.ops.memory import TensorMemory

MB = 1 << 20


def test_tensors_do_not_overlap():
    """Each tensor keeps its content while others are allocated and freed, even if only a view of it is left."""
    memory, chance, alive = TensorMemory(), random.Random(0), []
    for turn in range(1500):
        if alive and chance.random() < 0.5:
            tensor, value = alive.pop(chance.randrange(len(alive)))
            assert (tensor == value).all()
        else:
            dtype = chance.choice([torch.bfloat16, torch.float32, torch.int64])
            tensor = memory.empty((chance.randrange(1, 9), chance.randrange(1, 90_000)), dtype)
            alive.append((tensor.fill_(turn % 97).view(-1)[::2], turn % 97))
            del tensor
    for tensor, value in alive:
        assert (tensor == value).all()


def test_holes_are_merged_and_reused():
    memory = TensorMemory()
    tensors = [memory.empty((MB,), torch.uint8) for _ in range(256)]
    assert memory.used() == memory.held() == 256 * MB
    places = [t.data_ptr() for t in tensors]
    del tensors[10:14], tensors[0]
    assert memory.used() == 251 * MB
    assert memory.empty((4 * MB,), torch.uint8).data_ptr() == places[10]  # the four adjacent ones; freed immediately
    small = memory.empty((MB,), torch.uint8)
    assert small.data_ptr() == places[0] and memory.held() == 256 * MB  # the smallest hole that fits
    more = memory.empty((300 * MB,), torch.uint8)
    assert memory.held() == 556 * MB
    del more, tensors
    memory.trim()
    assert memory.used() == MB and memory.held() == 256 * MB
    del small
    memory.trim()
    assert memory.held() == 0


def test_small_and_empty_tensors_are_left_to_torch():
    memory = TensorMemory()
    for shape in ((), (0,), (3, 0), (1000,)):
        assert memory.empty(shape, torch.float32).shape == torch.Size(shape)
    assert memory.held() == 0


def test_tensors_are_freed_in_other_threads_and_in_cycles():
    memory = TensorMemory()

    def work() -> None:
        for _ in range(200):
            holder = [memory.empty((MB,), torch.uint8)]
            holder.append(holder)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert memory.used() == 0


def test_tracing_allocates_no_memory():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        like = torch.empty(4)
        assert type(native.new((1 << 40,), like)) is type(like)
    assert native.new((3,), torch.empty(4), torch.float64).dtype == torch.float64


def test_a_forked_process_writes_to_its_own_copy():
    tensor = TensorMemory().empty((MB,), torch.uint8).zero_()
    child = os.fork()
    if child == 0:
        tensor.numpy()[:] = 1
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert not tensor.any()


def test_failed_allocations_are_errors():
    memory = TensorMemory()
    with pytest.raises(NotEnoughMemoryError, match="shorter sequences"):
        memory.empty((1 << 55,), torch.uint8)
    assert memory.held() == 0
