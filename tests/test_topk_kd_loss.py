import copy
import inspect
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from measure import peak_bytes
from tolerances import assert_gradient_close, assert_loss_close, relative_error

import kdfast
from kdfast import TruncatedSoftmax, reference
from kdfast.reference import TAIL_DIVERGENCES, TAILS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = [name for name in ("cpp", "torch") if name in kdfast.available_backends()]
FORMS = [(tail, divergence) for tail in TAILS for divergence in TAIL_DIVERGENCES[tail]]
every_form = pytest.mark.parametrize(("tail", "divergence"), FORMS)


@pytest.fixture(params=BACKENDS)
def backend(request):
    with kdfast.backend(request.param):
        yield request.param


def logits(*shape, dtype=torch.float32, scale=3.0):
    return (torch.randn(*shape) * scale).to(dtype)


def truncated(*shape, k, dtype=torch.float32, scale=3.0):
    """A teacher's entries, in no order."""
    top = kdfast.truncated_softmax(logits(*shape, dtype=dtype, scale=scale), k)
    order = torch.rand(top.indices.shape).argsort(-1)
    return TruncatedSoftmax(top.log_probs.gather(-1, order), top.indices.gather(-1, order))


def loss_and_gradient(student, teacher, *args, incoming=None, **kwargs):
    student = student.detach().clone().requires_grad_()
    loss = kdfast.topk_kd_loss(student, teacher, *args, **kwargs)
    loss.backward(incoming)
    return loss.detach(), student.grad


def oracle(student, teacher, labels=None, *, reduction="mean", **kwargs):
    """Loss and gradient in float64, by differentiating the specification."""
    student = student.detach().double().clone().requires_grad_()
    rows = reference.topk_kd_loss_rows(
        student, teacher.log_probs.double(), teacher.indices, labels, **kwargs
    )[0]
    counted = rows.numel() if labels is None else (labels != kwargs.get("ignore_index", -100)).sum()
    loss = rows.sum() / counted if reduction == "mean" else rows.sum()
    loss.backward()
    return loss.detach(), student.grad


# The specification itself.


def divergence_of(name, p, q, beta=0.5):
    """Literally, of two distributions without zeros."""
    mixture = beta * p + (1 - beta) * q
    return {
        "forward_kl": (p * (p / q).log()).sum(-1),
        "reverse_kl": (q * (q / p).log()).sum(-1),
        "jsd": (beta * p * (p / mixture).log() + (1 - beta) * q * (q / mixture).log()).sum(-1),
    }[name]


@every_form
def test_reference_is_the_definition_of_each_tail(tail, divergence):
    student, teacher = logits(5, 40).double(), truncated(5, 40, k=7, dtype=torch.float64)
    temperature, beta = 2.0, 0.3
    log_probs, indices = teacher
    p, q = log_probs.exp(), (student / temperature).softmax(-1).gather(-1, indices)
    if tail == "bucket":
        p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    elif tail == "renormalize":
        p = p / p.sum(-1, keepdim=True)
    elif tail == "support":
        p = p / p.sum(-1, keepdim=True)
        q = (student / temperature).gather(-1, indices).softmax(-1)
    soft = reference.topk_kd_loss_rows(
        student, *teacher, temperature=temperature, tail=tail, divergence=divergence, beta=beta
    )[1]
    torch.testing.assert_close(soft, divergence_of(divergence, p, q, beta))


def test_reference_on_hand_worked_values():
    # The student is uniform over 4; the teacher has 1/2 and 1/4 at two columns, and 1/4 elsewhere.
    student = torch.zeros(4, dtype=torch.float64)
    teacher = TruncatedSoftmax(torch.tensor([0.5, 0.25]).double().log(), torch.tensor([2, 0]))
    worked = {
        # Against 1/4, 1/4 and the bucket's 1/2.
        ("bucket", "forward_kl"): 0.5 * math.log(2) + 0.25 * math.log(0.5),
        ("bucket", "reverse_kl"): 0.25 * math.log(0.5) + 0.5 * math.log(2),
        # 2/3 and 1/3 against 1/4 and 1/4.
        ("renormalize", "forward_kl"): 2 / 3 * math.log(8 / 3) + 1 / 3 * math.log(4 / 3),
        ("none", "forward_kl"): 0.5 * math.log(2),
        # 2/3 and 1/3 against 1/2 and 1/2.
        ("support", "forward_kl"): 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3),
        ("support", "reverse_kl"): 0.5 * math.log(3 / 4) + 0.5 * math.log(3 / 2),
    }
    for (tail, divergence), expected in worked.items():
        soft = reference.topk_kd_loss_rows(student, *teacher, tail=tail, divergence=divergence)[1]
        assert soft.item() == pytest.approx(expected, rel=1e-14), (tail, divergence)


@every_form
def test_of_all_columns_every_tail_is_kd_loss(tail, divergence, backend):
    student, scores, labels = logits(5, 50), logits(5, 50), torch.randint(50, (5,))
    teacher = kdfast.truncated_softmax(scores, 50, temperature=2.0)
    options = {"divergence": divergence, "temperature": 2.0, "alpha": 0.3}
    loss, gradient = loss_and_gradient(student, teacher, labels, tail=tail, **options)
    leaf = student.clone().requires_grad_()
    expected = kdfast.kd_loss(leaf, scores, labels, **options)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=2e-6, atol=1e-6)
    assert relative_error(gradient, leaf.grad) < 2e-6


@every_form
def test_gradcheck(tail, divergence, backend):
    student = logits(2, 2, 6, dtype=torch.float64, scale=1.0).requires_grad_()
    teacher, labels = truncated(2, 2, 6, k=4, dtype=torch.float64), torch.randint(6, (2, 2))
    teacher.indices[1, 0, 2], labels[0, 1] = -1, -100
    options = {"tail": tail, "divergence": divergence, "beta": 0.3, "alpha": 0.4}

    def rows(s):
        return reference.topk_kd_loss_rows(s, *teacher, labels, None, 2.0, **options)[0]

    def loss(s):
        return kdfast.topk_kd_loss(s, teacher, labels, reduction="none", temperature=2.0, **options)

    assert torch.autograd.gradcheck(rows, student)
    assert torch.autograd.gradcheck(loss, student)
    torch.testing.assert_close(rows(student), loss(student))


# Every form, precision and vocabulary against it.


@pytest.mark.parametrize(("vocab", "k"), [(7, 3), (2048, 64), (2049, 1), (32003, 200)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_form
def test_matches_reference(tail, divergence, dtype, vocab, k, backend):
    student, teacher = logits(5, vocab, dtype=dtype), truncated(5, vocab, k=k, dtype=dtype)
    labels = torch.randint(vocab, (5,))
    labels[1], labels[2] = -100, teacher.indices[2, 0]
    for options in ({}, {"temperature": 3.0, "alpha": 0.3}, {"temperature": 1.0, "alpha": 0.5}):
        options = {"tail": tail, "divergence": divergence, "beta": 0.3, **options}
        loss, gradient = loss_and_gradient(student, teacher, labels, **options)
        expected, expected_gradient = oracle(student, teacher, labels, **options)
        if tail == "support" and k == 1 and options.get("alpha", 1) == 1:
            # One entry that holds everything, on either side.
            assert abs(loss) < 1e-12
            assert gradient.abs().max() < 1e-7
            continue
        assert_loss_close(loss, expected, dtype)
        assert_gradient_close(gradient, expected_gradient)


@pytest.mark.parametrize(("rows", "vocab"), [(16, 50257), (4, 128256)])
@every_form
def test_matches_reference_on_large_vocabularies(tail, divergence, rows, vocab, backend):
    student, teacher = logits(rows, vocab), truncated(rows, vocab, k=64)
    options = {"tail": tail, "divergence": divergence, "temperature": 2.0}
    loss, gradient = loss_and_gradient(student, teacher, **options)
    expected, expected_gradient = oracle(student, teacher, **options)
    assert_loss_close(loss, expected, torch.float32)
    assert_gradient_close(gradient, expected_gradient)


def test_a_vocabulary_of_one(backend):
    student, teacher = logits(3, 1), TruncatedSoftmax(torch.zeros(3, 1), torch.zeros(3, 1).long())
    for tail, divergence in FORMS:
        loss, gradient = loss_and_gradient(student, teacher, tail=tail, divergence=divergence)
        assert loss == 0
        assert (gradient == 0).all()


@pytest.mark.parametrize("epsilon", [1e-1, 1e-2, 1e-3])
@every_form
def test_stays_exact_as_the_student_converges(tail, divergence, epsilon):
    scores = logits(8, 5000)
    # As peaked as language models are: the bucket is small.
    scores[:, 100:] -= 6.0
    teacher = kdfast.truncated_softmax(scores, 64)
    student = scores + epsilon * torch.randn_like(scores)
    options = {"tail": tail, "divergence": divergence, "beta": 0.3}
    loss, gradient = loss_and_gradient(student, teacher, **options)
    expected, expected_gradient = oracle(student, teacher, **options)
    # The divergence is ε² of p and q, which carry a rounding each; the gradient is ε of them.
    assert relative_error(loss, expected) < 1e-6 / epsilon**2
    assert relative_error(gradient, expected_gradient) < 2e-6 / epsilon


# The bucket.


@pytest.mark.parametrize("left", [1e-2, 1e-5, 1e-8, 1e-12])
def test_a_student_who_is_sure_of_the_support_loses_no_digits(left, backend):
    # q has `left` off the support: as 1 − Σq it would be lost in float32.
    student, teacher = logits(4, 3000), truncated(4, 3000, k=10)
    on_support = torch.zeros(4, 3000, dtype=torch.bool).scatter(-1, teacher.indices, True)
    student[on_support] -= student[on_support].logsumexp(-1)
    student = torch.where(
        on_support, student, student - student.logsumexp(-1, True) + math.log(left)
    )
    for divergence in TAIL_DIVERGENCES["bucket"]:
        loss, gradient = loss_and_gradient(student, teacher, divergence=divergence)
        expected, expected_gradient = oracle(student, teacher, divergence=divergence)
        assert relative_error(loss, expected) < (1e-6 if backend == "cpp" else 1e-5)
        off = gradient[~on_support], expected_gradient[~on_support]
        assert relative_error(*off) < (2e-6 if backend == "cpp" else 1e-5)


@pytest.mark.parametrize("left", [1e-2, 1e-5, 1e-9])
@pytest.mark.parametrize("k", [1, 20])
def test_a_teacher_who_is_sure_of_the_support_keeps_its_bucket(k, left, backend):
    student = logits(4, 300, dtype=torch.float64)
    log_probs = logits(4, k, dtype=torch.float64).log_softmax(-1) + math.log1p(-left)
    teacher = TruncatedSoftmax(log_probs, torch.arange(k).expand(4, k))
    p_left = 1 - log_probs.exp().sum(-1)
    q = student.softmax(-1)
    on_support = (log_probs.exp() * (log_probs - q[:, :k].log())).sum(-1)
    expected = on_support + p_left * (p_left / q[:, k:].sum(-1)).log()
    loss = kdfast.topk_kd_loss(student, teacher, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    # Float32 keeps what its log-probabilities say.
    single = TruncatedSoftmax(log_probs.float(), teacher.indices)
    loss, gradient = loss_and_gradient(student.float(), single, divergence="reverse_kl")
    expected, expected_gradient = oracle(student.float(), single, divergence="reverse_kl")
    tolerance = 1e-6 if backend == "cpp" or k == 1 else 1e-2
    assert relative_error(loss, expected) < tolerance
    assert relative_error(gradient, expected_gradient) < tolerance


@pytest.mark.parametrize("excess", [0.0, 1e-7, 0.5])
def test_a_teacher_without_a_bucket(excess, backend):
    # Rounding, or sampled weights, made Σp 1 or more.
    log_probs = logits(4, 20).log_softmax(-1) + math.log1p(excess)
    log_probs += torch.where(log_probs.logsumexp(-1, True) < 0, 1e-6, 0.0)
    teacher = TruncatedSoftmax(log_probs, torch.arange(20).expand(4, 20))
    student = logits(4, 300)
    forward, _ = loss_and_gradient(student, teacher)
    torch.testing.assert_close(forward, loss_and_gradient(student, teacher, tail="none")[0])
    for divergence in TAIL_DIVERGENCES["bucket"]:
        loss, gradient = loss_and_gradient(student, teacher, divergence=divergence)
        expected, expected_gradient = oracle(student, teacher, divergence=divergence)
        assert loss.isfinite()
        assert_loss_close(loss, expected, torch.float32)
        assert_gradient_close(gradient, expected_gradient)


def test_the_smallest_bucket_is_that_of_the_teachers_dtype(backend):
    student = torch.zeros(1, 2)
    for dtype in DTYPES:
        teacher = TruncatedSoftmax(torch.zeros(1, 1, dtype=dtype), torch.zeros(1, 1).long())
        loss = kdfast.topk_kd_loss(student, teacher, divergence="reverse_kl")
        # q = (1/2, 1/2) against p = (1, eps).
        expected = math.log(0.5) - 0.5 * math.log(torch.finfo(dtype).eps)
        assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_a_support_of_all_columns_has_no_bucket(backend):
    # 1 − Σp is some 1e-8 here, against which the student has nothing.
    student, scores = logits(64, 9), logits(64, 9)
    teacher = kdfast.truncated_softmax(scores, 9)
    assert (teacher.log_probs.double().logsumexp(-1) < 0).any()
    for divergence in TAIL_DIVERGENCES["bucket"]:
        loss = kdfast.topk_kd_loss(student, teacher, divergence=divergence, reduction="none")
        expected = kdfast.kd_loss(student, scores, divergence=divergence, reduction="none")
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


# What each tail does to a student.


@pytest.mark.parametrize("tail", TAILS)
def test_what_a_student_converges_to(tail):
    """A free student against the 10 largest of 1000 entries, which hold 0.3 of the teacher."""
    scores = logits(1, 1000, scale=1.5).double()
    teacher = kdfast.truncated_softmax(scores, 10)
    teacher_mass = teacher.log_probs.exp().sum().item()
    assert 0.2 < teacher_mass < 0.4
    student = torch.zeros(1, 1000, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([student], lr=0.1)
    for _ in range(1500):
        optimizer.zero_grad()
        kdfast.topk_kd_loss(student, teacher, tail=tail).backward()
        optimizer.step()
    q = student.detach().softmax(-1)
    mass = q.gather(-1, teacher.indices).sum().item()
    if tail == "bucket":
        # Every probability on the support, and so the rest of them together.
        assert mass == pytest.approx(teacher_mass, abs=1e-6)
        torch.testing.assert_close(
            q.gather(-1, teacher.indices), teacher.log_probs.exp(), atol=1e-6, rtol=0
        )
    elif tail == "support":
        # Right in proportion; how much of the whole it is, nobody says.
        assert mass < 0.1
        torch.testing.assert_close(
            q.gather(-1, teacher.indices) / mass, teacher.log_probs.exp() / teacher_mass,
            atol=1e-4, rtol=0,
        )  # fmt: skip
    else:
        assert mass > 0.99


# The teacher's entries.


@every_form
def test_the_order_of_entries_does_not_matter(tail, divergence, backend):
    student, teacher = logits(3, 4000), truncated(3, 4000, k=50)
    order = teacher.log_probs.argsort(-1, descending=True)
    sorted_teacher = TruncatedSoftmax(*(x.gather(-1, order) for x in teacher))
    options = {"tail": tail, "divergence": divergence}
    result = loss_and_gradient(student, teacher, **options)
    assert all(map(torch.equal, result, loss_and_gradient(student, sorted_teacher, **options)))


@every_form
def test_padding_entries_do_not_exist(tail, divergence, backend):
    student, teacher = logits(3, 400), truncated(3, 400, k=6)
    padded = TruncatedSoftmax(
        torch.cat([torch.tensor([math.nan, -math.inf, 5.0]).expand(3, 3), teacher.log_probs], -1),
        torch.cat([torch.full((3, 3), -1), teacher.indices], -1),
    )
    options = {"tail": tail, "divergence": divergence}
    loss, gradient = loss_and_gradient(student, padded, **options)
    expected, expected_gradient = loss_and_gradient(student, teacher, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert relative_error(gradient, expected_gradient) < 1e-6


def test_a_token_without_entries(backend):
    student = logits(2, 40)
    teacher = TruncatedSoftmax(torch.full((2, 3), -math.inf), torch.full((2, 3), -1))
    for tail in TAILS:
        loss, gradient = loss_and_gradient(student, teacher, tail=tail)
        if tail in ("bucket", "none"):
            # All is in the bucket on either side; nothing is asked for.
            assert abs(loss) < 1e-12
            assert gradient.abs().max() < 1e-7
        else:
            assert loss.isnan()


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_precisions_of_the_teacher(dtype, index_dtype, backend):
    student, teacher = logits(5, 3000), truncated(5, 3000, k=20)
    teacher = TruncatedSoftmax(teacher.log_probs.to(dtype), teacher.indices.to(index_dtype))
    loss, gradient = loss_and_gradient(student, teacher)
    assert loss.dtype == torch.float32
    expected, expected_gradient = oracle(
        student, TruncatedSoftmax(teacher.log_probs, teacher.indices.long())
    )
    assert_loss_close(loss, expected, torch.float32)
    assert_gradient_close(gradient, expected_gradient)


def test_a_listed_log_prob_of_minus_infinity_contributes_nothing(backend):
    student, teacher = logits(3, 400), truncated(3, 400, k=6)
    teacher.log_probs[:, 2] = -math.inf
    for tail, divergence in FORMS:
        options = {"tail": tail, "divergence": divergence}
        loss, gradient = loss_and_gradient(student, teacher, **options)
        if divergence == "reverse_kl":
            assert loss == math.inf
            continue
        expected, expected_gradient = oracle(student, teacher, **options)
        assert_loss_close(loss, expected, torch.float32)
        assert_gradient_close(gradient, expected_gradient)


# The keywords.


@pytest.mark.parametrize("tail", TAILS)
def test_per_token_temperature_and_weight(tail, backend):
    student, teacher = logits(3, 4, 50), truncated(3, 4, 50, k=5)
    labels = torch.randint(50, (3, 4), dtype=torch.int32)
    options = {
        "tail": tail,
        "temperature": torch.rand(3, 4) + 0.5,
        "token_weight": torch.rand(3, 4, dtype=torch.float64),
        "alpha": 0.5,
    }
    loss, gradient = loss_and_gradient(student, teacher, labels, **options)
    expected, expected_gradient = oracle(student, teacher, labels.long(), **options)
    assert_loss_close(loss, expected, torch.float32)
    assert_gradient_close(gradient, expected_gradient)


def test_without_t2_the_soft_term_is_the_plain_divergence(backend):
    student, teacher = logits(6, 40), truncated(6, 40, k=5)
    scaled = kdfast.topk_kd_loss(student, teacher, temperature=3.0)
    plain = kdfast.topk_kd_loss(student, teacher, temperature=3.0, scale_t2=False)
    torch.testing.assert_close(scaled, 9 * plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_tokens_count_for_nothing(dtype, backend):
    student, teacher = logits(4, 6, 30, dtype=dtype), truncated(4, 6, 30, k=5, dtype=dtype)
    labels = torch.randint(30, (4, 6))
    labels[:, 2] = 7 - 1000
    kept = labels != 7 - 1000
    for tail in TAILS:
        expected, expected_gradient = loss_and_gradient(
            student[kept], TruncatedSoftmax(*(x[kept] for x in teacher)), labels[kept],
            tail=tail, alpha=0.5,
        )  # fmt: skip
        spoiled = student.clone()
        spoiled[:, 2] = math.nan
        # Not even the indices are looked at.
        teacher.log_probs[:, 2], teacher.indices[:, 2] = math.nan, 10**6
        loss, gradient = loss_and_gradient(
            spoiled, teacher, labels, tail=tail, alpha=0.5, ignore_index=7 - 1000,
            token_weight=torch.where(kept, 1.0, math.nan),
        )  # fmt: skip
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient[kept], expected_gradient)
        assert (gradient[:, 2] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_counted_token_is_a_loss_of_zero(reduction, backend):
    student, teacher = torch.full((3, 9), math.nan), truncated(3, 9, k=4)
    labels = torch.full((3,), -100)
    loss, gradient = loss_and_gradient(student, teacher, labels, alpha=0.5, reduction=reduction)
    assert loss.item() == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("shape", [(0, 9), (2, 0, 9), (0, 3, 9)])
def test_empty_batch(shape, backend):
    teacher = kdfast.truncated_softmax(torch.empty(shape), 4)
    loss, gradient = loss_and_gradient(torch.empty(shape), teacher)
    assert loss.item() == 0
    assert gradient.shape == shape
    each = kdfast.topk_kd_loss(torch.empty(shape), teacher, reduction="none")
    assert each.shape == shape[:-1]


def test_reductions_and_num_items(backend):
    student, teacher, labels = logits(2, 5, 30), truncated(2, 5, 30, k=4), torch.randint(30, (2, 5))
    labels[0, :3] = -100
    each = kdfast.topk_kd_loss(student, teacher, labels, alpha=0.5, reduction="none")
    assert each.shape == (2, 5)
    assert (each[0, :3] == 0).all()
    _, summed = loss_and_gradient(student, teacher, labels, alpha=0.5, reduction="sum")
    for divisor, options in (
        (1, {"reduction": "sum"}),
        (7, {}),
        (21, {"num_items": 21}),
        (3.5, {"num_items": torch.tensor([3.5])}),
    ):
        loss, gradient = loss_and_gradient(student, teacher, labels, alpha=0.5, **options)
        torch.testing.assert_close(loss, each.sum() / divisor)
        torch.testing.assert_close(gradient, summed / divisor)


@pytest.mark.parametrize("tail", TAILS)
def test_parts(tail, backend):
    student, teacher, labels = logits(6, 40), truncated(6, 40, k=5), torch.randint(40, (6,))
    student.requires_grad_()
    options = {"tail": tail, "temperature": 2.0, "return_parts": True}
    for alpha in (0.0, 0.3, 1.0):
        total, soft, hard = kdfast.topk_kd_loss(student, teacher, labels, alpha=alpha, **options)
        torch.testing.assert_close(total, alpha * 4 * soft + (1 - alpha) * hard)
        torch.testing.assert_close(hard, F.cross_entropy(student, labels))
        assert total.requires_grad
        assert not soft.requires_grad
        assert not hard.requires_grad
        _, gradient = loss_and_gradient(
            student, teacher, labels, tail=tail, temperature=2.0, alpha=alpha
        )
        (with_parts,) = torch.autograd.grad(total, student)
        torch.testing.assert_close(with_parts, gradient)
    assert kdfast.topk_kd_loss(student, teacher, **options)[2].item() == 0
    each = kdfast.topk_kd_loss(student, teacher, labels, reduction="none", **options)
    assert [part.shape for part in each] == [(6,)] * 3


def test_alpha_takes_an_infinite_term_out(backend):
    student, teacher, labels = logits(2, 5), truncated(2, 5, k=3), torch.tensor([0, 1])
    student.scatter_(-1, teacher.indices[:, :1], -math.inf)
    labels = teacher.indices[:, 1]
    assert kdfast.topk_kd_loss(student, teacher, labels, alpha=0.5) == math.inf
    loss, gradient = loss_and_gradient(student, teacher, labels, alpha=0.0)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_columns_do_not_exist(dtype, tail, backend):
    student, teacher = logits(5, 40, dtype=dtype), truncated(5, 37, k=6, dtype=dtype)
    student[:, 37:] = math.nan
    labels = torch.randint(37, (5,))
    options = {"tail": tail, "alpha": 0.5}
    loss, gradient = loss_and_gradient(student, teacher, labels, vocab_size=37, **options)
    expected, expected_gradient = loss_and_gradient(student[:, :37], teacher, labels, **options)
    assert torch.equal(loss, expected)
    assert torch.equal(gradient[:, :37], expected_gradient)
    assert (gradient[:, 37:] == 0).all()


# Layouts and memory.


@pytest.mark.parametrize("tail", TAILS)
def test_strided_rows(tail, backend):
    wide, teacher = logits(4, 6, 50), truncated(4, 6, 30, k=5)
    for view in (
        lambda x: x[:, :-1],
        lambda x: x[:, ::2],
        lambda x: x.transpose(0, 1),
        lambda x: x[0, 0],
        lambda x: x[:1].expand(3, -1, -1),
        lambda x: x.view(2, 2, 6, -1).transpose(0, 2),
    ):
        student = wide.clone().requires_grad_()
        loss = kdfast.topk_kd_loss(view(student), TruncatedSoftmax(*map(view, teacher)), tail=tail)
        loss.backward()
        copied = wide.clone().requires_grad_()
        contiguous = TruncatedSoftmax(*(view(x).contiguous() for x in teacher))
        expected = kdfast.topk_kd_loss(view(copied).contiguous(), contiguous, tail=tail)
        expected.backward()
        assert torch.equal(loss, expected)
        assert torch.equal(student.grad, copied.grad)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_overwrite_puts_the_gradient_into_the_logits(dtype, tail, backend):
    student, teacher = logits(4, 6, 50, dtype=dtype), truncated(4, 6, 50, k=5)
    labels = torch.randint(50, (4, 6))
    options = {"tail": tail, "temperature": 2.0, "alpha": 0.5}
    _, expected = loss_and_gradient(student, teacher, labels, **options)
    leaf = student.clone().requires_grad_()
    produced = leaf * 1.0
    received = []
    produced.register_hook(received.append)
    kdfast.topk_kd_loss(
        produced, teacher, labels, overwrite_student_logits=True, **options
    ).backward()
    assert received[0].data_ptr() == produced.data_ptr()
    assert torch.equal(received[0], expected)
    assert torch.equal(leaf.grad, expected)


def test_overwritten_rows_that_do_not_merge_take_the_incoming_gradient(backend):
    wide, teacher, incoming = logits(3, 5, 50), truncated(3, 4, 50, k=5), torch.rand(3, 4)
    found = []
    for overwrite in (False, True):
        leaf = wide.clone().requires_grad_()
        options = {"reduction": "none", "overwrite_student_logits": overwrite}
        kdfast.topk_kd_loss((leaf * 1)[:, :-1], teacher, **options).backward(incoming)
        found.append(leaf.grad)
    torch.testing.assert_close(*found)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="plain PyTorch builds the temporaries")
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_training_step_adds_the_gradient_and_nothing_else(dtype, tail):
    student = torch.randn(256, 50257).to(dtype)
    teacher, labels = truncated(256, 50257, k=64), torch.randint(50257, (256,))

    def step(overwrite=False):
        logits = student.detach().requires_grad_()
        options = {"temperature": 2.0, "alpha": 0.5, "overwrite_student_logits": overwrite}
        loss = kdfast.topk_kd_loss(logits, teacher, labels, tail=tail, **options)
        torch.autograd.grad(loss, logits)

    step()
    size = student.numel() * student.element_size()
    # Two threads' rows of exponentials, and what the allocator rounds up to.
    slack = 6 * 2**20
    assert peak_bytes(step) < size + slack
    assert peak_bytes(lambda: step(overwrite=True)) < slack


def test_same_bits_every_run():
    student, teacher = logits(33, 20011), truncated(33, 20011, k=64)
    first = loss_and_gradient(student, teacher, temperature=2.0)
    for _ in range(3):
        assert all(map(torch.equal, first, loss_and_gradient(student, teacher, temperature=2.0)))


# Extremes.


@pytest.mark.parametrize("temperature", [1e-2, 1.0, 1e3])
@every_form
def test_huge_logits(tail, divergence, temperature, backend):
    student, scores = logits(4, 3000), logits(4, 3000)
    student[:, ::7], scores[:, ::5] = 1e4, -1e4
    student[1, 5], scores[2, 6] = -1e4, 1e4
    teacher = kdfast.truncated_softmax(scores, 30, temperature=temperature)
    options = {"tail": tail, "divergence": divergence, "temperature": temperature}
    loss, gradient = loss_and_gradient(student, teacher, **options)
    expected, expected_gradient = oracle(student, teacher, **options)
    assert_loss_close(loss, expected, torch.float32)
    # Where p and q have no entry in common the exact gradient is a number that float32 cannot hold.
    assert (gradient - expected_gradient).norm() <= 2e-6 * expected_gradient.norm() + 1e-12


@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_maximum_that_keeps_rising(dtype, temperature, backend):
    """Whatever a sweep takes for the maximum, a later chunk exceeds it, by little or by far."""
    slopes = torch.tensor([[-1.0], [1.0], [30.0], [1000.0]])
    student = (slopes * torch.linspace(0, 1, 9001) + 0.1 * torch.randn(4, 9001)).to(dtype)
    teacher, labels = truncated(4, 9001, k=20), torch.randint(9001, (4,))
    options = {"temperature": temperature, "alpha": 0.5}
    loss, gradient = loss_and_gradient(student, teacher, labels, **options)
    expected, expected_gradient = oracle(student, teacher, labels, **options)
    assert_loss_close(loss, expected, dtype)
    assert_gradient_close(gradient, expected_gradient)


@pytest.mark.parametrize("on_support", [True, False])
def test_student_minus_infinity(on_support, backend):
    student, teacher = logits(3, 5000), truncated(3, 5000, k=20)
    if on_support:
        student[1, teacher.indices[1, 4]] = -math.inf
    else:
        listed = torch.zeros(5000, dtype=torch.bool).scatter(0, teacher.indices[1], True)
        student[1] = torch.where(listed, student[1], -math.inf)
    for tail in TAILS:
        each = kdfast.topk_kd_loss(student, teacher, tail=tail, reduction="none")
        # Off the support only the bucket asks for anything.
        infinite = on_support or tail == "bucket"
        assert (each[1] == math.inf) == infinite
        assert each[[0, 2]].isfinite().all()
        _, gradient = loss_and_gradient(student, teacher, tail=tail)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("tail", TAILS)
def test_logits_far_below_zero(tail, backend):
    """Nothing may be measured from 0, where the exponentials of the whole row underflow."""
    student, teacher, labels = logits(3, 40), truncated(3, 40, k=4), torch.randint(40, (3,))
    options = {"tail": tail, "temperature": 2.0, "alpha": 0.5}
    expected = loss_and_gradient(student, teacher, labels, **options)
    far = loss_and_gradient(student - 1000, teacher, labels, **options)
    torch.testing.assert_close(far, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tail", ["renormalize", "none", "support"])
def test_no_column_off_the_support(tail, backend):
    student = torch.full((1, 8), -math.inf)
    student[0, :2] = torch.tensor([-100.0, -101.0])
    teacher = TruncatedSoftmax(torch.tensor([[0.6, 0.4]]).log(), torch.tensor([[0, 1]]))
    options = {"tail": tail, "temperature": 2.0, "alpha": 0.5}
    loss, gradient = loss_and_gradient(student, teacher, torch.tensor([0]), **options)
    assert loss.isfinite()
    assert (gradient[0, 2:] == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("divergence", TAIL_DIVERGENCES["bucket"])
def test_banned_columns_leave_no_bucket(divergence, backend):
    """What rounding leaves of 1 − Σp is not asked of a student who has nothing there."""
    scores = torch.full((500, 100), -math.inf)
    scores[:, :20] = logits(500, 20)
    teacher = kdfast.truncated_softmax(scores, 20)
    options = {"divergence": divergence, "reduction": "none"}
    each = kdfast.topk_kd_loss(scores, teacher, **options)
    assert each.abs().max() < 1e-5
    _, gradient = loss_and_gradient(scores, teacher, divergence=divergence)
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("gap", [36.0, 700.0, 720.0, 760.0])
@pytest.mark.parametrize("tail", ["bucket", "support"])
def test_jsd_where_the_student_has_next_to_nothing(tail, gap, backend):
    student = torch.tensor([[0.0, -gap, -3.0, -3.0, -3.0]])
    teacher = TruncatedSoftmax(torch.tensor([[0.5, 0.4]]).log(), torch.tensor([[0, 1]]))
    options = {"tail": tail, "divergence": "jsd", "temperature": 0.05 if gap == 36 else 1.0}
    loss, gradient = loss_and_gradient(student, teacher, **options)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_alpha_of_zero_takes_the_soft_gradient_out(backend):
    student, labels = logits(1, 9), torch.tensor([3])
    nothing = TruncatedSoftmax(torch.zeros(1, 2), torch.full((1, 2), -1))
    options = {"tail": "renormalize", "alpha": 0.0}
    _, gradient = loss_and_gradient(student, nothing, labels, **options)
    expected = student.softmax(-1) - F.one_hot(labels, 9)
    torch.testing.assert_close(gradient, expected)


def test_a_nan_of_any_bits_is_seen():
    student, teacher = logits(3, 5000), truncated(3, 5000, k=20)
    for bits in (0x7FC00001, 0x7FC00155, 0x7F800001, -1):
        student.view(torch.int32)[1, 2600] = bits
        assert student[1, 2600].isnan()
        each = kdfast.topk_kd_loss(student, teacher, reduction="none")
        assert each.isnan().tolist() == [False, True, False]
        assert kdfast.truncated_softmax(student, 4).log_probs[1].isnan().all()


@every_form
def test_nan_stays_in_its_row(tail, divergence, backend):
    student, labels = logits(4, 5000), torch.randint(5000, (4,))
    teacher = truncated(4, 5000, k=20)
    clean = [0, 3]
    options = {"tail": tail, "divergence": divergence, "reduction": "none", "alpha": 0.5}
    ones = torch.ones(4)
    expected = loss_and_gradient(student, teacher, labels, incoming=ones, **options)
    student[1, 2600], teacher.log_probs[2, 3] = math.nan, math.nan
    each, gradient = loss_and_gradient(student, teacher, labels, incoming=ones, **options)
    assert each.isnan().tolist() == [False, True, True, False]
    assert torch.equal(each[clean], expected[0][clean])
    assert torch.equal(gradient[clean], expected[1][clean])


def test_the_support_alone_does_not_look_elsewhere(backend):
    student, teacher = logits(3, 5000), truncated(3, 5000, k=20)
    expected = loss_and_gradient(student, teacher, tail="support")
    listed = torch.zeros(3, 5000, dtype=torch.bool).scatter(-1, teacher.indices, True)
    student[~listed] = math.nan
    result = loss_and_gradient(student, teacher, tail="support")
    assert all(map(torch.equal, result, expected))


# Autograd.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("retain", [False, True])
def test_incoming_gradient(dtype, retain, backend):
    student, teacher = logits(5, 3000, dtype=dtype), truncated(5, 3000, k=20)
    _, expected = oracle(student, teacher)
    for scale in (1.0, 4.0, 0.0):
        leaf = student.clone().requires_grad_()
        kdfast.topk_kd_loss(leaf, teacher).backward(torch.tensor(scale), retain_graph=retain)
        assert_gradient_close(leaf.grad, scale * expected)
    weights = torch.tensor([1.0, 2.0, 0.0, -4.0, 0.5])
    leaf = student.clone().requires_grad_()
    losses = kdfast.topk_kd_loss(leaf, teacher, reduction="none")
    losses.backward(weights, retain_graph=retain)
    assert_gradient_close(leaf.grad, 5 * weights.to(expected).unsqueeze(-1) * expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_second_backward_through_a_retained_graph(dtype, backend):
    student = logits(5, 300, dtype=dtype).requires_grad_()
    loss = kdfast.topk_kd_loss(student, truncated(5, 300, k=20))
    first, third = (torch.autograd.grad(loss * s, student, retain_graph=True)[0] for s in (1, 3))
    second = torch.autograd.grad(loss, student)[0]
    assert torch.equal(first, second)
    torch.testing.assert_close(third, 3 * first)


def test_a_float16_loss_scale_loses_no_gradient(backend):
    student = logits(64, 5000, dtype=torch.float16, scale=0.5)
    teacher = truncated(64, 5000, k=64, scale=0.5)
    _, expected = oracle(student, teacher)
    scale = 65536.0
    leaf = student.clone().requires_grad_()
    (kdfast.topk_kd_loss(leaf, teacher) * scale).backward()
    assert_gradient_close(leaf.grad, scale * expected)
    rounded_first = relative_error(expected.half(), expected)
    assert relative_error(leaf.grad, scale * expected) < rounded_first / 10


def test_double_backward_is_refused(backend):
    student = logits(5, 30).requires_grad_()
    loss = kdfast.topk_kd_loss(student, truncated(5, 30, k=4))
    with pytest.raises(RuntimeError, match="topk_kd_loss has no second derivative"):
        torch.autograd.grad(loss, student, create_graph=True)


# torch.compile and the operator.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_compiles_whole_with_dynamic_shapes(dtype):
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def step(student, scores, labels, weight):
        with torch.no_grad():
            teacher = kdfast.truncated_softmax(scores, 7, temperature=2.0)
        options = {"temperature": 2.0, "alpha": 0.3, "token_weight": weight, "return_parts": True}
        total, soft, hard = kdfast.topk_kd_loss(student * 1.0, teacher, labels, **options)
        return 2 * total + 0 * (soft + hard)

    for rows, vocab in ((4, 100), (6, 130), (9, 257)):
        student, scores = logits(rows, vocab, dtype=dtype), logits(rows, vocab, dtype=dtype)
        labels, weight = torch.randint(vocab, (rows,)), torch.rand(rows)
        leaf = student.clone().requires_grad_()
        loss = step(leaf, scores, labels, weight)
        loss.backward()
        teacher = kdfast.truncated_softmax(scores, 7, temperature=2.0)
        options = {"temperature": 2.0, "alpha": 0.3, "token_weight": weight}
        expected, gradient = loss_and_gradient(student, teacher, labels, **options)
        torch.testing.assert_close(loss, 2 * expected)
        torch.testing.assert_close(leaf.grad, 2 * gradient)
        with torch.no_grad():
            torch.testing.assert_close(step(student, scores, labels, weight), 2 * expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("need_parts", [False, True])
def test_opcheck(reduction, need_parts):
    student, teacher, labels = logits(3, 4, 20), truncated(3, 4, 20, k=5), torch.randint(20, (3, 4))
    arguments = (student, *teacher, labels, torch.rand(3, 4), torch.rand(3, 4) + 1, None, None)
    options = {
        "tail": "bucket",
        "divergence": "jsd",
        "beta": 0.5,
        "temperature": 1.0,
        "scale_t2": True,
        "alpha": 0.5,
        "ignore_index": -100,
        "vocab_size": 20,
        "reduction": reduction,
        "need_parts": need_parts,
    }
    for gradient in (torch.empty_like(student), None):
        torch.library.opcheck(
            torch.ops.kdfast.topk_kd_loss_forward.default, (*arguments, gradient), options
        )


# The module.


def test_module_is_the_function():
    student, teacher, labels = logits(4, 30), truncated(4, 30, k=4), torch.randint(30, (4,))
    options = {"tail": "support", "divergence": "jsd", "temperature": 2.0, "alpha": 0.3}
    module = kdfast.TopKKDLoss(**options)
    weight = torch.rand(4)
    expected = kdfast.topk_kd_loss(
        student, teacher, labels, token_weight=weight, num_items=9, **options
    )
    for face in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        loss = face(student, teacher, labels, token_weight=weight, num_items=9)
        assert torch.equal(loss, expected)
    assert "tail='support'" in repr(module)


def test_module_knows_every_keyword_of_the_function():
    function = inspect.signature(kdfast.topk_kd_loss).parameters
    settings = inspect.signature(kdfast.TopKKDLoss).parameters
    call = inspect.signature(kdfast.TopKKDLoss.forward).parameters
    assert set(function) == set(settings) | set(call) - {"self"}
    for name, parameter in settings.items():
        assert parameter.default == function[name].default


def test_keywords_are_those_of_kd_loss():
    ours = inspect.signature(kdfast.topk_kd_loss).parameters
    theirs = inspect.signature(kdfast.kd_loss).parameters
    assert set(ours) - set(theirs) == {"teacher", "tail"}
    # The teacher's temperature was chosen when its entries were taken.
    assert set(theirs) - set(ours) == {"teacher_logits", "teacher_temperature"}
    for name in set(ours) & set(theirs):
        assert ours[name] == theirs[name]


# Bad input.

PAIR = TruncatedSoftmax(torch.zeros(4, 2), torch.tensor([0, 1]).expand(4, 2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student_logits": [1.0]}, TypeError, "student_logits must be a tensor, got list"),
        ({"student_logits": torch.tensor(1.0)}, ValueError, "vocabulary dimension"),
        ({"teacher": tuple(PAIR)}, TypeError, "teacher must be a TruncatedSoftmax, got tuple"),
        ({"teacher": PAIR._replace(log_probs=torch.zeros(4, 2).long())}, TypeError,
         "teacher.log_probs must be one of"),
        ({"teacher": PAIR._replace(log_probs=torch.zeros(4, 2, requires_grad=True))}, ValueError,
         "teacher.log_probs requires grad"),
        ({"teacher": PAIR._replace(indices=torch.zeros(4, 2))}, TypeError,
         "teacher.indices must be .* got torch.float32"),
        ({"teacher": PAIR._replace(indices=[0, 1])}, TypeError, "teacher.indices must .* got list"),
        ({"teacher": PAIR._replace(indices=torch.zeros(4, 3).long())}, ValueError,
         r"teacher.indices must have the shape of teacher.log_probs \(4, 2\), got \(4, 3\)"),
        ({"teacher": TruncatedSoftmax(*(x[:3] for x in PAIR))}, ValueError,
         r"teacher.log_probs must have the leading shape of student_logits \(4,\), got \(3,\)"),
        ({"teacher": TruncatedSoftmax(*(x[:, :0] for x in PAIR))}, ValueError,
         "teacher.log_probs must have a dimension of at least one entry"),
        ({"teacher": PAIR._replace(log_probs=torch.zeros(4, 2, device="meta"))}, ValueError,
         "teacher.log_probs must be on cpu"),
        ({"teacher": PAIR._replace(indices=torch.tensor([0, 9]).expand(4, 2))}, ValueError,
         r"teacher.indices must be in \[0, 9\), or −1, got 9"),
        ({"teacher": PAIR._replace(indices=torch.tensor([-2, 3]).expand(4, 2))}, ValueError,
         "teacher.indices must be in .* got -2"),
        ({"teacher": PAIR._replace(indices=torch.tensor([3, 3]).expand(4, 2))}, ValueError,
         "teacher.indices must be distinct for each token, got 3 more than once"),
        ({"teacher": PAIR._replace(indices=torch.tensor([0, 0]).expand(4, 2))}, ValueError,
         "teacher.indices must be distinct for each token, got 0 more than once"),
        ({"vocab_size": 1}, ValueError, r"teacher.indices must be in \[0, 1\)"),
        ({"vocab_size": 10}, ValueError, "vocab_size must be .* got 10"),
        ({"tail": "rest"}, ValueError, "tail must be one of .*'rest'"),
        ({"divergence": "kl"}, ValueError, "divergence must be one of .*'kl'"),
        *(
            ({"tail": tail, "divergence": divergence}, ValueError,
             f"divergence must be one of .* with tail='{tail}', got '{divergence}'")
            for tail, divergence in itertools.product(TAILS, reference.DIVERGENCES)
            if divergence not in TAIL_DIVERGENCES[tail]
        ),
        ({"reduction": "batchmean"}, ValueError, "reduction must be one of"),
        ({"beta": 1.5}, ValueError, "beta must be at least 0 and at most 1, got 1.5"),
        ({"alpha": 0.5, "labels": None}, ValueError, "labels are needed"),
        ({"labels": torch.tensor([0, 1, 9, 2])}, ValueError, r"labels must be in \[0, 9\).*got 9"),
        ({"token_weight": torch.zeros(4, 9)}, ValueError, "token_weight must have"),
        ({"temperature": 0}, ValueError, "temperature must be finite and above 0, got 0"),
        ({"temperature": torch.zeros(4)}, ValueError, "temperature must be finite and above 0 for"),
        ({"num_items": -1}, ValueError, "num_items must be"),
        ({"student_logits": torch.zeros(9, 4).t(), "overwrite_student_logits": True}, ValueError,
         "overwrite_student_logits needs"),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(change, error, message):
    arguments = {
        "student_logits": torch.zeros(4, 9),
        "teacher": PAIR,
        "labels": torch.zeros(4).long(),
        **change,
    }
    with pytest.raises(error, match=message):
        kdfast.topk_kd_loss(**arguments)


# What should hold for every input.


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    vocab=st.integers(1, 4200),
    form=st.sampled_from(FORMS),
    kept=st.floats(0, 1),
    temperature=st.floats(0.05, 50),
    beta=st.floats(0, 1),
    scale=st.floats(0.01, 30),
    seed=st.integers(0, 2**31),
)
def test_divergences_are_divergences(rows, vocab, form, kept, temperature, beta, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    student, scores = (scale * torch.randn(2, rows, vocab, generator=generator)).unbind()
    teacher = kdfast.truncated_softmax(scores, max(1, int(kept * vocab)), temperature=temperature)
    tail, divergence = form
    options = {"tail": tail, "divergence": divergence, "temperature": temperature, "beta": beta}
    loss, gradient = loss_and_gradient(student, teacher, scale_t2=False, **options)
    assert loss.isfinite()
    # The soft term does not see a shift of the logits, so its gradient sums to nothing: nothing but
    # the rounding of q · (∂f/∂q − Σ), two terms of the size of the loss.
    assert gradient.sum(-1).abs().max() <= 1e-6 * (1 + loss.abs()) / temperature
    if tail != "none":
        assert loss >= -1e-6
    if tail in ("bucket", "support"):
        # What agrees with the teacher where it is asked is left alone.
        same, still = loss_and_gradient(scores, teacher, scale_t2=False, **options)
        assert abs(same.item()) < 1e-5
        assert still.abs().max() < 1e-5 / temperature
