"""Installing: the search for a toolkit, what is refused and how, and the layers. Nothing but a stub is compiled."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import extension
import pytest
import toolkit
import torch

ROOT = Path(__file__).resolve().parent.parent
NVCC_13 = "75 80 86 87 88 89 90 100 110 103 120 121"
NVCC_118 = "50 52 53 60 61 62 70 72 75 80 86 87 89 90"


def make_toolkit(root: Path, version="13.0", archs=NVCC_13) -> Path:
    """A folder that answers like a toolkit; returns its nvcc."""
    (root / "bin").mkdir(parents=True)
    (root / "lib64").mkdir()
    (root / "lib64" / f"libcudart.so.{version.split('.')[0]}").touch()
    listing = "\n".join(f"compute_{arch}" for arch in archs.split())
    return write_script(
        root / "bin" / "nvcc",
        f"""case "$1" in
--version) echo "Cuda compilation tools, release {version}, V{version}.88";;
--list-gpu-arch) echo "{listing}";;
--dryrun) echo "#$ _SPACE_=" >&2; echo "#$ TOP={root}/bin/.." >&2;;
esac""",
    )


def write_script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def search_path(*folders: Path) -> str:
    return os.pathsep.join(map(str, folders))


# ---- where the toolkit is looked for --------------------------------------------------------------------------------


def test_cuda_home_comes_first(tmp_path):
    make_toolkit(tmp_path / "home")
    make_toolkit(tmp_path / "other")
    environ = {"CUDA_HOME": str(tmp_path / "home"), "PATH": search_path(tmp_path / "other/bin")}
    found = toolkit.find("13.0", environ)
    assert (found.root, found.origin, found.version) == (tmp_path / "home", "CUDA_HOME", "13.0")


def test_cuda_path_is_read_too(tmp_path):
    make_toolkit(tmp_path / "home")
    assert toolkit.find("13.0", {"CUDA_PATH": str(tmp_path / "home")}).origin == "CUDA_PATH"


@pytest.mark.parametrize("how", ["plain", "link", "wrapper", "link to a wrapper"])
def test_nvcc_on_path_leads_to_its_real_root(tmp_path, how):
    nvcc = make_toolkit(tmp_path / "cuda-13.0")
    place = tmp_path / "local" / "bin"
    place.mkdir(parents=True)
    if how == "plain":
        place = nvcc.parent
    elif how == "link":
        (place / "nvcc").symlink_to(nvcc)
    elif how == "wrapper":
        write_script(place / "nvcc", f'exec {nvcc} "$@"')
    else:
        (place / "nvcc").symlink_to(write_script(tmp_path / "scripts" / "nvcc", f'exec {nvcc} "$@"'))
    found = toolkit.find("13.0", {"PATH": search_path(place)})
    assert (found.root, found.origin) == (tmp_path / "cuda-13.0", "nvcc on PATH")


def test_nvcc_that_will_not_say_its_root(tmp_path):
    nvcc = write_script(tmp_path / "cuda" / "bin" / "nvcc", "exit 1")
    (tmp_path / "nvcc").symlink_to(nvcc)
    assert toolkit.root_of(tmp_path / "nvcc") == tmp_path / "cuda"


def test_toolkit_from_pip_comes_last(tmp_path):
    site = tmp_path / "site-packages"
    make_toolkit(site / "nvidia" / "cu13")
    found = toolkit.find("13.0", {"PATH": search_path()}, [site])
    assert (found.root, found.origin) == (site / "nvidia" / "cu13", "pip's cuda-toolkit")
    make_toolkit(tmp_path / "system")
    assert toolkit.find("13.0", {"PATH": search_path(tmp_path / "system/bin")}, [site]).origin == "nvcc on PATH"


def test_runtime_library_is_the_one_beside_torch(tmp_path):
    site = tmp_path / "site-packages"
    make_toolkit(tmp_path / "system")
    found = toolkit.find("13.0", {"CUDA_HOME": str(tmp_path / "system")})
    assert toolkit.runtime_library(found, [site]) == tmp_path / "system/lib64/libcudart.so.13"
    beside_torch = site / "nvidia/cu13/lib/libcudart.so.13"
    beside_torch.parent.mkdir(parents=True)
    beside_torch.touch()
    assert toolkit.runtime_library(found, [site]) == beside_torch


def test_runtime_library_missing(tmp_path):
    bare = toolkit.Toolkit(tmp_path, "CUDA_HOME", "99.0", ())
    with pytest.raises(toolkit.Refused, match=r"has no libcudart\.so\.99"):
        toolkit.runtime_library(bare, [])


def test_headers_where_conda_keeps_them(tmp_path, monkeypatch):
    monkeypatch.setattr(toolkit.platform, "machine", lambda: "x86_64")
    make_toolkit(tmp_path)
    found = toolkit.find("13.0", {"CUDA_HOME": str(tmp_path)})
    header = tmp_path / "targets/x86_64-linux/include/cuda_runtime_api.h"
    header.parent.mkdir(parents=True)
    header.touch()
    assert toolkit.more_headers(found) == [str(header.parent)]
    (tmp_path / "include").symlink_to(header.parent)  # as NVIDIA installs it
    assert toolkit.more_headers(found) == []


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_other_major_version_is_refused_with_both_named(tmp_path):
    make_toolkit(tmp_path / "old", "12.4", "90")
    with pytest.raises(toolkit.Refused, match=r"CUDA_HOME is CUDA 12\.4 .* torch was built with CUDA 13\.0") as refused:
        toolkit.find("13.0", {"CUDA_HOME": str(tmp_path / "old")})
    assert "cuda-toolkit[nvcc,cccl,crt,cudart]==13.0.*" in str(refused.value)


def test_pip_is_named_only_where_its_packages_have_nvcc(tmp_path):
    for cuda in ("12.8", "11.8"):
        with pytest.raises(toolkit.Refused, match=f"Set CUDA_HOME to a CUDA {cuda} toolkit from NVIDIA") as refused:
            toolkit.find(cuda, {"PATH": str(tmp_path)})
        assert "pip" not in str(refused.value)
        assert toolkit.requirement(cuda) == ""


def test_other_major_version_is_passed_over_where_another_fits(tmp_path):
    make_toolkit(tmp_path / "old", "12.4", "90")
    make_toolkit(tmp_path / "site" / "nvidia" / "cu13")
    assert toolkit.find("13.0", {"CUDA_HOME": str(tmp_path / "old")}, [tmp_path / "site"]).version == "13.0"


def test_other_minor_version_is_taken(tmp_path):
    make_toolkit(tmp_path / "newer", "13.2")
    assert toolkit.find("13.0", {"CUDA_HOME": str(tmp_path / "newer")}).version == "13.2"


def test_no_toolkit_and_broken_toolkit(tmp_path):
    with pytest.raises(toolkit.Refused, match="no CUDA toolkit was found"):
        toolkit.find("13.0", {"PATH": str(tmp_path)})
    with pytest.raises(toolkit.Refused, match="no working bin/nvcc"):
        toolkit.find("13.0", {"CUDA_HOME": str(tmp_path)})


def test_torch_without_cuda():
    with pytest.raises(toolkit.Refused, match="CPU build"):
        toolkit.find(None, {})


def test_switch():
    assert [toolkit.mode({"LAYERNORM_CUDA_BUILD": value}) for value in ("on", "OFF", "auto", "")] == [
        "on",
        "off",
        "auto",
        "auto",
    ]
    assert toolkit.mode({}) == "auto"
    with pytest.raises(toolkit.Refused, match="'yes', expected one of auto, on, off"):
        toolkit.mode({"LAYERNORM_CUDA_BUILD": "yes"})


# ---- architectures --------------------------------------------------------------------------------------------------


def test_default_archs_of_a_new_and_an_old_nvcc(tmp_path):
    make_toolkit(tmp_path / "13", "13.0")
    make_toolkit(tmp_path / "11", "11.8", NVCC_118)
    new = toolkit.find("13.0", {"CUDA_HOME": str(tmp_path / "13")})
    old = toolkit.find("11.8", {"CUDA_HOME": str(tmp_path / "11")})
    assert toolkit.default_archs(new) == ("7.5", "8.0", "8.6", "8.9", "9.0+PTX", "10.0", "12.0")
    assert toolkit.left_out(new) == ()
    assert toolkit.default_archs(old) == ("7.5", "8.0", "8.6", "8.9", "9.0+PTX")
    assert toolkit.left_out(old) == ("10.0", "12.0")


def test_gencode_makes_ptx_of_three_architectures_at_most():
    assert toolkit.gencode(["7.5", "8.6", "8.9", "9.0+PTX", "12.0"]) == [
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_80,code=sm_86",
        "-gencode=arch=compute_80,code=sm_89",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
        "-gencode=arch=compute_90,code=sm_120",
    ]


# ---- what is decided, and said --------------------------------------------------------------------------------------


@pytest.fixture
def configure(monkeypatch):
    """extension.configure under a simulated torch; what it changes in the process is put back."""
    from torch.utils import cpp_extension

    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(toolkit, "site_folders", lambda torch_file: [])

    def run(mode, cuda="13.0", home=""):
        monkeypatch.setenv("LAYERNORM_CUDA_BUILD", mode)
        monkeypatch.setenv("CUDA_HOME", str(home))
        monkeypatch.setattr(torch.version, "cuda", cuda)
        return extension.configure()

    return run


def flags(build, language):
    return " ".join(build.extension.extra_compile_args[language])


def test_cuda_is_built_where_a_toolkit_is_found_gpu_or_not(configure, tmp_path):
    make_toolkit(tmp_path / "cuda")
    build = configure("auto", home=tmp_path / "cuda")
    assert "-DLAYERNORM_CUDA_WITH_CUDA=1" in flags(build, "cxx")
    assert '-DLAYERNORM_CUDA_ARCH_LIST="7.5 8.0 8.6 8.9 9.0+PTX 10.0 12.0"' in flags(build, "cxx")
    assert flags(build, "nvcc").count("-gencode") == 8
    assert not re.search("fast.?math|ftz", flags(build, "nvcc") + flags(build, "cxx"))
    assert build.summary.startswith(f"layernorm_cuda: built for torch {torch.__version__} with ")
    assert build.summary.endswith("; CUDA 13.0 for 7.5 8.0 8.6 8.9 9.0+PTX 10.0 12.0")
    assert "\n" not in build.summary


def test_arch_list_of_the_user_is_left_to_torch(configure, monkeypatch, tmp_path):
    make_toolkit(tmp_path / "cuda")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;9.0+PTX")
    build = configure("on", home=tmp_path / "cuda")
    assert "gencode" not in flags(build, "nvcc")
    assert build.archs == "8.6;9.0+PTX"


def test_newest_architectures_left_out_with_a_message(configure, tmp_path):
    make_toolkit(tmp_path / "cuda", "11.8", NVCC_118)
    build = configure("on", cuda="11.8", home=tmp_path / "cuda")
    assert build.note == "nvcc 11.8 is older than architectures 10.0, 12.0: they run the PTX of 9.0"


@pytest.mark.parametrize(
    ("mode", "cuda", "reason"),
    [("auto", "13.0", "no CUDA toolkit"), ("auto", None, "CPU build"), ("off", "13.0", "LAYERNORM_CUDA_BUILD=off")],
)
def test_cpu_only(configure, mode, cuda, reason):
    build = configure(mode, cuda)
    assert reason in build.without_cuda
    assert reason in build.summary
    assert "WITH_CUDA" not in flags(build, "cxx")
    assert not any(source.endswith(".cu") for source in build.extension.sources)


def test_on_fails_with_the_reason(configure, monkeypatch, tmp_path):
    make_toolkit(tmp_path / "old", "12.4", "90")
    with pytest.raises(toolkit.Refused, match="LAYERNORM_CUDA_BUILD=on, but no CUDA toolkit was found"):
        configure("on")
    with pytest.raises(toolkit.Refused, match="LAYERNORM_CUDA_BUILD=on, but this torch is a CPU build"):
        configure("on", cuda=None)
    with pytest.raises(toolkit.Refused, match=r"on, but CUDA_HOME is CUDA 12\.4"):
        configure("on", home=tmp_path / "old")
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(toolkit.Refused, match=r"on, but there is no C\+\+ compiler"):
        configure("on")


def test_no_compiler_installs_without_the_extension(configure, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    build = configure("auto")
    assert build.extension is None
    assert "there is no C++ compiler (/nowhere/c++ cannot be run" in build.summary


def test_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    broken = write_script(tmp_path / "c++", "echo 'probe.cpp:1:10: fatal error: Python.h: No such file' >&2; exit 1")
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(toolkit.Refused, match=r"fatal error: Python\.h"):
        extension.find_compiler("c++17")


def test_compiler_too_old_for_the_headers_of_this_torch(monkeypatch, tmp_path):
    old = write_script(
        tmp_path / "c++",
        """case "$*" in
*c++20*) echo "error: unrecognized command line option '-std=c++20'" >&2; exit 1;;
*--version*) echo "c++ 8.5.0";;
esac""",
    )
    monkeypatch.setenv("CXX", str(old))
    assert extension.find_compiler("c++17") == "c++ 8.5.0"
    with pytest.raises(toolkit.Refused, match=r"cannot build Python modules in c\+\+20: error: unrecognized"):
        extension.find_compiler("c++20")


def test_record_can_be_imported(configure):
    build = configure("off")
    values = {}
    exec(build.record, values)
    assert values["EXTENSION"] is True
    assert (values["TORCH"], values["CUDA"]) == (torch.__version__, "")
    assert values["WITHOUT_CUDA"] == "LAYERNORM_CUDA_BUILD=off"
    assert values["SUMMARY"] == build.summary


def test_build_ext_inplace_leaves_a_record(tmp_path):
    """Without it the module would lie there, and not be loaded."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copytree(ROOT / "build_support", tmp_path / "build_support")
    for folder in ("csrc", "layernorm_cuda"):
        (tmp_path / folder).mkdir()
    stub = "#include <Python.h>\nPyMODINIT_FUNC PyInit__C() { return nullptr; }\n"
    (tmp_path / "csrc" / "stub.cpp").write_text(stub)
    environ = {**os.environ, "LAYERNORM_CUDA_BUILD": "off"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert list((tmp_path / "layernorm_cuda").glob("_C.*"))
    assert "EXTENSION = True" in (tmp_path / "layernorm_cuda" / "_build_info.py").read_text()


# ---- which torch ----------------------------------------------------------------------------------------------------


def test_isolated_build_borrows_the_installed_torch(tmp_path):
    """As under pip's build isolation: this interpreter, but only the build requirements can be imported."""
    for name in ("setuptools", "_distutils_hack", "pybind11"):
        (tmp_path / name).symlink_to(Path(importlib.util.find_spec(name).origin).parent)
    code = f"""
import importlib.util, sys
sys.path = [{str(tmp_path)!r}, {str(ROOT / "build_support")!r}, *(p for p in sys.path if "site-packages" not in p)]
assert importlib.util.find_spec("torch") is None
import backend
print(importlib.util.find_spec("torch").origin, backend.get_requires_for_build_wheel())
"""
    environ = {**os.environ, "LAYERNORM_CUDA_BUILD": "auto"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert done.stdout.split() == [torch.__file__, "[]"], done.stderr


def test_module_of_another_torch_is_not_loaded(monkeypatch):
    from layernorm_cuda import _extension

    class Built:
        EXTENSION, TORCH = True, "1.0.0+cu00"

    monkeypatch.setattr(_extension, "_build_info", Built)
    monkeypatch.delitem(sys.modules, "layernorm_cuda._C", raising=False)
    module, reason = _extension._load()
    assert module is None
    assert reason == f"it was compiled for torch 1.0.0+cu00, but torch {torch.__version__} is running"


def test_source_folder_hands_over_to_the_installed_package(tmp_path):
    """Where nothing is compiled, while the environment that Python runs in has the package."""
    source, site = tmp_path / "source", tmp_path / "site"
    built = shutil.ignore_patterns("_build_info.py", "_C.*", "__pycache__")
    for folder in (source, site):
        shutil.copytree(ROOT / "layernorm_cuda", folder / "layernorm_cuda", ignore=built)
    (site / "layernorm_cuda" / "_build_info.py").write_text("EXTENSION, WITHOUT_EXTENSION = False, 'a stub'")
    code = "import layernorm_cuda as lnc; print(lnc.rnn.__file__, lnc.build_info()['load_error'])"
    for cwd, said in ((source, f"{source / 'layernorm_cuda'} is layernorm_cuda's source, not built"), (site, "a stub")):
        environ = {**os.environ, "PYTHONPATH": str(site)}
        done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environ, capture_output=True, text=True)
        assert done.stdout.split(maxsplit=1) == [str(site / "layernorm_cuda" / "rnn.py"), "a stub\n"], done.stderr
        assert said in done.stderr


# ---- layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["kernels", "cpu", "standalone"])
def test_layer_includes_nothing_of_torch(layer):
    """csrc/kernels may include itself, CUDA and the standard library; cpu and standalone may include kernels too."""
    allowed = [ROOT / "csrc" / name for name in {layer, "kernels"}]
    files = [path for path in (ROOT / "csrc" / layer).rglob("*") if path.is_file()]
    assert files
    for path in files:
        for line, opening, name in re.findall(r'^(\s*#\s*include\s*([<"])([^>"]+).*)$', path.read_text(), re.MULTILINE):
            where = f"{path.relative_to(ROOT)}: {line.strip()}"
            assert not re.match(r"(torch|ATen|c10|caffe2|pybind11|Python\.h)", name), where
            if opening == '"' and name != "cuda_host.h":  # CUDA's stand-in in tests/host
                found = [base / name for base in (path.parent, ROOT / "csrc") if (base / name).exists()]
                assert found, where
                assert any(found[0].resolve().is_relative_to(folder) for folder in allowed), where
