"""CPU kernels of instruction sets that few machines have: AVX-512 with its instructions replaced, NEON under QEMU.

Both are compiled with tests/cpu/check.cpp, which compares them with long double; no torch is in the program.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent / "cpu"
CSRC = HERE.parents[1] / "csrc"
FLAGS = ["-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", f"-I{CSRC}"]


def check(tmp_path, compiler, flags, source, emulator=(), share=1):
    program = tmp_path / "check"
    build = [compiler, *FLAGS, *flags, "-o", program, HERE / "check.cpp", source]
    done = subprocess.run([str(word) for word in build], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    done = subprocess.run([*emulator, str(program), str(share)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="splits vectors into AVX2's: needs x86-64")
def test_avx512(tmp_path):
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    if not {"avx2", "fma", "f16c"} <= set(flags):
        pytest.skip("splits vectors into AVX2's: this machine is not known to have it")
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    check(tmp_path, "g++", ["-O1", "-DLNC_CHECKED=avx512"], HERE / "avx512_emulated.cpp")


def test_neon(tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if not (compiler and emulator):
        pytest.skip("needs Debian's g++-aarch64-linux-gnu and qemu-user-static")
    flags = ["-O2", "-static", "-DLNC_CHECKED=baseline"]
    check(tmp_path, compiler, flags, CSRC / "cpu" / "baseline.cpp", [emulator], share=10)
