"""The members of training_step: a recipe's forward, loss and backward on one batch.

Each maps the models of a problem to a step, a function of no arguments that leaves gradients on the
student and on the projection and returns the loss. "eager" is what the papers' code does:
TinyBERT's attention keeps its raw scores, which only an eager one has, and Hinton's loss is made of
both models' logits.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from peers import Member, only
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertForMaskedLM,
    Trainer,
    TrainingArguments,
)
from transformers.masking_utils import eager_mask

from kdfast.trainer import RECIPES, DistillationTrainer

# Scores that TinyBERT's code takes for masked ones.
MASKED_FROM = -1e2

TEMPERATURE, ALPHA = 2.0, 0.5


@dataclass(frozen=True)
class StepCase:
    """What every member of a group computes, and on what."""

    recipe: str
    batch: int
    tokens: int
    vocab: int
    student_layers: int
    student_width: int
    teacher_layers: int
    teacher_width: int
    dtype: str
    device: str = "cpu"

    @property
    def shape(self) -> str:
        student = f"{self.student_layers}×{self.student_width}"
        teacher = f"{self.teacher_layers}×{self.teacher_width}"
        return f"{self.batch}×{self.tokens}×{self.vocab} {student} from {teacher} {self.dtype}"


@dataclass(frozen=True)
class Models:
    """A student and a teacher, the projection between their hidden states, and a batch for both."""

    student: BertForMaskedLM
    teacher: BertForMaskedLM
    projection: nn.Linear
    batch: dict[str, Tensor]  # input_ids, attention_mask and labels, each (batch, tokens)

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.batch.items() if name != "labels"}

    def use_attention(self, name: str) -> None:
        for model in (self.student, self.teacher):
            model.set_attn_implementation(name)


Step = Callable[[], Tensor | None]


def _trainer(cls: type[Trainer], student: BertForMaskedLM, **options: object) -> Trainer:
    use_cpu = student.device.type == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, use_cpu=use_cpu, report_to=[], log_level="error")
        trainer = cls(model=student, args=arguments, **options)
    # Set by `train`.
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def kdfast_step(case: StepCase) -> Callable[[Models], Step]:
    """DistillationTrainer's."""
    settings = (TEMPERATURE, ALPHA) if case.recipe == "hinton" else ()

    def prepare(models: Models) -> Step:
        models.use_attention("sdpa")
        trainer = _trainer(
            DistillationTrainer,
            models.student,
            teacher=models.teacher,
            objective=RECIPES[case.recipe](*settings).objective,
        )
        if trainer.projections is not None:
            trainer.projections.shared_weight = models.projection.weight
            trainer.projections.shared_bias = models.projection.bias
        return partial(trainer.training_step, models.student, models.batch)

    return prepare


def _scores_kept(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """TinyBERT's attention: its second output is the scores before the softmax."""
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    context = torch.matmul(F.softmax(scores, dim=-1), value)
    return context.transpose(1, 2).contiguous(), scores


AttentionInterface.register("scores_kept", _scores_kept)
AttentionMaskInterface.register("scores_kept", eager_mask)


def tinybert_loss(models: Models) -> Tensor:
    """`general_distill.py` of huawei-noah/Pretrained-Language-Model, TinyBERT."""
    asked = {**models.inputs, "output_attentions": True, "output_hidden_states": True}
    student = models.student.bert(**asked)
    with torch.no_grad():
        teacher = models.teacher.bert(**asked)
    layers, teacher_layers = len(student.attentions), len(teacher.attentions)
    # Which state of the teacher each of the student's learns, embeddings first. The source insists
    # on a multiple of the student's layers, and has every so many-th.
    states = [i * teacher_layers // layers for i in range(layers + 1)]
    loss = 0.0
    for own, state in zip(student.attentions, states[1:], strict=True):
        other = teacher.attentions[state - 1]
        own = torch.where(own <= MASKED_FROM, torch.zeros_like(own), own)
        other = torch.where(other <= MASKED_FROM, torch.zeros_like(other), other)
        loss = loss + F.mse_loss(own, other)
    for own, state in zip(student.hidden_states, states, strict=True):
        loss = loss + F.mse_loss(models.projection(own), teacher.hidden_states[state])
    return loss


def hinton_loss(models: Models) -> Tensor:
    """What people write: a divergence of softened softmaxes, and the cross entropy."""
    student = models.student(**models.inputs).logits.flatten(0, 1)
    with torch.no_grad():
        teacher = models.teacher(**models.inputs).logits.flatten(0, 1)
    soft = F.kl_div(
        F.log_softmax(student / TEMPERATURE, dim=-1),
        F.softmax(teacher / TEMPERATURE, dim=-1),
        reduction="batchmean",
    )
    hard = F.cross_entropy(student, models.batch["labels"].flatten())
    return ALPHA * TEMPERATURE**2 * soft + (1 - ALPHA) * hard


def literal_loss(case: StepCase, models: Models) -> Tensor:
    return hinton_loss(models) if case.recipe == "hinton" else tinybert_loss(models)


def attention_of(case: StepCase) -> str:
    """The attention that the papers' code can do with."""
    return "sdpa" if case.recipe == "hinton" else "scores_kept"


def eager_step(case: StepCase) -> Callable[[Models], Step]:
    """In a trainer's `compute_loss`, which is where people put it."""

    def prepare(models: Models) -> Step:
        class LiteralTrainer(Trainer):
            def compute_loss(
                self, model: nn.Module, inputs: dict[str, Tensor], *_: object, **__: object
            ) -> Tensor:
                return literal_loss(case, replace(models, student=model, batch=inputs))

        models.use_attention(attention_of(case))
        trainer = _trainer(LiteralTrainer, models.student)
        return partial(trainer.training_step, models.student, models.batch)

    return prepare


def bare_models(
    case: StepCase, attention: str = "sdpa", *, projected: bool = False
) -> Callable[[Models], Step]:
    """Both models' forward and the student's backward, from a gradient that is given.

    With their output heads where the recipe has logits; `projected`, with the linear layer between
    the widths, which in TinyBERT's code is a layer of the student.
    """

    def prepare(models: Models) -> Step:
        models.use_attention(attention)
        models.student.train()
        student, teacher = models.student, models.teacher
        if case.recipe != "hinton":
            student, teacher = student.bert, teacher.bert
        asked = models.inputs | {"output_hidden_states": projected}

        def outputs_of(model: nn.Module) -> list[Tensor]:
            outputs = model(**asked)
            if not projected:
                return [outputs[0]]
            return [models.projection(hidden) for hidden in outputs.hidden_states]

        with torch.no_grad():
            gradients = [torch.randn_like(output) for output in outputs_of(student)]

        def step() -> None:
            with torch.no_grad():
                teacher(**asked)
            torch.autograd.backward(outputs_of(student), gradients)

        return step

    return prepare


def _in_float32(write: Callable[[StepCase], Callable[[Models], Step]]) -> Callable:
    def checked(case: StepCase) -> Callable[[Models], Step]:
        only(case, dtype="float32")
        return write(case)

    return checked


KDFAST = Member("kdfast", _in_float32(kdfast_step))
MODELS = Member("bare models", _in_float32(bare_models), is_ceiling=True)
EAGER = Member("eager", _in_float32(eager_step))


def members_of(case: StepCase) -> tuple[Member, ...]:
    """Everyone who takes part in a case, the models alone right after kdfast: its bound."""
    return KDFAST, MODELS, EAGER


def parts_of(case: StepCase, member: Member) -> dict[str, Callable[[Models], Step]]:
    """A member's step without its losses, by name, on models with the attention that it has."""
    if member.is_ceiling:
        return {}
    attention = "sdpa" if member is KDFAST else attention_of(case)
    parts = {"models": bare_models(case, attention)}
    if case.recipe != "hinton":
        parts["projected models"] = bare_models(case, attention, projected=True)
    return parts
