"""The Triton kernels of the truncated operations in Triton's interpreter, against the specification
in float64."""

import math
import os

import pytest
import torch
from tolerances import GRADIENT, LOSS, relative_error

import kdfast
from kdfast import TruncatedSoftmax, reference
from kdfast.reference import TAIL_DIVERGENCES, TAILS

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs TRITON_INTERPRET=1 from the start of the process, as `make test` sets it",
        allow_module_level=True,
    )

from kdfast.kernels import tuning
from kdfast.kernels.linear_topk_kd_loss import (
    entry_hidden_gradient,
    entry_logits,
    entry_weight_gradient,
)
from kdfast.kernels.topk_kd_loss import topk_kd_loss_rows
from kdfast.kernels.truncated_softmax import truncated_softmax_rows

# The interpreter computes in numpy, which warns where a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IGNORED = -100
FORMS = [(tail, divergence) for tail in TAILS for divergence in TAIL_DIVERGENCES[tail]]
every_form = pytest.mark.parametrize(("tail", "divergence"), FORMS)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks of a few lanes, so that a small vocabulary has an interior, a head and a rest."""
    for table, places in (
        (tuning.TRUNCATED_SOFTMAX, 128),
        (tuning.TOPK_KD_LOSS, 64),
        (tuning.TOPK_KD_LOSS_OF_MANY, 64),
    ):
        for element_size in table:
            launch = {"BLOCK_V": places, "num_warps": 1}
            if table is tuning.TRUNCATED_SOFTMAX:
                launch["STAGES"] = 2
            monkeypatch.setitem(table, element_size, ((math.inf, launch),))


def logits(*shape, dtype=torch.float32, scale=3.0):
    return (torch.randn(*shape) * scale).to(dtype)


def misaligned(values, offset):
    """The same values, starting `offset` elements behind a 16-byte boundary."""
    storage = torch.empty(values.numel() + offset, dtype=values.dtype)
    return storage[offset:].view(values.shape).copy_(values)


# truncated_softmax.


def assert_truncates(scores, k, temperature=1.0, vocab_size=None):
    vocab_size = scores.shape[-1] if vocab_size is None else vocab_size
    log_probs, indices = truncated_softmax_rows(scores, k, temperature, vocab_size=vocab_size)
    per_row = isinstance(temperature, torch.Tensor)
    expected, expected_indices = reference.truncated_softmax_rows(
        scores.double(),
        k,
        temperature.view(scores.shape[:2]) if per_row else temperature,
        vocab_size=vocab_size,
    )
    assert log_probs.dtype == torch.float32
    assert indices.dtype == torch.int64
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(
        log_probs.double(), expected, rtol=LOSS[torch.float32], atol=1e-6, equal_nan=True
    )
    return log_probs, indices


@pytest.mark.parametrize("vocab", [1, 7, 128, 129, 1003])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_truncates(dtype, vocab):
    scores = logits(1, 2, vocab, dtype=dtype)
    for k in sorted({1, min(vocab, 3), min(vocab, 60)}):
        assert_truncates(scores, k, 1.0 if k == 1 else 2.5)


def test_as_many_entries_as_columns_in_blocks_of_the_tuned_size(monkeypatch):
    monkeypatch.undo()
    assert_truncates(logits(1, 1, 300), 300)
    assert_truncates(logits(1, 1, 1500, dtype=torch.bfloat16), 1024)
    assert_truncates(logits(1, 1, 9001), 64)


def test_rows_in_an_order_that_hides_the_largest():
    vocab = 1000
    up = torch.arange(vocab).float() / 30
    rows = torch.stack(
        [
            up,
            up.flip(0),
            # The largest stand together, over the boundary of a block.
            torch.zeros(vocab).index_fill_(0, torch.arange(100, 180), 1.0),
            # They stand in one place of each block; and in a few, so that there are too many.
            up * (torch.arange(vocab) % 128 == 5),
            up * (torch.arange(vocab) % 16 == 5),
            up.remainder(7),
            torch.randperm(vocab) / 30,
        ]
    )
    for k in (1, 30):
        assert_truncates(rows[None], k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("levels", [1, 2, 5])
def test_of_equal_logits_the_lower_index_comes_first(levels, dtype):
    scores = torch.randint(levels, (1, 2, 307)).to(dtype)
    for k in (1, 20):
        assert_truncates(scores, k)
    # Whatever its sign, zero is zero.
    signs = torch.tensor([-0.0, 0.0]).repeat(100).view(1, 1, 200).to(dtype)
    assert_truncates(signs, 5)


@pytest.mark.parametrize("kept", [1, 9, 300])
def test_minus_infinity_is_listed_when_there_is_nothing_else(kept):
    scores = torch.full((1, 2, 500), -math.inf)
    scores[..., torch.randperm(500)[:kept]] = logits(kept)
    for k in (1, 20):
        log_probs, _ = assert_truncates(scores, k)
        assert log_probs.isfinite().sum(-1).tolist() == [[min(k, kept)] * 2]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_without_a_softmax_is_nan(value):
    scores = logits(1, 4, 500)
    scores[0, 1, 333], scores[0, 2] = value, -math.inf
    log_probs, indices = assert_truncates(scores, 70)
    assert log_probs.isnan().all(-1).tolist() == [[False, True, True, False]]
    assert indices[0, 1:3].tolist() == [list(range(70))] * 2


@pytest.mark.parametrize("temperature", [1e-2, 1.0, 1e3])
def test_truncates_huge_logits(temperature):
    scores = logits(1, 3, 500)
    scores[..., ::7], scores[0, 1, 5] = -1e4, 1e4
    assert_truncates(scores, 30, temperature)


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_truncates_rows_of_any_layout(dtype, offset):
    scores = misaligned(logits(2, 4, 333, dtype=dtype), offset)
    scores[..., 330:] = math.nan
    temperature = torch.rand(12)[::2] + 0.5
    assert_truncates(scores[:, 1:], 20, temperature, vocab_size=330)
    assert_truncates(scores.transpose(0, 1)[:, ::2], 20, vocab_size=330)


def test_truncates_no_rows():
    log_probs, indices = truncated_softmax_rows(torch.empty(2, 0, 9), 4, 1.0, vocab_size=9)
    assert log_probs.shape == indices.shape == (2, 0, 4)


# topk_kd_loss.


def truncated(rows, vocab, k, dtype=torch.float32, scale=3.0):
    """A teacher's entries in the order of their columns, as the operator hands them over."""
    log_probs, indices = reference.truncated_softmax_rows(logits(rows, vocab, scale=scale), k)
    indices, order = indices.sort(-1)
    return log_probs.gather(-1, order).to(dtype), indices


def swept(
    student,
    teacher,
    labels=None,
    weight=None,
    temperature=1.0,
    grad_scale=None,
    gradient=None,
    **options,
):
    """Losses and gradient of the kernel, and the same of the specification in float64."""
    options = {
        "tail": "bucket",
        "divergence": "forward_kl",
        "beta": 0.3,
        "scale_t2": True,
        "alpha": 1.0,
        "ignore_index": IGNORED,
        "vocab_size": student.shape[-1],
        "need_hard": True,
        "smallest_bucket": torch.finfo(torch.float32).eps,
        **options,
    }
    log_probs, indices = teacher
    per_row = (labels, weight, temperature, grad_scale)
    leading = student.shape[:2]

    def shaped(value):
        single = not isinstance(value, torch.Tensor) or value.numel() == 1 != leading.numel()
        return value if single else value.view(leading)

    expected_gradient = torch.empty(student.shape, dtype=torch.float64)
    expected = reference.topk_kd_loss_rows(
        student.double(),
        log_probs.double().view(*leading, -1),
        indices.view(*leading, -1),
        *map(shaped, per_row),
        expected_gradient,
        **options,
    ).flatten(1)
    if gradient is None:
        gradient = torch.full(student.shape, math.nan, dtype=torch.float32)
    losses = topk_kd_loss_rows(student, *teacher, *per_row, gradient, **options)
    assert losses.shape == (3, leading.numel())
    assert losses.dtype == torch.float32
    return losses, gradient, expected, expected_gradient


def assert_swept(*args, atol=2e-7, **kwargs):
    losses, gradient, expected, expected_gradient = swept(*args, **kwargs)
    torch.testing.assert_close(
        losses.double(), expected, rtol=LOSS[torch.float32], atol=atol, equal_nan=True
    )
    if expected_gradient.norm() < 1e-7:
        assert gradient.norm() < 1e-7
    else:
        assert relative_error(gradient, expected_gradient) <= GRADIENT[torch.float32]
    return losses, gradient


@pytest.mark.parametrize(("vocab", "k"), [(7, 3), (64, 64), (203, 20)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_form
def test_matches_reference(tail, divergence, dtype, vocab, k):
    student, teacher = logits(1, 3, vocab, dtype=dtype), truncated(3, vocab, k)
    labels = torch.randint(vocab, (3,))
    # On the support.
    labels[1] = teacher[1][1, 0]
    options = {"tail": tail, "divergence": divergence}
    assert_swept(student, teacher, labels, alpha=0.4, **options)
    assert_swept(student, teacher, None, None, 2.5, **options)


def test_a_vocabulary_of_one():
    student, teacher = logits(1, 3, 1), (torch.zeros(3, 1), torch.zeros(3, 1, dtype=torch.long))
    for tail, divergence in FORMS:
        losses, gradient, *_ = swept(
            student, teacher, torch.zeros(3).long(), tail=tail, divergence=divergence, alpha=0.5
        )
        assert (losses == 0).all()
        assert (gradient == 0).all()


@pytest.mark.parametrize(("vocab", "k"), [(5000, 64), (3001, 300)])
def test_precision_in_blocks_of_the_tuned_size(vocab, k, monkeypatch):
    monkeypatch.undo()
    student, teacher = logits(1, 2, vocab), truncated(2, vocab, k)
    for tail, divergence in FORMS:
        assert_swept(student, teacher, tail=tail, divergence=divergence)


@every_form
def test_a_support_that_stands_together(tail, divergence):
    """Whole vectors of it, the head and the last columns, in rows that start anywhere."""
    columns = torch.cat([torch.arange(19), torch.arange(60, 70), torch.arange(195, 203)])
    teacher = logits(3, 37).log_softmax(-1) - 0.1, columns.expand(3, 37)
    labels = torch.tensor([0, 64, 100])
    options = {"tail": tail, "divergence": divergence, "alpha": 0.5}
    for dtype in (torch.float32, torch.bfloat16):
        student = misaligned(logits(1, 3, 203, dtype=dtype), 3)
        assert_swept(student, teacher, labels, None, 2.0, **options)


@pytest.mark.parametrize("left", [1e-2, 1e-5, 1e-8, 1e-12])
def test_a_student_who_is_sure_of_the_support_loses_no_digits(left):
    # q has `left` off the support: as 1 − Σq it would be lost in float32.
    student, teacher = logits(1, 3, 300), truncated(3, 300, 10)
    listed = torch.zeros(1, 3, 300, dtype=torch.bool).scatter(-1, teacher[1][None], True)
    student -= torch.where(listed, student, -math.inf).logsumexp(-1, True)
    outside = torch.where(listed, -math.inf, student).logsumexp(-1, True)
    student = torch.where(listed, student, student - outside + math.log(left))
    for divergence in TAIL_DIVERGENCES["bucket"]:
        losses, gradient, expected, expected_gradient = swept(
            student, teacher, divergence=divergence
        )
        assert relative_error(losses, expected) < LOSS[torch.float32]
        off = gradient[~listed], expected_gradient[~listed]
        assert relative_error(*off) < GRADIENT[torch.float32]


@pytest.mark.parametrize("left", [1e-2, 1e-5, 1e-9])
@pytest.mark.parametrize("k", [1, 20])
def test_a_teacher_who_is_sure_of_the_support_keeps_its_bucket(k, left):
    log_probs = logits(3, k).double().log_softmax(-1) + math.log1p(-left)
    teacher = log_probs, torch.arange(k).expand(3, k)
    for divergence in TAIL_DIVERGENCES["bucket"]:
        assert_swept(logits(1, 3, 130), teacher, divergence=divergence)


@pytest.mark.parametrize("excess", [1e-7, 0.5])
@pytest.mark.parametrize("divergence", TAIL_DIVERGENCES["bucket"])
def test_a_teacher_without_a_bucket(divergence, excess):
    log_probs = logits(3, 20).double().log_softmax(-1) + math.log1p(excess)
    teacher = log_probs, torch.arange(20).expand(3, 20)
    for smallest in (1e-7, 1e-3):
        losses, _ = assert_swept(
            logits(1, 3, 130), teacher, divergence=divergence, smallest_bucket=smallest
        )
        assert losses.isfinite().all()


def test_a_support_of_all_columns_has_no_bucket():
    # 1 − Σp is some 1e-8 here, against which the student has nothing.
    teacher = truncated(30, 9, 9)
    assert (teacher[0].double().logsumexp(-1) < -1e-9).any()
    for divergence in TAIL_DIVERGENCES["bucket"]:
        losses, _ = assert_swept(logits(1, 30, 9), teacher, divergence=divergence)
        assert losses.isfinite().all()


@every_form
def test_padding_entries_do_not_exist(tail, divergence):
    student, (log_probs, indices) = logits(1, 3, 130), truncated(3, 130, 6)
    padding = torch.tensor([math.nan, -math.inf, 5.0]).expand(3, 3)
    padded = torch.cat([padding, log_probs], -1), torch.cat([torch.full((3, 3), -1), indices], -1)
    options = {"tail": tail, "divergence": divergence}
    losses, gradient = assert_swept(student, padded, **options)
    expected = assert_swept(student, (log_probs, indices), **options)
    torch.testing.assert_close(losses, expected[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tail", TAILS)
def test_a_token_without_entries(tail):
    teacher = torch.full((2, 3), -math.inf), torch.full((2, 3), -1)
    losses, gradient, expected, _ = swept(logits(1, 2, 130), teacher, tail=tail)
    torch.testing.assert_close(losses.double(), expected, equal_nan=True, rtol=0, atol=1e-7)
    assert losses[1].isnan().all() == (tail in ("renormalize", "support"))
    if tail in ("bucket", "none"):
        assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("teacher_dtype", [*DTYPES, torch.float64], ids=str)
def test_precisions_of_the_teacher(teacher_dtype):
    log_probs, indices = truncated(3, 130, 20, dtype=teacher_dtype)
    assert_swept(logits(1, 3, 130), (log_probs, indices.int()), divergence="jsd")


def test_an_index_outside_the_vocabulary_makes_its_row_nan():
    # Where the specification would raise.
    (log_probs, indices), gradient = truncated(3, 130, 5), torch.zeros(1, 3, 140)
    indices[1, 4] = 130
    for tail in TAILS:
        losses = topk_kd_loss_rows(
            logits(1, 3, 140), log_probs, indices, None, None, 1.0, None, gradient,
            tail=tail, divergence="forward_kl", beta=0.5, scale_t2=True, alpha=1.0,
            ignore_index=IGNORED, vocab_size=130, need_hard=False, smallest_bucket=1e-7,
        )  # fmt: skip
        assert losses[0].isnan().tolist() == [False, True, False]
        assert gradient[:, [0, 2]].isfinite().all()
        assert (gradient[..., 130:] == 0).all()


# Layouts.


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(("dtype", "offsets"), [
    (torch.float32, (1, 1)), (torch.float32, (0, 3)), (torch.bfloat16, (3, 3)),
    (torch.bfloat16, (0, 5)), (torch.bfloat16, (7, 0)),
])  # fmt: skip
def test_any_alignment(dtype, offsets, tail):
    for vocab in (5, 131):
        student, gradient = (
            misaligned(logits(2, 2, vocab, dtype=d), offset)
            for d, offset in zip((dtype, torch.float32), offsets, strict=True)
        )
        gradient.fill_(math.nan)
        teacher, labels = truncated(4, vocab, 5), torch.randint(vocab, (4,))
        assert_swept(student, teacher, labels, gradient=gradient, tail=tail, alpha=0.5)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_with_strides(dtype, tail):
    student = logits(2, 3, 131, dtype=dtype)
    for view in (student[:, :-1], student.transpose(0, 1)[:, ::2], student[:1, :, :70]):
        rows, vocab = view.shape[:2].numel(), view.shape[-1]
        assert_swept(view, truncated(rows, vocab, 9), torch.randint(vocab, (rows,)), tail=tail)


@every_form
def test_gradient_in_place_of_the_student(tail, divergence):
    student, teacher = logits(2, 3, 133)[:, :-1], truncated(4, 131, 9)
    labels = torch.tensor([0, IGNORED, 5, 130])
    for alpha in (0.5, 1.0):
        options = {
            "tail": tail, "divergence": divergence, "alpha": alpha, "vocab_size": 131,
            "need_hard": False,
        }  # fmt: skip
        rows = student.clone()
        losses, gradient, *_ = swept(rows, teacher, labels, None, 2.0, **options)
        # The specification reads the logits before the kernel takes their place.
        in_place, same, *_ = swept(rows, teacher, labels, None, 2.0, gradient=rows, **options)
        assert torch.equal(in_place, losses)
        assert torch.equal(same, gradient)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocab", "padding"), [(64, 7), (131, 9), (5, 70)])
def test_padding_columns_do_not_exist(vocab, padding, dtype):
    student, teacher = logits(1, 3, vocab + padding, dtype=dtype), truncated(3, vocab, 5)
    student[..., vocab:] = math.nan
    labels = torch.tensor([0, IGNORED, vocab - 1])
    for tail in TAILS:
        _, gradient = assert_swept(student, teacher, labels, tail=tail, alpha=0.5, vocab_size=vocab)
        assert (gradient[..., vocab:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_rounded_once(dtype):
    student, teacher = logits(1, 2, 130, dtype=dtype), truncated(2, 130, 9)
    _, exact, *_ = swept(student, teacher)
    _, rounded, *_ = swept(student, teacher, gradient=torch.empty_like(student))
    # The interpreter truncates to bfloat16, where a GPU rounds to nearest.
    steps = 2 if dtype == torch.bfloat16 else 1
    bound = steps * relative_error(exact.to(dtype), exact) + 1e-7
    assert relative_error(rounded, exact) <= bound


def test_no_rows():
    teacher = torch.empty(0, 4), torch.empty(0, 4, dtype=torch.long)
    losses = topk_kd_loss_rows(
        torch.empty(2, 0, 9), *teacher, None, None, 1.0, None, torch.empty(2, 0, 9),
        tail="bucket", divergence="jsd", beta=0.5, scale_t2=True, alpha=1.0,
        ignore_index=IGNORED, vocab_size=9, need_hard=False, smallest_bucket=1e-7,
    )  # fmt: skip
    assert losses.shape == (3, 0)


# What varies by token.


@every_form
def test_per_token_temperature_weight_and_scale(tail, divergence):
    student, teacher = logits(2, 3, 131), truncated(6, 131, 9)
    labels = torch.tensor([0, 130, IGNORED, 7, 64, IGNORED], dtype=torch.int32)
    assert_swept(
        student, teacher, labels, torch.rand(6, dtype=torch.float64), torch.rand(12)[::2] + 0.5,
        torch.randn(6), tail=tail, divergence=divergence, alpha=0.3, scale_t2=False,
    )  # fmt: skip
    assert_swept(student, teacher, grad_scale=torch.tensor([4.0]), tail=tail, divergence=divergence)


@pytest.mark.parametrize("tail", TAILS)
def test_ignored_rows_are_not_looked_at(tail):
    student, (log_probs, indices) = logits(1, 3, 131), truncated(3, 131, 9)
    student[:, 1], log_probs[1], indices[1] = math.nan, math.nan, 10**6
    labels, weight = torch.tensor([2, IGNORED, 3]), torch.tensor([1.0, math.nan, 1.0])
    for alpha in (0.5, 1.0):
        losses, gradient = assert_swept(
            student, (log_probs, indices), labels, weight, tail=tail, alpha=alpha, need_hard=False
        )
        assert (losses[:, 1] == 0).all()
        assert (gradient[:, 1] == 0).all()


@pytest.mark.parametrize("tail", TAILS)
def test_a_share_of_zero_ignores_an_infinite_term(tail):
    student, teacher = logits(1, 2, 31), truncated(2, 31, 4)
    student[0].scatter_(-1, teacher[1][:, :1], -math.inf)
    labels = teacher[1][:, 1]
    losses, gradient, expected, expected_gradient = swept(
        student, teacher, labels, tail=tail, alpha=0.0
    )
    assert (losses[1] == math.inf).all()
    torch.testing.assert_close(losses[0].double(), expected[0], rtol=1e-6, atol=0)
    assert relative_error(gradient, expected_gradient) < GRADIENT[torch.float32]


# Extremes.


@pytest.mark.parametrize("temperature", [1e-2, 1.0, 1e3])
@every_form
def test_huge_logits(tail, divergence, temperature):
    student, scores = logits(1, 4, 150), logits(4, 150)
    student[..., ::7], scores[:, ::5] = 1e4, -1e4
    student[0, 1, 5], scores[2, 6] = -1e4, 1e4
    log_probs, indices = reference.truncated_softmax_rows(scores, 30, temperature)
    indices, order = indices.sort(-1)
    losses, gradient, expected, expected_gradient = swept(
        student, (log_probs.gather(-1, order), indices), None, None, temperature,
        tail=tail, divergence=divergence,
    )  # fmt: skip
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6 * temperature**2)
    # Where p and q have no entry in common the exact gradient is a number that float32 cannot hold.
    assert (gradient - expected_gradient).norm() <= 2e-6 * expected_gradient.norm() + 1e-12


@pytest.mark.parametrize("where", ["one of the support", "the support", "the rest", "everything"])
@every_form
def test_student_without_probability(tail, divergence, where):
    student, teacher = logits(1, 3, 131), truncated(3, 131, 9)
    listed = torch.zeros(131, dtype=torch.bool).scatter(0, teacher[1][1], True)
    gone = {
        "one of the support": torch.arange(131) == teacher[1][1, 4],
        "the support": listed,
        "the rest": ~listed,
        "everything": torch.ones(131, dtype=torch.bool),
    }[where]
    student[0, 1, gone] = -math.inf
    losses, gradient, expected, expected_gradient = swept(
        student, teacher, tail=tail, divergence=divergence
    )
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-7, equal_nan=True)
    assert torch.equal(gradient.isnan().any(-1), expected[1].isnan().view(1, 3))
    finite = ~expected[1].isnan()
    assert relative_error(gradient[0, finite], expected_gradient[0, finite]) < 2e-6


@every_form
def test_a_listed_log_prob_of_minus_infinity(tail, divergence):
    student, (log_probs, indices) = logits(1, 3, 131), truncated(3, 131, 9)
    log_probs[1, 2] = -math.inf
    losses, gradient, expected, expected_gradient = swept(
        student, (log_probs, indices), tail=tail, divergence=divergence
    )
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-7)
    if divergence == "reverse_kl":
        assert losses[1, 1] == math.inf
    else:
        assert relative_error(gradient, expected_gradient) < GRADIENT[torch.float32]


@every_form
def test_nan_stays_in_its_row(tail, divergence):
    student, (log_probs, indices) = logits(1, 4, 131), truncated(4, 131, 9)
    student[0, 1, indices[1, 3]], log_probs[2, 3] = math.nan, math.nan
    if tail != "support":
        student[0, 3, indices[3, 0] - 1 if indices[3, 0] else 130] = math.nan
    losses, gradient, *_ = swept(student, (log_probs, indices), tail=tail, divergence=divergence)
    rows = [False, True, True, tail != "support"]
    assert losses[1].isnan().tolist() == rows
    assert gradient.isnan().any(-1).tolist() == [rows]


@pytest.mark.parametrize("divergence", TAIL_DIVERGENCES["support"])
def test_the_support_alone_does_not_look_elsewhere(divergence):
    student, teacher = logits(1, 3, 131), truncated(3, 131, 9)
    options = {"tail": "support", "divergence": divergence, "need_hard": False}
    losses, gradient, *_ = swept(student, teacher, **options)
    listed = torch.zeros(1, 3, 131, dtype=torch.bool).scatter(-1, teacher[1][None], True)
    student[~listed] = math.nan
    again, same, *_ = swept(student, teacher, **options)
    assert torch.equal(again, losses)
    assert torch.equal(same, gradient)


def test_same_bits_every_run():
    student, teacher, labels = logits(1, 3, 300), truncated(3, 300, 20), torch.tensor([1, 2, 3])
    first, second = (swept(student, teacher, labels, divergence="jsd", alpha=0.5) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


# Products with entries.


def products(rows=7, vocab=40, k=5, width=300, dtype=torch.float32):
    """Wider than a block, with an index that is nobody's."""
    indices = torch.rand(rows, vocab).argsort(-1)[:, :k]
    indices[0, 1] = -1
    wide = logits(vocab, width + 3, dtype=dtype)
    return logits(rows, width, dtype=dtype), wide[:, :width], indices


@pytest.mark.parametrize("width", [1, 256, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 5, 33])
def test_entry_logits_and_hidden_gradient(k, dtype, width):
    hidden, weight, indices = products(k=max(k, 2), width=width, dtype=dtype)
    listed = indices >= 0
    gathered = weight.double()[indices.clamp_min(0)] * listed.unsqueeze(-1)
    result = entry_logits(hidden, weight, indices)
    assert result.dtype == torch.float32
    expected = torch.einsum("rh,rjh->rj", hidden.double(), gathered)
    assert relative_error(result, expected) < LOSS[torch.float32]
    assert result[0, 1] == 0

    gradient = torch.where(listed, torch.randn(indices.shape), math.nan)
    out = torch.full((7, width + 1), math.nan)[:, :width]
    entry_hidden_gradient(gradient, weight, indices, out)
    expected = torch.einsum("rj,rjh->rh", gradient.double().nan_to_num(), gathered)
    assert relative_error(out, expected) < LOSS[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entry_weight_gradient(dtype):
    hidden, _, indices = products(rows=50, vocab=11, k=5, dtype=dtype)
    # Segments longer than a block, one of them empty; entries of nobody stand in front of all.
    indices = torch.where(indices == 3, 4, indices)
    gradient = torch.where(indices >= 0, torch.randn(indices.shape), math.nan)
    columns, order = indices.flatten().sort(stable=True)
    offsets = torch.searchsorted(columns, torch.arange(12))
    out = torch.full((11, 300), math.nan)
    entry_weight_gradient(gradient, hidden, order, offsets, out)
    expected = torch.zeros(11, 300, dtype=torch.float64)
    listed = indices >= 0
    terms = gradient.double().unsqueeze(-1) * hidden.double().unsqueeze(1)
    expected.index_add_(0, indices[listed], terms[listed])
    assert relative_error(out, expected) < LOSS[torch.float32]
    assert offsets.diff().max() > tuning.ENTRY_PRODUCTS["BLOCK_K"]
    assert (out[3] == 0).all()


def test_products_of_nothing():
    hidden, weight, indices = products()
    assert entry_logits(hidden[:0], weight, indices[:0]).shape == (0, 5)
    entry_hidden_gradient(torch.empty(0, 5), weight, indices[:0], torch.empty(0, 300))
    nothing, offsets = torch.empty(0, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    entry_weight_gradient(torch.empty(0, 5), hidden[:0], nothing, offsets, torch.empty(0, 300))


# Through the public functions.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_public_functions(reduction, dtype):
    student, scores = logits(2, 4, 131, dtype=dtype), logits(2, 4, 131, dtype=dtype)
    labels = torch.randint(131, (2, 4))
    labels[0, 1] = IGNORED

    def run(backend):
        leaf = student.clone().requires_grad_()
        with kdfast.backend(backend):
            teacher = kdfast.truncated_softmax(scores[:, :-1], 9, temperature=2.0)
            loss = kdfast.topk_kd_loss(
                leaf[:, :-1], teacher, labels[:, 1:],
                divergence="jsd", alpha=0.5, temperature=2.0, reduction=reduction,
            )  # fmt: skip
            (2 * loss.sum()).backward()
        return *teacher, loss.detach(), leaf.grad

    log_probs, indices, loss, gradient = run("triton")
    expected_log_probs, expected_indices, expected, expected_gradient = run("torch")
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(log_probs, expected_log_probs, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(loss, expected, rtol=3e-6, atol=3e-7)
    # Both round, and the interpreter truncates to bfloat16.
    allowed = {torch.float32: 4e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    assert relative_error(gradient, expected_gradient) < allowed


@pytest.mark.parametrize("tail", TAILS)
def test_overwriting_the_students_logits(tail):
    leaf, scores = logits(3, 131).requires_grad_(), logits(3, 131)
    expected = leaf.detach().clone().requires_grad_()
    with kdfast.backend("triton"):
        teacher = kdfast.truncated_softmax(scores, 9)
        kdfast.topk_kd_loss(expected, teacher, tail=tail).backward()
        kdfast.topk_kd_loss(
            leaf * 1.0, teacher, tail=tail, overwrite_student_logits=True
        ).backward()
    assert torch.equal(leaf.grad, expected.grad)


def test_more_entries_than_the_kernels_serve(monkeypatch):
    monkeypatch.setattr("kdfast.kernels.truncated_softmax.MOST_ENTRIES", 8)
    monkeypatch.setattr("kdfast.kernels.topk_kd_loss.MOST_ENTRIES", 8)
    scores, student = logits(3, 131), logits(3, 131)
    results = []
    for backend in ("triton", "torch"):
        with kdfast.backend(backend):
            teacher = kdfast.truncated_softmax(scores, 9)
            results.append((*teacher, kdfast.topk_kd_loss(student, TruncatedSoftmax(*teacher))))
    assert all(map(torch.equal, *results))
