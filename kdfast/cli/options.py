"""The flags that commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from kdfast.cli.errors import CommandError

LANGUAGE_TASKS = ("causal-lm", "masked-lm")
TASKS = (*LANGUAGE_TASKS, "sequence-classification", "token-classification", "question-answering")
MAX_DEFAULT_BLOCK = 512
DEFAULT_SEED = 42

# A parser's or a group's add_argument.
AddArgument = Callable[..., argparse.Action]


def bounded(
    kind: type, low: float, high: float = float("inf"), *, open_low: bool = False
) -> Callable[[str], float]:
    """An argument's type: an int or a float within bounds."""

    def parse(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = None
        if (
            number is None
            or not (low < number if open_low else low <= number)
            or not number <= high
        ):
            bounds = f"{'above' if open_low else 'at least'} {low}"
            bounds += "" if high == float("inf") else f" and at most {high}"
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {noun} {bounds}, got {text!r}")
        return number

    return parse


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `CommandError`s."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see {self.prog} --help)")


def add_teacher(add: AddArgument, **options: object) -> None:
    add("--teacher", type=Path, metavar="PATH", help="a checkpoint with its tokenizer", **options)


def add_dataset(add: AddArgument, *, required: bool = True) -> None:
    add(
        "--dataset",
        required=required,
        type=Path,
        nargs="+",
        metavar="FILE",
        help=".txt (a blank line ends a document), or .json, .jsonl, .csv, .parquet (one per row)",
    )


def add_output(add: AddArgument, text: str, *, required: bool = True) -> None:
    add("--output", required=required, type=Path, metavar="DIR", help=text)


def add_data_options(add: AddArgument, tasks: tuple[str, ...] = LANGUAGE_TASKS) -> None:
    add("--text-column", metavar="NAME", help="the column with the text (default: text)")
    add("--task", choices=tasks, help="default: what the teacher is")
    add(
        "--block-size",
        type=bounded(int, 2),
        metavar="N",
        help=f"tokens per sequence (default: what the models take, at most {MAX_DEFAULT_BLOCK})",
    )
    add(
        "--mlm-probability",
        type=bounded(float, 0, 1, open_low=True),
        metavar="P",
        help="share of tokens to mask for masked-lm (default: 0.15)",
    )
    add(
        "--eval-fraction",
        type=bounded(float, 0, 0.9),
        metavar="F",
        help="share of documents held out and evaluated after every epoch (default: 0.05)",
    )


def add_seed(add: AddArgument, default: int | None = DEFAULT_SEED) -> None:
    text = f"default: {DEFAULT_SEED}"
    add("--seed", type=bounded(int, 0), default=default, metavar="N", help=text)


def add_device(add: AddArgument) -> None:
    add("--device", choices=("cpu", "cuda"), help="default: the fastest there is")


def check_device(device: str | None) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: torch sees no CUDA device")
