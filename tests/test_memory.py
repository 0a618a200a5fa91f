"""The activation pool: who gets memory from it, where it goes, and that nobody notices otherwise."""

import os
import threading

import fresh
import pytest
import torch

from resnet_fast import memory
from resnet_fast.memory import empty_cache, memory_stats, pooled

MIB = 1 << 20


def megabytes(count):
    return torch.empty(count * MIB, dtype=torch.uint8)


@pytest.fixture
def pool(native):
    if not memory_stats()["enabled"]:
        pytest.skip("the activation pool is off here (RESNET_FAST_POOL=0, or not Linux)")
    empty_cache()
    yield
    empty_cache()


def test_without_the_extension_nothing_happens(monkeypatch):
    monkeypatch.setattr(memory, "_context", None)
    monkeypatch.setattr(memory.extension, "load", lambda: None)
    with pooled():
        assert torch.ones(4 * MIB).sum() == 4 * MIB
    assert memory_stats()["enabled"] is False
    assert memory_stats()["cached_bytes"] == 0
    empty_cache()
    monkeypatch.setattr(memory, "_context", None)


@pytest.mark.usefixtures("pool")
def test_large_tensors_come_from_the_pool_and_go_back():
    before = memory_stats()
    with pooled():
        tensor = megabytes(5)
        during = memory_stats()
    assert during["allocated_bytes"] - before["allocated_bytes"] >= 5 * MIB
    assert tensor.data_ptr() % (2 * MIB) == 0
    address = tensor.data_ptr()
    del tensor
    after = memory_stats()
    assert after["allocated_bytes"] == before["allocated_bytes"]
    assert after["cached_bytes"] >= 5 * MIB
    with pooled():
        again = megabytes(5)
    assert again.data_ptr() == address
    assert memory_stats()["hits"] == before["hits"] + 1


@pytest.mark.usefixtures("pool")
def test_small_tensors_and_other_code_do_not():
    before = memory_stats()["allocated_bytes"]
    with pooled():
        small = torch.empty(MIB // 2, dtype=torch.uint8)
    outside = megabytes(5)
    assert memory_stats()["allocated_bytes"] == before
    assert small.numel() + outside.numel() > 0


@pytest.mark.usefixtures("pool")
def test_nesting_and_exceptions():
    def body():
        with pooled():
            with pooled():
                pass
            held.append(megabytes(3))
            raise KeyError

    held = []
    with pytest.raises(KeyError):
        body()
    allocated = memory_stats()["allocated_bytes"]
    assert allocated >= 3 * MIB, "the outer context must still be on after the inner one"
    outside = megabytes(3)
    assert memory_stats()["allocated_bytes"] == allocated, "and off after the exception"
    assert outside.numel() == held[0].numel()


@pytest.mark.usefixtures("pool")
def test_empty_cache_returns_what_is_free_and_keeps_what_is_held():
    with pooled():
        held, free = megabytes(4).fill_(7), megabytes(6)
    del free
    assert memory_stats()["cached_bytes"] >= 6 * MIB
    empty_cache()
    assert memory_stats()["cached_bytes"] == 0
    assert (held == 7).all()


@pytest.mark.usefixtures("pool")
def test_tensors_outlive_their_context_and_thread():
    tensors = []

    def worker(value):
        with pooled():
            tensors.append(megabytes(2).fill_(value))

    threads = [threading.Thread(target=worker, args=(value,)) for value in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({tensor.data_ptr() for tensor in tensors}) == 8
    assert sorted(int(tensor[-1]) for tensor in tensors) == list(range(8))
    assert all((tensor == tensor[0]).all() for tensor in tensors)
    before = memory_stats()["allocated_bytes"]
    tensors.clear()
    assert memory_stats()["allocated_bytes"] <= before - 8 * 2 * MIB


@pytest.mark.usefixtures("pool")
def test_the_context_is_this_threads_own():
    with pooled():
        allocated = memory_stats()["allocated_bytes"]
        held = []
        thread = threading.Thread(target=lambda: held.append(megabytes(4)))
        thread.start()
        thread.join()
        assert memory_stats()["allocated_bytes"] == allocated


@pytest.mark.usefixtures("pool")
def test_many_threads_allocate_and_free_at_once():
    wrong = []

    def worker(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(60):
            size = int(torch.randint(1, 5, (1,), generator=generator))
            with pooled():
                tensor = megabytes(size)
            tensor[::4096] = seed
            if not (tensor[::4096] == seed).all():
                wrong.append(seed)

    threads = [threading.Thread(target=worker, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    stats = memory_stats()
    assert stats["cached_bytes"] <= stats["limit_bytes"]


@pytest.mark.usefixtures("pool")
def test_resizing_sharing_and_numpy():
    with pooled():
        tensor = torch.arange(MIB, dtype=torch.float32)
        tensor.resize_(3 * MIB)
    assert tensor[:MIB].equal(torch.arange(MIB, dtype=torch.float32))
    array = tensor.numpy()
    del tensor
    assert array[5] == 5.0, "numpy holds the storage"


def run(code, **environment):
    done = fresh.python(code, environment=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_can_be_switched_off(native):
    code = """
import torch
from resnet_fast.memory import memory_stats, pooled
with pooled():
    x = torch.ones(1 << 22)
print(memory_stats()["enabled"], memory_stats()["allocated_bytes"])
"""
    assert run(code, RESNET_FAST_POOL="0") == "False 0"


def test_the_limit_bounds_what_is_cached(native):
    code = """
import torch
from resnet_fast.memory import memory_stats, pooled
with pooled():
    tensors = [torch.ones(1 << 22) for _ in range(8)]
del tensors
stats = memory_stats()
print(stats["limit_bytes"], stats["cached_bytes"] <= stats["limit_bytes"])
"""
    assert run(code, RESNET_FAST_POOL_LIMIT=str(40 * MIB)) == f"{40 * MIB} True"


def test_fork_leaves_both_sides_whole(native):
    code = """
import os, torch
from resnet_fast.memory import empty_cache, memory_stats, pooled
torch.set_num_threads(1)  # a child that has OpenMP's threads from before the fork waits for them for ever
with pooled():
    parent = torch.full((1 << 22,), 3.0)
    free = torch.ones(1 << 22)
del free
child = os.fork()
with pooled():
    mine = torch.full((1 << 22,), 1.0 if child else 2.0)
right = (mine == (1.0 if child else 2.0)).all() and (parent == 3.0).all()
empty_cache()
if child == 0:
    os._exit(0 if right else 1)
_, status = os.waitpid(child, 0)
assert right and status == 0, (right, status)
"""
    run(code)
