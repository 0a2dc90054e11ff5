"""One run of `kdfast distill`: what it reads, trains, and leaves behind."""

from __future__ import annotations

import argparse
import copy
import inspect
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from transformers import (
    AutoConfig,
    DataCollatorForLanguageModeling,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import kdfast
from kdfast import files
from kdfast.cli import config
from kdfast.cli.errors import CommandError, reporting
from kdfast.cli.inputs import (
    Data,
    cached_tokenizer,
    check_dataset,
    check_model,
    fixed_blocks,
    has_weights,
    load_blocks,
    load_config,
    load_model,
    open_cache,
    settle_data,
    students_tokenizer,
    teachers_tokenizer,
)
from kdfast.cli.options import DEFAULT_SEED, LANGUAGE_TASKS, check_device
from kdfast.cli.report import results_of, train_alone, write_comparison
from kdfast.cli.tasks import Prepared, load_classifier, prepare
from kdfast.trainer import (
    RECIPES,
    DistillationTrainer,
    Ensemble,
    Objective,
    Recipe,
    initialise_from_teacher,
)
from kdfast.trainer.checkpoints import UNFINISHED, CheckpointError, last_checkpoint
from kdfast.trainer.projections import FILE as PROJECTIONS

if TYPE_CHECKING:
    from datasets import Dataset

    from kdfast.teacher_cache import TeacherCache

# Written last: a run that has this needs nothing done again.
RESULTS = "results.json"

# The flags that stand for an argument of transformers.TrainingArguments each.
TRAINING_FLAGS = {
    "epochs": "num_train_epochs",
    "max_steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps",
    "learning_rate": "learning_rate",
    "logging_steps": "logging_steps",
    "save_steps": "save_steps",
}

# What a fresh student has from its teacher, where its recipe cannot know it.
FROM_TEACHER = (
    "vocab_size",
    "max_position_embeddings",
    "type_vocab_size",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


class Run:
    """A run with all its settings, which are checked when it is made.

    Args:
        settings: of `kdfast.cli.config.stages_of`.
    """

    def __init__(self, settings: argparse.Namespace) -> None:
        self.settings = settings
        for path in settings.teacher or ():
            check_model("teacher", path)
        if isinstance(settings.student, Path) and settings.student != settings.follows:
            check_model("student", settings.student)
        check_dataset(settings.dataset)
        check_dataset(settings.eval_dataset or ())
        if settings.seed is None:
            settings.seed = DEFAULT_SEED
        check_device(settings.device)
        self.cache: TeacherCache | None = None
        if settings.teacher_cache is not None:
            self.cache = open_cache(settings.teacher_cache)
            _take_data_from(self.cache, settings)
        self.recipe = self._recipe()
        if settings.student is None and self.recipe.student_config is None:
            raise CommandError(
                "the following arguments are required: --student: the recipe prescribes none"
            )
        if settings.student_alone and not settings.report:
            raise CommandError("--student-alone is for --report")
        if settings.report and (self.cache is not None or len(settings.teacher) > 1):
            raise CommandError("--report compares with one teacher: pass one --teacher")
        self.checkpoint = self._checkpoint_to_resume()

    def __call__(self) -> None:
        settings = self.settings
        arguments = self._training_arguments()
        tokenizer, data, prepared, configs, vocab_size = self._read()
        if len(prepared.held_out) == 0:
            arguments.eval_strategy = "no"
            if settings.report:
                raise CommandError("--report needs held-out data: raise --eval-fraction")
        if settings.report and prepared.metric == "loss":
            raise CommandError("--report needs labels: pass --label-column")
        text = config.text_of(self._resolved(data, arguments, configs[0]))
        if settings.resume and self._finished(text):
            print(f"{settings.output} is finished")
            return

        set_seed(settings.seed)
        teacher = self._teacher(configs[1:], data)
        student = self._student(configs[0], data, prepared, teacher)
        untrained = copy.deepcopy(student) if settings.student_alone else None
        with reporting():
            trainer = DistillationTrainer(
                model=student,
                args=arguments,
                teacher=teacher,
                teacher_cache=self.cache,
                objective=self.recipe.objective,
                vocab_size=vocab_size,
                train_dataset=prepared.train,
                eval_dataset=prepared.held_out,
                processing_class=tokenizer,
                data_collator=prepared.collator,
                compute_metrics=prepared.compute_metrics,
                optimizer_cls_and_kwargs=self._optimizer(arguments),
            )
            self._take_projections(trainer)
        main = trainer.is_world_process_zero()
        if main:
            self._write(config.FILE, text)
        trainer.add_callback(_ConfigBesideCheckpoints(text))
        try:
            trainer.train(resume_from_checkpoint=self.checkpoint)
            trainer.save_model()
            trainer.save_state()
        except CheckpointError as error:
            raise CommandError(str(error)) from error
        results = results_of(trainer)
        if settings.report:
            alone = None if untrained is None else train_alone(untrained, trainer, prepared)
            results |= write_comparison(trainer, prepared, alone)
        if main:
            self._write(RESULTS, json.dumps(results, indent=2) + "\n")
            print(f"student saved to {settings.output}")

    def _write(self, name: str, text: str) -> None:
        self.settings.output.mkdir(parents=True, exist_ok=True)
        files.write(self.settings.output / name, text.encode())

    def _recipe(self) -> Recipe:
        settings = self.settings
        flags = {
            name: value
            for name in ("temperature", "alpha", "k", "tail")
            if (value := getattr(settings, name)) is not None
        }
        if settings.objective is not None:
            for name in (*flags, *settings.settings):
                raise CommandError(f"{name} is a setting of a recipe: write it into the objective")
            with reporting():
                return Recipe(Objective.from_config(settings.objective))
        if settings.recipe not in RECIPES:
            raise CommandError(
                f"unknown recipe {settings.recipe!r}: choose from {', '.join(RECIPES)}"
            )
        make = RECIPES[settings.recipe]
        names = inspect.signature(make).parameters
        for name in flags:
            if name not in names:
                raise CommandError(f"--{name} is no setting of the recipe {settings.recipe}")
        for name in settings.settings:
            if name not in names:
                has = f"has {', '.join(names)}" if names else "has none"
                raise CommandError(
                    f"settings.{name} is no setting of the recipe {settings.recipe}, which {has}"
                )
        chosen = {**settings.settings, **flags}
        if self.cache is not None and "temperature" in names:
            given = chosen.setdefault("temperature", self.cache.temperature)
            if given != self.cache.temperature:
                raise CommandError(
                    f"--temperature {given}: the teacher cache in {self.cache.directory} was "
                    f"built at {self.cache.temperature}"
                )
        with reporting():
            return make(**chosen)

    def _checkpoint_to_resume(self) -> str | None:
        output, resume = self.settings.output, self.settings.resume
        if output.exists() and not output.is_dir():
            raise CommandError(f"--output {output} is not a directory")
        checkpoint = last_checkpoint(output)
        # A stage may have been killed before it began, or before its first checkpoint.
        begun = checkpoint is not None or (output / config.FILE).exists()
        if resume and not begun and self.settings.name is None:
            raise CommandError(f"--resume: there is no checkpoint in {output}")
        left = [path for path in output.glob("*") if not path.name.startswith(UNFINISHED)]
        if not resume and left:
            advice = "--resume to go on from its last checkpoint, or " if begun else ""
            raise CommandError(f"--output {output} is not empty: pass {advice}another directory")
        return checkpoint

    def _finished(self, text: str) -> bool:
        """Whether these very settings have been run to their end."""
        output = self.settings.output
        made = output / config.FILE
        return (
            (output / RESULTS).is_file()
            and made.is_file()
            and made.read_text(encoding="utf-8") == text
        )

    def _training_arguments(self) -> TrainingArguments:
        settings = self.settings
        given = {
            argument: getattr(settings, flag)
            for flag, argument in TRAINING_FLAGS.items()
            if getattr(settings, flag) is not None
        }
        if settings.batch_size is not None:
            given["per_device_eval_batch_size"] = settings.batch_size
        evaluates = settings.eval_fraction is None or settings.eval_fraction > 0
        chosen = {
            "learning_rate": 1e-4,
            "logging_steps": 10,
            "eval_strategy": "epoch" if evaluates else "no",
            **self.recipe.training_arguments,
            **settings.training,
            **given,
            "output_dir": str(settings.output),
            "seed": settings.seed,
            "use_cpu": settings.device == "cpu",
            "bf16": settings.bf16,
            "fp16": settings.fp16,
        }
        known = {field.name for field in fields(TrainingArguments)}
        for name in settings.training:
            if name not in known:
                raise CommandError(f"training.{name} is no argument of TrainingArguments")
        with reporting():
            return TrainingArguments(**chosen)

    def _optimizer(
        self, arguments: TrainingArguments
    ) -> tuple[type[torch.optim.Optimizer], dict[str, object]] | None:
        """One that a file or the recipe names; None for that of the training arguments."""
        if self.settings.optimizer:
            options = dict(self.settings.optimizer)
            name = options.pop("name", None)
            kind = getattr(torch.optim, str(name), None)
            if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
                raise CommandError(f"optimizer: torch.optim has no {name!r}")
        elif self.recipe.optimizer is not None:
            kind, options = self.recipe.optimizer
        else:
            return None
        return kind, {**options, "lr": arguments.learning_rate}

    def _read(
        self,
    ) -> tuple[PreTrainedTokenizerBase, Data, Prepared, list[PreTrainedConfig], int | None]:
        """Tokenizer, data, the configs of student and teachers, and the tokens that both have."""
        settings, cache = self.settings, self.cache
        teachers = [load_config("teacher", path) for path in settings.teacher or ()]
        if cache is None:
            tokenizer = teachers_tokenizer(settings.teacher[0], teachers[0].vocab_size)
        else:
            tokenizer = cached_tokenizer(cache)
        student = self._student_config(teachers, len(tokenizer))
        if isinstance(settings.student, Path):
            tokenizer = students_tokenizer(settings.student, student.vocab_size, tokenizer)
        # The order of cached blocks and their masks are the cache's; training has its own seed.
        seed = settings.seed if cache is None else cache.manifest["data"]["seed"]
        data = settle_data(settings, seed, tokenizer, student, *teachers)
        vocab_size = None
        if data.task in LANGUAGE_TASKS:
            prepared = self._prepare_blocks(data, tokenizer)
            # Widths may differ by padding alone, which holds no token.
            vocab_size = (
                min(model.vocab_size for model in (student, *teachers))
                if cache is None
                else cache.vocab_size
            )
        else:
            prepared = prepare(
                data.task,
                settings.dataset,
                tokenizer=tokenizer,
                teacher_config=teachers[0],
                text_column=data.text_column,
                text_pair_column=settings.text_pair_column,
                label_column=settings.label_column,
                max_length=data.block_size,
                eval_fraction=data.eval_fraction,
                seed=data.seed,
                eval_files=settings.eval_dataset,
            )
            # Of sequences alone, labels may be missing.
            labelled = prepared.metric != "loss"
            if not labelled and self.recipe.objective.needs_labels(per_token=False):
                raise CommandError("the objective needs labels: pass --label-column")
        return tokenizer, data, prepared, [student, *teachers], vocab_size

    def _prepare_blocks(self, data: Data, tokenizer: PreTrainedTokenizerBase) -> Prepared:
        train, held_out = load_blocks(self.settings.dataset, data, tokenizer)
        collator = default_data_collator
        if self.cache is not None:
            train, held_out = fixed_blocks(train, held_out, data, tokenizer)
            train, held_out = _attach(self.cache, train, held_out)
        elif data.task == "masked-lm":
            collator = DataCollatorForLanguageModeling(
                tokenizer, mlm_probability=data.mlm_probability
            )
        return Prepared(
            train=train,
            held_out=held_out,
            collator=collator,
            metric="perplexity",
            greater_is_better=False,
            compute_metrics=None,
            student_settings={},
        )

    def _student_config(
        self, teachers: list[PreTrainedConfig], vocab_size: int
    ) -> PreTrainedConfig:
        chosen = self.settings.student
        if isinstance(chosen, Path):
            return load_config("student", chosen)
        if isinstance(chosen, Mapping):
            model_type = chosen.get("model_type")
            if model_type is None:
                raise CommandError("student must have a model_type, as in a config.json")
            with reporting("student"):
                return AutoConfig.for_model(**chosen)
        student = self.recipe.student_config
        source = teachers[0] if teachers else None
        known = {name: getattr(source, name, None) for name in FROM_TEACHER}
        if source is None:
            known["vocab_size"] = vocab_size
        changes = {
            name: value
            for name, value in known.items()
            if value is not None and hasattr(student, name)
        }
        return type(student).from_dict({**student.to_dict(), **changes})

    def _teacher(
        self, configs: list[PreTrainedConfig], data: Data
    ) -> PreTrainedModel | Ensemble | None:
        settings = self.settings
        if self.cache is not None:
            return None
        load = load_model if data.task in LANGUAGE_TASKS else load_classifier
        models = [
            load("teacher", path, model_config, data.task)
            for path, model_config in zip(settings.teacher, configs, strict=True)
        ]
        if len(models) == 1:
            if settings.teacher_weights is not None:
                raise CommandError("--teacher-weights: there is one teacher")
            return models[0]
        vocab_size = None
        if data.task in LANGUAGE_TASKS:
            vocab_size = min(model_config.vocab_size for model_config in configs)
        with reporting():
            return Ensemble(models, weights=settings.teacher_weights, vocab_size=vocab_size)

    def _student(
        self,
        student_config: PreTrainedConfig,
        data: Data,
        prepared: Prepared,
        teacher: PreTrainedModel | Ensemble | None,
    ) -> PreTrainedModel:
        settings = self.settings
        path = settings.student if isinstance(settings.student, Path) else None
        if data.task in LANGUAGE_TASKS:
            student = load_model("student", path, student_config, data.task)
        else:
            student = load_classifier(
                "student", path, student_config, data.task, prepared.student_settings
            )
        if settings.initialise is None and not self._initialises():
            return student
        if teacher is None or isinstance(teacher, Ensemble):
            raise CommandError("--initialise takes the layers of one teacher, and there is none")
        with reporting("cannot initialise the student"):
            initialise_from_teacher(student, teacher, settings.initialise or None)
        return student

    def _take_projections(self, trainer: DistillationTrainer) -> None:
        """Those that the student's former stage has learnt, where this one compares the same."""
        before = self.settings.follows
        has_any = before is not None and (before / PROJECTIONS).is_file()
        if has_any and trainer.projections is not None:
            trainer.projections.load(before)

    def _resolved(
        self, data: Data, arguments: TrainingArguments, student: PreTrainedConfig
    ) -> dict[str, object]:
        """All settings with their defaults filled in, as a file that repeats the run."""
        settings = self.settings
        optimizer = self._optimizer(arguments)
        initialise = settings.initialise
        if initialise == [] or (initialise is None and self._initialises()):
            initialise = True
        chosen = {
            "objective": self.recipe.objective.to_config(),
            "teacher": settings.teacher,
            "teacher_cache": settings.teacher_cache,
            "teacher_weights": settings.teacher_weights,
            "student": settings.student or student.to_diff_dict(),
            "initialise": initialise,
            "dataset": settings.dataset,
            "eval_dataset": settings.eval_dataset,
            "output": settings.output,
            "task": data.task,
            "text_column": data.text_column,
            "text_pair_column": settings.text_pair_column,
            "label_column": settings.label_column,
            "block_size": data.block_size,
            "mlm_probability": data.mlm_probability,
            "eval_fraction": data.eval_fraction,
            "seed": settings.seed,
            "device": settings.device,
            "bf16": settings.bf16,
            "fp16": settings.fp16,
            "report": settings.report,
            "student_alone": settings.student_alone,
            "training": _changed(arguments),
            "optimizer": optimizer and {"name": optimizer[0].__name__, **optimizer[1]},
            "versions": {
                "kdfast": kdfast.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        return {n: value for n, value in chosen.items() if value is not None and value is not False}

    def _initialises(self) -> bool:
        """Whether the recipe has the student begin with layers of the teacher."""
        path = self.settings.student
        fresh = not (isinstance(path, Path) and path.is_dir() and has_weights(path))
        return self.recipe.initialise and fresh


def _changed(arguments: TrainingArguments) -> dict[str, object]:
    """The training arguments that are not transformers' own defaults."""
    defaults = TrainingArguments(output_dir=arguments.output_dir, use_cpu=arguments.use_cpu)
    # These have flags.
    known = {"output_dir", "seed", "use_cpu", "bf16", "fp16"}
    own, other = arguments.to_dict(), defaults.to_dict()
    names = [f.name for f in fields(TrainingArguments) if f.init and f.name in own]
    return {n: own[n] for n in names if n not in known and own[n] != other[n]}


def _take_data_from(cache: TeacherCache, settings: argparse.Namespace) -> None:
    """The cache's data settings in the place of flags that were not given."""
    recorded = cache.manifest["data"]
    names = {"task", "text_column", "block_size", "mlm_probability", "eval_fraction"}
    if not isinstance(recorded, dict) or not {*names, "seed"} <= recorded.keys():
        raise CommandError(
            f"{cache.directory} does not say how its dataset was made: kdfast cache build makes "
            "caches for kdfast distill"
        )
    for name in sorted(names):
        given = getattr(settings, name)
        if given is not None and given != recorded[name]:
            flag = f"--{name.replace('_', '-')}"
            raise CommandError(
                f"{flag} {given}: the teacher cache in {cache.directory} was built with "
                f"{recorded[name]}"
            )
        setattr(settings, name, recorded[name])


def _attach(cache: TeacherCache, train: Dataset, held_out: Dataset) -> tuple[Dataset, Dataset]:
    if len(train) + len(held_out) != len(cache):
        raise CommandError(
            f"the dataset gives {len(train) + len(held_out)} sequences and the teacher cache in "
            f"{cache.directory} holds {len(cache)}: it was built from other files"
        )
    with reporting():
        return (
            cache.attach(train),
            cache.attach(held_out, len(train)) if len(held_out) else held_out,
        )


class _ConfigBesideCheckpoints(TrainerCallback):
    """The run's settings in every checkpoint."""

    def __init__(self, text: str) -> None:
        self._text = text

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: object,
    ) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            files.write(folder / config.FILE, self._text.encode())
