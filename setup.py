"""Builds layernorm_cuda._C: the CPU kernels always, the CUDA kernels where torch and a toolkit allow.

LAYERNORM_CUDA_BUILD=auto|on|off   CUDA where possible (default), or an error where not, or never
CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX are honoured.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_support"))

import toolkit  # noqa: E402

PACKAGE = "layernorm_cuda"


@dataclass
class Build:
    """What is going to be built, and what is not and why."""

    torch: str = ""
    cuda: str = ""
    archs: str = ""
    compiler: str = ""
    without_extension: str = ""
    without_cuda: str = ""
    extension: Extension | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        if self.extension is None:
            return f"{PACKAGE}: no compiled extension, PyTorch's own operations are used: {self.without_extension}"
        gpu = f"CUDA {self.cuda} for {self.archs}" if self.cuda else f"no CUDA: {self.without_cuda}"
        return f"{PACKAGE}: built for torch {self.torch} with {self.compiler}; CPU {cpu_kernels()}; {gpu}"

    def record(self) -> str:
        lines = [
            '"""What this installation was built with. Written by setup.py."""\n',
            f"EXTENSION = {self.extension is not None}",
            f"TORCH = {self.torch!r}",
            f"CUDA = {self.cuda!r}",
            f"ARCHS = {self.archs!r}",
            f"COMPILER = {self.compiler!r}",
            f"WITHOUT_EXTENSION = {self.without_extension!r}",
            f"WITHOUT_CUDA = {self.without_cuda!r}",
            f"SUMMARY = {self.summary!r}",
            f"ENVIRONMENT = {sys.prefix!r}",
        ]
        return "\n".join(lines) + "\n"


def sources(*patterns: str) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def cpu_kernels() -> str:
    stems = {Path(source).stem.rpartition("_")[2] for source in sources("csrc/cpu/*.cpp")}
    names = [name for name in ("baseline", "avx2", "avx512", "neon") if name in stems]
    return " ".join(names or [platform.machine()])


def find_compiler() -> str:
    """The C++ compiler's name and version; raises Refused where it cannot build an extension module."""
    command = os.environ.get("CXX", "c++").split()
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cpp")
        probe.write_text("#include <Python.h>\n#include <vector>\nint main() { return 0; }\n")
        flags = ["-std=c++20", "-fsyntax-only", f"-I{sysconfig.get_path('include')}", str(probe)]
        try:
            done = subprocess.run([*command, *flags], capture_output=True, text=True)
        except OSError:
            raise toolkit.Refused(f"there is no C++ compiler ({command[0]} cannot be run; CXX names another)") from None
    if done.returncode != 0:
        error = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
        raise toolkit.Refused(f"the C++ compiler {command[0]} cannot build extension modules: {error}")
    return subprocess.run([*command, "--version"], capture_output=True, text=True).stdout.splitlines()[0]


def pybind11_first(torch_dirs: list[str]) -> list[str]:
    """pip's pybind11 before the copy among torch's headers, unless torch's own casters need another major version."""
    import pybind11

    shipped = Path(torch_dirs[0], "pybind11", "detail", "common.h")
    major = re.search(r"define PYBIND11_VERSION_MAJOR (\d+)", shipped.read_text()) if shipped.exists() else None
    same = major is None or int(major[1]) == pybind11.version_info[0]
    return [pybind11.get_include(), *torch_dirs] if same else torch_dirs


def configure() -> Build:
    mode = toolkit.mode()
    try:
        import torch
    except ImportError:
        return Build(without_extension="torch is not installed; install it first, then this with --no-build-isolation")
    build = Build(torch=torch.__version__)
    try:
        build.compiler = find_compiler()
    except toolkit.Refused as reason:
        if mode == "on":
            raise
        build.without_extension = str(reason)
        return build

    sites = toolkit.site_folders(torch.__file__)
    found = None
    try:
        if mode == "off":
            raise toolkit.Refused("LAYERNORM_CUDA_BUILD=off")
        found = toolkit.find(torch.version.cuda, os.environ, sites)
        runtime = toolkit.runtime_library(found, sites)
    except toolkit.Refused as reason:
        if mode == "on":
            raise toolkit.Refused(f"LAYERNORM_CUDA_BUILD=on, but {reason}") from None
        found, build.without_cuda = None, str(reason)

    # torch's own libgomp serves us too: linking with -fopenmp could bring in a second OpenMP runtime.
    gnu = "clang" not in build.compiler
    cxx = ["-O3", "-g0", "-Wall", "-fvisibility=hidden", "-fopenmp"]
    link = ["-Wl,-s"] if gnu else ["-Wl,-s", "-fopenmp"]
    nvcc: list[str] = []
    files = sources("csrc/*.cpp", "csrc/cpu/*.cpp", "csrc/kernels/*.cpp")
    libraries = ["c10", "torch_cpu", "torch_python"]
    if found:
        from_user = os.environ.get("TORCH_CUDA_ARCH_LIST")
        archs = toolkit.default_archs(found)
        build.cuda, build.archs = found.version, from_user or " ".join(archs)
        if not from_user and toolkit.left_out(found):
            names = ", ".join(toolkit.left_out(found))
            build.notes.append(f"nvcc {found.version} does not know {names}: these run the PTX of {archs[-1]}")
        nvcc = ["-O3", "-std=c++17", "--threads=2", "-Xfatbin=-compress-all", "-Xcompiler=-Wall,-fvisibility=hidden"]
        nvcc += [] if from_user else toolkit.gencode(archs)
        files += sources("csrc/kernels/*.cu")
        libraries += ["c10_cuda"]
        link += [str(runtime)]
        # torch.utils.cpp_extension reads it when it is imported.
        os.environ["CUDA_HOME"] = str(found.root)

    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = str(found.root) if found else None
    macros = {"TORCH_VERSION": build.torch, "CUDA_VERSION": build.cuda, "ARCH_LIST": build.archs}
    cxx += [f'-DLAYERNORM_CUDA_{name}="{value}"' for name, value in macros.items()]
    cxx += ["-DLAYERNORM_CUDA_WITH_CUDA=1"] if found else []
    build.extension = Extension(
        f"{PACKAGE}._C",
        files,
        include_dirs=pybind11_first(cpp_extension.include_paths("cuda" if found else "cpu")),
        library_dirs=cpp_extension.library_paths(),
        libraries=libraries,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=link,
        language="c++",
    )
    return build


def commands(build: Build) -> dict[str, type]:
    def report() -> None:
        for note in build.notes:
            print(f"{PACKAGE}: {note}", file=sys.stderr)
        print(build.summary, file=sys.stderr)

    def write(folder: str) -> None:
        Path(folder, "_build_info.py").write_text(build.record())

    class BuildPy(build_py):
        def run(self) -> None:
            super().run()
            if not build.torch:
                raise SystemExit(f"{PACKAGE}: {build.without_extension}")
            write(self.get_package_dir(PACKAGE) if self.editable_mode else os.path.join(self.build_lib, PACKAGE))
            if build.extension is None:
                report()

    if build.extension is None:
        return {"build_py": BuildPy}

    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # Of its own for each torch, and kept: a second build compiles what changed and nothing else.
            self.build_temp = str(ROOT / "build" / re.sub(r"\W", "_", f"torch_{build.torch}_{build.cuda}"))

        def build_extensions(self) -> None:
            _prefer_ninja()
            os.environ.setdefault("MAX_JOBS", str(jobs()))
            super().build_extensions()
            report()

    return {"build_py": BuildPy, "build_ext": BuildExt}


def _prefer_ninja() -> None:
    """Puts pip's ninja on PATH: it is not there when an environment's python is called by its full name."""
    try:
        import ninja
    except ImportError:
        return
    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])


def jobs() -> int:
    """One compiler a core, as far as memory lasts: each takes about 2 GiB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return cores
    return max(1, min(cores, memory // 2**31))


if __name__ == "__main__":
    try:
        plan = configure()
    except toolkit.Refused as reason:
        raise SystemExit(f"{PACKAGE}: {reason}") from None
    setup(ext_modules=[plan.extension] if plan.extension else [], cmdclass=commands(plan))
