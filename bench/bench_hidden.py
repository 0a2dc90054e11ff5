"""hidden_mse and hidden_cosine against hand-written code and other libraries' losses.

A round is a training step: the loss and the gradients of the student's hidden states and of the
projection, leaves whose `grad` is set to None before the round, untimed. The bound to compare with
is one read of both sides and one write of the gradient, and with a projection the three matrix
products that such a step cannot do without.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import measure
import torch
from hidden_peers import HiddenCase, members_of
from measure import Trial
from peers import Member
from torch import Tensor

from kdfast import reference

# Rows, the student's width, the teacher's. Where they are equal nothing is projected.
SHAPES = {
    "cpu": (
        (8192, 312, 768, "float32"),
        (8192, 768, 768, "float32"),
        (8192, 312, 768, "bfloat16"),
        (8192, 768, 768, "bfloat16"),
    ),
    "cuda": (
        (65536, 312, 768, "bfloat16"),
        (65536, 2048, 4096, "bfloat16"),
        (65536, 4096, 4096, "bfloat16"),
        (65536, 768, 768, "float32"),
    ),
}

# The largest relative error that is agreement, by the models' dtype; a gradient's is that of the
# whole tensor. A wrong divisor makes it 1e-1.
#
# Half-precision states are exact and sums are float32. Two roundings are allowed, each by at most
# half an ulp: of the difference, which a GPU's products take in half precision, and of the result.
# A loss in half precision is rounded by more.
TOLERANCES = {"float32": (1e-5, 1e-5), "bfloat16": (1e-5, 2.0**-8 * 1.01)}
TOLERANCES["float16"] = (1e-5, 2.0**-11 * 1.01)

# float64 temporaries of the reference: half a dozen of this many elements.
REFERENCE_CHUNK = 2**23

# Where there is a mask, the last quarter of every 128 tokens is padding.
SEQUENCE, PADDING = 128, 32


@dataclass(frozen=True)
class Problem:
    """The inputs of a case and what float64 makes of them."""

    leaves: dict[str, Tensor]  # student (rows, width), and with a projection its weight and bias
    teacher: Tensor  # (rows, width)
    mask: Tensor  # (rows,)
    loss: float
    gradients: dict[str, Tensor]  # of the leaves, float64
    copy_rate: float

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        student, *projection = self.leaves.values()
        return student, self.teacher, self.mask, *projection


def _solve(
    case: HiddenCase, leaves: dict[str, Tensor], teacher: Tensor, mask: Tensor
) -> tuple[float, dict[str, Tensor]]:
    """The mean loss and its gradients, by differentiating the specification some rows at a time."""
    specification = getattr(reference, f"{case.operation}_rows")
    counted = int(mask.sum())
    wide = {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}
    loss = 0.0
    for rows in torch.arange(case.rows).split(max(1, REFERENCE_CHUNK // case.teacher_width)):
        rows = slice(int(rows[0]), int(rows[-1]) + 1)
        losses = specification(
            teacher=teacher[rows].double(),
            mask=mask[rows],
            **{**wide, "student": wide["student"][rows]},
        )
        part = losses.sum() / counted
        part.backward()
        loss += part.item()
    return loss, {name: leaf.grad for name, leaf in wide.items()}


@measure.one_at_a_time
def problem_of(case: HiddenCase) -> Problem:
    generator = torch.Generator(case.device).manual_seed(0)

    def normal(*shape: int, deviation: float = 1.0) -> Tensor:
        values = torch.randn(*shape, device=case.device, generator=generator)
        return values.mul_(deviation).to(case.torch_dtype)

    leaves = {"student": normal(case.rows, case.student_width)}
    if case.projected:
        leaves["weight"] = normal(
            case.teacher_width, case.student_width, deviation=case.student_width**-0.5
        )
        leaves["bias"] = normal(case.teacher_width)
    teacher = normal(case.rows, case.teacher_width)
    length = SEQUENCE - PADDING if case.masked else SEQUENCE
    mask = torch.arange(case.rows, device=case.device) % SEQUENCE < length
    loss, gradients = _solve(case, leaves, teacher, mask)
    return Problem(
        leaves={name: leaf.requires_grad_() for name, leaf in leaves.items()},
        teacher=teacher,
        mask=mask,
        loss=loss,
        gradients=gradients,
        copy_rate=measure.copy_bandwidth(case.device, teacher.nbytes),
    )


def trial_of(case: HiddenCase, member: Member) -> Trial:
    problem = problem_of(case)
    leaves = problem.leaves
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
        for leaf in leaves.values():
            leaf.grad = None

    def errors() -> dict[str, float]:
        if member.is_ceiling:
            return {}
        return {
            "loss": abs(result.item() - problem.loss) / abs(problem.loss),
            **{
                f"{name} gradient": measure.relative_distance(leaf.grad, problem.gradients[name])
                for name, leaf in leaves.items()
            },
        }

    of_loss, of_gradient = TOLERANCES[case.dtype]
    tolerances = {"loss": of_loss, **{f"{name} gradient": of_gradient for name in leaves}}
    gradient_bytes = sum(leaf.nbytes for leaf in leaves.values())
    counted = int(problem.mask.sum())
    # Tokens that do not count are not read, and have a gradient all the same.
    teacher_bytes = problem.teacher.nbytes * counted // case.rows
    student_bytes = leaves["student"].nbytes * counted // case.rows
    projection_bytes = gradient_bytes - leaves["student"].nbytes
    products = 3 if case.projected else 0
    return Trial(
        step=step,
        reset=reset,
        errors=errors,
        tolerances={} if member.is_ceiling else tolerances,
        bytes_moved=student_bytes + teacher_bytes + projection_bytes + gradient_bytes,
        about={**asdict(case), "is_ceiling": member.is_ceiling},
        copy_rate=problem.copy_rate,
        product_rate=measure.product_rate(case.device, case.torch_dtype),
        gradient_bytes=gradient_bytes,
        operations=products * 2 * counted * case.student_width * case.teacher_width,
    )


def groups(device: str, shapes: list[tuple]) -> Iterator[tuple[str, str, HiddenCase, Member]]:
    """Each group's name, a member's name in it, what is computed and who computes it."""
    cases = [HiddenCase("hidden_mse", *shape, device) for shape in shapes]
    cosines = [replace(case, operation="hidden_cosine") for case in cases if not case.projected]
    for case in (*cases, replace(cases[0], masked=True), *cosines):
        masked = ", a quarter of it padding" if case.masked else ""
        for member in members_of(case):
            yield f"{case.operation} {case.shape}{masked}", member.name, case, member


def test_hidden(group: str, name: str, case: HiddenCase, member: Member, measured) -> None:
    # Compiled members of one shape must not make those of the next one "dynamic".
    torch.compiler.reset()
    measured(group, name, lambda: trial_of(case, member))
