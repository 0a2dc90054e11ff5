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
from kdfast.kernels.attention_mse import attention_mse_sums
from kdfast.kernels.gradient import scale_gradient_
from kdfast.kernels.hidden import hidden_cosine_rows, hidden_mse_rows
from kdfast.kernels.kd_loss import kd_loss_rows
from kdfast.kernels.linear_topk_kd_loss import (
    entry_hidden_gradient,
    entry_logits,
    entry_weight_gradient,
)
from kdfast.kernels.topk_kd_loss import topk_kd_loss_rows
from kdfast.kernels.truncated_softmax import truncated_softmax_rows
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

CAPABILITIES = (80, 90, 100)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

# Triton 3.6 puts down a number or two per row in a few of the kernels.
MOST_STACK = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 24

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
def compiled_all(monkeypatch):
    """Run a launcher; what it would have launched comes back, compiled for a capability."""
    kernels = []
    run = JITFunction.run

    def compile_only(self, *args, warmup, **kwargs):
        kernels.append(run(self, *args, warmup=True, **kwargs))

    def compile_for(capability, launcher, *args, **kwargs):
        kernels.clear()
        monkeypatch.setattr(triton.runtime.driver, "_active", Device(capability))
        monkeypatch.setattr(JITFunction, "run", compile_only)
        launcher(*args, **kwargs)
        return list(kernels)

    return compile_for


@pytest.fixture
def compiled(compiled_all):
    """The same of a launcher that launches one kernel."""

    def compile_for(*args, **kwargs):
        (kernel,) = compiled_all(*args, **kwargs)
        return kernel

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


def assert_lean(kernel, folder, most_registers=MOST_REGISTERS, most_stack=0):
    usage = dump(kernel, folder, "--dump-resource-usage")
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert used["STACK"] <= max(most_stack, MOST_STACK)
    assert used["LOCAL"] == 0
    assert used["REG"] <= most_registers


def accesses(kernel, folder):
    """How many loads and stores of global memory there are, by instruction and bits."""
    counts = collections.Counter()
    sass = dump(kernel, folder, "--dump-sass")
    for name, modifiers in re.findall(r"\b(LDGSTS|LDG|STG)((?:\.\w+)+)", sass):
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


# The truncated operations.

# Vocabulary and entries: a small row, a large one, and one of as many entries as there may be.
TRUNCATED = [(2048, 64), (128256, 64), (128256, 1024)]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("vocab", "k"), TRUNCATED)
def test_truncated_softmax(vocab, k, dtype, capability, compiled, tmp_path):
    logits = torch.empty(1, 4, vocab, dtype=dtype)
    kernel = compiled(capability, truncated_softmax_rows, logits, k, 2.0, vocab_size=vocab)
    # Two numbers that are put down once per row, on capability 10.0 alone.
    assert_lean(kernel, tmp_path, most_stack=16 if capability == 100 else 0)
    launch = tuning.row_launch(tuning.TRUNCATED_SOFTMAX, dtype.itemsize, vocab)
    assert kernel.metadata.num_warps == launch["num_warps"]
    # Two of these rows at once on a multiprocessor.
    assert 2 * kernel.metadata.shared <= 96 * 1024
    # The sweep, in the interior and in the edge. The interior of a large row is asked for before
    # the loop and in it, past the registers.
    vectors = launch["BLOCK_V"] * dtype.itemsize // (launch["num_warps"] * 32 * 16)
    counts = accesses(kernel, tmp_path)
    assert counts["LDG", 128] >= (2 if launch["STAGES"] == 1 else 1) * vectors
    assert counts["LDGSTS", 128] == (0 if launch["STAGES"] == 1 else launch["STAGES"] * vectors)


def launch_topk_kd_loss(
    vocab,
    k,
    dtype=torch.bfloat16,
    tail="bucket",
    divergence="jsd",
    *,
    rows=4,
    gradient=True,
    labels=True,
    temperature=2.0,
):
    """With the JSD and the hard term at a temperature, the largest of the kernel's shapes."""
    student = torch.empty(1, rows, vocab, dtype=dtype)
    topk_kd_loss_rows(
        student, torch.empty(rows, k), torch.zeros(rows, k, dtype=torch.long),
        torch.zeros(rows, dtype=torch.long) if labels else None, None, temperature, torch.ones(1),
        torch.empty_like(student) if gradient else None, tail=tail, divergence=divergence,
        beta=0.5, scale_t2=True, alpha=0.5 if labels else 1.0, ignore_index=-100,
        vocab_size=vocab, need_hard=False, smallest_bucket=1e-7,
    )  # fmt: skip


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("vocab", "k", "divergence", "most_stack"),
    [
        (2048, 64, "jsd", 0),
        (128256, 64, "forward_kl", 0),
        # Two numbers in float64 that are put down once per row, on capability 10.0 alone.
        (128256, 64, "jsd", 16),
        (128256, 1024, "jsd", 0),
    ],
)
def test_topk_kd_loss(vocab, k, divergence, most_stack, dtype, capability, compiled, tmp_path):
    table = tuning.TOPK_KD_LOSS if k == 64 else tuning.TOPK_KD_LOSS_OF_MANY
    launch = tuning.row_launch(table, dtype.itemsize, vocab)
    kernel = compiled(capability, launch_topk_kd_loss, vocab, k, dtype, divergence=divergence)
    assert kernel.metadata.num_warps == launch["num_warps"]
    assert_lean(kernel, tmp_path, launch["maxnreg"], most_stack)
    counts = accesses(kernel, tmp_path)
    # Two sweeps, in the interior and in the edge.
    vectors = launch["BLOCK_V"] * dtype.itemsize // (launch["num_warps"] * 32 * 16)
    assert counts["LDG", 128] >= 4 * vectors
    assert counts["STG", 128] >= 2 * vectors


def test_other_shapes_of_topk_kd_loss(compiled, tmp_path):
    options = {"labels": False, "divergence": "forward_kl"}
    without_gradient = compiled(90, launch_topk_kd_loss, 32000, 64, gradient=False, **options)
    support = compiled(90, launch_topk_kd_loss, 32000, 64, tail="support", **options)
    others = [
        compiled(90, launch_topk_kd_loss, 32000, 64, tail=tail, divergence="forward_kl")
        for tail in ("renormalize", "none", "support")
    ]
    off_the_boundary = compiled(90, launch_topk_kd_loss, 50257, 200)
    for kernel in (without_gradient, support, *others, off_the_boundary):
        assert_lean(kernel, tmp_path, 80)
    # The support alone is gathered; what it writes is zeros.
    assert accesses(support, tmp_path)["LDG", 128] == 0
    assert accesses(support, tmp_path)["STG", 128] >= 1
    assert accesses(without_gradient, tmp_path)["STG", 128] == 0
    assert accesses(off_the_boundary, tmp_path)["LDG", 128] >= 2


def test_values_do_not_compile_the_truncated_operations_anew(compiled):
    kernel = compiled(90, launch_topk_kd_loss, 32000, 64, rows=16)
    assert compiled(90, launch_topk_kd_loss, 48000, 50, rows=4, temperature=3.0) is kernel
    logits = torch.empty(1, 4, 32000, dtype=torch.bfloat16)
    kernel = compiled(90, truncated_softmax_rows, logits, 64, 2.0, vocab_size=32000)
    assert compiled(90, truncated_softmax_rows, logits, 40, 1.0, vocab_size=16000) is kernel


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products_with_entries(dtype, capability, compiled, tmp_path):
    hidden, weight = torch.empty(8, 4096, dtype=dtype), torch.empty(100, 4096, dtype=dtype)
    indices, gradient = torch.zeros(8, 64, dtype=torch.long), torch.empty(8, 64)
    order, offsets = torch.zeros(512, dtype=torch.long), torch.zeros(9, dtype=torch.long)
    for launcher, *arguments in (
        (entry_logits, hidden, weight, indices),
        (entry_hidden_gradient, gradient, weight, indices, torch.empty(8, 4096)),
        (entry_weight_gradient, gradient, hidden, order, offsets, torch.empty(8, 4096)),
    ):
        kernel = compiled(capability, launcher, *arguments)
        # 128 registers leave room for 16 warps.
        assert_lean(kernel, tmp_path, 128)
        vectors = dtype.itemsize * 16 * 256 // (4 * 32 * 16)
        assert accesses(kernel, tmp_path)["LDG", 128] >= vectors


# Hidden states.

# One width for each entry of the tuning tables. The first are multiples of 8 and not of 16.
WIDTHS = (312, 1000, 4096)


def launch_hidden_mse(
    width, dtype, teacher_dtype=None, *, rows=4, gradient_dtype=None, gradient=True, bias=True
):
    student = torch.empty(1, rows, width, dtype=dtype)
    hidden_mse_rows(
        student, torch.empty(1, rows, width, dtype=teacher_dtype or dtype),
        torch.empty(width) if bias else None, torch.ones(rows).bool(), torch.ones(()).double(),
        torch.empty_like(student, dtype=gradient_dtype) if gradient else None,
    )  # fmt: skip


def launch_hidden_cosine(width, dtype, teacher_dtype=None, *, rows=4, gradient=True):
    student = torch.empty(1, rows, width, dtype=dtype)
    hidden_cosine_rows(
        student, torch.empty(1, rows, width, dtype=teacher_dtype or dtype),
        torch.ones(rows).bool(), torch.ones(()).double(),
        torch.empty_like(student) if gradient else None, epsilon=1e-8,
    )  # fmt: skip


HIDDEN_LAUNCHES = [
    pytest.param(launch_hidden_mse, tuning.HIDDEN_MSE, 1, id="hidden_mse"),
    pytest.param(launch_hidden_cosine, tuning.HIDDEN_COSINE, 3, id="hidden_cosine"),
]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("launch_hidden", "table", "sweeps"), HIDDEN_LAUNCHES)
def test_every_launch_on_hidden_states(
    launch_hidden, table, sweeps, dtype, capability, compiled, tmp_path
):
    launches = [launch for _, launch in table[dtype.itemsize]]
    for width, launch in zip(WIDTHS, launches, strict=True):
        kernel = compiled(capability, launch_hidden, width, dtype)
        assert kernel.metadata.num_warps == launch["num_warps"]
        assert_lean(kernel, tmp_path, launch["maxnreg"])
        counts = accesses(kernel, tmp_path)
        # Each sweep loads both sides, in the interior and in the edge.
        vectors = launch["BLOCK_V"] * dtype.itemsize // (launch["num_warps"] * 32 * 16)
        assert counts["LDG", 128] >= 4 * vectors * sweeps
        assert counts["LDG", 16] == 0
        # The mask, and the scale of the gradient.
        assert counts["LDG", 8] == 1
        assert counts["STG", 128] >= 2 * vectors


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_other_shapes_of_the_kernels_on_hidden_states(capability, compiled, tmp_path):
    # As the products of half precision have it: projected in float32, a gradient to multiply with.
    projected = compiled(
        capability, launch_hidden_mse, 768, torch.float32, torch.bfloat16,
        gradient_dtype=torch.bfloat16,
    )  # fmt: skip
    assert_lean(projected, tmp_path)
    # Four of the student's vectors, two of the teacher's and four of the bias.
    assert accesses(projected, tmp_path)["LDG", 128] >= 10
    for launch_hidden in (launch_hidden_mse, launch_hidden_cosine):
        mixed = compiled(capability, launch_hidden, 768, torch.float32, torch.bfloat16)
        without_gradient = compiled(capability, launch_hidden, 768, torch.bfloat16, gradient=False)
        off_the_boundary = [
            compiled(capability, launch_hidden, 769, dtype)
            for dtype in (torch.bfloat16, torch.float32)
        ]
        for kernel in (mixed, without_gradient, *off_the_boundary):
            assert_lean(kernel, tmp_path, 80)
            assert accesses(kernel, tmp_path)["LDG", 128] >= 2
        assert accesses(without_gradient, tmp_path)["STG", 128] == 0


def test_values_do_not_compile_the_kernels_on_hidden_states_anew(compiled):
    for launch_hidden in (launch_hidden_mse, launch_hidden_cosine):
        kernel = compiled(90, launch_hidden, 768, torch.bfloat16)
        assert compiled(90, launch_hidden, 1024, torch.bfloat16, rows=16) is kernel


# Attention maps.

# Both models' heads, one pair for each entry of a tuning table.
HEADS = [(64, 64), (128, 128)]


def launch_attention_mse(
    widths,
    dtype,
    method,
    *,
    causal=False,
    samples=2,
    length=512,
    gradients=True,
    tokens_first=False,
):
    """Two query heads to a key head, and a mask of each side."""

    def heads(count, width):
        tensor = torch.empty(samples, count, length, width, dtype=dtype)
        return tensor.transpose(1, 2).contiguous().transpose(1, 2) if tokens_first else tensor

    queries, keys = [heads(4, width) for width in widths], [heads(2, width) for width in widths]
    counted = torch.ones(samples, length).bool()
    gradient = [torch.empty_like(tensor) if gradients else None for tensor in (queries[0], keys[0])]
    attention_mse_sums(
        queries, keys, counted, counted, gradient, torch.ones(()), causal=causal, ratio=1.0,
        method=method,
    )  # fmt: skip


def assert_holds_blocks(kernel, folder):
    """Without spills, with rows in wide accesses, and without a product in TF32."""
    assert_lean(kernel, folder, 255)
    counts = accesses(kernel, folder)
    # Some of the rows are copied to shared memory without passing through registers.
    counts["LDG", 128] += len(re.findall(r"LDGSTS\S*\.128", dump(kernel, folder, "--dump-sass")))
    assert counts["LDG", 128] >= 4
    assert counts["LDG", 16] == 0
    assert counts["STG", 16] == 0
    assert "tf32" not in kernel.asm["ptx"]
    # What an A100 has, with the 1 KiB that the system takes.
    assert kernel.metadata.shared <= 163 * 1024


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("widths", HEADS)
def test_attention_mse(widths, dtype, capability, compiled_all, monkeypatch, tmp_path):
    for method, causal, names in (
        ("gram", False, ["gram_kernel", "join_kernel", "query_kernel", "key_kernel"]),
        ("gram", True, ["gram_kernel", "join_kernel", "query_kernel", "key_kernel"]),
        ("tiled", True, ["query_kernel", "key_kernel"]),
    ):
        kernels = compiled_all(
            capability, launch_attention_mse, widths, dtype, method, causal=causal
        )
        assert [kernel.metadata.name for kernel in kernels] == names
        for kernel in kernels:
            assert_holds_blocks(kernel, tmp_path)
    monkeypatch.setattr("kdfast.kernels.attention_mse.FEWEST_FUSED_PROGRAMS", 1)
    (kernel,) = compiled_all(capability, launch_attention_mse, widths, dtype, "gram")
    assert kernel.metadata.name == "fused_gram_kernel"
    assert_holds_blocks(kernel, tmp_path)


def products(kernel):
    """How many products a tensor core takes, by the types of their operands."""
    found = re.findall(r"(?:wgmma|mma|tcgen05\.mma)\S*\.(bf16|f16)\.\1", kernel.asm["ptx"])
    return {kind: found.count(kind) for kind in set(found)}


def test_products_of_attention_mse(compiled_all):
    """Rows of half precision go to the tensor cores as they are, and float32 does not go there."""
    for dtype, kind in ((torch.bfloat16, "bf16"), (torch.float16, "f16")):
        grams, _, query, _ = compiled_all(90, launch_attention_mse, (64, 64), dtype, "gram")
        assert set(products(grams)) == {kind}
        # Matrices in float32, in two parts of bfloat16.
        assert set(products(query)) == {"bf16"}
    for method in ("gram", "tiled"):
        for kernel in compiled_all(90, launch_attention_mse, (64, 64), torch.float32, method):
            assert products(kernel) == {}


def test_other_shapes_of_attention_mse(compiled_all, tmp_path):
    for widths in ((64, 128), (48, 80)):
        kernels = compiled_all(90, launch_attention_mse, widths, torch.float16, "gram", causal=True)
        for kernel in kernels:
            assert_holds_blocks(kernel, tmp_path)
    for method in ("gram", "tiled"):
        options = {"gradients": False}
        for kernel in compiled_all(
            90, launch_attention_mse, (64, 64), torch.bfloat16, method, **options
        ):
            assert_lean(kernel, tmp_path, 255)
    # Heads of a few channels, padded.
    for kernel in compiled_all(90, launch_attention_mse, (1, 5), torch.float32, "gram"):
        assert_lean(kernel, tmp_path, 255)


def test_values_do_not_compile_attention_mse_anew(compiled_all):
    for method, causal in (("gram", True), ("tiled", False)):
        first, second = (
            compiled_all(
                90, launch_attention_mse, (64, 64), torch.bfloat16, method, causal=causal, **sizes
            )
            for sizes in ({}, {"samples": 3, "length": 333, "tokens_first": True})
        )
        assert all(one is other for one, other in zip(first, second, strict=True))
