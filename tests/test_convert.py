"""replace_norms, restore_norms and override: what is recognised, what is left alone, and what survives."""

import copy
import importlib
import io
import pickle
import re
import threading
import warnings
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from oracle import norm
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.utils import parametrize

import layernorm_cuda as lnc
from layernorm_cuda.convert import Converted

# ---- norms of other libraries, as they are written there ------------------------------------------------------------


class ApexLike(nn.Module):
    """The attributes of apex.normalization.FusedLayerNorm."""

    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, memory_efficient=False):
        super().__init__()
        self.normalized_shape = torch.Size((normalized_shape,))
        self.eps, self.elementwise_affine, self.memory_efficient = eps, elementwise_affine, memory_efficient
        self.weight, self.bias = nn.Parameter(torch.ones(normalized_shape)), nn.Parameter(torch.zeros(normalized_shape))

    def forward(self, input):
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class LigerLike(nn.Module):
    """The attributes of liger_kernel's LigerRMSNorm with the offset that Gemma has."""

    def __init__(self, hidden_size, eps=1e-6, offset=0.0, casting_mode="llama", in_place=True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon, self.offset, self.casting_mode, self.in_place = eps, offset, casting_mode, in_place

    def forward(self, hidden_states):
        scale = self.offset + self.weight.float()
        y = norm(hidden_states.float(), scale.shape, scale, eps=self.variance_epsilon, rms=True)
        return y.to(hidden_states.dtype)


class Scaled(nn.Module):
    """Other names for everything, the smallest epsilon written into forward, weight and bias in the other order."""

    def __init__(self, size):
        super().__init__()
        self.shift, self.g = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.ones(size))

    def forward(self, x):
        wide = x.float()
        return norm(wide, x.shape[-1:], self.g, self.shift, eps=1e-8).to(x.dtype)


class ScaledNorm(Scaled):
    pass


class WeightlessNorm(nn.Module):
    """As FalconMamba's: a buffer that forward does not read."""

    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(size), persistent=False)

    def forward(self, x):
        return norm(x.float(), x.shape[-1:], eps=self.eps, rms=True).to(x.dtype)


class PlainSubclass(nn.LayerNorm):
    pass


class FloatLayerNorm(nn.LayerNorm):
    """A common override: computes in float32 whatever comes."""

    def forward(self, x):
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


# Norms that are none of ours, each in one respect.


class ScalarNorm(Scaled):
    def forward(self, x):
        return self.g * x / (x.std(-1, keepdim=True) + 1e-6) + self.shift


class GatedNorm(PlainSubclass):
    def forward(self, x, gate=None):
        return super().forward(x) if gate is None else super().forward(x) * gate


class ChannelsFirst(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.transpose(1, -1)).transpose(1, -1)


class DetachedNorm(nn.LayerNorm):
    """The same values, another gradient."""

    def forward(self, x):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean.detach()) / (var.detach() + self.eps).sqrt() * self.weight + self.bias


class RememberingNorm(nn.LayerNorm):
    last = None

    def forward(self, x):
        if self.training:
            self.last = x.detach()
        return super().forward(x)


class AppendingNorm(nn.LayerNorm):
    def __init__(self, size):
        super().__init__(size)
        self.seen = []

    def forward(self, x):
        self.seen.append(x.shape)
        return super().forward(x)


class MaskedNorm(nn.RMSNorm):
    def __init__(self, size, mask):
        super().__init__(size, eps=1e-6)
        self.mask = mask

    def forward(self, x):
        return super().forward(x) * self.mask.to(x.dtype)


class VideoNorm(nn.LayerNorm):
    def forward(self, x):
        if x.dim() < 5:
            return super().forward(x)
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class OneScale(nn.Module):
    """A scale and a shift for all columns of rows of any length."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1)), 1e-5

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight + self.bias


class DefaultEps(nn.RMSNorm):
    pass


class BroadcastNorm(nn.Module):
    """Over the last of the dimensions where the weight has more than one element."""

    def __init__(self, *shape):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(shape)), 1e-6
        self.dim = next(i for i in reversed(range(-len(shape), 0)) if shape[i] != 1)

    def forward(self, x):
        wide = x.float()
        rstd = (wide.square().mean(self.dim, keepdim=True) + self.eps).rsqrt()
        return (wide * rstd * self.weight.float()).to(x.dtype)


class IntShape(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.normalized_shape, self.eps = size, 1e-5

    def forward(self, x):
        return F.layer_norm(x, (self.normalized_shape,), eps=self.eps)


class NoisyInTraining(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x + torch.randn_like(x) if self.training else x)


class OtherDtype(nn.RMSNorm):
    def forward(self, x):
        return super().forward(x.float())  # float32 out of bfloat16, whatever the weight


class StdNorm(nn.LayerNorm):
    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.std(-1, unbiased=False, keepdim=True) + self.eps) * self.weight + self.bias


def parametrized():
    module = nn.LayerNorm(8)
    parametrize.register_parametrization(module, "weight", nn.Softplus())
    return module


def instance_forward():
    module = nn.LayerNorm(8)
    module.forward = lambda x: x
    return module


def transformers_norm(model, name, *args):
    return getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)(*args)


def jitter(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) / 4)
    return model


KNOWN = {
    "T5": lambda: transformers_norm("t5", "T5LayerNorm", 24),
    "Llama": lambda: transformers_norm("llama", "LlamaRMSNorm", 24),
    "Mistral": lambda: transformers_norm("mistral", "MistralRMSNorm", 24),
    "Qwen3": lambda: transformers_norm("qwen3", "Qwen3RMSNorm", 24),
    "Gemma": lambda: transformers_norm("gemma", "GemmaRMSNorm", 24),
    "Gemma3": lambda: transformers_norm("gemma3", "Gemma3RMSNorm", 24),
    "OLMo, no parameters": lambda: transformers_norm("olmo", "OlmoLayerNorm", 24),
    "Llama 4, no parameters": lambda: transformers_norm("llama4", "Llama4TextL2Norm", 1e-6),
    "Apex": lambda: ApexLike(24),
    "Liger": lambda: LigerLike(24),
    "Liger, offset": lambda: LigerLike(24, offset=1.0),
    "other names": lambda: ScaledNorm(24),
    "buffer not used": lambda: WeightlessNorm(24),
    "subclass": lambda: PlainSubclass(24),
    "subclass, eps=None": lambda: DefaultEps(24),
    "weight of [1, H]": lambda: BroadcastNorm(1, 24),
    "normalized_shape an int": lambda: IntShape(24),
    "subclass, float32 inside": lambda: FloatLayerNorm(24),
}
UNKNOWN = {
    "scalar": (lambda: ScalarNorm(8), "something else"),
    "std plus eps": (lambda: StdNorm(8), "something else"),
    "gated": (lambda: GatedNorm(8), "more than the input"),
    "channels first": (lambda: ChannelsFirst(8), "something else|differs|fails"),
    "broadcast over positions": (lambda: BroadcastNorm(8, 1, 1), "rows of more elements"),
    "of three dimensions at least": (lambda: BroadcastNorm(1, 1, 8), "something else|differs"),
    "too large to try": (lambda: BroadcastNorm(2**20 + 1), "too much to try"),
    "remembering": (lambda: RememberingNorm(8), "changes attributes: last"),
    "appending": (lambda: AppendingNorm(8), "changes attributes: seen"),
    "of five dimensions another": (lambda: VideoNorm(8), "differs"),
    "one scale": (OneScale, "rows of more elements"),
    "detached": (lambda: DetachedNorm(8), "something else"),
    "noisy": (lambda: NoisyInTraining(8), "in training"),
    "dtype": (lambda: OtherDtype(8, eps=1e-6), "dtype of the output"),
    "parametrized": (parametrized, "parametrize"),
    "instance": (instance_forward, "on the instance"),
    "batch norm": (lambda: nn.BatchNorm1d(8), "weight, bias, running_mean"),
    "group norm": (lambda: nn.GroupNorm(2, 8), "something else"),
    "instance norm": (lambda: nn.InstanceNorm1d(8), "differs"),
    "TorchScript": (lambda: torch.jit.script(nn.LayerNorm(8)), "TorchScript"),
}
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {F32: 1e-5, BF16: 2**-6, F16: 2**-9}


# ---- what is recognised ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [nn.LayerNorm((3, 8)), nn.LayerNorm(8, bias=False), nn.RMSNorm(8)], ids=repr)
def test_native(module):
    model = nn.Sequential(nn.Linear(8, 8), module)
    (report,) = lnc.replace_norms(model)
    ours = lnc.LayerNorm if isinstance(module, nn.LayerNorm) else lnc.RMSNorm
    assert report == lnc.Replacement("1", type(module).__mro__[1], ours, True)
    assert str(report) == f"1: torch.{ours.__name__} -> layernorm_cuda.{ours.__name__}"
    assert type(model[1]) is ours
    assert model[1] is module


@pytest.mark.parametrize("make", KNOWN.values(), ids=KNOWN)
def test_other_libraries(make):
    """Found by what they compute: same values, gradients and output dtype for every pair of dtypes, and isinstance."""
    theirs = jitter(make())
    ours = copy.deepcopy(theirs)
    (report,) = lnc.replace_norms(ours)
    assert report.replaced, report
    assert report.name == ""
    assert isinstance(ours, type(theirs))
    assert isinstance(ours, Converted)
    x = torch.randn(4, 5, 24) + 0.5
    for dtype in TOLERANCE:
        theirs, ours = theirs.to(dtype), ours.to(dtype)
        for x_dtype in TOLERANCE:
            y = x.to(x_dtype)
            try:
                expected = theirs(y)
            except RuntimeError:  # native on the CPU refuses some pairs of dtypes
                continue
            tolerance = max(TOLERANCE[dtype], TOLERANCE[x_dtype], TOLERANCE[expected.dtype])
            torch.testing.assert_close(ours(y), expected, rtol=tolerance, atol=tolerance)
        theirs, ours = theirs.float(), ours.float()
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    upstream = torch.randn_like(x)
    grads = [
        torch.autograd.grad(module(y), [y, *module.parameters()], upstream)
        for module, y in zip((ours, theirs), inputs, strict=True)
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_called_by_keyword():
    module = KNOWN["Llama"]()
    lnc.replace_norms(module)
    x = torch.randn(2, 24)
    assert torch.equal(module(hidden_states=x), module(x))
    compiled = torch.compile(lambda x: module(hidden_states=x), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), module(x))


def test_called_wrongly():
    module = KNOWN["Llama"]()
    lnc.replace_norms(module)
    x = torch.randn(2, 24)
    for args, named, says in (((), {}, "hidden_states"), ((x, x), {}, "positional"), ((), {"foo": x}, "hidden_states")):
        with pytest.raises(TypeError, match=says):
            module(*args, **named)


def test_modules_that_differ_in_a_long_tensor():
    mask = torch.ones(2000)
    mask[500] = 0
    model = nn.Sequential(MaskedNorm(2000, torch.ones(2000)), MaskedNorm(2000, mask))
    assert [report.replaced for report in lnc.replace_norms(model)] == [True, False]


def test_where_values_cannot_be_looked_at():
    model = nn.Sequential(ApexLike(8), nn.LayerNorm(8))
    with FakeTensorMode():
        first, second = lnc.replace_norms(model)
    assert "could not be tried here: DataDependentOutputException" in first.reason
    assert second.replaced


def test_symbolic_trace():
    model = nn.Sequential(nn.LayerNorm(8), ApexLike(8), nn.RMSNorm(8))
    x = torch.randn(3, 8)
    expected = model(x)
    lnc.replace_norms(model)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)


@pytest.mark.parametrize(("make", "reason"), UNKNOWN.values(), ids=UNKNOWN)
def test_left_alone(make, reason):
    module = make()
    kind, state = type(module), copy.deepcopy(module.state_dict())
    (report,) = [r for r in lnc.replace_norms(nn.Sequential(module)) if "." not in r.name]
    assert not report.replaced
    assert report.before is report.after is type(module) is kind
    assert re.search(reason, report.reason), report.reason
    torch.testing.assert_close(module.state_dict(), state)
    assert f".{kind.__name__} left alone ({report.reason})" in str(report)
    assert not getattr(module, "seen", ())


def test_the_probe_leaves_no_trace():
    """No hook runs, no state, random number or gradient changes."""

    class Drawing(nn.LayerNorm):
        calls = 0

        def forward(self, x):
            torch.rand(3)
            return super().forward(x)

    class Counting(Drawing):
        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    for module in (Drawing(8), Counting(8)):
        ran = []
        module.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        random = torch.get_rng_state()
        with torch.no_grad():
            (report,) = lnc.replace_norms(module)
        assert report.replaced or report.reason == "its forward changes attributes: calls"
        assert report.replaced is not isinstance(module, Counting)
        assert (ran, module.calls, module.weight.grad) == ([], 0, None)
        assert torch.equal(torch.get_rng_state(), random)
    with torch.inference_mode():
        assert lnc.replace_norms(ApexLike(8))[0].replaced
    other = ApexLike(8)
    with torch.device("meta"):
        assert lnc.replace_norms(other)[0].replaced
    torch.set_default_dtype(torch.float16)
    try:
        assert lnc.replace_norms(ApexLike(8))[0].replaced
    finally:
        torch.set_default_dtype(torch.float32)


def test_lazy_modules():
    model = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LayerNorm(8))
    lazy, norm = lnc.replace_norms(model)
    assert "not initialised" in lazy.reason
    assert norm.replaced


def test_modules_without_norms():
    assert lnc.replace_norms(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Embedding(3, 4), nn.Dropout())) == []


def test_ours_stay_ours():
    model = nn.Sequential(lnc.LayerNorm(8), lnc.AddRMSNorm(8), ApexLike(8), lnc.LayerNormGRUCell(4, 8))
    lnc.replace_norms(model)
    again = lnc.replace_norms(model)
    assert len(again) == 7
    assert {(r.replaced, r.reason) for r in again} == {(False, "already ours")}
    back = {r.name: r for r in lnc.restore_norms(model)}
    assert back["2"].replaced
    assert type(model[0]) is lnc.LayerNorm
    assert not back["0"].replaced
    assert back["0"].reason == "not put here by replace_norms"


# ---- what survives --------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.norm = nn.LayerNorm(16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)) for _ in range(2))
        self.shared = self.norm  # one module, two places
        self.tied = nn.RMSNorm(16)
        self.tied.weight = self.blocks[0][0].weight  # one parameter, two modules
        self.foreign = LigerLike(16)

    def forward(self, tokens):
        x = self.norm(self.embed(tokens))
        for block in self.blocks:
            x = x + block(x)
        return self.foreign(self.tied(self.shared(x)))


def test_everything_else_survives():
    model = jitter(Model())
    model.blocks[0][0].weight.requires_grad_(False)
    model.blocks[1].eval()
    model.norm.note = "mine"
    seen = []
    model.norm.register_forward_pre_hook(lambda *_: seen.append("pre"))
    model.norm.register_forward_hook(lambda *_: seen.append("forward"))
    model.norm.register_full_backward_hook(lambda *_: seen.append("backward"))
    model.norm.register_state_dict_post_hook(lambda *_: seen.append("state"))
    model.norm.register_load_state_dict_pre_hook(lambda *_: seen.append("load"))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    training = [m.training for m in model.modules()]
    keys, tokens = list(model.state_dict()), torch.randint(20, (2, 5))
    expected = model(tokens)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen.clear()

    report = lnc.replace_norms(model)
    assert [r.name for r in report if r.replaced] == ["norm", "blocks.0.0", "blocks.1.0", "tied", "foreign"]
    assert len(report) == 5
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(parameters)
    assert all(after[name] is p for name, p in parameters.items())
    assert all(m is modules[name] for name, m in model.named_modules(remove_duplicate=False))
    assert model.shared is model.norm
    assert model.tied.weight is model.blocks[0][0].weight
    assert not model.tied.weight.requires_grad
    assert model.norm.note == "mine"
    assert [m.training for m in model.modules()] == training
    assert list(model.state_dict()) == keys
    model.load_state_dict(model.state_dict())
    output = model(tokens)
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    assert sorted(set(seen)) == ["backward", "forward", "load", "pre", "state"]
    assert seen.count("forward") == 2
    optimizer.step()
    assert not torch.equal(model(tokens), expected)


def test_restore():
    model = jitter(Model())
    state, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    tokens = torch.randint(20, (2, 5))
    expected = model(tokens)
    replaced = lnc.replace_norms(model)
    restored = lnc.restore_norms(model)
    assert [(r.name, r.before, r.after) for r in restored] == [(r.name, r.after, r.before) for r in replaced]
    assert [type(m) for m in model.modules()] == kinds
    assert [set(vars(m)) for m in model.modules()] == attributes
    torch.testing.assert_close(model.state_dict(), state)
    assert torch.equal(model(tokens), expected)
    assert lnc.restore_norms(model) == []


def test_restore_leaves_a_forward_of_the_instance():
    module = KNOWN["Llama"]()
    lnc.replace_norms(module)
    inner = module.forward
    module.forward = lambda x: inner(x)  # as accelerate's hooks do
    assert "on the instance" in lnc.restore_norms(module)[0].reason
    module(torch.randn(2, 24))
    del module.forward
    assert lnc.restore_norms(module)[0].replaced


def test_dtype_under_cuda_autocast():
    """Tensors without data: what theirs gives there is known on any machine."""
    same = {"T5": True, "Llama": True, "Gemma": True, "subclass": False}
    for name, expected in same.items():
        module = KNOWN[name]()
        lnc.replace_norms(module)
        assert module.recipe.autocast is expected, name


def test_tracing_with_a_weight_of_another_dtype():
    module = transformers_norm("nemotron", "NemotronLayerNorm1P", 24).bfloat16()
    x = torch.randn(2, 24).bfloat16()
    expected = module(x)
    lnc.replace_norms(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(module, x)
    torch.testing.assert_close(traced(x), expected)


def test_restore_after_another_change_of_class():
    model = nn.Sequential(nn.LayerNorm(8))
    lnc.replace_norms(model)
    parametrize.register_parametrization(model[0], "weight", nn.Softplus())
    (report,) = [r for r in lnc.restore_norms(model) if r.name == "0"]
    assert not report.replaced
    assert "undo that first" in report.reason
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is lnc.LayerNorm
    assert lnc.restore_norms(model)[0].replaced
    assert type(model[0]) is nn.LayerNorm


@pytest.mark.parametrize("make", [nn.LayerNorm, ApexLike, LigerLike], ids=lambda c: c.__name__)
def test_copied_and_saved(make):
    module = jitter(make(8))
    lnc.replace_norms(module)
    x = torch.randn(3, 8)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), copy.copy(module), torch.load(file, weights_only=False)):
        assert type(other) is type(module)
        assert torch.equal(other(x), module(x))
        assert lnc.restore_norms(other)[0].replaced
        assert type(other) is make
    assert type(module) is not make


def test_saved_as_the_original_is():
    """Compiled, it leaves what was compiled behind; parametrized, it refuses."""
    module = KNOWN["Llama"]()
    lnc.replace_norms(module)
    module.compile(backend="eager")
    assert type(pickle.loads(pickle.dumps(module))) is type(module)
    parametrize.register_parametrization(module, "weight", nn.Softplus())
    with pytest.raises(RuntimeError, match="parametrized"):
        pickle.dumps(module)


def test_dtype_and_device_changes_after():
    module = KNOWN["T5"]()
    lnc.replace_norms(module)
    assert module(torch.randn(2, 24, dtype=BF16)).dtype == F32
    assert module.to(BF16)(torch.randn(2, 24)).dtype == BF16
    assert module.to("meta")(torch.randn(2, 24, device="meta")).shape == (2, 24)
    module.variance_epsilon = 1.0
    module = module.to_empty(device="cpu").float()
    nn.init.ones_(module.weight)
    x = torch.randn(2, 24)
    torch.testing.assert_close(module(x), norm(x, (24,), eps=1.0, rms=True))


def test_compile():
    model = jitter(nn.Sequential(Model(), nn.Linear(16, 24), KNOWN["Gemma"]()))
    tokens = torch.randint(20, (2, 5))
    expected = model(tokens)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), expected)
    for change in (lnc.replace_norms, lnc.restore_norms):  # the graph of before must not be taken again
        with calls() as seen:
            assert all(r.replaced for r in change(compiled))
            torch.testing.assert_close(compiled(tokens), expected)
        assert bool(seen) == (change is lnc.replace_norms)


# ---- PyTorch's own stacks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder(norm_first):
    """Training runs ours. So does inference without the fast path, which reads the parameters and calls no norm."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=not norm_first)
    jitter(model)
    x, padding = torch.randn(3, 5, 16), torch.arange(5) >= torch.tensor([5, 3, 4])[:, None]
    modes = [(True, True), (False, True), (False, False)]

    def run(training, fast):
        torch.backends.mha.set_fastpath_enabled(fast)
        model.train(training)
        with torch.set_grad_enabled(training), calls() as seen:
            try:
                y = model(x, src_key_padding_mask=padding)
            finally:
                torch.backends.mha.set_fastpath_enabled(True)
        return y.masked_fill(padding[..., None], 0), len(seen)

    expected = [run(*mode)[0] for mode in modes]
    report = lnc.replace_norms(model)
    in_fast_path = [r.name for r in report if "fast path" in r.reason]
    assert in_fast_path == ["layers.0.norm1", "layers.0.norm2", "layers.1.norm1", "layers.1.norm2"]
    assert all(r.replaced for r in report)
    found = [run(*mode) for mode in modes]
    for (y, _), other in zip(found, expected, strict=True):
        torch.testing.assert_close(y, other)
    assert [count for _, count in found] == [5, 1, 5]  # of the fast path, only the norm after the last layer


def test_multihead_attention_stack():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x):
            y = self.norm(x)
            return x + self.attention(y, y, y, need_weights=False)[0]

    model = jitter(nn.Sequential(Block(), Block(), nn.TransformerDecoderLayer(16, 2, 32, 0.0, batch_first=True).norm1))
    x = torch.randn(2, 5, 16)
    for training in (True, False):
        model.train(training)
        expected = model(x)
        assert len(lnc.replace_norms(model)) == 3
        torch.testing.assert_close(model(x), expected)
        lnc.restore_norms(model)


# ---- override -------------------------------------------------------------------------------------------------------


@contextmanager
def calls():
    """The operators of ours that run inside, by name."""
    seen = []
    # Eager calls pass the dispatcher by: send them through it, where the profiler sees them.
    with (
        mock.patch.object(lnc._ops, "norm", lambda *args: None, create=True),
        mock.patch.object(lnc._ops, "norm_forward", lambda *args: torch.ops.layernorm_cuda.norm_forward(*args)),
        torch.autograd.profiler.profile() as profile,
    ):
        yield seen
    seen += [event.name for event in profile.function_events if event.name.startswith("layernorm_cuda::")]


def ran(function, *args):
    with calls() as seen, torch.no_grad():
        function(*args)
    return bool(seen)


def test_override():
    x, model = torch.randn(3, 8), nn.Sequential(nn.LayerNorm(8), nn.RMSNorm(8))
    native = F.layer_norm, F.rms_norm
    expected = model(x), F.layer_norm(x, (8,)), F.rms_norm(x, (8,))
    with lnc.override():
        assert (F.layer_norm, F.rms_norm) == (lnc.layer_norm, lnc.rms_norm)
        torch.testing.assert_close((model(x), F.layer_norm(x, (8,)), F.rms_norm(x, (8,))), expected)
        assert ran(model, x)
        with lnc.override():
            assert ran(F.rms_norm, x, (8,))
        assert ran(F.layer_norm, x, (8,))
    assert (F.layer_norm, F.rms_norm) == native
    assert not ran(model, x)
    with pytest.raises(ZeroDivisionError), lnc.override():
        1 / 0  # noqa: B018
    assert (F.layer_norm, F.rms_norm) == native

    @lnc.override()
    def decorated():
        return ran(model, x)

    assert decorated()
    assert decorated()
    assert (F.layer_norm, F.rms_norm) == native


def test_override_of_threads_that_overlap():
    """Whoever leaves first does not take it from the other, and the last one puts back what was there."""
    native, entered, leave = F.layer_norm, threading.Event(), threading.Event()

    def other():
        with lnc.override():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with lnc.override():
        thread.start()
        assert entered.wait(10)
    assert F.layer_norm is lnc.layer_norm
    leave.set()
    thread.join()
    assert F.layer_norm is native


def test_override_and_torch_function():
    """Tensor subclasses, modes and tensors that are not ours to compute go the same way as without."""
    x = torch.randn(3, 8)
    nested = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)], layout=torch.jagged)
    with lnc.override():
        with torch.device("cpu"):
            assert ran(F.layer_norm, x, (8,))
        assert F.layer_norm(nested, (8,)).is_nested
        assert isinstance(F.layer_norm(nn.Parameter(x), [8]), torch.Tensor)


def test_override_and_compile():
    model, x = nn.LayerNorm(8), torch.randn(3, 8)
    for first in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for inside in (first, not first, first):
            if inside:
                with lnc.override():
                    assert ran(compiled, x)
            else:
                assert not ran(compiled, x)
