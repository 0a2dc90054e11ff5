"""kd_loss against what people write by hand and against other libraries' losses on dense logits.

A round is a training step: the loss and its gradient, with the student's logits a leaf whose `grad`
is set to None before the round, untimed, as an optimizer's zero_grad does.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import measure
import torch
from kd_loss_peers import (
    BY_HAND,
    KDFAST,
    OVERWRITING,
    kdfast_members,
    members_of,
    strongest_of,
)
from measure import Trial
from peers import Case, Member
from torch import Tensor

from kdfast import reference

# On these the strongest take part alone: other vocabularies, and logits of more than 2³¹ elements.
FURTHER_SHAPES = (
    (32768, 30522, "bfloat16"),
    (16384, 50257, "bfloat16"),
    (8192, 151936, "bfloat16"),
    (4096, 262144, "bfloat16"),
    (32768, 128256, "bfloat16"),
    (16384, 32000, "float32"),
    (8192, 128256, "float32"),
    (4096, 262144, "float32"),
)
SHAPES = {
    "cpu": (
        (512, 50257, "float32"),
        (512, 50257, "bfloat16"),
        (128, 128256, "bfloat16"),
        (2048, 30522, "float32"),
    ),
    "cuda": (
        (8192, 128256, "bfloat16"),
        (16384, 32000, "bfloat16"),
        (8192, 50257, "float32"),
        *FURTHER_SHAPES,
    ),
}

# The largest relative error that is agreement, by the dtype of the logits. The gradient's is that
# of the whole vector, ‖g − g_ref‖ / ‖g_ref‖; a wrong factor, temperature or divisor makes it 1e-1.
TOLERANCES = {
    # Composed float32 rounds log-probabilities near −12 to 5e-7, and sums 25 million terms.
    "float32": {"loss": 1e-5, "gradient": 1e-5},
    # Half-precision inputs are exact; the gradient is rounded once, by at most half an ulp, and the
    # loss is no half-precision number at all.
    "bfloat16": {"loss": 1e-5, "gradient": 2.0**-9 * 1.01},
    "float16": {"loss": 1e-5, "gradient": 2.0**-12 * 1.01},
}

# float64 temporaries of the reference: about a dozen of this many elements.
REFERENCE_CHUNK = 2**23


@dataclass(frozen=True)
class Problem:
    """The inputs of a case and what float64 makes of them."""

    student: Tensor  # (rows, vocab), a leaf
    original: Tensor  # (rows, vocab), the student's logits once more
    teacher: Tensor  # (rows, vocab)
    labels: Tensor  # (rows,)
    loss: float
    teacher_entropy: float
    gradient: Tensor  # (rows, vocab) float32: rounds by 6e-8, below every tolerance
    copy_rate: float


@measure.one_at_a_time
def problem_of(case: Case) -> Problem:
    generator = torch.Generator(case.device).manual_seed(0)
    like = {"device": case.device, "generator": generator}
    # A standard deviation of 3 is that of trained language models' logits.
    student, teacher = (
        torch.randn(case.rows, case.vocab, **like).mul_(3).to(case.torch_dtype) for _ in range(2)
    )
    labels = torch.randint(case.vocab, (case.rows,), **like)
    loss, entropy, gradient = _solve(case, student, teacher, labels)
    return Problem(
        student=student.clone().requires_grad_(),
        original=student,
        teacher=teacher,
        labels=labels,
        loss=loss,
        teacher_entropy=entropy,
        gradient=gradient,
        copy_rate=measure.copy_bandwidth(case.device, student.nbytes),
    )


def _solve(
    case: Case, student: Tensor, teacher: Tensor, labels: Tensor
) -> tuple[float, float, Tensor]:
    gradient = torch.empty(student.shape, dtype=torch.float32, device=case.device)
    per_row = torch.tensor(1 / case.rows, dtype=torch.float64, device=case.device)
    loss = entropy = 0.0
    for rows in torch.arange(case.rows).split(max(1, REFERENCE_CHUNK // case.vocab)):
        rows = slice(int(rows[0]), int(rows[-1]) + 1)
        s, t = student[rows].double(), teacher[rows].double()
        by_logit = torch.empty_like(s)
        total, _, _ = reference.kd_loss_rows(
            s,
            t,
            labels[rows] if case.alpha < 1 else None,
            temperature=case.temperature,
            divergence=case.divergence,
            beta=case.beta,
            alpha=case.alpha,
            grad_scale=per_row,
            gradient=by_logit,
        )
        loss += total.sum().item() / case.rows
        log_p = (t / case.temperature).log_softmax(-1)
        entropy -= (log_p.exp() * log_p).sum().item() / case.rows
        gradient[rows] = by_logit
    return loss, entropy, gradient


def trial_of(case: Case, member: Member) -> Trial:
    problem = problem_of(case)
    student = problem.student
    loss_of = member.build(case)
    result = None

    def step() -> None:
        nonlocal result
        with torch.set_grad_enabled(case.backward):
            result = loss_of(student, problem.teacher, problem.labels)
        if case.backward and not member.is_ceiling:
            result.backward()

    def reset() -> None:
        nonlocal result
        result = student.grad = None
        if member.overwrites_student:
            student.detach().copy_(problem.original)

    def errors() -> dict[str, float]:
        if member.is_ceiling:
            return {}
        expected = problem.loss
        if member.adds_teacher_entropy:
            expected += case.temperature**2 * problem.teacher_entropy
        found = {"loss": abs(result.item() - expected) / abs(expected)}
        if case.backward:
            found["gradient"] = measure.relative_distance(student.grad, problem.gradient)
        return found

    terms = ("loss", "gradient") if case.backward else ("loss",)
    # Both sets of logits are read, and the gradient is written.
    passes = member.passes or (3 if case.backward else 2)
    in_place = member.overwrites_student or member.is_ceiling
    return Trial(
        step=step,
        reset=reset,
        errors=errors,
        tolerances={}
        if member.is_ceiling
        else {term: TOLERANCES[case.dtype][term] for term in terms},
        bytes_moved=passes * problem.original.nbytes,
        about={**asdict(case), "is_ceiling": member.is_ceiling},
        copy_rate=problem.copy_rate,
        product_rate=measure.product_rate(case.device, case.torch_dtype),
        gradient_bytes=student.nbytes if case.backward and not in_place else 0,
    )


def groups(device: str, shapes: list[tuple]) -> Iterator[tuple[str, str, Case, Member]]:
    """Each group's name, a member's name in it, what is computed and who computes it."""
    for shape in shapes:
        case = Case(*shape, device=device)
        for member in (strongest_of if shape in FURTHER_SHAPES else members_of)(case):
            yield f"kd_loss {case.shape}", member.name, case, member

    case = Case(*shapes[0], device=device)
    for suffix, variant in (
        ("with labels, alpha=0.5", replace(case, alpha=0.5)),
        ("forward alone", replace(case, backward=False)),
    ):
        for member in (*kdfast_members(variant), *BY_HAND):
            yield f"kd_loss {case.shape}, {suffix}", member.name, variant, member
    for member in (KDFAST, OVERWRITING):
        yield f"kd_loss {case.shape}, overwriting", member.name, case, member
    for divergence in reference.DIVERGENCES:
        variant = replace(case, divergence=divergence)
        yield f"kd_loss {case.shape}, divergences", divergence, variant, KDFAST


def test_kd_loss(group: str, name: str, case: Case, member: Member, measured) -> None:
    # Compiled members of one shape must not make those of the next one "dynamic".
    torch.compiler.reset()
    measured(group, name, lambda: trial_of(case, member))
