"""The losses between hidden states on a CUDA device, through the public functions, against
float64."""

import math

import pytest
import torch
from steps import needs_memory
from tolerances import assert_gradient_close, assert_loss_close, relative_error

import kdfast
from kdfast import reference

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from kdfast.kernels.hidden import hidden_mse_rows

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("hidden_mse", "hidden_cosine")
CASES = (*NAMES, "projected")

# Of the products of half precision, which take the difference rounded: by half an ulp, twice.
PRODUCTS = {torch.bfloat16: 2.0**-8 * 1.01, torch.float16: 2.0**-11 * 1.01}


@pytest.fixture(autouse=True)
def _triton():
    with kdfast.backend("triton"):
        yield
    torch.cuda.empty_cache()


def states(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda").to(dtype)


def arguments_of(case, *tokens, width, dtype):
    student = width if case != "projected" else max(1, width // 2)
    tensors = {
        "student": states(*tokens, student, dtype=dtype),
        "teacher": states(*tokens, width, dtype=dtype),
    }
    if case == "projected":
        tensors["weight"] = (student**-0.5 * states(width, student)).to(dtype)
        tensors["bias"] = states(width, dtype=dtype)
    return tensors


def step(function, tensors, incoming):
    tensors = {n: v.detach().requires_grad_(n != "teacher") for n, v in tensors.items()}
    loss = function(**tensors)
    names = [name for name in tensors if name != "teacher"]
    return loss.detach(), torch.autograd.grad(loss, [tensors[n] for n in names], incoming)


def loss_and_gradients(case, tensors, incoming=None, **options):
    name = "hidden_cosine" if case == "hidden_cosine" else "hidden_mse"
    return step(lambda **t: getattr(kdfast, name)(**t, **options), tensors, incoming)


def oracle(case, tensors, incoming=None, *, mask=None, reduction="mean"):
    name = "hidden_cosine" if case == "hidden_cosine" else "hidden_mse"

    def specified(**wide):
        losses = getattr(reference, f"{name}_rows")(**wide, mask=mask)
        if reduction == "none":
            return losses
        return losses.sum() / (losses.numel() if mask is None else mask.sum())

    wide = {n: v.double() for n, v in tensors.items()}
    return step(specified, wide, None if incoming is None else incoming.double())


def assert_same(case, result, expected, dtype):
    assert_loss_close(result[0], expected[0], dtype)
    for found, exact in zip(result[1], expected[1], strict=True):
        assert found.dtype == dtype
        if case == "projected" and dtype in PRODUCTS:
            assert relative_error(found, exact) <= PRODUCTS[dtype]
        else:
            assert_gradient_close(found, exact)


@pytest.mark.parametrize(
    ("width", "reduction"),
    list(zip([7, 312, 769, 2048, 4096, 12288], 3 * ["mean", "none"], strict=True)),
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case, dtype, width, reduction):
    tensors = arguments_of(case, 3, 70, width=width, dtype=dtype)
    mask = torch.rand(3, 70, device="cuda") < 0.7
    expected_of = {name: value.clone() for name, value in tensors.items()}
    for side in ("student", "teacher"):
        tensors[side][~mask] = math.nan
        expected_of[side][~mask] = 0
    incoming = states(3, 70) if reduction == "none" else torch.tensor(0.3, device="cuda")
    options = {"mask": mask, "reduction": reduction}
    result = loss_and_gradients(case, tensors, incoming, **options)
    assert_same(case, result, oracle(case, expected_of, incoming, **options), dtype)
    assert (result[1][0][~mask] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_chunk_of_a_projection_gives_the_same(dtype, monkeypatch):
    tensors = arguments_of("projected", 1000, width=512, dtype=dtype)
    expected = oracle("projected", tensors)
    for budget in ("1000000", "100000", "3000"):
        monkeypatch.setenv("KDFAST_CHUNK_BYTES", budget)
        assert_same("projected", loss_and_gradients("projected", tensors), expected, dtype)


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
def test_the_cosine_keeps_its_digits_near_convergence(distance):
    student = states(256, 768)
    tensors = {"student": student, "teacher": student + distance * states(256, 768)}
    loss, (gradient,) = loss_and_gradients("hidden_cosine", tensors)
    expected, (exact,) = oracle("hidden_cosine", tensors)
    assert relative_error(loss, expected) < 1e-6
    assert relative_error(gradient, exact) < 2e-7 / distance


@pytest.mark.parametrize("name", NAMES)
def test_zero_where_they_agree(name):
    for dtype in DTYPES:
        student = states(64, 1000, dtype=dtype)
        tensors = {"student": student, "teacher": student.clone()}
        loss, (gradient,) = loss_and_gradients(name, tensors)
        assert loss == 0
        assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_views_of_hidden_states(name, dtype):
    for width in (768, 769):
        whole = {side: states(5, 33, width, dtype=dtype) for side in ("student", "teacher")}
        views = {side: value[:, 1:] for side, value in whole.items()}
        assert_same(name, loss_and_gradients(name, views), oracle(name, views), dtype)
        transposed = {side: value.transpose(0, 1) for side, value in whole.items()}
        assert_same(name, loss_and_gradients(name, transposed), oracle(name, transposed), dtype)


@pytest.mark.parametrize("case", CASES)
def test_a_float16_loss_scale_loses_nothing(case):
    tensors = arguments_of(case, 2000, width=512, dtype=torch.float16)
    # Unscaled, the gradients are below float16's smallest number.
    incoming = torch.tensor(65536 / 1e6, device="cuda")
    result = loss_and_gradients(case, tensors, incoming)
    assert_same(case, result, oracle(case, tensors, incoming), torch.float16)


def test_massive_activations_do_not_overflow_float16():
    tensors = arguments_of("projected", 400, width=512, dtype=torch.float16)
    tensors["teacher"][3, 0] = 3e4
    result = loss_and_gradients("projected", tensors)
    assert_same("projected", result, oracle("projected", tensors), torch.float16)


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_stays_in_its_row(name):
    tensors = {side: states(4, 1000) for side in ("student", "teacher")}
    tensors["student"][1, 999], tensors["teacher"][2, 0] = math.nan, math.nan
    ones = torch.ones(4, device="cuda")
    loss, (gradient,) = loss_and_gradients(name, tensors, ones, reduction="none")
    assert loss.isnan().tolist() == [False, True, True, False]
    assert gradient.isnan().any(-1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("name", NAMES)
def test_more_than_2_to_the_31_elements(name):
    width = 4096
    rows = 2**31 // width + 9
    needs_memory(18)
    student = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    teacher = torch.zeros_like(student)
    student[-3:], teacher[-3:] = states(3, width), states(3, width)
    mask = torch.arange(rows, device="cuda") >= rows - 3
    tensors = {"student": student, "teacher": teacher}
    loss, (gradient,) = loss_and_gradients(name, tensors, mask=mask)
    last = oracle(name, {side: value[-3:] for side, value in tensors.items()})
    assert_loss_close(loss, last[0], torch.bfloat16)
    assert_gradient_close(gradient[-3:], last[1][0])
    assert gradient[:-3].count_nonzero() == 0


@pytest.mark.parametrize("case", CASES)
def test_same_bits_every_run(case):
    tensors = arguments_of(case, 3000, width=768, dtype=torch.bfloat16)
    results = [loss_and_gradients(case, tensors) for _ in range(2)]
    assert torch.equal(results[0][0], results[1][0])
    assert all(map(torch.equal, results[0][1], results[1][1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_the_gradients_and_a_chunk(dtype, monkeypatch):
    monkeypatch.setenv("KDFAST_CHUNK_BYTES", str(32 << 20))

    def peak_of(case, rows):
        tensors = arguments_of(case, rows, width=4096, dtype=dtype)
        loss_and_gradients(case, tensors)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _, gradients = loss_and_gradients(case, tensors)
        peak = torch.cuda.max_memory_allocated() - before
        return peak, sum(gradient.nbytes for gradient in gradients)

    for name in NAMES:
        peak, gradient = peak_of(name, 16384)
        assert peak < gradient + (4 << 20)
    # The projected states in float32 would be 256 MiB, and their difference as much again. What a
    # projection's gradients are added up in is float32, beside what is returned; the chunk's part
    # of the student's gradient is as wide.
    peak, gradients = peak_of("projected", 16384)
    wide = 1 if dtype == torch.float32 else 3
    assert peak < wide * gradients + 2 * (32 << 20) + (16 << 20)


def test_the_gradient_may_take_the_students_place():
    # Again and again: where a thread writes what another has not read yet, it shows now and then.
    student, teacher = states(1, 4096, 1000), states(1, 4096, 1000, dtype=torch.bfloat16)
    bias = states(1000)
    expected = torch.empty_like(student)
    losses = hidden_mse_rows(student, teacher, bias, None, None, expected)
    for _ in range(5):
        over = student.clone()
        assert torch.equal(hidden_mse_rows(over, teacher, bias, None, None, over), losses)
        assert torch.equal(over, expected)
