"""Where PyTorch's own layer norm is wrong: native's answer, ours, and the right one, measured on this machine.

    python -m benchmarks.accuracy [--device auto|cpu|cuda] [--markdown]

Errors are the largest absolute ones against the definition in float64 on the same rounded inputs. The exit status is 0
only if every answer of ours is right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.autograd import grad
from torch.nn import functional as F

import layernorm_cuda as lnc

Norm = Callable[..., Tensor]


@dataclass(frozen=True)
class Row:
    """A case, what it measures with a given norm, what is right, and how far from it ours may be."""

    case: str
    measure: Callable[[Norm, str], list[float]]
    right: float = 0.0
    tolerance: float = 0.0
    by_threads: bool = False

    def holds(self, values: list[float]) -> bool:
        return all(abs(value - self.right) <= self.tolerance for value in values)

    @property
    def expected(self) -> str:
        return f"{self.right:g}" if not self.tolerance else f"< {self.tolerance:g}"


def textbook(x: Tensor, shape, weight=None, bias=None, eps: float = 1e-5) -> Tensor:
    """The definition in float64, differentiable to every order."""
    x = x.double()
    dims = tuple(range(-len(shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    y = centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight.double()
    return y if bias is None else y + bias.double()


def bias_gradient(dtype: torch.dtype, params: torch.dtype) -> Callable[[Norm, str], list[float]]:
    def measure(norm: Norm, device: str) -> list[float]:
        x = _normal(8192, 64, device=device).to(dtype)
        weight, bias = (torch.ones(64, dtype=params, device=device).requires_grad_() for _ in range(2))
        y = norm(x, (64,), weight, bias)
        result = grad(y, bias, torch.ones_like(y))[0].double()
        return [max(result.tolist(), key=lambda value: abs(value - 8192))]

    return measure


def error(*inputs: Callable[[str], Tensor], eps: float = 1e-5) -> Callable[[Norm, str], list[float]]:
    def measure(norm: Norm, device: str) -> list[float]:
        errors = []
        for make in inputs:
            x = make(device)
            y = norm(x, x.shape[-1:], None, None, eps).double()
            errors.append((y - textbook(x, x.shape[-1:], eps=eps)).abs().max().item())
        return errors

    return measure


def weight_gradient_error(offset: float) -> Callable[[Norm, str], list[float]]:
    def measure(norm: Norm, device: str) -> list[float]:
        """One row and an upstream gradient of ones: the weight's gradient is xhat as backward sees it."""
        x = _normal(1, 4096, device=device) + offset
        weight, bias = (torch.ones(4096, device=device).requires_grad_() for _ in range(2))
        y = norm(x, (4096,), weight, bias)
        xhat = grad(y, weight, torch.ones_like(y))[0].double()
        return [(xhat - textbook(x, (4096,))[0]).abs().max().item()]

    return measure


def one_column(norm: Norm, device: str) -> list[float]:
    x = torch.full((64, 1), 1e6, device=device)
    x += torch.arange(64, device=device).unsqueeze(1) / 8
    weight, bias = (torch.ones(1, device=device).requires_grad_() for _ in range(2))
    y = norm(x, (1,), weight, bias)
    return [grad(y, weight, torch.ones_like(y))[0].item()]


def derivative_error(norm: Norm, device: str, derivative: Callable[[Norm, str], Tensor]) -> list[float]:
    """Relative to the largest element of the right derivative, in float64."""
    right = derivative(textbook, device)
    return [((derivative(norm, device) - right).abs().max() / right.abs().max()).item()]


def third_derivative(norm: Norm, device: str) -> Tensor:
    x, weight, bias, direction = (_normal(*shape, device=device).double() for shape in ((4, 8), (8,), (8,), (4, 8)))
    value = (norm(x.requires_grad_(), (8,), weight + 2, bias) ** 3).sum()
    for _ in range(3):
        (result,) = grad(value, x, create_graph=True)
        value = (result * direction.flip(0)).sum()
    return result.detach()


def second_derivative_through_bias(norm: Norm, device: str) -> Tensor:
    """Of the bias gradient by the input, without a weight."""
    x, bias = (_normal(*shape, device=device).double().requires_grad_() for shape in ((4, 8), (8,)))
    value = (norm(x, (8,), None, bias) ** 3).sum()
    (bias_grad,) = grad(value, bias, create_graph=True)
    return grad(bias_grad.square().sum(), x, allow_unused=True, materialize_grads=True)[0]


def _normal(*shape: int, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _rows(offset: float = 0.0, scale: float = 1.0) -> Callable[[str], Tensor]:
    return lambda device: (_normal(64, 4096, device=device) + offset) * scale


def _outlier(place: int) -> Callable[[str], Tensor]:
    def make(device: str) -> Tensor:
        x = _normal(64, 4096, device=device)
        x[:, place] = 1e6
        return x

    return make


ONES = "8,192 rows, upstream gradient 1"
ROWS = [
    Row(f"bfloat16, {ONES}: bias gradient", bias_gradient(torch.bfloat16, torch.bfloat16), 8192, by_threads=True),
    Row(f"float16, {ONES}: bias gradient", bias_gradient(torch.float16, torch.float16), 8192, by_threads=True),
    Row(
        f"bfloat16 with float32 parameters, {ONES}: bias gradient",
        bias_gradient(torch.bfloat16, torch.float32), 8192, by_threads=True,
    ),
    Row("float32, mean 0: error of the output", error(_rows()), tolerance=2e-6),
    Row("float32, mean 1e4, 1e6: error of the output", error(_rows(1e4), _rows(1e6)), tolerance=2e-6),
    Row("float32, mean 1e6: error of xhat in backward", weight_gradient_error(1e6), tolerance=2e-6),
    Row("float32, first or last element 1e6: error of the output", error(_outlier(0), _outlier(-1)), tolerance=5e-5),
    Row(
        "float32, values about 1e19, 1e30: error of the output",
        error(_rows(scale=1e19), _rows(scale=1e30)), tolerance=2e-6,
    ),
    Row("float32, values about 1e-30, eps 0: error of the output", error(_rows(scale=1e-30), eps=0), tolerance=2e-6),
    Row("one column, values about 1e6: weight gradient", one_column),
    Row(
        "second derivative, bias without weight: relative error",
        partial(derivative_error, derivative=second_derivative_through_bias), tolerance=1e-12,
    ),
    Row("third derivative: relative error", partial(derivative_error, derivative=third_derivative), tolerance=1e-12),
]  # fmt: skip


def answers(row: Row, norm: Norm, device: str) -> tuple[str, bool]:
    """What the norm gives, as text, and whether it is right; on one thread and on all where that matters."""
    threads = torch.get_num_threads()
    values = []
    try:
        for count in (1, threads) if row.by_threads and device == "cpu" else (threads,):
            torch.set_num_threads(count)
            values += row.measure(norm, device)
    except RuntimeError:
        return "refused", False
    finally:
        torch.set_num_threads(threads)
    shown = [f"{value:.4g}" if row.right or not row.tolerance else f"{value:.1e}" for value in values]
    return ", ".join(shown if len(set(shown)) > 1 else shown[:1]), row.holds(values)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--markdown", action="store_true", help="the table as it stands in the README")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"

    table = Table(box=box.MARKDOWN if arguments.markdown else box.SIMPLE_HEAD)
    table.add_column("case")
    for column in ("native", "layernorm_cuda", "right"):
        table.add_column(column, justify="right", no_wrap=True)
    right = True
    for row in ROWS:
        native, _ = answers(row, F.layer_norm, device)
        ours, holds = answers(row, lnc.layer_norm, device)
        right &= holds
        table.add_row(row.case, native, ours if holds or arguments.markdown else f"[red]{ours}[/]", row.expected)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    info = lnc.build_info()
    kernels = info["cpu_instruction_set"] if device == "cpu" else info["cuda"]
    console.print(f"{device}; torch {torch.__version__}; kernels: {kernels}; {torch.get_num_threads()} threads")
    console.print(table)
    console.print("Every answer of ours is right." if right else "[red]Some answers of ours are wrong.[/]")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
