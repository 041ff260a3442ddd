"""Builds programs in which the CUDA kernels' source runs on the CPU, into build/host/.

ninja rebuilds what changed. MAX_JOBS, CXX and LNC_HOST_BUILD (another output folder) are honoured.
"""

import fcntl
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUTPUT = Path(os.environ.get("LNC_HOST_BUILD", ROOT / "build" / "host"))
COMPILER = os.environ.get("CXX", "g++")
MACHINE = [HERE / "machine.cpp", HERE / "memory.cpp"]

# Unique symbols would be one for all libraries of a process, and shared variables are such.
COMMON = [
    "-std=c++17",
    "-O2",
    "-g1",
    "-fPIC",
    "-fno-gnu-unique",
    "-Wall",
    "-Wextra",
    f"-I{HERE / 'include'}",
    "-DLNC_HOST_EXECUTION",
]
# Contraction is off so that a sum's bits are what the source says, whatever path the compiler took.
KERNEL = ["-x", "c++", "-ffp-contract=off"]
# Pragmas are nvcc's; a half is copied with memcpy; {} for the rest of a structure is meant.
KERNEL += ["-Wno-unknown-pragmas", "-Wno-unused-parameter", "-Wno-class-memaccess", "-Wno-missing-field-initializers"]
# Only the calls before each access are wanted (memory.cpp answers them), and a 16-byte access must stay one:
# scalar replacement would split it, jump threading would give one source line several addresses.
INSTRUMENT = [
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fno-tree-sra",
    "-fno-ipa-sra",
    "-fno-thread-jumps",
    "-fno-tree-vectorize",
]
SANITIZE = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


def unsupported():
    """Why host execution cannot be built on this machine, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"host execution needs Linux on x86-64, this is {sys.platform} on {platform.machine()}"
    if not shutil.which(COMPILER):
        return f"host execution needs a C++ compiler, {COMPILER} is not on PATH"
    if "Free Software Foundation" not in subprocess.run([COMPILER, "--version"], capture_output=True, text=True).stdout:
        return f"host execution needs g++, {COMPILER} is another compiler"
    return None


def machine_flags():
    """Fused multiply-add in hardware, where this machine has it: fmaf is a slow call otherwise."""
    known = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    return ["-mavx2", "-mfma"] if {"avx2", "fma"} <= known else []


def build(name, sources, link=("-shared",)):
    """Compiles (file, flags) pairs and links them to build/host/<name>/<name>.so; returns its path.

    Raises RuntimeError with the compiler's message.
    """
    folder = OUTPUT / name
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / (f"{name}.so" if "-shared" in link else name)
    lines = [
        f"rule compile\n  command = {COMPILER} -MMD -MF $out.d $flags -c $in -o $out\n  deps = gcc\n  depfile = $out.d",
        f"rule link\n  command = {COMPILER} $in -o $out $flags",
    ]
    objects = []
    for source, flags in sources:
        objects.append(f"{len(objects)}-{Path(source).stem}.o")
        lines.append(
            f"build {objects[-1]}: compile {source}\n  flags = {' '.join([*COMMON, *machine_flags(), *flags])}"
        )
    # Symbols bind within the library: __tsan_* and __tls_get_addr are memory.cpp's.
    flags = " ".join([*link, "-Wl,-Bsymbolic", "-ldl", "-pthread"])
    lines.append(f"build {target.name}: link {' '.join(objects)}\n  flags = {flags}\ndefault {target.name}\n")
    text = "\n".join(lines)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rules = folder / "build.ninja"
        if not rules.exists() or rules.read_text() != text:
            rules.write_text(text)
        ninja = [shutil.which("ninja") or Path(sysconfig.get_path("scripts")) / "ninja", "-C", str(folder)]
        if jobs := os.environ.get("MAX_JOBS"):
            ninja += ["-j", jobs]
        done = subprocess.run(ninja, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"building {target} failed:\n{done.stdout[-8000:]}{done.stderr[-2000:]}")
    return target


def machine(flags=()):
    return [(source, list(flags)) for source in MACHINE]


def kernels(csrc, flags):
    return [(source, [*KERNEL, *flags]) for source in sorted((csrc / "kernels").glob("*.cu"))]


def backend(csrc, flags=()):
    return [(HERE / "backend.cpp", [f"-I{csrc}", "-Wno-missing-field-initializers", *flags])]


def toys():
    return build("toys", [(HERE / "toys.cpp", [*KERNEL, *INSTRUMENT]), *machine()])


def checked():
    """Every access of the kernels is checked and counted."""
    csrc = ROOT / "csrc"
    return build("checked", [*kernels(csrc, INSTRUMENT), *backend(csrc), *machine()])


def mutants(csrc):
    """The same from an edited copy of the sources, in which lnc_host_mutant chooses between edits."""
    flags = ["-include", str(HERE / "mutant.h"), "-DLNC_HOST_MUTANTS"]
    return build("mutants", [*kernels(csrc, [*INSTRUMENT, *flags]), *backend(csrc), *machine(flags)])


def sanitized():
    """Kernels and machine under AddressSanitizer and UBSan; libasan has to be loaded before it."""
    csrc = ROOT / "csrc"
    sources = [*kernels(csrc, SANITIZE), *backend(csrc, SANITIZE), *machine(SANITIZE)]
    return build("sanitized", sources, ["-shared", *SANITIZE])


def load_extension():
    """``layernorm_cuda._C`` in which CPU tensors go through the CUDA kernels; registers the operators."""
    import torch
    from torch.utils.cpp_extension import include_paths

    csrc, libraries = ROOT / "csrc", Path(torch.__file__).parent / "lib"
    includes = [f"-isystem{path}" for path in [*include_paths(), sysconfig.get_path("include")]]
    glue = ["-std=c++20", "-Wno-unused-parameter", "-DTORCH_EXTENSION_NAME=_C", f"-I{csrc}", *includes]
    glue.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    sources = [(source, glue) for source in sorted(csrc.glob("*.cpp"))]
    instrument = INSTRUMENT if os.environ.get("LNC_HOST_CHECKED") == "1" else []
    name = "_C" + ("_checked" if instrument else "")
    link = ["-shared", f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    path = build(name, [*sources, *kernels(csrc, instrument), *backend(csrc), *machine()], link)
    spec = importlib.util.spec_from_file_location("layernorm_cuda._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
