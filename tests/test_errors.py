"""Wrong use raises what native raises in the same place, says what was wrong, and writes nothing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import layernorm_cuda as lnc
from layernorm_cuda import _ops

X = torch.arange(12.0).reshape(3, 4).sin()
ONES = torch.ones(4)

# Positional arguments after which both are called -> what our message has to say.
BOTH = {
    # input
    "input None": ((None, (4,)), ["input", "Tensor", "NoneType"]),
    "input list": (([1.0, 2.0], (2,)), ["input", "Tensor", "list"]),
    "input ndarray": ((X.numpy(), (4,)), ["input", "Tensor", "ndarray"]),
    "input zero-dimensional": ((torch.tensor(1.0), (1,)), ["1"]),
    "input zero-dimensional, shape ()": ((torch.tensor(1.0), ()), ["normalized_shape"]),
    "input int": ((X.int(), (4,)), ["Int|int32", "float32"]),
    "input bool": ((X.bool(), (4,)), ["Bool|bool", "float32"]),
    "input sparse": ((X.to_sparse(), (4,)), []),
    "input sparse CSR": ((X.to_sparse_csr(), (4,)), []),
    # normalized_shape
    "shape int": ((X, 4), ["normalized_shape", "int"]),
    "shape str": ((X, "4"), ["normalized_shape", "str"]),
    "shape float": ((X, (4.0,)), ["normalized_shape", "float"]),
    "shape Tensor": ((X, torch.tensor([4])), ["normalized_shape", "Tensor"]),
    "shape None": ((X, None), ["normalized_shape", "NoneType"]),
    "shape ()": ((X, ()), ["normalized_shape", "at least one"]),
    "shape differs": ((X, (3,)), ["[*, 3]", "[3, 4]"]),
    "shape of leading dimensions": ((X, (3,)), ["normalized_shape"]),
    "shape negative": ((X, (-1,)), ["[3, 4]"]),
    "shape longer than input": ((X, (2, 3, 4)), ["[2, 3, 4]", "[3, 4]"]),
    # weight
    "weight list": ((X, (4,), [1.0] * 4), ["weight", "Tensor", "list"]),
    "weight float": ((X, (4,), 1.0), ["weight", "Tensor", "float"]),
    "weight shape": ((X, (4,), torch.ones(3)), ["weight", "3", "4"]),
    "weight of one element": ((X, (4,), torch.ones(1)), ["weight", "1", "4"]),
    "weight of more dimensions": ((X, (4,), torch.ones(1, 4)), ["weight", "1, 4"]),
    "weight on another device": ((X, (4,), ONES.to("meta")), ["weight", "meta", "cpu", "same device"]),
    "weight fits, input on another device": ((X.to("meta"), (4,), ONES), ["weight", "meta", "cpu"]),
}

LAYER_ONLY = {
    "input complex": ((X.cfloat(), (4,)), ["Complex|complex"]),
    "input float8": ((X.to(torch.float8_e4m3fn), (4,)), ["Float8|float8", "float32"]),
    "weight int": ((X, (4,), ONES.int()), ["weight", "Int|int32"]),
    "weight complex": ((X, (4,), ONES.cfloat()), ["weight", "Complex|complex"]),
    "bias list": ((X, (4,), None, [1.0] * 4), ["bias", "Tensor", "list"]),
    "bias shape": ((X, (4,), ONES, torch.ones(3)), ["bias", "3", "4"]),
    "bias shape, no weight": ((X, (4,), None, torch.ones(2, 2)), ["bias", "2, 2"]),
    "bias int": ((X, (4,), None, ONES.int()), ["bias", "Int|int32"]),
    "bias on another device": ((X, (4,), ONES, ONES.to("meta")), ["bias", "meta", "cpu"]),
    "eps None": ((X, (4,), None, None, None), ["eps", "NoneType"]),
    "eps str": ((X, (4,), None, None, "1e-5"), ["eps", "str"]),
    "eps complex": ((X, (4,), None, None, 1j), ["eps", "complex"]),
    "eps Tensor of two": ((X, (4,), None, None, torch.ones(2)), ["eps", "Tensor"]),
    "eps to be learned": ((X, (4,), None, None, torch.tensor(1e-5, requires_grad=True)), ["eps", "Tensor"]),
    "an argument too few": ((X,), []),
    "an argument too many": ((X, (4,), None, None, 1e-5, True, 0), []),
}

RMS_ONLY = {
    "eps str": ((X, (4,), None, "1e-5"), ["eps", "str"]),
    "eps complex": ((X, (4,), None, 1j), ["eps", "complex"]),
}

CASES = [
    pytest.param(norm, args, says, id=f"{norm}-{name}")
    for norm, table in (("layer_norm", BOTH | LAYER_ONLY), ("rms_norm", BOTH | RMS_ONLY))
    for name, (args, says) in table.items()
]


def raised(function, args):
    with pytest.raises(Exception) as info:
        function(*args)
    return info.value


@pytest.mark.parametrize("norm, args, says", CASES)
def test_raises_what_native_raises(norm, args, says):
    native = raised(getattr(F, norm), args)
    for requires_grad in (False, True):
        given = [
            a.clone().requires_grad_() if requires_grad and isinstance(a, torch.Tensor) and a.is_floating_point() else a
            for a in args
        ]
        ours = raised(getattr(lnc, norm), given)
        # Older PyTorch has one type for all of rms_norm's errors: for too few dimensions ours is today's.
        older = norm == "rms_norm" and torch.__version__ < (2, 13) and isinstance(ours, ValueError)
        assert isinstance(ours, type(native)) or older, f"{ours!r} where native raises {native!r}"
        message = str(ours)
        if says:
            assert message.startswith(f"{norm}: "), message
        for part in says:
            assert any(p in message for p in part.split("|")), message


@pytest.mark.parametrize(
    "error, residual, says",
    [
        (TypeError, None, ["residual", "Tensor", "NoneType"]),
        (TypeError, 1.0, ["residual", "Tensor", "float"]),
        (RuntimeError, torch.ones(4), ["residual", "(4,)|[4]", "[3, 4]|(3, 4)"]),
        (RuntimeError, torch.ones(3, 1), ["residual", "input"]),
        (RuntimeError, torch.randn(3, 4, device="meta"), ["residual", "meta", "cpu"]),
        (NotImplementedError, torch.ones(3, 4, dtype=torch.int), ["Int|int32"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("norm", ["add_layer_norm", "add_rms_norm"])
def test_residual(norm, error, residual, says):
    for x in (X, X.clone().requires_grad_()):
        ours = raised(getattr(lnc, norm), (x, residual, (4,)))
        assert isinstance(ours, error), repr(ours)
        assert str(ours).startswith(f"{norm}: "), str(ours)
        for part in says:
            assert any(p in str(ours) for p in part.split("|")), str(ours)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_documented_dtypes_only(norm):
    """rms_norm of native also takes complex numbers and integer weights; ours says which dtypes it takes."""
    for args in ((X.cfloat(), (4,)), (X, (4,), ONES.int()), (X, (4,), ONES.bool())):
        ours = raised(getattr(lnc, norm), args)
        assert isinstance(ours, NotImplementedError) and "float32" in str(ours)


def test_what_native_takes_is_taken():
    want = F.layer_norm(X, (4,))
    for shape in ([4], torch.Size([4]), (np.int64(4),), X.shape[1:]):
        torch.testing.assert_close(lnc.layer_norm(X, shape), want)
        torch.testing.assert_close(lnc.layer_norm(X.clone().requires_grad_(), shape), want)
    for eps in (1, True, 0, torch.tensor(0.5), np.float64(0.5), np.float32(0.5)):
        torch.testing.assert_close(lnc.layer_norm(X, (4,), eps=eps), F.layer_norm(X, (4,), eps=eps))
        x = X.clone().requires_grad_()
        torch.testing.assert_close(lnc.layer_norm(x, (4,), eps=eps), F.layer_norm(x, (4,), eps=eps))
    assert lnc.layer_norm(X, (4,), eps=float("nan")).isnan().all()


@pytest.mark.parametrize("eps", [-1e-5, -0.5, -10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_nothing_below_zero_has_a_root(norm, dtype, eps):
    x = torch.cat([X, X * 1e-4, X * 0]).to(dtype)
    ours, native = getattr(lnc, norm)(x, (4,), eps=eps), getattr(F, norm)(x, (4,), eps=eps)
    assert torch.equal(ours.isnan(), native.isnan()) and native.isnan().any()


def test_nothing_is_written():
    """Neither inputs nor anything beside them, by a call that raises."""
    x, w, b = torch.randn(3, 4), torch.randn(3), torch.randn(4)
    before = [t.clone() for t in (x, w, b)]
    for args in ((x, (4,), w, b), (x, (4,), b, w), (x, (3,), w), (x, (4, 4), b)):
        with pytest.raises(RuntimeError):
            lnc.layer_norm(*args)
    assert all(torch.equal(t, v) for t, v in zip((x, w, b), before, strict=True))
    assert [t._version for t in (x, w, b)] == [0, 0, 0]


# ---- the operators, called by hand with arguments that the functions never give -------------------------------------


def backward_arguments(**changes):
    x = torch.randn(3, 4)
    stats = _ops.norm_forward(x, None, (4,), None, None, 1e-5, False, True, None)[2]
    arguments = dict(
        grad_output=torch.randn(3, 4),
        grad_sum=None,
        input=x,
        normalized_shape=(4,),
        weight=torch.ones(4),
        stats=stats,
        rms=False,
        output_mask=[True, True, True],
        bias_dtype=None,
    )
    return (arguments | changes).values()


by_both_ways = pytest.mark.parametrize(
    "call", [_ops.norm_backward, torch.ops.layernorm_cuda.norm_backward], ids=["direct", "torch.ops"]
)


@pytest.mark.parametrize(
    "changes",
    [
        dict(grad_output=torch.randn(3, 5)),
        dict(grad_output=torch.randn(4)),
        dict(grad_output=torch.randn(3, 4, device="meta")),
        dict(grad_sum=torch.randn(2, 4)),
        dict(weight=torch.ones(5)),
        dict(weight=None),
        dict(stats=torch.zeros(1, 3)),
        dict(stats=torch.zeros(2, 2)),
        dict(stats=torch.zeros(2, 3, dtype=torch.float64)),
        dict(stats=torch.zeros(0)),
        dict(input=torch.randn(2, 4)),
        dict(normalized_shape=(5,)),
    ],
    ids=lambda c: next(f"{k}={getattr(v, 'shape', v)}" for k, v in c.items()),
)
@by_both_ways
def test_backward_operator(call, changes):
    with pytest.raises(RuntimeError, match="layer_norm_backward"):
        call(*backward_arguments(**changes))


@by_both_ways
@pytest.mark.parametrize(
    ("weight", "bias_dtype", "expected"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, None, torch.float32),
        (None, None, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (None, torch.float16, torch.float16),
    ],
)
@pytest.mark.parametrize("kernel", ["cpu", "meta"])
def test_dtype_of_the_bias_gradient(call, weight, bias_dtype, expected, kernel):
    """The one that was asked for, else the weight's, else the accumulation type."""
    weight = None if weight is None else torch.ones(4, dtype=weight)
    like = dict(input=torch.randn(3, 4).bfloat16(), grad_output=torch.ones(3, 4).bfloat16())
    changes = dict(weight=weight, bias_dtype=bias_dtype, output_mask=[True, weight is not None, True], **like)
    arguments = [v.to(kernel) if isinstance(v, torch.Tensor) else v for v in backward_arguments(**changes)]
    grad_bias = call(*arguments)[2]
    assert grad_bias.dtype == expected
    if kernel == "cpu":
        assert (grad_bias == 3).all()


def test_forward_operator_output_dtype():
    for dtype in (torch.float16, torch.int32, torch.float64):
        with pytest.raises(RuntimeError, match="output dtype"):
            _ops.norm_forward(X, None, (4,), None, None, 1e-5, False, False, dtype)


# ---- devices --------------------------------------------------------------------------------------------------------


def test_cuda_without_kernels_works_and_warns_once(monkeypatch):
    """PyTorch's own kernel runs, with the reason and the way to rebuild. A CUDA tensor is played by a meta tensor."""
    from layernorm_cuda import functional

    monkeypatch.setattr(functional, "_DEVICES", frozenset({"cpu"}))
    x = torch.randn(3, 4, device="meta")
    assert lnc.layer_norm(x, (4,)).shape == x.shape
    assert [t.shape for t in lnc.add_rms_norm(x, x, (4,))] == [x.shape] * 2
    functional._warn_no_cuda.cache_clear()
    with pytest.warns(UserWarning, match="pip install"):
        functional._warn_no_cuda()
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        functional._warn_no_cuda()


@pytest.mark.gpu
def test_mixed_cuda_and_cpu():
    x = torch.randn(3, 4, device="cuda")
    for args in ((x, (4,), ONES), (X, (4,), ONES.cuda()), (x, (4,), None, ONES)):
        with pytest.raises(RuntimeError, match="same device"):
            lnc.layer_norm(*args)
