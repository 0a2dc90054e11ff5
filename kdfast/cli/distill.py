"""`kdfast distill`: train a student towards a teacher, or towards a teacher's cache."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import TYPE_CHECKING

from kdfast.cli.errors import CommandError, need, reporting, silence_libraries
from kdfast.cli.inputs import (
    Data,
    cached_tokenizer,
    check_paths,
    fixed_blocks,
    load_blocks,
    load_config,
    load_model,
    open_cache,
    settle_data,
    students_tokenizer,
    teachers_tokenizer,
)
from kdfast.cli.options import (
    AddArgument,
    add_data_options,
    add_dataset,
    add_device,
    add_output,
    add_seed,
    add_teacher,
    bounded,
    check_device,
)

# Imported by the functions that need them: `kdfast env` works without.
if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import DataCollator, PreTrainedTokenizerBase, TrainingArguments

    from kdfast.teacher_cache import TeacherCache
    from kdfast.trainer import Recipe


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "distill",
        help="train a small language model towards a large one",
        description="Train a student language model, causal or masked, towards a teacher's.",
    )
    parser.set_defaults(run=_distill)
    add = parser.add_argument
    add(
        "--recipe",
        required=True,
        metavar="NAME",
        help="what to train towards: hinton, truncated",
    )
    teacher = parser.add_mutually_exclusive_group(required=True)
    add_teacher(teacher.add_argument)
    teacher.add_argument(
        "--teacher-cache",
        type=Path,
        metavar="DIR",
        help="what `kdfast cache build` made of a teacher and the same --dataset",
    )
    add(
        "--student",
        required=True,
        type=Path,
        metavar="PATH|CONFIG",
        help="a checkpoint, or a config (file or directory) for a fresh student",
    )
    add_dataset(add)
    add_output(add, "where checkpoints and the student go")
    add_data_options(parser.add_argument_group("data").add_argument)
    _add_objective_options(parser.add_argument_group("objective").add_argument)
    _add_training_options(parser.add_argument_group("training"))


def _add_objective_options(add: AddArgument) -> None:
    add("--temperature", type=float, metavar="T", help="default: the recipe's, or the cache's")
    add("--alpha", type=float, metavar="A", help="the soft term's share (default: the recipe's)")
    add("--k", type=bounded(int, 1), metavar="K", help="entries per token, of recipe truncated")
    add(
        "--tail",
        choices=("bucket", "renormalize", "none", "support"),
        help="what becomes of the other entries, of recipe truncated",
    )


def _add_training_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    count, positive = bounded(int, 1), bounded(float, 0, open_low=True)
    add("--epochs", type=positive, metavar="N", help="default: 3")
    add("--max-steps", type=count, metavar="N", help="stop after N steps instead of --epochs")
    add("--batch-size", type=count, metavar="N", help="sequences per device (default: 8)")
    add("--gradient-accumulation", type=count, metavar="N", help="batches per step (default: 1)")
    add(
        "--learning-rate",
        type=positive,
        metavar="LR",
        help="decays linearly to 0 (default: 1e-4)",
    )
    add_seed(add)
    add("--logging-steps", type=count, metavar="N", help="default: 10")
    add("--save-steps", type=count, metavar="N", help="steps between checkpoints (default: 500)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output")
    add_device(add)
    precision = group.add_mutually_exclusive_group()
    precision.add_argument("--bf16", action="store_true", help="train in mixed bfloat16 precision")
    precision.add_argument("--fp16", action="store_true", help="train in mixed float16 precision")


def _distill(arguments: argparse.Namespace) -> None:
    need("kdfast distill", "transformers", "accelerate", "datasets", "pyarrow")
    silence_libraries()
    from transformers import default_data_collator, set_seed

    from kdfast.trainer import DistillationTrainer

    check_paths(arguments, "student", "teacher" if arguments.teacher else None)
    cache = None
    if arguments.teacher_cache is not None:
        cache = open_cache(arguments.teacher_cache)
        _take_data_from(cache, arguments)
    recipe = _recipe(arguments, cache)
    checkpoint = _checkpoint_to_resume(arguments.output, arguments.resume)
    training_arguments = _training_arguments(arguments, recipe.training_arguments)

    student_config = load_config("student", arguments.student)
    if cache is None:
        teacher_config = load_config("teacher", arguments.teacher)
        # Widths may differ by padding alone, which holds no token.
        vocab_size = min(student_config.vocab_size, teacher_config.vocab_size)
        tokenizer = teachers_tokenizer(arguments.teacher, teacher_config.vocab_size)
        configs = (student_config, teacher_config)
    else:
        vocab_size = cache.vocab_size
        tokenizer = cached_tokenizer(cache)
        configs = (student_config,)
    tokenizer = students_tokenizer(arguments.student, student_config.vocab_size, tokenizer)
    # The order of cached blocks and their masks are the cache's; training has its own seed.
    seed = arguments.seed if cache is None else cache.manifest["data"]["seed"]
    data = settle_data(arguments, seed, tokenizer, *configs)
    train_blocks, eval_blocks = load_blocks(arguments.dataset, data, tokenizer)
    if cache is None:
        collator = _collator(data, tokenizer)
    else:
        train_blocks, eval_blocks = fixed_blocks(train_blocks, eval_blocks, data, tokenizer)
        train_blocks, eval_blocks = _attach(cache, train_blocks, eval_blocks)
        collator = default_data_collator
    if len(eval_blocks) == 0:
        training_arguments.eval_strategy = "no"

    set_seed(arguments.seed)
    teacher = (
        {"teacher": load_model("teacher", arguments.teacher, teacher_config, data.task)}
        if cache is None
        else {"teacher_cache": cache}
    )
    student = load_model("student", arguments.student, student_config, data.task)
    with reporting():
        trainer = DistillationTrainer(
            model=student,
            args=training_arguments,
            **teacher,
            objective=recipe.objective,
            vocab_size=vocab_size,
            train_dataset=train_blocks,
            eval_dataset=eval_blocks,
            processing_class=tokenizer,
            data_collator=collator,
        )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        print(f"student saved to {arguments.output}")


def _take_data_from(cache: TeacherCache, arguments: argparse.Namespace) -> None:
    """The cache's data settings in the place of flags that were not given."""
    recorded = cache.manifest["data"]
    names = {"task", "text_column", "block_size", "mlm_probability", "eval_fraction"}
    if not isinstance(recorded, dict) or not {*names, "seed"} <= recorded.keys():
        raise CommandError(
            f"{cache.directory} does not say how its dataset was made: kdfast cache build makes "
            "caches for kdfast distill"
        )
    for name in sorted(names):
        given = getattr(arguments, name)
        if given is not None and given != recorded[name]:
            flag = f"--{name.replace('_', '-')}"
            raise CommandError(
                f"{flag} {given}: the teacher cache in {cache.directory} was built with "
                f"{recorded[name]}"
            )
        setattr(arguments, name, recorded[name])


def _recipe(arguments: argparse.Namespace, cache: TeacherCache | None) -> Recipe:
    from kdfast.trainer import RECIPES

    if arguments.recipe not in RECIPES:
        raise CommandError(f"unknown recipe {arguments.recipe!r}: choose from {', '.join(RECIPES)}")
    make = RECIPES[arguments.recipe]
    names = inspect.signature(make).parameters
    settings = {}
    for name in ("temperature", "alpha", "k", "tail"):
        value = getattr(arguments, name)
        if value is None:
            continue
        if name not in names:
            raise CommandError(f"--{name} is no setting of the recipe {arguments.recipe}")
        settings[name] = value
    if cache is not None:
        given = settings.setdefault("temperature", cache.temperature)
        if given != cache.temperature:
            raise CommandError(
                f"--temperature {given}: the teacher cache in {cache.directory} was built at "
                f"{cache.temperature}"
            )
    with reporting():
        return make(**settings)


def _checkpoint_to_resume(output: Path, resume: bool) -> str | None:
    from transformers.trainer_utils import get_last_checkpoint

    if output.exists() and not output.is_dir():
        raise CommandError(f"--output {output} is not a directory")
    checkpoint = get_last_checkpoint(str(output)) if output.is_dir() else None
    if resume and checkpoint is None:
        raise CommandError(f"--resume: there is no checkpoint in {output}")
    if not resume and output.is_dir() and any(output.iterdir()):
        advice = "--resume to go on from its last checkpoint, or " if checkpoint else ""
        raise CommandError(f"--output {output} is not empty: pass {advice}another directory")
    return checkpoint


def _training_arguments(
    arguments: argparse.Namespace, recipe_defaults: dict[str, object]
) -> TrainingArguments:
    from transformers import TrainingArguments

    given = {
        "num_train_epochs": arguments.epochs,
        "max_steps": arguments.max_steps,
        "per_device_train_batch_size": arguments.batch_size,
        "per_device_eval_batch_size": arguments.batch_size,
        "gradient_accumulation_steps": arguments.gradient_accumulation,
        "learning_rate": arguments.learning_rate,
        "seed": arguments.seed,
        "logging_steps": arguments.logging_steps,
        "save_steps": arguments.save_steps,
    }
    evaluates = arguments.eval_fraction is None or arguments.eval_fraction > 0
    settings = {
        "learning_rate": 1e-4,
        "logging_steps": 10,
        **recipe_defaults,
        **{name: value for name, value in given.items() if value is not None},
        "output_dir": str(arguments.output),
        "eval_strategy": "epoch" if evaluates else "no",
        "prediction_loss_only": True,
        "use_cpu": arguments.device == "cpu",
        "bf16": arguments.bf16,
        "fp16": arguments.fp16,
    }
    check_device(arguments.device)
    with reporting():
        return TrainingArguments(**settings)


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


def _collator(data: Data, tokenizer: PreTrainedTokenizerBase) -> DataCollator:
    from transformers import DataCollatorForLanguageModeling, default_data_collator

    if data.task == "causal-lm":
        return default_data_collator
    return DataCollatorForLanguageModeling(tokenizer, mlm_probability=data.mlm_probability)
