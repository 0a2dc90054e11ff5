"""The Triton kernels of the losses between hidden states in Triton's interpreter, against the
specification in float64."""

import math
import os

import pytest
import torch
from tolerances import GRADIENT, LOSS, assert_gradient_close, assert_loss_close, relative_error

import kdfast
from kdfast import reference

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs TRITON_INTERPRET=1 from the start of the process, as `make test` sets it",
        allow_module_level=True,
    )

from kdfast.kernels import tuning
from kdfast.kernels.hidden import hidden_cosine_rows, hidden_mse_rows

# The interpreter computes in numpy, which warns where a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("hidden_mse", "hidden_cosine")
EPSILON = reference.COSINE_EPS


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks of a few lanes, so that a small width has an interior, a head and a rest."""
    for table in (tuning.HIDDEN_MSE, tuning.HIDDEN_COSINE):
        for element_size in table:
            launch = {"BLOCK_V": 64, "num_warps": 1}
            monkeypatch.setitem(table, element_size, ((math.inf, launch),))


def states(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def misaligned(values, offset):
    """The same values, starting `offset` elements behind a 16-byte boundary."""
    storage = torch.empty(values.numel() + offset, dtype=values.dtype)
    return storage[offset:].view(values.shape).copy_(values)


def rows_of(name, student, teacher, mask=None, grad_scale=None, gradient=None, *, bias=None):
    if name == "hidden_mse":
        return hidden_mse_rows(student, teacher, bias, mask, grad_scale, gradient)
    return hidden_cosine_rows(student, teacher, mask, grad_scale, gradient, epsilon=EPSILON)


def oracle(name, student, teacher, mask=None, grad_scale=None, *, bias=None):
    """Each row's loss in float64, and the gradient of what the scales make of them."""
    student = student.double().requires_grad_()
    shifted = student if bias is None else student + bias.double()
    mask = None if mask is None else mask.view(student.shape[:2])
    specification = getattr(reference, f"{name}_rows")
    losses = specification(shifted, teacher.double(), mask=mask).flatten()
    scale = torch.ones(()) if grad_scale is None else grad_scale
    (gradient,) = torch.autograd.grad((losses * scale).sum(), student)
    return losses.detach(), gradient


def assert_swept(name, student, teacher, *per_row, gradient=None, bias=None):
    expected = oracle(name, student, teacher, *per_row, bias=bias)
    if gradient is None:
        gradient = torch.full(student.shape, math.nan)
    per_row += (None,) * (2 - len(per_row))
    losses = rows_of(name, student, teacher, *per_row, gradient, bias=bias)
    assert losses.shape == (student.shape[:2].numel(),)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(
        losses.double(), expected[0], rtol=LOSS[torch.float32], atol=1e-12, equal_nan=True
    )
    assert relative_error(gradient, expected[1]) <= GRADIENT[torch.float32]
    return losses, gradient


# Every precision and width.


@pytest.mark.parametrize("width", [1, 7, 64, 203])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_matches_reference(name, dtype, width):
    student, teacher = states(1, 3, width, dtype=dtype), states(1, 3, width, dtype=dtype)
    if name == "hidden_cosine" and width == 1:
        # The cosine of numbers is the sign of their product, which has no gradient.
        gradient = torch.full(student.shape, math.nan)
        losses = rows_of(name, student, teacher, gradient=gradient)
        signs = (student.double() * teacher.double()).sign().flatten()
        torch.testing.assert_close(losses.double(), 1 - signs)
        assert gradient.abs().max() < 1e-4
        return
    assert_swept(name, student, teacher)


@pytest.mark.parametrize("width", [312, 768, 4100])
@pytest.mark.parametrize("name", NAMES)
def test_precision_in_blocks_of_the_tuned_size(name, width, monkeypatch):
    monkeypatch.undo()
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = states(1, 2, width, dtype=dtype), states(1, 2, width, dtype=dtype)
        assert_swept(name, student, teacher)


@pytest.mark.parametrize("teacher_dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_precisions_that_differ(name, dtype, teacher_dtype):
    assert_swept(name, states(1, 2, 140, dtype=dtype), states(1, 2, 140, dtype=teacher_dtype))


@pytest.mark.parametrize("distance", [1e-1, 1e-3])
def test_the_cosine_keeps_its_digits_near_convergence(distance):
    student = states(1, 4, 768)
    teacher = student + distance * torch.randn_like(student)
    gradient = torch.empty_like(student)
    losses = rows_of("hidden_cosine", student, teacher, gradient=gradient)
    expected, expected_gradient = oracle("hidden_cosine", student, teacher)
    # The interpreter rounds ratio · t before it is subtracted, which a GPU does not.
    assert relative_error(losses, expected) < max(1e-6, 5e-9 / distance)
    assert relative_error(gradient, expected_gradient) < 2e-7 / distance


@pytest.mark.parametrize(
    ("name", "scale"),
    # A cosine has no norms below EPSILON.
    [
        ("hidden_mse", 1e-12),
        *((name, scale) for name in NAMES for scale in (10 * EPSILON, 1.0, 1e4)),
    ],
)
def test_zero_where_they_agree(name, scale):
    student = scale * states(1, 3, 203)
    gradient = torch.full(student.shape, math.nan)
    losses = rows_of(name, student, student.clone(), gradient=gradient)
    assert (losses == 0).all()
    assert (gradient == 0).all()


def test_vectors_of_zeros_and_below_epsilon():
    student, teacher = states(1, 6, 203), states(1, 6, 203)
    student[:, 0], teacher[:, 1] = 0, 0
    student[:, 2], teacher[:, 2] = 0, 0
    student[:, 3] *= 1e-11
    teacher[:, 4] *= 1e-11
    losses, gradient = assert_swept("hidden_cosine", student, teacher)
    assert losses[:3].tolist() == [1, 1, 1]
    # The size that the public docstring names.
    assert gradient[0, 0].norm() == pytest.approx(1e8)
    assert (gradient[0, 1:3] == 0).all()


# Tokens.


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_masks_and_scales(name, per_row):
    student, teacher = states(2, 5, 150), states(2, 5, 150, dtype=torch.bfloat16)
    mask = torch.rand(10) < 0.6
    mask[:2] = torch.tensor([True, False])
    scale = torch.randn(10, dtype=torch.float64) if per_row else torch.tensor(-0.3).double()
    expected = oracle(name, student, teacher, mask, scale)
    student.view(10, -1)[~mask], teacher.view(10, -1)[~mask] = math.nan, math.nan
    # The interpreter does not round to bfloat16 as a GPU does.
    for gradient_dtype in (torch.float32, torch.float16):
        gradient = torch.full(student.shape, math.nan, dtype=gradient_dtype)
        losses = rows_of(name, student, teacher, mask, scale, gradient)
        torch.testing.assert_close(losses.double(), expected[0], rtol=1e-6, atol=0)
        assert_gradient_close(gradient, expected[1])
        assert (gradient.view(10, -1)[~mask] == 0).all()
        assert (losses[~mask] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_stays_in_its_row(name):
    student, teacher = states(1, 4, 150), states(1, 4, 150)
    student[0, 1, 149], teacher[0, 2, 3] = math.nan, math.nan
    gradient = torch.zeros_like(student)
    losses = rows_of(name, student, teacher, gradient=gradient)
    assert losses.isnan().tolist() == [False, True, True, False]
    assert gradient[0, [0, 3]].isfinite().all()
    assert gradient[0, 1:3].isnan().any(-1).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 3, 9), (2, 0, 9), (1, 2, 0)])
def test_nothing(name, shape):
    losses = rows_of(name, torch.empty(shape), torch.empty(shape), gradient=torch.empty(shape))
    assert losses.shape == (shape[0] * shape[1],)
    assert (losses == (1 if name == "hidden_cosine" else 0)).all()


# Layouts.


@pytest.mark.parametrize(
    ("dtypes", "offsets"),
    [
        ((torch.float32, torch.float32), (1, 1, 1)),
        ((torch.float32, torch.float32), (3, 0, 2)),
        ((torch.bfloat16, torch.bfloat16), (3, 3, 0)),
        ((torch.bfloat16, torch.bfloat16), (0, 5, 7)),
        ((torch.float32, torch.bfloat16), (4, 4, 4)),
        ((torch.bfloat16, torch.float32), (0, 2, 0)),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_rows_that_start_anywhere(name, dtypes, offsets):
    for width in (203, 208):
        student, teacher = (
            misaligned(states(2, 3, width, dtype=dtype), offset)
            for dtype, offset in zip(dtypes, offsets, strict=False)
        )
        gradient = misaligned(torch.full(student.shape, math.nan), offsets[2])
        assert_swept(name, student, teacher, gradient=gradient)


@pytest.mark.parametrize("name", NAMES)
def test_strided_rows(name):
    student, teacher = states(4, 7, 150)[:, 1:], states(6, 4, 150).transpose(0, 1)
    whole = torch.full((4, 6, 160), math.nan)
    assert_swept(name, student, teacher, gradient=whole[..., :150])
    assert whole[..., 150:].isnan().all()


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
def test_a_bias_and_a_gradient_in_the_students_place(bias_dtype, offset):
    student, teacher = states(1, 5, 203), states(1, 5, 203, dtype=torch.bfloat16)
    bias = misaligned(states(203, dtype=bias_dtype), offset)
    mask = torch.arange(5) != 2
    expected = oracle("hidden_mse", student, teacher, mask, torch.tensor(0.2), bias=bias)
    losses = hidden_mse_rows(student, teacher, bias, mask, torch.tensor(0.2), student)
    torch.testing.assert_close(losses.double(), expected[0], rtol=1e-6, atol=0)
    assert_gradient_close(student, expected[1])


@pytest.mark.parametrize("name", NAMES)
def test_without_a_gradient(name):
    student, teacher = states(1, 3, 203), states(1, 3, 203)
    gradient = torch.empty_like(student)
    with_gradient = rows_of(name, student, teacher, gradient=gradient)
    assert torch.equal(rows_of(name, student, teacher), with_gradient)


# The public functions, with the kernels behind them.


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, dtype) for case in NAMES for dtype in (torch.float32, torch.float16)),
        *(("projected", dtype) for dtype in DTYPES),
    ],
)
def test_operations(case, dtype, reduction, monkeypatch):
    # Three rows of a projection's 40 features at a time.
    monkeypatch.setenv("KDFAST_CHUNK_BYTES", "500")
    student, teacher = states(2, 5, 24, dtype=dtype), states(2, 5, 40, dtype=dtype)
    tensors = {"student": student, "teacher": teacher}
    if case == "projected":
        tensors |= {"weight": states(40, 24, dtype=dtype), "bias": states(40, dtype=dtype)}
    else:
        tensors["teacher"] = teacher[..., :24]
    mask = torch.rand(2, 5) < 0.7
    incoming = torch.randn(2, 5) if reduction == "none" else torch.tensor(0.7)
    names = [name for name in tensors if name != "teacher"]

    def step(function, tensors, incoming):
        tensors = {n: v.detach().requires_grad_(n in names) for n, v in tensors.items()}
        loss = function(**tensors, mask=mask)
        return loss.detach(), torch.autograd.grad(loss, [tensors[n] for n in names], incoming)

    def specified(mask, **tensors):
        rows = getattr(reference, f"{name}_rows")(**tensors, mask=mask)
        return rows if reduction == "none" else rows.sum() / mask.sum()

    name = "hidden_cosine" if case == "hidden_cosine" else "hidden_mse"
    with kdfast.backend("triton"):
        operation = getattr(kdfast, name)
        result = step(lambda **t: operation(**t, reduction=reduction), tensors, incoming)
    wide = {n: v.double() for n, v in tensors.items()}
    expected = step(specified, wide, incoming.double())
    assert_loss_close(result[0], expected[0], dtype)
    for found, exact in zip(result[1], expected[1], strict=True):
        assert found.dtype == dtype
        assert_gradient_close(found, exact)
