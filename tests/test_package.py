"""The package as a whole: what importing it costs, and ``python -m layernorm_cuda``."""

import os
import re
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from cases import BACKEND

import layernorm_cuda as lnc
from layernorm_cuda import __main__ as check


def python(*args, **env):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=os.environ | env, timeout=120)


@pytest.mark.skipif(bool(BACKEND), reason="a new process imports what is installed")
def test_import_is_light():
    """Of torch's modules it takes those that ``import torch`` has loaded already, and costs under 150 ms beside it."""
    code = """
        import sys, time, warnings
        warnings.simplefilter("ignore")
        import torch
        before = set(sys.modules)
        start = time.perf_counter()
        import layernorm_cuda
        seconds = time.perf_counter() - start
        heavy = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch.onnx", "sympy", "numpy", "transformers")
        new = set(sys.modules) - before
        print(seconds, sorted(m for m in new if m.startswith(heavy)), len(new))
    """
    runs = [python("-c", textwrap.dedent(code)) for _ in range(3)]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    times, heavy = zip(*((float(r.stdout.split(" ", 1)[0]), r.stdout.split(" ", 1)[1]) for r in runs), strict=True)
    assert heavy[0].startswith("[]"), heavy[0]
    assert min(times) < 0.15


def test_version():
    assert lnc.build_info()["version"] == lnc.__version__
    assert all(hasattr(lnc, name) for name in lnc.__all__)


def test_self_check(capsys):
    start = time.perf_counter()
    assert check.main() == 0
    printed = capsys.readouterr().out
    assert lnc.__version__ in printed and torch.__version__ in printed
    assert "FAILED" not in printed and re.search(r"(\d+) of \1 checks hold", printed)
    assert time.perf_counter() - start < 20
    for what in ("layer_norm", "rms_norm", "float64", "float32", "float16", "bfloat16", "backward", "cpu"):
        assert what in printed


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, y: y * 1.01,
        lambda x, y: y + 0.01 * (y - y.detach()),  # the gradient alone
        lambda x, y: y if len(x) > 1 else y + 1e-6,
    ],
    ids=["output", "gradient", "bits"],
)
def test_self_check_can_fail(wrong, monkeypatch, capsys):
    monkeypatch.setitem(check.NORMS, "layer_norm", (lambda x, *args: wrong(x, lnc.layer_norm(x, *args)), False))
    assert check.main() == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.skipif(bool(BACKEND), reason="a new process imports what is installed")
def test_command_line():
    run = python("-m", "layernorm_cuda")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "checks hold" in run.stdout
