"""The residual added in the same pass, and RMSNorm with a zero-centred weight."""

import pytest
import torch
from cases import BF16, DTYPES, F16, F32, F64, FEW, LAYOUTS, close, name
from oracle import gradients, norm, truth
from torch import nn

import layernorm_cuda as lnc

NORMS = ["layer", "rms"]
EPS = 1e-5


def fused(kind, x, residual, shape, weight, bias):
    if kind == "rms":
        return lnc.add_rms_norm(x, residual, shape, weight, EPS)
    return lnc.add_layer_norm(x, residual, shape, weight, bias, EPS)


def make(shape, dims, dtype, kind="layer", param_dtype=None, residual_dtype=None):
    normalized = shape[len(shape) - dims :]
    x, residual = torch.randn(shape, dtype=F64).to(dtype), torch.randn(shape, dtype=F64).to(residual_dtype or dtype)
    weight = (torch.randn(normalized, dtype=F64) + 1).to(param_dtype or dtype)
    bias = None if kind == "rms" else torch.randn(normalized, dtype=F64).to(param_dtype or dtype)
    tensors = [t if t is None else t.requires_grad_() for t in (x, residual, weight, bias)]
    return tensors, normalized


@pytest.mark.parametrize("case", FEW, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("kind", NORMS)
def test_values_and_gradients(kind, dtype, case):
    (x, residual, weight, bias), normalized = make(*case, dtype, kind)
    output, total = fused(kind, x, residual, normalized, weight, bias)
    assert torch.equal(total, x + residual)
    d_output, d_total = torch.randn_like(output), torch.randn_like(total)
    right, *grads = truth(total, normalized, weight, bias, EPS, kind == "rms", d_output)
    close(output, right, scale=right.abs().max().item())
    ours = gradients((output, total), (x, residual, weight, bias), (d_output, d_total))
    grads[0] = grads[0] + d_total.double()
    assert torch.equal(ours[0], ours[1])
    for mine, other in zip(ours[1:], grads, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            close(mine, other, scale=8 * other.abs().max().item())


@pytest.mark.parametrize("kind", NORMS)
def test_each_output_alone(kind):
    """The gradient of the sum alone passes through; of the output alone it is the norm's."""
    (x, residual, weight, bias), normalized = make((6, 40), 1, F32, kind)
    output, total = fused(kind, x, residual, normalized, weight, bias)
    upstream = torch.randn_like(total)
    for mine in torch.autograd.grad(total, (x, residual), upstream, retain_graph=True):
        assert torch.equal(mine, upstream)
    leaf = (x + residual).detach().requires_grad_()
    alone = lnc.layer_norm(leaf, normalized, weight, bias, EPS)
    if kind == "rms":
        alone = lnc.rms_norm(leaf, normalized, weight, EPS)
    assert torch.equal(output, alone)
    expected = torch.autograd.grad(alone, leaf, upstream)[0]
    assert torch.equal(torch.autograd.grad(output, residual, upstream)[0], expected)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_gradients_asked_for(kind, asked):
    tensors, normalized = make((4, 24), 1, F32, kind)
    everything = gradients(fused(kind, *tensors[:2], normalized, *tensors[2:]), tensors, [torch.ones(4, 24)] * 2)
    some = [t if t is None else t.detach().requires_grad_(k in asked) for k, t in enumerate(tensors)]
    outputs = fused(kind, *some[:2], normalized, *some[2:])
    outputs = outputs if outputs[1].requires_grad else outputs[:1]
    found = gradients(outputs, some, [torch.ones(4, 24)] * len(outputs))
    for k, grad in enumerate(found):
        assert (grad is not None) == (k in asked)
        if grad is not None:
            assert torch.equal(grad, everything[k])


@pytest.mark.parametrize(("a", "b"), [(BF16, F32), (F32, BF16), (F16, BF16), (F32, F64), (F16, F64)], ids=name)
@pytest.mark.parametrize("kind", NORMS)
def test_mixed_dtypes(kind, a, b):
    (x, residual, weight, bias), normalized = make((5, 33), 1, a, kind, param_dtype=a, residual_dtype=b)
    output, total = fused(kind, x, residual, normalized, weight, bias)
    assert total.dtype == output.dtype == torch.promote_types(a, b)
    assert torch.equal(total, x + residual)
    d_output = torch.randn_like(output)
    right, d_total, *_ = truth(total, normalized, weight, bias, EPS, kind == "rms", d_output)
    close(output, right, scale=right.abs().max().item())
    d_x, d_residual = torch.autograd.grad(output, (x, residual), d_output)
    assert (d_x.dtype, d_residual.dtype) == (a, b)
    narrow = max(2 * torch.finfo(t).eps for t in (a, b))
    torch.testing.assert_close(d_x.double(), d_total, rtol=narrow, atol=narrow)
    torch.testing.assert_close(d_residual.double(), d_total, rtol=narrow, atol=narrow)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", NORMS)
def test_layouts(kind, layout):
    """Values do not depend on how either of the two lies in memory."""
    tensors, normalized = make((3, 4, 40), 1, F32, kind)
    expected = fused(kind, *tensors[:2], normalized, *tensors[2:])
    lay = LAYOUTS[layout]
    for x, residual in ((lay(tensors[0]), tensors[1]), (tensors[0], lay(tensors[1])), map(lay, tensors[:2])):
        for mine, other in zip(fused(kind, x, residual, normalized, *tensors[2:]), expected, strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 5)], ids=str)
@pytest.mark.parametrize("kind", NORMS)
def test_empty(kind, shape):
    tensors, normalized = make(shape, 1, F32, kind)
    output, total = fused(kind, *tensors[:2], normalized, *tensors[2:])
    assert output.shape == total.shape == shape
    (output.sum() + total.sum()).backward()
    assert tensors[0].grad.shape == shape
    assert not tensors[2].grad.any()


@pytest.mark.parametrize("kind", NORMS)
def test_derivatives(kind):
    tensors, normalized = make((2, 3, 5), 1, F64, kind)
    present = [t for t in tensors if t is not None]

    def function(x, residual, weight, bias=None):
        return fused(kind, x, residual, normalized, weight, bias)

    assert torch.autograd.gradcheck(function, present, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, present)


@pytest.mark.parametrize("kind", NORMS)
def test_func_transforms(kind):
    (x, residual, weight, bias), normalized = make((4, 3, 6), 1, F64, kind)
    x, residual = x.detach(), residual.detach()

    def function(x, residual):
        return fused(kind, x, residual, normalized, weight, bias)

    for mine, other in zip(torch.func.vmap(function)(x, residual), function(x, residual), strict=True):
        torch.testing.assert_close(mine, other)
    shared = torch.func.vmap(function, in_dims=(0, None))(x, residual[0])
    for mine, other in zip(shared, function(x, residual[0].expand_as(x)), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("kind", NORMS)
def test_compile(kind):
    tensors, normalized = make((4, 3, 16), 1, F32, kind)

    def function(x, residual, weight, bias):
        output, total = fused(kind, x, residual, normalized, weight, bias)
        return output.sin() + total

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    expected, found = function(*tensors), compiled(*tensors)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    upstream = torch.randn_like(expected)
    for mine, other in zip(gradients(found, tensors, upstream), gradients(expected, tensors, upstream), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


@pytest.mark.parametrize("kind", NORMS)
def test_errors(kind):
    x, weight = torch.randn(3, 8), torch.ones(8)
    operator = "add_rms_norm" if kind == "rms" else "add_layer_norm"
    with pytest.raises(RuntimeError, match=rf"{operator}: residual has shape .*expected .*to match input"):
        fused(kind, x, torch.randn(8), (8,), weight, None)
    with pytest.raises(RuntimeError, match=f"{operator}: weight has shape"):
        fused(kind, x, x, (8,), torch.ones(7), None)
    with pytest.raises(TypeError, match=f"{operator}: residual must be a Tensor, not NoneType"):
        fused(kind, x, None, (8,), weight, None)


# ---- modules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("kind", NORMS)
def test_blocks(kind, norm_first):
    """Pre-norm blocks hand the sum on, post-norm blocks the output; both against the two operations."""
    ours, theirs = (lnc.AddRMSNorm, nn.RMSNorm) if kind == "rms" else (lnc.AddLayerNorm, nn.LayerNorm)
    norms, plain = ([kind(16, eps=EPS, dtype=F64) for _ in range(3)] for kind in (ours, theirs))
    layers = [nn.Linear(16, 16, dtype=F64) for _ in range(3)]
    for a, b in zip(norms, plain, strict=True):
        for p in b.parameters():
            nn.init.normal_(p, 1)
        a.load_state_dict(b.state_dict())
    x = torch.randn(2, 5, 16, dtype=F64, requires_grad=True)

    stream, hidden = x, x
    for layer, fused_norm in zip(layers, norms, strict=True):
        hidden, stream = fused_norm(layer(hidden), stream)
        stream = stream if norm_first else hidden
    expected, normalised = x, x
    for layer, two in zip(layers, plain, strict=True):
        expected = expected + layer(normalised)
        normalised = two(expected)
        expected = expected if norm_first else normalised
    torch.testing.assert_close(stream, expected)
    torch.testing.assert_close(hidden, normalised)
    grads = [torch.autograd.grad(y.square().sum(), (x, layers[0].weight)) for y in (hidden, normalised)]
    torch.testing.assert_close(grads[0], grads[1])


def test_module_is_the_function():
    x, residual = torch.randn(3, 8), torch.randn(3, 8)
    for module in (lnc.AddLayerNorm(8, bias=False), lnc.AddLayerNorm(8, elementwise_affine=False)):
        expected = lnc.add_layer_norm(x, residual, (8,), module.weight, module.bias)
        for mine, other in zip(module(x, residual), expected, strict=True):
            assert torch.equal(mine, other)
    for dtype in DTYPES:
        x, residual = torch.randn(2, 3, 8).to(dtype) * 1e-4
        assert torch.equal(lnc.AddRMSNorm(8, dtype=dtype)(x, residual)[0], lnc.RMSNorm(8, dtype=dtype)(x + residual))


# ---- RMSNorm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_default_eps_is_natives(dtype):
    """Native takes the epsilon of the dtype it computes in: float32's for 16-bit inputs."""
    x = torch.full((2, 16), 1e-8 if dtype == F64 else 3e-4, dtype=dtype)
    expected = torch.nn.functional.rms_norm(x, (16,))
    torch.testing.assert_close(lnc.rms_norm(x, (16,)), expected)
    torch.testing.assert_close(lnc.RMSNormFunction.apply(x, (16,)), expected)
    torch.testing.assert_close(lnc.add_rms_norm(x / 2, x / 2, (16,))[0], expected)
    torch.testing.assert_close(lnc.RMSNorm(16, dtype=dtype)(x), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_zero_centred(dtype):
    """The scale is 1 + weight, in float32 at least: in bfloat16, 1 + 1e-3 would be 1."""
    module = lnc.RMSNorm(64, eps=1e-6, dtype=dtype, zero_centered=True)
    assert not module.weight.any()
    with torch.no_grad():
        module.weight.copy_(torch.randn(64) * 1e-3)
    x = torch.randn(7, 64).to(dtype).requires_grad_()
    upstream = torch.randn(7, 64).to(dtype)
    wide = [t.detach().double().requires_grad_() for t in (x, module.weight)]
    right = norm(wide[0], (64,), 1 + wide[1], eps=1e-6, rms=True)
    expected = torch.autograd.grad(right, wide, upstream.double())
    y = module(x)
    assert y.dtype == dtype
    close(y, right.detach(), scale=4)
    for mine, other in zip(torch.autograd.grad(y, (x, module.weight), upstream), expected, strict=True):
        assert mine.dtype == dtype
        close(mine, other, scale=32)
    both = lnc.AddRMSNorm(64, eps=1e-6, dtype=dtype, zero_centered=True)
    both.load_state_dict(module.state_dict())
    output, total = both(x / 2, x / 2)
    assert torch.equal(total, x)
    assert torch.equal(output, y)


def test_zero_centred_module():
    module = lnc.RMSNorm((4, 6), eps=1e-6, zero_centered=True)
    assert list(module.state_dict()) == ["weight"]
    assert repr(module) == "RMSNorm((4, 6), eps=1e-06, elementwise_affine=True, zero_centered=True)"
    nn.init.normal_(module.weight)
    x = torch.randn(3, 4, 6)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    module.reset_parameters()
    torch.testing.assert_close(module(x), nn.RMSNorm((4, 6), eps=1e-6)(x))
    bare = lnc.RMSNorm(6, elementwise_affine=False, zero_centered=True)
    torch.testing.assert_close(bare(x), nn.RMSNorm(6)(x))
