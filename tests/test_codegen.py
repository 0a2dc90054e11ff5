"""What the Triton compiler makes of the kernels, for devices that need not be here.

Each kernel is compiled ahead of time from the very arguments that its launcher passes.
"""

import collections
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

import triton
from kdfast.kernels import tuning
from kdfast.kernels.gradient import scale_gradient_
from kdfast.kernels.kd_loss import kd_loss_rows
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

CAPABILITIES = (80, 90, 100)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

# At 64 registers a multiprocessor holds 1024 threads: 32 warps, to wait for memory in turns.
MOST_REGISTERS = 64

# Rows of whole vectors, one vocabulary for each entry of a tuning table.
VOCABULARIES = (2048, 32000, 128256)

# With a gradient.
SWEEPS = {"forward_kl": 2, "jsd": 3, "skew_reverse_kl": 3}


class Device:
    """In place of Triton's driver: enough of a device to compile for."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


@pytest.fixture
def compiled(monkeypatch):
    """Run a launcher; what it would have launched comes back, compiled for a capability."""
    kernels = []
    run = JITFunction.run

    def compile_only(self, *args, warmup, **kwargs):
        kernels.append(run(self, *args, warmup=True, **kwargs))

    def compile_for(capability, launcher, *args, **kwargs):
        monkeypatch.setattr(triton.runtime.driver, "_active", Device(capability))
        monkeypatch.setattr(JITFunction, "run", compile_only)
        launcher(*args, **kwargs)
        return kernels.pop()

    return compile_for


def launch_kd_loss(
    vocab,
    dtype=torch.bfloat16,
    divergence="forward_kl",
    *,
    rows=4,
    gradient=True,
    temperature=2.0,
    teacher_width=None,
    teacher_dtype=None,
):
    """With the hard term at a temperature, which is the largest of the kernel's shapes."""
    student = torch.empty(1, rows, vocab, dtype=dtype)
    teacher = torch.empty(1, rows, teacher_width or vocab, dtype=teacher_dtype or dtype)
    kd_loss_rows(
        student, teacher, torch.zeros(rows, dtype=torch.long), None, temperature, temperature,
        torch.ones(1), torch.empty_like(student) if gradient else None, divergence=divergence,
        beta=0.5, scale_t2=True, alpha=0.5, ignore_index=-100, vocab_size=vocab, need_hard=False,
    )  # fmt: skip


def dump(kernel, folder, what):
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [CUOBJDUMP, what, cubin]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def assert_lean(kernel, folder):
    usage = dump(kernel, folder, "--dump-resource-usage")
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert used["STACK"] == 0
    assert used["LOCAL"] == 0
    assert used["REG"] <= MOST_REGISTERS


def accesses(kernel, folder):
    """How many loads and stores of global memory there are, by instruction and bits."""
    counts = collections.Counter()
    sass = dump(kernel, folder, "--dump-sass")
    for name, modifiers in re.findall(r"\b(LDG|STG)((?:\.\w+)+)", sass):
        width = re.search(r"\.[US]?(8|16|64|128|256)\b", modifiers)
        counts[name, int(width[1]) if width else 32] += 1
    return counts


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "skew_reverse_kl"])
def test_every_tuned_launch_is_lean_and_wide(divergence, dtype, capability, compiled, tmp_path):
    launches = [launch for _, launch in tuning.KD_LOSS[dtype.itemsize]]
    for vocab, launch in zip(VOCABULARIES, launches, strict=True):
        kernel = compiled(capability, launch_kd_loss, vocab, dtype, divergence)
        assert kernel.metadata.num_warps == launch["num_warps"]
        assert_lean(kernel, tmp_path)
        counts = accesses(kernel, tmp_path)
        # Each sweep loads both sides, in the interior and in the edge. Nothing else is wide or 16
        # bits but the label's logit.
        vectors = launch["BLOCK_V"] * dtype.itemsize // (launch["num_warps"] * 32 * 16)
        assert counts["LDG", 128] == 4 * vectors * SWEEPS[divergence]
        assert counts["LDG", 16] == (1 if dtype.itemsize == 2 else 0)
        assert counts["STG", 128] >= 2 * vectors


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_other_shapes_of_the_kernel(capability, compiled, tmp_path):
    without_gradient = compiled(capability, launch_kd_loss, 32000, gradient=False)
    half = compiled(capability, launch_kd_loss, 32000, torch.float16, "tvd")
    mixed = compiled(capability, launch_kd_loss, 32000, teacher_dtype=torch.float32)
    for kernel in (without_gradient, half, mixed):
        assert_lean(kernel, tmp_path)
        assert accesses(kernel, tmp_path)["LDG", 128] >= 4
    assert accesses(without_gradient, tmp_path)["STG", 128] == 0


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_off_the_boundary_are_wide_inside(dtype, capability, compiled, tmp_path):
    kernel = compiled(capability, launch_kd_loss, 50257, dtype, "jsd")
    assert_lean(kernel, tmp_path)
    counts = accesses(kernel, tmp_path)
    assert counts["LDG", 128] == 2 * SWEEPS["jsd"]
    assert counts["STG", 128] >= 1
    # Only one side has the student's alignment: it keeps its wide loads.
    kernel = compiled(capability, launch_kd_loss, 50257, dtype, "jsd", teacher_width=50304)
    assert_lean(kernel, tmp_path)
    assert accesses(kernel, tmp_path)["LDG", 128] == SWEEPS["jsd"]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_scaling_a_gradient(dtype, capability, compiled, tmp_path):
    for vocab in (2048, 32000, 50257):
        gradient = torch.empty(4, vocab, dtype=dtype)
        for incoming in (torch.tensor(2.0), torch.ones(4)):
            kernel = compiled(capability, scale_gradient_, gradient, incoming)
            assert_lean(kernel, tmp_path)
            counts = accesses(kernel, tmp_path)
            assert counts["LDG", 128] >= 1
            assert counts["STG", 128] >= 1


def test_values_do_not_compile_anew(compiled):
    kernel = compiled(90, launch_kd_loss, 32000)
    assert compiled(90, launch_kd_loss, 32000, rows=16, temperature=3.0) is kernel
    assert compiled(90, launch_kd_loss, 48000) is kernel


@pytest.mark.parametrize("vocab", [1, 7, 16])
def test_smallest_vocabularies_compile(vocab, compiled, tmp_path):
    for divergence in ("reverse_kl", "skew_forward_kl"):
        assert_lean(compiled(90, launch_kd_loss, vocab, torch.bfloat16, divergence), tmp_path)
