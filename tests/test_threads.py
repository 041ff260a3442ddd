"""Threads on the CPU (csrc/parallel.cpp): whoever takes which rows, results are those of one thread."""

import pytest
import torch
from cases import BACKEND

import layernorm_cuda as lnc
from layernorm_cuda import _ops

pytestmark = pytest.mark.skipif(bool(BACKEND) or _ops._C is None, reason="not the compiled module")


@pytest.mark.parametrize("threads", [2, 3, 7, 32, 33, 70])
def test_nothing_is_left_out(threads):
    """More threads than cores, which get to run in any order, and more than there are shares of the rows (32)."""
    for seed, (rows, cols) in enumerate([(1, 70_000), (3, 50_000), (257, 300), (1000, 768), (5000, 128), (20_000, 17)]):
        generator = torch.Generator().manual_seed(seed)  # other values every time: memory keeps what stood there
        x, dy = torch.randn((2, rows, cols), generator=generator)
        leaves = [x.requires_grad_(), *torch.randn((2, cols), generator=generator).requires_grad_()]

        def results(count, leaves=leaves, dy=dy):
            torch.set_num_threads(count)
            y = lnc.layer_norm(leaves[0], (len(leaves[1]),), *leaves[1:])
            return y, *torch.autograd.grad(y, leaves, dy)

        several = results(threads)
        for got, want in zip(several, results(1), strict=True):
            assert torch.equal(got, want)
