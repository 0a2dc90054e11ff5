"""`transformers.Trainer` with a teacher."""

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

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
        overwrite_student_logits: let the gradient take the logits' storage in training steps, as in
            `kdfast.kd_loss`. A student whose own backward pass needs its logits (one that ends in a
            tanh, say) then fails with autograd's error about an in-place operation.

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
        with torch.inference_mode():
            teacher_inputs = {k: v for k, v in inputs.items() if k not in self._student_only}
            teacher_logits = _logits(self.teacher(**teacher_inputs, **self._teacher_options))
        outputs = model(**{k: v for k, v in inputs.items() if k not in self._teacher_only})
        student_logits = _logits(outputs)
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
        loss, self._terms = self.objective(
            student_logits,
            teacher_logits,
            labels,
            num_items=self._divisor(num_items_in_batch),
            vocab_size=self._shared_vocab_size(student_logits, teacher_logits),
            overwrite_student_logits=self.overwrite_student_logits
            and model.training
            and not return_outputs,
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

    def _shared_vocab_size(self, student_logits: Tensor, teacher_logits: Tensor) -> int | None:
        widths = student_logits.shape[-1], teacher_logits.shape[-1]
        if self.vocab_size is not None or widths[0] == widths[1]:
            return self.vocab_size
        if student_logits.dim() <= 2:
            raise ValueError(f"the student has {widths[0]} classes and the teacher {widths[1]}")
        logger.warning_once(
            f"The student's logits have {widths[0]} columns and the teacher's {widths[1]}: "
            f"the first {min(widths)} are taken for the same tokens, and the others for padding. "
            "Pass vocab_size to say so yourself."
        )
        return min(widths)

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


def _is_causal(model: nn.Module) -> bool:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or str(
        getattr(model, "loss_type", None)
    ) in ("ForCausalLM", "ForConditionalGeneration")


def _logits(outputs: Mapping[str, Tensor] | tuple) -> Tensor:
    return outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
