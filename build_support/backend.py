"""setuptools' build backend, and the choice of the torch to compile for.

Under build isolation pip would fetch a torch of its own, often not the one that the extension is going to meet. The
torch of the environment that is installed into is borrowed instead; it is a build requirement only where there is none.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import toolkit
from setuptools.build_meta import *  # noqa: F403


def _borrow_torch() -> None:
    # -E drops pip's PYTHONPATH, and with it the isolation.
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"
    found = subprocess.run([sys.executable, "-E", "-c", code], capture_output=True, text=True).stdout.strip()
    if found:
        sys.path.append(str(toolkit.site_folders(found)[0]))


if importlib.util.find_spec("torch") is None:
    _borrow_torch()


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    """torch, where none is installed; and nvcc, where CUDA is asked for (on) and no toolkit fits."""
    if importlib.util.find_spec("torch") is None:
        return ["torch"]
    return list(filter(None, [toolkit.missing()])) if toolkit.mode() == "on" else []


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings=None) -> list[str]:
    """Nothing: a source distribution is packed without torch."""
    return []
