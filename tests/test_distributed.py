"""Modules of ours under torch.distributed: one process, which is a world too."""

import pytest
import torch
import torch.distributed as dist

import layernorm_cuda as lnc

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def models():
    """The same model with our norms and with PyTorch's."""
    for ours in True, False:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.RMSNorm(8))
        if ours:
            lnc.replace_norms(model)
        yield model


def step(model):
    torch.manual_seed(1)
    x = torch.randn(2, 3, 8, requires_grad=True)
    y = model(x)
    y.pow(3).sum().backward()
    gradients = [x.grad, *(p.grad for p in model.parameters())]
    return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in (y.detach(), *gradients)]


def sequence_parallel(model, mesh):
    from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

    return parallelize_module(model, mesh, {"1": SequenceParallel(), "2": SequenceParallel()})


def sharded(model, mesh):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=mesh)


def data_parallel(model, mesh):
    return torch.nn.parallel.DistributedDataParallel(model)


@pytest.mark.parametrize("wrap", [data_parallel, sharded, sequence_parallel])
def test_wrapped(wrap, mesh):
    if wrap is sharded and torch.__version__ < (2, 7):
        pytest.skip("before torch 2.7 fully_shard needs a GPU")
    ours, native = (step(wrap(model, mesh)) for model in models())
    torch.testing.assert_close(ours, native)


def test_dtensors(mesh):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    x, w = torch.randn(4, 8), torch.randn(8)
    dx, dw = distribute_tensor(x, mesh, [Shard(0)]), distribute_tensor(w, mesh, [Replicate()])
    torch.testing.assert_close(lnc.layer_norm(dx, (8,), dw).full_tensor(), lnc.layer_norm(x, (8,), w))
    for got, want in zip(lnc.add_rms_norm(dx, dx, (8,), dw), lnc.add_rms_norm(x, x, (8,), w), strict=True):
        torch.testing.assert_close(got.full_tensor(), want)
