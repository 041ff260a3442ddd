"""Autograd: first derivatives by our kernels, every higher one from those same kernels by the formulas below.

``NormFunction`` and ``NormBackwardFunction`` take their operators' arguments in their operators' order, so that one
set of rules serves the ``torch.autograd.Function`` and the operator under ``torch.ops``.

Per row, with xhat the normalised input, rstd its scale and H its length, the linear map

    P(v) = rstd * (v - mean(v) - xhat * mean(v * xhat))        (without mean(v) for rms)

is its own transpose, and everything is made of it: xhat' = P(x'), grad_input = P(grad_output * weight), and
rstd' = -rstd^2 * mean(xhat * x').
"""

import math

import torch
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function, forward_ad

from . import _ops, reference


def apply(function, *args):
    """``function.apply`` without its Python prologue (inspect.signature costs more than the kernel on small rows).

    What of it matters: a pullback may be called when the transform is over whose wrappers it has saved.
    """
    if torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        return function.apply(*args)
    return super(Function, function).apply(*unwrap_dead_wrappers(args))


class _Primals:
    """A ctx whose saved tensors are without the tangents of the level that jvp is for."""

    def __init__(self, ctx):
        self._ctx = ctx
        self.saved_tensors = [None if t is None else forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors]

    def __getattr__(self, name):
        return getattr(self._ctx, name)


def _nestable(jvp):
    """A jvp that a forward-mode transform around it differentiates too: PyTorch runs it with forward mode switched
    off at every level, and jvp over jvp would be wrong without a word."""

    def run(ctx, *tangents):
        with forward_ad._set_fwd_grad_enabled(True):
            return jvp(_Primals(ctx), *tangents)

    return run


def _sum_rows(t, normalized_shape):
    dims = tuple(range(t.dim() - len(normalized_shape)))
    return t.sum(dims) if dims else t


def _mean(t, normalized_shape):
    return t.mean(tuple(range(-len(normalized_shape), 0)), keepdim=True)


def _project(v, x, normalized_shape, stats, rms):
    mask = [True, False, False]
    return apply(NormBackwardFunction, v, None, x, normalized_shape, None, stats, rms, mask, None)[0]


class _Normalised(Function):
    """xhat of x [*, *normalized_shape] from the stats that its forward saved."""

    @staticmethod
    def forward(x, normalized_shape, stats, rms):
        return reference.normalised(x, normalized_shape, stats, rms).reshape(x.shape)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *ctx.arguments = inputs[0], inputs[1], inputs[3]
        ctx.save_for_backward(x, inputs[2])
        ctx.save_for_forward(x, inputs[2])

    @staticmethod
    def backward(ctx, grad):
        x, stats = ctx.saved_tensors
        normalized_shape, rms = ctx.arguments
        return _project(grad, x, normalized_shape, stats, rms), None, None, None

    @staticmethod
    @_nestable
    def jvp(ctx, tangent, *_):
        return _Normalised.backward(ctx, tangent)[0]

    @classmethod
    def vmap(cls, info, in_dims, x, normalized_shape, stats, rms):
        (x,) = _batched(info, (x,), in_dims[:1])
        return apply(cls, x, normalized_shape, _batched_stats(info, stats, in_dims[2]), rms), 0


class _Rstd(_Normalised):
    """rstd [*, 1, ...] of x [*, *normalized_shape] from the stats that its forward saved."""

    @staticmethod
    def forward(x, normalized_shape, stats, rms):
        leading = x.shape[: x.dim() - len(normalized_shape)]
        return stats[-1].reshape(leading + (1,) * len(normalized_shape)).clone()

    @staticmethod
    def _slope(ctx):
        x, stats = ctx.saved_tensors
        normalized_shape, rms = ctx.arguments
        xhat, rstd = (apply(f, x, normalized_shape, stats, rms) for f in (_Normalised, _Rstd))
        return -rstd * rstd * xhat, normalized_shape

    @staticmethod
    def backward(ctx, grad):
        slope, normalized_shape = _Rstd._slope(ctx)
        return grad * slope / math.prod(normalized_shape), None, None, None

    @staticmethod
    @_nestable
    def jvp(ctx, tangent, *_):
        slope, normalized_shape = _Rstd._slope(ctx)
        return _mean(tangent * slope, normalized_shape)


class NormFunction(Function):
    """Layer or RMS normalisation, with or without a residual added first.

    Inputs are those of the operator ``norm_forward``; returns (output, sum, stats), sum only with a residual.
    """

    @staticmethod
    def forward(input, residual, normalized_shape, weight, bias, eps, rms, save_stats, dtype):
        output, total, stats = _ops.norm_forward(input, residual, normalized_shape, weight, bias, eps, rms, True, dtype)
        return output, None if residual is None else total, stats

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, residual, normalized_shape, weight, bias, _, rms, _, _ = inputs
        normalised, total, stats = output
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        # A compiled graph's Python calls are faster without a dtype.
        own_dtype = bias is not None and (weight is None or weight.dtype != bias.dtype)
        ctx.arguments = normalized_shape, rms, bias.dtype if own_dtype else None
        ctx.output_dtype, ctx.has_residual = normalised.dtype, residual is not None
        x = input if residual is None else total
        saved = x, weight, stats
        needs = ctx.needs_input_grad
        # The gradient of bias alone needs nothing but the upstream gradient.
        if needs[0] or needs[1] or needs[3]:
            ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx, grad_output, grad_sum, _):
        normalized_shape, rms, bias_dtype = ctx.arguments
        needs = ctx.needs_input_grad
        grad_sum = grad_sum if ctx.has_residual else None
        if grad_output is None:
            return grad_sum, grad_sum, None, None, None, None, None, None, None
        if not (needs[0] or needs[1] or needs[3]):
            wide = grad_output.to(reference.accumulate_dtype(grad_output.dtype))
            return None, None, None, None, _sum_rows(wide, normalized_shape), None, None, None, None
        x, weight, stats = ctx.saved_tensors
        mask = [needs[0] or needs[1], needs[3], needs[4]]
        arguments = grad_output, grad_sum, x, normalized_shape, weight, stats, rms, mask, bias_dtype
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            dx, dw, db = apply(NormBackwardFunction, *arguments)
        else:
            dx, dw, db = _ops.norm_backward(*arguments)
        return (
            dx if needs[0] else None,
            dx if needs[1] else None,
            None,
            dw if needs[3] else None,
            db if needs[4] else None,
            None,
            None,
            None,
            None,
        )

    @staticmethod
    @_nestable
    def jvp(ctx, d_input, d_residual, _shape, d_weight, d_bias, *_):
        x, weight, stats = ctx.saved_tensors
        normalized_shape, rms, _ = ctx.arguments
        tangents = [t for t in (d_input, d_residual) if t is not None]
        d_sum = sum(tangents) if tangents else None
        wide = reference.accumulate_dtype(x.dtype)
        d_output = torch.zeros(x.shape, dtype=wide, device=x.device)
        if d_sum is not None:
            dxhat = _project(d_sum.to(wide), x.to(wide), normalized_shape, stats, rms)
            d_output = d_output + (dxhat if weight is None else dxhat * weight)
        if d_weight is not None:
            d_output = d_output + d_weight * apply(_Normalised, x.to(wide), normalized_shape, stats, rms)
        if d_bias is not None:
            d_output = d_output + d_bias
        if ctx.has_residual and d_sum is None:
            d_sum = torch.zeros_like(x)
        return d_output.to(ctx.output_dtype), d_sum if ctx.has_residual else None, None

    @staticmethod
    def vmap(info, in_dims, input, residual, normalized_shape, weight, bias, eps, rms, save_stats, dtype):
        input, residual = _batched(info, (input, residual), (in_dims[0], in_dims[1]))
        params = weight, bias
        inside = all(dim is None for dim in (in_dims[3], in_dims[4]))
        if inside:
            output, total, stats = apply(
                NormFunction, input, residual, normalized_shape, weight, bias, eps, rms, save_stats, dtype
            )
        else:
            summed = input.dtype if residual is None else torch.promote_types(input.dtype, residual.dtype)
            wide = reference.accumulate_dtype(summed)
            output, total, stats = apply(
                NormFunction, input, residual, normalized_shape, None, None, eps, rms, save_stats, wide
            )
            weight, bias = _aligned(params, (in_dims[3], in_dims[4]), output.dim())
            output = output if weight is None else output * weight
            output = (output if bias is None else output + bias).to(dtype or summed)
        rows = math.prod(input.shape[1 : input.dim() - len(normalized_shape)])
        stats = stats.reshape(stats.shape[0], info.batch_size, rows)
        return (output, total, stats), (0, None if residual is None else 0, 1)


def apply_norm(input, residual, *args):
    """(output, sum, stats) of ``NormFunction``, the sum with a history only where input or residual has one."""
    output, total, stats = apply(NormFunction, input, residual, *args)
    if residual is not None and total.requires_grad and not (input.requires_grad or residual.requires_grad):
        total = input + residual  # PyTorch gives all of a Function's outputs a history, and tangents, or none
    return output, total, stats


class NormBackwardFunction(Function):
    """The gradients of ``NormFunction``: inputs and outputs are those of the operator ``norm_backward``."""

    @staticmethod
    def forward(grad_output, grad_sum, input, normalized_shape, weight, stats, rms, output_mask, bias_dtype):
        grads = _ops.norm_backward(
            grad_output, grad_sum, input, normalized_shape, weight, stats, rms, output_mask, bias_dtype
        )
        return tuple(grad if asked else None for grad, asked in zip(grads, output_mask, strict=True))

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, _, input, normalized_shape, weight, stats, rms, output_mask, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.arguments = normalized_shape, rms, output_mask
        ctx.outputs = [None if t is None else (t.shape, t.dtype) for t in output]
        ctx.save_for_backward(grad_output, input, weight, stats)
        ctx.save_for_forward(grad_output, input, weight, stats)

    @staticmethod
    def _wide(ctx, *tensors):
        """The saved tensors and ``tensors`` in the accumulation type; gradients flow through the conversion."""
        *saved, stats = ctx.saved_tensors
        return [None if t is None else t.to(stats.dtype) for t in (*saved, *tensors)], stats

    @staticmethod
    def backward(ctx, v, u, t):
        """Of <v, grad_input> + <u, grad_weight> + <t, grad_bias>; the first is r * (S - H a b) per row, with
        a = mean(v xhat), b = mean(g xhat) and g = grad_output * weight."""
        shape, rms, mask = ctx.arguments
        v, u, t = (c if asked else None for c, asked in zip((v, u, t), mask, strict=True))
        (dy, x, weight, wide_v, u, t), stats = NormBackwardFunction._wide(ctx, v, u, t)
        needs = ctx.needs_input_grad
        xhat = apply(_Normalised, x, shape, stats, rms)
        d_dy, d_x, d_weight = [], [], None
        if wide_v is not None:
            projected = _project(wide_v, x, shape, stats, rms)
            d_dy.append(projected if weight is None else projected * weight)
            if needs[4]:
                d_weight = _sum_rows(dy * projected, shape)
            if needs[2]:
                g = dy if weight is None else dy * weight
                rstd = apply(_Rstd, x, shape, stats, rms)
                a, b = _mean(wide_v * xhat, shape), _mean(g * xhat, shape)
                s = _mean(wide_v * g, shape) - a * b
                if not rms:
                    s = s - _mean(wide_v, shape) * _mean(g, shape)
                d_x.append(-rstd * rstd * s * xhat - _project(rstd * (b * wide_v + a * g), x, shape, stats, rms))
        if u is not None:
            d_dy.append(u * xhat)
            if needs[2]:
                d_x.append(_project(u * dy, x, shape, stats, rms))
        if t is not None:
            d_dy.append(t.expand(dy.shape))
        d_dy = sum(d_dy) if d_dy and needs[0] else None
        d_x = sum(d_x) if d_x else None
        return d_dy, v if needs[1] else None, d_x, None, d_weight, None, None, None, None

    @staticmethod
    @_nestable
    def jvp(ctx, d_dy, d_grad_sum, d_x, _shape, d_weight, *_):
        """P is linear in v; the derivative of P_x(g) along d_x follows from its symmetry in the two arguments."""
        shape, rms, mask = ctx.arguments
        (dy, x, weight, d_dy, d_x, d_weight), stats = NormBackwardFunction._wide(ctx, d_dy, d_x, d_weight)
        xhat = apply(_Normalised, x, shape, stats, rms)
        d_xhat = None if d_x is None else _project(d_x, x, shape, stats, rms)
        g = dy if weight is None else dy * weight
        out_x, out_w, out_b = [], [], []
        if mask[0]:
            d_g = [] if d_dy is None else [d_dy if weight is None else d_dy * weight]
            if d_weight is not None:
                d_g.append(dy * d_weight)
            out_x += [_project(sum(d_g), x, shape, stats, rms)] if d_g else []
            out_x += [] if d_grad_sum is None else [d_grad_sum]
            if d_x is not None:
                rstd = apply(_Rstd, x, shape, stats, rms)
                projected = _project(g, x, shape, stats, rms)
                inner = d_xhat * _mean(g * xhat, shape) + xhat * _mean(g * d_xhat, shape)
                out_x.append(-projected * rstd * _mean(xhat * d_x, shape) - rstd * inner)
        if mask[1]:
            out_w += [] if d_dy is None else [_sum_rows(d_dy * xhat, shape)]
            out_w += [] if d_xhat is None else [_sum_rows(dy * d_xhat, shape)]
        if mask[2]:
            out_b += [] if d_dy is None else [_sum_rows(d_dy, shape)]
        return tuple(
            None if like is None else sum(terms, start=x.new_zeros(like[0])).to(like[1])
            for terms, like in zip((out_x, out_w, out_b), ctx.outputs, strict=True)
        )

    @staticmethod
    def vmap(
        info, in_dims, grad_output, grad_sum, input, normalized_shape, weight, stats, rms, output_mask, bias_dtype
    ):
        dy, grad_sum, x = _batched(info, (grad_output, grad_sum, input), (in_dims[0], in_dims[1], in_dims[2]))
        stats = _batched_stats(info, stats, in_dims[5])
        wide_dy = dy.to(stats.dtype)
        g, inside = dy, weight
        if weight is not None and in_dims[4] is not None:
            (aligned,) = _aligned((weight,), (in_dims[4],), dy.dim())
            g, inside = (wide_dy * aligned).to(stats.dtype), None
        dx = dw = db = None
        if output_mask[0]:
            mask = [True, False, False]
            dx, _, _ = apply(NormBackwardFunction, g, grad_sum, x, normalized_shape, inside, stats, rms, mask, None)
        rows = tuple(range(1, dy.dim() - len(normalized_shape)))
        if output_mask[1]:
            xhat = apply(_Normalised, x.to(stats.dtype), normalized_shape, stats, rms)
            dw = wide_dy * xhat
            dw = (dw.sum(rows) if rows else dw).to(weight.dtype)
        if output_mask[2]:
            db = (wide_dy.sum(rows) if rows else wide_dy).to(reference.grad_bias_dtype(bias_dtype, weight, stats))
        return (dx, dw, db), tuple(None if t is None else 0 for t in (dx, dw, db))


def _batched(info, tensors, dims):
    """Every tensor with the batch in front, expanded where it had none."""

    def front(t, dim):
        if t is None:
            return None
        return t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)

    return [front(t, dim) for t, dim in zip(tensors, dims, strict=True)]


def _batched_stats(info, stats, dim):
    """[k, rows] of every sample as [k, batch * rows]."""
    stats = stats.unsqueeze(1).expand(-1, info.batch_size, -1) if dim is None else stats.movedim(dim, 1)
    return stats.reshape(stats.shape[0], stats.shape[1] * stats.shape[2])


def _aligned(params, dims, ndim):
    """Parameters with or without a batch, shaped to broadcast against [batch, *, *normalized_shape] of ndim."""

    def align(t, dim):
        if t is None or dim is None:
            return t
        t = t.movedim(dim, 0)
        return t.reshape(t.shape[0], *[1] * (ndim - t.dim()), *t.shape[1:])

    return [align(t, dim) for t, dim in zip(params, dims, strict=True)]


class LayerNormFunction(NormFunction):
    """``LayerNormFunction.apply(input, normalized_shape, weight=None, bias=None, eps=1e-5) -> Tensor``"""

    @classmethod
    def apply(cls, input, normalized_shape, weight=None, bias=None, eps=1e-5):
        return apply(NormFunction, input, None, normalized_shape, weight, bias, eps, False, True, None)[0]


class RMSNormFunction(NormFunction):
    """``RMSNormFunction.apply(input, normalized_shape, weight=None, eps=None) -> Tensor``"""

    @classmethod
    def apply(cls, input, normalized_shape, weight=None, eps=None):
        eps = reference.default_eps(input.dtype) if eps is None else eps
        return apply(NormFunction, input, None, normalized_shape, weight, None, eps, True, True, None)[0]


def _differentiable_norm_forward(*args):
    input, residual, *_, save_stats, _ = args
    output, total, stats = apply_norm(*args)
    none = input.new_empty(0)
    return output, none if residual is None else total, stats if save_stats else none.clone()


def _differentiable_norm_backward(*args):
    outputs = apply(NormBackwardFunction, *args)
    return tuple(args[2].new_empty(0) if t is None else t for t in outputs)


def _where_needed(differentiable, operator):
    """An operator's kernel for the dispatcher's Autograd key; csrc/autograd.cpp has it for the compiled module."""

    def kernel(*args):
        tensors = [t for t in args if isinstance(t, torch.Tensor)]
        if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
            return differentiable(*args)
        return operator(*args)

    return kernel


for _name, _function in {
    "norm_forward": _differentiable_norm_forward,
    "norm_backward": _differentiable_norm_backward,
}.items():
    if _ops._C is None:
        _ops.library.impl(_name, _where_needed(_function, getattr(_ops, _name)), "Autograd")
    else:
        _ops.library.impl("differentiable_" + _name, _function, "CompositeImplicitAutograd")
