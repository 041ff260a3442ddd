"""The one table: shapes, dtypes and tolerances, each with its reason."""

import math
import os

import torch

BACKEND = os.environ.get("LAYERNORM_CUDA_TEST_BACKEND", "")

# ---- dtypes ---------------------------------------------------------------------------------------------------------

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
DTYPES = [F64, F32, F16, BF16]

# Every kernel has its parameters in the input's dtype or in the accumulation type; the rest is converted before.
PARAM_DTYPES = [(t, t) for t in DTYPES] + [
    (BF16, F32),  # the usual mixed precision
    (F16, F32),
    (F32, BF16),  # parameters narrower than the input: refused by native
    (F64, F32),
    (BF16, F16),  # neither holds the other
    (F16, F64),
]

# ---- tolerances -----------------------------------------------------------------------------------------------------

# Against native: torch.testing.assert_close as it is, which PyTorch's own tests of these operators use.

# Against float64: the right result rounded once to the dtype, half a unit in its last place, after arithmetic
# in the accumulation type that costs a few of that type's.
ROUNDING = {F64: 2.0**-53, F32: 2.0**-24, F16: 2.0**-11, BF16: 2.0**-8}
ARITHMETIC = {F64: 2e-14, F32: 4e-6, F16: 4e-6, BF16: 4e-6}

# DESIGN section 3, float32 and 4,096 columns.
OFFSET_ERROR = 2e-6
OUTLIER_ERROR = 5e-5


def close(actual, truth, scale=1.0, input=None):
    """Whether ``actual`` is ``truth`` (float64) computed in the accumulation type and rounded once.

    ``scale`` is the size of what was added up on the way, where that is more than the result's own size; ``input``
    the dtype that decides on the accumulation type, where it is not that of ``actual``.
    """
    arithmetic = ARITHMETIC[input or actual.dtype]
    rtol, atol = ROUNDING[actual.dtype] * 1.01 + arithmetic, arithmetic * scale + torch.finfo(actual.dtype).tiny
    torch.testing.assert_close(actual.double(), truth.double(), rtol=rtol, atol=atol)


# ---- shapes ---------------------------------------------------------------------------------------------------------

# (input shape, number of normalised dimensions)
SHAPES = [
    # ragged row lengths: around the vector widths (4 to 16), a warp (32), packs of it, and the tiers of the kernels
    *(((5, cols), 1) for cols in (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 127, 128, 129, 255, 257, 512, 769)),
    *(((3, cols), 1) for cols in (768, 1000, 1023, 1024, 1025, 2048, 3001, 4096, 4097)),
    ((2, 8192), 1),
    ((1, 12289), 1),  # longer than a block keeps in registers
    # row counts: one, around the vector widths, more than a grid or a thread's share
    *(((rows, 24), 1) for rows in (1, 2, 9, 64, 65, 1000)),
    ((700, 3), 1),
    ((1, 1), 1),
    # every rank, with one to all dimensions normalised
    ((6,), 1),
    ((2, 3, 20), 1),
    ((2, 3, 4, 10), 1),
    ((2, 1, 3, 2, 6), 1),
    ((4, 6), 2),
    ((3, 4, 6), 2),
    ((2, 3, 4, 5), 2),
    ((2, 3, 4, 5), 3),
    ((2, 3, 2, 3, 5), 4),
    ((1, 7, 1, 1), 3),
]
EMPTY = [((0, 8), 1), ((3, 0), 1), ((0, 0), 1), ((2, 0, 5), 1), ((2, 0, 5), 2), ((0, 3, 4), 2), ((0,), 1)]

# A few of the above that stand for all, where a test goes deep instead of wide.
FEW = [((4, 5), 1), ((3, 33), 1), ((2, 3, 769), 1), ((2, 3, 4, 5), 2), ((9, 1024), 1), ((2, 4100), 1)]


def big(rows, host=4096):
    """``rows``, or as many of them as show the same thing where every CUDA thread is executed by the CPU."""
    return min(rows, host) if BACKEND == "host" else rows


def name(value):
    """How a case is called in a test's id."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], tuple):
        return "x".join(map(str, value[0])) + (f"/{value[1]}" if value[1] > 1 else "")
    if isinstance(value, tuple):
        return "-".join(name(v) or str(v) for v in value)
    return None


# ---- layouts: the same values, otherwise laid out in memory ---------------------------------------------------------


def _padded(x):
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), math.nan)
    wide[..., 1 : 1 + x.shape[-1]] = x
    return wide[..., 1 : 1 + x.shape[-1]]


def _every_other(x):
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), math.nan)
    wide[..., ::2] = x
    return wide[..., ::2]


def _other_rows(x):
    if x.dim() == 1:
        return x.clone()
    wide = x.new_full((2 * x.shape[0], *x.shape[1:]), math.nan)
    wide[1::2] = x
    return wide[1::2]


def _transposed(x):
    """Dense in memory, dimensions in the opposite order: the last one is not contiguous."""
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def _batch_transposed(x):
    """[sequence, batch, features] seen as [batch, sequence, features]."""
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 2 else x.clone()


def _misaligned(x):
    wide = x.new_full((x.numel() + 1,), math.nan)
    wide[1:] = x.reshape(-1)
    return wide[1:].view(x.shape)


LAYOUTS = {
    "padded": _padded,
    "every other column": _every_other,
    "every other row": _other_rows,
    "transposed": _transposed,
    "batch transposed": _batch_transposed,
    "misaligned": _misaligned,
}
