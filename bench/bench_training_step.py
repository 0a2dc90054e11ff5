"""What the losses cost in a training step of whole models, against the papers' own code.

A round is forward, loss and backward of one batch, through `DistillationTrainer.training_step` or
by hand; `grad` is set to None before the round, untimed, and no optimiser runs. The bound to
compare with is the models alone: the teacher's forward, and the student's forward and backward from
a gradient that is given. What a step takes beyond its models is the loss, and its share of the step
is what the report shows: of each member beyond models with its own attention, timed in turns with
it, and once more beyond models whose student has TinyBERT's projection for a last layer.

Every token counts and none is padding, which is the most that a batch of this size can cost. The
models have no dropout, so that all members compute the same.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import measure
import torch
from measure import Trial
from peers import Member
from torch import Tensor, nn
from training_step_peers import (
    Models,
    StepCase,
    attention_of,
    literal_loss,
    members_of,
    parts_of,
)
from transformers import BertConfig, BertForMaskedLM

# Batch, tokens, vocabulary, the student's layers and width, the teacher's.
SHAPES = {
    "cpu": (
        (8, 128, 30522, 4, 312, 6, 384, "float32"),
        (8, 512, 30522, 4, 312, 6, 384, "float32"),
    ),
    "cuda": (
        (32, 128, 30522, 4, 312, 12, 768, "float32"),
        (32, 512, 30522, 4, 312, 12, 768, "float32"),
    ),
}

RECIPES = ("tinybert_general", "hinton")
HEADS = 12

# The largest relative error that is agreement; the gradient's is the worst parameter's. It is that
# of float32 all the way through two models. A wrong factor or layer makes it 1e-1.
TOLERANCES = {"loss": 1e-5, "gradient": 1e-3}

# Relative to the largest, a gradient that is compared with this and not with its own size.
SMALLEST_GRADIENT = 1e-4


@dataclass(frozen=True)
class Problem:
    """The models of a case, and what float64 makes of them."""

    models: Models
    leaves: dict[str, nn.Parameter]
    loss: float
    gradients: dict[str, Tensor]  # float64, of the leaves that have one
    copy_rate: float


def _bert(case: StepCase, layers: int, width: int) -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=case.vocab,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        intermediate_size=4 * width,
        max_position_embeddings=case.tokens,
        # Scores and logits of about 1: those of BERT's own 0.02 would be nearly uniform.
        initializer_range=0.05,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config).to(case.device)


def _leaves(models: Models) -> dict[str, nn.Parameter]:
    return dict(models.student.named_parameters()) | {
        f"projection.{name}": parameter for name, parameter in models.projection.named_parameters()
    }


def _solve(case: StepCase, models: Models) -> tuple[float, dict[str, Tensor]]:
    """The recipe as the papers' code has it, in float64, one sequence at a time.

    Sequences are equally long and all of their tokens count: the mean over them is the batch's.
    """
    wide = Models(
        *(copy.deepcopy(m).double() for m in (models.student, models.teacher, models.projection)),
        models.batch,
    )
    wide.use_attention(attention_of(case))
    wide.student.train()
    loss = 0.0
    for row in range(case.batch):
        alone = {name: tensor[row : row + 1] for name, tensor in models.batch.items()}
        part = literal_loss(case, Models(wide.student, wide.teacher, wide.projection, alone))
        part = part / case.batch
        part.backward()
        loss += part.item()
    return loss, {n: leaf.grad for n, leaf in _leaves(wide).items() if leaf.grad is not None}


@measure.one_at_a_time
def problem_of(case: StepCase) -> Problem:
    torch.manual_seed(0)
    student = _bert(case, case.student_layers, case.student_width)
    teacher = _bert(case, case.teacher_layers, case.teacher_width).eval().requires_grad_(False)
    projection = nn.Linear(case.student_width, case.teacher_width, device=case.device)
    shape = case.batch, case.tokens
    batch = {
        "input_ids": torch.randint(case.vocab, shape, device=case.device),
        "attention_mask": torch.ones(shape, dtype=torch.int64, device=case.device),
        "labels": torch.randint(case.vocab, shape, device=case.device),
    }
    models = Models(student, teacher, projection, batch)
    loss, gradients = _solve(case, models)
    return Problem(
        models,
        _leaves(models),
        loss,
        gradients,
        copy_rate=measure.copy_bandwidth(case.device, sum(p.nbytes for p in student.parameters())),
    )


def _distance(leaves: dict[str, nn.Parameter], expected: dict[str, Tensor]) -> float:
    """The worst of all parameters' gradients; a missing one is as wrong as it gets."""
    if {name for name, leaf in leaves.items() if leaf.grad is not None} != expected.keys():
        return math.inf
    norms = {name: gradient.norm().item() for name, gradient in expected.items()}
    # Of a loss of logits alone, the keys' biases have none: what there is of it is rounding.
    least = SMALLEST_GRADIENT * max(norms.values())
    return max(
        (leaves[name].grad.double() - gradient).norm().item() / max(norms[name], least)
        for name, gradient in expected.items()
    )


def trial_of(case: StepCase, member: Member) -> Trial:
    problem = problem_of(case)
    run = member.build(case)(problem.models)
    result = None

    def step() -> None:
        nonlocal result
        result = run()

    def reset() -> None:
        nonlocal result
        result = None
        for leaf in problem.leaves.values():
            leaf.grad = None

    def errors() -> dict[str, float]:
        if member.is_ceiling:
            return {}
        return {
            "loss": abs(result.item() - problem.loss) / abs(problem.loss),
            "gradient": _distance(problem.leaves, problem.gradients),
        }

    gradient_bytes = sum(problem.leaves[name].nbytes for name in problem.gradients)
    parameters = (*problem.leaves.values(), *problem.models.teacher.parameters())
    return Trial(
        step=step,
        reset=reset,
        errors=errors,
        tolerances={} if member.is_ceiling else TOLERANCES,
        # Every weight is read, and the gradients are written.
        bytes_moved=sum(parameter.nbytes for parameter in parameters) + gradient_bytes,
        about={**asdict(case), "is_ceiling": member.is_ceiling},
        copy_rate=problem.copy_rate,
        product_rate=measure.product_rate(case.device, getattr(torch, case.dtype)),
        gradient_bytes=gradient_bytes,
        parts={name: build(problem.models) for name, build in parts_of(case, member).items()},
    )


def groups(device: str, shapes: list[tuple]) -> Iterator[tuple[str, str, StepCase, Member]]:
    """Each group's name, a member's name in it, what is computed and who computes it."""
    for recipe in RECIPES:
        for shape in shapes:
            case = StepCase(recipe, *shape, device=device)
            for member in members_of(case):
                yield f"training_step {recipe} {case.shape}", member.name, case, member


def test_training_step(group: str, name: str, case: StepCase, member: Member, measured) -> None:
    measured(group, name, lambda: trial_of(case, member))
