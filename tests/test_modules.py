"""The modules are ``torch.nn``'s: construction, state, conversion, and what PyTorch does to modules."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import layernorm_cuda as lnc

PAIRS = [(lnc.LayerNorm, nn.LayerNorm), (lnc.RMSNorm, nn.RMSNorm)]
ARGUMENTS = [
    ((8,), {}),
    (([2, 4],), {}),
    ((torch.Size([8]),), {"eps": 1e-3}),
    ((8,), {"elementwise_affine": False}),
    ((8,), {"dtype": torch.float64}),
    ((8,), {"dtype": torch.bfloat16, "device": "cpu"}),
]
LAYER_ARGUMENTS = [((8,), {"bias": False}), ((8, 1e-6, True, False), {}), ((8, 1e-6, False, True), {})]
MODULES = [(*pair, *args) for pair in PAIRS for args in ARGUMENTS] + [(*PAIRS[0], *args) for args in LAYER_ARGUMENTS]


def randomised(module):
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape))
    return module


def example(module):
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    return torch.randn(3, *module.normalized_shape).to(dtype)


@pytest.mark.parametrize("ours, native, args, kwargs", MODULES)
def test_construction(ours, native, args, kwargs):
    """Same attributes, parameters, initial values and representation, for every way to call it."""
    mine, theirs = ours(*args, **kwargs), native(*args, **kwargs)
    assert isinstance(mine, native)
    assert repr(mine) == repr(theirs) and mine.extra_repr() == theirs.extra_repr()
    assert mine.__constants__ == theirs.__constants__
    for name in ("normalized_shape", "eps", "elementwise_affine"):
        assert getattr(mine, name) == getattr(theirs, name)
    assert [n for n, _ in mine.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q) and p.dtype == q.dtype and p.requires_grad
    if ours is lnc.LayerNorm:
        assert (mine.bias is None) == (theirs.bias is None)


@pytest.mark.parametrize("ours, native, args, kwargs", MODULES)
def test_values_and_state_dict_both_ways(ours, native, args, kwargs):
    mine, theirs = ours(*args, **kwargs), randomised(native(*args, **kwargs))
    mine.load_state_dict(theirs.state_dict(), strict=True)
    x = example(mine)
    torch.testing.assert_close(mine(x), theirs(x))
    again = native(*args, **kwargs)
    again.load_state_dict(randomised(mine).state_dict(), strict=True)
    torch.testing.assert_close(again(x), mine(x))
    assert list(mine.state_dict()) == list(theirs.state_dict())
    assert mine.state_dict()._metadata == theirs.state_dict()._metadata


@pytest.mark.parametrize("ours, native", PAIRS)
def test_wrong_construction(ours, native):
    for args, kwargs in [((), {}), (("8",), {}), ((8.0,), {}), ((8,), {"bias_": True}), ((None,), {})]:
        with pytest.raises(Exception) as theirs:
            native(*args, **kwargs)
        with pytest.raises(type(theirs.value)):
            ours(*args, **kwargs)
    with pytest.raises(RuntimeError, match="_norm: "):
        ours(8)(torch.randn(3, 7))


@pytest.mark.parametrize("ours, native", PAIRS)
def test_copies(ours, native):
    """deepcopy, pickle, torch.save: same class, own parameters, same values."""
    module = randomised(ours((2, 4), eps=1e-4))
    x = example(module)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert type(other) is ours and repr(other) == repr(module)
        assert torch.equal(other(x), module(x))
        assert other.weight is not module.weight
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    fresh = native((2, 4), eps=1e-4)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    torch.testing.assert_close(fresh(x), module(x))


@pytest.mark.parametrize("ours, native", PAIRS)
def test_conversion(ours, native):
    module, theirs = ours(8), native(8)
    for convert in (
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
        lambda m: m.float().requires_grad_(False),
    ):
        module, theirs = convert(module), convert(theirs)
        x = example(module)
        y = module(x)
        assert y.dtype == theirs(x).dtype and module.weight.dtype == theirs.weight.dtype
        assert y.requires_grad == theirs(x).requires_grad
    assert module.train(False).training is False


@pytest.mark.parametrize("ours, native", PAIRS)
def test_meta_device(ours, native):
    """Built without memory, then given some and initialised: how large models are loaded."""
    module = ours(8, device="meta")
    assert module(torch.randn(3, 8, device="meta")).shape == (3, 8)
    assert module(torch.randn(3, 8, device="meta")).device.type == "meta"
    module = module.to_empty(device="cpu")
    module.reset_parameters()
    assert torch.equal(module.weight, torch.ones(8))
    x = torch.randn(3, 8)
    torch.testing.assert_close(module(x), native(8)(x))
    with torch.device("meta"):
        assert ours(8).weight.is_meta
    skipped = nn.utils.skip_init(ours, 8)
    skipped.load_state_dict(module.state_dict())
    assert torch.equal(skipped(x), module(x))
    assigned = ours(8, device="meta")
    assigned.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(assigned(x), module(x))


@pytest.mark.parametrize("ours, native", PAIRS)
def test_functional_call_and_stacking(ours, native):
    modules = [randomised(ours(8)) for _ in range(3)]
    x = torch.randn(4, 8)
    parameters = dict(modules[1].named_parameters())
    assert torch.equal(torch.func.functional_call(modules[0], parameters, (x,)), modules[1](x))
    stacked, _ = torch.func.stack_module_state(modules)
    y = torch.vmap(lambda p: torch.func.functional_call(modules[0], p, (x,)))(stacked)
    torch.testing.assert_close(y, torch.stack([m(x) for m in modules]))


@pytest.mark.parametrize("ours, native", PAIRS)
def test_parametrizations(ours, native):
    results = []
    for kind in (ours, native):
        torch.manual_seed(1)
        module = randomised(kind((3, 4), dtype=torch.float64))
        parametrizations.weight_norm(module, "weight")
        x = torch.randn(2, 3, 4, dtype=torch.float64)
        module(x).pow(2).sum().backward()
        results.append([p.grad for p in module.parameters()])
        parametrize.remove_parametrizations(module, "weight")
        results[-1].append(module(x))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("ours, native", PAIRS)
def test_hooks_and_training_step(ours, native):
    """A few optimiser steps end where native's end."""
    ends = []
    for kind in (ours, native):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(6, 8), kind(8), nn.ReLU(), nn.Linear(8, 1)).double()
        seen = []
        model[1].register_forward_hook(lambda module, args, output, seen=seen: seen.append(output.shape))
        model[1].register_full_backward_hook(lambda module, gi, go, seen=seen: seen.append(gi[0].shape))
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        x, y = torch.randn(16, 6, dtype=torch.float64), torch.randn(16, 1, dtype=torch.float64)
        for _ in range(5):
            optimiser.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimiser.step()
        assert seen == [torch.Size([16, 8])] * 10
        ends.append(model.state_dict())
    for a, b in zip(ends[0].values(), ends[1].values(), strict=True):
        torch.testing.assert_close(a, b)


def test_in_a_transformer_layer():
    """Where nn.TransformerEncoderLayer's own fast path looks at its norms' parameters."""
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
    x = torch.randn(2, 5, 16)
    expected = layer(x)
    for name in ("norm1", "norm2"):
        norm = lnc.LayerNorm(16)
        norm.load_state_dict(getattr(layer, name).state_dict())
        setattr(layer, name, norm)
    torch.testing.assert_close(layer(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(layer.eval()(x), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("ours, native", PAIRS)
def test_cuda(ours, native):
    module = randomised(ours(768)).cuda()
    theirs = native(768).cuda()
    theirs.load_state_dict(module.state_dict())
    x = torch.randn(8, 768, device="cuda")
    torch.testing.assert_close(module(x), theirs(x))
