"""topk_kd_loss against what people write by hand and against other libraries' losses on a teacher
that is cut off after k entries.

A round is a training step: the loss and its gradient, with the student's logits a leaf whose `grad`
is set to None before the round, untimed, as an optimizer's zero_grad does. The bound to compare
with is one read of the logits and one write of the gradient.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import measure
import torch
from bench_kd_loss import TOLERANCES
from measure import Trial
from peers import Member
from topk_kd_loss_peers import COMPILED, EAGER, KDFAST, TopKCase, members_of
from torch import Tensor

from kdfast import reference

# Rows, vocabulary, dtype, entries of the teacher.
SHAPES = {
    "cpu": (
        (512, 50257, "float32", 64),
        (512, 50257, "bfloat16", 64),
    ),
    "cuda": (
        (8192, 128256, "bfloat16", 64),
        (8192, 151936, "bfloat16", 128),
        (4096, 262144, "bfloat16", 64),
        (8192, 50257, "float32", 64),
    ),
}

# float64 temporaries of the reference: about a dozen of this many elements.
REFERENCE_CHUNK = 2**23


@dataclass(frozen=True)
class Problem:
    """The inputs of a case and what float64 makes of them."""

    student: Tensor  # (rows, vocab), a leaf
    original: Tensor  # (rows, vocab), the student's logits once more
    log_probs: Tensor  # (rows, k) float32
    indices: Tensor  # (rows, k)
    labels: Tensor  # (rows,)
    loss: float
    gradient: Tensor  # (rows, vocab) float32: rounds by 6e-8, below every tolerance
    copy_rate: float

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.student, self.log_probs, self.indices, self.labels


def chunks_of(case: TopKCase) -> list[slice]:
    """The rows, as many at a time as a float64 reference has room for."""
    step = max(1, REFERENCE_CHUNK // case.vocab)
    return [slice(start, min(start + step, case.rows)) for start in range(0, case.rows, step)]


def truncated_teacher(case: TopKCase, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Float32 log-probabilities and columns of the k largest, of rows that nobody keeps whole."""
    log_probs, indices = [], []
    for rows in chunks_of(case):
        count = rows.stop - rows.start
        # A standard deviation of 3 is that of trained language models' logits.
        logits = torch.randn(count, case.vocab, device=case.device, generator=generator).mul_(3)
        top = (logits.double() / case.temperature).log_softmax(-1).topk(case.k)
        log_probs.append(top.values.float())
        indices.append(top.indices)
    return torch.cat(log_probs), torch.cat(indices)


def reference_rows(
    case: TopKCase,
    logits: Tensor,
    log_probs: Tensor,
    indices: Tensor,
    labels: Tensor,
    gradient: Tensor,
) -> Tensor:
    """The loss of some rows, summed, of float64 logits; fills the mean's gradient over all rows."""
    indices, order = indices.sort(-1)
    total, _, _ = reference.topk_kd_loss_rows(
        logits,
        log_probs.double().gather(-1, order),
        indices,
        labels if case.alpha < 1 else None,
        temperature=case.temperature,
        tail=case.tail,
        alpha=case.alpha,
        grad_scale=torch.tensor(1 / case.rows, dtype=torch.float64, device=case.device),
        gradient=gradient,
    )
    return total.sum()


@measure.one_at_a_time
def problem_of(case: TopKCase) -> Problem:
    generator = torch.Generator(case.device).manual_seed(0)
    like = {"device": case.device, "generator": generator}
    student = torch.randn(case.rows, case.vocab, **like).mul_(3).to(case.torch_dtype)
    log_probs, indices = truncated_teacher(case, generator)
    labels = torch.randint(case.vocab, (case.rows,), **like)
    gradient = torch.empty(student.shape, dtype=torch.float32, device=case.device)
    loss = 0.0
    for rows in chunks_of(case):
        logits = student[rows].double()
        by_logit = torch.empty_like(logits)
        entries = log_probs[rows], indices[rows], labels[rows]
        loss += reference_rows(case, logits, *entries, by_logit).item() / case.rows
        gradient[rows] = by_logit
    return Problem(
        student=student.clone().requires_grad_(),
        original=student,
        log_probs=log_probs,
        indices=indices,
        labels=labels,
        loss=loss,
        gradient=gradient,
        copy_rate=measure.copy_bandwidth(case.device, student.nbytes),
    )


def trial_of(case: TopKCase, member: Member) -> Trial:
    problem = problem_of(case)
    student = problem.student
    loss_of = member.build(case)
    result = None

    def step() -> None:
        nonlocal result
        result = loss_of(*problem.inputs)
        result.backward()

    def reset() -> None:
        nonlocal result
        result = student.grad = None
        if member.overwrites_student:
            student.detach().copy_(problem.original)

    def errors() -> dict[str, float]:
        return {
            "loss": abs(result.item() - problem.loss) / abs(problem.loss),
            "gradient": measure.relative_distance(student.grad, problem.gradient),
        }

    # A student that is normalised over the support is read nowhere else.
    sweeps = 1 if case.tail == "support" and case.alpha == 1 else 2
    return Trial(
        step=step,
        reset=reset,
        errors=errors,
        tolerances=TOLERANCES[case.dtype],
        # The logits and the teacher's entries are read, and the gradient is written.
        bytes_moved=sweeps * student.nbytes + problem.log_probs.nbytes + problem.indices.nbytes,
        about=asdict(case),
        copy_rate=problem.copy_rate,
        product_rate=measure.product_rate(case.device, case.torch_dtype),
        gradient_bytes=0 if member.overwrites_student else student.nbytes,
    )


def groups(device: str, shapes: list[tuple]) -> Iterator[tuple[str, str, TopKCase, Member]]:
    """Each group's name, a member's name in it, what is computed and who computes it."""
    cases = [TopKCase(*sizes, device=device, k=k) for *sizes, k in shapes]
    for case in (*cases, *(replace(cases[0], tail=tail) for tail in ("none", "support"))):
        for member in members_of(case):
            yield f"topk_kd_loss {case.shape}", member.name, case, member

    case = replace(cases[0], alpha=0.5)
    for member in (KDFAST, EAGER, COMPILED):
        group = f"topk_kd_loss {case.shape}, with labels, alpha={case.alpha}"
        yield group, member.name, case, member


def test_topk_kd_loss(group: str, name: str, case: TopKCase, member: Member, measured) -> None:
    # Compiled members of one shape must not make those of the next one "dynamic".
    torch.compiler.reset()
    measured(group, name, lambda: trial_of(case, member))
