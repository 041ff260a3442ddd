"""What this installation is made of."""

import sys
from typing import NamedTuple

import torch

from . import _ops


def build_info() -> dict:
    """Versions, backends compiled in, GPU architectures, CPU instruction set in use.

    Keys: ``version``, ``python``, ``torch`` (running), ``torch_built_with``, ``backends`` (tuple of "cpu", "cuda"),
    ``cuda`` (toolkit version or None), ``cuda_architectures`` (tuple), ``cpu_instruction_set``, ``load_error``
    (why the compiled module is missing, or None).
    """
    from . import __version__

    built = _ops._C.build_info() if _ops._C is not None else {}
    backends = () if _ops._C is None else ("cpu", "cuda") if built["cuda"] else ("cpu",)
    return {
        "version": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torch_built_with": built.get("torch"),
        "backends": backends,
        "cuda": built.get("cuda"),
        "cuda_architectures": tuple(built.get("cuda_architectures", "").replace(";", " ").split()),
        "cpu_instruction_set": built.get("cpu_instruction_set", "none (plain PyTorch operations)"),
        "load_error": _ops.load_error,
    }


class LaunchPlan(NamedTuple):
    """Which CUDA kernel runs for a shape, and how it is laid out."""

    tier: str  # "warp", "block", "team", "staged", "cluster" or "slices"
    threads: int  # in a block
    threads_per_row: int
    rows_per_block: int  # at a time
    packs_per_thread: int  # of 16 bytes
    blocks: int
    blocks_per_row: int  # of a cluster or a team; else 1
    shared_memory: int  # for slices of rows, in bytes a block
    whole_packs: bool  # rows begin and end with packs; others are read in aligned packs too, and shifted: the same bits
    slices: int  # of a row; 1 where a row is not cut
    partials: int  # backward: sets of weight and bias gradients that the second kernel folds
    reason: str


def launch_plan(
    rows: int,
    cols: int,
    dtype: torch.dtype,
    *,
    direction: str = "forward",
    arch: str = "sm_90",
    sm_count: int = 132,
    aligned: bool = True,
) -> LaunchPlan:
    """The plan for ``rows`` rows of ``cols`` elements on a GPU of ``arch`` with ``sm_count`` multiprocessors.

    Needs no GPU. ``direction`` is "forward" or "backward"; ``arch`` is "sm_75" and so on;
    ``aligned``: every row of every array begins at a multiple of 16 bytes.

    Raises:
        ValueError: a size below 1, another direction, a dtype that no kernel takes, or a malformed ``arch``.
        RuntimeError: the compiled module is missing.
    """
    names = {torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
    if rows < 1 or cols < 1 or sm_count < 1:
        raise ValueError(f"launch_plan: rows, cols and sm_count must be positive, got {rows}, {cols} and {sm_count}")
    if direction not in ("forward", "backward"):
        raise ValueError(f"launch_plan: direction must be 'forward' or 'backward', got {direction!r}")
    if dtype not in names:
        raise ValueError(f"launch_plan: dtype must be one of {', '.join(map(str, names))}, got {dtype}")
    if not (arch.startswith("sm_") and arch[3:].rstrip("af").isdigit()):
        raise ValueError(f"launch_plan: arch must look like 'sm_90', got {arch!r}")
    if _ops._C is None:
        raise RuntimeError(f"launch_plan: the compiled module is missing: {_ops.load_error}")
    number = int(arch[3:].rstrip("af"))
    backward = direction == "backward"
    return LaunchPlan(**_ops._C.launch_plan(rows, cols, names[dtype], backward, number, sm_count, aligned))
