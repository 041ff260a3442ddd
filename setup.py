"""Builds layernorm_cuda._C: the CPU kernels always, the CUDA kernels where torch and a toolkit allow.

LAYERNORM_CUDA_BUILD=auto|on|off   CUDA where possible (default), or an error where not, or never
CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS and CXX are honoured.
"""

import os
import re
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent / "build_support"))

import toolkit
from extension import PACKAGE, ROOT, configure, jobs


def prefer_ninja() -> None:
    """Puts pip's ninja on PATH: it is not there when an environment's python is called by its full name."""
    try:
        import ninja
    except ImportError:
        return
    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])


def commands(build) -> dict[str, type]:
    def report() -> None:
        print(*filter(None, [build.note and f"{PACKAGE}: {build.note}", build.summary]), sep="\n", file=sys.stderr)

    def write_record(folder: str | Path) -> None:
        Path(folder, "_build_info.py").write_text(build.record)

    class BuildPy(build_py):
        """Also writes down what was built, and why what is missing is."""

        def run(self) -> None:
            if not build.torch:
                raise SystemExit(f"{PACKAGE}: {build.without_extension}")
            super().run()
            write_record(self.get_package_dir(PACKAGE) if self.editable_mode else os.path.join(self.build_lib, PACKAGE))
            if build.extension is None:
                report()

    if build.extension is None:
        return {"build_py": BuildPy}

    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        """ninja, and objects that are kept: a second build compiles what has changed."""

        def __init__(self, *args, **kwargs) -> None:
            prefer_ninja()
            super().__init__(*args, **kwargs)

        def finalize_options(self) -> None:
            super().finalize_options()
            self.build_temp = str(
                ROOT / "build" / re.sub(r"\W", "_", f"torch_{build.torch}_cuda_{build.cuda or 'off'}")
            )

        def build_extensions(self) -> None:
            os.environ.setdefault("MAX_JOBS", str(jobs()))
            try:
                super().build_extensions()
            except Exception:
                if build.cuda:
                    print(f"{PACKAGE}: LAYERNORM_CUDA_BUILD=off builds the CPU kernels only", file=sys.stderr)
                raise
            report()

        def run(self) -> None:
            super().run()
            if self.inplace:  # build_ext --inplace runs nothing else; and while it builds, inplace is not set
                write_record(ROOT / PACKAGE)

    return {"build_py": BuildPy, "build_ext": BuildExt}


if __name__ == "__main__":
    try:
        build = configure()
    except toolkit.Refused as reason:
        raise SystemExit(f"{PACKAGE}: {reason}") from None
    setup(ext_modules=[build.extension] if build.extension else [], cmdclass=commands(build))
