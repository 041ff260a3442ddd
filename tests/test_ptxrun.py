"""The kernels as nvcc compiled them, executed on the CPU: right results, no fault, no byte too many.

ptxrun is a CUDA runtime with a PTX interpreter in it that checks and counts every memory access; PTXRUN names the
folder with its libcudart.so. The standalone program runs in it as it is.
"""

import os
import re
import subprocess
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import compiled
import pytest

PTXRUN = os.environ.get("PTXRUN", "")
if not PTXRUN:
    pytest.skip("PTXRUN does not name a folder with ptxrun's libcudart.so", allow_module_level=True)
if not list(Path(PTXRUN).glob("libcudart.so.*")):
    pytest.fail(f"PTXRUN is {PTXRUN}, where no libcudart.so is", pytrace=False)
if reason := compiled.unsupported():
    pytest.skip(reason, allow_module_level=True)

SIZE = {"f32": 4, "f16": 2, "bf16": 2, "f64": 8}
WIDE = {"f32": "f32", "f16": "f32", "bf16": "f32", "f64": "f64"}
MULTIPROCESSORS = 4
ENOUGH = 8  # for the largest team


@dataclass
class Launch:
    """What one launch did: its counters, and (loaded, different loaded, stored, different stored) bytes by array."""

    kernel: str
    count: dict[str, int]
    arrays: dict[str, tuple[int, int, int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    rows: int
    cols: int
    dtype: str = "f32"
    direction: str = "forward"
    options: str = ""
    seed: int = 0
    arch: str = compiled.ARCHS[-1]
    multiprocessors: int = MULTIPROCESSORS

    def has(self, option):
        return option in self.options.split()

    @property
    def names(self):
        """The program's arrays in the order in which it asks for them."""
        given = {"weight": not self.has("--no-weight"), "bias": not self.has("--no-bias")}
        residual = self.has("--residual")
        if self.direction == "forward":
            names = ["input", residual and "residual", given["weight"] and "weight", given["bias"] and "bias"]
            return list(filter(None, [*names, "output", residual and "sum", "stats", "workspace"]))
        names = ["input", "grad_output", residual and "grad_sum", given["weight"] and "weight", "stats", "grad_input"]
        grads = [given["weight"] and "grad_weight", given["bias"] and "grad_bias", "workspace"]
        return list(filter(None, names + grads))

    def run(self):
        """Runs it and returns its launches; fails unless it is right and ptxrun has nothing to report."""
        command = [compiled.program(self.arch), "--rows", self.rows, "--cols", self.cols, "--dtype", self.dtype]
        command += ["--direction", self.direction, "--seed", self.seed, *self.options.split()]
        settings = {
            "LD_LIBRARY_PATH": PTXRUN,
            "PTXRUN_STATS": 1,
            "PTXRUN_CC": self.arch,
            "PTXRUN_SEED": self.seed,
            "PTXRUN_SMS": self.multiprocessors,
        }
        environment = os.environ | {name: str(value) for name, value in settings.items()}
        done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)
        said = done.stdout + re.sub(r"^ptxrun: stats .*\n", "", done.stderr, flags=re.MULTILINE)
        assert done.returncode == 0 and "ERROR" not in said, f"{' '.join(map(str, command))}\n{said}"
        lines = [line for line in done.stderr.splitlines() if line.startswith("ptxrun: stats ")]
        return [self._launch(line) for line in lines]

    def _launch(self, line):
        arrays = {}
        for number, *counts in re.findall(r"#(\d+)\S*?\[\d+B ld (\d+)/(\d+) st (\d+)/(\d+)\]", line):
            arrays[self.names[int(number) - 1]] = tuple(map(int, counts))
        kernel = re.search(r"lnc::(\w+)", line)[1]
        return Launch(kernel, {name: int(value) for name, value in re.findall(r" (\w+)=(\d+)", line)}, arrays)


def tiers(dtype, direction):
    """(name, most columns) of the tiers, the last one without an end."""
    listed = subprocess.run(
        [compiled.program(compiled.ARCHS[-1]), "--list-tiers", "--dtype", dtype],
        env=os.environ | {"LD_LIBRARY_PATH": PTXRUN},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = re.findall(rf"^{direction} +(\w+) +(?:to (\d+) columns|any)", listed, re.MULTILINE)
    assert found and not found[-1][1], listed
    return [(name, int(most or 0)) for name, most in found]


def arch_with(tier, number=0):
    """One of the architectures that have a tier, in turns: blocks share rows in clusters where there are any."""
    archs = compiled.ARCHS
    if tier == "cluster":
        archs = [arch for arch in archs if int(arch) >= 90]
    elif tier == "team":
        archs = [arch for arch in archs if int(arch) < 90]
    elif tier == "staged":  # all slices of a row, and sm_75 has shared memory for one
        archs = [arch for arch in archs if 80 <= int(arch) < 90]
    return archs[number % len(archs)]


# ---- every tier, in every policy ------------------------------------------------------------------------------------

POLICIES = {
    "plain": "",
    "bare": "--no-weight --no-bias --misalign 1",
    "rms": "--norm rms --misalign 3",
    "residual": "--residual --offset 1000",
    "rms-residual": "--norm rms --residual --no-bias --misalign 1",
    "weight-only": "--no-bias --offset -100",
    "bias-only": "--no-weight --misalign 2",
    "wide-params": "--param-dtype WIDE --misalign 1",
    "wide-output": "--param-dtype WIDE --output-dtype WIDE",
    "wide-output-residual": "--param-dtype WIDE --output-dtype WIDE --residual --misalign 5",
}
CASES = [
    pytest.param(policy, dtype, id=f"{policy}-{dtype}")
    for policy, options in POLICIES.items()
    for dtype in SIZE
    if "WIDE" not in options or WIDE[dtype] != dtype
]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("policy, dtype", CASES)
def test_every_tier(policy, dtype, direction):
    options = POLICIES[policy].replace("WIDE", WIDE[dtype])
    shorter = 0
    for i, (name, most) in enumerate(tiers(dtype, direction)):
        # The longest row of a tier and one that ends in the middle of a pack, in turns.
        number = i + list(POLICIES).index(policy)
        long = name in ("staged", "cluster", "slices") or (name, direction) == ("team", "backward")
        cols = shorter + 16 // SIZE[dtype] if long else most
        if number % 2:
            cols = cols + 1 if long else (shorter + most) // 2 + 1 | 1
        Case(
            rows=2 if cols > 2048 else 5 if cols > 64 else 70,
            cols=cols,
            dtype=dtype,
            direction=direction,
            options=f"{options} --tier {name}",
            arch=arch_with(name, number),
            multiprocessors=ENOUGH if name == "team" else MULTIPROCESSORS,
            seed=number % 3,
        ).run()
        shorter = shorter if long or name == "team" else most


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", SIZE)
def test_a_tier_by_name(dtype, direction):
    for name in ("warp", "block", "slices"):
        Case(3, 24, dtype, direction, f"--tier {name}", seed=1).run()


# ---- bytes ----------------------------------------------------------------------------------------------------------


def bytes_of(case, array):
    output = re.search(r"--output-dtype (\w+)", case.options)
    wide = array in ("output", "grad_output") and output
    return case.rows * case.cols * SIZE[output[1] if wide else case.dtype]


def assert_read(case, launch, array, pivots=False):
    """Every element once, but for the row's first one, which all its warps read for LayerNorm, and where arrays are
    misaligned for the 16 bytes beyond each warp's 512."""
    row_bytes = bytes_of(case, array) // case.rows
    stretches = row_bytes // 512 + 1
    again = (stretches if row_bytes > 256 else 16) * SIZE[case.dtype] if pivots else 0
    again += 16 * stretches if case.has("--misalign") else 0
    loaded, different, stored, _ = launch.arrays[array]
    assert different == case.rows * row_bytes and stored == 0
    assert loaded <= different + case.rows * again


def assert_written(case, launch, array):
    assert launch.arrays[array] == (0, 0, bytes_of(case, array), bytes_of(case, array))


LENGTHS = {"f32": (64, 1000, 1024, 4096), "f16": (60, 1024, 8192), "bf16": (768,), "f64": (512,)}
SHAPES = [(dtype, cols) for dtype, lengths in LENGTHS.items() for cols in lengths]


@pytest.mark.parametrize("options", ["", "--residual", "--misalign 1"])
@pytest.mark.parametrize("dtype, cols", SHAPES)
def test_forward_reads_and_writes_once(dtype, cols, options):
    case = Case(8, cols, dtype, options=options)  # a group without a row would read another's
    (launch,) = case.run()
    assert_read(case, launch, "input", pivots=True)
    assert_written(case, launch, "output")
    if case.has("--residual"):
        assert_read(case, launch, "residual", pivots=True)
        assert_written(case, launch, "sum")


@pytest.mark.parametrize("options", ["", "--residual", "--misalign 1"])
@pytest.mark.parametrize(
    "tier, dtype, cols, multiprocessors",
    [
        ("staged", "f32", 16384, MULTIPROCESSORS),
        ("staged", "f16", 20000, MULTIPROCESSORS),
        ("cluster", "bf16", 70000, MULTIPROCESSORS),
        ("team", "f32", 16384, 2),  # one team for both rows
        ("team", "f16", 16384, 2),
    ],
)
def test_long_rows_are_read_once(tier, dtype, cols, multiprocessors, options):
    case = Case(2, cols, dtype, options=f"--tier {tier} {options}", arch=arch_with(tier))
    case = replace(case, multiprocessors=multiprocessors)
    (launch,) = case.run()
    assert_read(case, launch, "input", pivots=True)
    assert_written(case, launch, "output")


def test_backward_in_clusters_reads_once():
    case = Case(6, 20000, "f16", "backward")
    launch, _ = case.run()
    assert_read(case, launch, "input", pivots=True)
    assert_read(case, launch, "grad_output")
    assert_written(case, launch, "grad_input")


def test_forward_in_slices_reads_twice():
    case = Case(2, 20000, options="--tier slices")
    first, second = case.run()
    for launch in (first, second):
        assert_read(case, launch, "input", pivots=True)
    assert "output" not in first.arrays
    assert_written(case, second, "output")


@pytest.mark.parametrize("options", ["", "--residual", "--no-weight --no-bias", "--misalign 1"])
@pytest.mark.parametrize("dtype, cols", SHAPES)
def test_backward_reads_and_writes_once(dtype, cols, options):
    case = Case(24, cols, dtype, "backward", options)
    launch, *fold = case.run()
    assert_read(case, launch, "input", pivots=True)
    assert_read(case, launch, "grad_output")
    assert_written(case, launch, "grad_input")
    if case.has("--residual"):
        assert_read(case, launch, "grad_sum")
    if case.has("--no-weight"):
        assert not fold and "workspace" not in launch.arrays
        return
    # The blocks' partials: written once, read once.
    (fold,) = fold
    size = 2 * int(launch.count["grid"]) * cols * SIZE[WIDE[dtype]]
    assert launch.arrays["workspace"] == (0, 0, size, size)
    assert fold.arrays["workspace"] == (size, size, 0, 0)


@pytest.mark.parametrize("dtype, multiprocessors", [("f32", 132), ("f16", 108)])
def test_partials_are_two_percent_at_most(dtype, multiprocessors):
    """At 8,192 x 4,096. The second kernel reads them while they are in the cache."""
    launch, _ = Case(8, 4096, dtype, "backward").run()
    assert launch.count["grid"] == MULTIPROCESSORS  # and so many sets of partials
    written = launch.arrays["workspace"][2] / MULTIPROCESSORS * multiprocessors
    assert written <= 0.02 * 3 * 8192 * 4096 * SIZE[dtype]


@pytest.mark.parametrize(
    "dtype, options", [("f32", ""), ("bf16", "--param-dtype f32"), ("f64", "--norm rms --no-bias")]
)
@pytest.mark.parametrize("multiprocessors", [4, 12, 70])
def test_folds_of_few_and_many_partials(dtype, options, multiprocessors):
    """One warp has all of up to 8, eight warps have up to 64 on their way at once."""
    case = Case(multiprocessors, 2048, dtype, "backward", options, multiprocessors=multiprocessors)
    launch, fold = case.run()
    assert launch.count["grid"] == multiprocessors
    assert fold.arrays["workspace"][:2] == launch.arrays["workspace"][2:]


# ---- sectors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype, cols", [("f32", 1024), ("f32", 4096), ("f16", 1024), ("bf16", 4096), ("f64", 1024)])
def test_sectors(dtype, cols, direction):
    """32-byte sectors that the warps touch, against the fewest that hold what they ask for. Partials are left out:
    a thread's 8 floats beside 16-bit data go out in two stores, each to half of every sector."""
    rows_only = "--no-weight --no-bias" if direction == "backward" else ""
    for options, most in ((rows_only, 1.0), (f"{rows_only} --misalign 1", 1.1)):
        launch, *_ = Case(8, cols, dtype, direction, options).run()
        for way in ("ld", "st"):
            touched, fewest = launch.count[f"{way}_sectors"], launch.count[f"{way}_ideal"]
            assert touched <= most * fewest, f"{way} {options}: {touched} sectors for {fewest}"


def test_no_local_memory_and_no_bank_conflicts():
    found = Counter()
    for direction in ("forward", "backward"):
        for cols in (64, 1024, 8192, 40000):
            for launch in Case(3, cols, direction=direction).run():
                found["local"] += launch.count["local"]
                found["bank_conflicts"] += launch.count["bank_conflicts"] if cols >= 1024 else 0
    assert not +found
