"""One run of `kdfast distill`: what it reads, trains, and leaves behind."""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import os
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
import yaml
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

import kdfast
from kdfast import files
from kdfast.cli import config
from kdfast.cli.errors import CommandError, need, reason_of, reporting
from kdfast.cli.inputs import (
    AUTO_CLASSES,
    Data,
    architecture_for,
    cached_tokenizer,
    check_dataset,
    check_model,
    check_other_teacher,
    fixed_blocks,
    has_weights,
    load_blocks,
    load_config,
    load_model,
    load_tokenizer,
    open_cache,
    settle_data,
    students_tokenizer,
    teachers_tokenizer,
)
from kdfast.cli.options import DEFAULT_SEED, LANGUAGE_TASKS, check_device
from kdfast.cli.progress import no_loading_bars, on_terminal, print_lines
from kdfast.cli.report import results_of, train_alone, write_comparison
from kdfast.cli.resume import RESULTS, Before
from kdfast.cli.students import student_config
from kdfast.cli.tasks import (
    CLASSIFICATIONS,
    Prepared,
    check_same_classes,
    load_classifier,
    prepare,
)
from kdfast.trainer import (
    RECIPES,
    BiLSTMConfig,
    DistillationTrainer,
    Ensemble,
    Objective,
    Recipe,
    TruncatedLogits,
    initialise_from_teacher,
    token_vectors,
)
from kdfast.trainer.cached import fitted
from kdfast.trainer.features import FeatureLoss, FeatureTerm
from kdfast.trainer.text import EpochMasks
from kdfast.trainer.trainer import looks_ahead

if TYPE_CHECKING:
    from datasets import Dataset

    from kdfast.teacher_cache import TeacherCache

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

# And the other way round: what `training` must leave to flags.
FLAGS_OF_TRAINING = {
    "output_dir": "--output",
    "seed": "--seed",
    "use_cpu": "--device",
    "bf16": "--bf16",
    "fp16": "--fp16",
    "resume_from_checkpoint": "--resume",
}

# The kinds of values that a file may hold.
KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word",
    dict: "a mapping",
    list: "a list",
    type(None): "null",
}

# Flags that say nothing to a language model.
OF_CLASSIFIERS = ("eval_dataset", "label_column", "text_pair_column")


class Run:
    """A run, of which everything is read but the models' weights, and checked, when it is made.

    Args:
        settings: of `kdfast.cli.config.stages_of`.
        earlier: the runs before it, with one of whose students it may begin.
    """

    def __init__(self, settings: argparse.Namespace, earlier: Sequence[Run] = ()) -> None:
        self.settings = settings
        self.former = next((run for run in earlier if run.leaves(settings.student)), None)
        self.followers: list[Run] = []
        if self.former is not None:
            self.former.followers.append(self)
        self._check_files()
        if settings.seed is None:
            settings.seed = DEFAULT_SEED
        check_device(settings.device)
        if (
            settings.bf16
            and settings.device != "cpu"
            and not (is_torch_bf16_gpu_available() or is_torch_xla_available())
        ):
            raise CommandError("--bf16: torch sees no GPU that has it: pass --device cpu as well")
        self.cache: TeacherCache | None = None
        self.vectors: tuple[torch.Tensor, torch.Tensor] | None = None
        if settings.teacher_cache is not None:
            self.cache = open_cache(settings.teacher_cache)
            _take_data_from(self.cache, settings)
        self.recipe = self._recipe()
        self._check_flags()
        before = Before(
            settings.output, resume=bool(settings.resume), stage=settings.name is not None
        )
        self.checkpoint = before.checkpoint
        self.chosen_arguments = self._chosen_arguments()
        self._read()
        self._check_objective()
        if len(self.prepared.held_out) == 0:
            self.chosen_arguments["eval_strategy"] = "no"
        self._check_report()
        arguments = self._training_arguments()
        self.optimizer = self._optimizer(arguments)
        self.text = config.text_of(self._resolved(arguments))
        resolved = yaml.safe_load(self.text)
        before.check_goes_on(resolved)
        self.finished = before.is_finished(resolved)

    def __call__(self) -> None:
        settings, prepared = self.settings, self.prepared
        if self.finished:
            print(f"{settings.output} is finished")
            return
        self._check_followers()
        # Once more: those of a later run have set what a process has one of.
        arguments = self._training_arguments()
        set_seed(settings.seed)
        teacher = self._teacher()
        student = self._student(teacher)
        untrained = copy.deepcopy(student) if settings.student_alone else None
        with reporting():
            trainer = DistillationTrainer(
                model=student,
                args=arguments,
                teacher=teacher,
                teacher_cache=self.cache,
                objective=self.recipe.objective,
                vocab_size=self.vocab_size,
                train_dataset=prepared.train,
                eval_dataset=prepared.held_out,
                processing_class=self.tokenizer,
                data_collator=prepared.collator,
                compute_metrics=prepared.compute_metrics,
                callbacks=[*prepared.callbacks],
                optimizer_cls_and_kwargs=self.optimizer,
            )
            self._take_projections(trainer)
            if self.optimizer is None:
                # It may need a package.
                trainer.get_optimizer_cls_and_kwargs(arguments, student)
        print_lines(trainer, settings.name or "")
        trainer.beside = {config.FILE: self.text}
        main = trainer.is_world_process_zero()
        try:
            if main:
                self._write(config.FILE, self.text)
            trainer.train(resume_from_checkpoint=self.checkpoint)
            trainer.save_model()
            trainer.save_state()
            results = results_of(trainer, resumed=self.checkpoint is not None)
            if settings.report:
                alone = None if untrained is None else train_alone(untrained, trainer, prepared)
                results |= write_comparison(trainer, prepared, alone)
            if main:
                self._write(RESULTS, json.dumps(results, indent=2) + "\n")
        except (ImportError, OSError, TypeError, ValueError) as error:
            # What a batch, a disk or the optimiser had against it.
            raise CommandError(reason_of(error)) from error
        if main:
            print(f"student saved to {settings.output}")

    def leaves(self, student: object) -> bool:
        """Whether this is the path of the student that the run will leave."""
        output = os.path.abspath(self.settings.output)
        return isinstance(student, Path) and os.path.abspath(student) == output

    def _write(self, name: str, text: str) -> None:
        self.settings.output.mkdir(parents=True, exist_ok=True)
        files.write(self.settings.output / name, text.encode())

    def _check_followers(self) -> None:
        """That no run has begun with the student that this one is about to replace."""
        for follower in self.followers:
            output = follower.settings.output
            if (output / config.FILE).exists():
                raise CommandError(
                    f"{output} began with the student in {self.settings.output}, which will now be "
                    f"another: remove {output}"
                )
            follower._check_followers()

    def _check_files(self) -> None:
        settings = self.settings
        for path in settings.teacher or ():
            check_model("teacher", path)
        if isinstance(settings.student, Path) and self.former is None:
            check_model("student", settings.student)
        check_dataset(settings.dataset)
        check_dataset(settings.eval_dataset or (), "--eval-dataset")
        if settings.vectors is not None:
            check_dataset([settings.vectors], "--vectors")

    def _check_flags(self) -> None:
        """Those that go with others."""
        settings = self.settings
        teachers = len(settings.teacher or ())
        if settings.student is None and self.recipe.student_config is None:
            raise CommandError(
                "the following arguments are required: --student: the recipe prescribes none"
            )
        if settings.teacher_weights is not None and teachers < 2:
            raise CommandError("--teacher-weights: there is one teacher")
        if settings.teacher_weights is not None and len(settings.teacher_weights) != teachers:
            raise CommandError(
                f"--teacher-weights: there are {teachers} teachers, and "
                f"{len(settings.teacher_weights)} weights"
            )
        if settings.offload is not None and teachers < 2:
            raise CommandError(f"--offload {settings.offload}: there is one teacher")
        if settings.student_alone and not settings.report:
            raise CommandError("--student-alone is for --report")
        if settings.student_alone and self.former is not None:
            raise CommandError(
                "--student-alone begins where the stage does, with a student that has had a teacher"
            )
        if settings.report:
            need("--report", "matplotlib", extra="report")
            if teachers != 1:
                raise CommandError("--report compares with one teacher: pass one --teacher")
        if self.recipe.objective.features and teachers != 1:
            raise CommandError("the objective looks inside the teacher: pass one --teacher")
        for flag, asked in (
            ("--initialise", settings.initialise not in (None, False)),
            ("--vectors", settings.vectors is not None),
        ):
            if asked and self.former is None and not self._is_fresh():
                raise CommandError(
                    f"{flag} is for a fresh student, and --student {settings.student} has weights"
                )
        if self._initialises() and teachers != 1:
            raise CommandError("--initialise takes the layers of one teacher: pass one --teacher")

    def _is_fresh(self) -> bool:
        """Whether the student begins without weights of its own."""
        path = self.settings.student
        return self.former is None and not (isinstance(path, Path) and has_weights(path))

    def _initialises(self) -> bool:
        """Whether the student begins with layers of the teacher."""
        chosen = self.settings.initialise
        return self._is_fresh() and (
            self.recipe.initialise if chosen is None else chosen is not False
        )

    def _check_report(self) -> None:
        if not self.settings.report:
            return
        if len(self.prepared.held_out) == 0:
            raise CommandError("--report needs held-out data: raise --eval-fraction")
        if self.prepared.metric == "loss":
            raise CommandError("--report needs labels: pass --label-column")

    def _check_objective(self) -> None:
        """What would come to light with the models, or with the first batch."""
        objective, task = self.recipe.objective, self.data.task
        if objective.features:
            self._check_features(objective.features)
        if self.cache is not None:
            with reporting():
                fitted(objective, self.cache)
            return
        soft = objective.soft
        if soft is None:
            return
        if self.prepared.student_settings.get("problem_type") == "regression":
            raise CommandError(
                "the teacher predicts a number, which is no distribution: train towards LogitMSE, "
                "as the recipe bilstm does"
            )
        if soft.tokens == "all" and task in ("sequence-classification", "question-answering"):
            raise CommandError(
                f"the objective has tokens='all', and of {task} there is no distribution per token"
            )
        classes = None
        if task in LANGUAGE_TASKS:
            classes = self.vocab_size
        elif task in CLASSIFICATIONS:
            classes = self.teacher_configs[0].num_labels
        truncated = isinstance(soft, TruncatedLogits) and soft.draws is None
        if truncated and classes is not None and soft.k > classes:
            raise CommandError(f"k must be at most the teacher's {classes} columns, got {soft.k}")

    def _check_features(self, terms: Sequence[FeatureTerm]) -> None:
        """That both models have what the terms compare."""
        if self.chosen_arguments.get("torch_compile"):
            raise CommandError(
                "training.torch_compile hides the student's inside, at which the objective looks"
            )
        auto = getattr(transformers, AUTO_CLASSES[self.data.task])
        # Models without their weights.
        with reporting("objective"), torch.device("meta"):
            student, teacher = (
                auto.from_config(copy.deepcopy(model_config))
                for model_config in (self.student_config, *self.teacher_configs)
            )
            FeatureLoss(terms, student, teacher)

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
            _check_terms(settings.objective)
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

    def _chosen_arguments(self) -> dict[str, object]:
        """Those of transformers.TrainingArguments that kdfast, the recipe or the user choose."""
        settings = self.settings
        known = {field.name: field.type for field in fields(TrainingArguments)}
        for name, value in settings.training.items():
            if name in FLAGS_OF_TRAINING:
                raise CommandError(f"training.{name} has a flag: pass {FLAGS_OF_TRAINING[name]}")
            if name not in known:
                raise CommandError(f"training.{name} is no argument of TrainingArguments")
            kinds = _kinds_of(known[name])
            whole = type(value) is int and float in kinds
            # fsdp may be true, which its annotation leaves out.
            if kinds and type(value) not in kinds and not whole and name != "fsdp":
                allowed = " or ".join(text for kind, text in KINDS.items() if kind in kinds)
                raise CommandError(f"training.{name} must be {allowed}, got {value!r}")
        given = {
            argument: getattr(settings, flag)
            for flag, argument in TRAINING_FLAGS.items()
            if getattr(settings, flag) is not None
        }
        if settings.batch_size is not None:
            given["per_device_eval_batch_size"] = settings.batch_size
        evaluates = settings.eval_dataset or settings.eval_fraction != 0
        return {
            "learning_rate": 1e-4,
            "logging_steps": 10,
            "eval_strategy": "epoch" if evaluates else "no",
            **self.recipe.training_arguments,
            **settings.training,
            **given,
        }

    def _training_arguments(self) -> TrainingArguments:
        settings = self.settings
        with reporting():
            return TrainingArguments(
                **{"disable_tqdm": not on_terminal(), **self.chosen_arguments},
                output_dir=str(settings.output),
                seed=settings.seed,
                use_cpu=settings.device == "cpu",
                bf16=bool(settings.bf16),
                fp16=bool(settings.fp16),
            )

    def _optimizer(
        self, arguments: TrainingArguments
    ) -> tuple[type[torch.optim.Optimizer], dict[str, object]] | None:
        """One that a file or the recipe names; None for that of the training arguments."""
        if self.settings.optimizer:
            options = dict(self.settings.optimizer)
            name = options.pop("name", None)
            if name is None:
                raise CommandError("optimizer needs the name of one of torch.optim")
            kind = getattr(torch.optim, str(name), None)
            if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
                raise CommandError(f"optimizer: torch.optim has no {name!r}")
            if "lr" in options:
                raise CommandError("optimizer: lr is --learning-rate")
        elif self.recipe.optimizer is not None:
            kind, options = self.recipe.optimizer
        else:
            return None
        options = {**options, "lr": arguments.learning_rate}
        with reporting(f"optimizer: {kind.__name__}"):
            kind([torch.nn.Parameter(torch.zeros(1, 1))], **options)
        return kind, options

    def _read(self) -> None:
        """Tokenizer, data, the configs of student and teachers, and the tokens that both have."""
        settings, cache = self.settings, self.cache
        teachers = [load_config("teacher", path) for path in settings.teacher or ()]
        if cache is None:
            tokenizer = teachers_tokenizer(settings.teacher[0], teachers[0].vocab_size)
            for path, teacher in list(zip(settings.teacher, teachers, strict=True))[1:]:
                check_other_teacher(path, teacher.vocab_size, tokenizer)
        else:
            tokenizer = cached_tokenizer(cache)
        own = None
        if self.former is not None:
            student, own = self.former._student_as_saved(), self.former.tokenizer
        else:
            student = student_config(
                settings.student,
                self.recipe.student_config,
                teachers[0] if teachers else None,
                len(tokenizer),
                pairs=settings.text_pair_column is not None and _tells_apart(tokenizer),
                vectors=settings.vectors is not None,
            )
            if isinstance(settings.student, Path):
                own = load_tokenizer("student", settings.student)
        tokenizer = students_tokenizer(own, student.vocab_size, tokenizer)
        if settings.vectors is not None and self._is_fresh():
            self._read_vectors(student, tokenizer)
        # The order of cached blocks and their masks are the cache's; training has its own seed.
        seed = settings.seed if cache is None else cache.manifest["data"]["seed"]
        data = settle_data(settings, seed, tokenizer, student, *teachers)
        architecture_for("student", student, data.task)
        if data.task == "causal-lm":
            if looks_ahead(student) and self._is_fresh():
                student.is_decoder = True
            for owner, model in [("student", student), *(("teacher", one) for one in teachers)]:
                if looks_ahead(model):
                    raise CommandError(
                        f"the {owner} is a {model.model_type} that sees the tokens which it is to "
                        "predict: its config.json must have is_decoder: true"
                    )
        self.tokenizer, self.data = tokenizer, data
        self.student_config, self.teacher_configs = student, teachers
        self.vocab_size: int | None = None
        if data.task not in LANGUAGE_TASKS:
            self.prepared = self._prepare_rows()
            return
        for name in OF_CLASSIFIERS:
            if getattr(settings, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise CommandError(f"{flag} says nothing to a language model")
        self.prepared = self._prepare_blocks(data, tokenizer)
        # Widths may differ by padding alone, which holds no token.
        self.vocab_size = (
            min(model.vocab_size for model in (student, *teachers))
            if cache is None
            else cache.vocab_size
        )

    def _read_vectors(self, student: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """What the student's embeddings begin with; they are as wide, if nothing else is said."""
        path, chosen = self.settings.vectors, self.settings.student
        if not isinstance(student, BiLSTMConfig):
            raise CommandError(
                f"--vectors is for a BiLSTM, and the student is a {student.model_type}"
            )
        with reporting("--vectors"):
            self.vectors = token_vectors(tokenizer, path)
        width = self.vectors[1].shape[1]
        if chosen is None or (isinstance(chosen, Mapping) and "embedding_size" not in chosen):
            student.embedding_size = width
        if student.embedding_size != width:
            raise CommandError(
                f"--vectors {path} has vectors of {width} numbers, and the student an "
                f"embedding_size of {student.embedding_size}"
            )

    def _prepare_rows(self) -> Prepared:
        settings, data, (first, *others) = self.settings, self.data, self.teacher_configs
        prepared = prepare(
            data.task,
            settings.dataset,
            tokenizer=self.tokenizer,
            teacher_config=first,
            text_column=data.text_column,
            text_pair_column=settings.text_pair_column,
            label_column=settings.label_column,
            max_length=data.block_size,
            eval_fraction=data.eval_fraction,
            seed=data.seed,
            eval_files=settings.eval_dataset,
        )
        classes = prepared.student_settings
        for path, other in zip(settings.teacher[1:], others, strict=True):
            whose = f"the teacher in {path}"
            check_same_classes(whose, other, data.task, classes, "the first teacher")
        if not self._is_fresh():
            whose = f"the student in {settings.student}"
            check_same_classes(whose, self.student_config, data.task, classes)
        # Of sequences alone, labels may be missing.
        labelled = prepared.metric != "loss"
        if not labelled and self.recipe.objective.needs_labels(per_token=False):
            raise CommandError("the objective needs labels: pass --label-column")
        return prepared

    def _student_as_saved(self) -> PreTrainedConfig:
        """What the config beside the student will say."""
        student = copy.deepcopy(self.student_config)
        for name, value in self.prepared.student_settings.items():
            setattr(student, name, value)
        student.architectures = [architecture_for("student", student, self.data.task)]
        return student

    def _prepare_blocks(self, data: Data, tokenizer: PreTrainedTokenizerBase) -> Prepared:
        train, held_out = load_blocks(self.settings.dataset, data, tokenizer)
        collator, callbacks = default_data_collator, ()
        if self.cache is not None:
            train, held_out = fixed_blocks(train, held_out, data, tokenizer)
            train, held_out = _attach(self.cache, train, held_out)
        elif data.task == "masked-lm":
            collator = EpochMasks(tokenizer, data.mlm_probability, data.seed)
            callbacks = (collator,)
        return Prepared(
            train=train,
            held_out=held_out,
            collator=collator,
            metric="perplexity",
            greater_is_better=False,
            compute_metrics=None,
            student_settings={},
            callbacks=callbacks,
        )

    def _teacher(self) -> PreTrainedModel | Ensemble | None:
        settings, task = self.settings, self.data.task
        if self.cache is not None:
            return None
        load = load_model if task in LANGUAGE_TASKS else load_classifier
        loaders = [
            partial(load, "teacher", path, model_config, task)
            for path, model_config in zip(settings.teacher, self.teacher_configs, strict=True)
        ]
        if len(loaders) == 1:
            return loaders[0]()
        vocab_size = None
        if task in LANGUAGE_TASKS:
            vocab_size = min(model_config.vocab_size for model_config in self.teacher_configs)
        if settings.offload == "disk":
            # Each is called whenever its teacher's turn comes.
            members = [no_loading_bars()(load) for load in loaders]
        else:
            members = [load() for load in loaders]
        with reporting():
            return Ensemble(
                members,
                weights=settings.teacher_weights,
                vocab_size=vocab_size,
                offload=settings.offload == "cpu",
            )

    def _student(self, teacher: PreTrainedModel | Ensemble | None) -> PreTrainedModel:
        settings, task = self.settings, self.data.task
        path = settings.student if isinstance(settings.student, Path) else None
        own = self.student_config if self.former is None else load_config("student", path)
        if task in LANGUAGE_TASKS:
            student = load_model("student", path, own, task)
        else:
            student = load_classifier("student", path, own, task, self.prepared.student_settings)
        if self.vectors is not None:
            tokens, vectors = self.vectors
            print(
                f"kdfast: {len(tokens)} of {len(self.tokenizer)} tokens begin with a vector of "
                f"{settings.vectors}",
                file=sys.stderr,
            )
            student.load_embeddings(vectors, tokens)
        if self._initialises():
            with reporting("cannot initialise the student"):
                initialise_from_teacher(student, teacher, settings.initialise or None)
        return student

    def _take_projections(self, trainer: DistillationTrainer) -> None:
        """Those that were learnt beside the student, where the objective has the same."""
        path = self.settings.student
        projections = trainer.projections
        if isinstance(path, Path) and projections is not None and projections.fits(path):
            projections.load(path)

    def _resolved(self, arguments: TrainingArguments) -> dict[str, object]:
        """All settings with their defaults filled in, as a file that repeats the run."""
        settings, data = self.settings, self.data
        own_student = self.student_config.to_diff_dict()
        # It stands among the versions, and makes no other student.
        own_student.pop("transformers_version", None)
        optimizer = None
        if self.optimizer is not None:
            kind, options = self.optimizer
            optimizer = {"name": kind.__name__, **options}
            del optimizer["lr"]
        chosen = {
            "objective": self.recipe.objective.to_config(),
            "teacher": settings.teacher,
            "teacher_cache": settings.teacher_cache,
            "teacher_weights": settings.teacher_weights,
            "offload": settings.offload,
            "student": settings.student or own_student,
            "vectors": None if self.vectors is None else settings.vectors,
            "initialise": self._initialises() and (settings.initialise or True),
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
            "training": self._training_settings(arguments),
            "optimizer": optimizer,
            "versions": {
                "kdfast": kdfast.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        return {n: value for n, value in chosen.items() if value is not None and value is not False}

    def _training_settings(self, arguments: TrainingArguments) -> dict[str, object]:
        """What was chosen, be it the default too, and what comes of it."""
        # Bars are a matter of where it runs.
        same = {
            name: getattr(arguments, name) for name in ("output_dir", "use_cpu", "disable_tqdm")
        }
        # As the arguments were made: some defaults depend on how much is to be logged.
        with reporting():
            defaults = TrainingArguments(**same)
        own, other = arguments.to_dict(), defaults.to_dict()
        names = [
            field.name
            for field in fields(TrainingArguments)
            if field.init and field.name in own and field.name not in FLAGS_OF_TRAINING
        ]
        return {n: own[n] for n in names if n in self.chosen_arguments or own[n] != other[n]}


def _kinds_of(hint: object) -> set[type]:
    """Of an annotation, the kinds of values that YAML has; none where there are others."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [_kinds_of(part) for part in typing.get_args(hint)]
        return set().union(*kinds) if all(kinds) else set()
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {str}
    return {kind} & KINDS.keys()


def _tells_apart(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether of the tokens of a pair it says which text they are of."""
    return len(set(tokenizer("a", "b").get("token_type_ids", ()))) > 1


def _check_terms(objective: object) -> None:
    for entry in objective if isinstance(objective, list) else ():
        for name, term in entry.items() if isinstance(entry, Mapping) else ():
            if not (term is None or isinstance(term, Mapping)):
                raise CommandError(
                    f"objective: {name} must have a mapping of settings, got {term!r}"
                )


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
