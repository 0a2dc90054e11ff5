"""linear_kd_loss against hand-written code and other libraries' losses from hidden states.

A round is a training step: the loss and the gradients of the student's hidden states and weight,
leaves whose `grad` is set to None before the round, untimed. The bound to compare with is the four
matrix products that such a step cannot do without, into fresh outputs. They are PyTorch's: kdfast
is below them where it has faster ones of its own (docs/performance.md).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import measure
import torch
from linear_kd_loss_peers import (
    COMPILED,
    EAGER,
    KDFAST,
    LIGER,
    PRODUCTS,
    LinearCase,
    members_of,
    strongest_of,
)
from measure import Trial
from peers import Member
from torch import Tensor

from kdfast import reference

# Rows, the student's width, the teacher's, vocabulary. On the further ones the strongest take part
# alone: heads of pairs of 1B and 8B models, 0.5B and 7B, 1B and 4B, two BERTs, and float32.
FURTHER_SHAPES = (
    (8192, 2048, 4096, 128256, "bfloat16"),
    (8192, 896, 3584, 151936, "bfloat16"),
    (4096, 1152, 2560, 262144, "bfloat16"),
    (32768, 384, 768, 30522, "bfloat16"),
    (4096, 1024, 2048, 50257, "float32"),
)
SHAPES = {
    "cpu": (
        (512, 384, 768, 30522, "float32"),
        (1024, 256, 512, 50257, "float32"),
        (512, 384, 768, 30522, "bfloat16"),
    ),
    "cuda": (
        (8192, 4096, 4096, 128256, "bfloat16"),
        *FURTHER_SHAPES,
    ),
}

# The largest relative error that is agreement, by the models' dtype; a gradient's is that of the
# whole vector. A wrong factor, temperature or divisor makes it 1e-1.
#
# Half-precision operands are exact and sums are float32. Two roundings are allowed, each by at most
# half an ulp: of the logits' gradient, which a GPU's products take in half precision, and of the
# result. Rounding the logits themselves, whose ulp grows with their size, costs more.
TOLERANCES = {
    # Logits are sums of hundreds of float32 products, and their gradient is summed over the
    # vocabulary or the rows.
    "float32": {"loss": 1e-5, "hidden gradient": 1e-5, "weight gradient": 1e-5},
    "bfloat16": {
        "loss": 1e-5,
        "hidden gradient": 2.0**-8 * 1.01,
        "weight gradient": 2.0**-8 * 1.01,
    },
    "float16": {
        "loss": 1e-5,
        "hidden gradient": 2.0**-11 * 1.01,
        "weight gradient": 2.0**-11 * 1.01,
    },
}

# float64 temporaries of the reference: about a dozen of this many elements.
REFERENCE_CHUNK = 2**23


@dataclass(frozen=True)
class Problem:
    """The inputs of a case and what float64 makes of them."""

    student_hidden: Tensor  # (rows, student width), a leaf
    student_weight: Tensor  # (vocab, student width), a leaf
    teacher_hidden: Tensor  # (rows, teacher width)
    teacher_weight: Tensor  # (vocab, teacher width)
    labels: Tensor  # (rows,)
    loss: float
    hidden_gradient: Tensor  # (rows, student width) float64
    weight_gradient: Tensor  # (vocab, student width) float64
    copy_rate: float

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (
            self.student_hidden,
            self.student_weight,
            self.teacher_hidden,
            self.teacher_weight,
            self.labels,
        )


@measure.one_at_a_time
def problem_of(case: LinearCase) -> Problem:
    generator = torch.Generator(case.device).manual_seed(0)
    like = {"device": case.device, "generator": generator}

    def head(width: int) -> tuple[Tensor, Tensor]:
        hidden = torch.randn(case.rows, width, **like)
        # A standard deviation of 3 is that of trained language models' logits.
        weight = torch.randn(case.vocab, width, **like).mul_(3 / width**0.5)
        return hidden.to(case.torch_dtype), weight.to(case.torch_dtype)

    student, teacher = head(case.student_width), head(case.teacher_width)
    labels = torch.randint(case.vocab, (case.rows,), **like)
    loss, hidden_gradient, weight_gradient = _solve(case, *student, *teacher, labels)
    return Problem(
        *(leaf.requires_grad_() for leaf in student),
        *teacher,
        labels=labels,
        loss=loss,
        hidden_gradient=hidden_gradient,
        weight_gradient=weight_gradient,
        copy_rate=measure.copy_bandwidth(case.device, student[1].nbytes),
    )


def _solve(
    case: LinearCase,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
) -> tuple[float, Tensor, Tensor]:
    student_weight, teacher_weight = student_weight.double(), teacher_weight.double()
    per_row = torch.tensor(1 / case.rows, dtype=torch.float64, device=case.device)
    loss = 0.0
    hidden_gradient = torch.empty_like(student_hidden, dtype=torch.float64)
    weight_gradient = torch.zeros_like(student_weight)
    for rows in torch.arange(case.rows).split(max(1, REFERENCE_CHUNK // case.vocab)):
        rows = slice(int(rows[0]), int(rows[-1]) + 1)
        hidden = student_hidden[rows].double()
        student_logits = hidden @ student_weight.T
        by_logit = torch.empty_like(student_logits)
        total, _, _ = reference.kd_loss_rows(
            student_logits,
            teacher_hidden[rows].double() @ teacher_weight.T,
            labels[rows] if case.alpha < 1 else None,
            temperature=case.temperature,
            divergence=case.divergence,
            beta=case.beta,
            alpha=case.alpha,
            grad_scale=per_row,
            gradient=by_logit,
        )
        loss += total.sum().item() / case.rows
        hidden_gradient[rows] = by_logit @ student_weight
        weight_gradient.addmm_(by_logit.T, hidden)
    return loss, hidden_gradient, weight_gradient


def trial_of(case: LinearCase, member: Member) -> Trial:
    problem = problem_of(case)
    leaves = problem.student_hidden, problem.student_weight
    compute = member.build(case)
    result = None

    def step() -> None:
        nonlocal result
        result = compute(*problem.inputs)
        if not member.is_ceiling:
            result.backward()

    def reset() -> None:
        nonlocal result
        result = None
        for leaf in leaves:
            leaf.grad = None

    def errors() -> dict[str, float]:
        if member.is_ceiling:
            return {}
        hidden, weight = leaves
        return {
            "loss": abs(result.item() - problem.loss) / abs(problem.loss),
            "hidden gradient": measure.relative_distance(hidden.grad, problem.hidden_gradient),
            "weight gradient": measure.relative_distance(weight.grad, problem.weight_gradient),
        }

    gradient_bytes = sum(leaf.nbytes for leaf in leaves)
    widths = 3 * case.student_width + case.teacher_width
    return Trial(
        step=step,
        reset=reset,
        errors=errors,
        tolerances={} if member.is_ceiling else TOLERANCES[case.dtype],
        # Every input is read, and the gradients are written.
        bytes_moved=sum(tensor.nbytes for tensor in problem.inputs[:4]) + gradient_bytes,
        about={**asdict(case), "is_ceiling": member.is_ceiling},
        copy_rate=problem.copy_rate,
        product_rate=measure.product_rate(case.device, case.torch_dtype),
        gradient_bytes=gradient_bytes,
        # The logits of both models, and the student's two gradients.
        operations=2 * case.rows * case.vocab * widths,
    )


def groups(device: str, shapes: list[tuple]) -> Iterator[tuple[str, str, LinearCase, Member]]:
    """Each group's name, a member's name in it, what is computed and who computes it."""
    cases = [
        LinearCase(
            rows,
            vocab,
            dtype,
            device,
            student_width=student_width,
            teacher_width=teacher_width,
        )
        for rows, student_width, teacher_width, vocab, dtype in shapes
    ]
    for shape, case in zip(shapes, cases, strict=True):
        for member in (strongest_of if shape in FURTHER_SHAPES else members_of)(case):
            yield f"linear_kd_loss {case.shape}", member.name, case, member

    case = replace(cases[0], alpha=0.5)
    for member in (KDFAST, PRODUCTS, EAGER, COMPILED, LIGER):
        group = f"linear_kd_loss {case.shape}, with labels, alpha={case.alpha}"
        yield group, member.name, case, member


def test_linear_kd_loss(group: str, name: str, case: LinearCase, member: Member, measured) -> None:
    # Compiled members of one shape must not make those of the next one "dynamic".
    torch.compiler.reset()
    measured(group, name, lambda: trial_of(case, member))
