"""Memory of large results on the CPU (csrc/memory.cpp): kept for the next one, never shared, never without bound."""

import copy
import io
import os
import subprocess
import sys
import threading

import pytest
import torch
from cases import BACKEND

import layernorm_cuda as lnc
from layernorm_cuda import _ops

pytestmark = pytest.mark.skipif(bool(BACKEND) or _ops._C is None, reason="not the compiled module")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")

MIB = 1 << 20
X = torch.randn(2048, 2048)  # 16 MiB


def norm(x=X):
    return lnc.layer_norm(x, x.shape[-1:])


def test_kept_for_the_next_result():
    y = norm()
    address = y.data_ptr()
    del y
    assert norm().data_ptr() == address
    y, total = lnc.add_layer_norm(X, X, (2048,))
    addresses = {y.data_ptr(), total.data_ptr()}
    del y, total
    x = X.clone().requires_grad_()
    y = norm(x)
    assert y.data_ptr() in addresses
    (dx,) = torch.autograd.grad(y, x, X)
    assert dx.data_ptr() in addresses


def test_a_size_of_about_as_much():
    # By itself: what other tests have left may serve the larger one too.
    run("""
import torch, layernorm_cuda as lnc
x = torch.randn(2050, 2048)
norm = lambda rows: lnc.layer_norm(x[:rows], (2048,))
y = norm(2048)
address = y.data_ptr()
del y
assert norm(1800).data_ptr() == address
assert norm(1100).data_ptr() != address  # would leave more idle than it uses
assert norm(2049).data_ptr() != address
""")


def test_smaller_results_are_mallocs():
    """Which hands out what was freed just before, and is still in a cache; of two results half the size is enough."""
    x = X[:1000]
    y, total = lnc.add_layer_norm(x, x, (2048,))
    addresses = {y.data_ptr(), total.data_ptr()}
    del y, total
    assert norm(x).data_ptr() not in addresses
    y, total = lnc.add_layer_norm(x, x, (2048,))
    assert {y.data_ptr(), total.data_ptr()} == addresses


def test_results_that_live_share_nothing():
    inputs = [torch.randn(2100 + 10 * i, 1024) for i in range(12)]
    wants = [torch.nn.functional.layer_norm(x, (1024,)) for x in inputs]
    for _ in range(3):
        results = [norm(x) for x in inputs]
        for got, want in zip(results, wants, strict=True):
            torch.testing.assert_close(got, want)
        del results[::2], got


def test_threads():
    """Each writes, waits and reads again."""
    wrong = []

    def work(seed):
        x = torch.randn(2100 + seed, 1024, generator=torch.Generator().manual_seed(seed))
        want = torch.nn.functional.layer_norm(x, (1024,))
        for _ in range(30):
            y = norm(x)
            if not torch.allclose(y, want, atol=1e-5):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_results_are_tensors_like_any_other():
    y, want = norm(), torch.nn.functional.layer_norm(X, (2048,))
    assert y.data_ptr() % 64 == 0
    for other in (copy.deepcopy(y), torch._lazy_clone(y), y.clone().share_memory_(), torch.from_dlpack(y)):
        torch.testing.assert_close(other, want)
    buffer = io.BytesIO()
    torch.save(y, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.load(buffer), want)
    array = y.numpy()
    del y
    torch.testing.assert_close(torch.from_numpy(array), want)

    y = norm()
    storage = y.untyped_storage()
    storage.resize_(32 * MIB)
    torch.testing.assert_close(y, want)
    storage.resize_(0)  # as FSDP does
    storage.resize_(16 * MIB)
    y.copy_(X)
    assert y.equal(X)
    y = norm()
    y.resize_(3, 5).fill_(1)
    assert y.sum() == 15
    y = norm()
    y.share_memory_()
    torch.testing.assert_close(y, want)


def test_the_profiler_sees_each_allocation():
    norm()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        norm()
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profile.function_events) >= X.nbytes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork():
    program = """
import os, torch, layernorm_cuda as lnc
torch.set_num_threads(1)
x = torch.randn(1024, 2048)
want = torch.nn.functional.layer_norm(x, (2048,))
y = lnc.layer_norm(x, (2048,))
del y
child = os.fork()
for _ in range(3):
    assert torch.allclose(lnc.layer_norm(x, (2048,)), want, atol=1e-5)
if child == 0:
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    assert run(program) == ""


def run(program, **environment):
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


MEASURE = """
import os, resource, torch, layernorm_cuda as lnc

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() >> 20

x = torch.ones(4096, 4096)  # 64 MiB, more than malloc ever keeps
lnc.layer_norm(x[:1], (4096,))
before = resident()
many = [lnc.layer_norm(x, (4096,)) for _ in range(8)]
del many
kept = resident() - before
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    lnc.layer_norm(x, (4096,))
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""


@linux
@pytest.mark.parametrize(("mib", "least", "most"), [(None, 192, 300), ("100", 64, 110), ("0", 0, 16)])
def test_no_more_than_so_much_is_kept(mib, least, most):
    """And where it is, further results cost no page faults."""
    kept, faults = map(int, run(MEASURE, **({} if mib is None else {"LAYERNORM_CUDA_KEEP_MIB": mib})).split())
    assert least <= kept <= most
    assert (faults < 16) == (mib != "0")
