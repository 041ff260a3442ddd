"""The CUDA kernels' own source, executed thread by thread on the CPU: right results, no fault, no byte too many."""

import ctypes
import dataclasses
import os
import re
import subprocess
import sys

import host
import numpy as np
import pytest
from host import build
from host.kernels import Case, Kernels, Rows, accumulate, narrow

if not os.environ.get("LNC_HOST_SANITIZED") and (reason := host.unsupported()):
    pytest.skip(reason, allow_module_level=True)


# The library of test_under_sanitizers, in the process that it starts: no other process starts well from there.
SANITIZED = os.environ.get("LNC_HOST_SANITIZED")


@pytest.fixture(scope="module")
def kernels():
    return Kernels(SANITIZED or build.checked(), lazy=True)


# ---- right results --------------------------------------------------------------------------------------------------

# Half a unit in the last place after arithmetic in the accumulation type.
RELATIVE = {"f64": 1e-13, "f32": 4e-6, "f16": 2.0**-11 * 1.01, "bf16": 2.0**-8 * 1.01}
ABSOLUTE = {"f64": 1e-13, "f32": 4e-6, "f16": 4e-6, "bf16": 4e-6}


counted = pytest.mark.skipif(bool(SANITIZED), reason="this build counts nothing")


def close(rows, truth, scale=1.0):
    """scale: the size of what was added up, where that is more than the result's own."""
    np.testing.assert_allclose(
        rows.values, np.broadcast_to(truth, rows.values.shape), RELATIVE[rows.dtype], ABSOLUTE[rows.dtype] * scale
    )


def value(rows, default):
    return default if rows is None else rows.values


def normalise(case, x):
    """(xhat, 1 / standard deviation) in float64."""
    centred = x if case.rms else x - x.mean(1, keepdims=True)
    rstd = 1 / np.sqrt((centred**2).mean(1, keepdims=True) + case.eps)
    return centred * rstd, rstd


def check_forward(case, inputs, results):
    x = inputs["input"].values + value(inputs["residual"], 0)
    if case.residual:
        close(results["sum"], x)
        x = results["sum"].values
    xhat, rstd = normalise(case, x)
    close(results["output"], xhat * value(inputs["weight"], 1) + value(inputs["bias"], 0), 2)
    if case.stats:
        stats, kind = results["stats"].values, accumulate(case.dtype)
        np.testing.assert_allclose(stats[-1], rstd[:, 0], RELATIVE[kind])
        if not case.rms:
            deviations = x - x[:, :1]
            np.testing.assert_allclose(stats[0], deviations.mean(1), 0, ABSOLUTE[kind] * np.abs(deviations).max())


def check_backward(case, inputs, x, results):
    xhat, rstd = normalise(case, x.values)
    dy = inputs["grad_output"].values
    g = dy * value(inputs["weight"], 1)
    projected = g - xhat * (g * xhat).mean(1, keepdims=True)
    dx = rstd * (projected if case.rms else projected - g.mean(1, keepdims=True)) + value(inputs["grad_sum"], 0)
    size = np.sqrt(case.rows) * 4
    for name, truth, scale in (
        ("grad_input", dx, 4 * max(1.0, np.abs(rstd).max())),
        ("grad_weight", (dy * xhat).sum(0), size),
        ("grad_bias", dy.sum(0), size),
    ):
        if results[name] is not None:
            close(results[name], truth, scale)


def run(kernels, case, **device):
    """Forward and backward; (what they wrote, what the machine counted)."""
    kernels.reset()
    kernels.device(**device)
    inputs = kernels.inputs(case)
    forward = kernels.forward(case, inputs)
    assert not (reports := kernels.result()[0]), "\n".join(map(str, reports))
    assert kernels.status == 0
    check_forward(case, inputs, forward)
    launches = kernels.result()[1]
    if not case.stats:
        return inputs, forward, launches, []
    kernels.reset()
    x = forward["sum"] or inputs["input"]
    backward = kernels.backward(case, inputs, x, forward["stats"])
    assert not (reports := kernels.result()[0]), "\n".join(map(str, reports))
    assert kernels.status == 0
    check_backward(case, inputs, x, backward)
    return inputs, {**forward, **backward}, launches, kernels.result()[1]


# The longest row of each tier, in packs of 16 bytes (csrc/kernels/plan.h), and what lies just beyond.
PACKS = (1, 4, 8, 16, 32, 64, 96, 128, 192, 256, 768, 1024, 2048, 4096)


def tier_cases():
    for dtype, size in (("f32", 4), ("f16", 2), ("bf16", 2), ("f64", 8)):
        n = 16 // size
        for packs in PACKS:
            rows = 150 if packs <= 16 else 9 if packs <= 64 else 3
            # Alternate, so that each tier has both: full packs and aligned rows; a tail and rows at odd addresses.
            yield Case(rows, packs * n, dtype)
            yield Case(rows, packs * n + 1, dtype, rms=packs in (4, 64, 1024))
        yield Case(1, 9000 * n + n // 2, dtype, residual=True)


# Rows longer than a block's registers: (case, device). In shared memory, in that of a cluster of 2 to 8 blocks, in
# those of a team's blocks, in slices.
LONG = [
    (Case(3, 17000, "f16"), dict(arch=80)),
    (Case(3, 16400, "f32", residual=True), dict(arch=80)),
    (Case(2, 12000, "bf16", rms=True), dict(arch=86)),
    (Case(2, 16384, "f16"), dict(arch=70)),
    (Case(2, 16384, "f32", misalign=1), dict(arch=75)),
    (Case(2, 16384, "f32", residual=True, params="f32"), dict(arch=80)),
    (Case(5, 16384, "f32", rms=True), dict(arch=80)),
    (Case(3, 9216, "f32", weight=False, wanted=(True, False, True)), dict(arch=75)),
    (Case(9, 12288, "f32", bias=False, wanted=(False, True, False)), dict(arch=86)),
    (Case(4, 12002, "f16", params="f32", output="f32", residual=True), dict(arch=89)),
    (Case(3, 5000, "f64", misalign=1), dict(arch=70)),
    (Case(5, 4100, "f64"), dict(arch=90)),
    (Case(5, 10000, "f32", residual=True), dict(arch=90)),
    (Case(3, 33001, "bf16", rms=True), dict(arch=90)),
    (Case(2, 65536, "f16", params="f32", output="f32"), dict(arch=90)),
    (Case(9, 131072, "f16", residual=True), dict(arch=90)),
    (Case(1, 300000, "bf16", misalign=3), dict(arch=90)),
]


def policy_cases():
    for dtype in ("f32", "f16", "bf16", "f64"):
        wide = accumulate(dtype)
        # 304 are whole packs of every type.
        for rows, cols in ((70, 5), (9, 300), (9, 304), (5, 2300), (2, 70001 if dtype == "bf16" else 20000)):
            shape = Case(rows, cols, dtype)

            def case(shape=shape, **changes):
                return dataclasses.replace(shape, **changes)

            yield case(residual=True, bias=False)
            yield case(rms=True, residual=True, bias=False, wanted=(True, True, False))
            yield case(weight=False, bias=False, wanted=(True, False, False))
            yield case(weight=False, wanted=(False, False, True))
            yield case(wanted=(False, True, True), misalign=1)
            yield case(wanted=(True, False, True), stats=True, padding=3)
            yield case(stats=False, residual=True, misalign=3)
            if wide != dtype:
                yield case(params=wide, bias=False)
                yield case(params=wide, misalign=1)
                yield case(params=wide, output=wide, residual=True, padding=1)
                yield case(params=wide, output=wide, rms=True)


@pytest.mark.parametrize("case", list(tier_cases()), ids=str)
def test_tiers(kernels, case):
    run(kernels, case)


@pytest.mark.parametrize("case, pretended", LONG, ids=lambda part: str(part) if isinstance(part, Case) else "")
@pytest.mark.parametrize("sm_count", [2, 5, 64])
def test_long_rows(kernels, case, pretended, sm_count):
    run(kernels, case, **pretended, sm_count=sm_count)


@pytest.mark.parametrize("case", list(policy_cases()), ids=str)
def test_policies(kernels, case):
    run(kernels, case)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
@pytest.mark.parametrize("rows, cols", [(1, 1), (33, 7), (6, 129), (4, 1030), (1, 33000)])
def test_misaligned_rows(kernels, dtype, rows, cols):
    """However a row lies in memory, the same bits."""
    expected = None
    for misalign, padding, inner in ((0, 0, 0), (1, 0, 0), (2, 1, 0), (3, 5, 0), (0, 2, 2), (1, 0, 3)):
        case = Case(
            rows, cols, dtype, misalign=misalign, padding=padding, inner=inner if rows % max(inner, 1) == 0 else 0
        )
        case = dataclasses.replace(case, residual=True)
        _, results, _, _ = run(kernels, case)
        values = {name: r.array.copy() for name, r in results.items()}
        expected = expected or values
        for name, array in values.items():
            np.testing.assert_array_equal(array, expected[name], name)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("rows, cols", [(40, 24), (40, 260), (12, 3000), (2, 33000)])
@pytest.mark.parametrize("seed", [1, 2])
def test_order_of_execution(kernels, dtype, rows, cols, seed):
    """Whichever block, warp or lane comes first, and however many multiprocessors: no race, and the same bits."""
    case = Case(rows, cols, dtype, residual=True)
    _, expected, _, _ = run(kernels, case)
    _, results, _, _ = run(kernels, case, seed=seed)
    for name in results:
        np.testing.assert_array_equal(results[name].array, expected[name].array, name)
    _, results, _, _ = run(kernels, case, seed=seed, sm_count=17)
    for name in ("output", "sum", "stats", "grad_input"):
        np.testing.assert_array_equal(results[name].array, expected[name].array, name)


@pytest.mark.parametrize(
    "cols, dtype, blocks", [(9216, "f32", [5, 8, 4]), (16384, "f32", [8, 8, 4]), (10240, "bf16", [5, 4, 2])]
)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_team_gets_the_bits_of_a_block(kernels, cols, dtype, blocks, seed):
    """Forward, where there are teams and where not; backward, in whatever order the blocks run."""
    case = Case(7, cols, dtype, residual=True)
    *of_a_team, of_a_cluster = blocks  # to a row: forward's team, backward's team and cluster
    _, expected, forward, backward = run(kernels, case, arch=80, sm_count=5)
    assert [launch["cluster"] for launch in (forward[0], backward[0])] == of_a_team
    _, results, _, _ = run(kernels, case, arch=80, sm_count=5, seed=seed)
    for name in results:
        np.testing.assert_array_equal(results[name].array, expected[name].array, name)
    # On a newer device, and where not all of an older one is free.
    for device in (dict(arch=90), dict(arch=80, sm_count=5, room=3)):
        _, results, forward, backward = run(kernels, case, **device)
        assert forward[0]["cluster"] == 1 and backward[0]["cluster"] == (1 if "room" in device else of_a_cluster)
        for name in ("output", "sum", "stats"):
            np.testing.assert_array_equal(results[name].array, expected[name].array, name)
    _, results, _, _ = run(kernels, dataclasses.replace(case, misalign=1), arch=80, sm_count=5)
    for name in ("output", "sum", "stats", "grad_input"):
        np.testing.assert_array_equal(results[name].array, expected[name].array, name)


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("cols", [3, 40, 700, 2500, 40000])
def test_row_by_itself(kernels, dtype, cols):
    """A row's bits do not depend on how many rows stand beside it."""
    many = Case(5, cols, dtype)
    inputs, results, _, _ = run(kernels, many)
    one = dataclasses.replace(many, rows=1)
    for row in (0, 4):
        alone = {name: inputs[name] for name in ("weight", "bias")} | {"residual": None, "grad_sum": None}
        for name in ("input", "grad_output"):
            alone[name] = Rows(inputs[name].values[row : row + 1], dtype)
        kernels.reset()
        forward = kernels.forward(one, alone)
        backward = kernels.backward(one, alone, alone["input"], forward["stats"])
        np.testing.assert_array_equal(forward["output"].array[0, 0], results["output"].array[0, row])
        np.testing.assert_array_equal(backward["grad_input"].array[0, 0], results["grad_input"].array[0, row])


def test_many_rows(kernels):
    """More rows than any grid has groups; the count of ones is exact."""
    case = Case(3000, 24, "bf16")
    kernels.reset()
    inputs = kernels.inputs(case)
    inputs["grad_output"] = Rows(np.ones((case.rows, case.cols)), "bf16")
    forward = kernels.forward(case, inputs)
    backward = kernels.backward(case, inputs, inputs["input"], forward["stats"])
    assert not kernels.result()[0]
    np.testing.assert_array_equal(backward["grad_bias"].array, narrow(np.full((1, 1, 24), 3000.0), "bf16"))


# ---- no byte too many -----------------------------------------------------------------------------------------------


def total(launches, name, kind, what="bytes"):
    return sum(launch["arrays"].get(name, {}).get(kind, {}).get(what, 0) for launch in launches)


def size(rows):
    return rows.values.size * rows.array.itemsize


@counted
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("cols", [64, 768, 1024, 2048, 4096, 8192, 20000, 60000, 200000])
def test_traffic(kernels, dtype, cols, arch):
    """Inputs are read once (twice in the tier of slices), outputs are written once, in whole sectors."""
    case = Case(96 if cols < 1000 else 8 if cols < 10000 else 2, cols, dtype)
    inputs, results, forward, backward = run(kernels, case, arch=arch, sm_count=4)
    row_bytes = size(inputs["input"]) // case.rows
    for direction, launches, read, written in (
        ("forward", forward, ("input",), ("output", "stats")),
        ("backward", backward, ("input", "grad_output"), ("grad_input", "grad_weight", "grad_bias")),
    ):
        times = 2 if any(f"{direction}_slices" in launch["kernel"] for launch in launches) else 1
        if arch >= 90:  # a cluster keeps rows of 128 KiB
            assert times == 1 or row_bytes > 131072
        for name in read:
            # Besides, every warp looks at the row's first element, its pivot; those of a warp's rows lie apart.
            pivots = 0.05 if name == "input" else 0
            once = size(inputs[name])
            assert times * once <= total(launches, name, "read") <= times * once * (1 + pivots)
            assert max(launch["arrays"][name]["read"]["distinct"] for launch in launches) == once
            least = total(launches, name, "read", "fewest_sectors")
            assert total(launches, name, "read", "sectors") <= least * (1 + 3 * pivots) + (case.rows if pivots else 0)
        for name in written:
            assert total(launches, name, "write") == total(launches, name, "write", "distinct") == size(results[name])
        for name in ("output", "grad_input"):
            least = total(launches, name, "write", "fewest_sectors")
            assert total(launches, name, "write", "sectors") == least


@counted
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("cols", [769, 1023, 4097])
def test_sectors_of_misaligned_rows(kernels, dtype, cols):
    _, _, forward, backward = run(kernels, Case(8, cols, dtype, misalign=1))
    for launches in (forward, backward):
        for name in ("input", "grad_output", "output", "grad_input"):
            for kind in ("read", "write"):
                sectors = total(launches, name, kind, "sectors")
                assert sectors <= 1.1 * total(launches, name, kind, "fewest_sectors")


@counted
@pytest.mark.parametrize("dtype, sm_count", [("f32", 132), ("bf16", 122)])  # of 132, at 8,192 rows: test_launch_plan
def test_partials(kernels, dtype, sm_count):
    """Weight and bias gradients add at most 2% to what a backward of 8,192 x 4,096 moves."""
    case = Case(264, 4096, dtype)
    inputs, _, _, backward = run(kernels, case, sm_count=sm_count)
    rows = 8192
    moved = 3 * rows * size(inputs["input"]) // case.rows
    assert total(backward, "workspace", "write") <= 0.02 * moved
    # What is read back was written just before, and is still in the cache of a device with so many multiprocessors.
    assert total(backward, "workspace", "read") == total(backward, "workspace", "write")


# ---- faults planted in the kernels' own source ----------------------------------------------------------------------

# All but those that wait for a cluster's blocks to begin: here they all have.
BARRIER = re.compile(r"(?:__syncthreads|group_barrier|cluster\.sync)\([^;{}]*\);")

# name: (file, what stands there, what stands there instead, where FAULT is true if it is this one's turn, and the kind
# of report that is expected: "wrong" where nothing but the results can tell).
FAULTS = {
    "a tail loses its last element": (
        "pack.cuh",
        "if (e < left(v, group)) f(e);",
        "if (e < left(v, group) - FAULT) f(e);",
        "wrong",
    ),
    "packs beyond the row are touched": (
        "pack.cuh",
        "return v < SURE || left(v, group) > 0;",
        "return FAULT || v < SURE || left(v, group) > 0;",
        "global out of bounds",
    ),
    "a shuffle's mask names other lanes": (
        "group.cuh",
        "(kWidth == 32 ? 0 : index * kWidth % 32)",
        "(kWidth == 32 || FAULT ? 0 : index * kWidth % 32)",
        "absent lane",
    ),
    "row offsets have 32 bits": (
        "pack.cuh",
        "return row * map.inner_stride;",
        "return FAULT ? static_cast<int32_t>(row * map.inner_stride) : row * map.inner_stride;",
        "global out of bounds",
    ),
    "partials of weight and bias are swapped": (
        "backward.cuh",
        "(blockIdx.y == 0 ? p.grad_weight : p.grad_bias)",
        "(blockIdx.y == FAULT ? p.grad_weight : p.grad_bias)",
        "wrong",
    ),
    "the fold leaves out a partial": (
        "backward.cuh",
        "if (i + k * WARPS >= row_blocks) break;",
        "if (i + k * WARPS >= row_blocks - FAULT) break;",
        "wrong",
    ),
    "merged parts count as one of them": (
        "welford.cuh",
        "half_inverse *= A(0.5);",
        "if (!FAULT) half_inverse *= A(0.5);",
        "wrong",
    ),
    "the saved shift is not from the pivot": (
        "forward.cuh",
        "stats[row] = shift;",
        "stats[row] = FAULT ? A(0) : shift;",
        "wrong",
    ),
    "threads share a place in shared memory": (
        "forward.cuh",
        "kept += group.size) *kept = raw[v];",
        "kept += group.size - FAULT) *kept = raw[v];",
        "race",
    ),
    "a block keeps its moments from its cluster": (
        "forward.cuh",
        "*cluster.map(&moments[i], group.rank) = m;",
        "*cluster.map(&moments[i], FAULT ? first : group.rank) = m;",
        "race",
    ),
    "a block of a team tells the last exchange's number": (
        "cluster.cuh",
        "host::post(word, uint64_t(number) << 32 | value);",
        "host::post(word, uint64_t(number - FAULT) << 32 | value);",
        "stall",
    ),
    "a warp of a team takes what is there": (
        "cluster.cuh",
        "part[w]) != number) {",
        "part[w]) != number && !FAULT) {",
        "wrong",
    ),
    "the row after the last is loaded": (
        "backward.cuh",
        "if (kAhead && row + stride < Row(p.rows)) in",
        "if (kAhead && row + (FAULT ? 0 : stride) < Row(p.rows)) in",
        "global out of bounds",
    ),
    "reductions do not alternate": ("group.cuh", "turn ^= 1;", "turn ^= !FAULT;", "race"),
}


@pytest.fixture(scope="module")
def mutants():
    """Kernels of one data type in which any one barrier can be switched off, or a fault of FAULTS on; the names of
    what lnc_host_mutant = 1, 2 ... chooses, with the kind of report that should come of it."""
    planted = []

    def guard(match):
        planted.append((f"{path.name}:{match.string.count(chr(10), 0, match.start()) + 1} {match[0]}", "race"))
        return f"(lnc_host_mutant != {len(planted)} ? (void)({match[0][:-1]}) : (void)0);"

    source, target = build.ROOT / "csrc", build.OUTPUT / "mutants" / "csrc"
    copied = set()
    for path in [source / "cpu" / "cpu.h", *sorted((source / "kernels").iterdir())]:
        if path.suffix == ".cu" and "_" in path.name and "f32" not in path.name:
            continue
        text, copy = BARRIER.sub(guard, path.read_text()), target / path.relative_to(source)
        for name, (file, right, wrong, kind) in FAULTS.items():
            if file == path.name:
                assert text.count(right) == 1, f"{file}: {right}"
                planted.append((name, kind))
                text = text.replace(right, wrong.replace("FAULT", f"(lnc_host_mutant == {len(planted)})"))
        copied.add(copy)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists() or copy.read_text() != text:
            copy.write_text(text)
    for stale in set((target / "kernels").iterdir()) - copied:
        stale.unlink()
    return Kernels(build.mutants(target), lazy=True), planted


# As few as reach every barrier and every fault.
MUTANT_CASES = [
    (Case(70, 70, "f32"), {}),
    (Case(70, 300, "f32"), {}),
    (Case(30, 256, "f32"), {}),
    (Case(20, 1200, "f32"), {}),
    (Case(3, 5000, "f32"), {}),
    (Case(2, 16388, "f32"), dict(arch=80)),
    (Case(5, 16384, "f32"), dict(arch=80, sm_count=5)),
    (Case(5, 10000, "f32"), {}),
    (Case(3, 40000, "f32"), {}),
    (Case(2, 40000, "f32"), dict(sm_count=16)),
    (Case(2, 8, "f32", padding=1 << 31), {}),
]


def symptoms(kernels, case, device):
    """The kinds of reports, "wrong" where only the results are."""
    kernels.reset()
    kernels.device(**device)
    large = case.padding > 1 << 20
    kernels.check(races=not large, distinct=not large)
    inputs = kernels.inputs(case)
    forward = kernels.forward(case, inputs)
    backward = None
    if kernels.status == 0:
        backward = kernels.backward(case, inputs, inputs["input"], forward["stats"])
    kinds = {report.kind for report in kernels.result()[0]}
    kernels.check()
    if kinds or kernels.status:
        return kinds or {"status"}
    try:
        check_forward(case, inputs, forward)
        check_backward(case, inputs, inputs["input"], backward)
    except AssertionError:
        return {"wrong"}
    return set()


@counted
def test_planted_faults_are_found(mutants):
    """Every barrier removed in turn, every fault of FAULTS planted in turn, and none at all."""
    kernels, planted = mutants
    mutant = ctypes.c_int.in_dll(kernels.calls, "lnc_host_mutant")
    assert sum(kind == "race" for _, kind in planted) > len(FAULTS) / 2
    missed = {}
    try:
        for number, (name, kind) in enumerate([("nothing", None), *planted]):
            mutant.value = number
            seen = set()
            for case, device in MUTANT_CASES:
                seen |= symptoms(kernels, case, device)
                if kind in seen:
                    break
            if (kind not in seen) if kind else seen:
                missed[name] = seen
    finally:
        mutant.value = 0
    assert not missed


# ---- sanitizers -----------------------------------------------------------------------------------------------------


@counted
@pytest.mark.slow
def test_under_sanitizers():
    """The results of every tier again, under AddressSanitizer and UBSan."""
    library = subprocess.run([build.COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True)
    if "/" not in (asan := library.stdout.strip()):
        pytest.skip(f"{build.COMPILER} has no AddressSanitizer")
    path = str(build.sanitized())
    environment = dict(os.environ, LNC_HOST_SANITIZED=path, LD_PRELOAD=asan, ASAN_OPTIONS="detect_leaks=0")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--noconftest",
        __file__,
        "-k",
        "tiers or policies",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
