"""The functions: ``torch.nn.functional``'s, by our operators."""

import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _extension, _ops
from .functions import apply_norm
from .reference import accumulate_dtype, default_eps

_DEVICES = _ops.device_types()
_HALF = (torch.float16, torch.bfloat16)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer normalisation over the last dimensions of ``input``; as :func:`torch.nn.functional.layer_norm`.

    ``(x - mean) / sqrt(var + eps) * weight + bias`` with mean and biased variance of each row
    (Ba, Kiros, Hinton 2016, https://arxiv.org/abs/1607.06450).

    Args:
        input: ``[*, *normalized_shape]``, any strides; float64, float32, float16 or bfloat16.
        normalized_shape: the last dimensions of ``input``, over which each row is normalised.
        weight: ``[*normalized_shape]`` or None for ones; any of the four dtypes, not necessarily that of ``input``.
        bias: as ``weight``, or None for zeros.
        eps: added to the variance.

    Returns:
        A contiguous tensor of ``input``'s shape and dtype (float32 under CUDA autocast, as native's).

    Raises:
        RuntimeError: ``normalized_shape``, ``weight`` or ``bias`` do not fit ``input``, or lie on another device.
        NotImplementedError: a dtype that is not one of the four.
        TypeError: an argument of the wrong type.
    """
    output = None if is_compiling() else _ops.norm(input, None, normalized_shape, weight, bias, eps, False, None)
    if output is not None:
        return output
    if has_torch_function_variadic(input, weight, bias):
        arguments = dict(weight=weight, bias=bias, eps=eps)
        return handle_torch_function(layer_norm, (input, weight, bias), input, normalized_shape, **arguments)
    try:
        if not _is_ours(input):
            return _native(input, normalized_shape, weight, bias, eps, False)
        return _norm(input, None, normalized_shape, weight, bias, eps, False)[0]
    except (TypeError, AttributeError, RuntimeError):
        _explain("layer_norm", normalized_shape, eps, input=input, weight=weight, bias=bias)
        raise


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """RMS normalisation over the last dimensions of ``input``; as :func:`torch.nn.functional.rms_norm`.

    ``x / sqrt(mean(x^2) + eps) * weight`` (Zhang, Sennrich 2019, https://arxiv.org/abs/1910.07467). Arguments,
    result and errors are those of :func:`layer_norm`; ``eps=None`` is the machine epsilon of the dtype computed in:
    float64's for float64, float32's for all others, as in PyTorch (before torch 2.7, there and here, ``input``'s own).
    """
    output = None if is_compiling() else _ops.norm(input, None, normalized_shape, weight, None, eps, True, None)
    if output is not None:
        return output
    if has_torch_function_variadic(input, weight):
        return handle_torch_function(rms_norm, (input, weight), input, normalized_shape, weight=weight, eps=eps)
    try:
        if not _is_ours(input):
            return _native(input, normalized_shape, weight, None, eps, True)
        return _norm(input, None, normalized_shape, weight, None, eps, True)[0]
    except (TypeError, AttributeError, RuntimeError):
        _explain("rms_norm", normalized_shape, 0.0 if eps is None else eps, input=input, weight=weight)
        raise


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """``sum = input + residual`` and ``output = layer_norm(sum)`` in one pass; returns ``(output, sum)``.

    ``residual`` has the shape of ``input``; where their dtypes differ, both take the wider one, as in an addition.
    The other arguments and the errors are those of :func:`layer_norm`.
    """
    outputs = (
        None
        if residual is None or is_compiling()
        else _ops.norm(input, residual, normalized_shape, weight, bias, eps, False, None)
    )
    if outputs is not None:
        return outputs
    if has_torch_function_variadic(input, residual, weight, bias):
        tensors = (input, residual, weight, bias)
        arguments = dict(weight=weight, bias=bias, eps=eps)
        return handle_torch_function(add_layer_norm, tensors, input, residual, normalized_shape, **arguments)
    try:
        if residual is None:
            raise TypeError
        if not _is_ours(input):
            total = input + residual
            return _native(total, normalized_shape, weight, bias, eps, False), total
        return _norm(input, residual, normalized_shape, weight, bias, eps, False)
    except (TypeError, AttributeError, RuntimeError):
        _explain("add_layer_norm", normalized_shape, eps, input=input, residual=residual, weight=weight, bias=bias)
        raise


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``sum = input + residual`` and ``output = rms_norm(sum)`` in one pass; returns ``(output, sum)``.

    Arguments are those of :func:`add_layer_norm` and :func:`rms_norm`.
    """
    outputs = (
        None
        if residual is None or is_compiling()
        else _ops.norm(input, residual, normalized_shape, weight, None, eps, True, None)
    )
    if outputs is not None:
        return outputs
    if has_torch_function_variadic(input, residual, weight):
        tensors = (input, residual, weight)
        return handle_torch_function(add_rms_norm, tensors, input, residual, normalized_shape, weight=weight, eps=eps)
    try:
        if residual is None:
            raise TypeError
        if not _is_ours(input):
            total = input + residual
            return _native(total, normalized_shape, weight, None, eps, True), total
        return _norm(input, residual, normalized_shape, weight, None, eps, True)
    except (TypeError, AttributeError, RuntimeError):
        eps = 0.0 if eps is None else eps
        _explain("add_rms_norm", normalized_shape, eps, input=input, residual=residual, weight=weight)
        raise


def _norm(input, residual, normalized_shape, weight, bias, eps, rms, dtype=None):
    """(output, sum), differentiable: what `_ops.norm`, tried first, has not taken as it was."""
    if isinstance(eps, Tensor) and eps.requires_grad:
        raise TypeError("eps has no gradient")
    if rms:
        eps = _rms_eps(input, eps, residual)
    if dtype is None and input.is_cuda and input.dtype in _HALF and torch.is_autocast_enabled("cuda"):
        dtype = torch.float32
    if is_compiling():
        tensors = (input, residual, weight, bias)
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        operator = torch.ops.layernorm_cuda.norm_forward
        output, total, _ = operator(input, residual, normalized_shape, weight, bias, eps, rms, save, dtype)
        return output, total
    outputs = _ops.norm(input, residual, normalized_shape, weight, bias, eps, rms, dtype)
    if outputs is not None:
        return outputs if residual is not None else (outputs, None)
    output, total, _ = apply_norm(input, residual, normalized_shape, weight, bias, eps, rms, True, dtype)
    return output, total


def norm_to(dtype, input, normalized_shape, weight, bias, eps, rms):
    """Layer or RMS normalisation with an output of any ``dtype``, rounded once; for ``convert.py``."""
    if not _is_ours(input):
        return _native(input, normalized_shape, weight, bias, eps, rms, dtype)
    wide = accumulate_dtype(input.dtype)
    output, _ = _norm(input, None, normalized_shape, weight, bias, eps, rms, dtype if dtype == input.dtype else wide)
    return output.to(dtype)


def _native(input, normalized_shape, weight, bias, eps, rms, dtype=None):
    """PyTorch's own kernel, with an output of ``dtype`` if one is given, else of its choice."""
    mixed = isinstance(input, Tensor) and any(isinstance(t, Tensor) and t.dtype != input.dtype for t in (weight, bias))
    if mixed and not (dtype is None and _is_autocast(input.device.type)):  # which it may refuse
        dtype, wide = dtype or input.dtype, accumulate_dtype(input.dtype)
        input, weight, bias = (t if t is None else t.to(wide) for t in (input, weight, bias))
    if rms:
        output = torch.rms_norm(input, normalized_shape, weight, eps)
    else:
        output = torch.layer_norm(input, normalized_shape, weight, bias, eps)
    return output if dtype is None else output.to(dtype)


def _is_autocast(device_type):
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _rms_eps(input, eps, residual):
    if eps is not None:
        return eps
    dtype = input.dtype if residual is None else torch.promote_types(input.dtype, residual.dtype)
    return default_eps(dtype)


def _is_ours(input):
    """Whether our operators take this tensor; PyTorch's own take the rest (nested, other devices; DTensors, for which
    it knows how to shard its operators), and stand in every graph that is made to be run without us, or that a compiler
    differentiates or batches itself (torch.func inside torch.compile)."""
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export() or hasattr(input, "device_mesh"):
        return False
    if is_compiling() and torch._C._are_functorch_transforms_active():
        return False
    kind = input.device.type
    if kind in _DEVICES and input.layout is torch.strided and not input.is_nested:
        return True
    if kind == "cuda":
        _warn_no_cuda()
    return False


@cache
def _warn_no_cuda():
    reason = _extension.without_cuda or "it was built for the CPU only"
    warnings.warn(
        f"layernorm_cuda: no CUDA kernels in this installation ({reason}); PyTorch's own kernel runs in their place. "
        "To build them: LAYERNORM_CUDA_BUILD=on pip install --no-build-isolation --force-reinstall --no-deps .",
        stacklevel=4,
    )


def _explain(name, normalized_shape, eps, **tensors):
    """Raises the TypeError that says which argument is of the wrong type, if one is."""
    for what, value in tensors.items():
        if not isinstance(value, Tensor) and (value is not None or what in ("input", "residual")):
            raise TypeError(f"{name}: {what} must be a Tensor, not {type(value).__name__}") from None
    if not isinstance(normalized_shape, (tuple, list)):
        kind = type(normalized_shape).__name__
        raise TypeError(
            f"{name}: normalized_shape must be a tuple of ints, not {kind}; for one dimension, (n,)"
        ) from None
    for size in normalized_shape:
        if isinstance(size, bool) or not hasattr(size, "__index__"):
            raise TypeError(
                f"{name}: normalized_shape must be a tuple of ints, got a {type(size).__name__} in it"
            ) from None
    if not hasattr(eps, "__float__") or (isinstance(eps, Tensor) and (eps.numel() != 1 or eps.requires_grad)):
        raise TypeError(f"{name}: eps must be a number, not {type(eps).__name__}") from None


with suppress(ImportError):  # not public: without it torch.jit.script refuses our modules
    from torch.jit._builtins import _register_builtin

    _register_builtin(layer_norm, "aten::layer_norm")
    _register_builtin(rms_norm, "aten::rms_norm")
