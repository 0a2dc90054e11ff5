"""Installs kdfast as its users do, in pip's ordinary build isolation."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXTENSION = "kdfast/_C."
PYTHON_FILES = {
    "kdfast/cli/__init__.py",
    "kdfast/ops/kd_loss.py",
    "kdfast/kernels/kd_loss.py",
    "kdfast/teacher_cache/__init__.py",
    "kdfast/trainer/__init__.py",
    "kdfast/trainer/augmentation/__init__.py",
}


def pip_wheel(source: Path, into: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "-v", "-w", str(into), str(source)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def names_in(folder: Path) -> set[str]:
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    subprocess.run([sys.executable, "-m", "build", "--sdist", "-o", folder, ROOT], check=True)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def test_a_wheel_out_of_the_sdist_has_the_compiled_backend(sdist, tmp_path):
    built = pip_wheel(sdist, tmp_path)
    assert built.returncode == 0, built.stdout
    names = names_in(tmp_path)
    assert any(name.startswith(EXTENSION) for name in names)
    assert names >= PYTHON_FILES
    assert not any(name.startswith(("kernels/", "csrc/", "tests/", "bench/")) for name in names)


def test_without_a_compiler_the_wheel_is_pure_python_and_says_so(sdist, tmp_path):
    # The build's own tools stay on the path; compilers of the system do not.
    without = {"PATH": str(Path(sys.executable).parent), "CXX": "no-such-compiler"}
    built = pip_wheel(sdist, tmp_path, **without)
    assert built.returncode == 0, built.stdout
    assert built.stdout.count("no C++ compiler found") == 1
    names = names_in(tmp_path)
    assert not any(name.startswith(EXTENSION) for name in names)
    assert names >= PYTHON_FILES


def test_a_compiler_that_was_asked_for_and_is_missing_is_an_error(sdist, tmp_path):
    without = {"CXX": "no-such-compiler", "KDFAST_BUILD_CPP": "1"}
    assert pip_wheel(sdist, tmp_path, **without).returncode != 0
    assert not list(tmp_path.glob("*.whl"))
