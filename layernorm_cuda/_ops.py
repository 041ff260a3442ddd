"""The operators: the compiled module, or PyTorch operations in its place where it is missing.

``norm_forward`` and ``norm_backward`` here skip the dispatcher's argument parsing; ``torch.ops.layernorm_cuda`` has
the same two for ``torch.compile`` and everything else that works on operators. Their ``bias_dtype=None`` stands for
the weight's, or without a weight for the accumulation type. ``norm`` is the whole call with its derivative in C++
(csrc/python.cpp), for plain tensors; where it returns None, ``functional`` takes over.
"""

import math
import warnings

import torch

from . import reference
from ._extension import _C, REBUILD, load_error

FORWARD_SCHEMA = (
    "norm_forward(Tensor input, Tensor? residual, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps, "
    "bool rms, bool save_stats, ScalarType? dtype) -> (Tensor output, Tensor sum, Tensor stats)"
)
BACKWARD_SCHEMA = (
    "norm_backward(Tensor grad_output, Tensor? grad_sum, Tensor input, SymInt[] normalized_shape, Tensor? weight, "
    "Tensor stats, bool rms, bool[3] output_mask, ScalarType? bias_dtype) -> (Tensor grad_input, Tensor grad_weight, "
    "Tensor grad_bias)"
)

library = torch.library.Library("layernorm_cuda", "FRAGMENT")


def _name(rms, residual=None):
    return ("add_" if residual is not None else "") + ("rms_norm" if rms else "layer_norm")


_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _check_dtype(name, what, dtype):
    if dtype not in _DTYPES:
        raise NotImplementedError(
            f"{name}: not implemented for '{dtype}'; expected {what} of dtype float64, float32, float16 or bfloat16"
        )


def _check(name, input, normalized_shape, **others):
    """The checks of csrc/ops.cpp that need no data, for the paths that do not pass through it."""
    shape = tuple(normalized_shape)
    if not shape:
        raise RuntimeError(f"{name}: expected normalized_shape to have at least one dimension, got ()")
    if tuple(input.shape[max(input.dim() - len(shape), 0) :]) != shape:
        expected = ", ".join(["*", *map(str, shape)])
        # rms_norm of PyTorch has an error type of its own for too few dimensions.
        kind = ValueError if "rms" in name and input.dim() < len(shape) else RuntimeError
        raise kind(
            f"{name}: given normalized_shape={list(shape)}, expected input with shape [{expected}], "
            f"but got input of size {list(input.shape)}"
        )
    _check_dtype(name, "input", input.dtype)
    for what, tensor in others.items():
        if tensor is None:
            continue
        like_input = what.startswith(("residual", "grad"))
        expected = tuple(input.shape) if like_input else shape
        if tuple(tensor.shape) != expected:
            source = "input" if like_input else "normalized_shape"
            raise RuntimeError(f"{name}: {what} has shape {tuple(tensor.shape)}, expected {expected} to match {source}")
        if tensor.device != input.device:
            raise RuntimeError(
                f"{name}: {what} is on {tensor.device}, expected all tensors to be on the same device as input, "
                f"{input.device}"
            )
        _check_dtype(name, what, tensor.dtype)


def _check_forward(input, residual, normalized_shape, weight, bias, rms, dtype):
    """Returns the dtype of input + residual."""
    name = _name(rms, residual)
    _check(name, input, normalized_shape, residual=residual, weight=weight, bias=bias)
    type_ = input.dtype if residual is None else torch.promote_types(input.dtype, residual.dtype)
    wide = reference.accumulate_dtype(type_)
    if dtype not in (None, type_, wide):
        raise RuntimeError(f"{name}: output dtype {dtype} for input of {type_}; expected {type_} or {wide}")
    return type_


def _check_backward(grad_output, grad_sum, input, normalized_shape, weight, stats, rms, output_mask):
    name = _name(rms) + "_backward"
    _check(name, input, normalized_shape, weight=weight, grad_output=grad_output, grad_sum=grad_sum)
    rows = math.prod(input.shape[: input.dim() - len(normalized_shape)])
    wide, k = reference.accumulate_dtype(input.dtype), 1 if rms else 2
    if stats.dtype != wide or stats.numel() != k * rows or stats.device != input.device:
        raise RuntimeError(
            f"{name}: stats must be what the forward saved: {wide} of shape [{k}, {rows}] on {input.device}"
        )
    if output_mask[1] and weight is None:
        raise RuntimeError(f"{name}: a gradient of weight was asked for but there is no weight")


def _python_forward(input, residual, normalized_shape, weight, bias, eps, rms, save_stats, dtype):
    _check_forward(input, residual, normalized_shape, weight, bias, rms, dtype)
    output, total, stats = reference.norm_forward(
        input, residual, normalized_shape, weight, bias, eps, rms, save_stats, dtype
    )
    return output, total if residual is not None else input.new_empty(0), stats if save_stats else input.new_empty(0)


def _python_backward(grad_output, grad_sum, input, normalized_shape, weight, stats, rms, output_mask, bias_dtype):
    _check_backward(grad_output, grad_sum, input, normalized_shape, weight, stats, rms, output_mask)
    grads = reference.norm_backward(
        grad_output, grad_sum, input, normalized_shape, weight, stats, rms, output_mask, bias_dtype
    )
    return tuple(input.new_empty(0) if grad is None else grad for grad in grads)


if _C is not None:
    norm, norm_forward, norm_backward = _C.norm, _C.norm_forward, _C.norm_backward
else:

    def norm(*_):
        """Nothing below Python takes this call."""

    library.define(FORWARD_SCHEMA)
    library.define(BACKWARD_SCHEMA)
    library.impl("norm_forward", _python_forward, "CompositeExplicitAutograd")
    library.impl("norm_backward", _python_backward, "CompositeExplicitAutograd")

    def _below_autograd(operator, position):
        def call(*args):
            if not isinstance(args[position], (tuple, list)):
                raise TypeError("normalized_shape must be a tuple of ints")
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*args)

        return call

    norm_forward = _below_autograd(torch.ops.layernorm_cuda.norm_forward, 2)
    norm_backward = _below_autograd(torch.ops.layernorm_cuda.norm_backward, 3)
    warnings.warn(
        "layernorm_cuda: the compiled module could not be loaded, plain PyTorch operations are used in its place "
        f"(right, but not fast): {load_error}. {REBUILD}",
        stacklevel=2,
    )


@torch.library.register_fake("layernorm_cuda::norm_forward", lib=library)
def _fake_forward(input, residual, normalized_shape, weight, bias, eps, rms, save_stats, dtype):
    sum_dtype = _check_forward(input, residual, normalized_shape, weight, bias, rms, dtype)
    shape, none = input.shape, input.new_empty(0)
    output = input.new_empty(shape, dtype=dtype or sum_dtype)
    sum_ = none if residual is None else input.new_empty(shape, dtype=sum_dtype)
    if not save_stats:
        return output, sum_, none.clone()
    rows = math.prod(shape[: len(shape) - len(normalized_shape)])
    wide = reference.accumulate_dtype(sum_dtype)
    return output, sum_, input.new_empty((1 if rms else 2, rows), dtype=wide)


@torch.library.register_fake("layernorm_cuda::norm_backward", lib=library)
def _fake_backward(grad_output, grad_sum, input, normalized_shape, weight, stats, rms, output_mask, bias_dtype):
    _check_backward(grad_output, grad_sum, input, normalized_shape, weight, stats, rms, output_mask)
    grad_input = input.new_empty(input.shape if output_mask[0] else 0)
    grad_weight = input.new_empty(normalized_shape, dtype=weight.dtype) if output_mask[1] else input.new_empty(0)
    dtype = reference.grad_bias_dtype(bias_dtype, weight, stats)
    grad_bias = input.new_empty(normalized_shape, dtype=dtype) if output_mask[2] else input.new_empty(0)
    return grad_input, grad_weight, grad_bias


def device_types() -> frozenset[str]:
    """Devices whose tensors our operators take; all others go to PyTorch's own."""
    return frozenset({"cpu", "meta"} | ({"cuda"} if _C is not None and _C.build_info()["cuda"] else set()))
