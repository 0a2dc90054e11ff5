"""`kdfast distill`: train a student towards a teacher, or towards a teacher's cache."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

from kdfast.cli import config
from kdfast.cli.errors import CommandError, need, silence_libraries
from kdfast.cli.options import (
    TASKS,
    AddArgument,
    Parser,
    add_data_options,
    add_dataset,
    add_device,
    add_output,
    add_seed,
    bounded,
)


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "distill",
        help="train a small model towards a large one",
        description="Train a student towards a teacher: language models, causal or masked, and "
        "models that classify sequences or tokens, or answer questions.",
    )
    parser.set_defaults(run=_distill)
    parser.add_argument(
        "config",
        nargs="?",
        type=Path,
        metavar="CONFIG",
        help="a YAML file of these settings, which may hold several stages; flags win over it",
    )
    parser.add_argument(
        "--set",
        action="append",
        metavar="SECTION.NAME=VALUE",
        help="an argument of transformers.TrainingArguments (training.warmup_steps=100) or a "
        "setting of the recipe (settings.alpha_mlm=2)",
    )
    _add_flags(parser)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    """All that a file may set too. No flag has a default, so that what was given is known."""
    add = parser.add_argument
    add(
        "--recipe",
        metavar="NAME",
        help="what to train towards: hinton, truncated, distilbert, tinybert_general, "
        "tinybert_intermediate, tinybert_prediction, bilstm",
    )
    teacher = parser.add_mutually_exclusive_group()
    teacher.add_argument(
        "--teacher",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="a checkpoint with its tokenizer; of several the probabilities are averaged",
    )
    teacher.add_argument(
        "--teacher-cache",
        type=Path,
        metavar="DIR",
        help="what `kdfast cache build` made of a teacher and the same --dataset",
    )
    add(
        "--teacher-weights",
        type=bounded(float, 0, open_low=True),
        nargs="+",
        metavar="W",
        help="of several teachers (default: equal)",
    )
    add(
        "--offload",
        choices=("cpu", "disk"),
        help="where several teachers wait for their turn in every step: on the CPU, one of them on "
        "the device at a time, or on the disk, one of them in memory at a time",
    )
    add(
        "--student",
        type=Path,
        metavar="PATH|CONFIG",
        help="a checkpoint, or a config (file or directory) for a fresh student (default: the "
        "recipe's)",
    )
    add(
        "--vectors",
        type=Path,
        metavar="FILE",
        help="begin a fresh BiLSTM's embeddings with these: GloVe's text format",
    )
    add(
        "--initialise",
        type=int,
        nargs="*",
        metavar="LAYER",
        help="begin a fresh student with these layers of the teacher (default: evenly spread)",
    )
    add(
        "--no-initialise",
        dest="initialise",
        action="store_const",
        const=False,
        help="copy none, where the recipe would",
    )
    add_dataset(add, required=False)
    add_output(add, "where checkpoints and the student go", required=False)
    _add_data(parser.add_argument_group("data").add_argument)
    _add_objective_options(parser.add_argument_group("objective").add_argument)
    _add_training_options(parser.add_argument_group("training"))
    report = parser.add_argument_group("report").add_argument
    _add_switch(report, "--report", "compare teacher and student, in report.md")
    _add_switch(
        report,
        "--student-alone",
        "train the student without the teacher too, for the report",
    )


def _add_switch(add: AddArgument, flag: str, text: str) -> None:
    """A flag with a `--no-` for what a file has switched on."""
    add(flag, action=argparse.BooleanOptionalAction, default=None, help=text)


def _add_data(add: AddArgument) -> None:
    add_data_options(add, TASKS)
    add(
        "--eval-dataset",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="what to evaluate on instead of a part of --dataset; not of language models",
    )
    add("--text-pair-column", metavar="NAME", help="of sequence-classification: the second text")
    add("--label-column", metavar="NAME", help="of the classifications")


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
    add("--epochs", type=positive, metavar="N", help="default: the recipe's, or 3")
    add("--max-steps", type=count, metavar="N", help="stop after N steps instead of --epochs")
    add(
        "--batch-size",
        type=count,
        metavar="N",
        help="sequences per device (default: the recipe's, or 8)",
    )
    add(
        "--gradient-accumulation",
        type=count,
        metavar="N",
        help="batches per step (default: the recipe's, or 1)",
    )
    add(
        "--learning-rate",
        type=positive,
        metavar="LR",
        help="default: the recipe's, or 1e-4 that decays linearly to 0",
    )
    add_seed(add, default=None)
    add("--logging-steps", type=count, metavar="N", help="default: 10")
    add("--save-steps", type=count, metavar="N", help="steps between checkpoints (default: 500)")
    _add_switch(
        add,
        "--resume",
        "go on from the last checkpoint in --output, and skip stages that are finished",
    )
    add_device(add)
    _add_switch(add, "--bf16", "train in mixed bfloat16 precision")
    _add_switch(add, "--fp16", "train in mixed float16 precision")


def _distill(arguments: argparse.Namespace) -> None:
    need("kdfast distill", "transformers", "accelerate", "datasets", "pyarrow", "yaml")
    silence_libraries()
    from accelerate import PartialState

    from kdfast.cli.run import Run

    flags = Parser(prog="kdfast distill", add_help=False)
    _add_flags(flags)
    settings = config.stages_of(arguments, flags)
    for one in settings:
        with _named(one.name):
            _check_complete(one)
    # All of them before the first begins.
    runs: list[Run] = []
    for one in settings:
        with _named(one.name):
            runs.append(Run(one, runs))
    # No process writes what another has still to read.
    PartialState().wait_for_everyone()
    for run in runs:
        with _named(run.settings.name):
            run()


@contextlib.contextmanager
def _named(stage: str | None) -> Iterator[None]:
    """Errors with the stage in which they are."""
    try:
        yield
    except CommandError as error:
        if stage is None:
            raise
        raise CommandError(f"stage {stage}: {error}") from error


def _check_complete(settings: argparse.Namespace) -> None:
    if settings.bf16 and settings.fp16:
        raise CommandError("--bf16 and --fp16 exclude each other")
    for flag, given in (
        ("--recipe (or an objective in a file)", settings.recipe or settings.objective),
        ("--teacher or --teacher-cache", settings.teacher or settings.teacher_cache),
        ("--dataset", settings.dataset),
        ("--output", settings.output),
    ):
        if not given:
            raise CommandError(f"the following arguments are required: {flag}")
