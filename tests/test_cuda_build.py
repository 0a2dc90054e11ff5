"""What nvcc makes of the CUDA kernels, for devices that need not be here, and how to build them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdfast
from kdfast.ops import kd_loss as kd_loss_ops
from kdfast.ops import registry
from kdfast.reference import DIVERGENCES

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "csrc" / "cuda" / "kd_loss.cu"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")

# Four blocks of 256 threads on a multiprocessor of 65536 registers.
MOST_REGISTERS, MOST_BLOCKS = 64, 4
# One kernel for each divergence, and for both sides float32, bfloat16, float16 or mixed.
KERNELS = len(DIVERGENCES) * 4


@needs_nvcc
@pytest.mark.parametrize("architecture", ["90a", "100a"])
def test_kernels_are_lean(architecture, tmp_path, record_property):
    cubin = tmp_path / "kd_loss.cubin"
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    flags = ["-std=c++17", "-O3", f"-I{SOURCE.parent}", f"-gencode={target}", "-Xptxas=-v"]
    compiled = subprocess.run(
        [NVCC, *flags, "-cubin", "-o", str(cubin), str(SOURCE)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert compiled.returncode == 0, compiled.stdout
    registers = [int(used) for used in re.findall(r"Used (\d+) registers", compiled.stdout)]
    record_property("registers", registers)
    print(f"sm_{architecture}: {min(registers)} to {max(registers)} registers")
    assert len(registers) == KERNELS
    assert max(registers) <= MOST_REGISTERS
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        compiled.stdout,
    )
    assert frames == [("0", "0", "0")] * KERNELS
    # All shared memory is asked for at the launch.
    assert not re.search(r"\d+ bytes smem", compiled.stdout)
    assert_reads_and_writes_wide(cubin)


def assert_reads_and_writes_wide(cubin):
    triton = pytest.importorskip("triton", reason="its cuobjdump disassembles")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    sass = subprocess.run(
        [cuobjdump, "--dump-sass", cubin], check=True, capture_output=True, text=True
    ).stdout
    functions = sass.split("Function : ")[1:]
    assert len(functions) == KERNELS
    for function in functions:
        # The copy engine's bulk copies of both sides, and rows that are the same type in 16 bytes.
        assert function.count("UBLKCP") >= 2
        assert "STG.E.128" in function
        assert "LDS.128" in function
        # The blocks exchange sums in stores that their receiver counts: none waits for what it has
        # written to global memory.
        assert "STAS" in function
        assert not re.search(r"MEMBAR\.\S*GPU", function)
        assert not re.search(r"\b(LDL|STL)\b", function)


def configured(folder, setting, compiler):
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if cmake is None:
        pytest.skip("cmake is not installed")
    pybind11 = pytest.importorskip("pybind11", reason="the extension's configuration looks for it")
    return subprocess.run(
        [
            *(cmake, "-S", str(ROOT / "csrc"), "-B", str(folder)),
            f"-DKDFAST_BUILD_CUDA={setting}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ],
        env={**os.environ, "CUDACXX": str(compiler)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def test_kernels_that_were_asked_for_and_cannot_be_built_are_an_error(tmp_path):
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    asked = configured(tmp_path / "asked", "1", broken)
    assert asked.returncode != 0
    assert "KDFAST_BUILD_CUDA=1 needs nvcc 12.8 or newer that works" in asked.stdout
    for setting in ("auto", "0"):
        without = configured(tmp_path / setting, setting, broken)
        assert without.returncode == 0, without.stdout
        assert "kdfast's CUDA kernels: OFF" in without.stdout


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"KDFAST_BUILD_CUDA": "yes"}, "KDFAST_BUILD_CUDA must be auto, 0 or 1, got 'yes'"),
        (
            {"KDFAST_BUILD_CUDA": "1", "KDFAST_BUILD_CPP": "0"},
            "KDFAST_BUILD_CUDA=1 needs the C++ extension",
        ),
    ],
)
def test_settings_of_the_build(settings, message, tmp_path):
    pytest.importorskip("setuptools")
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", f"--build-temp={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert message in result.stderr


@pytest.fixture
def cuda_extension():
    if registry.missing("cpp") or not hasattr(registry.extension(), "kd_loss_rows_cuda"):
        pytest.skip("the extension was built without CUDA kernels")
    return registry.extension()


# Of compute capability 9.0 and 10.0: a multiprocessor's shared memory, what a block may have of it,
# and what the system takes for each.
MULTIPROCESSOR_BYTES, MOST_BLOCK_BYTES, SYSTEM_BYTES = 228 * 1024, 227 * 1024, 1024


@pytest.mark.parametrize(
    ("dtype", "vocab", "blocks", "resident"),
    [
        ("bfloat16", 16384, 1, 3),
        ("bfloat16", 30522, 2, 3),
        ("bfloat16", 32000, 2, 3),
        ("bfloat16", 50257, 4, 4),
        ("bfloat16", 128256, 8, 3),
        ("bfloat16", 151936, 16, 4),
        ("bfloat16", 262144, 16, 3),
        ("float32", 32000, 4, 3),
        ("float32", 50257, 8, 4),
        ("float32", 128256, 16, 3),
        ("float32", 151936, 16, 2),
        ("float32", 262144, 16, 1),
    ],
)
def test_shared_memory_of_the_documented_clusters(dtype, vocab, blocks, resident, cuda_extension):
    """docs/performance.md has the table."""
    used = cuda_extension.kd_loss_block_bytes(vocab, blocks, dtype, dtype)
    print(f"{dtype} {vocab}: {blocks} blocks of {used} bytes")
    # The logits of both sides, the exchange between the blocks, and little more.
    logits = 2 * vocab * (2 if dtype == "bfloat16" else 4) // blocks
    assert logits < used <= MOST_BLOCK_BYTES
    assert used < logits + 8 * 1024
    assert min(MOST_BLOCKS, MULTIPROCESSOR_BYTES // (used + SYSTEM_BYTES)) == resident
    if blocks > 1:
        half = cuda_extension.kd_loss_block_bytes(vocab, blocks // 2, dtype, dtype)
        assert MULTIPROCESSOR_BYTES // (half + SYSTEM_BYTES) < 3


# What Python hands to the kernel, as far as that goes without a device.

OPTIONS = {
    "divergence": "jsd",
    "beta": 0.5,
    "scale_t2": True,
    "alpha": 0.5,
    "ignore_index": -100,
    "vocab_size": 8,
    "need_hard": True,
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_every_argument_reaches_the_launcher(cuda_extension, monkeypatch):
    assert cuda_extension.cuda_runtime_problem()
    blocks, reason = cuda_extension.plan_kd_loss_cluster(0, 1000, "float32", "float32", 0)
    assert (blocks, reason[:4]) == (0, "cuda")

    class Stream:
        cuda_stream = 0

    monkeypatch.setattr(kd_loss_ops, "_cluster_blocks", lambda *_: (2, ""))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream)
    rows = torch.zeros(1, 2, 8)
    for temperature in (1, torch.ones(2)):
        with pytest.raises(RuntimeError, match="the CUDA kernel did not start: cuda"):
            kd_loss_ops._cuda_rows(
                rows, rows, torch.zeros(2).int(), torch.ones(2), temperature, 2.0,
                torch.ones(1), torch.empty_like(rows), **OPTIONS,
            )  # fmt: skip


def test_a_teacher_in_float64_is_narrowed(monkeypatch):
    types = []

    def planned(device, vocab_size, student, teacher, divergence):
        types.append((student, teacher))
        return 0, "no device"

    monkeypatch.setattr(kd_loss_ops, "_cluster_blocks", planned)
    monkeypatch.setattr(kd_loss_ops, "_triton_rows", lambda *_, **__: None)
    rows = torch.zeros(1, 2, 8)
    kd_loss_ops._cuda_rows(
        rows.bfloat16(), rows.double(), None, None, 1.0, 1.0, None, None, **OPTIONS
    )
    assert types == [("bfloat16", "float32")]


def test_rows_without_a_place_go_to_triton_unless_cuda_was_named(monkeypatch):
    monkeypatch.setattr(kd_loss_ops, "_cluster_blocks", lambda *_: (0, "too wide"))
    monkeypatch.setattr(kd_loss_ops, "_triton_rows", lambda *_, **options: options["divergence"])
    rows = torch.zeros(1, 2, 8)
    arguments = (rows, rows, None, None, 1.0, 1.0, None, None)
    assert kd_loss_ops._cuda_rows(*arguments, **OPTIONS) == "jsd"
    monkeypatch.setattr(registry, "chosen", lambda: "cuda")
    with pytest.raises(RuntimeError, match="'cuda' cannot serve this call: too wide"):
        kd_loss_ops._cuda_rows(*arguments, **OPTIONS)


@pytest.fixture
def _forget():
    registry.missing.cache_clear()
    yield
    registry.missing.cache_clear()


@pytest.mark.usefixtures("_forget")
@pytest.mark.parametrize(
    ("capability", "extension", "reason"),
    [
        ((8, 0), object(), "compute capability 9.0 or newer, and there is 8.0"),
        ((9, 0), object(), "built without CUDA kernels"),
        ((9, 0), type("", (), {"cuda_runtime_problem": lambda: "old driver"}), "old driver"),
        ((10, 0), type("", (), {"cuda_runtime_problem": lambda: ""}), None),
    ],
)
def test_why_there_is_no_cuda_backend(capability, extension, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(registry, "extension", lambda: extension)
    if registry.missing("cpp") is not None:
        pytest.skip("the C++ extension was not built")
    answer = registry.missing("cuda")
    assert (answer is None) if reason is None else (reason in answer)
    assert ("cuda" in kdfast.available_backends()) == (reason is None)
