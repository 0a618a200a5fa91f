"""Bitwise the same every time, at every thread count; safe to call first from many threads; memory that stays flat."""

import gc
import resource
from concurrent.futures import ThreadPoolExecutor

import fresh
import pytest
import stock
import torch
from cases import CONV_CASES, LAYOUTS, bn_tensors, conv_case, draw
from torchvision.models.resnet import BasicBlock

from resnet_fast import functional, optimize


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_twenty_runs_are_bitwise_equal(layout, dtype, training, backend):
    tensors = conv_case(CONV_CASES[2], dtype, layout)
    keywords = {"training": training, "padding": 1, "backend": backend}
    torch.use_deterministic_algorithms(True)
    try:
        first = stock.run(functional.conv_bn_act, tensors, **keywords)
        for _ in range(19):
            again = stock.run(functional.conv_bn_act, tensors, **keywords)
            for name in first:
                assert torch.equal(again[name], first[name]), name
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 64, 28, 28), (2, 3, 65, 127), (16, 65, 7, 7)], ids=["even", "tall", "odd"])
def test_thread_count_changes_no_bit(shape, layout, dtype, training, native):
    """bn_act: our own reductions and loops. (How convolutions split is oneDNN's affair.)"""
    tensors = {"x": draw(shape, dtype, layout), "residual": draw(shape, dtype, layout)}
    tensors |= bn_tensors(shape[1], torch.float32) | {"dy": draw(shape, dtype, layout)}
    results = []
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        results.append(stock.run(functional.bn_act, tensors, training=training, backend=native))
    for other in results[1:]:
        for name in other:
            assert torch.equal(other[name], results[0][name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_which_thread_computes_what_changes_no_bit(dtype, native):
    """Eight threads on fewer cores, which take over each other's work in an order that nobody knows."""
    torch.set_num_threads(8)
    block = optimize(BasicBlock(64, 64), backend=native, strict=True).to(dtype, memory_format=torch.channels_last)
    x, dy = (draw((8, 64, 56, 56), dtype, "channels_last") for _ in range(2))
    x.requires_grad_()

    def step():
        y = block(x)
        return [y.detach(), *torch.autograd.grad(y, [x, *block.parameters()], dy)]

    first = step()
    for _ in range(9):
        for number, (one, other) in enumerate(zip(step(), first, strict=True)):
            assert torch.equal(one, other), number


def test_eight_threads_at_first_use():
    """In a fresh process: the extension is loaded once, and every thread gets the right answer."""
    code = """
import threading, torch
from concurrent.futures import ThreadPoolExecutor
torch.set_num_threads(1)
import resnet_fast
from resnet_fast import functional
barrier = threading.Barrier(8)
x = torch.randn(2, 8, 9, 9)
weight = torch.randn(8, 8, 3, 3)
mean, var = torch.zeros(8), torch.ones(8)
expected = torch.nn.functional.batch_norm(torch.nn.functional.conv2d(x, weight), mean, var).relu()
def first_use(_):
    barrier.wait()
    return functional.conv_bn_act(x, weight, mean, var)
with ThreadPoolExecutor(8) as pool:
    for y in pool.map(first_use, range(8)):
        torch.testing.assert_close(y, expected)
print("right", len(resnet_fast._log.said()))
"""
    done = fresh.python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("right")


def test_threads_share_a_model(backend):
    block = optimize(BasicBlock(8, 8), backend=backend, strict=True).eval()
    inputs = [draw((2, 8, 6, 6), torch.float32) for _ in range(16)]
    with torch.no_grad():
        expected = [block(x) for x in inputs]
        with ThreadPoolExecutor(8) as pool:
            for y, exact in zip(pool.map(torch.no_grad()(block), inputs), expected, strict=True):
                assert torch.equal(y, exact)


def test_memory_is_flat_over_a_thousand_steps(backend):
    block = optimize(BasicBlock(16, 16), backend=backend, strict=True).train()
    optimizer = torch.optim.SGD(block.parameters(), 1e-3)
    x = draw((2, 16, 12, 12), torch.float32, "channels_last")

    def steps(count):
        for _ in range(count):
            optimizer.zero_grad()
            block(x).sum().backward()
            optimizer.step()
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(gc.get_objects())

    steps(150)
    peak, objects = steps(50)
    later_peak, later_objects = steps(800)
    # One activation kept a step (18 KiB) would be 14 MiB over 800 steps.
    assert later_peak - peak < 6 * 1024, f"peak grew by {later_peak - peak} KiB"
    assert later_objects - objects < 100


def test_saved_tensors_are_freed_with_the_graph(backend):
    import weakref

    x = draw((2, 8, 6, 6), torch.float32).requires_grad_()
    y = functional.bn_act(x, None, None, residual=x.detach(), training=True, backend=backend)
    node = weakref.ref(y.grad_fn)
    del y
    gc.collect()
    assert node() is None
