"""Builds kdfast._C with CMake and ninja, without a torch header: one binary serves every torch.

KDFAST_BUILD_CPP=auto|0|1: build the C++ extension if there is a compiler, never, or always.
KDFAST_BUILD_CUDA=auto|0|1: with CUDA kernels in it if there is nvcc, without, or with them always.
A build that starts and fails is an error.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def _setting(name: str) -> str:
    setting = os.environ.get(name, "auto")
    if setting not in ("auto", "0", "1"):
        raise SystemExit(f"{name} must be auto, 0 or 1, got {setting!r}")
    return setting


def _compiler() -> str | None:
    names = (
        [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++", "cl"]
    )
    return next(filter(None, map(shutil.which, names)), None)


class BuildWithCMake(build_ext):
    def run(self) -> None:
        if _compiler() is None and _setting("KDFAST_BUILD_CPP") == "auto":
            if _setting("KDFAST_BUILD_CUDA") == "1":
                raise SystemExit("KDFAST_BUILD_CUDA=1 needs a C++ compiler, and none was found")
            self.extensions = []
            print(
                "no C++ compiler found: kdfast installs without its CPU kernels "
                "and runs in plain PyTorch there",
                file=sys.stderr,
            )
            return
        super().run()

    def build_extension(self, extension: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        build = Path(self.build_temp).resolve()
        configure = [
            "cmake",
            f"-S{ROOT / 'csrc'}",
            f"-B{build}",
            "-GNinja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DKDFAST_OUTPUT_DIR={target.parent}",
            f"-DKDFAST_OUTPUT_NAME={target.name}",
            f"-DKDFAST_BUILD_CUDA={_setting('KDFAST_BUILD_CUDA')}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


# Both are read whatever is then built, so that a wrong one is an error at once.
if (_setting("KDFAST_BUILD_CPP"), _setting("KDFAST_BUILD_CUDA")) == ("0", "1"):
    raise SystemExit("KDFAST_BUILD_CUDA=1 needs the C++ extension, and KDFAST_BUILD_CPP is 0")

setup(
    # An explicit list: the repository's kernels/ is installed as kdfast.kernels.
    packages=[
        "kdfast",
        "kdfast.cli",
        "kdfast.integrations",
        "kdfast.ops",
        "kdfast.teacher_cache",
        "kdfast.trainer",
        "kdfast.trainer.augmentation",
        "kdfast.kernels",
    ],
    package_dir={"kdfast.kernels": "kernels"},
    ext_modules=[] if _setting("KDFAST_BUILD_CPP") == "0" else [Extension("kdfast._C", sources=[])],
    cmdclass={"build_ext": BuildWithCMake},
)
