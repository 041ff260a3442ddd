"""The launch plan as users see it: data, for any architecture, without a GPU."""

import pytest
import torch
from cases import BACKEND

import layernorm_cuda as lnc

pytestmark = pytest.mark.skipif(BACKEND == "python", reason="the plan lives in the compiled module")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_has_a_plan_that_holds_it(direction, dtype):
    pack = 16 // dtype.itemsize
    for cols in [1, 2, 3, 8, 31, 64, 129, 768, 1000, 1024, 4096, 5120, 8192, 8193, 16384, 50257, 262144, 1 << 26]:
        for arch in ("sm_80", "sm_90"):
            plan = lnc.launch_plan(1000, cols, dtype, direction=direction, arch=arch)
            parts = plan.blocks_per_row if plan.tier == "team" and plan.slices == 1 else plan.slices
            capacity = plan.threads_per_row * plan.packs_per_thread * pack * parts
            assert capacity >= cols
            assert plan.threads <= 512 and plan.threads % plan.threads_per_row == 0
            assert plan.rows_per_block * plan.threads_per_row <= plan.threads
            assert plan.reason


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_row_is_shared_by_the_same_threads_in_any_batch(direction):
    for cols in [5, 768, 4096, 20_000, 100_000]:
        plans = [lnc.launch_plan(rows, cols, torch.bfloat16, direction=direction) for rows in (1, 7, 4096, 1 << 20)]
        assert len({(p.threads_per_row, p.packs_per_thread, p.slices) for p in plans}) == 1


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_alignment_changes_the_kernel_but_not_how_a_row_is_shared(direction, dtype):
    for cols in [16, 768, 1024, 4096, 100_000]:
        plans = [lnc.launch_plan(4096, cols, dtype, direction=direction, aligned=aligned) for aligned in (True, False)]
        assert [p.whole_packs for p in plans] == [True, False]
        assert len({(p.threads_per_row, p.packs_per_thread, p.slices, p.partials) for p in plans}) == 1
    assert not lnc.launch_plan(4096, 1001, dtype, direction=direction).whole_packs


def test_forward_walks_whole_rows_and_gives_others_a_group_each():
    # The next row is on its way only where rows are whole.
    assert lnc.launch_plan(1 << 20, 512, torch.float16).blocks < 132 * 16
    assert lnc.launch_plan(1 << 20, 512, torch.float16, aligned=False).blocks == (1 << 20) / 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_partials_stay_within_two_percent(dtype):
    rows, cols = 8192, 4096
    for arch, sm_count in (("sm_70", 80), ("sm_80", 108), ("sm_90", 132)):
        plan = lnc.launch_plan(rows, cols, dtype, direction="backward", arch=arch, sm_count=sm_count)
        assert plan.partials * 2 * cols * 4 <= 0.02 * 3 * rows * cols * dtype.itemsize
        assert plan.partials >= 0.9 * sm_count


def test_backward_fills_the_device():
    plan = lnc.launch_plan(8192, 1024, torch.float16, direction="backward", sm_count=132)
    assert plan.blocks == 132
    assert lnc.launch_plan(16, 768, torch.float32, direction="backward", sm_count=132).blocks == 16


@pytest.mark.parametrize(
    "direction, rows, cols, dtype, arch, tier",
    [
        ("forward", 4096, 512, torch.float32, "sm_90", "warp"),
        ("forward", 4096, 1024, torch.float32, "sm_90", "block"),
        ("forward", 4096, 1024, torch.float16, "sm_90", "block"),
        ("forward", 4096, 8192, torch.float32, "sm_70", "block"),
        ("forward", 128, 16384, torch.float32, "sm_70", "team"),
        ("forward", 4096, 9216, torch.float32, "sm_80", "team"),
        ("forward", 4096, 16384, torch.bfloat16, "sm_80", "team"),
        ("forward", 4096, 16384, torch.float32, "sm_90", "block"),
        ("forward", 4096, 32768, torch.bfloat16, "sm_80", "staged"),
        ("forward", 4096, 262144, torch.bfloat16, "sm_90", "cluster"),
        ("forward", 4096, 262144, torch.bfloat16, "sm_80", "slices"),
        ("forward", 1, 1 << 20, torch.bfloat16, "sm_90", "slices"),
        ("backward", 4096, 1024, torch.float16, "sm_90", "block"),
        ("backward", 128, 16384, torch.float32, "sm_70", "team"),
        ("backward", 4096, 32768, torch.float64, "sm_80", "slices"),
        ("backward", 128, 16384, torch.float32, "sm_90", "cluster"),
        ("backward", 128, 262144, torch.float32, "sm_90", "slices"),
    ],
)
def test_tiers(direction, rows, cols, dtype, arch, tier):
    plan = lnc.launch_plan(rows, cols, dtype, direction=direction, arch=arch)
    assert plan.tier == tier
    assert plan.shared_memory <= {"sm_70": 96, "sm_80": 163, "sm_90": 227}[arch] * 1024
    assert plan.blocks % plan.blocks_per_row == 0 and (plan.blocks_per_row > 1) == (tier in ("cluster", "team"))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("cols", [9216, 12288, 16384, 20000, 32768])
@pytest.mark.parametrize("arch, sm_count", [("sm_75", 40), ("sm_80", 108), ("sm_86", 82), ("sm_89", 7)])
def test_all_blocks_of_a_grid_of_teams_find_room(direction, cols, arch, sm_count):
    """At once: they wait for each other. 65,536 registers a multiprocessor, as many a thread as test_nvcc allows."""
    plan = lnc.launch_plan(4096, cols, torch.float32, direction=direction, arch=arch, sm_count=sm_count)
    if plan.tier != "team":
        assert (direction == "forward" and cols > 16384) or sm_count < 8
        return
    registers = 168 if direction == "forward" else 128
    assert plan.blocks <= sm_count * (65536 // (plan.threads * registers))
    assert plan.blocks >= 0.9 * sm_count - plan.blocks_per_row


def test_few_long_rows_have_a_block_each():
    assert lnc.launch_plan(8, 16384, torch.float32, arch="sm_80", sm_count=108).tier == "block"
    # As many teams as take the rows in even rounds: 67 find room.
    assert lnc.launch_plan(128, 16384, torch.float32, arch="sm_80", sm_count=108).blocks == 64 * 8


@pytest.mark.parametrize(
    "wrong",
    [
        dict(rows=0),
        dict(cols=0),
        dict(direction="sideways"),
        dict(dtype=torch.int32),
        dict(arch="volta"),
        dict(sm_count=0),
    ],
)
def test_wrong_arguments_are_named(wrong):
    arguments = dict(rows=4, cols=4, dtype=torch.float32) | wrong
    rows, cols, dtype = (arguments.pop(k) for k in ("rows", "cols", "dtype"))
    with pytest.raises(ValueError, match="launch_plan: "):
        lnc.launch_plan(rows, cols, dtype, **arguments)
