"""Decides what is built: the extension module with or without CUDA, or none, and why."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

import toolkit
from setuptools import Extension

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "layernorm_cuda"


@dataclass
class Build:
    """What is built, and what is not and why. `record` is what an installation later knows about itself."""

    torch: str = ""
    cuda: str = ""
    archs: str = ""
    compiler: str = ""
    without_extension: str = ""
    without_cuda: str = ""
    note: str = ""
    extension: Extension | None = None

    @property
    def summary(self) -> str:
        if self.extension is None:
            return f"{PACKAGE}: no compiled extension, PyTorch's own operations are used: {self.without_extension}"
        gpu = f"CUDA {self.cuda} for {self.archs}" if self.cuda else f"no CUDA: {self.without_cuda}"
        return f"{PACKAGE}: built for torch {self.torch} with {self.compiler}; CPU {cpu_kernels()}; {gpu}"

    @property
    def record(self) -> str:
        values = {
            "EXTENSION": self.extension is not None,
            "TORCH": self.torch,
            "CUDA": self.cuda,
            "ARCHS": self.archs,
            "COMPILER": self.compiler,
            "WITHOUT_EXTENSION": self.without_extension,
            "WITHOUT_CUDA": self.without_cuda,
            "SUMMARY": self.summary,
            "ENVIRONMENT": sys.prefix,
        }
        lines = [f"{name} = {value!r}\n" for name, value in values.items()]
        return '"""What this installation was built with. Written by setup.py."""\n\n' + "".join(lines)


def sources(*patterns: str) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def cpu_kernels() -> str:
    """The instruction sets that csrc/cpu has a file for."""
    x86 = ("avx2", "avx512") if platform.machine() in ("x86_64", "AMD64") else ()
    names = [name for name in ("baseline", *x86) if sources(f"csrc/cpu/{name}.cpp")]
    return " ".join(names or [platform.machine()])


def find_compiler(standard: str) -> str:
    """The C++ compiler's name and version.

    Raises:
        Refused: there is none, or it cannot build a Python module in this standard of C++ ("c++17").
    """
    command = os.environ.get("CXX", "c++").split()
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cpp")
        probe.write_text("#include <Python.h>\n#include <vector>\nint main() { return 0; }\n")
        flags = [f"-std={standard}", "-fsyntax-only", f"-I{sysconfig.get_path('include')}", str(probe)]
        try:
            done = subprocess.run([*command, *flags], capture_output=True, text=True)
        except OSError:
            reason = f"there is no C++ compiler ({command[0]} cannot be run; CXX names another)"
            raise toolkit.Refused(reason) from None
    if done.returncode != 0:
        error = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
        raise toolkit.Refused(f"the C++ compiler {command[0]} cannot build Python modules in {standard}: {error}")
    return subprocess.run([*command, "--version"], capture_output=True, text=True).stdout.splitlines()[0]


def find_cuda(torch_cuda: str | None, sites: list[Path]) -> tuple[toolkit.Toolkit, Path]:
    """The toolkit and its runtime library; raises Refused where CUDA is switched off or cannot be built."""
    if toolkit.mode() == "off":
        raise toolkit.Refused("LAYERNORM_CUDA_BUILD=off")
    found = toolkit.find(torch_cuda, os.environ, sites)
    return found, toolkit.runtime_library(found, sites)


def pybind11_first(torch_dirs: list[str]) -> list[str]:
    """pip's pybind11 before the copy among torch's headers, unless torch's casters need another major version."""
    import pybind11

    shipped = Path(torch_dirs[0], "pybind11", "detail", "common.h")
    major = re.search(r"define PYBIND11_VERSION_MAJOR (\d+)", shipped.read_text()) if shipped.exists() else None
    same = major is None or int(major[1]) == pybind11.version_info[0]
    return [pybind11.get_include(), *torch_dirs] if same else torch_dirs


def configure() -> Build:
    """What can be built here, by LAYERNORM_CUDA_BUILD, the installed torch, the compiler and the CUDA toolkit.

    Raises:
        Refused: LAYERNORM_CUDA_BUILD is "on" and CUDA cannot be built, or it is not a mode.
    """
    required = toolkit.mode() == "on"
    try:
        import torch
    except ImportError:
        return Build(without_extension="torch is not installed: pip install torch, then this again")
    build = Build(torch=torch.__version__)
    try:
        build.compiler = find_compiler("c++20" if torch.__version__ >= (2, 13) else "c++17")  # as torch's headers are
    except toolkit.Refused as reason:
        if required:
            raise toolkit.Refused(f"LAYERNORM_CUDA_BUILD=on, but {reason}") from None
        build.without_extension = str(reason)
        return build
    sites = toolkit.site_folders(torch.__file__)
    try:
        found, runtime = find_cuda(torch.version.cuda, sites)
    except toolkit.Refused as reason:
        if required:
            raise toolkit.Refused(f"LAYERNORM_CUDA_BUILD=on, but {reason}") from None
        build.without_cuda = str(reason)
        found = runtime = None
    build.extension = _extension(build, found, runtime)
    return build


def _extension(build: Build, found: toolkit.Toolkit | None, runtime: Path | None) -> Extension:
    files = sources("csrc/*.cpp", "csrc/cpu/*.cpp")
    libraries = ["c10", "torch_cpu", "torch_python"]
    apple = sys.platform == "darwin"  # whose clang has no OpenMP: one thread
    cxx = ["-O2", "-ffp-contract=off", "-g0", "-Wall", "-fvisibility=hidden", *([] if apple else ["-fopenmp"])]
    nvcc: list[str] = []
    # at::parallel_for runs on the OpenMP runtime that torch has loaded; -fopenmp here could bring in a second one.
    # clang's calls are not in libgomp, so it has to.
    link = [] if apple else ["-Wl,-s", *(["-fopenmp"] if "clang" in build.compiler else [])]
    if found:
        files += sources("csrc/kernels/*.cu")
        libraries += ["c10_cuda"]
        link += [str(runtime)]
        nvcc = ["-O3", "-std=c++17", "--threads=2", "-Xfatbin=-compress-all", "-Xcompiler=-Wall,-fvisibility=hidden"]
        build.cuda, build.archs = found.version, os.environ.get("TORCH_CUDA_ARCH_LIST", "")
        if not build.archs:
            archs = toolkit.default_archs(found)
            nvcc += toolkit.gencode(archs)
            build.archs = " ".join(archs)
            if toolkit.left_out(found):
                newer, ptx = ", ".join(toolkit.left_out(found)), toolkit.ptx_arch(archs[-1])
                build.note = f"nvcc {found.version} is older than architectures {newer}: they run the PTX of {ptx}"
    cpp_extension = _cpp_extension(found)
    include_dirs = pybind11_first(cpp_extension.include_paths("cuda" if found else "cpu"))
    include_dirs += toolkit.more_headers(found) if found else []
    macros = {"TORCH_VERSION": build.torch, "CUDA_VERSION": build.cuda, "ARCH_LIST": build.archs}
    cxx += [f'-DLAYERNORM_CUDA_{name}="{value}"' for name, value in macros.items()]
    cxx += ["-DLAYERNORM_CUDA_WITH_CUDA=1"] if found else []
    return Extension(
        f"{PACKAGE}._C",
        files,
        include_dirs=include_dirs,
        library_dirs=cpp_extension.library_paths(),
        libraries=libraries,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=link,
        language="c++",
    )


def _cpp_extension(found: toolkit.Toolkit | None):
    """torch.utils.cpp_extension with our toolkit: it looks for one of its own when it is imported."""
    if found:
        os.environ["CUDA_HOME"] = str(found.root)
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = str(found.root) if found else None
    return cpp_extension


def jobs() -> int:
    """One compiler a core, as far as memory lasts: each takes up to 2 GiB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return cores
    return max(1, min(cores, memory // 2**31))
