"""What nvcc made of every kernel, read from its object files: registers, stack, and the assembly's loads and stores."""

import re
import subprocess
from collections import Counter, defaultdict

import compiled
import pytest

if reason := compiled.unsupported():
    pytest.skip(reason, allow_module_level=True)

# 65,536 registers a multiprocessor, 512 threads a block: the most that lets one block run, or 4 of 128 threads. Where a
# thread of a team holds 32 elements of a row, of the next, of weight and bias, the plan gives a multiprocessor 6 blocks
# of 64 threads.
REGISTERS = 128
REGISTERS_TEAM = 168
# These move single values: the partials of a column, the sums of a slice.
NARROW_STORES = {"fold_partials", "backward_slice_sums"}
NARROW_LOADS = {"fold_partials"}

needs_cuobjdump = pytest.mark.skipif(not compiled.CUOBJDUMP, reason="no cuobjdump: pip install nvidia-cuda-cuobjdump")


@pytest.fixture(scope="module")
def objects():
    """Compiled by make they have passed with warnings as errors; .ci/run builds the extension in the same way."""
    return compiled.objects()


def dump(path, *options):
    done = subprocess.run([compiled.CUOBJDUMP, *options, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kernel_name(symbol):
    """_ZN3lnc12forward_rowsIfLNS_4NormE0E... -> forward_rows"""
    return re.match(r"_ZN3lnc(?:4cuda)?\d+([a-z_]+)", symbol)[1]


def most_registers(symbol):
    return REGISTERS_TEAM if re.match(r"_ZN3lnc12forward_rowsI\w+Lin1ELi[48]E", symbol) else REGISTERS


def machine_code(text, architecture, item):
    """(architecture, symbol, what lies below it) from cuobjdump's listing."""
    parts = re.split(rf"^{architecture}(sm_\d+)\s*$", text, flags=re.MULTILINE)
    for arch, listing in zip(parts[1::2], parts[2::2], strict=True):
        pieces = re.split(rf"^{item}(_Z\w+):?\s*$", listing, flags=re.MULTILINE)
        yield from ((arch, symbol, body) for symbol, body in zip(pieces[1::2], pieces[2::2], strict=True))


def test_everything_compiles(objects):
    assert {path.stem for path in objects} == {path.stem for path in compiled.KERNELS.glob("*.cu")}


@needs_cuobjdump
def test_registers_and_stack(objects):
    seen, wrong = Counter(), []
    for path in objects:
        for arch, symbol, body in machine_code(dump(path, "--dump-resource-usage"), r"arch = ", r" Function "):
            usage = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", body)}
            seen[arch] += 1
            if usage["REG"] > most_registers(symbol) or usage["STACK"] or usage["LOCAL"]:
                wrong.append((arch, symbol, usage))
    assert not wrong
    assert len(set(seen.values())) == 1, f"kernels by architecture: {seen}"


@needs_cuobjdump
def test_loads_and_stores(objects):
    """128 bits at a time in every kernel's vector path, nothing wider, and no local memory."""
    wrong, seen = [], Counter()
    for i, path in enumerate(objects):
        archs = re.findall(r"\.(sm_\d+)\.cubin", dump(path, "--list-elf"))
        if not compiled.FULL:  # disassembling takes seconds: one architecture a file, in turns
            archs = archs[i % len(archs) :][:1]
        listing = "".join(dump(path, "--dump-sass", "--gpu-architecture", arch) for arch in archs)
        for arch, symbol, body in machine_code(listing, r"\s*code for ", r"\s*Function : "):
            kernel, widths = kernel_name(symbol), defaultdict(Counter)
            seen[kernel] += 1
            for operation, modifiers in re.findall(r"\b(LDG|STG|LDL|STL)\b([.\w]*)", body):
                widths[operation][next(iter(re.findall(r"\.(64|128|256)\b", modifiers)), "32")] += 1
            if kernel == "any_kernel":
                continue
            wide_loads, wide_stores = widths["LDG"]["128"] > 0, widths["STG"]["128"] > 0
            narrow_loads = kernel in NARROW_LOADS and "Li1ELi8EEEv" in symbol  # one column a thread
            if (
                widths["LDL"]
                or widths["STL"]
                or widths["LDG"]["256"]
                or widths["STG"]["256"]
                or (wide_loads == bool(narrow_loads))
                or (wide_stores == (kernel in NARROW_STORES))
            ):
                wrong.append((arch, symbol, {name: dict(count) for name, count in widths.items()}))
    assert not wrong
    assert {"forward_rows", "forward_slices", "backward_rows", "backward_slices", "fold_partials"} <= set(seen)
