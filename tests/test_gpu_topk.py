"""The truncated operations on a CUDA device, through the public functions, against float64."""

import itertools
import math

import pytest
import torch
from steps import needs_memory
from tolerances import assert_gradient_close, assert_loss_close, relative_error

import kdfast
from kdfast import TruncatedSoftmax, reference
from kdfast.reference import TAIL_DIVERGENCES, TAILS

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from kdfast.kernels.linear_topk_kd_loss import (
    entry_hidden_gradient,
    entry_logits,
    entry_weight_gradient,
)

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IGNORED = -100
FORMS = [(tail, divergence) for tail in TAILS for divergence in TAIL_DIVERGENCES[tail]]


@pytest.fixture(autouse=True)
def _triton():
    with kdfast.backend("triton"):
        yield
    torch.cuda.empty_cache()


def logits(*shape, dtype=torch.float32, scale=3.0):
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def some_labels(*shape, vocab):
    labels = torch.randint(vocab, shape, device="cuda")
    labels.view(-1)[::5] = IGNORED
    return labels


# truncated_softmax.


def assert_truncates(scores, k, temperature=1.0, **options):
    result = kdfast.truncated_softmax(scores, k, temperature=temperature, **options)
    for row in itertools.product(*map(range, scores.shape[:-1])):
        log_probs, indices = reference.truncated_softmax_rows(
            scores[row].double(), k, temperature, **options
        )
        assert torch.equal(result.indices[row], indices)
        torch.testing.assert_close(
            result.log_probs[row].double(), log_probs, rtol=1e-6, atol=1e-6, equal_nan=True
        )
    return result


# Every vocabulary and every number of slots of candidates: a kernel takes seconds to compile.
@pytest.mark.parametrize(
    ("vocab", "dtype", "ks"),
    [
        (1, torch.bfloat16, (1,)),
        (7, torch.float32, (1, 7)),
        (1024, torch.float16, (64, 1024)),
        (2049, torch.bfloat16, (2, 200)),
        (32003, torch.float32, (1, 33)),
        (50257, torch.bfloat16, (64, 1024)),
        (50257, torch.float16, (2, 33)),
        (128256, torch.bfloat16, (1, 64)),
        (128256, torch.float32, (200,)),
        (262144, torch.bfloat16, (64, 200)),
        (262144, torch.float32, (32, 1024)),
    ],
)
def test_truncates(vocab, dtype, ks):
    scores = logits(3, 5, vocab, dtype=dtype)
    for k in ks:
        assert_truncates(scores, k)
        assert_truncates(scores, k, 3.0)


def test_truncates_many_rows_at_once():
    scores = logits(4096, 32003, dtype=torch.bfloat16)
    result = kdfast.truncated_softmax(scores, 64)
    log_probs, indices = reference.truncated_softmax_rows(scores, 64)
    assert torch.equal(result.indices, indices)
    torch.testing.assert_close(result.log_probs, log_probs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("vocab", "k"), [(5000, 64), (5000, 1000), (128256, 1), (128256, 64)])
def test_rows_in_an_order_that_hides_the_largest(vocab, k):
    up = torch.arange(vocab, device="cuda").float() / 300
    places = torch.arange(vocab, device="cuda")
    rows = [
        up,
        up.flip(0),
        torch.zeros_like(up).index_fill_(0, places[2000:3100], 1.0),
        up * (places % 4096 == 5),
        up * (places % 64 == 5),
        up.remainder(7),
        torch.zeros_like(up),
        (places % 3).float(),
        torch.where(places % 500 == 3, up, -math.inf),
        torch.full_like(up, -math.inf),
        torch.where(places == vocab - 1, math.nan, up),
        torch.where(places == 1, math.inf, up),
    ]
    for dtype in (torch.float32, torch.bfloat16):
        assert_truncates(torch.stack(rows).to(dtype), k)


def test_a_sure_teacher_keeps_its_digits():
    scores = torch.zeros(3, 32000, device="cuda")
    scores[0, 7], scores[1, 8], scores[2, 9] = 15.0, 20.0, 30.0
    log_probs = kdfast.truncated_softmax(scores, 1).log_probs
    expected, _ = reference.truncated_softmax_rows(scores.double(), 1)
    torch.testing.assert_close(log_probs.double(), expected, rtol=1e-6, atol=1e-7)


def test_truncates_views_padding_and_temperatures():
    for dtype, vocab in ((torch.float32, 50257), (torch.bfloat16, 32000)):
        scores = logits(3, 7, vocab + 47, dtype=dtype)
        scores[..., vocab:] = math.nan
        temperature = torch.rand(3, 6, device="cuda") + 0.5
        top = kdfast.truncated_softmax(scores[:, 1:], 64, temperature=temperature, vocab_size=vocab)
        expected, indices = reference.truncated_softmax_rows(
            scores[:, 1:].double(), 64, temperature, vocab_size=vocab
        )
        assert torch.equal(top.indices, indices)
        torch.testing.assert_close(top.log_probs.double(), expected, rtol=1e-6, atol=1e-6)


def test_truncates_more_than_2_to_the_31_elements():
    rows, vocab = 8300, 262144
    needs_memory(8)
    scores = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    assert scores.numel() > 2**31
    scores[-1] = logits(vocab, dtype=torch.bfloat16)
    top = kdfast.truncated_softmax(scores, 64)
    expected, indices = reference.truncated_softmax_rows(scores[-1].double(), 64)
    assert torch.equal(top.indices[-1], indices)
    torch.testing.assert_close(top.log_probs[-1].double(), expected, rtol=1e-6, atol=1e-6)
    assert (top.indices[:-1] == torch.arange(64, device="cuda")).all()


# topk_kd_loss.


def truncated(*shape, k, scale=3.0):
    """A teacher's entries, in no order."""
    top = kdfast.truncated_softmax(logits(*shape, scale=scale), k)
    order = torch.rand(top.indices.shape, device="cuda").argsort(-1)
    return TruncatedSoftmax(*(part.gather(-1, order) for part in top))


def loss_and_gradient(student, teacher, labels=None, *, incoming=None, **options):
    leaf = student.detach().clone().requires_grad_()
    loss = kdfast.topk_kd_loss(leaf, teacher, labels, **options)
    loss.backward(incoming)
    return loss.detach(), leaf.grad


def oracle(student, teacher, labels=None, **options):
    """Mean loss and gradient in float64, row by row: a batch of them would not fit."""
    counted = student.shape[:-1].numel() if labels is None else (labels != IGNORED).sum()
    gradient = torch.empty(student.shape, dtype=torch.float64, device="cuda")
    total = torch.zeros((), dtype=torch.float64, device="cuda")
    for row in itertools.product(*map(range, student.shape[:-1])):
        indices, order = teacher.indices[row].sort()
        total += reference.topk_kd_loss_rows(
            student[row][None].double(),
            teacher.log_probs[row][order][None].double(),
            indices[None],
            None if labels is None else labels[row].view(1),
            grad_scale=1 / torch.as_tensor(counted, dtype=torch.float64, device="cuda"),
            gradient=gradient[row][None],
            **options,
        )[0].sum()
    return total / counted, gradient


SIZES = [(7, 3), (1000, 1), (2048, 64), (32003, 200), (50257, 64), (128256, 64), (262144, 1024)]
OPTIONS = ({}, {"temperature": 3.0, "alpha": 0.3}, {"alpha": 0.5})

# Each form with each kind of options, and every size and dtype: a kernel takes seconds to compile.
MATCHED = [
    (form, DTYPES[(i + j) % 3], SIZES[(3 * i + 2 * j + 2) % 7], OPTIONS[j])
    for i, form in enumerate(FORMS)
    for j in range(3)
]


@pytest.mark.parametrize(("form", "dtype", "size", "options"), MATCHED)
def test_matches_reference(form, dtype, size, options):
    (tail, divergence), (vocab, k) = form, size
    student, teacher = logits(2, 5, vocab, dtype=dtype), truncated(2, 5, vocab, k=k)
    labels = some_labels(2, 5, vocab=vocab)
    labels[1, 1] = teacher.indices[1, 1, 0]
    options = {"tail": tail, "divergence": divergence, "beta": 0.3, **options}
    loss, gradient = loss_and_gradient(student, teacher, labels, **options)
    expected, expected_gradient = oracle(student, teacher, labels, **options)
    assert_loss_close(loss, expected, dtype)
    assert_gradient_close(gradient, expected_gradient)


def test_a_support_of_one_entry_holds_everything():
    student, teacher = logits(4, 1000), truncated(4, 1000, k=1)
    loss, gradient = loss_and_gradient(student, teacher, tail="support")
    assert abs(loss) < 1e-12
    assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("left", [1e-2, 1e-6, 1e-12])
def test_a_student_who_is_sure_of_the_support_loses_no_digits(left):
    student, teacher = logits(4, 32003), truncated(4, 32003, k=64)
    listed = torch.zeros_like(student, dtype=torch.bool).scatter(-1, teacher.indices, True)
    student -= torch.where(listed, student, -math.inf).logsumexp(-1, True)
    outside = torch.where(listed, -math.inf, student).logsumexp(-1, True)
    student = torch.where(listed, student, student - outside + math.log(left))
    for divergence in TAIL_DIVERGENCES["bucket"]:
        loss, gradient = loss_and_gradient(student, teacher, divergence=divergence)
        expected, expected_gradient = oracle(student, teacher, divergence=divergence)
        assert_loss_close(loss, expected, torch.float32)
        assert relative_error(gradient[~listed], expected_gradient[~listed]) < 2e-6


@pytest.mark.parametrize(
    ("tail", "vocab", "dtype"),
    list(zip(TAILS, 2 * [32000, 50257], [*DTYPES[:2], *DTYPES[1::-1]], strict=True)),
)
def test_views_padding_and_ignored_rows(tail, vocab, dtype):
    whole, teacher = logits(2, 7, vocab + 47, dtype=dtype), truncated(2, 6, vocab, k=50)
    # A support that stands together, at both ends of the row.
    teacher.indices[0] = torch.cat([torch.arange(25), torch.arange(vocab - 25, vocab)]).cuda()
    student, labels = whole[:, :-1], some_labels(2, 6, vocab=vocab)
    student[..., vocab:], student[labels == IGNORED] = math.nan, math.nan
    options = {"vocab_size": vocab, "alpha": 0.5, "tail": tail}
    whole.requires_grad_()
    loss = kdfast.topk_kd_loss(whole[:, :-1], teacher, labels, **options)
    loss.backward()
    expected, expected_gradient = oracle(student.detach(), teacher, labels, **options)
    assert_loss_close(loss.detach(), expected, dtype)
    assert_gradient_close(whole.grad[:, :-1], expected_gradient)
    assert (whole.grad[..., vocab:] == 0).all()
    assert (whole.grad[:, :-1][labels == IGNORED] == 0).all()


@pytest.mark.parametrize(
    ("form", "k", "alpha"),
    list(zip(FORMS, [5, 64, 1024, 64] * 2, [0.5] * 4 + [1.0] * 4, strict=True)),
)
def test_overwriting_the_students_logits(form, k, alpha):
    tail, divergence = form
    # Again and again: where a thread writes what another has not read yet, it shows now and then.
    student, teacher = logits(512, 32003, dtype=torch.bfloat16), truncated(512, 32003, k=k)
    labels = some_labels(512, vocab=32003)
    options = {"tail": tail, "divergence": divergence, "alpha": alpha, "temperature": 2.0}
    loss, gradient = loss_and_gradient(student, teacher, labels, **options)
    for _ in range(5):
        over, same = loss_and_gradient(
            student, teacher, labels, overwrite_student_logits=True, **options
        )
        assert torch.equal(over, loss)
        assert torch.equal(same, gradient)


@pytest.mark.parametrize("vocab", [32000, 128256])
def test_more_than_2_to_the_31_elements(vocab):
    rows = 2**31 // vocab + 9
    needs_memory(24)
    student = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    student[-3:] = logits(3, vocab, dtype=torch.bfloat16)
    indices = torch.randint(vocab // 64, (rows, 64), device="cuda")
    indices += torch.arange(64, device="cuda") * (vocab // 64)
    teacher = TruncatedSoftmax(logits(rows, 64).log_softmax(-1) - 0.1, indices)
    last = student[-3:].clone()
    student.requires_grad_()
    loss = kdfast.topk_kd_loss(
        student * 1.0, teacher, reduction="none", overwrite_student_logits=True
    )
    loss[-3:].sum().backward()
    expected, gradient = oracle(last, TruncatedSoftmax(*(part[-3:] for part in teacher)))
    assert_loss_close(loss[-3:].detach().mean(), expected, torch.bfloat16)
    assert_gradient_close(student.grad[-3:], 3 * gradient)
    assert student.grad[:-3].count_nonzero() == 0


@pytest.mark.parametrize(("tail", "divergence"), FORMS[::2])
def test_nan_stays_in_its_row(tail, divergence):
    student, teacher = logits(4, 32003), truncated(4, 32003, k=64)
    student[1, teacher.indices[1, 3]], teacher.log_probs[2, 3] = math.nan, math.nan
    options = {"tail": tail, "divergence": divergence, "reduction": "none"}
    ones = torch.ones(4, device="cuda")
    loss, gradient = loss_and_gradient(student, teacher, incoming=ones, **options)
    assert loss.isnan().tolist() == [False, True, True, False]
    assert gradient.isnan().any(-1).tolist() == [False, True, True, False]


# Both.


def test_same_bits_every_run():
    # Few levels, so that the candidates are many and most of them are equal.
    scores = torch.randint(-20, 20, (256, 50257), device="cuda").bfloat16() / 4
    student = logits(256, 50257, dtype=torch.bfloat16)
    first, second = (kdfast.truncated_softmax(scores, 64) for _ in range(2))
    assert all(map(torch.equal, first, second))
    for tail, divergence in FORMS[::3]:
        options = {"tail": tail, "divergence": divergence}
        results = [loss_and_gradient(student, first, **options) for _ in range(2)]
        assert all(map(torch.equal, *results))


def test_memory_is_the_gradient_and_the_entries():
    student, scores = logits(512, 50257).requires_grad_(), logits(512, 50257)
    loss_and_gradient(student[:1], kdfast.truncated_softmax(scores[:1], 64))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    teacher = kdfast.truncated_softmax(scores, 64)
    # Candidates of 2 k columns; log-probabilities and indices.
    assert torch.cuda.max_memory_allocated() - before < 512 * 64 * 40 + 2**20
    kdfast.topk_kd_loss(student, teacher).backward()
    extra = torch.cuda.max_memory_allocated() - before
    # A bit for each vector of the logits, and the entries, which are sorted.
    assert extra < 1.01 * student.numel() * student.element_size() + 2**22


# Products with entries.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocab", "width", "k"), [(1000, 300, 5), (128256, 1024, 64)])
def test_products_with_entries(vocab, width, k, dtype):
    rows = 200
    hidden, weight = logits(rows, width, dtype=dtype), logits(vocab, width, dtype=dtype)
    indices = torch.rand(rows, vocab, device="cuda").topk(k).indices
    # One column for all rows, whose segment is long, and one that is nobody's.
    indices[:, 0], indices[3, 1] = vocab - 1, -1
    listed = indices >= 0
    gathered = weight.double()[indices.clamp_min(0)] * listed.unsqueeze(-1)
    expected = torch.einsum("rh,rjh->rj", hidden.double(), gathered)
    assert relative_error(entry_logits(hidden, weight, indices), expected) < 1e-6

    gradient = torch.where(listed, torch.randn(rows, k, device="cuda"), math.nan)
    out = torch.empty(rows, width, device="cuda")
    entry_hidden_gradient(gradient, weight, indices, out)
    expected = torch.einsum("rj,rjh->rh", gradient.double().nan_to_num(), gathered)
    assert relative_error(out, expected) < 1e-6

    columns, order = indices.flatten().sort(stable=True)
    offsets = torch.searchsorted(columns, torch.arange(vocab + 1, device="cuda"))
    outs = [torch.empty(vocab, width, device="cuda") for _ in range(2)]
    for out in outs:
        entry_weight_gradient(gradient, hidden, order, offsets, out)
    expected = torch.zeros(vocab, width, dtype=torch.float64, device="cuda")
    terms = gradient.double().unsqueeze(-1) * hidden.double().unsqueeze(1)
    expected.index_add_(0, indices[listed], terms[listed])
    assert relative_error(outs[0], expected) < 1e-6
    assert torch.equal(*outs)


def test_products_behind_2_to_the_31_elements():
    vocab, width = 2**31 // 8192 + 100, 8192
    needs_memory(6)
    weight = torch.zeros(vocab, width, dtype=torch.bfloat16, device="cuda")
    weight[-1] = 1.0
    hidden = torch.ones(2, width, dtype=torch.bfloat16, device="cuda")
    indices = torch.tensor([[0, vocab - 1], [-1, vocab - 1]], device="cuda")
    result = entry_logits(hidden, weight, indices)
    assert result.tolist() == [[0.0, width], [0.0, width]]
    out = torch.empty(2, width, device="cuda")
    entry_hidden_gradient(result, weight, indices, out)
    assert (out == width).all()
