"""Memory for large tensors: blocks never overlap, free space is reused, and memory is returned."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import threading

import pytest
import torch

from deepseek_optimizer.errors import NotEnoughMemoryError
from deepseek_optimizer.quant.tiles import empty_stack, empty_tiles
from deepseek_optimizer.system.tensor_memory import TensorMemory, weight_memory

MB = 1 << 20


def _memory(returns: bool = False) -> TensorMemory:
    return TensorMemory("a tensor", "use shorter sequences", segment=256 * MB, returns=returns)


def test_tensors_do_not_overlap():
    """Each tensor keeps its content while others are allocated and freed, even if only a view of it is left."""
    memory, chance, alive = _memory(), random.Random(0), []
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
    memory = _memory()
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
    memory = _memory()
    for shape in ((), (0,), (3, 0), (1000,)):
        assert memory.empty(shape, torch.float32).shape == torch.Size(shape)
    assert memory.held() == 0


def test_tensors_are_freed_in_other_threads_and_in_cycles():
    memory = _memory()

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


def test_a_forked_process_writes_to_its_own_copy():
    tensor = _memory().empty((MB,), torch.uint8).zero_()
    child = os.fork()
    if child == 0:
        tensor.numpy()[:] = 1
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert not tensor.any()


def test_failed_allocations_are_errors():
    memory = _memory()
    with pytest.raises(NotEnoughMemoryError, match="shorter sequences"):
        memory.empty((1 << 55,), torch.uint8)
    assert memory.held() == 0


@pytest.mark.parametrize("returns", (False, True))
def test_pages_of_freed_blocks_are_returned_or_kept(returns):
    memory = _memory(returns)
    kept, freed = (memory.empty((4 * MB,), torch.uint8).fill_(7) for _ in range(2))
    place = freed.data_ptr()
    del freed
    again = memory.empty((4 * MB,), torch.uint8)
    assert again.data_ptr() == place and (kept == 7).all()
    assert (again == (0 if returns else 7)).all()  # the system clears the pages that it hands out


def test_segments_without_tensors_are_returned():
    memory = _memory(returns=True)
    first = memory.empty((300 * MB,), torch.uint8)
    assert memory.held() == 300 * MB
    del first
    assert memory.used() == memory.held() == 0


def test_blocks_in_locked_pages_are_reused():
    memory = _memory(returns=True)
    kept, locked = (memory.empty((MB,), torch.uint8) for _ in range(2))
    libc, place = ctypes.CDLL(None, use_errno=True), locked.data_ptr()
    if libc.mlock(ctypes.c_void_p(place), ctypes.c_size_t(MB)):
        pytest.skip("the process may not lock memory")
    del locked
    assert memory.used() == kept.nbytes
    assert memory.empty((MB,), torch.uint8).data_ptr() == place


def test_segments_consist_of_whole_huge_pages():
    memory = _memory()
    large = memory.empty((257 * MB,), torch.uint8)
    assert memory.held() == 258 * MB
    assert memory.empty((MB,), torch.uint8).data_ptr() == large.data_ptr() + 257 * MB  # what is left is used


def test_packed_matrices_share_the_memory_of_weights():
    before = weight_memory().used()
    tiles = empty_tiles(4096, 512, 288)
    assert weight_memory().used() - before == tiles.nbytes == 256 * 16 * 288
    stack = empty_stack(3, 4096, 512, 288)
    assert weight_memory().used() - before == 4 * tiles.nbytes and stack.shape == (3, 256, 16, 288)
    assert not {(t.data_ptr() % 64) for t in (tiles, stack)} - {0}
