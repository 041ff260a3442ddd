"""Python started in the source folder finds the package there; what was compiled is where the package is installed."""

import os
import sys
import warnings


def _is_built(folder: str) -> bool:
    return os.path.exists(os.path.join(folder, "_build_info.py"))


def installed(path: list[str]) -> list[str]:
    """The package's ``__path__``: as it is, or if nothing was built there, that of an installation."""
    here = path[0]
    if not _is_built(here):
        for entry in sys.path:
            there = os.path.abspath(os.path.join(entry, os.path.basename(here)))
            if _is_built(there):
                warnings.warn(f"{here} is layernorm_cuda's source, not built: {there} is used", stacklevel=2)
                return [there]
    return path
