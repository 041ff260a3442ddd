"""One switch for the whole suite: LAYERNORM_CUDA_TEST_BACKEND.

(unset)   the installed build, whatever it is
host      the CUDA kernels, executed on the CPU: tests/host
python    no compiled module: plain PyTorch operations
"""

import sys

import pytest
import torch
from cases import BACKEND

if BACKEND == "host":
    from host.build import load_extension

    sys.modules["layernorm_cuda._C"] = load_extension()
elif BACKEND == "python":
    sys.modules["layernorm_cuda._C"] = None

import layernorm_cuda


def pytest_report_header():
    info = layernorm_cuda.build_info()
    backends = ", ".join(info["backends"]) or f"PyTorch operations ({info['load_error']})"
    return f"layernorm_cuda: {backends}; test backend: {BACKEND or 'as installed'}; torch {torch.__version__}"


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def pytest_collection_modifyitems(items):
    reason = None
    if BACKEND:
        reason = f"the test backend {BACKEND} runs on the CPU"
    elif not torch.cuda.is_available():
        reason = "no CUDA device"
    elif "cuda" not in layernorm_cuda.build_info()["backends"]:
        reason = "this build has no CUDA kernels"
    if reason:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
