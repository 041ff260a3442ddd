"""Models that leave Python, by TorchScript or ONNX: PyTorch's own operator stands in a graph that runs without us."""

import io

import pytest
import torch

import layernorm_cuda as lnc

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


class AddNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = lnc.AddLayerNorm(8)

    def forward(self, x):
        return sum(self.norm(x, x))


def model():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.LayerNorm(8, bias=False), torch.nn.RMSNorm(8)
    ).eval()
    lnc.replace_norms(layers)
    return layers


def reloaded(script):
    file = io.BytesIO()
    torch.jit.save(script, file)
    file.seek(0)
    return torch.jit.load(file)


def operators(script):
    return {node.kind() for node in script.inlined_graph.nodes() if "norm" in node.kind()}


@pytest.mark.parametrize("differentiable", [False, True], ids=["no_grad", "grad"])
def test_torchscript_trace(differentiable):
    module, x = model(), torch.randn(3, 8)
    with torch.set_grad_enabled(differentiable):
        script = torch.jit.trace(module, x)
    assert operators(script) == {"aten::layer_norm", "aten::rms_norm"}
    torch.testing.assert_close(reloaded(script)(x), module(x))


@pytest.mark.parametrize("norm", [lnc.LayerNorm, lnc.RMSNorm])
def test_torchscript_trace_of_two_dtypes(norm):
    module, x = norm(8).bfloat16(), torch.randn(3, 8)
    script = torch.jit.trace(module, x)
    assert script(x).dtype == module(x).dtype
    torch.testing.assert_close(script(x), module(x))


def test_torchscript_trace_of_a_residual_norm():
    module, x = AddNorm(), torch.randn(3, 8)
    torch.testing.assert_close(reloaded(torch.jit.trace(module, x))(x), module(x))


def test_torchscript_script():
    module, x = model(), torch.randn(3, 8)
    module.append(lnc.RMSNorm(8, zero_centered=True))
    torch.nn.init.normal_(module[-1].weight)
    script = torch.jit.script(module)
    assert operators(script) == {"aten::layer_norm", "aten::rms_norm"}
    torch.testing.assert_close(reloaded(script)(x), module(x))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dynamo"), [(model, True), (AddNorm, True), (AddNorm, False)])
def test_onnx(kind, dynamo, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: PyTorch exports no ONNX without it")
    if dynamo and torch.__version__ < (2, 8):
        pytest.skip("before torch 2.8 nothing tells a module that this exporter runs: our operator stands in its graph")
    from onnx.reference import ReferenceEvaluator

    module, x, file = kind().eval(), torch.randn(3, 8), str(tmp_path / "model.onnx")
    torch.onnx.export(module, (x,), file, dynamo=dynamo, input_names=["x"])
    (y,) = ReferenceEvaluator(file).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), module(x).detach(), rtol=1e-4, atol=1e-5)
