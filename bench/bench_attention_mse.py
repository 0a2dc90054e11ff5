"""attention_mse against hand-written code and other libraries' losses on maps of scores.

A round is a training step: the loss and the gradients of the student's query and key, leaves whose
`grad` is set to None before the round, untimed. Everybody begins with queries and keys; who works
on maps of scores makes them within the time.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import measure
import torch
from attention_mse_peers import COMPILED, EAGER, KDFAST, METHODS, AttentionCase, members_of
from measure import Trial
from peers import Member
from torch import Tensor

from kdfast import reference

# Batch, heads, tokens, the student's channels of a head, the teacher's.
SHAPES = {
    "cpu": (
        (8, 12, 128, 64, 64, "float32"),
        (8, 12, 512, 64, 64, "float32"),
        (1, 12, 2048, 64, 64, "float32"),
        (1, 12, 4096, 64, 64, "float32"),
        (8, 12, 512, 64, 32, "float32"),
        (8, 12, 512, 64, 64, "bfloat16"),
    ),
    "cuda": (
        (32, 12, 128, 64, 64, "bfloat16"),
        (32, 12, 512, 64, 64, "bfloat16"),
        (8, 12, 2048, 64, 64, "bfloat16"),
        (1, 12, 8192, 64, 64, "bfloat16"),
        (32, 32, 128, 128, 128, "bfloat16"),
        (16, 32, 512, 128, 128, "bfloat16"),
        (4, 32, 2048, 128, 128, "bfloat16"),
        (1, 32, 8192, 128, 128, "bfloat16"),
        (32, 12, 512, 64, 64, "float32"),
        (8, 12, 2048, 64, 64, "float32"),
    ),
}

# The largest relative error that is agreement, by the models' dtype; a gradient's is that of the
# whole tensor. A wrong scale or divisor makes it 1e-1.
#
# Half-precision queries and keys are exact, products and sums are float32, and a gradient is
# rounded once, by at most half an ulp. Rounding the scores costs more.
TOLERANCES = {
    "float32": {"loss": 1e-5, "query gradient": 1e-5, "key gradient": 1e-5},
    "bfloat16": {
        "loss": 1e-5,
        "query gradient": 2.0**-8 * 1.01,
        "key gradient": 2.0**-8 * 1.01,
    },
    "float16": {
        "loss": 1e-5,
        "query gradient": 2.0**-11 * 1.01,
        "key gradient": 2.0**-11 * 1.01,
    },
}


@dataclass(frozen=True)
class Problem:
    """The inputs of a case and what float64 makes of them."""

    student_query: Tensor  # (batch, heads, tokens, width), a leaf
    student_key: Tensor  # a leaf
    teacher_query: Tensor  # (batch, heads, tokens, teacher width)
    teacher_key: Tensor
    mask: Tensor  # (batch, tokens), bool: some of a padded case's last tokens are False
    loss: float
    query_gradient: Tensor  # float64
    key_gradient: Tensor
    copy_rate: float

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (
            self.student_query,
            self.student_key,
            self.teacher_query,
            self.teacher_key,
            self.mask,
        )


@measure.one_at_a_time
def problem_of(case: AttentionCase) -> Problem:
    generator = torch.Generator(case.device).manual_seed(0)
    like = {"device": case.device, "generator": generator}

    def rows(width: int) -> Tensor:
        # As a projection's output is viewed by heads.
        sizes = case.batch, case.tokens, case.heads, width
        return torch.randn(sizes, **like).to(case.torch_dtype).transpose(1, 2)

    student = [rows(case.width) for _ in range(2)]
    teacher = [rows(case.teacher_width) for _ in range(2)]
    real = torch.full((case.batch, 1), case.tokens, device=case.device)
    if case.padded:
        real = torch.randint(1, case.tokens + 1, real.shape, **like)
    mask = torch.arange(case.tokens, device=case.device) < real
    loss, gradients = _solve(case, *student, *teacher, mask)
    return Problem(
        *(leaf.requires_grad_() for leaf in student),
        *teacher,
        mask,
        loss,
        *gradients,
        copy_rate=measure.copy_bandwidth(case.device, student[0].nbytes),
    )


def _solve(case: AttentionCase, *inputs_and_mask: Tensor) -> tuple[float, tuple[Tensor, Tensor]]:
    """By differentiating the specification, a map of float64 scores at a time."""
    *inputs, mask = inputs_and_mask
    gradients = tuple(torch.empty_like(tensor, dtype=torch.float64) for tensor in inputs[:2])
    cells = case.batch * case.heads * case.tokens**2
    if case.causal:
        cells = case.batch * case.heads * case.tokens * (case.tokens + 1) // 2
    loss = 0.0
    for sample in range(case.batch):
        for head in range(case.heads):
            part = slice(sample, sample + 1), slice(head, head + 1)
            tensors = [tensor[part].double() for tensor in inputs]
            student = [tensor.requires_grad_() for tensor in tensors[:2]]
            key_mask = mask[part[0]] if case.padded else None
            squares = reference.attention_mse_sums(*tensors, key_mask, causal=case.causal)
            mean = squares.sum() / cells
            loss += mean.item()
            for gradient, found in zip(gradients, torch.autograd.grad(mean, student), strict=True):
                gradient[part] = found
    return loss, gradients


def trial_of(case: AttentionCase, member: Member) -> Trial:
    problem = problem_of(case)
    student = problem.student_query, problem.student_key
    loss_of = member.build(case)
    result = None

    def step() -> None:
        nonlocal result
        result = loss_of(*problem.inputs)
        result.backward()

    def reset() -> None:
        nonlocal result
        result = None
        for leaf in student:
            leaf.grad = None

    def errors() -> dict[str, float]:
        return {
            "loss": abs(result.item() - problem.loss) / abs(problem.loss),
            "query gradient": measure.relative_distance(student[0].grad, problem.query_gradient),
            "key gradient": measure.relative_distance(student[1].grad, problem.key_gradient),
        }

    gradient_bytes = sum(leaf.nbytes for leaf in student)
    return Trial(
        step=step,
        reset=reset,
        errors=errors,
        tolerances=TOLERANCES[case.dtype],
        bytes_moved=sum(tensor.nbytes for tensor in problem.inputs[:4]) + gradient_bytes,
        about=asdict(case),
        copy_rate=problem.copy_rate,
        product_rate=measure.product_rate(case.device, case.torch_dtype),
        gradient_bytes=gradient_bytes,
    )


def groups(device: str, shapes: list[tuple]) -> Iterator[tuple[str, str, AttentionCase, Member]]:
    """Each group's name, a member's name in it, what is computed and who computes it."""
    cases = [AttentionCase(*sizes, device=device) for sizes in shapes]
    for case in cases:
        for member in members_of(case):
            yield f"attention_mse {case.shape}", member.name, case, member

    # The third is long enough for a causal mask to be work.
    case = replace(cases[:3][-1], causal=True)
    for member in (KDFAST, *METHODS, EAGER, COMPILED):
        yield f"attention_mse {case.shape}, causal", member.name, case, member
    case = replace(cases[0], padded=True)
    for member in members_of(case):
        if member.name not in ("eager", "compile", "textbrewer"):
            yield f"attention_mse {case.shape}, padded", member.name, case, member


def test_attention_mse(
    group: str, name: str, case: AttentionCase, member: Member, measured
) -> None:
    # Compiled members of one shape must not make those of the next one "dynamic".
    torch.compiler.reset()
    measured(group, name, lambda: trial_of(case, member))
