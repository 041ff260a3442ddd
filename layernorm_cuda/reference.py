"""The textbook: layer and RMS normalisation and their gradients in plain PyTorch operations.

For readers, for tests, and for machines where the compiled module is missing. Same arguments and results as the
operators of ``csrc/ops.cpp``; Ba, Kiros, Hinton 2016 (https://arxiv.org/abs/1607.06450) and Zhang, Sennrich 2019
(https://arxiv.org/abs/1910.07467).
"""

import math

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def default_eps(dtype: torch.dtype) -> float:
    """What ``eps=None`` means to ``rms_norm``: the machine epsilon of the dtype computed in, before torch 2.7 of
    ``dtype`` itself."""
    own = dtype.is_floating_point and torch.__version__ < (2, 7)
    return torch.finfo(dtype if own else accumulate_dtype(dtype)).eps


def _rows(t: torch.Tensor, normalized_shape) -> torch.Tensor:
    leading = t.shape[: t.dim() - len(normalized_shape)]
    return t.reshape(math.prod(leading), math.prod(normalized_shape)).to(accumulate_dtype(t.dtype)).contiguous()


def _centred(x: torch.Tensor, rms: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Deviations of [rows, cols] from the row's mean, and the mean's distance from the row's first element."""
    if rms:
        return x, x.new_zeros(x.shape[0], 1)
    deviation = x - x[:, :1]
    shift = deviation.mean(1, keepdim=True)
    return deviation - shift, shift


def norm_forward(input, residual, normalized_shape, weight, bias, eps, rms, save_stats, dtype):
    """Returns (output, sum, stats); see csrc/kernels/params.h for what stats holds."""
    total = input if residual is None else (input + residual).contiguous()
    x = _rows(total, normalized_shape)
    if x.numel() == 0:
        shape = (1 if rms else 2, x.shape[0])
        return torch.empty_like(total, dtype=dtype), total, x.new_empty(shape)
    centred, shift = _centred(x, rms)
    # A power of two brings the largest square near 1, so that neither large nor small rows leave the range.
    exponent = torch.frexp(centred.abs().amax(1, keepdim=True)).exponent
    scale = torch.ldexp(torch.ones_like(shift), -exponent.clamp(-126, 126))
    scaled = (centred * scale).square().mean(1, keepdim=True)
    ordinary = scaled / scale / scale + eps
    rstd = torch.where(ordinary > 1e-30, ordinary.rsqrt(), scale * (scaled + eps * scale * scale).rsqrt())
    rstd = torch.where(ordinary == math.inf, scale * scaled.rsqrt(), rstd)
    rstd = torch.where((scaled == 0) & (eps == 0), torch.zeros_like(rstd), rstd)
    leading = total.shape[: total.dim() - len(normalized_shape)]
    # In total's shape from here on: a view of y could not be modified in place by who gets it.
    y = centred.reshape(total.shape) * rstd.reshape(*leading, *[1] * len(normalized_shape))
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    stats = torch.cat([rstd.T] if rms else [shift.T, rstd.T])
    return y.to(dtype or total.dtype), total, stats


def normalised(input, normalized_shape, stats, rms):
    """xhat as [rows, cols] from the stats that the forward saved."""
    x = _rows(input, normalized_shape)
    deviation = x if rms or x.numel() == 0 else x - x[:, :1] - stats[0].unsqueeze(1)
    return deviation * stats[-1].unsqueeze(1)


def grad_bias_dtype(bias_dtype, weight, stats):
    """The dtype of the bias gradient: None stands for the weight's, or without a weight for the accumulation type."""
    return bias_dtype or (stats if weight is None else weight).dtype


def norm_backward(grad_output, grad_sum, input, normalized_shape, weight, stats, rms, output_mask, bias_dtype):
    """Returns (grad_input, grad_weight, grad_bias), None for what output_mask leaves out.

    With g = grad_output * weight: grad_input = rstd * (g - mean(g) - xhat * mean(g * xhat)); for rms without mean(g).
    """
    xhat = normalised(input, normalized_shape, stats, rms)
    rstd = stats[-1].unsqueeze(1)
    dy = _rows(grad_output, normalized_shape).to(xhat.dtype)
    dx = dw = db = None
    if output_mask[0]:
        g = dy if weight is None else dy * weight.reshape(-1).to(dy.dtype)
        mean = 0 if rms else g.mean(1, keepdim=True)
        dx = rstd * (g - mean - xhat * (g * xhat).mean(1, keepdim=True))
        if grad_sum is not None:
            dx = dx + _rows(grad_sum, normalized_shape)
        dx = dx.reshape(input.shape).to(input.dtype)
    if output_mask[1]:
        dw = (dy * xhat).sum(0).reshape(normalized_shape).to(weight.dtype)
    if output_mask[2]:
        db = dy.sum(0).reshape(normalized_shape).to(grad_bias_dtype(bias_dtype, weight, stats))
    return dx, dw, db
