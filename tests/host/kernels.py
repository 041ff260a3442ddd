"""The real launchers over numpy arrays, with every array's bounds known to the machine.

bfloat16 values are kept in uint16 arrays; ``widen`` and ``narrow`` convert.
"""

import ctypes
from dataclasses import dataclass

import numpy as np

from . import Library

DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16, "f64": np.float64}
NUMBER = {"f32": 0, "f16": 1, "bf16": 2, "f64": 3}  # enum class DType


def accumulate(dtype):
    return "f64" if dtype == "f64" else "f32"


def widen(array, dtype):
    """As float64."""
    if dtype == "bf16":
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


def narrow(values, dtype):
    """Rounded to nearest even."""
    if dtype != "bf16":
        return values.astype(DTYPES[dtype])
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


class RowMap(ctypes.Structure):
    _fields_ = [("inner", ctypes.c_int64), ("inner_stride", ctypes.c_int64), ("outer_stride", ctypes.c_int64)]


def _fields(pointers, maps, last, enums):
    return (
        [(name, ctypes.c_void_p) for name in [*pointers, "workspace"]]
        + [(name, RowMap) for name in maps]
        + [("rows", ctypes.c_int64), ("cols", ctypes.c_int64), *last]
        + [(name, ctypes.c_int) for name in enums]
    )


ENUMS = ["dtype", "param_dtype", "output_dtype", "norm"]


class ForwardParams(ctypes.Structure):
    _fields_ = _fields(
        ["input", "residual", "weight", "bias", "output", "sum", "stats"],
        ["input_rows", "residual_rows"],
        [("eps", ctypes.c_double)],
        ENUMS,
    )


class BackwardParams(ctypes.Structure):
    _fields_ = _fields(
        ["grad_output", "grad_sum", "input", "weight", "stats", "grad_input", "grad_weight", "grad_bias"],
        ["grad_output_rows", "grad_sum_rows", "input_rows"],
        [],
        ENUMS,
    )


@dataclass(frozen=True)
class Case:
    """What to normalise. ``misalign``: elements by which arrays begin behind a multiple of 16 bytes; ``padding``:
    elements between rows; ``inner``: rows lie as in the transpose of a [rows / inner, inner] batch."""

    rows: int
    cols: int
    dtype: str = "f32"
    params: str = ""  # as dtype
    output: str = ""  # as dtype
    rms: bool = False
    residual: bool = False
    weight: bool = True
    bias: bool = True
    stats: bool = True
    wanted: tuple = (True, True, True)  # gradients of input, weight, bias
    misalign: int = 0
    padding: int = 0
    inner: int = 0
    mean: float = 1.0
    eps: float = 1e-5

    @property
    def param_dtype(self):
        return self.params or self.dtype

    @property
    def output_dtype(self):
        return self.output or self.dtype

    def __str__(self):
        shown = [f"{self.rows}x{self.cols}-{self.dtype}"]
        if self.params:
            shown.append(f"params:{self.params}")
        if self.output:
            shown.append(f"output:{self.output}")
        shown += [name for name in ("rms", "residual") if getattr(self, name)]
        shown += [f"no_{name}" for name in ("weight", "bias", "stats") if not getattr(self, name)]
        if self.wanted != (True, True, True):
            shown.append("wanted:" + "".join(str(int(w)) for w in self.wanted))
        shown += [f"{name}:{getattr(self, name)}" for name in ("misalign", "padding", "inner") if getattr(self, name)]
        return "-".join(shown)


class Rows:
    """An array of rows in memory of its own, placed as the case says; ``values`` in float64 as the dtype holds them."""

    LINE = 128

    def __init__(self, values, dtype, misalign=0, padding=0, inner=0):
        rows, cols = values.shape
        item = np.dtype(DTYPES[dtype]).itemsize
        stride = cols + padding
        count = rows * stride - padding
        self.memory = np.empty(count * item + misalign * item + self.LINE, np.uint8)
        self.start = -self.memory.ctypes.data % self.LINE + misalign * item
        flat = self.memory[self.start : self.start + count * item].view(DTYPES[dtype])
        inner = inner or rows
        outer = rows // inner
        self.map = RowMap(inner, outer * stride, stride)
        shape, strides = (outer, inner, cols), (stride * item, outer * stride * item, item)
        self.array = np.lib.stride_tricks.as_strided(flat, shape, strides)
        self.array[...] = narrow(values, dtype).reshape(shape)
        self.dtype, self.address, self.bytes = dtype, flat.ctypes.data, flat.nbytes

    def surroundings(self):
        """(address, bytes) of what belongs to no array."""
        begin, end = self.memory.ctypes.data, self.address + self.bytes
        return [(begin, self.start), (end, begin + self.memory.nbytes - end)]

    @property
    def values(self):
        return widen(self.array, self.dtype).reshape(-1, self.array.shape[2])


def outputs(rows, cols, dtype):
    return Rows(np.full((rows, cols), np.nan), dtype)


class Kernels(Library):
    def __init__(self, path, **mode):
        super().__init__(path, **mode)
        for name in ("lnc_host_forward", "lnc_host_backward"):
            getattr(self.calls, name).argtypes = [ctypes.c_void_p]
        self.poison = getattr(self.calls, "__asan_poison_memory_region", None)
        self.unpoison = getattr(self.calls, "__asan_unpoison_memory_region", None)

    def inputs(self, case, seed=0):
        """Everything that a forward and a backward read, by its name in the params."""
        random = np.random.default_rng([seed, case.rows, case.cols])
        shape = (case.rows, case.cols)
        m = case.misalign

        def rows(dtype, shift, misalign, padding=case.padding, shape=shape):
            return Rows(random.normal(shift, 1, shape), dtype, misalign, padding, case.inner if shape[0] > 1 else 0)

        made = {
            "input": rows(case.dtype, case.mean, m),
            "residual": rows(case.dtype, 0, 2 * m, case.padding * 2 * case.residual),
            "weight": rows(case.param_dtype, 1, 0, 0, (1, case.cols)),
            "bias": rows(case.param_dtype, 0, 0, 0, (1, case.cols)),
            "grad_output": rows(case.output_dtype, 0.5, 3 * m),
            "grad_sum": rows(case.dtype, 0, m, case.padding * 3 * case.residual),
        }
        for name, present in (("residual", case.residual), ("weight", case.weight), ("bias", case.bias)):
            if not present:
                made[name] = None
        if not case.residual:
            made["grad_sum"] = None
        return made

    def _run(self, call, params, case, read, written):
        for name, array in {**read, **written}.items():
            if array is None:
                continue
            self.array(name, array.address, array.bytes, "r" if name in read else "w")
            self._around(self.poison, array)
            setattr(params, name, array.address)
            if name in read and hasattr(params, name + "_rows"):
                setattr(params, name + "_rows", array.map)
        params.rows, params.cols, params.norm = case.rows, case.cols, int(case.rms)
        params.dtype, params.param_dtype = NUMBER[case.dtype], NUMBER[case.param_dtype]
        params.output_dtype = NUMBER[case.output_dtype]
        self.status = call(ctypes.addressof(params))
        for array in [*read.values(), *written.values()]:
            self._around(self.unpoison, array)  # numpy will use that memory again
        return written

    def _around(self, call, array):
        for address, size in array.surroundings() if call and array else ():
            call(ctypes.c_void_p(address), ctypes.c_size_t(size))

    def forward(self, case, inputs):
        """{"output", "sum", "stats"}: Rows, or None."""
        written = {
            "output": outputs(case.rows, case.cols, case.output_dtype),
            "sum": outputs(case.rows, case.cols, case.dtype) if case.residual else None,
            "stats": outputs(2 - case.rms, case.rows, accumulate(case.dtype)) if case.stats else None,
        }
        read = {name: inputs[name] for name in ("input", "residual", "weight", "bias")}
        return self._run(self.calls.lnc_host_forward, ForwardParams(eps=case.eps), case, read, written)

    def backward(self, case, inputs, x, stats):
        """{"grad_input", "grad_weight", "grad_bias"}: Rows, or None. x: the input, or the forward's sum."""
        shapes = {"grad_input": case.rows, "grad_weight": 1, "grad_bias": 1}
        dtypes = (case.dtype, case.param_dtype, case.param_dtype)
        written = {
            name: outputs(rows, case.cols, dtype) if wanted else None
            for (name, rows), dtype, wanted in zip(shapes.items(), dtypes, case.wanted, strict=True)
        }
        read = {name: inputs[name] for name in ("grad_output", "grad_sum", "weight")}
        read.update(input=x, stats=stats)
        return self._run(self.calls.lnc_host_backward, BackwardParams(), case, read, written)
