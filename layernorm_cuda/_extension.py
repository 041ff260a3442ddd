"""The compiled module, or the reason why it is missing. Importing this never fails."""

import sys

import torch

REBUILD = "Rebuild in the source folder: pip install --no-build-isolation --force-reinstall --no-deps ."

try:
    from . import _build_info
except ImportError:
    _build_info = None


def _release(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]


def _load():
    if f"{__package__}._C" not in sys.modules:
        if _build_info is None:
            return None, "it has not been built"
        if not _build_info.EXTENSION:
            return None, _build_info.WITHOUT_EXTENSION
        if _release(_build_info.TORCH) != _release(torch.__version__):
            # torch's C++ interface changes between releases: such a module may load, and then crash.
            return None, f"it was compiled for torch {_build_info.TORCH}, but torch {torch.__version__} is running"
    try:
        from . import _C
    except ImportError as error:
        built = f" (compiled for torch {_build_info.TORCH}, running {torch.__version__})" if _build_info else ""
        return None, f"{error}{built}"
    return _C, None


_C, load_error = _load()
without_cuda = load_error or (_build_info.WITHOUT_CUDA if _build_info else "")
