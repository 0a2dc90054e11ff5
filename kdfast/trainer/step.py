"""One batch: what the teacher says of it, what the student does, and the loss between them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers.utils import logging

from kdfast.ops.truncated_softmax import TruncatedSoftmax
from kdfast.trainer.features import LOSS, FeatureLoss, Features, without_adapter
from kdfast.trainer.head import (
    IGNORE_INDEX,
    OutputHead,
    UnknownHead,
    find_head,
    is_compiled,
    output_embeddings,
)
from kdfast.trainer.objective import Objective, TruncatedLogits, labels_of
from kdfast.trainer.outputs import DECODER_INPUTS, logits_of

logger = logging.get_logger(__name__)

# The student's output head and the teacher's, those that are there and can be done without.
Heads = tuple[OutputHead | None, OutputHead | None]


@dataclass(frozen=True)
class Batch:
    """What the models get, and what their outputs are compared with.

    Args:
        student, teacher: the arguments of their forward.
        labels: aligned with the logits that predict them.
        cached: the rows of a teacher cache.
    """

    student: dict[str, object]
    teacher: dict[str, object]
    labels: Tensor | None
    cached: TruncatedSoftmax | None

    @property
    def mask(self) -> Tensor | None:
        """`[B, S]` bool, True for the tokens that are no padding; None where all are."""
        decoder = DECODER_INPUTS & self.student.keys()
        mask = self.student.get("decoder_attention_mask" if decoder else "attention_mask")
        if mask is None and decoder and self.labels is not None:
            # A decoder's padding is seldom masked: it stands behind what is predicted.
            return self.labels != IGNORE_INDEX
        return None if mask is None else mask.bool()

    @property
    def per_token(self) -> bool:
        """Whether there is a label for each token, as far as labels tell."""
        return self.labels is not None and self.labels.dim() > 1


@dataclass(frozen=True)
class Share:
    """How a batch's loss adds up to that of a step of several batches and processes.

    Args:
        num_items: the labels that count in the whole step, of all processes; None takes the
            batch's own.
        processes: whose gradients are averaged although `num_items` counted for all of them.
        batches: means over a batch's tokens share the step equally.
    """

    num_items: Tensor | None = None
    processes: int = 1
    batches: int = 1


class Step:
    """Losses of batches.

    Args:
        objective: what the student is trained towards.
        teacher: None with a teacher cache.
        features: the objective's terms of the models' inside, if it has any.
        vocab_size: the tokens that both models have, or None for the narrower's.
        fuse_head: whether training steps do without logits where they can.
        unwrap: maps a model to what is inside its wrappers.
        device: the models'.

    Attributes:
        heads: what is known of the output heads; None until they were looked for, and where steps
            build logits.
    """

    def __init__(
        self,
        objective: Objective,
        teacher: nn.Module | None,
        features: FeatureLoss | None,
        *,
        vocab_size: int | None,
        fuse_head: bool,
        unwrap: Callable[[nn.Module], nn.Module],
        device: torch.device,
    ) -> None:
        self.objective = objective
        self.teacher = teacher
        self.features = features
        self.vocab_size = vocab_size
        self.fuse_head = fuse_head
        self.heads: Heads | None = None
        self._heads_of: nn.Module | None = None
        self._unwrap = _remembering(unwrap)
        self._device = device

    def __call__(
        self,
        model: nn.Module,
        batch: Batch,
        share: Share,
        *,
        logits_needed: bool,
        overwrite: bool,
    ) -> tuple[Tensor, dict[str, Tensor], Mapping[str, Tensor] | tuple]:
        """The loss, its terms, and the student's outputs.

        Args:
            model: the student in its wrappers.
            logits_needed: whether the outputs must have logits, as in evaluation.
            overwrite: whether the gradient may take the logits' storage, where there are logits.
        """
        if self.features is not None:
            batch.student.update(self.features.inputs)
            batch.teacher.update(self.features.inputs)
        heads = None
        if self.fuse_head and not logits_needed and self._does_without_logits(batch):
            heads = self._output_heads(model, batch)
        teacher, shown = self._run_teacher(heads, batch)
        with self._comparing(model, shown, batch) as inside:
            outputs, loss, terms = self._run_student(
                heads, model, batch, teacher, share, overwrite=overwrite
            )
        loss = loss * share.processes
        terms = {name: term * share.processes for name, term in terms.items()}
        if shown is not None:
            # These are means over a batch's cells and tokens.
            loss = loss + outputs.pop(LOSS) / share.batches
            terms |= {name: term / share.batches for name, term in inside.items()}
        return loss, terms, outputs

    def _does_without_logits(self, batch: Batch) -> bool:
        objective = self.objective
        # A class per sequence makes no logits worth avoiding.
        return not objective.of_tokens or (
            objective.soft is not None
            and objective.logit_mse is None
            and (batch.per_token or objective.soft.tokens == "all")
        )

    def _comparing(
        self, model: nn.Module, teacher: Features | None, batch: Batch
    ) -> AbstractContextManager[dict[str, Tensor]]:
        """The student's forward with the loss of its inside, if the objective looks there."""
        if teacher is None:
            return nullcontext({})
        alone = model.training and not self.objective.of_tokens
        return self.features.of_student(self._unwrap(model), teacher, batch.mask, alone=alone)

    def _run_teacher(
        self, heads: Heads | None, batch: Batch
    ) -> tuple[Tensor | TruncatedSoftmax | None, Features | None]:
        """What the teacher says of a batch, and what it shows of its inside meanwhile.

        It says nothing of a batch that the cache does not hold.
        """
        if self.teacher is None:
            return batch.cached, None
        forward = partial(self.teacher, **batch.teacher)
        head = None if heads is None else heads[1]

        def run() -> Tensor | TruncatedSoftmax | None:
            if self.objective.soft is None and self.objective.logit_mse is None:
                forward() if head is None else head.skipped(forward)
                return None
            if head is not None:
                return self._teacher_at_head(heads, forward, batch)
            logits = logits_of(forward())
            # A student without logits has a head that wants no more than the entries.
            return logits if heads is None else self._truncate(logits, heads[0])

        if self.features is not None:
            # Its inside is compared under autograd, which saves no inference tensor.
            with torch.no_grad():
                return self.features.of_teacher(self.teacher, run)
        with torch.inference_mode():
            found = run()
        if isinstance(found, TruncatedSoftmax):
            # Neither does it save these, and they are small.
            found = TruncatedSoftmax(*(entries.clone() for entries in found))
        return found, None

    def _truncate(self, logits: Tensor, student: OutputHead) -> TruncatedSoftmax:
        widths = student.linear.out_features, logits.shape[-1]
        return self.objective.soft.truncate(logits, self._shared_vocab_size(*widths))

    def _teacher_at_head(
        self, heads: Heads, forward: Callable[[], object], batch: Batch
    ) -> Tensor | TruncatedSoftmax:
        """The teacher without its logits: hidden states, or what the objective leaves of it."""
        student, teacher = heads
        soft = self.objective.soft

        def outputs(hidden: Tensor) -> Tensor | TruncatedSoftmax:
            if not isinstance(soft, TruncatedLogits):
                return hidden
            tokens = self._tokens(batch, hidden.shape[:-1])
            counted = batch.labels if tokens is None else labels_of(tokens)
            truncate = partial(self._truncate, student=student)
            return teacher.truncated(hidden, counted, truncate, soft.entries)

        return teacher.in_place(outputs, forward)

    def _run_student(
        self,
        heads: Heads | None,
        model: nn.Module,
        batch: Batch,
        teacher: Tensor | TruncatedSoftmax | None,
        share: Share,
        *,
        overwrite: bool,
    ) -> tuple[Mapping[str, Tensor] | tuple, Tensor | float, dict[str, Tensor]]:
        """The student's outputs, and of them the loss and its terms."""
        forward = partial(model, **batch.student)
        if not self.objective.of_tokens:
            head = None if heads is None else heads[0]
            return forward() if head is None else head.skipped(forward), 0.0, {}
        if heads is not None:
            return self._of_hidden(heads, model, forward, batch, teacher, share)
        outputs = forward()
        name = type(without_adapter(self._unwrap(model))).__name__
        loss, terms = self._of_logits(
            logits_of(outputs),
            teacher,
            batch,
            share,
            classes=name.endswith("ForTokenClassification"),
            overwrite=overwrite,
        )
        return outputs, loss, terms

    def _of_logits(
        self,
        student_logits: Tensor,
        teacher: Tensor | TruncatedSoftmax | None,
        batch: Batch,
        share: Share,
        *,
        classes: bool,
        overwrite: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if isinstance(teacher, Tensor) and student_logits.dtype == torch.float16:
            # kd_loss keeps float16 inputs for the backward pass, and autograd saves no inference
            # tensor.
            teacher = teacher.clone()

        per_token = student_logits.dim() > 2
        if batch.labels is None and self.objective.needs_labels(per_token=per_token):
            raise ValueError(
                "the batch has no labels: the objective needs them"
                if self.objective.hard is not None
                else f"the batch has no labels: they say which tokens count ({IGNORE_INDEX}: not)"
            )
        if student_logits.shape[-1] == 1 and self.objective.soft is not None:
            raise ValueError(
                "the student has one class, of which every distribution is the same: of a "
                "regression, LogitMSE compares the numbers"
            )
        vocab_size = self.vocab_size
        if isinstance(teacher, Tensor):
            widths = student_logits.shape[-1], teacher.shape[-1]
            vocab_size = self._shared_vocab_size(*widths, classes=classes or not per_token)
        return self.objective(
            student_logits,
            teacher,
            batch.labels,
            **self._divisors(batch, share, student_logits.shape[:-1]),
            vocab_size=vocab_size,
            overwrite_student_logits=overwrite,
        )

    def _divisors(self, batch: Batch, share: Share, shape: torch.Size) -> dict[str, Tensor | None]:
        """Of the terms of labelled tokens, and of one of all tokens."""
        tokens = self._tokens(batch, shape)
        divisors = {"num_items": share.num_items, "tokens": tokens}
        if tokens is not None:
            # A mean of the batch's own, which will be multiplied by the processes' number.
            divisors["num_tokens"] = tokens.sum() * (share.batches / share.processes)
        return divisors

    def _tokens(self, batch: Batch, shape: torch.Size) -> Tensor | None:
        """Those of a soft term that is not of the labelled ones alone."""
        if self.objective.soft is None or self.objective.soft.tokens == "labelled":
            return None
        mask = batch.mask
        if len(shape) != 2 or (mask is not None and mask.shape != shape):
            raise ValueError(
                "tokens='all' is for models with a distribution per token, and the student has "
                f"{tuple(shape)}"
            )
        return torch.ones(shape, dtype=torch.bool, device=self._device) if mask is None else mask

    def _of_hidden(
        self,
        heads: Heads,
        model: nn.Module,
        forward: Callable[[], Mapping[str, Tensor] | tuple],
        batch: Batch,
        teacher: Tensor | TruncatedSoftmax,
        share: Share,
    ) -> tuple[Mapping[str, Tensor] | tuple, Tensor, dict[str, Tensor]]:
        student, teacher_head = heads
        terms = {}

        def loss_of(hidden: Tensor) -> Tensor:
            # The weights are whole here, whatever shards them outside of their model's forward.
            weight, vocab_size = student.linear.weight, self.vocab_size
            if teacher_head is not None:
                widths = len(weight), len(teacher_head.linear.weight)
                vocab_size = self._shared_vocab_size(*widths)
            common = {
                "vocab_size": vocab_size,
                **self._divisors(batch, share, hidden.shape[:-1]),
                **student.keywords("student"),
            }
            if isinstance(teacher, TruncatedSoftmax):
                loss, found = self.objective.from_truncated(
                    hidden, weight, teacher, batch.labels, **common
                )
            else:
                loss, found = self.objective.from_hidden(
                    hidden,
                    weight,
                    teacher,
                    teacher_head.linear.weight,
                    batch.labels,
                    **common,
                    **teacher_head.keywords("teacher"),
                )
            terms.update(found)
            return loss

        outputs = student.loss(self._unwrap(model), forward, loss_of)
        return outputs, outputs["loss"] if isinstance(outputs, Mapping) else outputs[0], terms

    def _output_heads(self, model: nn.Module, batch: Batch) -> Heads | None:
        """The student's and the teacher's, if there is one; None where steps build logits."""
        student = self._unwrap(model)
        if self._heads_of is not student:
            self.heads = self._find_heads(model, batch)
            self._heads_of = student
        return self.heads

    def _find_heads(self, model: nn.Module, batch: Batch) -> Heads | None:
        objective = self.objective
        # Nothing is said of a student that never had one: it need not be a language model.
        if objective.of_tokens and output_embeddings(without_adapter(self._unwrap(model))) is None:
            return None
        models = [("student", model, batch.student, torch.no_grad())]
        if self.teacher is not None:
            models.append(("teacher", self.teacher, batch.teacher, torch.inference_mode()))
        found = []
        for owner, wrapped, inputs, mode in models:
            try:
                with mode:
                    found.append(self._find_head(wrapped, inputs))
            except UnknownHead as reason:
                found.append(None)
                # A head that is to be left out, and nothing else, may as well run; and so may a
                # teacher's of which a few entries are wanted.
                truncated = isinstance(objective.soft, TruncatedLogits)
                if objective.of_tokens and (owner == "student" or not truncated):
                    name = type(without_adapter(self._unwrap(wrapped))).__name__
                    logger.warning_once(
                        f"Training steps build logits, because the {owner} ({name}) {reason}. "
                        "With fuse_head=False they do so without this warning."
                    )
                    return None
        return found[0], found[1] if self.teacher is not None else None

    def _find_head(self, model: nn.Module, inputs: dict[str, object]) -> OutputHead:
        inner = without_adapter(self._unwrap(model))
        if isinstance(model, nn.DataParallel):
            raise UnknownHead("runs in copies, under nn.DataParallel")
        if is_compiled(model, output_embeddings(inner)):
            raise UnknownHead("is compiled")
        devices = [self._device] if self._device.type == "cuda" else []
        with _eval_mode(model), torch.random.fork_rng(devices):
            return find_head(
                inner,
                lambda: logits_of(model(**inputs)),
                to_skip=not self.objective.of_tokens,
            )

    def _shared_vocab_size(
        self, student_width: int, teacher_width: int, *, classes: bool = False
    ) -> int | None:
        if self.vocab_size is not None or student_width == teacher_width:
            return self.vocab_size
        if classes:
            raise ValueError(
                f"the student has {student_width} classes and the teacher {teacher_width}"
            )
        narrower = min(student_width, teacher_width)
        logger.warning_once(
            f"The student's logits have {student_width} columns and the teacher's "
            f"{teacher_width}: the first {narrower} are taken for the same tokens, and the others "
            "for padding. Pass vocab_size to say so yourself."
        )
        return narrower


def _remembering(unwrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """Remembers the last model: accelerate looks through all of its modules for compiled ones."""
    last: tuple[nn.Module, nn.Module] | None = None

    def remembered(model: nn.Module) -> nn.Module:
        nonlocal last
        if last is None or last[0] is not model:
            last = model, unwrap(model)
        return last[1]

    return remembered


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and afterwards each in its own."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
