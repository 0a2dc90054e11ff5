"""`transformers.Trainer` with a teacher."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.utils import logging

from kdfast.teacher_cache import TeacherCache
from kdfast.trainer.cached import SAMPLE, CachedCollator, attach, fitted, pop_rows
from kdfast.trainer.checkpoints import WholeCheckpoints
from kdfast.trainer.ensemble import Ensemble, decodes, forward_names
from kdfast.trainer.features import FeatureLoss, without_adapter
from kdfast.trainer.objective import Objective
from kdfast.trainer.outputs import DECODER_INPUTS, pop_labels
from kdfast.trainer.projections import Projections
from kdfast.trainer.recipes import Recipe, hinton
from kdfast.trainer.step import Batch, Share, Step
from kdfast.trainer.vocabulary import check_same_vocabulary

logger = logging.get_logger(__name__)

# What the objective learns beside the student is its submodule of this name while it trains.
PROJECTIONS = "distillation_projections"


class DistillationTrainer(WholeCheckpoints):
    """Trains a student towards a teacher's outputs; everything else is `transformers.Trainer`.

    Causal and masked language models, encoder-decoders and classifiers work: whatever takes
    `labels` and returns `logits`. Where a batch has no `decoder_input_ids`, an encoder-decoder gets
    those that it makes of labels. The loss is the objective, divided by `num_items_in_batch`:
    accumulated gradients equal those of one large batch. Each term is logged beside `loss`,
    averaged in the same way: `soft_loss` (the divergence, without weight and T²) and `hard_loss`
    (cross entropy), and as `eval_soft_loss` and `eval_hard_loss` beside `eval_loss`, which is the
    objective too.

    The teacher is put in eval mode, frozen, moved to the trainer's device in its own dtype, and run
    under inference mode. It is neither wrapped nor saved. Inputs that only one of the two models
    names go to that one alone.

    Terms of the models' inside (`AttentionMSE`, `HiddenMSE`, `EmbeddingMSE`, `HiddenCosine`) are
    sums over pairs of layers of means over a batch's cells or tokens, as in TinyBERT's and
    DistilBERT's code: accumulated batches, and processes, share a step equally. They are logged as
    `attention_loss`, `hidden_loss`, `embedding_loss` and `cosine_loss`. Their learned projections
    are a submodule of the student, `distillation_projections`, which trains with it and is no part
    of what it saves: they stand beside it, in `projections.safetensors`. An objective of nothing
    else needs no labels, and its training steps run no output head.

    Instead of a teacher there may be a teacher cache (`kdfast.teacher_cache`): each batch then
    brings what the teacher said of it, and no teacher is in memory. The objective's soft term has
    to fit the cache: its temperature, at most its k, its draws; `Logits` is taken as
    `TruncatedLogits`, with a warning.

    Training steps of language models build no logits: the loss is computed in the place of the
    student's output head, by `kdfast.linear_kd_loss` or `kdfast.linear_topk_kd_loss`. Both models
    have to end in a plain `nn.Linear`, with nothing behind it but a scale or a soft cap that their
    configurations name; where they do not, a warning says so once, and `kdfast.kd_loss` or
    `kdfast.topk_kd_loss` takes their logits. Evaluation always has logits.

    Args:
        *args, **kwargs: as for `transformers.Trainer`; `model` is the student.
        teacher: maps the batch to logits of the student's shape; a wider or narrower vocabulary is
            allowed. Of several the probabilities are averaged; `Ensemble` has weights for them.
        teacher_cache: what `kdfast.teacher_cache.build_cache` made of a teacher, in its place. The
            training set, and the evaluation set where the cache holds it behind the training set,
            get their column `teacher_sample` (`TeacherCache.attach`) unless they have it. An
            evaluation set that the cache does not hold is evaluated by the hard loss alone, with a
            warning.
        objective: None takes `hinton().objective`, with a teacher cache at the cache's temperature.
        vocab_size: the tokens that both models have. None takes the narrower of the two logits,
            with a warning if they differ; with a teacher cache it is the cache's.
        shift_labels: whether position i's logits predict label i + 1. None decides by the student's
            class: causal language models do.
        teacher_tokenizer: to be compared with `processing_class`, the student's tokenizer.
        fuse_head: whether training steps do without logits, as above.
        overwrite_student_logits: where there are logits, let the gradient take their storage in
            training steps, as in `kdfast.kd_loss`. A student whose own backward pass needs its
            logits (one that ends in a tanh, say) then fails with autograd's error about an in-place
            operation.

    Raises:
        TypeError, ValueError: a teacher that is the student, no teacher or two, tokenizers that
            differ, an argument of `transformers.Trainer` that changes the loss
            (`compute_loss_func`, `label_smoothing_factor`); a model that is to predict the next
            token and sees it (a BERT without `is_decoder`); a teacher cache that the objective,
            the training set or a data collator which masks tokens does not fit; models without the
            layers or the widths that the objective compares; at a step, a batch without the labels
            that the objective needs, or with other tokens than the cached teacher saw.

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
        teacher: nn.Module | Sequence[nn.Module] | None = None,
        teacher_cache: TeacherCache | None = None,
        objective: Objective | None = None,
        vocab_size: int | None = None,
        shift_labels: bool | None = None,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        fuse_head: bool = True,
        overwrite_student_logits: bool = False,
        **kwargs: object,
    ) -> None:
        if (teacher is None) == (teacher_cache is None):
            got = "neither" if teacher is None else "both"
            raise ValueError(f"exactly one of teacher and teacher_cache must be given, got {got}")
        if isinstance(teacher, str) or not isinstance(teacher, nn.Module | Sequence | None):
            raise TypeError(
                f"teacher must be a model or a sequence of models, got {type(teacher).__name__}"
            )
        if not isinstance(teacher_cache, TeacherCache | None):
            raise TypeError(
                f"teacher_cache must be a TeacherCache, got {type(teacher_cache).__name__}"
            )
        if not isinstance(objective, Objective | None):
            advice = ": pass its .objective" if isinstance(objective, Recipe) else ""
            raise TypeError(
                f"objective must be an Objective, got {type(objective).__name__}{advice}"
            )
        if isinstance(teacher, Sequence):
            teacher = Ensemble(teacher, vocab_size=vocab_size)
        super().__init__(*args, **kwargs)
        # Of another training, which was not finished.
        self._detach_projections()
        self._check_loss_is_ours(teacher)
        if teacher_tokenizer is not None and self.processing_class is not None:
            check_same_vocabulary(self.processing_class, teacher_tokenizer)

        # A model spread over devices stays where it is.
        if teacher is not None and getattr(teacher, "hf_device_map", None) is None:
            teacher = teacher.to(self.args.device)
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)
        self.teacher_cache = teacher_cache
        if objective is None:
            recipe = hinton() if teacher_cache is None else hinton(teacher_cache.temperature)
            objective = recipe.objective
        self.objective = objective
        self.vocab_size = vocab_size
        self.overwrite_student_logits = overwrite_student_logits

        student = without_adapter(self.model)
        self.shift_labels = _is_causal(student) if shift_labels is None else shift_labels
        if self.shift_labels and shift_labels is None and self.objective.of_tokens:
            _check_looks_back("student", student)
            _check_looks_back("teacher", without_adapter(teacher))
        # Trainer counts num_items_in_batch for losses that divide by it, over the positions that
        # they look at.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = self.shift_labels

        student_names = forward_names(student)
        teacher_names = student_names if teacher is None else forward_names(teacher)
        # An ensemble chooses for each of its members.
        self._student_only = (
            set() if isinstance(teacher, Ensemble) else student_names - teacher_names
        )
        self._teacher_only = teacher_names - student_names
        self._student_decodes = decodes(student)
        self._teacher_decodes = teacher is not None and decodes(teacher)
        self._teacher_options = {"use_cache": False} if "use_cache" in teacher_names else {}
        if teacher_cache is not None:
            self._take_from(teacher_cache)

        self._features = None
        if self.objective.features:
            self._look_inside()
        if isinstance(self.teacher, Ensemble):
            soft = self.objective.soft
            own = getattr(soft, "teacher_temperature", None)
            self.teacher.temperature = 1.0 if soft is None else own or soft.temperature

        self._step = Step(
            self.objective,
            self.teacher,
            self._features,
            vocab_size=self.vocab_size,
            fuse_head=fuse_head,
            unwrap=partial(self.accelerator.unwrap_model, keep_torch_compile=False),
            device=self.args.device,
        )
        self._terms: dict[str, Tensor] = {}
        self._term_sums: dict[str, Tensor] = {}
        self._summed_since = 0
        self._eval_terms: list[Tensor] = []

    def _check_loss_is_ours(self, teacher: nn.Module) -> None:
        teachers = teacher.members if isinstance(teacher, Ensemble) else [teacher]
        if any(one is self.model for one in teachers):
            raise ValueError(
                "teacher and student must be two models, got one: the teacher is frozen"
            )
        config = getattr(self.model, "config", None)
        if getattr(config, "problem_type", None) == "multi_label_classification":
            raise ValueError(
                "the student's problem_type must not be 'multi_label_classification': no term has "
                "the loss of several labels"
            )
        if getattr(config, "output_router_logits", False):
            logger.warning_once(
                "The student's own auxiliary loss (output_router_logits) is no term of the "
                "objective: its experts train without it."
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

    def _look_inside(self) -> None:
        """Models whose attention and hidden states the objective compares."""
        if self.teacher is None:
            names = ", ".join(type(term).__name__ for term in self.objective.features)
            raise ValueError(
                f"objective looks inside the teacher ({names}), of which a teacher cache has "
                "nothing: pass teacher"
            )
        if isinstance(self.teacher, Ensemble):
            raise ValueError("objective looks inside the teacher, and an ensemble has no inside")
        if self.args.n_gpu > 1:
            raise ValueError(
                "objective looks inside the student, which nn.DataParallel copies: run one process "
                "per GPU (torchrun, accelerate launch)"
            )
        if self.args.torch_compile:
            raise ValueError(
                "torch_compile hides the student's inside, at which the objective looks"
            )
        if hasattr(self.model, "_orig_mod"):
            raise ValueError(
                "the student is compiled, which hides its inside, at which the objective looks: "
                "use student.compile(), which compiles in place, or no compilation"
            )
        self._features = FeatureLoss(self.objective.features, self.model, self.teacher)
        handler = self.accelerator.ddp_handler
        if not self.objective.of_tokens and handler is not None:
            # The output head is unused, for which Trainer does not look where it checkpoints.
            chosen = self.args.ddp_find_unused_parameters
            handler.find_unused_parameters = True if chosen is None else chosen
        if self.projections is not None:
            self._check_projections_train()
            trained = [p for p in self.model.parameters() if p.requires_grad]
            dtype = trained[0].dtype if trained else torch.float32
            self.projections.to(self.args.device, dtype)
            self._attach_projections()

    def _check_projections_train(self) -> None:
        if self.optimizer is not None:
            raise ValueError(
                "optimizers was made before the projections that the objective learns: pass "
                "optimizer_cls_and_kwargs instead"
            )
        if self.model_init is not None:
            raise ValueError(
                "model_init makes students that lack the projections which the objective learns: "
                "pass model instead"
            )
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.cpu_ram_efficient_loading:
            raise ValueError(
                "fsdp_config: cpu_ram_efficient_loading reloads a student's own parameters alone, "
                "and the objective learns projections besides: set it to false"
            )

    def _attach_projections(self) -> None:
        if self.projections is not None:
            # A submodule, for whatever optimises or wraps the student's parameters.
            self.model.add_module(PROJECTIONS, self.projections)

    def _detach_projections(self) -> None:
        # They are no part of a student.
        self.model._modules.pop(PROJECTIONS, None)

    def train(self, *args: object, **kwargs: object) -> TrainOutput:
        self._attach_projections()
        try:
            return super().train(*args, **kwargs)
        finally:
            self._detach_projections()

    def _take_from(self, cache: TeacherCache) -> None:
        """Batches with the cache's rows, and an objective that fits them."""
        if self._student_decodes:
            raise ValueError(
                "a teacher cache is of the tokens in input_ids, and the student "
                f"({type(without_adapter(self.model)).__name__}) predicts those of its decoder: "
                "pass teacher"
            )
        if self.vocab_size not in (None, cache.vocab_size):
            raise ValueError(
                f"vocab_size must be the teacher cache's, {cache.vocab_size}, got {self.vocab_size}"
            )
        self.vocab_size = cache.vocab_size
        tokenizer = self.processing_class
        # A cache that was built without a tokenizer can still be trained with one.
        if isinstance(tokenizer, PreTrainedTokenizerBase) and cache.manifest["tokenizer"]:
            cache.check_tokenizer(tokenizer)
        self.objective = fitted(self.objective, cache)
        self.data_collator = CachedCollator(
            self.data_collator, cache, self.objective.soft.entries, self.shift_labels
        )
        self.train_dataset, self.eval_dataset = attach(cache, self.train_dataset, self.eval_dataset)

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
        labels = pop_labels(inputs, shift=self.shift_labels)
        cached = pop_rows(inputs)
        if self.teacher is None and cached is None and model.training:
            raise ValueError(
                "the batch has nothing of the teacher cache: give its dataset the column "
                f"{SAMPLE} with TeacherCache.attach"
            )
        student = {k: v for k, v in inputs.items() if k not in self._teacher_only}
        teacher = {k: v for k, v in inputs.items() if k not in self._student_only}
        if self._student_decodes:
            _add_decoder_inputs("student", self.model, student, labels)
        if self._teacher_decodes:
            _add_decoder_inputs("teacher", self.teacher, teacher, labels)
        loss, self._terms, outputs = self._step(
            model,
            Batch(student, teacher | self._teacher_options, labels, cached),
            self._share(model, num_items_in_batch),
            logits_needed=return_outputs or not model.training,
            overwrite=self.overwrite_student_logits and model.training and not return_outputs,
        )
        if not return_outputs:
            return loss
        # Trainer takes a tuple's first entry for the loss, which the student was not asked for.
        return loss, outputs if isinstance(outputs, dict) else (loss, *outputs)

    def _share(self, model: nn.Module, num_items_in_batch: Tensor | int | None) -> Share:
        if num_items_in_batch is None:
            # Then Trainer itself divides by the number of batches.
            return Share()
        # nn.DataParallel gets one copy per device, each a share unless tokens are averaged across
        # devices. Here the loss is computed once, on the outputs of all devices.
        num_items, processes = torch.as_tensor(num_items_in_batch).flatten()[0], 1
        if self.args.average_tokens_across_devices:
            # The divisor counted the tokens of every process, and the processes' gradients are
            # averaged.
            processes = self.accelerator.num_processes // self.get_tp_size()
        elif self.args.n_gpu > 1:
            num_items = num_items * self.args.n_gpu
        # Set by `train`.
        accumulated = getattr(self, "current_gradient_accumulation_steps", 1)
        batches = accumulated if model.training else 1
        return Share(num_items, processes, batches)

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

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], *args: object, **kwargs: object
    ) -> tuple:
        self._terms = {}
        if any(inputs.get(name) is None for name in self.label_names):
            # Without labels Trainer hands the whole batch to the student.
            pop_rows(inputs)
        with self._loss_without_labels(inputs) as unlabelled:
            prediction = super().prediction_step(model, inputs, *args, **kwargs)
        if unlabelled:
            # Trainer takes no names for labels that are there, and would measure against them.
            prediction = (*prediction[:2], None)
        if self._terms:
            # Repeated like Trainer's own losses, so that the gathering drops what fills the last
            # batch up.
            terms = torch.stack(list(self._terms.values())).repeat(self.args.eval_batch_size, 1)
            self._eval_terms.append(self.gather_function(terms).cpu())
        return prediction

    @contextmanager
    def _loss_without_labels(self, inputs: Mapping[str, Tensor]) -> Iterator[bool]:
        """Has Trainer ask for the loss of a batch that needs no labels for it, and has none."""
        names, can_return = self.label_names, self.can_return_loss
        needed = self.objective.needs_labels(per_token=not _is_of_sequences(self.model))
        unlabelled = not needed and any(inputs.get(name) is None for name in names)
        if unlabelled:
            self.label_names, self.can_return_loss = [], True
        try:
            yield unlabelled
        finally:
            self.label_names, self.can_return_loss = names, can_return

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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.projections is not None:
            directory = Path(self.args.output_dir if output_dir is None else output_dir)
            with self._saving(directory, directory):
                self.projections.save(directory, write=self.args.should_save)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.projections is not None:
            self.projections.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.projections is not None:
            self.projections.load(self.state.best_model_checkpoint)

    @property
    def projections(self) -> Projections | None:
        """What the objective learns beside the student; `load` takes another training's."""
        if self._features is None or len(self._features.projections) == 0:
            return None
        return self._features.projections

    def _set_signature_columns_if_needed(self) -> None:
        # Trainer drops dataset columns that the student does not name; the teacher may need them.
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns += sorted(self._teacher_only)
            if self.teacher_cache is not None:
                self._signature_columns.append(SAMPLE)


def _is_of_sequences(model: nn.Module) -> bool:
    return type(without_adapter(model)).__name__.endswith("ForSequenceClassification")


def _add_decoder_inputs(
    owner: str, model: nn.Module, inputs: dict[str, object], labels: Tensor | None
) -> None:
    """What an encoder-decoder makes of labels itself, where it gets them."""
    if DECODER_INPUTS & inputs.keys():
        return
    model = without_adapter(model)
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if make is None or labels is None:
        reason = "there are no labels to make them of"
        if labels is not None:
            reason = f"{type(model).__name__} makes none of labels"
        raise ValueError(f"the batch must have decoder_input_ids for the {owner}: {reason}")
    inputs["decoder_input_ids"] = make(labels)


def _check_looks_back(owner: str, model: nn.Module | None) -> None:
    """That a model which is to predict the next token does not see it."""
    if looks_ahead(getattr(model, "config", None)):
        raise ValueError(
            f"the {owner} ({type(model).__name__}) sees the tokens that it is to predict: its "
            "config must have is_decoder=True, unless shift_labels says what is meant"
        )


def looks_ahead(config: object) -> bool:
    """Whether a config is that of an encoder, whose language model looks both ways."""
    encoders = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation"}
    return (
        getattr(config, "model_type", None) in encoders
        and not getattr(config, "is_encoder_decoder", False)
        and getattr(config, "is_decoder", None) is False
    )


def _is_causal(model: nn.Module) -> bool:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or str(
        getattr(model, "loss_type", None)
    ) in ("ForCausalLM", "ForConditionalGeneration")
