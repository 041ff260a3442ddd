"""The search for a CUDA toolkit that fits the installed torch, and what to compile with it.

`python build_support/toolkit.py` prints what pip has to install so that CUDA can be built.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
# The kernels ask for nothing that lies between these: machine code for 8.9 is made from the PTX of 8.0. Making PTX is
# most of the compiler's time, and three times take little more than half as long as seven.
PTX_ARCHS = ("7.5", "8.0", "9.0")
MODES = ("auto", "on", "off")


class Refused(Exception):
    """CUDA cannot be built; the message says why and what to do."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: `origin` says how it was found, `archs` what its nvcc can compile for ("8.6")."""

    root: Path
    origin: str
    version: str
    archs: tuple[str, ...]


def mode(environ: Mapping[str, str] = os.environ) -> str:
    """The switch LAYERNORM_CUDA_BUILD: "auto", "on" or "off"."""
    value = environ.get("LAYERNORM_CUDA_BUILD", "").strip().lower() or "auto"
    if value not in MODES:
        raise Refused(f"LAYERNORM_CUDA_BUILD is {value!r}, expected one of {', '.join(MODES)}")
    return value


def find(torch_cuda: str | None, environ: Mapping[str, str] = os.environ, sites: Sequence[Path] = ()) -> Toolkit:
    """The first toolkit with the CUDA major version that torch was built with.

    Looks at CUDA_HOME and CUDA_PATH, the nvcc on PATH, and what pip installed into `sites`.

    Raises:
        Refused: torch is a CPU build, no toolkit is there, or all are of another major version.
    """
    if torch_cuda is None:
        raise Refused("this torch is a CPU build")
    refused = []
    for origin, root in _candidates(environ, sites):
        toolkit = _inspect(root, origin)
        if toolkit is None:
            refused.append(f"{origin} names {root}, which has no working bin/nvcc")
        elif toolkit.version.split(".")[0] != torch_cuda.split(".")[0]:
            refused.append(f"{origin} is CUDA {toolkit.version} ({root}), but torch was built with CUDA {torch_cuda}")
        else:
            return toolkit
    found = "; ".join(refused) if refused else "no CUDA toolkit was found"
    by_pip = requirement(torch_cuda)
    source = f", or: pip install '{by_pip}'" if by_pip else " from NVIDIA, a Linux distribution or conda"
    raise Refused(f"{found}. Set CUDA_HOME to a CUDA {torch_cuda} toolkit{source}")


def requirement(torch_cuda: str) -> str:
    """What pip has to install to compile for a torch built with this CUDA version; empty before CUDA 13.

    The packages of the same names for CUDA 12 and 11 contain no nvcc.
    """
    return f"cuda-toolkit[nvcc,cccl,crt,cudart]=={torch_cuda}.*" if int(torch_cuda.split(".")[0]) >= 13 else ""


def default_archs(toolkit: Toolkit) -> tuple[str, ...]:
    """The supported architectures that this nvcc knows, in TORCH_CUDA_ARCH_LIST's notation, one with PTX."""
    known = [arch for arch in DEFAULT_ARCHS if arch in toolkit.archs]
    return tuple(f"{arch}+PTX" if arch == ptx_arch(known[-1]) else arch for arch in known)


def ptx_arch(arch: str) -> str:
    """The architecture whose PTX the machine code of this one is made from."""
    return max((ptx for ptx in PTX_ARCHS if _number(ptx) <= _number(arch)), key=_number, default=arch)


def left_out(toolkit: Toolkit) -> tuple[str, ...]:
    """The supported architectures that are newer than this nvcc."""
    newest = max(map(_number, toolkit.archs), default=0)
    return tuple(arch for arch in DEFAULT_ARCHS if _number(arch) > newest)


def gencode(archs: Sequence[str]) -> list[str]:
    """nvcc's flags for architectures as default_archs writes them ("8.6", "9.0+PTX")."""
    flags = []
    for arch in archs:
        ptx = _number(ptx_arch(arch))
        flags.append(f"-gencode=arch=compute_{ptx},code=sm_{_number(arch)}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{ptx},code=compute_{ptx}")
    return flags


def runtime_library(toolkit: Toolkit, sites: Sequence[Path]) -> Path:
    """The shared CUDA runtime to link with: the one that torch loads where pip installed it, else the toolkit's.

    A wheel ships libcudart.so.13 without the plain name, so it is linked by its path.
    """
    major = toolkit.version.split(".")[0]
    folders = [folder for at in sites for folder in (at / f"nvidia/cu{major}/lib", at / "nvidia/cuda_runtime/lib")]
    folders += [toolkit.root / "lib64", toolkit.root / "lib", Path("/usr/lib") / f"{platform.machine()}-linux-gnu"]
    for folder in folders:
        for name in sorted(folder.glob(f"libcudart.so.{major}*")):
            return name
    raise Refused(f"CUDA {toolkit.version} at {toolkit.root} has no libcudart.so.{major}")


def more_headers(toolkit: Toolkit) -> list[str]:
    """Where conda keeps the headers that torch looks for in the toolkit's `include`."""
    target = toolkit.root / "targets" / ("x86_64-linux" if platform.machine() == "x86_64" else "sbsa-linux") / "include"
    there = [folder for folder in (toolkit.root / "include", target) if (folder / "cuda_runtime_api.h").exists()]
    return [str(target)] if there == [target] else []


def _candidates(environ: Mapping[str, str], sites: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            yield variable, Path(environ[variable])
    on_path = shutil.which("nvcc", path=environ.get("PATH", ""))
    if on_path:
        yield "nvcc on PATH", root_of(Path(on_path))
    for at in sites:
        for nvcc in sorted(at.glob("nvidia/cu*/bin/nvcc"), reverse=True):
            yield "pip's cuda-toolkit", nvcc.parent.parent


def root_of(nvcc: Path) -> Path:
    """The toolkit's folder. Asks nvcc itself, since the one on PATH may be a link or a wrapper script."""
    top = re.search(r"^#\$ TOP=(.+)$", _output(nvcc, "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
    for root in [Path(top[1]).resolve()] if top else []:
        if (root / "bin" / "nvcc").exists():
            return root
    return nvcc.resolve().parent.parent


def _inspect(root: Path, origin: str) -> Toolkit | None:
    nvcc = root / "bin" / "nvcc"
    version = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version"))
    if version is None:
        return None
    archs = re.findall(r"compute_(\d+)(\d)$", _output(nvcc, "--list-gpu-arch"), re.MULTILINE)
    return Toolkit(root.resolve(), origin, version[1], tuple(f"{major}.{minor}" for major, minor in archs))


def _output(*command: object) -> str:
    try:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def _number(arch: str) -> int:
    return int(arch.removesuffix("+PTX").replace(".", ""))


def site_folders(torch_file: str) -> list[Path]:
    """Where pip installs: beside torch, and what is importable (an isolated build has a folder of its own)."""
    return list(dict.fromkeys([Path(torch_file).parent.parent, *map(Path, sys.path)]))


def missing() -> str:
    """What pip has to install so that CUDA can be built for the installed torch; empty where nothing is missing."""
    import torch

    try:
        find(torch.version.cuda, sites=site_folders(torch.__file__))
    except Refused:
        return requirement(torch.version.cuda) if torch.version.cuda else ""
    return ""


if __name__ == "__main__":
    print(missing())
