"""Host execution itself: what small kernels compute there, and that each fault planted in one is caught."""

import ctypes

import host
import numpy as np
import pytest
from host import build

if reason := host.unsupported():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def library():
    return host.Library(build.toys())


@pytest.fixture
def run(library):
    """Runs a kernel over x; returns (y, reports, traffic of x and y)."""

    def run(name, x, y_size=None, *, grid=1, block=32, shared=0, cluster=1, n=None, variant=0, **device):
        x = np.ascontiguousarray(x, dtype=np.float32)
        y = np.full(len(x) if y_size is None else y_size, np.nan, dtype=np.float32)
        library.reset()
        library.device(**device)
        library.array("x", x.ctypes.data, x.nbytes, "r")
        library.array("y", y.ctypes.data, y.nbytes, "w")
        pointers = (ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data))
        status = library.calls.run_toy(name.encode(), grid, block, shared, cluster, *pointers, n or len(x), variant)
        reports, launches = library.result()
        assert (status != 0) == bool(reports)
        return y, reports, launches[-1]["arrays"] if launches else {}

    return run


def only(reports, kind):
    assert {r.kind for r in reports} == {kind}, [str(r) for r in reports]
    return reports[0]


NUMBERS = np.arange(128, dtype=np.float32)


# ---- what kernels compute


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("rows, cols, block", [(3, 100, 32), (2, 1000, 128), (1, 7, 256)])
def test_layer_norm(run, rows, cols, block, seed):
    x = np.random.default_rng(cols).normal(3, 2, (rows, cols)).astype(np.float32)
    y, reports, _ = run("layer_norm", x.ravel(), grid=rows, block=block, n=cols, seed=seed)
    exact = x.astype(np.float64)
    exact = (exact - exact.mean(1, keepdims=True)) / np.sqrt(exact.var(1, keepdims=True) + 1e-5)
    assert not reports
    assert np.abs(y.reshape(rows, cols) - exact).max() < 2e-6


@pytest.mark.parametrize("width", [1, 2, 8, 32])
def test_shuffles(run, width):
    y, reports, _ = run("shuffles", NUMBERS, 32 * 5 * 32, n=width)
    assert not reports
    lane = np.arange(32)
    first = lane & -width
    for k, (shfl, xor, up, down, vote) in enumerate(y.reshape(32, 5, 32)):
        assert (shfl == first + k % width).all()
        assert (xor == np.where((lane ^ k) < first + width, lane ^ k, lane)).all()
        assert (up == np.where(lane - k >= first, lane - k, lane)).all()
        assert (down == np.where(lane + k < first + width, lane + k, lane)).all()
        assert (vote == 1).all()


def test_sixteen_bit_conversions(library):
    torch = pytest.importorskip("torch")
    half, bfloat16 = np.empty(65536, np.float32), np.empty(65536, np.float32)
    library.calls.convert_floats(ctypes.c_void_p(half.ctypes.data), ctypes.c_void_p(bfloat16.ctypes.data))
    bits = np.arange(65536, dtype=np.uint16)
    np.testing.assert_array_equal(half, bits.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(bfloat16, (bits.astype(np.uint32) << 16).view(np.float32))
    # Every value of 16 bits, its neighbours, and the points half way between.
    values = [half, bfloat16]
    for v in (half, bfloat16):
        v = np.sort(v[np.isfinite(v)])
        middle = ((v[1:].astype(np.float64) + v[:-1]) / 2).astype(np.float32)
        values += [middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf))]
    values = np.concatenate([*values, np.float32([65519, 65520, 1e38, 3.4e38, 1e-45])])
    to_half, to_bfloat16 = np.empty(len(values), np.uint16), np.empty(len(values), np.uint16)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (values, to_half, to_bfloat16)]
    library.calls.convert_halves(*pointers, ctypes.c_int64(len(values)))
    tensor = torch.from_numpy(values)
    for ours, dtype in ((to_half, torch.float16), (to_bfloat16, torch.bfloat16)):
        ours = torch.from_numpy(ours.view(np.int16)).view(dtype).float()
        assert torch.equal(ours.nan_to_num(0.5), tensor.to(dtype).float().nan_to_num(0.5))


@pytest.mark.parametrize("variant", [0, 3])
def test_cluster(run, variant):
    y, reports, _ = run("cluster_sum", NUMBERS, grid=4, cluster=4, variant=variant)
    assert not reports
    np.testing.assert_array_equal(y.reshape(4, 32), np.tile(NUMBERS.reshape(4, 32).sum(0), (4, 1)))


def sum_in_a_team(run, **how):
    # Behind the 128 results lie as many words of 64 bits. They are to be zero, which run cannot give: NaN will do.
    return run("team_sum", NUMBERS, y_size=128 + 256, grid=4, cluster=4, arch=80, **how)


@pytest.mark.parametrize("seed", [0, 7])
def test_team(run, seed):
    y, reports, _ = sum_in_a_team(run, seed=seed)
    assert not reports
    np.testing.assert_array_equal(y[:128].reshape(4, 32), np.tile(NUMBERS.reshape(4, 32).sum(0), (4, 1)))


@pytest.mark.parametrize("name", ["reverse", "reuse", "exchange_lanes"])
@pytest.mark.parametrize("seed", [0, 7])
def test_ordered_accesses_are_no_race(run, name, seed):
    y, reports, _ = run(name, NUMBERS, block=128, seed=seed)
    assert not reports
    expected = {
        "reverse": NUMBERS[::-1],
        "reuse": 2 * NUMBERS,
        "exchange_lanes": NUMBERS.reshape(-1, 2)[:, ::-1].ravel(),
    }
    np.testing.assert_array_equal(y, expected[name])


def test_syncwarp_of_a_pair_orders_the_pair(run):
    assert not run("exchange_lanes", NUMBERS, block=128, variant=3)[1]


# ---- what is caught


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("name, variant", [("reverse", 1), ("reuse", 1), ("exchange_lanes", 1), ("exchange_lanes", 2)])
def test_race(run, name, variant, seed):
    # Whoever reads before the other has written also reads what nobody wrote.
    reports = run(name, NUMBERS, block=128, variant=variant, seed=seed)[1]
    assert {r.kind for r in reports} <= {"race", "uninitialised"}
    report = next(r for r in reports if r.kind == "race")
    assert name in report.message and "row" in report.message
    assert report.where.startswith("toys.cpp:")


@pytest.mark.parametrize("seed", [0, 7])
def test_race_between_blocks_of_a_cluster(run, seed):
    assert "race" in {r.kind for r in run("cluster_sum", NUMBERS, grid=4, cluster=4, variant=1, seed=seed)[1]}


def test_block_of_a_cluster_that_has_left(run):
    report = only(run("cluster_sum", NUMBERS, grid=4, cluster=4, variant=2)[1], "shared out of bounds")
    assert "has exited" in report.message


@pytest.mark.parametrize("seed", [0, 7])
def test_block_of_a_team_that_tells_nothing(run, seed):
    report = only(sum_in_a_team(run, variant=1, seed=seed)[1], "stall")
    assert "team_sum" in report.message and "none of those which run together writes" in report.message


def test_cluster_needs_an_architecture_that_has_them(run):
    report = only(run("cluster_sum", NUMBERS, grid=4, cluster=4, arch=80)[1], "invalid launch")
    assert "sm_90" in report.message


@pytest.mark.parametrize("variant, says", [(0, "have exited|has exited"), (1, "another waits in the one at toys.cpp")])
def test_divergent_barrier(run, variant, says):
    report = only(run("divergent_barrier", NUMBERS, block=64, variant=variant)[1], "divergent barrier")
    assert any(part in report.message for part in says.split("|"))


@pytest.mark.parametrize("seed", [0, 7])
def test_named_barrier(run, seed):
    y, reports, _ = run("exchange_warps", NUMBERS, block=128, seed=seed)
    assert not reports
    np.testing.assert_array_equal(y, np.concatenate([NUMBERS[32:64], NUMBERS[:32], NUMBERS[64:]]))


@pytest.mark.parametrize("variant, kinds", [(1, {"divergent barrier", "race"}), (2, {"divergent barrier"})])
def test_named_barrier_misused(run, variant, kinds):
    found = {r.kind for r in run("exchange_warps", NUMBERS, block=128, variant=variant, seed=3)[1]}
    assert found and found <= kinds | {"uninitialised"}


@pytest.mark.parametrize("variant", range(5))
def test_absent_lane(run, variant):
    report = only(run("absent_lane", NUMBERS, variant=variant)[1], "absent lane")
    assert "absent_lane" in report.message and "toys.cpp:" in report.message


@pytest.mark.parametrize("variant", range(5))
def test_out_of_bounds(run, variant):
    report = only(
        run("out_of_bounds", NUMBERS[:32], shared=128, variant=variant)[1],
        "shared out of bounds" if variant < 3 else "global out of bounds",
    )
    assert report.thread == (7, 0, 0)
    assert report.where.startswith("toys.cpp:")


@pytest.mark.parametrize("variant, kind", [(0, "uninitialised"), (1, "uninitialised"), (2, "write to an input")])
def test_undefined_memory(run, variant, kind):
    report = only(run("undefined_memory", NUMBERS[:32], variant=variant)[1], kind)
    assert variant != 0 or report.thread == (5, 0, 0)


def test_misaligned_vector(run):
    only(run("copy_vectors", NUMBERS, variant=1)[1], "misaligned")


def test_blocks_that_write_the_same(run):
    report = only(run("conflict", NUMBERS, grid=2)[1], "race")
    assert report.block == (1, 0, 0)


def test_invalid_launch(run):
    assert "1 to 1024 threads" in only(run("reverse", NUMBERS, block=1025)[1], "invalid launch").message
    assert "shared memory" in only(run("reverse", NUMBERS, shared=100 << 10, arch=86)[1], "invalid launch").message


# ---- what is counted


def aligned(count, offset=0):
    """float32 numbers that begin `offset` elements behind a multiple of 32 bytes."""
    memory = np.arange(count + 16, dtype=np.float32)
    start = -memory.ctypes.data // 4 % 8 + offset
    return memory[start : start + count]


def test_vector_copy_touches_every_byte_once(run):
    x = aligned(1000)
    _, reports, arrays = run("copy_vectors", x, 1024, grid=4, block=64)
    assert not reports
    for counts in (arrays["x"]["read"], arrays["y"]["write"]):
        assert counts["requests"] == 8
        assert counts["bytes"] == counts["distinct"] == 4000
    assert arrays["x"]["read"]["sectors"] == arrays["x"]["read"]["fewest_sectors"] == 125
    assert arrays["x"]["write"]["requests"] == arrays["y"]["read"]["requests"] == 0


@pytest.mark.parametrize("stride, bytes, sectors", [(0, 4, 1), (1, 128, 4), (2, 128, 8), (8, 128, 32)])
def test_sectors_of_a_strided_read(run, stride, bytes, sectors):
    x = aligned(32 * 8 + 32)
    _, reports, arrays = run("gather", x, 32, variant=stride)
    assert not reports
    assert arrays["x"]["read"]["requests"] == 1
    assert arrays["x"]["read"]["bytes"] == arrays["x"]["read"]["distinct"] == bytes
    assert arrays["x"]["read"]["sectors"] == sectors


def test_sectors_of_an_unaligned_read(run):
    _, _, arrays = run("gather", aligned(64, offset=3), 32, variant=1)
    assert (arrays["x"]["read"]["sectors"], arrays["x"]["read"]["fewest_sectors"]) == (5, 4)
