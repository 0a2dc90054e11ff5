"""The Triton kernels in Triton's interpreter, on the CPU, against the specification in float64."""

import itertools
import math
import os

import pytest
import torch
from tolerances import GRADIENT, LOSS, relative_error

import kdfast
from kdfast import reference
from kdfast.reference import DIVERGENCES

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs TRITON_INTERPRET=1 from the start of the process, as `make test` sets it",
        allow_module_level=True,
    )

from kdfast.kernels import tuning
from kdfast.kernels.gradient import scale_gradient_
from kdfast.kernels.kd_loss import kd_loss_rows
from kdfast.kernels.primitives import row_phase

# The interpreter computes in numpy, which warns where a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IGNORED = -100


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks of a few lanes, so that a small vocabulary has an interior, a head and a rest."""
    for table in (tuning.KD_LOSS, tuning.SCALE_GRADIENT):
        for element_size in table:
            launch = {"BLOCK_V": 64, "num_warps": 1}
            monkeypatch.setitem(table, element_size, ((math.inf, launch),))


def logits(*shape, dtype=torch.float32, scale=3.0):
    return (torch.randn(*shape) * scale).to(dtype)


def misaligned(values, offset):
    """The same values, starting `offset` elements behind a 16-byte boundary."""
    storage = torch.empty(values.numel() + offset, dtype=values.dtype)
    return storage[offset:].view(values.shape).copy_(values)


def swept(
    student,
    teacher,
    labels=None,
    weight=None,
    temperature=1.0,
    teacher_temperature=None,
    grad_scale=None,
    gradient=None,
    **options,
):
    """Losses and gradient of the kernel, and the same of the specification in float64."""
    options = {
        "divergence": "forward_kl",
        "beta": 0.3,
        "scale_t2": True,
        "alpha": 1.0,
        "ignore_index": IGNORED,
        "vocab_size": student.shape[-1],
        "need_hard": True,
        **options,
    }
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
    if gradient is None:
        gradient = torch.full(student.shape, math.nan, dtype=torch.float32)
    losses = kd_loss_rows(student, teacher, *per_row, gradient, **options)
    assert losses.shape == (3, leading.numel())
    assert losses.dtype == torch.float32
    return losses, gradient, expected, expected_gradient


def assert_swept(*args, **kwargs):
    losses, gradient, expected, expected_gradient = swept(*args, **kwargs)
    torch.testing.assert_close(
        losses.double(), expected, rtol=LOSS[torch.float32], atol=2e-7, equal_nan=True
    )
    if expected_gradient.norm() < 1e-7:
        assert gradient.norm() < 1e-7
    else:
        assert relative_error(gradient, expected_gradient) <= GRADIENT[torch.float32]


# Every divergence, precision and vocabulary.


@pytest.mark.parametrize("vocab", [1, 7, 64, 203])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_matches_reference(divergence, dtype, vocab):
    student, teacher = logits(1, 3, vocab, dtype=dtype), logits(1, 3, vocab, dtype=dtype)
    labels = torch.randint(vocab, (3,))
    assert_swept(student, teacher, labels, divergence=divergence, alpha=0.4)
    assert_swept(student, teacher, None, None, 2.5, 1.5, divergence=divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_precision_in_blocks_of_the_tuned_size(divergence, monkeypatch):
    monkeypatch.undo()
    student, teacher = logits(1, 8, 5000), logits(1, 8, 5000)
    for temperature in (1.0, 2.0):
        losses, gradient, expected, expected_gradient = swept(
            student, teacher, None, None, temperature, divergence=divergence
        )
        assert relative_error(losses[1], expected[1]) < LOSS[torch.float32]
        assert relative_error(gradient, expected_gradient) < GRADIENT[torch.float32]


@pytest.mark.parametrize("epsilon", [1e-1, 1e-2])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_stays_exact_as_the_student_converges(divergence, epsilon, monkeypatch):
    monkeypatch.undo()
    teacher = logits(1, 4, 1003)
    student = teacher + epsilon * torch.randn_like(teacher)
    losses, gradient, expected, expected_gradient = swept(student, teacher, divergence=divergence)
    assert (losses >= 0).all()
    # p and q carry a rounding each. The divergence is ε² of them and the gradient ε.
    if divergence != "tvd":
        assert relative_error(losses, expected) < 3e-7 / epsilon**2
        assert relative_error(gradient, expected_gradient) < 1e-6 / epsilon


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_logits_have_no_divergence(divergence):
    student = logits(1, 2, 130)
    losses, gradient, *_ = swept(student, student.clone(), divergence=divergence)
    assert losses.abs().max() < 1e-7
    assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize(
    ("divergence", "beta"),
    [
        *itertools.product(["jsd", "skew_forward_kl", "skew_reverse_kl"], [0.01, 0.5, 0.99]),
        # The JSD is reverse_kl there, before it reaches a kernel.
        *itertools.product(["skew_forward_kl", "skew_reverse_kl"], [1.0]),
    ],
)
def test_mixture_weights(divergence, beta):
    student, teacher = logits(1, 2, 130), logits(1, 2, 130)
    losses, gradient, expected, expected_gradient = swept(
        student, teacher, divergence=divergence, beta=beta
    )
    torch.testing.assert_close(losses.double(), expected, rtol=3e-6, atol=1e-7)
    assert (gradient - expected_gradient).norm() <= 3e-6 * expected_gradient.norm() + 1e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_rounded_once(dtype):
    student, teacher = logits(1, 2, 130, dtype=dtype), logits(1, 2, 130, dtype=dtype)
    _, exact, *_ = swept(student, teacher)
    _, rounded, *_ = swept(student, teacher, gradient=torch.empty_like(student))
    # The interpreter truncates to bfloat16, where a GPU rounds to nearest.
    steps = 2 if dtype == torch.bfloat16 else 1
    bound = steps * relative_error(exact.to(dtype), exact) + 1e-7
    assert relative_error(rounded, exact) <= bound


# Layouts.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [64, 131])
def test_rows_with_strides(vocab, dtype):
    student = logits(3, 4, vocab, dtype=dtype)[:, :-1]
    teacher = logits(3, 5, vocab + 5, dtype=dtype)[:, 1:-1, :vocab]
    labels = torch.randint(vocab, (9,))
    for divergence in ("forward_kl", "jsd"):
        assert_swept(student, teacher, labels, divergence=divergence, alpha=0.5)


@pytest.mark.parametrize("offsets", [(0, 0, 0), (3, 3, 3), (3, 0, 3), (0, 5, 1), (7, 7, 0)])
@pytest.mark.parametrize("vocab", [5, 64, 131])
def test_any_alignment(vocab, offsets):
    student, teacher, gradient = (
        misaligned(logits(2, 2, vocab, dtype=torch.bfloat16), offset) for offset in offsets
    )
    for divergence in ("reverse_kl", "tvd"):
        gradient.fill_(math.nan)
        _, _, _, expected = swept(student, teacher, gradient=gradient, divergence=divergence)
        # Truncated by the interpreter, not rounded.
        assert relative_error(gradient, expected) <= 2**-7


@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("student_dtype", DTYPES, ids=str)
def test_unlike_dtypes(student_dtype, teacher_dtype):
    student, teacher = (
        logits(1, 3, 131, dtype=student_dtype),
        logits(1, 3, 131, dtype=teacher_dtype),
    )
    assert_swept(student, teacher, divergence="skew_reverse_kl")


def test_row_phase():
    values = torch.empty(4, 6, 131, dtype=torch.bfloat16)
    assert row_phase(values, 8) == (0, (6 * 131) % 8, 131 % 8)
    assert row_phase(values[:, 1:], 8) == (131 % 8, (6 * 131) % 8, 131 % 8)
    # The stride of a dimension of one row is never taken.
    assert row_phase(values[:1, :1], 8) == (0, 0, 0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("vocab", [64, 131])
def test_gradient_in_place_of_the_student(vocab, divergence):
    student, teacher = logits(2, 3, vocab + 2)[:, :-1], logits(2, 3, vocab)[:, :-1]
    labels = torch.tensor([0, IGNORED, 5, vocab - 1])
    options = {"vocab_size": vocab, "divergence": divergence, "alpha": 0.5}
    losses, gradient, *_ = swept(student, teacher, labels, None, 2.0, **options)
    # The specification reads the logits before the kernel takes their place.
    in_place, same, *_ = swept(student, teacher, labels, None, 2.0, gradient=student, **options)
    assert torch.equal(in_place, losses)
    assert torch.equal(same, gradient)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("vocab", "student_pad", "teacher_pad"), [(64, 7, 0), (131, 0, 9), (5, 70, 3)]
)
def test_padding_columns_do_not_exist(vocab, student_pad, teacher_pad, dtype):
    student = logits(1, 3, vocab + student_pad, dtype=dtype)
    teacher = logits(1, 3, vocab + teacher_pad, dtype=dtype)
    student[..., vocab:], teacher[..., vocab:] = math.nan, math.inf
    labels = torch.tensor([0, IGNORED, vocab - 1])
    for divergence in ("forward_kl", "jsd"):
        options = {"divergence": divergence, "alpha": 0.5, "vocab_size": vocab}
        assert_swept(student, teacher, labels, **options)
        assert (swept(student, teacher, labels, **options)[1][..., vocab:] == 0).all()


def test_no_rows():
    for shape in ((0, 3, 9), (2, 0, 9)):
        losses, gradient, *_ = swept(torch.empty(shape), torch.empty(shape))
        assert losses.shape == (3, 0)
        assert gradient.shape == shape


# What varies by token.


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_per_token_temperature_weight_and_scale(divergence):
    student, teacher = logits(2, 3, 131), logits(2, 3, 131)
    labels = torch.tensor([0, 130, IGNORED, 7, 64, IGNORED], dtype=torch.int32)
    assert_swept(
        student, teacher, labels, torch.rand(6, dtype=torch.float64), torch.rand(6) + 0.5,
        torch.rand(6) + 0.5, torch.randn(6), divergence=divergence, alpha=0.3, scale_t2=False,
    )  # fmt: skip


def test_values_per_row_may_have_strides():
    student, teacher = logits(1, 4, 31), logits(1, 4, 31)
    labels = torch.arange(8)[::2]
    weight, temperature = torch.rand(12)[::3], torch.tensor(2.0).expand(4)
    grad_scale = torch.rand(8)[::2]
    expected = swept(
        student, teacher, *(x.contiguous() for x in (labels, weight, temperature)), None,
        grad_scale.contiguous(), alpha=0.5,
    )  # fmt: skip
    strided = kd_loss_rows(
        student, teacher, labels, weight, temperature, temperature, grad_scale,
        gradient := torch.empty(1, 4, 31), divergence="forward_kl", beta=0.3, scale_t2=True,
        alpha=0.5, ignore_index=IGNORED, vocab_size=31, need_hard=True,
    )  # fmt: skip
    assert torch.equal(strided, expected[0])
    assert torch.equal(gradient, expected[1])


@pytest.mark.parametrize("grad_scale", [torch.tensor(65536.0), torch.tensor([0.25])])
def test_one_gradient_scale_for_all_rows(grad_scale):
    student, teacher = logits(1, 3, 31), logits(1, 3, 31)
    assert_swept(student, teacher, None, None, 1.0, None, grad_scale)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_label_dtypes(dtype):
    labels = torch.tensor([0, 5, 30], dtype=dtype)
    options = {"alpha": 0.5, "ignore_index": 5}
    assert_swept(logits(1, 3, 31), logits(1, 3, 31), labels, None, 2.0, **options)


@pytest.mark.parametrize("gradient_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [31, 300])
def test_ignored_rows_are_not_looked_at(vocab, gradient_dtype):
    student, teacher = logits(1, 3, vocab), logits(1, 3, vocab)
    student[:, 1], teacher[:, 1] = math.nan, math.nan
    labels, weight = torch.tensor([2, IGNORED, 3]), torch.tensor([1.0, math.nan, 1.0])
    gradient = torch.full((1, 3, vocab), math.nan, dtype=gradient_dtype)
    for divergence in ("forward_kl", "jsd"):
        losses, gradient, *_ = swept(
            student, teacher, labels, weight, gradient=gradient, divergence=divergence, alpha=0.5
        )
        assert (losses[:, 1] == 0).all()
        assert (gradient[:, 1] == 0).all()
        assert gradient.isfinite().all()
        assert losses.isfinite().all()


def test_label_outside_the_vocabulary_is_nan():
    # Where the specification would raise.
    losses = kd_loss_rows(
        logits(1, 3, 31), logits(1, 3, 31), torch.tensor([3, 31, -1]), None, 1.0, 1.0, None, None,
        divergence="forward_kl", beta=0.5, scale_t2=True, alpha=0.5, ignore_index=IGNORED,
        vocab_size=31, need_hard=True,
    )  # fmt: skip
    assert losses[0].isnan().tolist() == [False, True, True]


# Extremes.


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("where", [slice(0, 1), slice(0, 70), slice(60, None), slice(3, None, 2)])
def test_teacher_without_probability(where, divergence):
    student, teacher = logits(1, 2, 131), logits(1, 2, 131)
    teacher[..., where] = -math.inf
    if divergence == "reverse_kl":
        # q > 0 where p = 0.
        assert (swept(student, teacher, divergence=divergence)[0][1] == math.inf).all()
        student[..., where] = -math.inf
    assert_swept(student, teacher, divergence=divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("where", [slice(0, 1), slice(0, 70), slice(60, None), slice(3, None, 2)])
def test_student_without_probability(where, divergence):
    student, teacher = logits(1, 2, 131), logits(1, 2, 131)
    student[..., where] = -math.inf
    if divergence == "forward_kl":
        losses, gradient, _, expected_gradient = swept(student, teacher)
        assert (losses[1] == math.inf).all()
        assert relative_error(gradient, expected_gradient) < GRADIENT[torch.float32]
        teacher[..., where] = -math.inf
    assert_swept(student, teacher, divergence=divergence)


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -1e30, -1e9])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_columns_masked_with_a_finite_number(divergence, lowest):
    student, teacher = logits(1, 2, 131), logits(1, 2, 131)
    student[..., 5:100], teacher[..., 5:100] = lowest, lowest
    assert_swept(student, teacher, divergence=divergence)


@pytest.mark.parametrize("temperature", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_large_logits_and_extreme_temperatures(divergence, temperature):
    student = torch.empty(1, 3, 131).uniform_(-1e4, 1e4)
    teacher = student + logits(1, 3, 131, scale=2 * temperature)
    losses, gradient, expected, _ = swept(
        student, teacher, None, None, temperature, divergence=divergence, scale_t2=False
    )
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nan_stays_in_its_row(divergence, side, value):
    student, teacher = logits(1, 3, 131), logits(1, 3, 131)
    {"student": student, "teacher": teacher}[side][:, 1, 100] = value
    losses, gradient, *_ = swept(student, teacher, divergence=divergence)
    assert losses[1].isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(-1).tolist() == [[False, True, False]]


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_row_without_any_probability_is_nan(divergence, side):
    student, teacher = logits(1, 3, 131), logits(1, 3, 131)
    {"student": student, "teacher": teacher}[side][:, 1] = -math.inf
    losses, *_ = swept(student, teacher, divergence=divergence)
    assert losses[1].isnan().tolist() == [False, True, False]


def test_a_share_of_zero_ignores_an_infinite_term():
    student, teacher = logits(1, 2, 31), logits(1, 2, 31)
    student[..., 4] = -math.inf
    soft = {"divergence": "forward_kl", "alpha": 0.0, "labels": torch.tensor([3, 5])}
    hard = {"divergence": "jsd", "alpha": 1.0, "labels": torch.tensor([4, 4])}
    for part, options in ((1, soft), (2, hard)):
        losses, gradient, expected, expected_gradient = swept(student, teacher, **options)
        assert (losses[part] == math.inf).all()
        torch.testing.assert_close(losses[0].double(), expected[0], rtol=1e-6, atol=0)
        assert relative_error(gradient, expected_gradient) < GRADIENT[torch.float32]

    # The teacher has the -inf here.
    losses, *_ = swept(teacher, student, torch.tensor([3, 5]), divergence="reverse_kl", alpha=0.0)
    assert (losses[1] == math.inf).all()
    assert losses[0].isfinite().all()


def test_same_bits_every_run():
    student, teacher, labels = logits(1, 3, 300), logits(1, 3, 300), torch.tensor([1, 2, 3])
    first, second = (swept(student, teacher, labels, divergence="jsd", alpha=0.5) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


# The incoming gradient.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 64, 131])
def test_scale_gradient(vocab, dtype):
    gradient = logits(2, 3, vocab, dtype=dtype)
    exact = gradient.double() * 2.5
    scale_gradient_(gradient, torch.tensor(2.5))
    torch.testing.assert_close(gradient.double(), exact, rtol=torch.finfo(dtype).eps, atol=0)

    incoming = torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.5, 1.0]])
    exact = gradient.double() * incoming.unsqueeze(-1)
    scale_gradient_(gradient, incoming)
    assert torch.equal(gradient.double(), exact)


def test_scale_gradient_of_strided_rows():
    storage = logits(3, 5, 131)
    gradient, expected = storage[:, :-1], storage.clone()
    expected[:, :-1] *= 3.0
    scale_gradient_(gradient, torch.tensor(3.0))
    assert torch.equal(storage, expected)
    scale_gradient_(storage, torch.tensor([0.5]).expand(15).view(3, 5))
    assert torch.equal(storage, expected * 0.5)
    scale_gradient_(storage[0, 0], torch.tensor(2.0))
    assert torch.equal(storage[0, 0], expected[0, 0])
    scale_gradient_(torch.empty(0, 131), torch.tensor(2.0))


def test_an_incoming_gradient_of_one_touches_nothing(monkeypatch):
    from kdfast.kernels import gradient as module

    def refuse(*_, **__):
        raise AssertionError("the gradient was touched")

    monkeypatch.setattr(module, "store_block", refuse)
    scale_gradient_(logits(2, 131), torch.tensor(1.0))
    scale_gradient_(logits(2, 131), torch.ones(2))


# Through the public function.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_public_function(reduction, dtype):
    student, teacher = logits(2, 4, 131, dtype=dtype), logits(2, 4, 131, dtype=dtype)
    labels = torch.randint(131, (2, 4))
    labels[0, 1] = IGNORED
    options = {"divergence": "jsd", "alpha": 0.5, "temperature": 2.0, "reduction": reduction}

    def run(backend):
        leaf = student.clone().requires_grad_()
        with kdfast.backend(backend):
            loss = kdfast.kd_loss(leaf[:, :-1], teacher[:, :-1], labels[:, 1:], **options)
            (2 * loss.sum()).backward()
        return loss.detach(), leaf.grad

    loss, gradient = run("triton")
    expected, expected_gradient = run("torch")
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=2e-7)
    # Both round, and the interpreter truncates to bfloat16.
    allowed = {torch.float32: 4e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    assert relative_error(gradient, expected_gradient) < allowed


def test_overwriting_the_students_logits():
    student, teacher = logits(3, 131), logits(3, 131)
    expected = student.clone().requires_grad_()
    leaf = student.requires_grad_()
    with kdfast.backend("triton"):
        kdfast.kd_loss(expected, teacher).backward()
        activations = leaf * 1.0
        kdfast.kd_loss(activations, teacher, overwrite_student_logits=True).backward()
    assert torch.equal(leaf.grad, expected.grad)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_linear_kd_loss(divergence, softcap):
    student, weight = torch.randn(9, 8), torch.randn(150, 8)
    teacher = {"teacher_hidden": torch.randn(9, 12), "teacher_weight": torch.randn(150, 12)}
    labels = torch.randint(150, (9,))
    options = {"divergence": divergence, "student_softcap": softcap, "alpha": 0.5, "chunk_size": 4}
    results = {}
    for backend in ("triton", "torch"):
        leaves = student.clone().requires_grad_(), weight.clone().requires_grad_()
        with kdfast.backend(backend):
            loss = kdfast.linear_kd_loss(*leaves, labels=labels, **teacher, **options)
            loss.backward()
        results[backend] = (loss, *(leaf.grad for leaf in leaves))
    for result, expected in zip(*results.values(), strict=True):
        assert relative_error(result, expected) < 2e-6
