"""torch.compile, torch.export and opcheck: the kernel is one node of the graph, forward and backward."""

import pytest
import torch
from cases import BF16, F32, F64
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend

import layernorm_cuda as lnc

FORWARD, BACKWARD = torch.ops.layernorm_cuda.norm_forward.default, torch.ops.layernorm_cuda.norm_backward.default


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def targets(graphs):
    return [node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]


def step(function, x, *parameters):
    """Output and gradients."""
    tensors = [t.detach().clone().requires_grad_() for t in (x, *parameters)]
    y = function(*tensors)
    y = y if isinstance(y, torch.Tensor) else y[0].sin() * y[1].cos()
    return y.detach(), *torch.autograd.grad(y.square().sum(), tensors)


FUNCTIONS = {
    "layer_norm": lambda x, w, b: lnc.layer_norm(x, (8,), w, b),
    "rms_norm": lambda x, w, b: lnc.rms_norm(x, (8,), w) + b,
    "add_layer_norm": lambda x, w, b: lnc.add_layer_norm(x, x.sin(), (8,), w, b),
    "add_rms_norm": lambda x, w, b: lnc.add_rms_norm(x, x.sin(), (8,), w * b),
}


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_fullgraph(name, dtype):
    """One graph, no break; our operator is in it once for each direction; the values are eager's."""
    function = FUNCTIONS[name]
    x, w, b = torch.randn(3, 5, 8).to(dtype), torch.randn(8).to(dtype), torch.randn(8).to(dtype)
    backend = AotEagerAndRecordGraphs()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for got, want in zip(step(compiled, x, w, b), step(function, x, w, b), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)
    assert targets(backend.fw_graphs).count(FORWARD) == 1
    assert targets(backend.bw_graphs).count(BACKWARD) == 1
    assert not any("native_layer_norm" in str(t) for t in targets(backend.fw_graphs))


@pytest.mark.parametrize(("bias_dtype", "named"), [(BF16, None), (F32, F32)])
def test_a_bias_of_the_weights_dtype_names_none(bias_dtype, named):
    """Which costs a compiled graph's call more than a short row's arithmetic."""
    x, w, b = torch.randn(3, 5, 8).to(BF16), torch.randn(8).to(BF16), torch.randn(8).to(bias_dtype)
    backend = AotEagerAndRecordGraphs()
    grads = step(torch.compile(FUNCTIONS["layer_norm"], fullgraph=True, backend=backend), x, w, b)
    (call,) = [node for graph in backend.bw_graphs for node in graph.graph.nodes if node.target == BACKWARD]
    assert (call.args[8:] or (None,)) == (named,) and grads[3].dtype == bias_dtype


def test_without_gradients_no_statistics_are_asked_for():
    backend = AotEagerAndRecordGraphs()
    x = torch.randn(3, 8)
    compiled = torch.compile(FUNCTIONS["layer_norm"], fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, x[0], x[1]), FUNCTIONS["layer_norm"](x, x[0], x[1]))
    (node,) = [n for g in backend.fw_graphs for n in g.graph.nodes if n.target is FORWARD]
    assert node.args[7] is False  # save_stats


@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms_inside(name):
    x, w, b = torch.randn(2, 3, 8), torch.randn(8), torch.randn(8)

    def cubed(x):
        y = FUNCTIONS[name](x, w, b)
        return sum((t**3).sum() for t in ([y] if isinstance(y, torch.Tensor) else y))

    for transformed in (torch.func.grad(cubed), torch.vmap(torch.func.grad(cubed)), torch.func.jacrev(cubed)):
        compiled = torch.compile(transformed, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), transformed(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("module", [lnc.LayerNorm, lnc.RMSNorm])
def test_module(module):
    norm = module(8)
    x = torch.randn(3, 8)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    gradient = norm.weight.grad.clone()
    norm.weight.grad = None
    norm(x).sum().backward()
    torch.testing.assert_close(gradient, norm.weight.grad)


def test_dynamic_shapes():
    """Numbers of rows and columns are symbols: no compilation for each of them."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, w: lnc.layer_norm(x, x.shape[-1:], w), fullgraph=True, backend=counter, dynamic=True
    )
    for rows, cols in [(3, 8), (5, 8), (7, 16), (2, 33)]:
        x, w = torch.randn(rows, cols), torch.randn(cols)
        for got, want in zip(
            step(compiled, x, w), step(lambda x, w: lnc.layer_norm(x, x.shape[-1:], w), x, w), strict=True
        ):
            torch.testing.assert_close(got, want)
    assert counter.frame_count <= 2  # not one for each of the four shapes


def test_errors_while_compiling():
    compiled = torch.compile(lambda x: lnc.layer_norm(x, (7,)), backend="aot_eager")
    with pytest.raises(Exception, match="normalized_shape"):
        compiled(torch.randn(3, 8))


def test_autocast():
    def function(x, w):
        with torch.autocast("cpu", dtype=BF16):
            return lnc.layer_norm(x @ x.T, (4,), w)

    x, w = torch.randn(4, 4), torch.randn(4)
    got, want = torch.compile(function, fullgraph=True, backend="aot_eager")(x, w), function(x, w)
    assert got.dtype == want.dtype == BF16
    torch.testing.assert_close(got, want)


def test_export():
    """With a dynamic number of rows; the operator is in the exported program, and survives its file."""
    module = torch.nn.Sequential(lnc.LayerNorm(8), torch.nn.Linear(8, 8), lnc.RMSNorm(8)).eval()
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(module, (torch.randn(4, 8),), dynamic_shapes=({0: rows},))
    assert [str(n.target) for n in program.graph.nodes].count(str(FORWARD)) == 2
    x = torch.randn(9, 8)
    torch.testing.assert_close(program.module()(x), module(x))
    lowered = program.run_decompositions()
    assert [str(n.target) for n in lowered.graph.nodes].count(str(FORWARD)) == 2


@pytest.mark.slow
def test_inductor():
    """The default backend: our kernel between the ones it generates."""

    def function(x, w, b):
        return lnc.layer_norm(x * 2, (8,), w, b).relu()

    x, w, b = torch.randn(3, 8), torch.randn(8), torch.randn(8)
    for got, want in zip(step(torch.compile(function, fullgraph=True), x, w, b), step(function, x, w, b), strict=True):
        torch.testing.assert_close(got, want)


# ---- opcheck: schema, autograd registration, fake kernels, AOTDispatch ----------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("save_stats", [True, False])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rms", [False, True])
def test_opcheck_forward(rms, residual, save_stats, dtype):
    x, r = (torch.randn(3, 2, 8).to(dtype).requires_grad_(save_stats) for _ in range(2))
    w, b = (torch.randn(2, 8).to(dtype).requires_grad_(save_stats) for _ in range(2))
    arguments = (x, r if residual else None, [2, 8], w, None if rms else b, 1e-5, rms, save_stats, None)
    torch.library.opcheck(FORWARD, arguments)


@pytest.mark.parametrize("mask", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("rms", [False, True])
def test_opcheck_backward(rms, mask):
    x, dy, ds = (torch.randn(3, 8) for _ in range(3))
    w = torch.randn(8)
    stats = FORWARD(x, None, [8], w, None, 1e-5, rms, True, None)[2]
    torch.library.opcheck(BACKWARD, (dy, ds, x, [8], w, stats, rms, list(mask), F32))


def test_fake_kernels_are_exact():
    """Shapes, dtypes and strides for every combination, also where opcheck does not look: other dtypes, no rows."""
    for dtype, params in [(F32, F32), (BF16, F32), (F64, BF16)]:
        for shape in [(3, 4, 8), (0, 8), (8,)]:
            for rms in (False, True):
                for out in (None, F32 if dtype != F64 else F64):
                    x, w = torch.randn(shape).to(dtype), torch.randn(8).to(params)
                    arguments = (x, x, [8], w, None, 1e-5, rms, True, out)
                    real = FORWARD(*arguments)
                    meta = FORWARD(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments))
                    dy = torch.randn(shape).to(out or dtype)
                    back = (dy, None, x, [8], w, real[2], rms, [True, True, True], params)
                    real += BACKWARD(*back)
                    meta += BACKWARD(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in back))
                    for r, m in zip(real, meta, strict=True):
                        assert (r.shape, r.dtype, r.stride()) == (m.shape, m.dtype, m.stride())
