import copy
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
from kdfast import reference
from kdfast.reference import DIVERGENCES

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = [name for name in ("cpp", "torch") if name in kdfast.available_backends()]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with kdfast.backend(request.param):
        yield request.param


def logits(*shape, dtype=torch.float32, scale=3.0):
    return (torch.randn(*shape) * scale).to(dtype)


def loss_and_gradient(student, teacher, *args, incoming=None, **kwargs):
    student = student.detach().clone().requires_grad_()
    loss = kdfast.kd_loss(student, teacher, *args, **kwargs)
    loss.backward(incoming)
    return loss.detach(), student.grad


def oracle(student, teacher, labels=None, *, reduction="mean", **kwargs):
    """Loss and gradient in float64, by differentiating the specification."""
    student = student.detach().double().clone().requires_grad_()
    rows = reference.kd_loss_rows(student, teacher.double(), labels, **kwargs)[0]
    counted = rows.numel() if labels is None else (labels != kwargs.get("ignore_index", -100)).sum()
    loss = rows.sum() / counted if reduction == "mean" else rows.sum()
    loss.backward()
    return loss.detach(), student.grad


# The specification itself.


def test_reference_on_hand_worked_values():
    # softmax of (ln 3, 0) is (3/4, 1/4), of (0, 0) is (1/2, 1/2); m is (5/8, 3/8) at beta 1/2.
    teacher, student = (
        torch.tensor([math.log(3), 0.0], dtype=torch.float64),
        torch.zeros(2).double(),
    )
    worked = {
        "forward_kl": 0.75 * math.log(1.5) + 0.25 * math.log(0.5),
        "reverse_kl": 0.5 * math.log(2 / 3) + 0.5 * math.log(2),
        "jsd": 0.5 * (0.75 * math.log(6 / 5) + 0.25 * math.log(2 / 3))
        + 0.5 * (0.5 * math.log(4 / 5) + 0.5 * math.log(4 / 3)),
        "skew_forward_kl": 0.75 * math.log(6 / 5) + 0.25 * math.log(2 / 3),
        "skew_reverse_kl": 0.5 * math.log(4 / 5) + 0.5 * math.log(4 / 3),
        "tvd": 0.25,
    }
    for divergence, expected in worked.items():
        soft = reference.kd_loss_rows(student, teacher, divergence=divergence)[1]
        assert soft.item() == pytest.approx(expected, rel=1e-14), divergence


def test_reference_is_torch_kl_div_and_cross_entropy():
    student, teacher, labels = logits(5, 11).double(), logits(5, 11).double(), torch.arange(5)
    total, soft, hard = reference.kd_loss_rows(student, teacher, labels, temperature=2.0, alpha=0.3)
    kl = F.kl_div(
        F.log_softmax(student / 2, -1), F.log_softmax(teacher / 2, -1), reduction="none",
        log_target=True,
    ).sum(-1)  # fmt: skip
    ce = F.cross_entropy(student, labels, reduction="none")
    torch.testing.assert_close(soft, kl)
    torch.testing.assert_close(hard, ce)
    torch.testing.assert_close(total, 0.3 * 4 * kl + 0.7 * ce)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(divergence, backend):
    student = logits(2, 2, 5, dtype=torch.float64, scale=1.0).requires_grad_()
    teacher, labels = logits(2, 2, 5, dtype=torch.float64), torch.randint(5, (2, 2))
    labels[0, 1] = -100
    options = {"divergence": divergence, "beta": 0.3, "alpha": 0.4}

    def rows(s):
        return reference.kd_loss_rows(s, teacher, labels, None, 2.0, 1.5, **options)[0]

    def loss(s):
        temperatures = {"temperature": 2.0, "teacher_temperature": 1.5}
        return kdfast.kd_loss(s, teacher, labels, reduction="none", **temperatures, **options)

    assert torch.autograd.gradcheck(rows, student)
    assert torch.autograd.gradcheck(loss, student)
    torch.testing.assert_close(rows(student), loss(student))


# Every divergence, precision and vocabulary against it.


@pytest.mark.parametrize("vocab", [1, 7, 2048, 2049, 32003])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_matches_reference(divergence, dtype, vocab, backend):
    student, teacher = logits(5, vocab, dtype=dtype), logits(5, vocab, dtype=dtype)
    labels = torch.randint(vocab, (5,))
    labels[1] = -100
    for options in ({}, {"temperature": 3.0, "alpha": 0.3}, {"temperature": 1.0, "alpha": 0.5}):
        options = {"divergence": divergence, "beta": 0.3, **options}
        loss, gradient = loss_and_gradient(student, teacher, labels, **options)
        expected, expected_gradient = oracle(student, teacher, labels, **options)
        if vocab == 1 and options.get("alpha", 1) == 1:
            assert abs(loss.item()) < 1e-12
            assert gradient.abs().max() < 1e-6
            continue
        if vocab == 1:
            assert abs(loss.item()) < 1e-12
            continue
        assert_loss_close(loss, expected, dtype)
        assert_gradient_close(gradient, expected_gradient)


@pytest.mark.parametrize(("rows", "vocab"), [(16, 50257), (4, 128256)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_matches_reference_on_large_vocabularies(divergence, rows, vocab, backend):
    student, teacher = logits(rows, vocab), logits(rows, vocab)
    options = {"divergence": divergence, "temperature": 2.0}
    loss, gradient = loss_and_gradient(student, teacher, **options)
    expected, expected_gradient = oracle(student, teacher, **options)
    assert_loss_close(loss, expected, torch.float32)
    assert_gradient_close(gradient, expected_gradient)


@pytest.mark.parametrize(
    ("divergence", "beta", "same"),
    [
        ("jsd", 0, "forward_kl"),
        ("jsd", 1, "reverse_kl"),
        ("skew_forward_kl", 0, "forward_kl"),
        ("skew_reverse_kl", 0, "reverse_kl"),
        ("skew_forward_kl", 1, None),
        ("skew_reverse_kl", 1, None),
    ],
)
def test_beta_at_its_ends(divergence, beta, same, backend):
    student, teacher = logits(4, 100), logits(4, 100)
    loss, gradient = loss_and_gradient(student, teacher, divergence=divergence, beta=beta)
    if same is None:
        assert abs(loss.item()) < 1e-6
        assert gradient.abs().max() < 1e-6
    else:
        expected, expected_gradient = loss_and_gradient(student, teacher, divergence=same)
        assert torch.equal(loss, expected)
        assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("epsilon", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_stays_exact_as_the_student_converges(divergence, epsilon):
    teacher = logits(8, 5000)
    student = teacher + epsilon * torch.randn_like(teacher)
    loss, gradient = loss_and_gradient(student, teacher, divergence=divergence, beta=0.3)
    expected, expected_gradient = oracle(student, teacher, divergence=divergence, beta=0.3)
    assert loss >= 0
    if divergence == "tvd":
        # Its gradient jumps where p = q, and rounding puts u/ε of the entries on the other side.
        assert relative_error(loss, expected) < 1e-6 / epsilon
        assert relative_error(gradient, expected_gradient) < (1e-6 / epsilon) ** 0.5
    else:
        # The divergence is ε² of p and q, which carry a rounding each; the gradient is ε of them.
        assert relative_error(loss, expected) < 3e-7 / epsilon**2
        assert relative_error(gradient, expected_gradient) < 2e-6 / epsilon


# The keywords.


def test_per_token_temperature_and_weight(backend):
    student, teacher = logits(3, 4, 50), logits(3, 4, 50)
    labels = torch.randint(50, (3, 4), dtype=torch.int32)
    options = {
        "temperature": torch.rand(3, 4) + 0.5,
        "teacher_temperature": torch.rand(3, 4) + 0.5,
        "token_weight": torch.rand(3, 4, dtype=torch.float64),
        "alpha": 0.5,
    }
    loss, gradient = loss_and_gradient(student, teacher, labels, **options)
    expected, expected_gradient = oracle(student, teacher, labels.long(), **options)
    assert_loss_close(loss, expected, torch.float32)
    assert_gradient_close(gradient, expected_gradient)


def test_number_and_constant_tensor_are_the_same_temperature(backend):
    student, teacher = logits(6, 40), logits(6, 40)
    number = loss_and_gradient(student, teacher, temperature=3.0, teacher_temperature=2.0)
    tensor = loss_and_gradient(
        student,
        teacher,
        temperature=torch.full((6,), 3.0),
        teacher_temperature=torch.full((6,), 2.0),
    )
    assert torch.equal(number[0], tensor[0])
    assert torch.equal(number[1], tensor[1])


def test_without_t2_the_soft_term_is_the_plain_divergence(backend):
    student, teacher = logits(6, 40), logits(6, 40)
    scaled = kdfast.kd_loss(student, teacher, temperature=3.0)
    plain = kdfast.kd_loss(student, teacher, temperature=3.0, scale_t2=False)
    torch.testing.assert_close(scaled, 9 * plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_tokens_count_for_nothing(dtype, backend):
    student, teacher = logits(4, 6, 30, dtype=dtype), logits(4, 6, 30, dtype=dtype)
    labels = torch.randint(30, (4, 6))
    labels[:, 2] = 7 - 1000
    kept = labels != 7 - 1000
    expected, expected_gradient = loss_and_gradient(
        student[kept], teacher[kept], labels[kept], alpha=0.5
    )
    student[:, 2], teacher[:, 2] = math.nan, math.nan
    loss, gradient = loss_and_gradient(
        student, teacher, labels, alpha=0.5, ignore_index=7 - 1000,
        token_weight=torch.where(kept, 1.0, math.nan),
    )  # fmt: skip
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient[kept], expected_gradient)
    assert (gradient[:, 2] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_counted_token_is_a_loss_of_zero(reduction, backend):
    student, teacher = torch.full((3, 9), math.nan), logits(3, 9)
    labels = torch.full((3,), -100)
    loss, gradient = loss_and_gradient(student, teacher, labels, alpha=0.5, reduction=reduction)
    assert loss.item() == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("shape", [(0, 9), (2, 0, 9), (0, 3, 9)])
def test_empty_batch(shape, backend):
    loss, gradient = loss_and_gradient(torch.empty(shape), torch.empty(shape))
    assert loss.item() == 0
    assert gradient.shape == shape
    assert (
        kdfast.kd_loss(torch.empty(shape), torch.empty(shape), reduction="none").shape == shape[:-1]
    )


def test_reductions_and_num_items(backend):
    student, teacher, labels = logits(2, 5, 30), logits(2, 5, 30), torch.randint(30, (2, 5))
    labels[0, :3] = -100
    each = kdfast.kd_loss(student, teacher, labels, alpha=0.5, reduction="none")
    assert each.shape == (2, 5)
    assert (each[0, :3] == 0).all()
    for divisor, options in (
        (1, {"reduction": "sum"}),
        (7, {}),
        (21, {"num_items": 21}),
        (21, {"num_items": torch.tensor(21)}),
        (3.5, {"num_items": torch.tensor([3.5])}),
    ):
        loss, gradient = loss_and_gradient(student, teacher, labels, alpha=0.5, **options)
        torch.testing.assert_close(loss, each.sum() / divisor)
        _, summed = loss_and_gradient(student, teacher, labels, alpha=0.5, reduction="sum")
        torch.testing.assert_close(gradient, summed / divisor)


@pytest.mark.parametrize("num_items", [0, torch.tensor(0)])
def test_no_items_make_no_loss(num_items):
    loss, gradient = loss_and_gradient(logits(4, 30), logits(4, 30), num_items=num_items)
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize(
    ("dtype", "vocab"), [(torch.uint8, 256), (torch.int8, 200), (torch.int16, 50000)], ids=str
)
def test_labels_of_few_bits(dtype, vocab, backend):
    """Neither the size of the vocabulary nor ignore_index need fit into them: 156 is no −100."""
    student, teacher = logits(4, vocab), logits(4, vocab)
    labels = torch.tensor([156, 1, 2, 99]).clamp_max(torch.iinfo(dtype).max)
    found = loss_and_gradient(student, teacher, labels.to(dtype), alpha=0.5)
    for result, expected in zip(
        found, loss_and_gradient(student, teacher, labels, alpha=0.5), strict=True
    ):
        assert torch.equal(result, expected)


def test_the_temperature_of_an_ignored_token_is_not_looked_at(backend):
    student, teacher, labels = logits(3, 30), logits(3, 30), torch.tensor([1, -100, 2])
    loss = kdfast.kd_loss(student, teacher, labels, temperature=torch.tensor([2.0, 0.0, 2.0]))
    torch.testing.assert_close(loss, kdfast.kd_loss(student, teacher, labels, temperature=2.0))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_soft_term_without_a_share_is_not_looked_at(divergence, backend):
    student, teacher, labels = logits(3, 30), logits(3, 30), torch.tensor([1, 5, 2])
    expected = loss_and_gradient(student, teacher, labels, divergence=divergence, alpha=0.0)
    teacher[0, 4], teacher[1] = torch.nan, -torch.inf
    found = loss_and_gradient(student, teacher, labels, divergence=divergence, alpha=0.0)
    for result, other in zip(found, expected, strict=True):
        torch.testing.assert_close(result, other)


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("divergence", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_mixtures_of_equals_are_0_whatever_their_shares(divergence, beta):
    student = logits(4, 1000)
    with kdfast.backend(BACKENDS[0]):
        loss = kdfast.kd_loss(
            student, student.clone(), divergence=divergence, beta=beta, temperature=1000.0
        )
    # T² makes 1e-8 of a rounding in one of the logarithms 1e-2.
    assert loss.abs() < 1e-6


def test_weights_do_not_change_the_divisor(backend):
    student, teacher = logits(4, 30), logits(4, 30)
    weight = torch.tensor([2.0, 0.0, 0.5, 1.0])
    each = kdfast.kd_loss(student, teacher, reduction="none")
    loss = kdfast.kd_loss(student, teacher, token_weight=weight)
    torch.testing.assert_close(loss, (weight * each).sum() / 4)


def test_parts(backend):
    student, teacher, labels = logits(6, 40), logits(6, 40), torch.randint(40, (6,))
    student.requires_grad_()
    options = {"temperature": 2.0, "return_parts": True}
    for alpha in (0.0, 0.3, 1.0):
        total, soft, hard = kdfast.kd_loss(student, teacher, labels, alpha=alpha, **options)
        torch.testing.assert_close(total, alpha * 4 * soft + (1 - alpha) * hard)
        torch.testing.assert_close(hard, F.cross_entropy(student, labels))
        assert total.requires_grad
        assert not soft.requires_grad
        assert not hard.requires_grad
    assert kdfast.kd_loss(student, teacher, **options)[2].item() == 0
    each = kdfast.kd_loss(student, teacher, labels, reduction="none", **options)
    assert [part.shape for part in each] == [(6,)] * 3


def test_alpha_takes_an_infinite_term_out(backend):
    student, teacher, labels = logits(2, 5), logits(2, 5), torch.tensor([0, 1])
    student[:, 3] = -math.inf
    assert kdfast.kd_loss(student, teacher, labels, alpha=0.5) == math.inf
    assert kdfast.kd_loss(student, teacher, labels, alpha=0.0).isfinite()
    labels[0] = 3
    teacher[:, 3] = -math.inf
    assert kdfast.kd_loss(student, teacher, labels, alpha=0.5) == math.inf
    assert kdfast.kd_loss(student, teacher, labels, alpha=1.0).isfinite()


@pytest.mark.parametrize("divergence", reference.DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_alpha_takes_an_infinite_gradient_out(temperature, divergence, backend):
    student, teacher, labels = logits(6, 5000), logits(6, 5000), torch.arange(6)
    teacher[:, 3] = -math.inf
    options = {"divergence": divergence, "temperature": temperature, "alpha": 0.0}
    _, gradient = loss_and_gradient(student, teacher, labels, **options)
    leaf = student.double().requires_grad_()
    F.cross_entropy(leaf, labels).backward()
    assert_gradient_close(gradient, leaf.grad)


def test_the_default_device_is_not_the_tensors(backend):
    student, teacher = logits(5, 300), logits(5, 300)
    expected = kdfast.kd_loss(student, teacher, temperature=3.25)
    with torch.device("meta"):
        assert torch.equal(kdfast.kd_loss(student, teacher, temperature=3.75 - 0.5), expected)
        assert kdfast.kd_loss(student, teacher, temperature=3.5) > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_columns_do_not_exist(dtype, backend):
    student, teacher = logits(5, 40, dtype=dtype), logits(5, 48, dtype=dtype)
    student[:, 37:], teacher[:, 37:] = math.nan, math.inf
    labels = torch.randint(37, (5,))
    loss, gradient = loss_and_gradient(student, teacher, labels, alpha=0.5, vocab_size=37)
    expected, expected_gradient = loss_and_gradient(
        student[:, :37], teacher[:, :37], labels, alpha=0.5
    )
    assert torch.equal(loss, expected)
    assert torch.equal(gradient[:, :37], expected_gradient)
    assert (gradient[:, 37:] == 0).all()


def test_precisions_mix(backend):
    for student_dtype, teacher_dtype in itertools.permutations(DTYPES, 2):
        s, t = logits(5, 3000, dtype=student_dtype), logits(5, 3000, dtype=teacher_dtype)
        loss, gradient = loss_and_gradient(s, t)
        expected, expected_gradient = oracle(s, t)
        assert gradient.dtype == s.dtype
        assert loss.dtype == (torch.float64 if s.dtype == torch.float64 else torch.float32)
        assert relative_error(loss, expected) < 1e-6
        assert_gradient_close(gradient, expected_gradient)


# Layouts and memory.


def test_strided_rows(backend):
    wide = logits(4, 6, 50)
    teacher = logits(4, 6, 50)
    for view in (
        lambda x: x[:, :-1],
        lambda x: x[:, ::2],
        lambda x: x[1:, 2:, 3:40],
        lambda x: x.transpose(0, 1),
        lambda x: x[..., ::2],
        lambda x: x[0, 0],
        lambda x: x[:1].expand(3, -1, -1),
        lambda x: x.view(2, 2, 6, 50)[:, :, 1:],
        lambda x: x.view(2, 2, 6, 50).transpose(0, 2),
    ):
        student = wide.clone().requires_grad_()
        loss = kdfast.kd_loss(view(student), view(teacher))
        loss.backward()
        copied = wide.clone().requires_grad_()
        expected = kdfast.kd_loss(view(copied).contiguous(), view(teacher).contiguous())
        expected.backward()
        assert torch.equal(loss, expected)
        assert torch.equal(student.grad, copied.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_overwrite_puts_the_gradient_into_the_logits(dtype, backend):
    student, teacher = logits(4, 6, 50, dtype=dtype), logits(4, 6, 50, dtype=dtype)
    for view in (lambda x: x, lambda x: x[:, :-1]):
        _, expected = loss_and_gradient(view(student), view(teacher))
        leaf = student.clone().requires_grad_()
        # The last thing a model does: what it returns is not needed for its own backward pass.
        produced = leaf * 1.0
        received = []
        viewed = view(produced)
        viewed.register_hook(received.append)
        kdfast.kd_loss(viewed, view(teacher), overwrite_student_logits=True).backward()
        assert received[0].data_ptr() == viewed.data_ptr()
        assert torch.equal(received[0], expected)
        assert torch.equal(view(leaf.grad), expected)


def test_overwrite_leaves_the_logits_alone_without_a_gradient(backend):
    student, teacher = logits(4, 50), logits(4, 50)
    before = student.clone()
    kdfast.kd_loss(student, teacher, overwrite_student_logits=True)
    with torch.no_grad():
        kdfast.kd_loss(student.requires_grad_(), teacher, overwrite_student_logits=True)
    assert torch.equal(student, before)


def test_overwrite_is_seen_by_whoever_saved_the_logits():
    leaf, teacher = logits(4, 50).requires_grad_(), logits(4, 50)
    produced = leaf.tanh()
    loss = kdfast.kd_loss(produced, teacher, overwrite_student_logits=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.skipif("cpp" not in BACKENDS, reason="plain PyTorch builds the temporaries")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", ["whole", "shifted"])
def test_a_training_step_adds_the_gradient_and_nothing_else(dtype, view):
    teacher = torch.randn(4, 64, 50257).to(dtype)
    student = teacher.roll(1, 0).clone().requires_grad_()
    labels = torch.randint(50257, (4, 64))
    shift = slice(None, -1) if view == "shifted" else slice(None)

    def step(overwrite=False):
        logits = student.detach()[:, shift].requires_grad_()
        options = {"temperature": 2.0, "alpha": 0.5, "overwrite_student_logits": overwrite}
        loss = kdfast.kd_loss(logits, teacher[:, shift], labels[:, shift], **options)
        # Not into a leaf, where autograd copies a gradient whose strides are not those of the leaf.
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.shape == logits.shape

    step()
    size = student[:, shift].numel() * student.element_size()
    # Two threads' rows of exponentials, and what the allocator rounds up to.
    slack = 6 * 2**20
    assert peak_bytes(step) < size + slack
    assert peak_bytes(lambda: step(overwrite=True)) < slack


def test_same_bits_every_run():
    student, teacher = logits(33, 20011), logits(33, 20011)
    first = loss_and_gradient(student, teacher, divergence="jsd", temperature=2.0)
    for _ in range(3):
        again = loss_and_gradient(student, teacher, divergence="jsd", temperature=2.0)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


# Extremes.


@pytest.mark.parametrize("temperature", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_huge_logits(divergence, temperature):
    student, teacher = logits(4, 3000), logits(4, 3000)
    student[:, ::7], teacher[:, ::5] = 1e4, -1e4
    student[1, 5], teacher[2, 6] = -1e4, 1e4
    options = {"divergence": divergence, "temperature": temperature}
    loss, gradient = loss_and_gradient(student, teacher, **options)
    expected, expected_gradient = oracle(student, teacher, **options)
    assert_loss_close(loss, expected, torch.float32)
    # Where p and q have no entry in common the exact gradient is a number that float32 cannot hold.
    assert (gradient - expected_gradient).norm() <= 2e-6 * expected_gradient.norm() + 1e-12


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "skew_forward_kl", "tvd"])
def test_teacher_minus_infinity_contributes_nothing(divergence, backend):
    student, teacher = logits(4, 5000), logits(4, 5000)
    # A whole chunk, the first, and scattered entries.
    teacher[:, :2500], teacher[1, ::3] = -math.inf, -math.inf
    loss, gradient = loss_and_gradient(student, teacher, divergence=divergence)
    expected, expected_gradient = oracle(student, teacher, divergence=divergence)
    assert loss.isfinite()
    assert_loss_close(loss, expected, torch.float32)
    assert_gradient_close(gradient, expected_gradient)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_minus_infinity_on_both_sides_is_a_smaller_vocabulary(divergence, backend):
    student, teacher = logits(4, 5000), logits(4, 5000)
    student[:, :2500], teacher[:, :2500] = -math.inf, -math.inf
    loss, gradient = loss_and_gradient(student, teacher, divergence=divergence)
    expected, expected_gradient = loss_and_gradient(
        student[:, 2500:], teacher[:, 2500:], divergence=divergence
    )
    assert_loss_close(loss, expected, torch.float32)
    assert_gradient_close(gradient[:, 2500:], expected_gradient.double())
    assert (gradient[:, :2500] == 0).all()


@pytest.mark.parametrize("position", [0, 2047, 2048, 4999])
def test_student_minus_infinity_where_the_teacher_is_not(position, backend):
    student, teacher = logits(3, 5000), logits(3, 5000)
    student[1, position] = -math.inf
    each = kdfast.kd_loss(student, teacher, reduction="none")
    assert each[1] == math.inf
    assert each[[0, 2]].isfinite().all()
    _, gradient = loss_and_gradient(student, teacher)
    assert gradient.isfinite().all()


def test_student_minus_infinity_where_the_teacher_has_vanished(backend):
    # exp(-1000) is 0: what the student thinks of that entry does not count.
    student, teacher = logits(1, 5000), logits(1, 5000)
    student[0, 3], teacher[0, 3], teacher[0, 4000] = -math.inf, -900.0, 100.0
    assert kdfast.kd_loss(student, teacher).isfinite()


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nan_stays_in_its_row(divergence, side, backend):
    student, teacher, labels = logits(3, 5000), logits(3, 5000), torch.randint(5000, (3,))
    clean = [0, 2]
    options = {"divergence": divergence, "reduction": "none", "alpha": 0.5}
    ones = torch.ones(3)
    expected = loss_and_gradient(student, teacher, labels, incoming=ones, **options)
    (student if side == "student" else teacher)[1, 2600] = math.nan
    each, gradient = loss_and_gradient(student, teacher, labels, incoming=ones, **options)
    assert each[1].isnan()
    assert torch.equal(each[clean], expected[0][clean])
    assert torch.equal(gradient[clean], expected[1][clean])


# Autograd.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("retain", [False, True])
def test_incoming_gradient(dtype, retain, backend):
    student, teacher = logits(5, 3000, dtype=dtype), logits(5, 3000, dtype=dtype)
    _, expected = oracle(student, teacher)
    for scale in (1.0, 4.0, 0.0):
        leaf = student.clone().requires_grad_()
        kdfast.kd_loss(leaf, teacher).backward(torch.tensor(scale), retain_graph=retain)
        assert_gradient_close(leaf.grad, scale * expected)
    weights = torch.tensor([1.0, 2.0, 0.0, -4.0, 0.5])
    leaf = student.clone().requires_grad_()
    kdfast.kd_loss(leaf, teacher, reduction="none").backward(weights, retain_graph=retain)
    assert_gradient_close(leaf.grad, 5 * weights.to(expected).unsqueeze(-1) * expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_second_backward_through_a_retained_graph(dtype, backend):
    student, teacher = logits(5, 300, dtype=dtype).requires_grad_(), logits(5, 300, dtype=dtype)
    loss = kdfast.kd_loss(student, teacher)
    first, third = (torch.autograd.grad(loss * s, student, retain_graph=True)[0] for s in (1, 3))
    second = torch.autograd.grad(loss, student)[0]
    assert torch.equal(first, second)
    torch.testing.assert_close(third, 3 * first)


def test_a_float16_loss_scale_loses_no_gradient(backend):
    student, teacher = (logits(64, 5000, dtype=torch.float16, scale=0.5) for _ in range(2))
    _, expected = oracle(student, teacher)
    scale = 65536.0
    leaf = student.clone().requires_grad_()
    (kdfast.kd_loss(leaf, teacher) * scale).backward()
    assert_gradient_close(leaf.grad, scale * expected)
    rounded_first = relative_error(expected.half(), expected)
    assert relative_error(leaf.grad, scale * expected) < rounded_first / 10


def test_double_backward_is_refused(backend):
    student, teacher = logits(5, 30).requires_grad_(), logits(5, 30)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(kdfast.kd_loss(student, teacher), student, create_graph=True)


def test_no_gradient_is_computed_that_nobody_wants(monkeypatch):
    student, teacher = logits(5, 30).requires_grad_(), logits(5, 30)
    wanted = []
    rows = reference.kd_loss_rows

    def watched(*args, **options):
        wanted.append(args[7] is not None)
        return rows(*args, **options)

    monkeypatch.setattr(reference, "kd_loss_rows", watched)
    with kdfast.backend("torch"):
        kdfast.kd_loss(student, teacher)
        kdfast.kd_loss(student.detach(), teacher)
        with torch.no_grad():
            kdfast.kd_loss(student, teacher)
        kdfast.kd_loss(student.half(), teacher)
    assert wanted == [True, False, False, False]


def test_checkpointing_and_autocast(backend):
    head = torch.nn.Linear(16, 300)
    hidden, teacher = torch.randn(8, 16), logits(8, 300)

    def loss():
        return kdfast.kd_loss(head(hidden), teacher, temperature=2.0)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = loss()
        recomputed = torch.utils.checkpoint.checkpoint(loss, use_reentrant=False)
    assert plain.dtype == torch.float32
    expected = torch.autograd.grad(plain, head.weight)[0]
    assert torch.equal(torch.autograd.grad(recomputed, head.weight)[0], expected)


# torch.compile and the operator.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_compiles_whole_with_dynamic_shapes(dtype):
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def step(student, teacher, labels, weight):
        options = {"temperature": 2.0, "alpha": 0.3, "token_weight": weight, "return_parts": True}
        total, soft, hard = kdfast.kd_loss(student * 1.0, teacher, labels, **options)
        return 2 * total + 0 * (soft + hard)

    for rows, vocab in ((4, 100), (6, 130), (9, 257)):
        student = logits(rows, vocab, dtype=dtype)
        teacher, labels = logits(rows, vocab, dtype=dtype), torch.randint(vocab, (rows,))
        weight = torch.rand(rows)
        leaf = student.clone().requires_grad_()
        loss = step(leaf, teacher, labels, weight)
        loss.backward()
        options = {"temperature": 2.0, "alpha": 0.3, "token_weight": weight}
        expected, gradient = loss_and_gradient(student, teacher, labels, **options)
        torch.testing.assert_close(loss, 2 * expected)
        torch.testing.assert_close(leaf.grad, 2 * gradient)
        with torch.no_grad():
            torch.testing.assert_close(step(student, teacher, labels, weight), 2 * expected)


def test_compiles_with_a_temperature_that_changes():
    torch.compiler.reset()
    compiled = torch.compile(kdfast.kd_loss, fullgraph=True)
    student, teacher = logits(4, 100), logits(4, 100)
    for temperature in (1.0, 2.0, 3.0, 4.5):
        loss = compiled(student, teacher, temperature=temperature)
        torch.testing.assert_close(loss, kdfast.kd_loss(student, teacher, temperature=temperature))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("need_parts", [False, True])
def test_opcheck(reduction, need_parts):
    student, teacher, labels = logits(3, 4, 20), logits(3, 4, 20), torch.randint(20, (3, 4))
    arguments = (student, teacher, labels, torch.rand(3, 4), torch.rand(3, 4) + 1, None, None, None)
    options = {
        "divergence": "jsd",
        "beta": 0.5,
        "temperature": 1.0,
        "teacher_temperature": 2.0,
        "scale_t2": True,
        "alpha": 0.5,
        "ignore_index": -100,
        "vocab_size": 20,
        "reduction": reduction,
        "need_parts": need_parts,
    }
    for gradient in (torch.empty_like(student), None):
        torch.library.opcheck(
            torch.ops.kdfast.kd_loss_forward.default, (*arguments, gradient), options
        )
    torch.library.opcheck(
        torch.ops.kdfast.scale_gradient_.default, (student.clone(), torch.tensor(2.0))
    )


# The module.


def test_module_is_the_function():
    student, teacher, labels = logits(4, 30), logits(4, 30), torch.randint(30, (4,))
    options = {"divergence": "skew_reverse_kl", "beta": 0.2, "temperature": 2.0, "alpha": 0.3}
    module = kdfast.KDLoss(**options)
    weight = torch.rand(4)
    expected = kdfast.kd_loss(student, teacher, labels, token_weight=weight, num_items=9, **options)
    for face in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        loss = face(student, teacher, labels, token_weight=weight, num_items=9)
        assert torch.equal(loss, expected)
    assert "divergence='skew_reverse_kl'" in repr(module)


def test_module_passes_on_its_settings_and_nothing_else():
    student, teacher = logits(4, 30), logits(4, 30)
    module = kdfast.KDLoss(temperature=2.0)
    module.note = "mine"
    assert module(student, teacher) == kdfast.kd_loss(student, teacher, temperature=2.0)
    module.temperature = torch.nn.Parameter(torch.full((4,), 2.0))
    with pytest.raises(ValueError, match="temperature requires grad"):
        module(student, teacher)

    class Derived(kdfast.KDLoss):
        def __init__(self, name, **settings):
            super().__init__(**settings)
            self.name = name

    derived = Derived("mine", temperature=3.0)
    assert derived(student, teacher) == kdfast.kd_loss(student, teacher, temperature=3.0)


def test_module_knows_every_keyword_of_the_function():
    import inspect

    function = inspect.signature(kdfast.kd_loss).parameters
    settings = inspect.signature(kdfast.KDLoss).parameters
    call = inspect.signature(kdfast.KDLoss.forward).parameters
    assert set(function) == set(settings) | set(call) - {"self"}
    for name, parameter in settings.items():
        assert parameter.default == function[name].default


# Bad input.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student_logits": [1.0]}, TypeError, "student_logits must be a tensor, got list"),
        ({"teacher_logits": torch.zeros(4, 9).long()}, TypeError, "teacher_logits must be one of"),
        ({"teacher_logits": torch.zeros(4, 9, requires_grad=True)}, ValueError, "teacher_logits r"),
        ({"teacher_logits": torch.zeros(5, 9)}, ValueError, "teacher_logits must have .*got .5,."),
        ({"teacher_logits": torch.zeros(4, 8)}, ValueError, "pass vocab_size"),
        ({"teacher_logits": torch.zeros(4, 9, device="meta")}, ValueError, "teacher_logits must"),
        ({"student_logits": torch.zeros(4, 0), "teacher_logits": torch.zeros(4, 0)}, ValueError,
         "vocab_size"),
        ({"student_logits": torch.tensor(1.0)}, ValueError, "vocabulary dimension"),
        ({"vocab_size": 10}, ValueError, "vocab_size must be .* got 10"),
        ({"vocab_size": 0}, ValueError, "vocab_size must be .* got 0"),
        ({"divergence": "kl"}, ValueError, "divergence must be one of .*'kl'"),
        ({"reduction": "batchmean"}, ValueError, "reduction must be one of"),
        ({"beta": 1.5}, ValueError, "beta must be at least 0 and at most 1, got 1.5"),
        ({"alpha": -0.1}, ValueError, "alpha must be at least 0"),
        ({"alpha": 0.5, "labels": None}, ValueError, "labels are needed"),
        ({"labels": torch.zeros(4)}, TypeError, "labels must be one of"),
        ({"labels": torch.zeros(5).long()}, ValueError, "labels must have .*got .5,."),
        ({"labels": torch.tensor([0, 1, 9, 2])}, ValueError, r"labels must be in \[0, 9\).*got 9"),
        ({"labels": torch.tensor([0, 1, -1, 2])}, ValueError, "labels must be in .*got -1"),
        ({"token_weight": torch.zeros(4, 9)}, ValueError, "token_weight must have"),
        ({"temperature": 0}, ValueError, "temperature must be finite and above 0, got 0"),
        ({"temperature": math.nan}, ValueError, "temperature must be"),
        ({"temperature": math.inf}, ValueError, "temperature must be"),
        ({"temperature": "2"}, TypeError, "temperature must be a number, got str"),
        ({"temperature": torch.zeros(4)}, ValueError, "temperature must be finite and above 0 for"),
        ({"temperature": torch.ones(5)}, ValueError, "temperature must have"),
        ({"teacher_temperature": -1.0}, ValueError, "teacher_temperature must be"),
        ({"num_items": -1}, ValueError, "num_items must be"),
        ({"num_items": torch.tensor(-1)}, ValueError, "num_items must be .* got -1"),
        ({"num_items": torch.tensor(float("nan"))}, ValueError, "num_items must be .* got nan"),
        ({"num_items": torch.tensor(True)}, TypeError, "num_items must be a tensor of numbers"),
        ({"ignore_index": None}, TypeError, "ignore_index must be a whole number"),
        ({"scale_t2": "no"}, TypeError, "scale_t2 must be True or False, got str"),
        ({"return_parts": 1}, TypeError, "return_parts must be True or False, got int"),
        ({"vocab_size": 4.0}, TypeError, "vocab_size must be a whole number, got float"),
        ({"student_logits": torch.zeros(12).unfold(0, 9, 1), "overwrite_student_logits": True},
         ValueError, "overwrite_student_logits needs"),
        ({"num_items": torch.ones(2)}, ValueError, "num_items must be a number or a 0-d"),
        ({"num_items": 3, "reduction": "sum"}, ValueError, "num_items is the divisor"),
        ({"student_logits": torch.zeros(9, 4).t(), "overwrite_student_logits": True}, ValueError,
         "overwrite_student_logits needs"),
        ({"student_logits": torch.zeros(9).expand(4, 9), "overwrite_student_logits": True},
         ValueError, "overwrite_student_logits needs"),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(change, error, message):
    arguments = {
        "student_logits": torch.zeros(4, 9),
        "teacher_logits": torch.zeros(4, 9),
        "labels": torch.zeros(4).long(),
        **change,
    }
    with pytest.raises(error, match=message):
        kdfast.kd_loss(**arguments)


# What should hold for every input.


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    vocab=st.integers(1, 4200),
    divergence=st.sampled_from(DIVERGENCES),
    temperature=st.floats(0.05, 50),
    beta=st.floats(0, 1),
    scale=st.floats(0.01, 30),
    seed=st.integers(0, 2**31),
)
def test_divergences_are_divergences(rows, vocab, divergence, temperature, beta, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(2, rows, vocab, generator=generator)).unbind()
    options = {"divergence": divergence, "temperature": temperature, "beta": beta}
    loss, gradient = loss_and_gradient(student, teacher, scale_t2=False, **options)
    assert loss >= -1e-6
    # The soft term does not see a shift of the logits, so its gradient sums to nothing: nothing but
    # the rounding of q · (∂f/∂q − Σ), two terms of the size of the loss.
    assert gradient.sum(-1).abs().max() <= 1e-6 * (1 + loss) / temperature
    same, still = loss_and_gradient(teacher, teacher, scale_t2=False, **options)
    assert abs(same.item()) < 1e-6
    assert still.abs().max() < 1e-5 / temperature
