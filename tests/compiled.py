"""The CUDA kernels as nvcc compiles them: object files, and the standalone program linked from them.

Where the extension has just been built for CUDA, its own objects are used; what these lack `make standalone` compiles
into build/nvcc. The PTX of every architecture is executed; of the machine code a part is looked at, or with LNC_FULL=1
all of it.
"""

import contextlib
import fcntl
import functools
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from toolkit import PTX_ARCHS

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "build" / "nvcc"
KERNELS = ROOT / "csrc" / "kernels"
FULL = os.environ.get("LNC_FULL") == "1"
ARCHS = tuple(arch.replace(".", "") for arch in PTX_ARCHS)
STRICT = "-Werror all-warnings -Xcompiler -Wall"


def _tool(name):
    """The program of that name: on PATH, in CUDA_HOME, or as pip installs it."""
    site = Path(sysconfig.get_path("purelib"))
    candidates = [shutil.which(name), Path(os.environ.get("CUDA_HOME", "/nowhere"), "bin", name)]
    candidates += [*site.glob(f"nvidia/cu*/bin/{name}"), *site.glob(f"triton/backends/nvidia/bin/{name}")]
    return next((str(path) for path in candidates if path and Path(path).exists()), None)


NVCC = os.environ.get("NVCC") or _tool("nvcc")
CUOBJDUMP = _tool("cuobjdump")


def unsupported():
    """Why nothing can be compiled here, or None."""
    if not NVCC:
        return "there is no nvcc: on PATH, in CUDA_HOME or from pip install 'cuda-toolkit[nvcc,cccl,crt,cudart]'"
    return None if shutil.which("make") else "there is no make"


def _run(*command):
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


@contextlib.contextmanager
def _alone():
    """One of the test processes builds, the others wait and find it done."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with open(OUTPUT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def extension_objects():
    """The objects of an extension built from the sources as they are now; none where there is no such build."""
    headers = max(path.stat().st_mtime for path in KERNELS.glob("*.*h"))
    sources = sorted(KERNELS.glob("*.cu"))
    for folder in ROOT.glob("build/torch_*_cuda_*/csrc/kernels"):
        objects = [folder / f"{source.stem}.o" for source in sources]
        if all(
            o.exists() and o.stat().st_mtime > max(headers, s.stat().st_mtime)
            for o, s in zip(objects, sources, strict=True)
        ):
            return objects
    return []


@functools.cache
def _made(arch):
    """The folder in which make has built the program for one architecture: PTX, and machine code if it is looked at."""
    kinds = f"[compute_{arch},sm_{arch}]" if arch in _looked_at() else f"compute_{arch}"
    flags = f"-gencode arch=compute_{arch},code={kinds} --cudart shared {STRICT}"
    folder = OUTPUT / f"sm_{arch}"
    jobs = len(os.sched_getaffinity(0))
    with _alone():
        _run("make", f"-j{jobs}", "standalone", f"NVCC={NVCC}", f"NVCCFLAGS={flags}", f"standalone_dir={folder}")
    return folder


@functools.cache
def _linked():
    """The program from the extension's own objects."""
    program = OUTPUT / "extension" / "layernorm_standalone"
    program.parent.mkdir(parents=True, exist_ok=True)
    flags = [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in ARCHS]
    main = ROOT / "csrc" / "standalone" / "layernorm_standalone.cu"
    with _alone():  # and another test process may be running it
        parts = [main, *main.parent.glob("*.*h"), *extension_objects()]
        if not program.exists() or program.stat().st_mtime < max(part.stat().st_mtime for part in parts):
            command = [NVCC, "-O3", "-std=c++17", "-Icsrc", "--cudart=shared", *flags]
            _run(*command, "-o", program, main, *extension_objects())
    return program


@functools.cache
def _extension_ptx():
    """The architectures whose PTX every object of the extension holds."""
    if not CUOBJDUMP or not extension_objects():
        return frozenset()
    listed = [_run(CUOBJDUMP, "--list-ptx", path) for path in extension_objects()]
    return frozenset.intersection(*(frozenset(re.findall(r"sm_(\d+)\.ptx", text)) for text in listed))


def _looked_at():
    """The architectures that are compiled to machine code here; none where the extension's objects have it."""
    return () if extension_objects() else ARCHS if FULL else ("80",)


def program(arch):
    """The standalone program with this architecture's PTX in it."""
    return _linked() if arch in _extension_ptx() else _made(arch) / "layernorm_standalone"


def objects():
    """Object files with machine code."""
    if extension_objects():
        return extension_objects()
    return [path for arch in _looked_at() for path in sorted((_made(arch) / "kernels").glob("*.o"))]
