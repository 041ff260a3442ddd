"""Derivatives of every order, forward and reverse, through the functions and through the operators."""

import itertools

import pytest
import torch
from cases import BF16, F16, F32, F64
from oracle import norm
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import layernorm_cuda as lnc
from layernorm_cuda import _ops

SHAPE, NORMALISED = (3, 2, 4), (2, 4)

# Each of weight and bias: requiring a gradient, there without one, absent.
STATES = ["grad", "constant", "absent"]


def tensor(state, shape=SHAPE):
    if state == "absent":
        return None
    return torch.randn(shape, dtype=F64, requires_grad=state == "grad")


def combinations():
    for rms, residual, x, w in itertools.product((False, True), (False, True), ("grad", "constant"), STATES):
        for b in ["absent"] if rms else STATES:
            if "grad" in (x, w, b):
                name = ("rms" if rms else "layer") + ("+residual" if residual else "")
                yield pytest.param(rms, residual, x, w, b, id=f"{name}-x {x}-weight {w}-bias {b}")


def composed(rms, residual, with_ours, eps=1e-5):
    """A function of (x, r, w, b), ours or the definition; with a residual it gives both outputs."""

    def function(x, r, w, b):
        if not with_ours:
            total = x + r if residual else x
            y = norm(total, NORMALISED, w, b, eps, rms)
            return (y, total) if residual else y
        args = (w,) if rms else (w, b)
        if residual:
            return (lnc.add_rms_norm if rms else lnc.add_layer_norm)(x, r, NORMALISED, *args, eps)
        return (lnc.rms_norm if rms else lnc.layer_norm)(x, NORMALISED, *args, eps)

    return function


def closed(function, tensors):
    """``function`` of those of ``tensors`` that require a gradient, and those."""
    variables = [t for t in tensors if t is not None and t.requires_grad]

    def call(*given):
        given = iter(given)
        return function(*(next(given) if t is not None and t.requires_grad else t for t in tensors))

    return call, variables


@pytest.mark.parametrize("rms, residual, x, w, b", combinations())
def test_gradcheck(rms, residual, x, w, b):
    """First and second derivatives against finite differences, forward mode and batched gradients included."""
    tensors = tensor(x), tensor(x) if residual else None, tensor(w, NORMALISED), tensor(b, NORMALISED)
    function, variables = closed(composed(rms, residual, True), tensors)
    assert gradcheck(
        function, variables, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert gradgradcheck(function, variables, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("rms, residual, x, w, b", combinations())
def test_second_and_third_derivatives(rms, residual, x, w, b):
    """Against the definition, whose derivatives PyTorch composes."""
    tensors = tensor(x), tensor(x) if residual else None, tensor(w, NORMALISED), tensor(b, NORMALISED)
    torch.manual_seed(1)
    factors = [torch.randn(SHAPE, dtype=F64) for _ in range(2)]
    directions = [[torch.randn_like(t) for t in tensors if t is not None and t.requires_grad] for _ in range(3)]
    results = []
    for with_ours in (True, False):
        function, variables = closed(composed(rms, residual, with_ours), tensors)
        outputs = function(*variables)
        outputs = outputs if residual else (outputs,)
        # Not linear in the output, so that every order depends on all variables.
        value = sum((y * f).sin().sum() for y, f in zip(outputs, factors, strict=False))
        orders = []
        for direction in directions:
            gradients = torch.autograd.grad(value, variables, create_graph=True)
            orders.append(gradients)
            value = sum((g * v).sum() for g, v in zip(gradients, direction, strict=True))
        results.append(orders)
    for ours, right in zip(*results, strict=True):
        for g, r in zip(ours, right, strict=True):
            torch.testing.assert_close(g, r, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("dual", ["input", "grad_output"])
@pytest.mark.parametrize("rms, residual, x, w, b", combinations())
def test_forward_over_reverse(rms, residual, x, w, b, dual, create_graph):
    """Gradients have tangents, whether the graph of the gradients is wanted or not."""
    tensors = tensor(x), tensor(x) if residual else None, tensor(w, NORMALISED), tensor(b, NORMALISED)
    factor, tangent = torch.randn(SHAPE, dtype=F64), torch.randn(SHAPE, dtype=F64)
    results = []
    for with_ours in (True, False):
        function, variables = closed(composed(rms, residual, with_ours), tensors)
        with forward_ad.dual_level():
            given = [forward_ad.make_dual(t, tangent[0] if t.dim() < len(SHAPE) else tangent) for t in variables]
            outputs = function(*(given if dual == "input" else variables))
            y = outputs[0] if residual else outputs
            value = (y.sin() * (factor if dual == "input" else forward_ad.make_dual(factor, tangent))).sum()
            gradients = torch.autograd.grad(value, variables, create_graph=create_graph)
            results.append([forward_ad.unpack_dual(g).tangent for g in gradients])
    for ours, right in zip(*results, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_fourth_derivative(rms):
    x = torch.randn(1, 4, dtype=F64, requires_grad=True)
    w = torch.randn(4, dtype=F64, requires_grad=True)
    v = torch.randn(1, 4, dtype=F64)
    results = []
    for function in (
        lambda x, w: (lnc.rms_norm if rms else lnc.layer_norm)(x, (4,), w, eps=0.1),
        lambda x, w: norm(x, (4,), w, eps=0.1, rms=rms),
    ):
        value = function(x, w).pow(3).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = (gradient * v).sum()
        results.append(torch.autograd.grad(value, (x, w)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_derivatives_at_extreme_rows():
    """Constant rows (eps keeps them smooth), a large mean, one column."""
    for x in (torch.full((2, 5), 3.0), torch.randn(2, 5) + 1e6, torch.randn(3, 1)):
        x = x.double().requires_grad_()
        shape = x.shape[1:]
        w = torch.randn(shape, dtype=F64, requires_grad=True)
        v = torch.randn_like(x)
        results = []
        for function in (lnc.layer_norm, norm):
            (dx,) = torch.autograd.grad(function(x, shape, w, None, 0.5).pow(2).sum(), x, create_graph=True)
            results.append(torch.autograd.grad((dx * v).sum(), (x, w)))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)


# ---- only what is asked for -----------------------------------------------------------------------------------------


@pytest.fixture
def masks(monkeypatch):
    """The output masks with which the backward operator is called from Python."""
    # Plain tensors' backward may never come up to Python: here none is plain.
    monkeypatch.setattr(_ops, "norm", lambda *args: None, raising=False)
    seen = []
    backward = _ops.norm_backward

    def spy(*args):
        seen.append(list(args[7]))
        return backward(*args)

    monkeypatch.setattr(_ops, "norm_backward", spy)
    return seen


@pytest.mark.parametrize("wanted", [w for w in itertools.product((False, True), repeat=3) if any(w)], ids=str)
def test_only_wanted_gradients_are_computed(wanted, masks):
    x, w, b = (torch.randn(s, requires_grad=g) for s, g in zip(((6, 8), (8,), (8,)), wanted, strict=True))
    lnc.layer_norm(x, (8,), w, b).backward(torch.ones(6, 8))
    assert [t.grad is not None for t in (x, w, b)] == list(wanted)
    # The bias gradient alone is a sum over rows: no kernel of ours at all.
    assert masks == ([list(wanted)] if wanted != (False, False, True) else [])


def test_autograd_grad_of_some_inputs(masks):
    """All require gradients, but autograd.grad asks for one: PyTorch still tells the Function that it needs all."""
    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    y = lnc.layer_norm(x, (8,), w)
    (dw,) = torch.autograd.grad(y, w, torch.ones_like(y))
    assert len(masks) == 1 and masks[0][1]
    torch.testing.assert_close(dw, norm(x, (8,)).sum(0).detach())


def test_residual_and_input_share_one_gradient(masks):
    x, r = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    lnc.add_layer_norm(x, r, (8,))[0].sum().backward()
    assert masks == [[True, False, False]]
    x, r = torch.randn(6, 8), torch.randn(6, 8, requires_grad=True)
    dr = torch.autograd.grad(lnc.add_rms_norm(x, r, (8,))[0].sum(), r)[0]
    assert dr.shape == r.shape and masks[-1] == [True, False, False]


def test_gradient_of_the_sum_alone_runs_no_kernel(masks):
    x, r, w = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8), torch.randn(8, requires_grad=True)
    _, total = lnc.add_layer_norm(x, r, (8,), w)
    dx, dw = torch.autograd.grad(total.sum(), (x, w), allow_unused=True)
    assert torch.equal(dx, torch.ones_like(x)) and dw is None and not masks


def test_backward_without_create_graph_makes_no_graph():
    x = torch.randn(6, 8, requires_grad=True)
    lnc.layer_norm(x, (8,)).sum().backward()
    assert x.grad.grad_fn is None and not x.grad.requires_grad


# ---- forward mode ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_forward_mode(rms, dtype):
    """Any of the inputs may carry the tangent; the result has the output's dtype."""
    x, dx = (torch.randn(4, 9).to(dtype) for _ in range(2))
    w, b, dw, db = (torch.randn(9).to(dtype) for _ in range(4))
    tolerance = {F64: 1e-10, F32: 1e-5, BF16: 5e-2}[dtype]
    for with_x, with_w, with_b in itertools.product((False, True), repeat=3):
        if not (with_x or with_w or with_b) or (rms and with_b):
            continue
        pairs = [(x, dx, with_x), (w, dw, with_w), (b, db, with_b)]
        with forward_ad.dual_level():
            dual = [forward_ad.make_dual(t, d) if on else t for t, d, on in pairs]
            y = lnc.rms_norm(dual[0], (9,), dual[1], 1e-5) if rms else lnc.layer_norm(dual[0], (9,), *dual[1:])
            tangent = forward_ad.unpack_dual(y).tangent
            wide = [forward_ad.make_dual(t.double(), d.double()) if on else t.double() for t, d, on in pairs]
            right = forward_ad.unpack_dual(norm(wide[0], (9,), wide[1], None if rms else wide[2], rms=rms)).tangent
        assert tangent.dtype == dtype
        torch.testing.assert_close(tangent.double(), right, rtol=tolerance, atol=tolerance)


def test_forward_mode_of_the_residual():
    x, r, d = (torch.randn(3, 6, dtype=F64) for _ in range(3))
    with forward_ad.dual_level():
        y, total = lnc.add_layer_norm(x, forward_ad.make_dual(r, d), (6,))
        tangents = [forward_ad.unpack_dual(t).tangent for t in (y, total)]
        right = forward_ad.unpack_dual(norm(forward_ad.make_dual(x + r, d), (6,))).tangent
    torch.testing.assert_close(tangents[0], right)
    assert torch.equal(tangents[1], d)


# ---- lower precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(F32, 2e-4), (F16, 2e-2), (BF16, 1e-1)])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_second_derivative_in_lower_precision(rms, dtype, tolerance):
    """Gradients of gradients have the tensors' dtypes and are right to a few roundings."""
    x, w = torch.randn(6, 64).to(dtype).requires_grad_(), torch.randn(64).to(dtype).requires_grad_()
    u, v = torch.randn(6, 64).to(dtype), torch.randn(6, 64).to(dtype)

    def second(function, x, w, u, v):
        y = function(x, w)
        (dx,) = torch.autograd.grad(y, x, u, create_graph=True)
        return torch.autograd.grad(dx, (x, w), v)

    got = second(lambda x, w: (lnc.rms_norm if rms else lnc.layer_norm)(x, (64,), w, eps=1e-5), x, w, u, v)
    wide = [t.detach().double() for t in (x, w, u, v)]
    want = second(
        lambda x, w: norm(x, (64,), w, rms=rms), wide[0].requires_grad_(), wide[1].requires_grad_(), *wide[2:]
    )
    for g, t, like in zip(got, want, (x, w), strict=True):
        assert g.dtype == like.dtype and g.isfinite().all()
        torch.testing.assert_close(g.double(), t, rtol=tolerance, atol=tolerance * t.abs().max().item())


# ---- the operators by themselves ------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_stats", [True, False])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_autograd_of_the_raw_operator(rms, save_stats):
    """Without registered autograd a raw operator's gradient is None and only a warning is given."""
    operator = torch.ops.layernorm_cuda.norm_forward
    x, r = (torch.randn(4, 6, dtype=F64, requires_grad=True) for _ in range(2))
    w, b = (torch.randn(6, dtype=F64, requires_grad=True) for _ in range(2))
    u, v = torch.randn(4, 6, dtype=F64), torch.randn(4, 6, dtype=F64)
    y, total, _ = operator(x, r, [6], w, b, 1e-5, rms, save_stats, None)
    want = norm(x + r, (6,), w, b, rms=rms)
    for got, right in zip(
        torch.autograd.grad((y, total), (x, r, w, b), (u, v), create_graph=True),
        torch.autograd.grad((want, x + r), (x, r, w, b), (u, v), create_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(got, right)
    assert gradcheck(lambda *a: operator(a[0], None, [6], a[1], a[2], 1e-5, rms, save_stats, None)[0], (x, w, b))


def test_the_raw_backward_operator_is_differentiable():
    forward, backward = torch.ops.layernorm_cuda.norm_forward, torch.ops.layernorm_cuda.norm_backward
    x, dy = (torch.randn(4, 6, dtype=F64, requires_grad=True) for _ in range(2))
    w = torch.randn(6, dtype=F64, requires_grad=True)
    stats = forward(x, None, [6], w, None, 1e-5, False, True, None)[2].detach()

    dx, dw, db = backward(dy, None, x, [6], w, stats, False, [True, True, True], None)
    v, u, t = torch.randn_like(dx), torch.randn_like(dw), torch.randn_like(db)
    got = torch.autograd.grad((dx * v).sum() + (dw * u).sum() + (db * t).sum(), (dy, x, w))

    b = torch.zeros(6, dtype=F64, requires_grad=True)
    rx, rw, rb = torch.autograd.grad(norm(x, (6,), w, b), (x, w, b), dy, create_graph=True)
    want = torch.autograd.grad((rx * v).sum() + (rw * u).sum() + (rb * t).sum(), (dy, x, w))
    for g, r in zip(got, want, strict=True):
        torch.testing.assert_close(g, r)


def test_function_classes():
    x, w = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    y = lnc.LayerNormFunction.apply(x, (6,), w, None, 1e-5)
    assert torch.equal(y, lnc.layer_norm(x, (6,), w)) and y.grad_fn is not None
    assert torch.equal(lnc.RMSNormFunction.apply(x, (6,), w, 1e-6), lnc.rms_norm(x, (6,), w, 1e-6))
    assert issubclass(lnc.LayerNormFunction, torch.autograd.Function)
    assert issubclass(lnc.RMSNormFunction, torch.autograd.Function)


def test_checkpoint():
    """Recomputation in backward, both kinds."""
    x, w = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True)

    def block(x):
        return lnc.layer_norm(x, (6,), w).sin()

    want = torch.autograd.grad(block(x).sum(), (x, w))
    for reentrant in (True, False):
        y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
        x.grad = w.grad = None
        y.sum().backward()
        assert torch.equal(x.grad, want[0]) and torch.equal(w.grad, want[1])


def test_hooks_that_move_what_is_saved():
    x = torch.randn(4, 6, requires_grad=True)
    with torch.autograd.graph.save_on_cpu():
        y = lnc.layer_norm(x, (6,))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True), torch.from_numpy):
        z = lnc.layer_norm(x, (6,))
    first, second = (torch.autograd.grad(t.square().sum(), x)[0] for t in (y, z))
    assert torch.equal(first, second)
