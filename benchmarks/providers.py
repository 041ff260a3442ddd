"""What is timed: for each direction, one call for every provider, all on the same tensors.

forward    the public function under no_grad, as in inference: F.layer_norm and ours
backward   the operators under torch.ops, under no_grad: all three gradients from saved statistics, both at the same
           cost of a call from Python. `direct` is ours without it, as `functions.py` calls it; native has no such way
step       nn.LayerNorm and ours: module forward and backward through autograd, Python overhead included
add        input + residual, then the norm: two operations of native's, one of ours (no_grad)

`copy` moves the bytes the norm has to move: forward a clone (one array in, one out), backward an addition (two in, one
out). Every call allocates its results, as it does in a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

import layernorm_cuda as lnc

from .timing import Call

NATIVE, OURS, COPY, COMPILED, DIRECT = "native", "ours", "copy", "compile", "direct"
DIRECTIONS = ("forward", "backward", "step", "add")
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    direction: str
    rows: int
    cols: int
    dtype: torch.dtype
    device: str
    threads: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols

    @property
    def useful_bytes(self) -> int:
        """What has to cross memory once: the large arrays, parameters and their gradients."""
        arrays = {"forward": 2, "backward": 3, "step": 5, "add": 4}[self.direction]
        params = {"forward": 2, "backward": 3, "step": 5, "add": 2}[self.direction]
        return (arrays * self.rows + params) * self.cols * self.dtype.itemsize


class Tensors:
    """The inputs of a case, with values as in a model: unit variance, a little offset."""

    def __init__(self, case: Case):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(case.device, case.dtype)

        self.x, self.dy = normal(*case.shape) + 0.25, normal(*case.shape)
        self.weight, self.bias = normal(case.cols) + 1, normal(case.cols)


def _norm(function, t: Tensors) -> Call:
    return partial(function, t.x, (t.x.shape[1],), t.weight, t.bias, EPS)


def _step(module: torch.nn.Module, t: Tensors) -> Call:
    x = t.x.detach().requires_grad_()
    wanted = [x, *module.parameters()]

    def step():
        return torch.autograd.grad(module(x), wanted, t.dy)

    return step


def _module(kind, t: Tensors) -> torch.nn.Module:
    module = kind(t.x.shape[1]).to(t.x.device, t.x.dtype)
    module.load_state_dict({"weight": t.weight, "bias": t.bias})
    return module


def _forward(case: Case, t: Tensors, compiled: bool) -> dict[str, Call]:
    calls = {NATIVE: _norm(F.layer_norm, t), OURS: _norm(lnc.layer_norm, t), COPY: t.x.clone}
    if compiled:
        calls[COMPILED] = _norm(_compile(F.layer_norm), t)
    for name, kind in _installed(case).items():
        calls[name] = partial(_module(kind, t), t.x)
    return calls


def _backward(case: Case, t: Tensors, compiled: bool) -> dict[str, Call]:
    shape, mask = (case.cols,), [True, True, True]
    _, mean, rstd = torch.native_layer_norm(t.x, shape, t.weight, t.bias, EPS)
    stats = torch.ops.layernorm_cuda.norm_forward(t.x, None, shape, t.weight, t.bias, EPS, False, True, None)[2]
    native, ours = torch.ops.aten.native_layer_norm_backward.default, torch.ops.layernorm_cuda.norm_backward.default
    arguments = t.dy, None, t.x, shape, t.weight, stats, False, mask, None
    return {
        NATIVE: partial(native, t.dy, t.x, shape, mean, rstd, t.weight, t.bias, mask),
        OURS: partial(ours, *arguments),
        DIRECT: partial(lnc._ops.norm_backward, *arguments),
        COPY: partial(torch.add, t.x, t.dy),
    }


def _steps(case: Case, t: Tensors, compiled: bool) -> dict[str, Call]:
    calls = {NATIVE: _step(_module(torch.nn.LayerNorm, t), t), OURS: _step(_module(lnc.LayerNorm, t), t)}
    if compiled:
        calls[COMPILED] = _step(_compile(_module(torch.nn.LayerNorm, t)), t)
    for name, kind in _installed(case).items():
        calls[name] = _step(_module(kind, t), t)
    return calls


def _add(case: Case, t: Tensors, compiled: bool) -> dict[str, Call]:
    shape = (case.cols,)

    def native(x, residual, weight, bias):
        total = x + residual
        return F.layer_norm(total, shape, weight, bias, EPS), total

    tensors = t.x, t.dy, t.weight, t.bias
    calls = {NATIVE: partial(native, *tensors), OURS: partial(lnc.add_layer_norm, t.x, t.dy, shape, t.weight, t.bias)}
    if compiled:
        calls[COMPILED] = partial(_compile(native), *tensors)
    return calls


def _compile(function):
    torch._dynamo.reset()  # one graph a case: no recompilation with dynamic shapes
    return torch.compile(function, dynamic=False)


def _installed(case: Case) -> dict[str, type]:
    """Other libraries' modules, where they are installed and the case is on a GPU. Not tested: no GPU was at hand."""
    found: dict[str, type] = {}
    if case.device != "cuda" or case.dtype == torch.float64:
        return found
    try:
        from liger_kernel.transformers import LigerLayerNorm

        found["liger"] = partial(LigerLayerNorm, bias=True)
    except ImportError:
        pass
    try:
        from apex.normalization import FusedLayerNorm

        found["apex"] = FusedLayerNorm
    except ImportError:
        pass
    return found


def mode(case: Case) -> torch.set_grad_enabled:
    """What a case's calls have to run in: autograd only where it is timed."""
    return torch.set_grad_enabled(case.direction == "step")


def calls(case: Case, compiled: bool) -> dict[str, Call]:
    """Every provider's call for this case, native first; raises AssertionError where ours differs from native."""
    make = {"forward": _forward, "backward": _backward, "step": _steps, "add": _add}[case.direction]
    tensors = Tensors(case)
    made = make(case, tensors, compiled)
    _check(case, made)
    return made


def _check(case: Case, made: dict[str, Call]) -> None:
    """The first result (output or input gradient) of all: a wrong answer in no time is worth nothing."""
    tolerance = 20 * torch.finfo(case.dtype).eps * max(1.0, math.log2(case.cols) / 8)
    expected = _first(made[NATIVE]())
    for name, call in made.items():
        if name != COPY:
            torch.testing.assert_close(_first(call()), expected, rtol=tolerance, atol=tolerance)


def _first(result) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]
