"""torch.func against the definition written in plain operations (and not against native, which is wrong in places:
its reverse-over-forward and forward-over-forward second derivatives disagree with its own reverse-over-reverse)."""

import itertools

import pytest
import torch
from cases import BF16, F32, F64
from oracle import norm
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import layernorm_cuda as lnc

H = 5


def functions(rms):
    """Ours and the definition, as functions of x, weight and bias."""
    if rms:
        return (lambda x, w, b=None: lnc.rms_norm(x, (H,), w, 1e-5)), (lambda x, w, b=None: norm(x, (H,), w, rms=True))
    return (lambda x, w, b=None: lnc.layer_norm(x, (H,), w, b)), (lambda x, w, b=None: norm(x, (H,), w, b))


def both(rms, transform, *args, **tolerance):
    ours, right = (transform(f)(*args) for f in functions(rms))
    torch.testing.assert_close(ours, right, **(tolerance or {"rtol": 1e-9, "atol": 1e-9}))


@pytest.fixture(params=[False, True], ids=["layer", "rms"])
def rms(request):
    return request.param


@pytest.fixture
def x():
    return torch.randn(3, H, dtype=F64)


@pytest.fixture
def w():
    return torch.randn(H, dtype=F64)


@pytest.fixture
def b():
    return torch.randn(H, dtype=F64)


def cubed(f):
    """Not linear in the output, so that second derivatives show all of the first."""
    return lambda *args: (f(*args) ** 3).sum()


# ---- one transform --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argnum", [0, 1, 2])
def test_grad(rms, argnum, x, w, b):
    if rms and argnum == 2:
        return
    both(rms, lambda f: grad(cubed(f), argnum), x, w, b)


@pytest.mark.parametrize("jacobian", [jacfwd, jacrev])
def test_jacobians(rms, jacobian, x, w, b):
    both(rms, lambda f: jacobian(f, (0, 1)), x, w, b)


def test_jvp_and_vjp(rms, x, w, b):
    t = tuple(torch.randn_like(a) for a in (x, w, b))
    both(rms, lambda f: lambda *args: jvp(f, args, t), x, w, b)
    both(rms, lambda f: lambda *args: vjp(f, *args)[1](t[0])[:2], x, w, b)


# ---- a transform of a transform -------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer, inner", itertools.product((jacfwd, jacrev), repeat=2))
@pytest.mark.parametrize("argnums", [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)], ids=str)
def test_second_derivatives(rms, outer, inner, argnums, x, w, b):
    """Forward and reverse mode in every order, and all pairs of arguments."""
    if rms and 2 in argnums:
        return
    both(rms, lambda f: outer(inner(cubed(f), argnums[0]), argnums[1]), x, w, b)


def test_hessian(rms, x, w, b):
    both(rms, lambda f: hessian(cubed(f), (0, 1)), x, w, b)


@pytest.mark.parametrize(
    "order", list(itertools.product((jacfwd, jacrev), repeat=3)), ids=lambda order: "-".join(o.__name__ for o in order)
)
def test_third_derivatives(rms, order, x, w, b):
    def third(f):
        f = cubed(f)
        for transform in order:
            f = transform(f)
        return f

    both(rms, third, x[:2, :4].new_tensor([[0.3, -1.2, 0.7, 2.0, 0.1]]), w, b)


def test_pullback_kept_beyond_its_transform(rms, x, w, b):
    """What vjp saved are wrappers of a level that is gone when plain autograd differentiates the pullback."""
    leaves = [t.requires_grad_() for t in (x, w, b)]

    def pulled(f):
        def gradients(x, w, b):
            output, pullback = vjp(f, x, w, b)
            loss = sum(grad.square().sum() for grad in pullback(torch.cos(output)))
            return torch.autograd.grad(loss, leaves[: 2 if rms else 3])

        return gradients

    both(rms, pulled, *leaves)


def test_hessian_vector_product(rms, x, w, b):
    v = torch.randn_like(x)
    both(rms, lambda f: lambda x: jvp(grad(lambda x: cubed(f)(x, w, b)), (x,), (v,))[1], x)
    both(rms, lambda f: lambda x: grad(lambda x: jvp(lambda x: cubed(f)(x, w, b), (x,), (v,))[1])(x), x)


# ---- vmap -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dims",
    [
        (0, None, None),
        (1, None, None),
        (None, 0, None),
        (None, None, 0),
        (0, 0, 0),
        (2, 1, None),
        (-2, None, 1),
        (None, 0, 0),
    ],
    ids=str,
)
def test_vmap(rms, dims):
    if rms and dims[2] is not None:
        return
    shapes = [(3, H), (H,), (H,)]
    args = [
        torch.randn((*s[: d % (len(s) + 1)], 4, *s[d % (len(s) + 1) :]) if d is not None else s, dtype=F64)
        for s, d in zip(shapes, dims, strict=True)
    ]
    both(rms, lambda f: vmap(f, dims), *args)
    both(rms, lambda f: vmap(grad(cubed(f), (0, 1)), dims), *args)
    both(rms, lambda f: vmap(lambda *a: jvp(f, a, a), dims), *args)
    both(rms, lambda f: vmap(jacfwd(grad(cubed(f)), 1), dims), *args)


def test_vmap_of_nothing(rms, w, b):
    x = torch.zeros(0, 3, H, dtype=F64)
    both(rms, lambda f: vmap(f, (0, None, None)), x, w, b)
    both(rms, lambda f: vmap(grad(cubed(f), (0, 1)), (0, None, None)), x, w, b)


def test_vmap_of_vmap(rms, w, b):
    x = torch.randn(2, 4, 3, H, dtype=F64)
    both(rms, lambda f: vmap(vmap(f, (0, None, None)), (1, None, None)), x, w, b)
    wide = torch.randn(2, H, dtype=F64)
    both(rms, lambda f: vmap(vmap(f, (0, None, None)), (0, 0, None)), x, wide, b)


def test_grad_of_vmap(rms, x, w, b):
    xs = torch.randn(4, 3, H, dtype=F64)
    both(rms, lambda f: grad(lambda x, w: (vmap(lambda x: f(x, w, b))(x) ** 3).sum(), (0, 1)), xs, w)


def test_vmap_is_one_kernel_call(monkeypatch, rms):
    """A batch is only more rows."""
    from layernorm_cuda import _ops

    calls = []
    for which in ("norm_forward", "norm_backward"):
        original = getattr(_ops, which)
        monkeypatch.setattr(_ops, which, lambda *args, f=original: calls.append(args[0].shape) or f(*args))
    f = functions(rms)[0]
    w = torch.randn(H)
    vmap(lambda x: f(x, w))(torch.randn(7, 3, H))
    assert [tuple(s) for s in calls] == [(7, 3, H)]
    calls.clear()
    vmap(grad(lambda x: f(x, w).square().sum()))(torch.randn(7, 3, H))
    assert len(calls) == 2


def test_per_sample_gradients(rms):
    module = (lnc.RMSNorm if rms else lnc.LayerNorm)(H, dtype=F64)
    torch.nn.init.normal_(module.weight)
    parameters = dict(module.named_parameters())
    data = torch.randn(6, 3, H, dtype=F64)

    def loss(parameters, sample):
        return (functional_call(module, parameters, (sample,)) ** 3).sum()

    together = vmap(grad(loss), (None, 0))(parameters, data)
    for i, sample in enumerate(data):
        gradients = torch.autograd.grad(loss(parameters, sample), list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            torch.testing.assert_close(together[name][i], gradient)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_lower_precision_keeps_dtypes(rms, dtype):
    f = functions(rms)[0]
    x, w, b = torch.randn(4, 3, H).to(dtype), torch.randn(4, H).to(dtype), torch.randn(H).to(dtype)
    y = vmap(f, (0, 0, None))(x, w, b)
    assert y.dtype == dtype
    torch.testing.assert_close(y, torch.stack([f(*a, b) for a in zip(x, w, strict=True)]))
    g = vmap(grad(lambda x, w: f(x, w, b).sum(), (0, 1)))(x, w)
    assert [t.dtype for t in g] == [dtype] * 2
    assert jvp(lambda x: f(x, w[0], b), (x,), (x,))[1].dtype == dtype


def test_residual(rms, x):
    fused = lnc.add_rms_norm if rms else lnc.add_layer_norm
    r = torch.randn_like(x)
    ours = lambda x, r: sum((t**3).sum() for t in fused(x, r, (H,), eps=1e-5))  # noqa: E731
    right = lambda x, r: (norm(x + r, (H,), rms=rms) ** 3).sum() + ((x + r) ** 3).sum()  # noqa: E731
    for transform in (grad, hessian, lambda f, n: jacrev(jacfwd(f, n), n)):
        torch.testing.assert_close(transform(ours, (0, 1))(x, r), transform(right, (0, 1))(x, r))
    batched = torch.randn(2, *r.shape, dtype=F64)
    y, total = vmap(lambda r: fused(x, r, (H,), eps=1e-5))(batched)
    torch.testing.assert_close(total, x + batched)
    torch.testing.assert_close(y, norm(x + batched, (H,), rms=rms))


def test_linearize(rms, x, w, b):
    tangents = torch.randn_like(x), torch.randn_like(w)
    both(rms, lambda f: lambda *a: torch.func.linearize(lambda x, w: f(x, w, b), *a)[1](*tangents), x, w)
