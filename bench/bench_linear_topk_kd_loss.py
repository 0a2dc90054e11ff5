"""linear_topk_kd_loss against hand-written code on k rows of the output head, or on all of it.

A round is a training step: the loss and the gradients of the student's hidden states and weight,
leaves whose `grad` is set to None before the round, untimed. With tail="support" a token needs k
rows of the weight; the other tails need the three matrix products that are measured beside them.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import measure
import torch
from bench_linear_kd_loss import TOLERANCES
from bench_topk_kd_loss import chunks_of, reference_rows, truncated_teacher
from linear_topk_kd_loss_peers import LinearTopKCase, members_of
from measure import Trial
from peers import Member
from torch import Tensor

# Rows, the student's width, vocabulary, dtype, entries of the teacher.
SHAPES = {
    "cpu": ((1024, 512, 128256, "float32", 64),),
    "cuda": (
        (8192, 2048, 128256, "bfloat16", 64),
        (8192, 896, 151936, "bfloat16", 64),
    ),
}


@dataclass(frozen=True)
class Problem:
    """The inputs of a case and what float64 makes of them."""

    hidden: Tensor  # (rows, width), a leaf
    weight: Tensor  # (vocab, width), a leaf
    log_probs: Tensor  # (rows, k) float32
    indices: Tensor  # (rows, k)
    labels: Tensor  # (rows,)
    loss: float
    hidden_gradient: Tensor  # (rows, width) float64
    weight_gradient: Tensor  # (vocab, width) float64
    copy_rate: float

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.hidden, self.weight, self.log_probs, self.indices, self.labels


@measure.one_at_a_time
def problem_of(case: LinearTopKCase) -> Problem:
    generator = torch.Generator(case.device).manual_seed(0)
    like = {"device": case.device, "generator": generator}
    hidden = torch.randn(case.rows, case.width, **like).to(case.torch_dtype)
    # A standard deviation of 3 is that of trained language models' logits.
    weight = torch.randn(case.vocab, case.width, **like).mul_(3 / case.width**0.5)
    weight = weight.to(case.torch_dtype)
    log_probs, indices = truncated_teacher(case, generator)
    labels = torch.randint(case.vocab, (case.rows,), **like)

    wide_weight = weight.double()
    hidden_gradient = torch.empty_like(hidden, dtype=torch.float64)
    weight_gradient = torch.zeros_like(wide_weight)
    loss = 0.0
    for rows in chunks_of(case):
        wide_hidden = hidden[rows].double()
        logits = wide_hidden @ wide_weight.T
        by_logit = torch.empty_like(logits)
        entries = log_probs[rows], indices[rows], labels[rows]
        loss += reference_rows(case, logits, *entries, by_logit).item() / case.rows
        hidden_gradient[rows] = by_logit @ wide_weight
        weight_gradient.addmm_(by_logit.T, wide_hidden)
    return Problem(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        log_probs=log_probs,
        indices=indices,
        labels=labels,
        loss=loss,
        hidden_gradient=hidden_gradient,
        weight_gradient=weight_gradient,
        copy_rate=measure.copy_bandwidth(case.device, weight.nbytes),
    )


def trial_of(case: LinearTopKCase, member: Member) -> Trial:
    problem = problem_of(case)
    leaves = problem.hidden, problem.weight
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
        by_weight = weight.grad.to_dense() if weight.grad.is_sparse else weight.grad
        return {
            "loss": abs(result.item() - problem.loss) / abs(problem.loss),
            "hidden gradient": measure.relative_distance(hidden.grad, problem.hidden_gradient),
            "weight gradient": measure.relative_distance(by_weight, problem.weight_gradient),
        }

    needs_support = case.tail == "support"
    # The rows of the weight that some token needs, and the columns of a token's logits.
    touched = problem.indices.unique().numel() if needs_support else case.vocab
    columns = case.k if needs_support else case.vocab
    row_bytes = case.width * problem.weight.itemsize
    # A sparse gradient needs the touched rows and their int64 indices.
    is_sparse = "sparse gradient" in member.name
    weight_gradient_bytes = touched * (row_bytes + 8) if is_sparse else problem.weight.nbytes
    return Trial(
        step=step,
        reset=reset,
        errors=errors,
        tolerances={} if member.is_ceiling else TOLERANCES[case.dtype],
        # Hidden states and weight are read, and their gradients are written. The zeros of a dense
        # gradient are left out: not every result holds them.
        bytes_moved=2 * (case.rows + touched) * row_bytes
        + problem.log_probs.nbytes
        + problem.indices.nbytes,
        about={**asdict(case), "is_ceiling": member.is_ceiling},
        copy_rate=problem.copy_rate,
        product_rate=measure.product_rate(case.device, case.torch_dtype),
        gradient_bytes=problem.hidden.nbytes + weight_gradient_bytes,
        # The logits, and the two gradients.
        operations=3 * 2 * case.rows * columns * case.width,
    )


def groups(device: str, shapes: list[tuple]) -> Iterator[tuple[str, str, LinearTopKCase, Member]]:
    """Each group's name, a member's name in it, what is computed and who computes it."""
    for rows, width, vocab, dtype, k in shapes:
        for tail in ("support", "bucket"):
            case = LinearTopKCase(rows, vocab, dtype, device, tail=tail, k=k, width=width)
            for member in members_of(case):
                yield f"linear_topk_kd_loss {case.shape}", member.name, case, member


def test_linear_topk_kd_loss(
    group: str, name: str, case: LinearTopKCase, member: Member, measured
) -> None:
    # Compiled members of one shape must not make those of the next one "dynamic".
    torch.compiler.reset()
    measured(group, name, lambda: trial_of(case, member))
