"""The call below Python: which arguments it takes, and that its node in the graph behaves like PyTorch's own."""

import numpy as np
import pytest
import torch
from cases import BACKEND, BF16, F64

import layernorm_cuda as lnc
from layernorm_cuda import _ops, functions

pytestmark = pytest.mark.skipif(bool(BACKEND) or _ops._C is None, reason="not the compiled module")
X, W, B = torch.arange(24.0).reshape(3, 8).sin(), torch.linspace(0.5, 2, 8), torch.linspace(-1, 1, 8)


def norm(input=X, residual=None, shape=(8,), weight=W, bias=B, eps=1e-5, rms=False, dtype=None):
    return _ops.norm(input, residual, shape, weight, bias, eps, rms, dtype)


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "arguments",
    [
        dict(),
        dict(shape=[8]),
        dict(shape=torch.Size([8])),
        dict(shape=(3, 8), weight=None, bias=None),
        dict(weight=torch.nn.Parameter(W)),
        dict(weight=None, bias=None),
        dict(eps=0),
        pytest.param(
            dict(eps=None, rms=True, bias=None),
            marks=pytest.mark.skipif(
                torch.__version__ < (2, 7), reason="Python knows the default eps of older PyTorch"
            ),
        ),
        dict(input=X.to(BF16), dtype=torch.float32),
        dict(residual=X),
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_takes(arguments):
    assert norm(**arguments) is not None


@pytest.mark.parametrize(
    "arguments",
    [
        dict(input=X.as_subclass(Subclass)),
        dict(input=None),
        dict(input=X.to_sparse()),
        dict(weight=W.as_subclass(Subclass)),
        dict(weight=[1.0] * 8),
        dict(shape=8),
        dict(shape=(8.0,)),
        dict(shape=(True,)),
        dict(eps=None),
        dict(eps="1e-5"),
        dict(eps=torch.tensor(1e-5)),
    ],
)
def test_leaves_to_python(arguments):
    assert norm(**arguments) is None


def test_leaves_modes_and_transforms_to_python():
    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    seen = []
    with Seen():
        lnc.layer_norm(X, (8,), W)
    assert lnc.layer_norm in seen
    with torch.autograd.forward_ad.dual_level():
        assert norm(torch.autograd.forward_ad.make_dual(X, X)) is None
    assert torch.func.vmap(lambda x: (norm(x) is None, x)[1])(X).equal(X)


def test_too_many_digits_are_an_error():
    with pytest.raises(OverflowError):
        norm(shape=(2**70,))


@pytest.mark.parametrize("residual", [False, True])
def test_every_choice_of_gradients(residual):
    leaves = [X.double(), torch.randn(3, 8, dtype=F64) if residual else None, W.double(), B.double()]
    leaves = [t if t is None else t.requires_grad_() for t in leaves]
    dy = torch.randn(3, 8, dtype=F64)

    def run(wanted):
        x, r, w, b = (t if t is None or i in wanted else t.detach() for i, t in enumerate(leaves))
        y = lnc.layer_norm(x, (8,), w, b) if r is None else sum(lnc.add_layer_norm(x, r, (8,), w, b))
        return torch.autograd.grad(y, [leaves[i] for i in wanted], dy)

    present = [i for i, t in enumerate(leaves) if t is not None]
    full = dict(zip(present, run(present), strict=True))
    for bits in range(1, 2 ** len(present)):
        wanted = [i for k, i in enumerate(present) if bits >> k & 1]
        for i, grad in zip(wanted, run(wanted), strict=True):
            torch.testing.assert_close(grad, full[i])


def test_what_is_saved():
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    y = lnc.layer_norm(x, (8,), w).sum()
    y.backward(retain_graph=True)
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()
    y = lnc.layer_norm(x, (8,), w).sum()
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        lnc.add_layer_norm(x, X, (8,), w)[0].sum().backward()
    assert packed == [(3, 8), (8,), (2, 3)]


@pytest.mark.parametrize("residual", [False, True])
def test_compiled_autograd(residual):
    """Of a forward that was not compiled."""
    compiled_autograd = pytest.importorskip("torch._dynamo.compiled_autograd")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8):
        pytest.skip("older ones compile the nodes of PyTorch itself only")

    def grads():
        leaves = [t.clone().requires_grad_() for t in (X, W, B)]
        x, w, b = leaves
        y = sum(lnc.add_layer_norm(x, X, (8,), w, b)) if residual else lnc.layer_norm(x, (8,), w, b)
        y.sin().sum().backward()
        return [t.grad for t in leaves]

    want = grads()
    with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
        got = grads()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_profiler_sees_what_passes_the_dispatcher():
    x = X.clone().requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        lnc.layer_norm(x, (8,), W, B).sum().backward()
    shapes = {event.key: event.input_shapes for event in profile.key_averages(group_by_input_shape=True)}
    assert shapes["layernorm_cuda::norm_forward"] == [[3, 8], [], [], [8], [8]]
    assert shapes["layernorm_cuda::norm_backward"] == [[3, 8], [], [3, 8], [], [8], [2, 3]]  # the dispatcher's has more


def test_operator_without_derivative_stays_below_python(monkeypatch):
    """As in a compiled graph, whose calls are not differentiated any more."""

    def calls():
        x = X.clone().requires_grad_()
        arguments = x, None, (8,), W, B, 1e-5, False, True, None
        y, _, stats = torch.ops.layernorm_cuda.norm_forward(*arguments)
        torch.ops.layernorm_cuda.norm_backward(y, None, x, (8,), W, stats, False, [True] * 3, torch.float32)

    monkeypatch.setattr(functions, "apply", None)
    with torch.no_grad():
        calls()
    with pytest.raises(TypeError, match="NoneType"):
        calls()


# ---- the operators' arguments, which are read without pybind11 ------------------------------------------------------


def backward_arguments(**changes):
    stats = _ops.norm_forward(X, None, (8,), None, None, 1e-5, False, True, None)[2]
    arguments = dict(
        grad_output=X + 1,
        grad_sum=None,
        input=X,
        normalized_shape=(8,),
        weight=W,
        stats=stats,
        rms=False,
        output_mask=[True, True, True],
        bias_dtype=None,
    )
    return arguments | changes


def backward(**changes):
    return _ops.norm_backward(*backward_arguments(**changes).values())


@pytest.mark.parametrize(
    "changes",
    [
        dict(grad_output=(X + 1).as_subclass(Subclass)),
        dict(weight=torch.nn.Parameter(W)),
        dict(normalized_shape=[8]),
        dict(normalized_shape=torch.Size([8])),
        dict(normalized_shape=(np.int64(8),)),
        dict(output_mask=(True, True, True)),
        dict(bias_dtype=torch.float32),
    ],
    ids=lambda changes: next(f"{name}={type(value).__name__}" for name, value in changes.items()),
)
def test_operator_takes(changes):
    for got, want in zip(backward(**changes), backward(), strict=True):
        assert torch.equal(got, want)


def test_operator_gives_none_for_what_is_not_asked_for():
    whole = backward()
    for i in range(3):
        mask = [i == k for k in range(3)]
        got = backward(output_mask=mask)
        assert [t is None for t in got] == [not asked for asked in mask]
        assert torch.equal(got[i], whole[i])


@pytest.mark.parametrize(
    "changes",
    [
        dict(grad_output=None),
        dict(grad_sum=1.0),
        dict(input=[1.0]),
        dict(normalized_shape=8),
        dict(normalized_shape=("8",)),
        dict(normalized_shape=(True,)),
        dict(normalized_shape=(2**70,)),
        dict(weight="weight"),
        dict(stats=None),
        dict(rms=0),
        dict(output_mask=True),
        dict(output_mask=[True, True]),
        dict(output_mask=[True] * 4),
        dict(output_mask=[True, True, 1]),
        dict(bias_dtype="float32"),
    ],
    ids=lambda changes: next(f"{name}={value}" for name, value in changes.items()),
)
def test_operator_names_an_argument_of_the_wrong_kind(changes):
    (name,) = changes
    position = [*backward_arguments()].index(name) + 1
    with pytest.raises(TypeError, match=f"norm_backward: argument {position} is of the wrong kind"):
        backward(**changes)


def test_operator_counts_its_arguments():
    right = [*backward_arguments().values()]
    for arguments in ([], right[:-1], [*right, None]):
        with pytest.raises(TypeError, match=f"norm_backward: expected 9 arguments, got {len(arguments)}"):
            _ops.norm_backward(*arguments)
    with pytest.raises(TypeError, match="norm_forward: argument 6 is of the wrong kind, str"):
        _ops.norm_forward(X, None, (8,), W, B, "1e-5", False, False, None)
