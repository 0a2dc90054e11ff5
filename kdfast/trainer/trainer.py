"""`transformers.Trainer` with a teacher."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from kdfast.trainer.head import OutputHead, UnknownHead, find_head, is_compiled, output_embeddings
from kdfast.trainer.objective import Objective
from kdfast.trainer.recipes import hinton
from kdfast.trainer.vocabulary import check_same_vocabulary

logger = logging.get_logger(__name__)

IGNORE_INDEX = -100


class DistillationTrainer(Trainer):
    """Trains a student towards a teacher's outputs; everything else is `transformers.Trainer`.

    Causal and masked language models and classifiers work: whatever takes `labels` and returns
    `logits`. The loss is the objective, divided by `num_items_in_batch`: accumulated gradients
    equal those of one large batch. Each term is logged beside `loss`, averaged in the same way:
    `soft_loss` (the divergence, without weight and T²) and `hard_loss` (cross entropy), and as
    `eval_soft_loss` and `eval_hard_loss` beside `eval_loss`, which is the objective too.

    The teacher is put in eval mode, frozen, moved to the trainer's device in its own dtype, and run
    under inference mode. It is neither wrapped nor saved. Inputs that only one of the two models
    names go to that one alone.

    Training steps of language models build no logits: the loss is computed in the place of the
    student's output head, by `kdfast.linear_kd_loss`. Both models have to end in a plain
    `nn.Linear`, with nothing behind it but a scale or a soft cap that their configurations name;
    where they do not, a warning says so once, and `kdfast.kd_loss` takes their logits. Evaluation
    always has logits.

    Args:
        *args, **kwargs: as for `transformers.Trainer`; `model` is the student.
        teacher: maps the batch to logits of the student's shape; a wider or narrower vocabulary is
            allowed.
        objective: None takes `hinton().objective`.
        vocab_size: the tokens that both models have. None takes the narrower of the two logits,
            with a warning if they differ.
        shift_labels: whether position i's logits predict label i + 1. None decides by the student's
            class: causal language models do.
        teacher_tokenizer: to be compared with `processing_class`, the student's tokenizer.
        fuse_head: whether training steps do without logits, as above.
        overwrite_student_logits: where there are logits, let the gradient take their storage in
            training steps, as in `kdfast.kd_loss`. A student whose own backward pass needs its
            logits (one that ends in a tanh, say) then fails with autograd's error about an in-place
            operation.

    Raises:
        TypeError, ValueError: a teacher that is the student, tokenizers that differ, an argument of
            `transformers.Trainer` that changes the loss (`compute_loss_func`,
            `label_smoothing_factor`); at a step, a batch without the labels that the objective
            needs.

    Example:
        >>> objective = hinton(temperature=4.0, alpha=0.9).objective
        >>> trainer = DistillationTrainer(
        ...     student, arguments, teacher=teacher, objective=objective, train_dataset=blocks
        ... )
        >>> trainer.train()
    """

    def __init__(
        self,
        *args: object,
        teacher: nn.Module,
        objective: Objective | None = None,
        vocab_size: int | None = None,
        shift_labels: bool | None = None,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        fuse_head: bool = True,
        overwrite_student_logits: bool = False,
        **kwargs: object,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._check_loss_is_ours(teacher)
        if teacher_tokenizer is not None and self.processing_class is not None:
            check_same_vocabulary(self.processing_class, teacher_tokenizer)

        # A model spread over devices stays where it is.
        if getattr(teacher, "hf_device_map", None) is None:
            teacher = teacher.to(self.args.device)
        self.teacher = teacher.eval().requires_grad_(False)
        self.objective = hinton().objective if objective is None else objective
        self.vocab_size = vocab_size
        self.fuse_head = fuse_head
        self.overwrite_student_logits = overwrite_student_logits

        student = _without_adapter(self.model)
        self.shift_labels = _is_causal(student) if shift_labels is None else shift_labels
        # Trainer counts num_items_in_batch for losses that divide by it, over the positions that
        # they look at.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = self.shift_labels

        student_names, teacher_names = (
            set(inspect.signature(m.forward).parameters)
            for m in (student, _without_adapter(teacher))
        )
        self._student_only = student_names - teacher_names
        self._teacher_only = teacher_names - student_names
        self._teacher_options = {"use_cache": False} if "use_cache" in teacher_names else {}

        # What was found out about the output heads, and of which student.
        self._heads: tuple[OutputHead, OutputHead] | None = None
        self._heads_of: nn.Module | None = None
        self._terms: dict[str, Tensor] = {}
        self._term_sums: dict[str, Tensor] = {}
        self._summed_since = 0
        self._eval_terms: list[Tensor] = []

    def _check_loss_is_ours(self, teacher: nn.Module) -> None:
        if teacher is self.model:
            raise ValueError(
                "teacher and student must be two models, got one: the teacher is frozen"
            )
        if self.compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func would replace the objective; pass objective instead"
            )
        if self.label_smoother is not None:
            raise ValueError(
                "label_smoothing_factor is not part of any objective, "
                f"got {self.args.label_smoothing_factor}"
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, object]:
        """The objective on one batch; its terms are left in `self._terms`."""
        inputs = dict(inputs)
        # Without labels the student computes no loss of its own, and without skip_logits Liger's
        # models return logits.
        inputs.pop("skip_logits", None)
        labels = self._pop_labels(inputs)
        student_inputs = {k: v for k, v in inputs.items() if k not in self._teacher_only}
        teacher_inputs = {k: v for k, v in inputs.items() if k not in self._student_only}
        teacher_inputs |= self._teacher_options
        num_items = self._divisor(num_items_in_batch)

        heads = None
        # A class per sequence makes no logits worth avoiding.
        if self.fuse_head and model.training and not return_outputs and _is_per_token(labels):
            heads = self._output_heads(model, student_inputs, teacher_inputs)
        if heads is None:
            with torch.inference_mode():
                teacher_logits = _logits(self.teacher(**teacher_inputs))
            outputs = model(**student_inputs)
            loss, self._terms = self._of_logits(
                _logits(outputs),
                teacher_logits,
                labels,
                num_items,
                overwrite=self.overwrite_student_logits and model.training and not return_outputs,
            )
        else:
            loss, self._terms = self._of_hidden(
                heads, model, student_inputs, teacher_inputs, labels, num_items
            )
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The divisor counted the tokens of every process, and the processes' gradients are
            # averaged.
            processes = self.accelerator.num_processes // self.get_tp_size()
            loss = loss * processes
            self._terms = {name: term * processes for name, term in self._terms.items()}
        if not return_outputs:
            return loss
        # Trainer takes a tuple's first entry for the loss, which the student was not asked for.
        return loss, outputs if isinstance(outputs, dict) else (loss, *outputs)

    def _of_logits(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None,
        num_items: Tensor | None,
        *,
        overwrite: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if student_logits.dtype == torch.float16:
            # kd_loss keeps float16 inputs for the backward pass, and autograd saves no inference
            # tensor.
            teacher_logits = teacher_logits.clone()

        per_token = student_logits.dim() > 2
        if labels is None and (per_token or self.objective.needs_labels):
            raise ValueError(
                "the batch has no labels: the objective needs them"
                if self.objective.needs_labels
                else f"the batch has no labels: they say which tokens count ({IGNORE_INDEX}: not)"
            )
        widths = student_logits.shape[-1], teacher_logits.shape[-1]
        return self.objective(
            student_logits,
            teacher_logits,
            labels,
            num_items=num_items,
            vocab_size=self._shared_vocab_size(*widths, per_token=per_token),
            overwrite_student_logits=overwrite,
        )

    def _of_hidden(
        self,
        heads: tuple[OutputHead, OutputHead],
        model: nn.Module,
        student_inputs: dict[str, object],
        teacher_inputs: dict[str, object],
        labels: Tensor,
        num_items: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        student, teacher = heads
        terms = {}
        with torch.inference_mode():
            teacher_hidden = teacher.hidden_states(lambda: self.teacher(**teacher_inputs))

        def loss_of(student_hidden: Tensor) -> Tensor:
            # The weights are whole here, whatever shards them outside of their model's forward.
            widths = len(student.linear.weight), len(teacher.linear.weight)
            loss, found = self.objective.from_hidden(
                student_hidden,
                student.linear.weight,
                teacher_hidden,
                teacher.linear.weight,
                labels,
                num_items=num_items,
                vocab_size=self._shared_vocab_size(*widths, per_token=True),
                student_bias=student.linear.bias,
                teacher_bias=teacher.linear.bias,
                student_logit_scale=student.logit_scale,
                teacher_logit_scale=teacher.logit_scale,
                student_softcap=student.softcap,
                teacher_softcap=teacher.softcap,
            )
            terms.update(found)
            return loss

        return student.loss(self._unwrapped(model), lambda: model(**student_inputs), loss_of), terms

    def _unwrapped(self, model: nn.Module) -> nn.Module:
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    def _output_heads(
        self, model: nn.Module, student_inputs: dict[str, object], teacher_inputs: dict[str, object]
    ) -> tuple[OutputHead, OutputHead] | None:
        """The student's and the teacher's; None where steps have to build logits."""
        student = self._unwrapped(model)
        if self._heads_of is not student:
            self._heads = self._find_heads(model, student_inputs, teacher_inputs)
            self._heads_of = student
        return self._heads

    def _find_heads(
        self, model: nn.Module, student_inputs: dict[str, object], teacher_inputs: dict[str, object]
    ) -> tuple[OutputHead, OutputHead] | None:
        # Nothing is said of a student that never had one: it need not be a language model.
        if output_embeddings(_without_adapter(self._unwrapped(model))) is None:
            return None
        found = []
        for owner, wrapped, inputs, mode in (
            ("student", model, student_inputs, torch.no_grad()),
            ("teacher", self.teacher, teacher_inputs, torch.inference_mode()),
        ):
            try:
                with mode:
                    found.append(self._find_head(wrapped, inputs))
            except UnknownHead as reason:
                name = type(_without_adapter(self._unwrapped(wrapped))).__name__
                logger.warning_once(
                    f"Training steps build logits, because the {owner} ({name}) {reason}. "
                    "With fuse_head=False they do so without this warning."
                )
                return None
        return tuple(found)

    def _find_head(self, model: nn.Module, inputs: dict[str, object]) -> OutputHead:
        inner = _without_adapter(self._unwrapped(model))
        if isinstance(model, nn.DataParallel):
            raise UnknownHead("runs in copies, under nn.DataParallel")
        if is_compiled(model, output_embeddings(inner)):
            raise UnknownHead("is compiled")
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with _eval_mode(model), torch.random.fork_rng(devices):
            return find_head(inner, lambda: _logits(model(**inputs)))

    def _pop_labels(self, inputs: dict[str, Tensor]) -> Tensor | None:
        """The labels, aligned with the logits that predict them."""
        labels, shifted = inputs.pop("labels", None), inputs.pop("shift_labels", None)
        if shifted is not None or labels is None or not self.shift_labels:
            return labels if shifted is None else shifted
        # The labels move rather than the logits, whose slice would have to be copied.
        return nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)

    def _divisor(self, num_items_in_batch: Tensor | int | None) -> Tensor | None:
        if num_items_in_batch is None:
            return None
        # nn.DataParallel gets one copy per device, each a share unless tokens are averaged across
        # devices. Here the loss is computed once, on the outputs of all devices.
        num_items = torch.as_tensor(num_items_in_batch).flatten()[0]
        if self.args.n_gpu > 1 and not self.args.average_tokens_across_devices:
            num_items = num_items * self.args.n_gpu
        return num_items

    def _shared_vocab_size(
        self, student_width: int, teacher_width: int, *, per_token: bool
    ) -> int | None:
        if self.vocab_size is not None or student_width == teacher_width:
            return self.vocab_size
        if not per_token:
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

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        # As Trainer does with the loss: batches without a common divisor share their step equally.
        share = 1 if num_items_in_batch is not None else self.current_gradient_accumulation_steps
        if not self._term_sums:
            self._summed_since = self.state.global_step
        self._term_sums = {
            name: term / share + self._term_sums.get(name, 0.0)
            for name, term in self._terms.items()
        }
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._term_sums:
            steps = self.state.global_step - self._summed_since
            sums = self.accelerator.gather(torch.stack(list(self._term_sums.values()))[None])
            means = (sums.mean(0) / steps).tolist()
            logs.update(zip(self._term_sums, means, strict=True))
        if "loss" in logs or "train_loss" in logs:
            self._term_sums = {}
        super().log(logs, start_time)

    def prediction_step(self, *args: object, **kwargs: object) -> tuple:
        self._terms = {}
        prediction = super().prediction_step(*args, **kwargs)
        if self._terms:
            # Repeated like Trainer's own losses, so that the gathering drops what fills the last
            # batch up.
            terms = torch.stack(list(self._terms.values())).repeat(self.args.eval_batch_size, 1)
            self._eval_terms.append(self.gather_function(terms).cpu())
        return prediction

    def evaluation_loop(
        self,
        dataloader: torch.utils.data.DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self._eval_terms = []
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        if self._eval_terms:
            means = torch.cat(self._eval_terms).mean(0).tolist()
            for name, mean in zip(self._terms, means, strict=True):
                output.metrics[f"{metric_key_prefix}_{name}"] = mean
        return output

    def _set_signature_columns_if_needed(self) -> None:
        # Trainer drops dataset columns that the student does not name; the teacher may need them.
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns += sorted(self._teacher_only)


def _without_adapter(model: nn.Module) -> nn.Module:
    """The model inside a PEFT wrapper, whose own forward names no argument."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


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


def _is_per_token(labels: Tensor | None) -> bool:
    return labels is not None and labels.dim() > 1


def _is_causal(model: nn.Module) -> bool:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or str(
        getattr(model, "loss_type", None)
    ) in ("ForCausalLM", "ForConditionalGeneration")


def _logits(outputs: Mapping[str, Tensor] | tuple) -> Tensor:
    return outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
