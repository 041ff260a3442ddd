"""Whatever hypothesis can think of: shapes, strides, dtypes, offsets, absent parameters; against native and float64."""

import math

import cases
import torch
import torch.nn.functional as F
from cases import DTYPES, F32, F64
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import truth

import layernorm_cuda as lnc

quick = settings(
    max_examples=25 if cases.BACKEND == "host" else 100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

sizes = st.one_of(st.integers(1, 6), st.sampled_from([7, 8, 16, 31, 33, 64]))
columns = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 256, 257, 769, 1024, 2049]))
dtypes = st.sampled_from(DTYPES)
maybe_dtype = st.one_of(st.none(), dtypes)


@st.composite
def problems(draw):
    leading = draw(st.lists(sizes, max_size=3))
    while math.prod(leading) > 300:
        leading.pop()
    extra = draw(st.lists(st.integers(1, 3), max_size=2))
    return dict(
        shape=(*leading, *extra, draw(columns)),
        dims=len(extra) + 1,
        dtype=draw(dtypes),
        weight=draw(maybe_dtype),
        bias=draw(maybe_dtype),
        layout=draw(st.sampled_from([None, *cases.LAYOUTS])),
        grad_layout=draw(st.sampled_from([None, *cases.LAYOUTS])),
        offset=draw(st.sampled_from([0.0, 1.0, -300.0, 1e4])),
        scale=draw(st.sampled_from([1.0, 1e-3, 100.0])),
        eps=draw(st.sampled_from([1e-5, 1e-3, 1.0])),
        seed=draw(st.integers(0, 2**16)),
        rms=draw(st.booleans()),
        residual=draw(st.booleans()),
        wanted=draw(st.tuples(st.booleans(), st.booleans(), st.booleans())),
    )


def laid_out(t, layout):
    return t if layout is None else cases.LAYOUTS[layout](t)


@given(problems())
@quick
def test_forward_and_backward(p):
    torch.manual_seed(p["seed"])
    shape, rms = p["shape"], p["rms"]
    normalized_shape = shape[len(shape) - p["dims"] :]

    def parameter(dtype, wanted):
        return None if dtype is None else torch.randn(normalized_shape).to(dtype).requires_grad_(wanted)

    values = torch.randn(shape) * p["scale"] + p["offset"]
    if p["dtype"] == torch.float16:
        values = values.clamp(-6e4, 6e4)
    x = laid_out(values.to(p["dtype"]), p["layout"]).requires_grad_(p["wanted"][0])
    w, b = parameter(p["weight"], p["wanted"][1]), None if rms else parameter(p["bias"], p["wanted"][2])
    dy = laid_out(torch.randn(shape).to(p["dtype"]), p["grad_layout"])
    y = lnc.rms_norm(x, normalized_shape, w, p["eps"]) if rms else lnc.layer_norm(x, normalized_shape, w, b, p["eps"])
    assert y.shape == x.shape and y.dtype == x.dtype and y.is_contiguous()
    y_true, *grads_true = truth(x, normalized_shape, w, b, p["eps"], rms, dy)
    cases.close(y, y_true, 4.0)

    # Where native is right and takes these dtypes at all, it agrees at its own tolerances.
    same = all(t is None or t.dtype == x.dtype for t in (w, b))
    if same and p["offset"] in (0.0, 1.0) and p["scale"] >= 1:
        native = (
            F.rms_norm(x, normalized_shape, w, p["eps"]) if rms else F.layer_norm(x, normalized_shape, w, b, p["eps"])
        )
        torch.testing.assert_close(y, native, check_stride=not rms or torch.__version__ >= (2, 13))

    wanted = [(t, want) for t, want in zip((x, w, b), grads_true, strict=True) if t is not None and t.requires_grad]
    assert y.requires_grad == bool(wanted)
    if not wanted:
        return
    rows = x.detach().double().reshape(-1, math.prod(normalized_shape))
    moment = rows.square().mean(1) if rms else rows.var(1, correction=0)
    rstd = (moment + p["eps"]).rsqrt().max().item()
    sums = 8 * len(rows) ** 0.5
    for grad, (t, want) in zip(torch.autograd.grad(y, [t for t, _ in wanted], dy), wanted, strict=True):
        assert grad.shape == t.shape and grad.dtype == t.dtype
        # dx is rstd times what is left of g after two projections; |weight| * |dy| stays below 20.
        cases.close(grad, want, 20 * rstd if t is x else sums, p["dtype"])


@given(problems(), maybe_dtype)
@quick
def test_residual(p, residual_dtype):
    torch.manual_seed(p["seed"])
    shape = p["shape"]
    normalized_shape = shape[len(shape) - p["dims"] :]
    x = laid_out((torch.randn(shape) * p["scale"] + p["offset"]).to(p["dtype"]), p["layout"])
    r = laid_out(torch.randn(shape).to(residual_dtype or p["dtype"]), p["grad_layout"])
    fused, plain = (lnc.add_rms_norm, lnc.rms_norm) if p["rms"] else (lnc.add_layer_norm, lnc.layer_norm)
    w = None if p["weight"] is None else torch.randn(normalized_shape).to(p["weight"])
    y, total = fused(x, r, normalized_shape, w, eps=p["eps"])
    assert torch.equal(total, x + r) and total.dtype == (x + r).dtype
    assert torch.equal(y, plain(total, normalized_shape, w, eps=p["eps"]))
    assert total.is_contiguous() and y.is_contiguous()


@given(st.integers(1, 40), st.integers(1, 300), st.sampled_from([F32, F64]), st.integers(0, 2**16), st.data())
@quick
def test_rows_are_independent(rows, cols, dtype, seed, data):
    torch.manual_seed(seed)
    x, dy = torch.randn(rows, cols, dtype=dtype), torch.randn(rows, cols, dtype=dtype)
    w, b = torch.randn(cols, dtype=dtype), torch.randn(cols, dtype=dtype)
    some = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=rows))
    results = []
    for x_, dy_ in ((x, dy), (x[some], dy[some])):
        x_ = x_.clone().requires_grad_()
        y = lnc.layer_norm(x_, (cols,), w, b)
        results.append((y.detach(), torch.autograd.grad(y, x_, dy_)[0]))
    for whole, part in zip(*results, strict=True):
        assert torch.equal(whole[some], part)
