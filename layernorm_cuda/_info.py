"""What this installation is made of."""

import sys

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
