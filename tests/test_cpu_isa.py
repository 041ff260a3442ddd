"""Every instruction set that this machine has keeps the contract: each runs in a process of its own.

``LAYERNORM_CUDA_CPU=name python tests/test_cpu_isa.py`` is that process: it runs the checks below, if the machine has
that instruction set, and prints which of them failed.
"""

import functools
import json
import os
import platform
import subprocess
import sys
import traceback

import cases
import pytest
import torch
from cases import BACKEND, BF16, F16, F32, F64
from oracle import truth

import layernorm_cuda as lnc
from layernorm_cuda import _ops

NAMES = ["neon"] if platform.machine() in ("arm64", "aarch64") else ["baseline", "avx2", "avx512"]
# (input, parameters): every combination that has kernels of its own.
COMBINATIONS = [(F64, F64), (F32, F32), (F16, F16), (F16, F32), (BF16, BF16), (BF16, F32)]
ROUNDING = {F64: 2e-15, F32: 1e-6, F16: 2**-11, BF16: 2**-8}
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def layer_norm(x, *parameters, **options):
    return lnc.layer_norm(x, x.shape[-1:], *parameters, **options)


def backward_xhat(row):
    """x̂ as backward sees it: the weight gradient of a single row under an upstream gradient of ones."""
    w = torch.ones_like(row).requires_grad_()
    y = layer_norm(row, w)
    return torch.autograd.grad(y, w, torch.ones_like(y))[0]


@check
def offset():
    for shift in (0.0, 1e3, 1e6):
        x = torch.randn(2, 4096) + shift
        want = truth(x, (4096,))[0]
        assert (layer_norm(x).double() - want).abs().max() < cases.OFFSET_ERROR
        assert (backward_xhat(x[0]).double() - want[0]).abs().max() < cases.OFFSET_ERROR


@check
def outlier():
    for where in (0, -1):
        x = torch.randn(2, 4096)
        x[:, where] = 1e6
        want = truth(x, (4096,))[0]
        assert (layer_norm(x).double() - want).abs().max() <= cases.OUTLIER_ERROR
        assert (backward_xhat(x[0]).double() - want[0]).abs().max() <= cases.OUTLIER_ERROR


@check
def magnitude():
    for scale in (1e-30, 1e-19, 1e19, 1e30):
        for cols in (5, 1000, 10000):
            x = torch.randn(2, cols) * scale
            assert (layer_norm(x, eps=0.0).double() - truth(x, (cols,), eps=0.0)[0]).abs().max() < 1e-5
            want = truth(x, (cols,), eps=0.0, rms=True)[0]
            assert (lnc.rms_norm(x, (cols,), eps=0.0).double() - want).abs().max() < 1e-5


@check
def poison():
    x = torch.randn(5, 777)
    clean = layer_norm(x)
    x[1, 3], x[3, -1] = float("nan"), float("inf")
    y = layer_norm(x)
    assert y[[1, 3]].isnan().all() and y[[0, 2, 4]].equal(clean[[0, 2, 4]])


@check
def constant_rows():
    for cols, value in ((1, 1e6), (769, 12345.678), (9000, -3e-5)):
        x, w, b = torch.full((3, cols), value), torch.randn(cols, requires_grad=True), torch.randn(cols)
        y = layer_norm(x, w, b)
        assert y.equal(b.expand_as(y))
        assert not torch.autograd.grad(y, w, torch.randn_like(y))[0].any()


@check
def counts():
    for dtype, wide in COMBINATIONS:
        x = torch.randn(8192, 40).to(dtype)
        w, b = torch.ones(40, dtype=wide), torch.zeros(40, dtype=wide, requires_grad=True)
        y = layer_norm(x, w, b)
        assert (torch.autograd.grad(y, b, torch.ones_like(y))[0] == 8192).all()


@check
def conversions():
    """Every 16-bit number in, and every kind of rounding out: the sum with a residual is rounded once."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(64, 1024)
    for dtype in (F16, BF16):
        x = bits.view(dtype)
        for r in (torch.zeros_like(x), x.flip(0), torch.randn_like(x) * 2.0 ** torch.randint(-24, 16, x.shape)):
            total = lnc.add_layer_norm(x, r.to(dtype), (1024,))[1]
            want = (x.float() + r.to(dtype).float()).to(dtype)
            assert torch.equal(total.isnan(), want.isnan())
            assert total.nan_to_num().equal(want.nan_to_num())


@check
def nan_of_every_payload():
    """A float32 NaN stays one where it ends in a 16-bit result, whatever its bits."""
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FFF8000, 0x7FC00000], dtype=torch.int32)
    nan = torch.zeros(64)
    nan[3 : 3 + len(bits)] = bits.view(F32)
    for dtype in (F16, BF16):
        x = torch.randn(3, 64).to(dtype)
        assert layer_norm(x, torch.ones(64), nan).isnan().equal(nan.isnan().expand(3, 64))
        assert layer_norm(x, nan).isnan().equal(nan.isnan().expand(3, 64))
        stats = _ops.norm_forward(x, None, (64,), None, None, 1e-5, False, True, None)[2]
        dy = torch.stack([torch.ones(64), nan, torch.ones(64)])
        dx = _ops.norm_backward(dy, None, x, (64,), None, stats, False, [True, False, False], None)[0]
        assert dx.isnan().all(1).tolist() == [False, True, False]


@check
def every_shape_of_row():
    """Forward and every gradient: tails of all lengths, several chunks, strided rows, both norms, all dtypes."""
    for dtype, wide in COMBINATIONS:
        for rows, cols in ((2, 1), (3, 7), (9, 33), (40, 100), (5, 769), (2, 4113)):
            x = torch.randn(rows, 2, cols + 3).to(dtype)[:, 1, 2:-1]
            w, b, dy = torch.randn(cols).to(wide), torch.randn(cols).to(wide), torch.randn(rows, cols).to(dtype)
            for rms in (False, True):
                leaves = [t.detach().requires_grad_() for t in ((x, w) if rms else (x, w, b))]
                norm = lnc.rms_norm if rms else lnc.layer_norm
                y = norm(leaves[0], (cols,), *leaves[1:], eps=1e-5)
                found = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
                wants = truth(x, (cols,), w, None if rms else b, rms=rms, grad=dy)
                for got, want in zip(found, [want for want in wants if want is not None], strict=True):
                    size = 1 if dtype != F64 and cols < 3 else 0  # rstd is 300: cancellation shows
                    bound = ROUNDING[got.dtype] * (want.abs() + 4) + 30 * ROUNDING[F64 if dtype == F64 else F32]
                    assert ((got.double() - want).abs() <= bound * 300**size).all(), (dtype, wide, rows, cols, rms)


@check
def rows_do_not_see_each_other():
    """Nor how many threads there are: few long rows are split over them, many rows are not."""
    for dtype in (F32, BF16):
        for rows, cols in ((300, 257), (19, 2000), (3, 20000), (20, 9000)):
            x, dy = torch.randn(rows, cols).to(dtype), torch.randn(rows, cols).to(dtype)
            w = torch.randn(cols).to(dtype)

            def run(x, dy, w=w):
                leaves = [x.detach().requires_grad_(), w.detach().requires_grad_()]
                y = layer_norm(*leaves)
                return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

            torch.set_num_threads(1)
            alone, single = run(x[1:2], dy[1:2]), run(x, dy)
            torch.set_num_threads(3)
            for one, several in zip(single, run(x, dy), strict=True):
                assert one.equal(several)
            assert alone[0].equal(single[0][1:2]) and alone[1].equal(single[1][1:2])


@check
def parameters_of_many_rows():
    """Weight and bias that are widened once for all rows give each the bits that they give read as they are."""
    for rows, cols in ((345, 765), (129, 2048)):
        x, r = torch.randn(2, rows, cols).to(BF16)
        w, b = torch.randn(2, cols).to(BF16)
        many = layer_norm(x, w, b), *lnc.add_layer_norm(x, r, (cols,), w, b)
        for part in (slice(0, 3), slice(rows - 3, rows)):
            few = layer_norm(x[part], w, b), *lnc.add_layer_norm(x[part], r[part], (cols,), w, b)
            for got, want in zip(many, few, strict=True):
                assert got[part].equal(want)


@check
def outputs_larger_than_the_cache():
    """What is written past the caches has the bits of rows of their own, and so has their sum."""
    for dtype, cols in ((F32, 1024), (BF16, 1024), (F16, 768), (F32, 8192), (F64, 512)):
        x, r = torch.randn(2, 2**25 // cols // dtype.itemsize, cols, dtype=torch.float32).to(dtype)
        w, b = torch.randn(2, cols).to(dtype)
        for rows in (slice(0, 3), slice(len(x) - 5, len(x))):
            few = lnc.add_layer_norm(x[rows], r[rows], (cols,), w, b)
            for got, want in zip(lnc.add_layer_norm(x, r, (cols,), w, b), few, strict=True):
                assert got[rows].equal(want)
            assert layer_norm(x, w, b)[rows].equal(layer_norm(x[rows], w, b))
            y = lnc.add_rms_norm(x, r, (cols,), w)[0]
            assert y[rows].equal(lnc.add_rms_norm(x[rows], r[rows], (cols,), w)[0])


@check
def gradients_larger_than_the_cache():
    """The same of input gradients, of an odd number of rows, and of rows that threads share; sums are right."""
    for dtype, rows, cols in (
        (F32, 4099, 768),
        (F32, 1537, 2048),
        (BF16, 4100, 1024),
        (F16, 8195, 512),
        (F32, 3, 2**21),
    ):
        x, dy, ds = torch.randn(3, rows, cols).to(dtype)
        w = torch.randn(cols).to(dtype)
        stats = _ops.norm_forward(x, None, (cols,), w, None, 1e-5, False, True, None)[2]
        for mask in ([True] * 3, [True, False, False]):
            dx, dw, db = _ops.norm_backward(dy, ds, x, (cols,), w, stats, False, mask, None)
            for part in (slice(0, 2), slice(rows - 3, rows)):
                few = x[part], (cols,), w, stats[:, part], False, [True, False, False], None
                assert dx[part].equal(_ops.norm_backward(dy[part], ds[part], *few)[0])
        xhat = (x.double() - x[:, :1].double() - stats[0].double()[:, None]) * stats[1].double()[:, None]
        _, dw, db = _ops.norm_backward(dy, ds, x, (cols,), w, stats, False, [True] * 3, None)
        for got, want in ((dw, dy.double() * xhat), (db, dy.double())):
            bound = ROUNDING[dtype] * want.sum(0).abs() + 1e-6 * (1 + want.abs().sum(0))
            assert ((got.double() - want.sum(0)).abs() <= bound).all()


# ---- one process for each instruction set ---------------------------------------------------------------------------


@functools.cache
def outcome(name):
    """(The instruction set that ran, what went wrong in each check)."""
    environment = {**os.environ, "LAYERNORM_CUDA_CPU": name}
    paths = [os.path.dirname(os.path.dirname(lnc.__file__)), os.environ.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(bool(BACKEND) or _ops._C is None, reason="not the compiled CPU kernels")
@pytest.mark.parametrize("what", CHECKS)
@pytest.mark.parametrize("name", NAMES)
def test_instruction_set(name, what):
    ran, failures = outcome(name)
    if ran != name:
        pytest.skip(f"this machine has no {name}")
    assert failures[what] is None, failures[what]


@pytest.mark.skipif(bool(BACKEND) or _ops._C is None, reason="not the compiled CPU kernels")
def test_an_unknown_name_is_the_best_there_is():
    assert lnc.build_info()["cpu_instruction_set"] in NAMES
    if "LAYERNORM_CUDA_CPU" not in os.environ:
        assert outcome("no such instruction set")[0] == lnc.build_info()["cpu_instruction_set"]


def main():
    ran, failures = lnc.build_info()["cpu_instruction_set"], {}
    for name, function in CHECKS.items() if ran == os.environ.get("LAYERNORM_CUDA_CPU", ran) else ():
        torch.manual_seed(0)
        try:
            function()
            failures[name] = None
        except Exception:
            failures[name] = traceback.format_exc()
    print(json.dumps([ran, failures]))


if __name__ == "__main__":
    main()
