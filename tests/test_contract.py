"""The numerical contract, a test for every row of it, on every backend there is."""

import math

import cases
import pytest
import torch
from cases import BF16, DTYPES, F16, F32, F64, big
from oracle import norm, truth

import layernorm_cuda as lnc
from layernorm_cuda import _ops

COLS = 4096


def normalise(function, x, *parameters, **options):
    return function(x, x.shape[-1:], *parameters, **options)


def backward_xhat(function, row):
    """x̂ as backward sees it: the weight gradient of a single row under an upstream gradient of ones."""
    w = torch.ones_like(row[0]).requires_grad_()
    y = normalise(function, row, w)
    return torch.autograd.grad(y, w, torch.ones_like(y))[0]


def relative(actual, truth):
    """Largest error, relative to the largest true value of the same row."""
    truth = truth.double()
    return ((actual.double() - truth).abs().amax(-1) / truth.abs().amax(-1)).max().item()


# ---- statistics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 0.5, 0.95, -1.05, 1.0, 1.95, -2.05, 3.0, -37.5, 1e3, 1e4, -1e5, 1e6])
def test_offset(offset, device):
    x = (torch.randn(6, COLS) + offset).to(device)
    expected = truth(x, (COLS,))[0]
    assert (normalise(lnc.layer_norm, x).double() - expected).abs().max() < cases.OFFSET_ERROR
    for row, want in zip(x.split(1), expected, strict=True):
        assert (backward_xhat(lnc.layer_norm, row).double() - want).abs().max() < cases.OFFSET_ERROR


@pytest.mark.parametrize("offset", [1e4, 1e6])
@pytest.mark.parametrize("cols", [2, 33, 100, 769, 1024, 8192, 12289])
def test_offset_at_every_row_length(cols, offset, device):
    """No tier of kernels is without the pivot, whatever the length of its rows."""
    x = (torch.randn(3, cols) + offset).to(device)
    expected = truth(x, (cols,))[0]
    assert (normalise(lnc.layer_norm, x).double() - expected).abs().max() < cases.OFFSET_ERROR


def test_offset_of_all_but_the_first_elements(device):
    """Nor is what a row begins with taken for what it is."""
    x = torch.randn(6, COLS) + 1e3
    x[:, :8] = torch.tensor([1.0, -1.0, 2.0, -2.0, 0.0, 3.0, -3.0, 4.0])
    x[3:, 0] = 1e3
    x = x.to(device)
    assert relative(normalise(lnc.layer_norm, x), truth(x, (COLS,))[0]) < cases.OFFSET_ERROR / 4


def test_offset_in_dx(device):
    """dx of a row with a large mean is as good as without."""
    dy = torch.randn(4, COLS)
    for offset in (0.0, 1e4, 1e6):
        x = (torch.randn(4, COLS) + offset).to(device).requires_grad_()
        y = normalise(lnc.layer_norm, x)
        dx = torch.autograd.grad(y, x, dy.to(device))[0]
        want = truth(x, (COLS,), grad=dy.to(device))[1]
        assert (dx.double() - want).abs().max() < 4 * cases.OFFSET_ERROR


@pytest.mark.parametrize("where", [0, 1, COLS // 2, -1])
@pytest.mark.parametrize("outlier", [1e6, -1e6])
def test_outlier(outlier, where, device):
    """Also in the first element, from which the others are measured."""
    x = torch.randn(3, COLS)
    x[:, where] = outlier
    x = x.to(device)
    expected = truth(x, (COLS,))[0]
    assert (normalise(lnc.layer_norm, x).double() - expected).abs().max() <= cases.OUTLIER_ERROR
    for row, want in zip(x.split(1), expected, strict=True):
        assert (backward_xhat(lnc.layer_norm, row).double() - want).abs().max() <= cases.OUTLIER_ERROR


# ---- range ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scale, eps", [(1e-30, 0.0), (1e-25, 0.0), (1e-16, 1e-32), (1e-10, 0.0), (1e19, 1e-5), (1e30, 1e-5)]
)
@pytest.mark.parametrize("cols", [2, 100, 1000, 4096, 12289])
@pytest.mark.parametrize("norm_", ["layer", "rms"])
def test_range(norm_, cols, scale, eps, device):
    """The variance over- or underflows float32; the result does not."""
    function = getattr(lnc, f"{norm_}_norm")
    x = (torch.randn(3, cols).clamp(-3, 3) * scale).to(device).requires_grad_()
    w = torch.randn(cols, device=device, requires_grad=True)
    dy = torch.randn(3, cols, device=device)
    y = normalise(function, x, w, eps=eps)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    y_true, dx_true, dw_true, _ = truth(x, (cols,), w, eps=eps, rms=norm_ == "rms", grad=dy)
    assert relative(y, y_true) < 4e-6
    assert relative(dw, dw_true) < 4e-6
    # dx of two columns is a difference of equals and 0 but for eps: nothing to be relative to.
    if cols > 2:
        assert relative(dx, dx_true) < 2e-5
    with torch.no_grad():
        assert torch.equal(normalise(function, x, w, eps=eps), y)


def test_range_of_the_residual_sum(device):
    x = (torch.randn(3, 1000) * 1e30).to(device)
    r = (torch.randn(3, 1000) * 1e30).to(device)
    y, total = lnc.add_layer_norm(x, r, (1000,))
    assert relative(y, truth(total, (1000,))[0]) < 4e-6


def test_rows_of_every_size_side_by_side(device):
    """A row out of the ordinary range does not touch its neighbours."""
    scales = torch.tensor([1.0, 1e30, 1e-3, 1e19, 1e-30, 1.0])[:, None]
    x = (torch.randn(6, 500) * scales).to(device)
    y = normalise(lnc.layer_norm, x, eps=0.0)
    assert relative(y, truth(x, (500,), eps=0.0)[0]) < 4e-6


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.name)
def test_poison_stays_in_its_row(dtype, poison, device):
    for function in (lnc.layer_norm, lnc.rms_norm):
        for cols in (7, 33, 1000):
            clean = torch.randn(9, cols).to(dtype).to(device).requires_grad_()
            dirty = clean.detach().clone()
            dirty[4, cols // 2] = poison
            dirty[7, 0] = poison
            dirty.requires_grad_()
            dy = torch.randn(9, cols).to(dtype).to(device)
            results = []
            for x in (clean, dirty):
                y = normalise(function, x)
                results.append((y, torch.autograd.grad(y, x, dy)[0]))
            for right, got in zip(*results, strict=True):
                for row in range(9):
                    if row in (4, 7):
                        assert not torch.isfinite(got[row]).any() or function is lnc.rms_norm
                        assert got[row].isnan().any()
                    else:
                        assert torch.equal(got[row], right[row])


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.name)
@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_constant_rows_give_exactly_the_bias(eps, dtype, device):
    """So does a single column. No gradient for weight, none for the input."""
    for cols in (1, 2, 3, 7, 100, 1024, 4097):
        for value in (0.0, 1e-3, 0.1, -3.3, 1e3, 65504.0, 1e6, 1e30):
            x = torch.full((5, cols), value).to(dtype).to(device)
            if not x.isfinite().all():
                continue
            x.requires_grad_()
            w = torch.randn(cols).to(dtype).to(device).requires_grad_()
            b = torch.randn(cols).to(dtype).to(device).requires_grad_()
            dy = torch.randn(5, cols).to(dtype).to(device)
            y = normalise(lnc.layer_norm, x, w, b, eps=eps)
            assert torch.equal(y, b.expand(5, cols))
            dx, dw = torch.autograd.grad(y, (x, w), dy)
            assert torch.equal(dw, torch.zeros_like(w))
            if eps == 0:
                assert torch.equal(dx, torch.zeros_like(x))


def test_single_column_of_changing_values(device):
    x = (torch.randn(100, 1) * 1e6).to(device).requires_grad_()
    w = torch.ones(1, device=device, requires_grad=True)
    b = torch.full((1,), 0.3, device=device)
    y = normalise(lnc.layer_norm, x, w, b)
    dx, dw = torch.autograd.grad(y, (x, w), torch.randn(100, 1, device=device))
    assert torch.equal(y, b.expand(100, 1)) and dw.item() == 0 and not dx.any()


# ---- accumulation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [8192, 1_000_000])
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.name)
def test_bias_gradient_counts(dtype, rows, device):
    """Ones add up to the count of rows, rounded once (float16 has no 1,000,000: inf), on any number of threads."""
    rows = big(rows, 70_000)
    for param_dtype in {dtype, F32}:
        x = torch.randn(rows, 4, device=device).to(dtype)
        b = torch.zeros(4, dtype=param_dtype, device=device, requires_grad=True)
        w = torch.ones(4, dtype=param_dtype, device=device, requires_grad=True)
        expected = torch.tensor(float(rows), dtype=F64).to(param_dtype).expand(4).to(device)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for parameters in ((None, b), (w, b)):
                y = normalise(lnc.layer_norm, x, *parameters)
                assert torch.equal(torch.autograd.grad(y, b, torch.ones_like(y))[0], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.name)
def test_weight_gradient_counts(dtype, device):
    """The same where x̂ is ±1 to the last bit: rows of (-1, 1) and eps = 0."""
    rows = big(1_000_000, 70_000)
    x = torch.tensor([[-1.0, 1.0]], dtype=dtype, device=device).repeat(rows, 1)
    expected = torch.tensor([-float(rows), float(rows)], dtype=F64).to(dtype).to(device)
    for function in (lnc.layer_norm, lnc.rms_norm):
        w = torch.ones(2, dtype=dtype, device=device, requires_grad=True)
        y = normalise(function, x, w, eps=0.0)
        assert torch.equal(torch.autograd.grad(y, w, torch.ones_like(y))[0], expected)


def test_float64_is_float64(device):
    """Nothing on the way is float32: neither statistics nor sums over rows."""
    x = torch.randn(300, 100, dtype=F64, device=device, requires_grad=True)
    w, b = (torch.randn(100, dtype=F64, device=device, requires_grad=True) for _ in range(2))
    dy = torch.randn(300, 100, dtype=F64, device=device)
    got = torch.autograd.grad(normalise(lnc.layer_norm, x, w, b), (x, w, b), dy)
    want = torch.autograd.grad(norm(x, (100,), w, b), (x, w, b), dy)
    for g, t in zip(got, want, strict=True):
        torch.testing.assert_close(g, t, rtol=1e-12, atol=1e-12)


def test_16_bit_sums_are_float32(device):
    """With float32 parameters the gradients of a bfloat16 input's rows are not rounded on the way."""
    x = torch.randn(5000, 16, device=device).to(BF16)
    w = torch.randn(16, device=device, requires_grad=True)
    b = torch.randn(16, device=device, requires_grad=True)
    dy = torch.randn(5000, 16, device=device).to(BF16)
    dw, db = torch.autograd.grad(normalise(lnc.layer_norm, x, w, b), (w, b), dy)
    _, _, dw_true, db_true = truth(x, (16,), w, b, grad=dy)
    torch.testing.assert_close(dw.double(), dw_true, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(db.double(), db_true, rtol=1e-5, atol=1e-3)


# ---- no fast math ---------------------------------------------------------------------------------------------------


def test_subnormal_numbers_are_kept(device):
    x = torch.randn(4, 64, device=device)
    w = torch.full((64,), 1e-40, device=device)
    y = normalise(lnc.layer_norm, x, w)
    # 1e-40 has 17 bits left, and y is rounded to a multiple of the smallest number.
    torch.testing.assert_close(y.double(), truth(x, (64,), w)[0], rtol=2**-16, atol=1.5e-45)
    tiny = torch.full((8,), 1e-40, device=device)
    assert ((tiny * 0.5) != 0).all(), "the mode of the thread is as it was"


# ---- batch invariance -----------------------------------------------------------------------------------------------


def forward_and_dx(x, w, b, dy, rms):
    x = x.detach().requires_grad_()
    y = lnc.rms_norm(x, w.shape, w) if rms else lnc.layer_norm(x, w.shape, w, b)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("cols", [1, 5, 33, 64, 100, 768, 1000, 1024, 4096, 4097, 12289])
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.name)
def test_batch_invariance(dtype, cols, rms, device):
    """A row's bits: with other rows beside it, elsewhere in memory, on one thread or two."""
    rows = 67 if cols < 2000 else 11
    x = torch.randn(rows, cols).to(dtype).to(device)
    dy = torch.randn(rows, cols).to(dtype).to(device)
    w, b = (torch.randn(cols).to(dtype).to(device) for _ in range(2))
    whole = forward_and_dx(x, w, b, dy, rms)

    def same(some, among, part):
        return all(torch.equal(s.reshape(-1, cols), t[part]) for s, t in zip(some, among, strict=True))

    for part in (slice(0, 1), slice(3, 4), slice(rows - 1, rows), slice(1, 3), slice(2, rows - 1, 2), slice(0, 10)):
        assert same(forward_and_dx(x[part], w, b, dy[part], rms), whole, part)
        # contiguous again, so that the row begins where an allocation does
        assert same(forward_and_dx(x[part].clone(), w, b, dy[part].clone(), rms), whole, part)
    everything = slice(None)
    for shift in (1, 2, 3):
        buffers = [torch.empty(rows * cols + 8, dtype=dtype, device=device) for _ in range(2)]
        moved = [buffer[shift : shift + rows * cols].view(rows, cols) for buffer in buffers]
        for to, source in zip(moved, (x, dy), strict=True):
            to.copy_(source)
        assert same(forward_and_dx(moved[0], w, b, moved[1], rms), whole, everything)
    for layout in cases.LAYOUTS.values():
        assert same(forward_and_dx(layout(x), w, b, dy, rms), whole, everything)
    assert same(forward_and_dx(x[:, None], w, b, dy[:, None], rms), whole, everything)
    torch.set_num_threads(1)
    assert same(forward_and_dx(x, w, b, dy, rms), whole, everything)
    with torch.no_grad():
        y = lnc.rms_norm(x, (cols,), w) if rms else lnc.layer_norm(x, (cols,), w, b)
    assert torch.equal(y, whole[0])


def test_batch_invariance_among_very_many_rows(device):
    """Where the rows are dealt out differently: a slice of many against a few of them alone."""
    rows = big(100_000, 5000)
    x = torch.randn(rows, 48, device=device)
    dy = torch.randn(rows, 48, device=device)
    w, b = torch.randn(48, device=device), torch.randn(48, device=device)
    whole = forward_and_dx(x, w, b, dy, False)
    for start in (0, 17, rows // 2, rows - 5):
        part = slice(start, start + 5)
        for some, among in zip(forward_and_dx(x[part], w, b, dy[part], False), whole, strict=True):
            assert torch.equal(some, among[part])


@pytest.mark.parametrize("shape", [(1, 4096), (33, 100), (1000, 64), (4000, 40), (257, 1025), (19, 2000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.name)
def test_gradients_are_repeatable(dtype, shape, device):
    """All of them, bit for bit, from run to run and across thread counts."""
    cols = shape[1]
    x = torch.randn(shape).to(dtype).to(device).requires_grad_()
    w, b = (torch.randn(cols).to(dtype).to(device).requires_grad_() for _ in range(2))
    dy = torch.randn(shape).to(dtype).to(device)
    first = None
    for threads in (2, 1, 2, 3, 4, 2):
        torch.set_num_threads(threads)
        gradients = torch.autograd.grad(normalise(lnc.layer_norm, x, w, b), (x, w, b), dy)
        first = first or gradients
        assert all(torch.equal(g, f) for g, f in zip(gradients, first, strict=True))


def test_a_gradient_does_not_depend_on_which_others_are_wanted(device):
    x = torch.randn(200, 72, device=device, requires_grad=True)
    w, b = (torch.randn(72, device=device, requires_grad=True) for _ in range(2))
    dy = torch.randn(200, 72, device=device)
    tensors = (x, w, b)
    whole = torch.autograd.grad(normalise(lnc.layer_norm, x, w, b), tensors, dy)
    for wanted in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2)):
        inputs = [t if i in wanted else t.detach() for i, t in enumerate(tensors)]
        gradients = torch.autograd.grad(normalise(lnc.layer_norm, *inputs), [inputs[i] for i in wanted], dy)
        for i, gradient in zip(wanted, gradients, strict=True):
            torch.testing.assert_close(gradient, whole[i], rtol=1e-6, atol=1e-5)
            if i == 0:
                assert torch.equal(gradient, whole[i])


# ---- DESIGN section 4: what PyTorch gets wrong ----------------------------------------------------------------------


def test_third_derivative():
    """Native's is wrong (the test of derivatives of every order is test_autograd.py's)."""
    x = torch.randn(2, 5, dtype=F64, requires_grad=True)
    u = torch.randn(2, 5, dtype=F64)
    results = []
    for function in (lnc.layer_norm, lambda x, shape: norm(x, shape)):
        d = (function(x, (5,)) * u).sin().sum()
        for _ in range(3):
            (d,) = (
                torch.autograd.grad(d, x, torch.cos(u), create_graph=True)
                if d.dim()
                else torch.autograd.grad(d, x, create_graph=True)
            )
        results.append(d)
    torch.testing.assert_close(*results)


def test_second_derivative_with_bias_but_no_weight():
    x = torch.randn(3, 5, dtype=F64, requires_grad=True)
    b = torch.randn(5, dtype=F64, requires_grad=True)
    u, v = torch.randn(3, 5, dtype=F64), torch.randn(3, 5, dtype=F64)
    results = []
    for function in (lnc.layer_norm, norm):
        y = function(x, (5,), None, b)
        (dx,) = torch.autograd.grad((y.square() * u).sum(), x, create_graph=True)
        results.append(torch.autograd.grad((dx * v).sum(), (x, b)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_bfloat16_input_with_float32_parameters(device):
    """Refused by native on CUDA."""
    x = torch.randn(8192, 16, device=device).to(BF16).requires_grad_()
    w, b = (torch.ones(16, device=device, requires_grad=True) for _ in range(2))
    y = normalise(lnc.layer_norm, x, w, b)
    y.backward(torch.ones_like(y))
    assert y.dtype == x.grad.dtype == BF16 and w.grad.dtype == b.grad.dtype == F32
    assert torch.equal(b.grad, torch.full_like(b, 8192.0))


def test_many_rows_of_a_small_multi_dimensional_shape(device):
    """Native's CUDA backward writes out of bounds above 65,536 rows."""
    x = torch.randn(70_000, 2, 3, device=device, requires_grad=True)
    w, b = (torch.randn(2, 3, device=device, requires_grad=True) for _ in range(2))
    dy = torch.randn(70_000, 2, 3, device=device)
    y = lnc.layer_norm(x, (2, 3), w, b)
    grads = torch.autograd.grad(y, (x, w, b), dy)
    wanted = truth(x, (2, 3), w, b, grad=dy)
    torch.testing.assert_close(y.double(), wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads[1].double(), wanted[2], rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(grads[2].double(), wanted[3], rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(grads[0].double(), wanted[1], rtol=1e-4, atol=1e-3)


def test_statistics_that_backward_gets(device):
    """The mean is kept relative to the row's first element: rounded to float32 by itself it would be off by 0.03."""
    x = (torch.randn(20, COLS) + 1e6).to(device)
    shift, rstd = _ops.norm_forward(x, None, (COLS,), None, None, 1e-5, False, True, None)[2]
    wide = x.double()
    torch.testing.assert_close(shift.double(), wide.mean(1) - wide[:, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (wide.var(1, correction=0) + 1e-5).rsqrt(), rtol=1e-6, atol=0)
    assert shift.dtype == rstd.dtype == F32
    assert _ops.norm_forward(x.to(F16), None, (COLS,), None, None, 1e-5, True, True, None)[2].dtype == F32
