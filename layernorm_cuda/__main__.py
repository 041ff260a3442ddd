"""``python -m layernorm_cuda``: what is installed, and whether it computes what it should, on every device there is.

Exits 0 only when every check holds.
"""

import sys

import torch

from . import build_info, layer_norm, reference, rms_norm

# Largest error against float64, relative to the largest value: half a unit in the last place and a little arithmetic.
LIMITS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
NORMS = {"layer_norm": (layer_norm, False), "rms_norm": (rms_norm, True)}
EPS = 1e-5


def _call(norm, x, weight, bias):
    function, rms = NORMS[norm]
    shape = x.shape[-1:]
    return function(x, shape, weight, EPS) if rms else function(x, shape, weight, bias, EPS)


def _truth(x, weight, bias, grad, rms):
    """(output, gradients of x, weight, bias) by the textbook in float64."""
    x, weight, bias, grad = (t.detach().cpu().double() for t in (x, weight, bias, grad))
    shape = x.shape[-1:]
    bias = None if rms else bias
    y, _, stats = reference.norm_forward(x, None, shape, weight, bias, EPS, rms, True, None)
    return y, *reference.norm_backward(grad, None, x, shape, weight, stats, rms, (True, True, not rms), None)


def _error(actual, truth):
    return ((actual.detach().cpu().double() - truth).abs().max() / truth.abs().max()).item()


def _values(norm, dtype, device):
    """Forward and backward of rows of a length that no vector divides."""
    x, grad = (torch.randn(40, 1003).to(device, dtype) for _ in range(2))
    weight, bias = (torch.randn(1003).to(device, dtype) for _ in range(2))
    inputs = [t.requires_grad_() for t in (x, weight, bias)[: 2 if norm == "rms_norm" else 3]]
    y = _call(norm, x, weight, bias)
    truth, *wanted = _truth(x, weight, bias, grad, NORMS[norm][1])
    gradients = torch.autograd.grad(y, inputs, grad)
    yield "forward", _error(y, truth), LIMITS[dtype]
    yield "backward", max(map(_error, gradients, wanted)), LIMITS[dtype]


def _offset(device):
    x = (torch.randn(8, 4096) + 1e6).to(device)
    truth = reference.norm_forward(x.cpu().double(), None, (4096,), None, None, EPS, False, False, None)[0]
    yield "mean 1e6", (layer_norm(x, (4096,)).cpu().double() - truth).abs().max().item(), 2e-6


def _count(device):
    x, bias = torch.randn(8192, 8, device=device).bfloat16(), torch.zeros(8, device=device).bfloat16().requires_grad_()
    y = layer_norm(x, (8,), None, bias)
    (gradient,) = torch.autograd.grad(y, bias, torch.ones_like(y))
    yield "bias gradient of 8192 rows", (gradient - 8192).abs().max().item(), 0.0


def _invariance(norm, device):
    x, weight, bias = torch.randn(67, 769, device=device), *torch.randn(2, 769, device=device)
    together = _call(norm, x, weight, bias)
    alone = torch.cat([_call(norm, row, weight, bias) for row in x.split(1)])
    yield "rows alone or together, bits", float((alone != together).sum()), 0.0


def checks(device: str):
    """Yields (operator, dtype, what, error, limit)."""
    for norm in NORMS:
        for dtype in LIMITS:
            for check in _values(norm, dtype, device):
                yield norm, dtype, *check
        for check in _invariance(norm, device):
            yield norm, torch.float32, *check
    for check in _offset(device):
        yield "layer_norm", torch.float32, *check
    for check in _count(device):
        yield "layer_norm", torch.bfloat16, *check


def main() -> int:
    for key, value in build_info().items():
        value = ", ".join(value) if isinstance(value, tuple) else value
        print(f"{key:24}{'none' if value in (None, '') else value}")
    torch.manual_seed(0)
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    failures = total = 0
    for device in devices:
        print(f"\n{device}{': ' + torch.cuda.get_device_name(device) if device != 'cpu' else ''}")
        for norm, dtype, what, error, limit in checks(device):
            holds = error <= limit
            total, failures = total + 1, failures + (not holds)
            kind = str(dtype).removeprefix("torch.")
            print(f"  {norm:12}{kind:10}{what:30}{error:9.1e} <= {limit:.0e}  {'ok' if holds else 'FAILED'}")
    print(f"\n{total - failures} of {total} checks hold")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
