"""The functions are ``torch.nn.functional``'s: values, shapes, dtypes, strides, autograd's bookkeeping."""

import copy
import itertools
import math
import warnings

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import BF16, DTYPES, F16, F32, F64, close
from oracle import gradients, truth
from torch._subclasses.fake_tensor import FakeTensorMode

import layernorm_cuda as lnc
from layernorm_cuda import _ops

NORMS = {
    "layer": (lnc.layer_norm, F.layer_norm, False),
    "rms": (lnc.rms_norm, F.rms_norm, True),
}


def problem(case, dtype, param_dtype, device, rms, weight=True, bias=True):
    shape, dims = case
    normalized_shape = shape[len(shape) - dims :]

    def make(size, like):
        return torch.randn(size, dtype=F32).to(like).to(device).requires_grad_()

    x = make(shape, dtype)
    w = make(normalized_shape, param_dtype) if weight else None
    b = make(normalized_shape, param_dtype) if bias and not rms else None
    return x, normalized_shape, w, b, torch.randn(shape, dtype=F32).to(dtype).to(device)


def call(function, rms, x, normalized_shape, w, b):
    return function(x, normalized_shape, w, eps=1e-5) if rms else function(x, normalized_shape, w, b, 1e-5)


def check_against_truth(y, grads, x, normalized_shape, w, b, dy, rms):
    rows = x.numel() // math.prod(normalized_shape)
    wanted = truth(x, normalized_shape, w, b, rms=rms, grad=dy)
    close(y, wanted[0])
    # rstd, |weight| and |dy| may all be well above 1: dx is made of products of them. One normalised element: all of
    # it cancels, and what is left is rounding at the size of what was cancelled.
    size = wanted[1].abs().max().item() + (dy.double().abs().max() * _rstd(x, normalized_shape, rms)).item()
    for got, want, scale in zip(grads, wanted[1:], (size, 4 * rows**0.5, 4 * rows**0.5), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            close(got, want, scale, x.dtype)


def _rstd(x, normalized_shape, rms):
    rows = x.detach().double().reshape(-1, math.prod(normalized_shape))
    moment = rows.square().mean(1) if rms else rows.var(1, correction=0)
    return (moment + 1e-5).rsqrt().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.name)
@pytest.mark.parametrize("case", cases.SHAPES, ids=cases.name)
@pytest.mark.parametrize("norm", NORMS)
def test_values(norm, case, dtype, device):
    """Forward and backward: the truth rounded once, and native's values, dtype and strides."""
    ours, native, rms = NORMS[norm]
    x, shape, w, b, dy = arguments = problem(case, dtype, dtype, device, rms)
    y = call(ours, rms, x, shape, w, b)
    assert y.dtype == dtype and y.shape == x.shape and y.is_contiguous() and y.device == x.device
    grads = gradients(y, (x, w, b), dy)
    for grad, tensor in zip(grads, (x, w, b), strict=True):
        assert grad is None or (grad.dtype == tensor.dtype and grad.shape == tensor.shape)
    check_against_truth(y, grads, *arguments, rms)
    expected = call(native, rms, x, shape, w, b)
    torch.testing.assert_close(y, expected, check_stride=True)


@pytest.mark.parametrize("weight, bias", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtypes", cases.PARAM_DTYPES, ids=cases.name)
@pytest.mark.parametrize("norm", NORMS)
def test_parameters(norm, dtypes, weight, bias, device):
    """Present and absent, in the input's dtype and in another; the output has the input's."""
    ours, native, rms = NORMS[norm]
    if rms and bias:
        return  # rms_norm has no bias
    for case in cases.FEW:
        x, shape, w, b, dy = arguments = problem(case, *dtypes, device, rms, weight, bias)
        y = call(ours, rms, x, shape, w, b)
        assert y.dtype == x.dtype
        grads = gradients(y, (x, w, b), dy)
        check_against_truth(y, grads, *arguments, rms)
        if rms and dtypes[0] != dtypes[1] and torch.__version__ < (2, 7):
            continue  # it multiplied by the weight outside, for an output of the wider dtype
        if dtypes[0] == dtypes[1] or (dtypes[1] == F32 and dtypes[0] in (F16, BF16) and device == "cpu"):
            torch.testing.assert_close(y, call(native, rms, x, shape, w, b))


def test_weight_and_bias_of_different_dtypes(device):
    for input, weight, bias in [(F32, F16, F64), (BF16, F32, BF16), (F16, F16, F32), (F64, BF16, F64)]:
        x = torch.randn(5, 40).to(input).to(device).requires_grad_()
        w = torch.randn(40).to(weight).to(device).requires_grad_()
        b = torch.randn(40).to(bias).to(device).requires_grad_()
        dy = torch.randn(5, 40).to(input).to(device)
        y = lnc.layer_norm(x, (40,), w, b)
        check_against_truth(y, gradients(y, (x, w, b), dy), x, (40,), w, b, dy, False)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-3, 1, 10.0])
@pytest.mark.parametrize("norm", NORMS)
def test_eps(norm, eps, device):
    ours, native, _ = NORMS[norm]
    x = torch.randn(4, 50, device=device)
    torch.testing.assert_close(ours(x, (50,), eps=eps), native(x, (50,), eps=eps))


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.name)
def test_default_eps(dtype, device):
    x = (torch.randn(4, 50) * 1e-3).to(dtype).to(device)
    close(lnc.layer_norm(x, (50,)), truth(x, (50,), eps=1e-5)[0])
    torch.testing.assert_close(lnc.rms_norm(x, (50,)), F.rms_norm(x, (50,)))
    torch.testing.assert_close(lnc.RMSNormFunction.apply(x, (50,)), F.rms_norm(x, (50,)))
    torch.testing.assert_close(lnc.add_rms_norm(x, x, (50,))[0], F.rms_norm(x + x, (50,)))


# ---- residual -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [*((t, t) for t in DTYPES), (BF16, F32), (F32, F16), (F16, BF16)], ids=cases.name)
@pytest.mark.parametrize("norm", NORMS)
def test_residual(norm, dtypes, device):
    """sum is input + residual as torch adds; output is the norm of that very sum, and so are the gradients."""
    rms = norm == "rms"
    fused, plain = (lnc.add_rms_norm, lnc.rms_norm) if rms else (lnc.add_layer_norm, lnc.layer_norm)
    for shape, dims in cases.FEW:
        x, r = (torch.randn(shape).to(t).to(device).requires_grad_() for t in dtypes)
        normalized_shape = shape[len(shape) - dims :]
        w = torch.randn(normalized_shape, device=device, requires_grad=True)
        y, total = fused(x, r, normalized_shape, w, eps=1e-5)
        s = (x + r).detach().requires_grad_()
        assert torch.equal(total, s) and total.dtype == s.dtype
        expected = plain(s, normalized_shape, w, eps=1e-5)
        assert torch.equal(y, expected) and y.is_contiguous() and total.is_contiguous()

        dy, ds = (torch.randn(shape).to(s.dtype).to(device) for _ in range(2))
        dx, dr, dw = torch.autograd.grad((y, total), (x, r, w), (dy, ds))
        _, ds_norm, dw_truth, _ = truth(s, normalized_shape, w, rms=rms, grad=dy)
        ds_truth = ds_norm + ds.double()
        close(dw, dw_truth, 4 * s.numel() ** 0.5)
        scale = ds_truth.abs().max().item() + _rstd(s, normalized_shape, rms).item()
        for grad, tensor in ((dx, x), (dr, r)):
            assert grad.dtype == tensor.dtype
            wide = s.dtype if tensor.dtype == s.dtype else max(grad.dtype, s.dtype, key=cases.ROUNDING.get)
            tolerance = cases.ROUNDING[wide] * 1.02 + cases.ARITHMETIC[F32]
            torch.testing.assert_close(grad.double(), ds_truth, rtol=tolerance, atol=tolerance * scale)
        # Each output alone: the other's gradient is absent, not zeros.
        (alone,) = torch.autograd.grad(fused(x, r, normalized_shape, w)[1], x, ds)
        assert torch.equal(alone, ds.to(x.dtype))
        (alone,) = torch.autograd.grad(fused(x, r, normalized_shape, w, eps=1e-5)[0], r, dy)
        torch.testing.assert_close(alone, torch.autograd.grad(expected, s, dy)[0].to(r.dtype))


# ---- memory layouts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=cases.name)
@pytest.mark.parametrize("norm", NORMS)
def test_strides(norm, dtype, layout, device):
    """Any strides of input, upstream gradient and residual give the bits that contiguous tensors give."""
    ours, _, rms = NORMS[norm]
    rearrange = cases.LAYOUTS[layout]
    for case in [*cases.FEW, ((3, 5, 40), 1), ((2, 3, 4, 24), 1)]:
        x, shape, w, b, dy = problem(case, dtype, dtype, device, rms)
        expected = call(ours, rms, x, shape, w, b)
        wanted = gradients(expected, (x, w, b), dy)
        strided = rearrange(x.detach()).requires_grad_()
        assert torch.equal(strided, x)
        y = call(ours, rms, strided, shape, w, b)
        assert torch.equal(y, expected) and y.is_contiguous()
        for got, want in zip(gradients(y, (strided, w, b), rearrange(dy)), wanted, strict=True):
            assert (got is None and want is None) or torch.equal(got, want)
        fused = lnc.add_rms_norm if rms else lnc.add_layer_norm
        r = torch.randn_like(x)
        for got, want in zip(fused(strided, rearrange(r), shape), fused(x, r, shape), strict=True):
            assert torch.equal(got, want)


def test_expanded(device):
    """Stride 0: rows or elements that share memory, in input and in the gradient of a sum."""
    row = torch.randn(1, 40, device=device)
    x = row.expand(6, 40).requires_grad_()
    w = torch.randn(40, device=device)
    y = lnc.layer_norm(x, (40,), w)
    torch.testing.assert_close(y, F.layer_norm(row.repeat(6, 1), (40,), w))
    ours = torch.autograd.grad(y.sum(), x)[0]
    native = torch.autograd.grad(F.layer_norm(x, (40,), w).sum(), x)[0]
    torch.testing.assert_close(ours, native)
    column = torch.randn(6, 1, device=device).expand(6, 40)
    assert torch.equal(lnc.layer_norm(column, (40,)), torch.zeros(6, 40, device=device))


def test_views_of_parameters(device):
    """Weight and bias with any strides, storage offset and alignment."""
    x = torch.randn(4, 33, device=device)
    both = torch.randn(33, 2, device=device)
    padded = torch.randn(35, device=device)
    expected = lnc.layer_norm(x, (33,), both[:, 0].clone(), padded[1:34].clone())
    assert torch.equal(lnc.layer_norm(x, (33,), both[:, 0], padded[1:34]), expected)
    assert torch.equal(lnc.layer_norm(x, (33,), x.new_ones(()).expand(33)), lnc.layer_norm(x, (33,), x.new_ones(33)))


def test_channels_last(device):
    x = torch.randn(2, 6, 5, 4, device=device).to(memory_format=torch.channels_last)
    y = lnc.layer_norm(x, (6, 5, 4))
    torch.testing.assert_close(y, F.layer_norm(x, (6, 5, 4)), check_stride=True)


# ---- empty inputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases.EMPTY, ids=cases.name)
@pytest.mark.parametrize("norm", NORMS)
def test_empty(norm, case, device):
    """No rows: gradients of the parameters are zeros, not whatever lay in memory. No columns: nothing at all."""
    ours, _, rms = NORMS[norm]
    for dtype in DTYPES:
        x, shape, w, b, dy = problem(case, dtype, dtype, device, rms)
        y = call(ours, rms, x, shape, w, b)
        assert y.shape == x.shape and y.dtype == dtype
        for grad, tensor in zip(gradients(y, (x, w, b), dy), (x, w, b), strict=True):
            assert grad is None or torch.equal(grad, torch.zeros_like(tensor))
        with torch.no_grad():
            assert call(ours, rms, x, shape, w, b).shape == x.shape
        fused = lnc.add_rms_norm if rms else lnc.add_layer_norm
        assert [t.shape for t in fused(x, x, shape, w)] == [x.shape] * 2


# ---- autocast -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=cases.name)
@pytest.mark.parametrize("norm", NORMS)
def test_autocast_result_dtype(norm, dtype, device):
    ours, native, rms = NORMS[norm]
    if rms and dtype != F32 and torch.__version__ < (2, 7):
        pytest.skip("before torch 2.7 rms_norm's output took the weight's dtype")
    x, w = torch.randn(3, 8, device=device, dtype=dtype), torch.ones(8, device=device)
    with torch.autocast(device, dtype=BF16):
        y = ours(x, (8,), w)
        expected = native(x, (8,), w)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected)


# ---- autograd's bookkeeping -----------------------------------------------------------------------------------------


def test_requires_grad_is_propagated():
    x, w = torch.randn(3, 8), torch.randn(8)
    assert not lnc.layer_norm(x, (8,), w).requires_grad
    assert lnc.layer_norm(x.clone().requires_grad_(), (8,), w).requires_grad
    assert lnc.layer_norm(x, (8,), w.clone().requires_grad_()).requires_grad
    assert lnc.layer_norm(x, (8,), w, w.clone().requires_grad_()).requires_grad
    y, total = lnc.add_layer_norm(x, x.clone().requires_grad_(), (8,))
    assert y.requires_grad and total.requires_grad


def _by_operator(x, r, w, b):
    return torch.ops.layernorm_cuda.norm_forward(x, r, (8,), w, b, 1e-5, False, True, None)[:2]


def _by_function(x, r, w, b):
    return lnc.add_layer_norm(x, r, (8,), w, b)


@pytest.mark.parametrize("ours", [_by_function, _by_operator, torch.compile(_by_function, backend="aot_eager")])
def test_sum_requires_grad_as_native(ours):
    """No parameter is in the sum: where only they have gradients, it has no history."""

    def native(x, r, w, b):
        return F.layer_norm(x + r, (8,), w, b), x + r

    def gradients_of(outputs, leaves):
        return torch.autograd.grad(sum(t.square().sum() for t in outputs if t.requires_grad), leaves)

    for wanted in itertools.product([False, True], repeat=4):
        sizes = (3, 8), (3, 8), (8,), (8,)
        inputs = [torch.randn(size, requires_grad=asked) for size, asked in zip(sizes, wanted, strict=True)]
        results, expected = ours(*inputs), native(*inputs)
        assert [t.requires_grad for t in results] == [t.requires_grad for t in expected]
        leaves = [t for t in inputs if t.requires_grad]
        if leaves:
            torch.testing.assert_close(gradients_of(results, leaves), gradients_of(expected, leaves))


def allocated(call):
    """Bytes of every allocation that ``call`` makes, freed or not."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    return sum(max(event.self_cpu_memory_usage, 0) for event in profile.function_events)


@pytest.mark.skipif(_ops._C is None, reason="PyTorch operations allocate their intermediate results")
def test_inference_allocates_the_output_alone(monkeypatch):
    """Without gradients no autograd.Function is made, no statistics are kept and nothing is copied."""
    monkeypatch.setattr(
        "layernorm_cuda.functional.apply_norm", lambda *args: pytest.fail("a Function on the inference path")
    )
    for dtype in DTYPES:
        x = torch.randn(5000, 8, dtype=dtype, requires_grad=True)
        w, b = torch.randn(8, dtype=dtype, requires_grad=True), torch.randn(8, dtype=dtype, requires_grad=True)
        parameters = 4 * 8 * 8 + 1024  # converted copies and a workspace of a few columns
        for function in (lambda: lnc.layer_norm(x, (8,), w, b), lambda: lnc.rms_norm(x, (8,), w)):  # noqa: B023
            function()
            with torch.no_grad():
                assert allocated(function) <= x.nbytes + parameters
            with torch.inference_mode():
                assert allocated(function) <= x.nbytes + parameters
            assert allocated(function) > x.nbytes + 5000 * 4 - 1  # with gradients the statistics, too


def test_inference_has_no_history():
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    with torch.no_grad():
        y = lnc.layer_norm(x, (8,), w)
    assert y.grad_fn is None and not y.requires_grad
    with torch.inference_mode():
        assert lnc.rms_norm(x, (8,), w).is_inference()
    assert lnc.layer_norm(x.detach(), (8,)).grad_fn is None


@pytest.mark.skipif(_ops._C is None, reason="PyTorch operations allocate their intermediate results")
def test_backward_allocates_no_input_gradient_that_nobody_wants():
    x, w = torch.randn(5000, 8), torch.randn(8, requires_grad=True)
    y, dy = lnc.layer_norm(x, (8,), w), torch.randn(5000, 8)
    assert allocated(lambda: torch.autograd.grad(y, w, dy)) < x.nbytes // 2


def test_inference_tensors_in_autograd():
    with torch.inference_mode():
        x = torch.randn(3, 8)
    y = lnc.layer_norm(x, (8,))
    torch.testing.assert_close(y, F.layer_norm(x, (8,)))


def saved_bytes(function, *inputs):
    """Bytes that autograd keeps alive for backward beyond the inputs themselves."""
    known = {t.untyped_storage().data_ptr() for t in inputs}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
    del y
    return sum(kept.values())


def test_saves_statistics_and_nothing_else():
    rows, cols = 50, 64
    x = torch.randn(rows, cols, requires_grad=True)
    w, b = torch.randn(cols, requires_grad=True), torch.randn(cols, requires_grad=True)
    assert saved_bytes(lambda: lnc.layer_norm(x, (cols,), w, b), x, w, b) == 2 * rows * 4
    assert saved_bytes(lambda: lnc.rms_norm(x, (cols,), w), x, w) == rows * 4
    assert saved_bytes(lambda: lnc.layer_norm(x, (cols,)), x) == 2 * rows * 4
    half = x.detach().bfloat16().requires_grad_()
    assert saved_bytes(lambda: lnc.layer_norm(half, (cols,), w, b), half, w, b) == 2 * rows * 4
    # With a residual what is kept is their sum, which the model goes on with anyway; neither summand.
    r = torch.randn(rows, cols)
    assert saved_bytes(lambda: lnc.add_layer_norm(x, r, (cols,), w, b), w, b) == rows * cols * 4 + 2 * rows * 4


def test_bias_alone_saves_nothing():
    x, b = torch.randn(5, 8), torch.randn(8, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        y = lnc.layer_norm(x, (8,), torch.randn(8), b)
    assert not saved
    y.backward(torch.full_like(y, 2.0))
    assert torch.equal(b.grad, torch.full((8,), 10.0))
    none = torch.zeros(0, requires_grad=True)
    lnc.layer_norm(torch.zeros(3, 0), (0,), None, none).sum().backward()
    assert none.grad.shape == (0,)


def test_inputs_are_not_modified(device):
    x, shape, w, b, dy = problem(((6, 33), 1), F32, F32, device, False)
    r = torch.randn_like(x)
    tensors = [x, w, b, dy, r]
    before = copy.deepcopy([t.detach() for t in tensors]), [t._version for t in tensors]
    y, total = lnc.add_layer_norm(x, r, shape, w, b)
    torch.autograd.grad((y, total), (x, w, b), (dy, dy))
    lnc.layer_norm(x, shape, w, b).backward(dy)
    assert all(torch.equal(t, v) for t, v in zip(tensors, before[0], strict=True))
    assert [t._version for t in tensors] == before[1]


@pytest.mark.parametrize("function", [lnc.layer_norm, lnc.rms_norm])
def test_dtype_under_cuda_autocast_without_a_device(function):
    """float32, from kernels of ours or PyTorch's own."""
    with FakeTensorMode(), torch.autocast("cuda", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_autocast_enabled("cuda", True)  # which the context does not where there is no device
        x, w = torch.empty(3, 8, dtype=torch.bfloat16, device="cuda"), torch.empty(8, device="cuda")
        assert function(x, (8,), w).dtype == torch.float32


@pytest.mark.parametrize("affine", [False, True])
def test_output_changed_in_place(affine):
    x = torch.randn(2, 3, 8, requires_grad=True)
    w = torch.randn(8, requires_grad=True) if affine else None
    outputs = lnc.layer_norm(x, (8,), w), lnc.rms_norm(x, (8,), w), *lnc.add_layer_norm(x, x, (8,), w)
    for y in outputs:
        assert not y._is_view()
        torch.testing.assert_close(y.detach().relu(), y.relu_().detach())
        y.sum().backward()


def test_change_of_a_saved_tensor_is_noticed():
    x, w = torch.randn(3, 8), torch.randn(8, requires_grad=True)
    y = lnc.layer_norm(x, (8,), w)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_twice():
    x = torch.randn(3, 8, requires_grad=True)
    y = lnc.layer_norm(x, (8,))
    first = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y, x, torch.ones_like(y))[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x, torch.ones_like(y))


def test_upstream_gradient_of_another_dtype(device):
    """As under autocast, where a float32 result goes on from a bfloat16 input."""
    x = torch.randn(5, 40, device=device).bfloat16().requires_grad_()
    w = torch.randn(40, device=device, requires_grad=True)
    stats = _ops.norm_forward(x, None, (40,), w, None, 1e-5, False, True, None)[2]
    dy = torch.randn(5, 40, device=device)
    dx, dw, _ = _ops.norm_backward(dy, None, x, (40,), w, stats, False, [True, True, False], None)
    _, dx_truth, dw_truth, _ = truth(x, (40,), w, grad=dy)
    close(dx, dx_truth, 10)
    close(dw, dw_truth, 10)


def test_output_in_float32(device):
    """What CUDA autocast asks of the operator: the accumulation type out, without a cast copy of the input."""
    x = torch.randn(5, 40, device=device).to(F16)
    y = _ops.norm_forward(x, None, (40,), None, None, 1e-5, False, False, F32)[0]
    assert y.dtype == F32
    close(y, truth(x, (40,))[0])


def test_torch_function_protocol():
    """Subclasses of Tensor see the call, as native's."""
    seen = []

    class Traced(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    x = torch.randn(3, 8).as_subclass(Traced)
    assert isinstance(lnc.layer_norm(x, (8,)), Traced) and seen[0] is lnc.layer_norm
    assert isinstance(lnc.rms_norm(x, (8,)), Traced)
    assert isinstance(lnc.add_layer_norm(x, x, (8,))[1], Traced)
    assert isinstance(lnc.layer_norm(torch.randn(3, 8), (8,), torch.ones(8).as_subclass(Traced)), Traced)
