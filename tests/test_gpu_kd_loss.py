"""kd_loss on a CUDA device, through the public function, against float64."""

import itertools
import math

import pytest
import torch
from steps import needs_memory
from tolerances import assert_gradient_close, assert_loss_close, relative_error

import kdfast
from kdfast import reference
from kdfast.reference import DIVERGENCES

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IGNORED = -100


@pytest.fixture(autouse=True)
def _free_memory():
    yield
    torch.cuda.empty_cache()


def logits(*shape, dtype=torch.float32, scale=3.0):
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def some_labels(*shape, vocab):
    labels = torch.randint(vocab, shape, device="cuda")
    labels.view(-1)[::5] = IGNORED
    return labels


def loss_and_gradient(student, teacher, labels=None, *, incoming=None, **options):
    leaf = student.detach().clone().requires_grad_()
    with kdfast.backend("triton"):
        loss = kdfast.kd_loss(leaf, teacher, labels, **options)
        loss.backward(incoming)
    return loss.detach(), leaf.grad


def oracle(student, teacher, labels=None, **options):
    """Mean loss and gradient in float64, row by row: a batch of them would not fit."""
    counted = student.shape[:-1].numel() if labels is None else (labels != IGNORED).sum()
    gradient = torch.empty(student.shape, dtype=torch.float64, device="cuda")
    total = torch.zeros((), dtype=torch.float64, device="cuda")
    for row in itertools.product(*map(range, student.shape[:-1])):
        row_labels = None if labels is None else labels[row].view(1)
        total += reference.kd_loss_rows(
            student[row][None].double(),
            teacher[row][None].double(),
            row_labels,
            grad_scale=1 / torch.as_tensor(counted, dtype=torch.float64, device="cuda"),
            gradient=gradient[row][None],
            **options,
        )[0].sum()
    return total / counted, gradient


# Every divergence, precision and vocabulary.


VOCABULARIES = (7, 1000, 32003, 50257, 128256)
OPTIONS = ({}, {"temperature": 3.0, "alpha": 0.3}, {"alpha": 0.5})

# Each pair of the four at least once or nearly so, and no more: a kernel takes a second to compile.
MATCHED = {
    *itertools.product(("forward_kl",), DTYPES, VOCABULARIES, (0,)),
    *(
        (divergence, DTYPES[(i + j) % 3], VOCABULARIES[(i + 2 * j) % 5], j)
        for (i, divergence), j in itertools.product(enumerate(DIVERGENCES), range(3))
    ),
}


@pytest.mark.parametrize(("divergence", "dtype", "vocab", "option"), sorted(MATCHED, key=str))
def test_matches_reference(divergence, dtype, vocab, option):
    student, teacher = logits(2, 5, vocab, dtype=dtype), logits(2, 5, vocab, dtype=dtype)
    labels = some_labels(2, 5, vocab=vocab)
    options = {"divergence": divergence, "beta": 0.3, **OPTIONS[option]}
    loss, gradient = loss_and_gradient(student, teacher, labels, **options)
    expected, expected_gradient = oracle(student, teacher, labels, **options)
    assert_loss_close(loss, expected, dtype)
    assert_gradient_close(gradient, expected_gradient)


@pytest.mark.parametrize(
    ("vocab", "dtype"), list(zip([1, 2, 17, 2048, 2049], (*DTYPES, *DTYPES), strict=False))
)
def test_small_vocabularies(vocab, dtype):
    student, teacher = logits(64, vocab, dtype=dtype), logits(64, vocab, dtype=dtype)
    for divergence in ("forward_kl", "jsd"):
        loss, gradient = loss_and_gradient(student, teacher, divergence=divergence)
        expected, expected_gradient = oracle(student, teacher, divergence=divergence)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-7)
        if vocab == 1:
            assert gradient.abs().max() < 1e-7
        else:
            assert_gradient_close(gradient, expected_gradient)


@pytest.mark.parametrize("epsilon", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_stays_exact_as_the_student_converges(divergence, epsilon):
    teacher = logits(8, 32000)
    student = teacher + epsilon * torch.randn_like(teacher)
    loss, gradient = loss_and_gradient(student, teacher, divergence=divergence, beta=0.3)
    expected, expected_gradient = oracle(student, teacher, divergence=divergence, beta=0.3)
    assert loss >= 0
    assert relative_error(loss, expected) < 3e-7 / epsilon**2
    if divergence != "tvd":
        assert relative_error(gradient, expected_gradient) < 1e-6 / epsilon


@pytest.mark.parametrize("temperature", [1e-2, 10.0, 1e3])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_large_logits_and_extreme_temperatures(divergence, temperature):
    student = torch.empty(4, 32003, device="cuda").uniform_(-1e4, 1e4)
    teacher = student + logits(4, 32003, scale=2 * temperature)
    options = {"divergence": divergence, "temperature": temperature, "scale_t2": False}
    loss, gradient = loss_and_gradient(student, teacher, **options)
    expected, _ = oracle(student, teacher, **options)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_probability_and_nan(divergence):
    student, teacher = logits(4, 32003), logits(4, 32003)
    student[0, :20000], teacher[0, :20000] = -math.inf, -math.inf
    teacher[1, 5], student[2, 31000] = math.nan, math.inf
    options = {"divergence": divergence, "reduction": "none"}
    loss, gradient = loss_and_gradient(
        student, teacher, incoming=torch.ones(4, device="cuda"), **options
    )
    assert loss.isnan().tolist() == [False, True, True, False]
    assert gradient.isnan().any(-1).tolist() == [False, True, True, False]
    expected, expected_gradient = oracle(student[:1], teacher[:1], divergence=divergence)
    assert_loss_close(loss[0], expected, torch.float32)
    assert relative_error(gradient[0], expected_gradient[0]) < 2e-6


# Layouts.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [32000, 50257])
def test_views_padding_and_ignored_rows(vocab, dtype):
    whole = logits(2, 7, vocab + 47, dtype=dtype)
    student, teacher = whole[:, :-1], logits(2, 8, vocab + 5, dtype=dtype)[:, 1:-1]
    student[..., vocab:], teacher[..., vocab:] = math.nan, math.inf
    labels = some_labels(2, 6, vocab=vocab)
    student[labels == IGNORED] = math.nan
    options = {"vocab_size": vocab, "alpha": 0.5, "divergence": "jsd"}
    whole.requires_grad_()
    with kdfast.backend("triton"):
        loss = kdfast.kd_loss(whole[:, :-1], teacher, labels, **options)
        loss.backward()
    expected, expected_gradient = oracle(student, teacher, labels, **options)
    assert_loss_close(loss.detach(), expected, dtype)
    assert_gradient_close(whole.grad[:, :-1], expected_gradient)
    assert (whole.grad[..., vocab:] == 0).all()
    assert (whole.grad[:, :-1][labels == IGNORED] == 0).all()


@pytest.mark.parametrize(
    ("divergence", "vocab"), list(zip(DIVERGENCES, 3 * [32000, 50257], strict=True))
)
def test_overwriting_the_students_logits(divergence, vocab):
    student, teacher = logits(300, vocab, dtype=torch.bfloat16), logits(300, vocab)
    labels = some_labels(300, vocab=vocab)
    options = {"divergence": divergence, "alpha": 0.5, "temperature": 2.0}
    loss, gradient = loss_and_gradient(student, teacher, labels, **options)
    over, same = loss_and_gradient(
        student, teacher, labels, overwrite_student_logits=True, **options
    )
    assert torch.equal(over, loss)
    assert torch.equal(same, gradient)


def test_past_two_to_the_31_elements():
    rows, vocab = 16800, 128256
    assert rows * vocab > 2**31
    needs_memory(12)
    student, teacher = (
        torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda") for _ in range(2)
    )
    student[-1], teacher[-1] = logits(vocab), logits(vocab)
    expected, expected_gradient = oracle(student[-1:], teacher[-1:])
    student.requires_grad_()
    with kdfast.backend("triton"):
        losses = kdfast.kd_loss(student, teacher, reduction="none", overwrite_student_logits=True)
        losses.sum().backward()
    assert_loss_close(losses[-1].detach(), expected, torch.float32)
    assert_gradient_close(student.grad[-1:], expected_gradient)
    assert (losses[:-1] == 0).all()


# What is the same every run, and what it takes.


def test_same_bits_every_run():
    student, teacher = logits(64, 50257, dtype=torch.bfloat16), logits(64, 50257)
    for divergence in ("forward_kl", "jsd"):
        first = loss_and_gradient(student, teacher, divergence=divergence)
        second = loss_and_gradient(student, teacher, divergence=divergence)
        assert all(map(torch.equal, first, second))


def test_no_memory_of_the_logits_size_but_the_gradient():
    student, teacher = logits(512, 50257).requires_grad_(), logits(512, 50257)
    loss_and_gradient(student[:1], teacher[:1], divergence="jsd")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with kdfast.backend("triton"):
        kdfast.kd_loss(student, teacher, divergence="jsd").backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 1.01 * student.numel() * student.element_size() + 2**20


# The incoming gradient.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1000, 32003])
def test_incoming_gradients(vocab, dtype):
    student, teacher = logits(3, 4, vocab, dtype=dtype), logits(3, 4, vocab, dtype=dtype)
    _, gradient = loss_and_gradient(student, teacher)
    # A power of two scales without rounding; 1 leaves the gradient as it was.
    for scale in (1.0, 4.0):
        _, scaled = loss_and_gradient(student, teacher, incoming=torch.tensor(scale).cuda())
        torch.testing.assert_close(scaled, gradient * scale, rtol=0, atol=1e-6 * scale)
    incoming = torch.tensor([[1.0, 2.0, 4.0, 0.5]] * 3).cuda()
    _, per_row = loss_and_gradient(student, teacher, reduction="none", incoming=incoming)
    _, by_ones = loss_and_gradient(
        student, teacher, reduction="none", incoming=torch.ones(3, 4).cuda()
    )
    torch.testing.assert_close(
        per_row, by_ones * incoming.unsqueeze(-1).to(dtype), rtol=0, atol=1e-6
    )


def test_a_loss_scale_keeps_small_float16_gradients():
    student, teacher = logits(2048, 1000, dtype=torch.float16), logits(2048, 1000)
    scale = torch.tensor(65536.0).cuda()
    _, gradient = loss_and_gradient(student, teacher, incoming=scale)
    _, expected = oracle(student[:8], teacher[:8])
    expected = expected * 8 / 2048 * 65536
    assert_gradient_close(gradient[:8], expected)


def test_a_retained_graph_gives_the_gradient_again():
    student, teacher = logits(4, 1000).requires_grad_(), logits(4, 1000)
    with kdfast.backend("triton"):
        loss = kdfast.kd_loss(student, teacher)
    (first,) = torch.autograd.grad(loss, student, torch.tensor(3.0).cuda(), retain_graph=True)
    (second,) = torch.autograd.grad(loss, student, torch.tensor(3.0).cuda())
    assert torch.equal(first, second)


# torch.compile.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiles_whole_and_with_dynamic_shapes(dtype):
    @torch.compile(fullgraph=True, dynamic=True)
    def step(student, teacher, labels):
        return kdfast.kd_loss(2 * student, teacher, labels, divergence="jsd", alpha=0.5)

    for rows, vocab in ((4, 1000), (6, 1001), (9, 32000)):
        student, teacher = logits(rows, vocab, dtype=dtype), logits(rows, vocab, dtype=dtype)
        labels = some_labels(rows, vocab=vocab)
        leaf = student.clone().requires_grad_()
        loss = step(leaf, teacher, labels)
        loss.backward()
        expected, expected_gradient = oracle(
            2 * student, teacher, labels, divergence="jsd", alpha=0.5
        )
        assert_loss_close(loss, expected, dtype)
        bound = 4 * torch.finfo(dtype).eps
        assert relative_error(leaf.grad, 2 * expected_gradient) < max(bound, 2e-6)


def test_opcheck():
    student, teacher = logits(3, 130).requires_grad_(), logits(3, 130)
    gradient = torch.zeros_like(student)
    settings = {
        "divergence": "jsd", "beta": 0.5, "temperature": 2.0, "teacher_temperature": 2.0,
        "scale_t2": True, "alpha": 1.0, "ignore_index": IGNORED, "vocab_size": 130,
        "reduction": "mean", "need_parts": True,
    }  # fmt: skip
    inputs = (student.detach(), teacher, None, None, None, None, None, None, gradient)
    torch.library.opcheck(torch.ops.kdfast.kd_loss_forward.default, inputs, settings)
    torch.library.opcheck(
        torch.ops.kdfast.scale_gradient_.default, (gradient, torch.tensor(2.0).cuda())
    )
