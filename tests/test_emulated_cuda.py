"""The CUDA kernel of kd_loss on an emulated device against the specification in float64.

The device, tests/emulated_device, is strict about alignment, barriers and what a block may touch,
and runs threads in an order drawn by chance.
"""

import ctypes
import itertools
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerances import GRADIENT, LOSS, relative_error

from kdfast import reference
from kdfast.reference import DIVERGENCES

COMPILER = shutil.which("g++")
if COMPILER is None or sys.platform != "linux":
    pytest.skip("needs g++ and ucontext", allow_module_level=True)

ROOT = Path(__file__).parent.parent
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIXED = [
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float16),
    (torch.float16, torch.bfloat16),
]
# The rows of a bfloat16 student with an odd vocabulary begin at any of the 8 columns of a boundary.
PER_BOUNDARY = 8
SPAN_STEP = 64
IGNORED = -100


class Matrix(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("outer_stride", ctypes.c_int64),
        ("inner_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int),
    )

    def __init__(self, rows):
        if rows is not None:
            super().__init__(rows.data_ptr(), *rows.stride()[:2], DTYPES.index(rows.dtype))


class RowValues(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("step", ctypes.c_int64),
        ("otherwise", ctypes.c_float),
    )

    def __init__(self, values, otherwise=1.0):
        if isinstance(values, torch.Tensor):
            super().__init__(values.data_ptr(), int(values.numel() > 1), otherwise)
        else:
            super().__init__(None, 0, otherwise if values is None else values)


class ClusterKdLoss(ctypes.Structure):
    """As csrc/cuda/kd_loss.h has it."""

    _fields_ = (
        ("student", Matrix),
        ("teacher", Matrix),
        ("gradient", Matrix),
        ("rows", ctypes.c_int64),
        ("inner_rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("vocab_size", ctypes.c_int),
        ("labels", ctypes.c_void_p),
        ("ignore_index", ctypes.c_int64),
        ("token_weight", RowValues),
        ("temperature", RowValues),
        ("teacher_temperature", RowValues),
        ("grad_scale", RowValues),
        ("losses", ctypes.c_void_p),
        ("divergence", ctypes.c_int),
        # From here to the two shares of the loss filled in by set_shares.
        ("teacher_share", ctypes.c_float),
        ("student_share", ctypes.c_float),
        ("shares_gap", ctypes.c_float),
        ("soft_share", ctypes.c_float),
        ("hard_share", ctypes.c_float),
        ("scale_t2", ctypes.c_bool),
        ("need_hard", ctypes.c_bool),
        ("hard_is_soft", ctypes.c_bool),
    )


class Share(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_int), ("count", ctypes.c_int), ("pad", ctypes.c_int))


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    library = tmp_path_factory.mktemp("emulated") / "kd_loss.so"
    source = ROOT / "tests" / "emulated_device" / "kd_loss.cpp"
    flags = ["-std=c++17", "-O1", "-ffp-contract=fast", "-fno-strict-aliasing", "-fPIC", "-shared"]
    command = [COMPILER, *flags, f"-I{source.parent}", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    device = ctypes.CDLL(str(library))
    device.kd_loss_in_clusters.restype = ctypes.c_char_p
    device.share_of.restype = Share
    return device


def logits(*shape, dtype=torch.float32, scale=3.0):
    return (torch.randn(*shape) * scale).to(dtype)


def misaligned(values, offset):
    """The same values, `offset` elements behind a 16-byte boundary, with NaN around them."""
    storage = torch.full((values.numel() + offset + 16,), math.nan, dtype=values.dtype)
    view = storage[offset : offset + values.numel()]
    assert storage.data_ptr() % 16 == 0
    return view.view(values.shape).copy_(values)


@pytest.fixture
def launched(device):
    """The losses of the kernel, `[3, rows]`."""

    def launch(
        student,
        teacher,
        labels,
        weight,
        temperature,
        teacher_temperature,
        grad_scale,
        gradient,
        *,
        divergence,
        beta,
        scale_t2,
        alpha,
        ignore_index,
        vocab_size,
        need_hard,
        blocks=2,
        seed=0,
    ):
        outer, inner, width = student.shape
        losses = torch.full((3, outer * inner), math.nan)
        call = ClusterKdLoss(
            Matrix(student), Matrix(teacher), Matrix(gradient), outer * inner, inner, width,
            vocab_size, None if labels is None else labels.data_ptr(), ignore_index,
            RowValues(weight), RowValues(temperature), RowValues(teacher_temperature),
            RowValues(grad_scale), losses.data_ptr(), DIVERGENCES.index(divergence),
            0, 0, 0, 0, 0, scale_t2,
            labels is not None and (need_hard or alpha < 1),
            not isinstance(temperature, torch.Tensor) and temperature == 1,
        )  # fmt: skip
        error = device.kd_loss_in_clusters(
            ctypes.byref(call), ctypes.c_double(beta), ctypes.c_double(alpha),
            ctypes.c_int64(teacher.shape[-1]), blocks, seed,
        )  # fmt: skip
        assert error == b""
        return losses

    return launch


OPTIONS = {
    "divergence": "forward_kl",
    "beta": 0.3,
    "scale_t2": True,
    "alpha": 1.0,
    "ignore_index": IGNORED,
    "need_hard": True,
}


@pytest.fixture
def swept(launched):
    """Losses and gradient of the kernel, and the same of the specification in float64."""

    def sweep(
        student,
        teacher,
        labels=None,
        weight=None,
        temperature=1.0,
        teacher_temperature=None,
        grad_scale=None,
        gradient=None,
        *,
        need_gradient=True,
        blocks=2,
        seed=0,
        **options,
    ):
        options = {**OPTIONS, "vocab_size": student.shape[-1], **options}
        teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
        per_row = (labels, weight, temperature, teacher_temperature, grad_scale)
        leading = student.shape[:2]

        def shaped(value):
            single = not isinstance(value, torch.Tensor) or value.numel() == 1 != leading.numel()
            return value if single else value.view(leading)

        expected_gradient = torch.empty(student.shape, dtype=torch.float64)
        expected = reference.kd_loss_rows(
            student.double(), teacher.double(), *map(shaped, per_row), expected_gradient, **options
        ).flatten(1)
        if gradient is None and need_gradient:
            gradient = torch.full(student.shape, math.nan)
        losses = launched(student, teacher, *per_row, gradient, blocks=blocks, seed=seed, **options)
        return losses, gradient, expected, expected_gradient

    return sweep


@pytest.fixture
def assert_swept(swept):
    def assert_close(*args, **kwargs):
        losses, gradient, expected, expected_gradient = swept(*args, **kwargs)
        torch.testing.assert_close(
            losses.double(), expected, rtol=LOSS[torch.float32], atol=2e-7, equal_nan=True
        )
        if expected_gradient.norm() < 1e-7:
            assert gradient.norm() < 1e-7
        else:
            assert relative_error(gradient, expected_gradient) <= GRADIENT[torch.float32]

    return assert_close


# How a row is laid over a cluster.


@pytest.mark.parametrize("blocks", [1, 2, 4, 8, 16])
def test_shares_are_the_row_and_begin_on_boundaries(blocks, device):
    for vocab in (1, 7, 63, 64, 65, 1000, 50257, 128256, 151936, 262144):
        span = device.span_of(vocab, blocks)
        assert span % SPAN_STEP == 0
        # No wider than the row asks for.
        assert (span - SPAN_STEP) * blocks < vocab + PER_BOUNDARY - 1
        for pad in range(PER_BOUNDARY):
            next_column = 0
            for rank in range(blocks):
                share = device.share_of(vocab, pad, span, rank)
                if share.count == 0:
                    continue
                assert share.begin == next_column
                assert share.pad == (pad if rank == 0 else 0)
                assert share.pad + share.count <= span
                assert (pad + share.begin - share.pad) % SPAN_STEP == 0
                next_column += share.count
            assert next_column == vocab


# Every divergence, precision, vocabulary and size of a cluster.


@pytest.mark.parametrize("vocab", [1, 7, 64, 203, 2500])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_matches_reference(divergence, dtype, vocab, assert_swept):
    student, teacher = logits(1, 3, vocab, dtype=dtype), logits(1, 3, vocab, dtype=dtype)
    labels = torch.randint(vocab, (3,))
    assert_swept(student, teacher, labels, divergence=divergence, alpha=0.4)
    assert_swept(student, teacher, None, None, 2.5, 1.5, divergence=divergence)


@pytest.mark.parametrize("blocks", [1, 4, 8, 16])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_every_size_of_a_cluster(divergence, blocks, assert_swept):
    for vocab in (5, 200, 5003):
        student, teacher = logits(1, 2, vocab), logits(1, 2, vocab)
        labels = torch.randint(vocab, (2,))
        options = {"divergence": divergence, "alpha": 0.4, "blocks": blocks}
        assert_swept(student, teacher, labels, None, 2.0, **options)


@pytest.mark.parametrize("vocab", [9000, 20011])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), *MIXED], ids=str)
def test_several_chunks_of_each_share(dtypes, vocab, assert_swept):
    student, teacher = (logits(1, 2, vocab, dtype=dtype) for dtype in dtypes)
    assert_swept(student, teacher, torch.tensor([0, vocab - 1]), alpha=0.5, divergence="jsd")


@pytest.mark.parametrize("epsilon", [1e-1, 1e-2])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_stays_exact_as_the_student_converges(divergence, epsilon, swept):
    teacher = logits(1, 4, 1003)
    student = teacher + epsilon * torch.randn_like(teacher)
    losses, gradient, expected, expected_gradient = swept(student, teacher, divergence=divergence)
    assert (losses >= 0).all()
    # p and q carry a rounding each. The divergence is ε² of them and the gradient ε.
    if divergence != "tvd":
        assert relative_error(losses, expected) < 3e-7 / epsilon**2
        assert relative_error(gradient, expected_gradient) < 1e-6 / epsilon


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_logits_have_no_divergence(divergence, swept):
    student = logits(1, 2, 130)
    losses, gradient, *_ = swept(student, student.clone(), divergence=divergence)
    assert losses.abs().max() < 1e-7
    assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize(
    ("divergence", "beta"),
    [
        *itertools.product(["jsd", "skew_forward_kl", "skew_reverse_kl"], [0.01, 0.5, 0.99]),
        ("skew_forward_kl", 1.0),
    ],
)
def test_mixture_weights(divergence, beta, swept):
    student, teacher = logits(1, 2, 130), logits(1, 2, 130)
    losses, gradient, expected, expected_gradient = swept(
        student, teacher, divergence=divergence, beta=beta
    )
    torch.testing.assert_close(losses.double(), expected, rtol=3e-6, atol=1e-7)
    assert (gradient - expected_gradient).norm() <= 3e-6 * expected_gradient.norm() + 1e-7


# Layouts.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [64, 131])
def test_rows_with_strides(vocab, dtype, assert_swept):
    student = logits(3, 4, vocab, dtype=dtype)[:, :-1]
    teacher = logits(3, 5, vocab + 5, dtype=dtype)[:, 1:-1, :vocab]
    labels = torch.randint(vocab, (9,))
    for divergence in ("forward_kl", "jsd"):
        assert_swept(student, teacher, labels, divergence=divergence, alpha=0.5)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), *MIXED], ids=str)
@pytest.mark.parametrize(
    "offsets", [(0, 0, 0), (3, 3, 3), (3, 0, 3), (0, 5, 1), (7, 7, 0), (1, 2, 4), (6, 3, 5)]
)
@pytest.mark.parametrize("vocab", [1, 5, 64, 131, 4099])
def test_any_alignment(vocab, offsets, dtypes, assert_swept):
    student, teacher = (
        misaligned(logits(2, 1, vocab, dtype=dtype), offset)
        for dtype, offset in zip(dtypes, offsets, strict=False)
    )
    gradient = misaligned(torch.full(student.shape, math.nan), offsets[2])
    for divergence in ("reverse_kl", "tvd"):
        assert_swept(student, teacher, gradient=gradient, divergence=divergence)
        # Nothing but the gradient was written.
        storage = torch.tensor([], dtype=gradient.dtype).set_(gradient.untyped_storage())
        assert storage[: offsets[2]].isnan().all()
        assert storage[offsets[2] + gradient.numel() :].isnan().all()
        gradient.fill_(math.nan)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gradient_dtype", DTYPES, ids=str)
def test_gradient_is_rounded_once(dtype, gradient_dtype, swept):
    student, teacher = logits(1, 2, 130, dtype=dtype), logits(1, 2, 130, dtype=dtype)
    _, exact, *_ = swept(student, teacher)
    for offset in (0, 1):
        rounded = misaligned(torch.zeros(student.shape, dtype=gradient_dtype), offset)
        _, rounded, *_ = swept(student, teacher, gradient=rounded)
        assert torch.equal(rounded, exact.to(gradient_dtype))


@pytest.mark.parametrize("blocks", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padding_columns(dtype, blocks, assert_swept, swept):
    for vocab, width in ((100, 103), (101, 128), (37, 900)):
        student, teacher = logits(2, 3, width, dtype=dtype), logits(2, 3, width + 9, dtype=dtype)
        student[..., vocab:], teacher[..., vocab:] = math.nan, math.inf
        labels = torch.randint(vocab, (6,))
        labels[1] = IGNORED
        student[0, 1] = math.nan
        options = {"vocab_size": vocab, "alpha": 0.5, "blocks": blocks}
        _, gradient, *_ = swept(student, teacher, labels, **options)
        assert (gradient[..., vocab:] == 0).all()
        assert (gradient[0, 1] == 0).all()
        assert_swept(student, teacher, labels, **options)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("vocab", [130, 4099])
def test_overwriting_either_side(vocab, divergence, swept):
    student, teacher = (logits(2, 2, vocab, dtype=torch.bfloat16) for _ in range(2))
    labels = torch.tensor([0, vocab - 1, IGNORED, 3])
    options = {"divergence": divergence, "alpha": 0.5, "blocks": 4}
    apart = torch.empty_like(student)
    losses, *_ = swept(student, teacher, labels, None, 2.0, gradient=apart, **options)
    for side in (0, 1):
        sides = [student.clone(), teacher.clone()]
        over, *_ = swept(*sides, labels, None, 2.0, gradient=sides[side], **options)
        assert torch.equal(over, losses)
        assert torch.equal(sides[side], apart)


# What a row comes with.


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_values_per_row(divergence, hard, assert_swept):
    student, teacher = logits(2, 3, 200), logits(2, 3, 200)
    labels = torch.randint(200, (6,)) if hard else None
    weight, temperature = torch.rand(6), torch.rand(6) * 3 + 0.5
    for grad_scale in (torch.tensor([0.25]), torch.rand(6), None):
        assert_swept(
            student, teacher, labels, weight, temperature, temperature * 1.5, grad_scale,
            divergence=divergence, alpha=0.3 if hard else 1.0, scale_t2=hard,
        )  # fmt: skip


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_term_without_a_share(alpha, assert_swept, swept):
    student, teacher = logits(1, 2, 200), logits(1, 2, 200)
    labels = torch.tensor([4, 199])
    assert_swept(student, teacher, labels, None, 2.0, alpha=alpha)
    teacher[:, :, :100] = -math.inf
    losses, gradient, _, expected_gradient = swept(
        student, teacher, labels, alpha=0.0, divergence="reverse_kl"
    )
    assert losses[0].isfinite().all()
    assert (losses[1] == math.inf).all()
    assert relative_error(gradient, expected_gradient) <= GRADIENT[torch.float32]


def test_only_the_loss(swept):
    student, teacher = logits(1, 2, 5000), logits(1, 2, 5000)
    for divergence in DIVERGENCES:
        losses, *_ = swept(student, teacher, divergence=divergence)
        alone, gradient, *_ = swept(student, teacher, divergence=divergence, need_gradient=False)
        assert gradient is None
        assert torch.equal(alone, losses)


# Special values.


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_probability_and_nan(divergence, swept):
    student, teacher = logits(1, 5, 3000), logits(1, 5, 3000)
    student[0, 0, :2000], teacher[0, 0, :2000] = -math.inf, -math.inf
    teacher[0, 1, 5], student[0, 2, 2900] = math.nan, math.inf
    student[0, 4], teacher[0, 4] = -math.inf, -math.inf
    losses, gradient, expected, expected_gradient = swept(student, teacher, divergence=divergence)
    assert losses[0].isnan().tolist() == [False, True, True, False, True]
    assert gradient[0].isnan().any(-1).tolist() == [False, True, True, False, True]
    torch.testing.assert_close(losses[:, 0].double(), expected[:, 0], rtol=1e-6, atol=1e-7)
    assert relative_error(gradient[0, 0], expected_gradient[0, 0]) < 2e-6


def test_student_without_probability_where_the_teacher_has_some(swept):
    student, teacher = logits(1, 1, 300), logits(1, 1, 300)
    student[..., :20] = -math.inf
    losses, gradient, *_ = swept(student, teacher)
    assert losses[0] == math.inf
    assert gradient.isfinite().all()
    losses, gradient, expected, _ = swept(student, teacher, divergence="jsd")
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("temperature", [1e-2, 10.0, 1e3])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_large_logits_and_extreme_temperatures(divergence, temperature, swept):
    student = torch.empty(1, 2, 1003).uniform_(-1e4, 1e4)
    teacher = student + logits(1, 2, 1003, scale=2 * temperature)
    losses, gradient, expected, _ = swept(
        student, teacher, None, None, temperature, divergence=divergence, scale_t2=False
    )
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("label", [-1, 128, 2**40])
def test_a_label_outside_the_vocabulary_makes_its_row_nan(label, launched):
    student, teacher = logits(1, 3, 130), logits(1, 3, 130)
    labels = torch.tensor([5, label, 3])
    options = {**OPTIONS, "alpha": 0.5, "vocab_size": 128}
    losses = launched(student, teacher, labels, None, 1.0, 1.0, None, None, **options)
    assert losses[0].isnan().tolist() == [False, True, False]


# The order of threads.


@pytest.mark.parametrize("offsets", [(0, 5), (5, 0), (7, 1)])
def test_no_chunk_is_read_before_it_arrives(offsets, assert_swept):
    student, teacher = (
        misaligned(logits(1, 1, 4099, dtype=torch.bfloat16), offset) for offset in offsets
    )
    for seed in range(8):
        assert_swept(student, teacher, seed=seed)


@pytest.mark.parametrize("divergence", ["reverse_kl", "skew_reverse_kl"])
def test_same_bits_in_every_order(divergence, swept):
    student, teacher = logits(1, 1, 5003), logits(1, 1, 5003)
    labels = torch.tensor([17])
    results = [
        swept(student, teacher, labels, divergence=divergence, alpha=0.5, blocks=4, seed=seed)
        for seed in range(8)
    ]
    for losses, gradient, *_ in results:
        assert torch.equal(losses, results[0][0])
        assert torch.equal(gradient, results[0][1])
