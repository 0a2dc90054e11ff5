"""`kdfast cache`: a teacher's outputs on disk; build them, describe them, verify them."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from kdfast.cli.errors import CommandError, need, reporting, silence_libraries
from kdfast.cli.inputs import (
    check_dataset,
    check_model,
    fixed_blocks,
    load_blocks,
    load_config,
    load_model,
    open_cache,
    settle_data,
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

DEFAULT_DRAWS = 12


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "cache",
        help="keep a teacher's outputs on disk, and train from there",
        description="A teacher's truncated outputs on disk, for kdfast distill --teacher-cache.",
    )
    subcommands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    _add_build(subcommands)
    for name, run, text in (
        ("info", _info, "what a cache holds, of what, and how large it is"),
        ("verify", _verify, "compare every byte of a cache with its checksums"),
    ):
        command = subcommands.add_parser(name, help=text, description=text.capitalize() + ".")
        command.set_defaults(run=run)
        command.add_argument("directory", type=Path, metavar="DIR")


def _add_build(commands: argparse._SubParsersAction) -> None:
    build = commands.add_parser(
        "build",
        help="run a teacher over a dataset once, and keep a few probabilities per token",
        description="Run a teacher over a dataset once. The same command again goes on where an "
        "interrupted one stopped.",
    )
    build.set_defaults(run=_build)
    add = build.add_argument
    add_teacher(add, required=True)
    add_dataset(add)
    add_output(add, "the cache: a new directory, or one with an unfinished cache")
    add_data_options(build.add_argument_group("data").add_argument)
    _add_entries_options(build.add_argument_group("entries").add_argument)
    add = build.add_argument_group("run").add_argument
    count = bounded(int, 1)
    add("--batch-size", type=count, default=8, metavar="N", help="default: 8")
    add(
        "--samples-per-shard",
        type=count,
        default=1024,
        metavar="N",
        help="sequences per file: what an interruption costs at most (default: 1024)",
    )
    add_seed(add)
    add_device(add)


def _add_entries_options(add: AddArgument) -> None:
    count = bounded(int, 1)
    positive = bounded(float, 0, open_low=True)
    add("--k", type=count, metavar="K", help="keep the K largest probabilities of each token")
    add("--sampled", action="store_true", help="or keep an unbiased sample of them")
    add("--draws", type=count, metavar="N", help="the sample's size (default: 12)")
    add("--temperature", type=positive, default=1.0, metavar="T", help="default: 1.0")
    add(
        "--proposal-temperature",
        type=positive,
        metavar="T",
        help="of the draws; above --temperature draws rare tokens more often (default: 1.0)",
    )
    add(
        "--bits",
        type=int,
        choices=(8, 16),
        default=16,
        help="of a stored log-probability (default: 16)",
    )


def _build(arguments: argparse.Namespace) -> None:
    need("kdfast cache build", "transformers", "datasets", "pyarrow")
    silence_libraries()
    from datasets import concatenate_datasets

    from kdfast.teacher_cache import build_cache

    entries = _entries(arguments)
    check_model("teacher", arguments.teacher)
    check_dataset(arguments.dataset)
    check_device(arguments.device)
    config = load_config("teacher", arguments.teacher)
    tokenizer = teachers_tokenizer(arguments.teacher, config.vocab_size)
    data = settle_data(arguments, arguments.seed, tokenizer, config)
    parts = load_blocks(arguments.dataset, data, tokenizer)
    blocks = concatenate_datasets(
        [part for part in fixed_blocks(*parts, data, tokenizer) if len(part) > 0]
    )
    teacher = load_model("teacher", arguments.teacher, config, data.task)
    fastest = "cuda" if torch.cuda.is_available() else "cpu"
    with reporting():
        cache = build_cache(
            teacher.to(arguments.device or fastest),
            blocks.remove_columns("labels"),
            arguments.output,
            **entries,
            # Columns without a token are padding.
            vocab_size=max(tokenizer.get_vocab().values()) + 1,
            tokenizer=tokenizer,
            batch_size=arguments.batch_size,
            samples_per_shard=arguments.samples_per_shard,
            seed=arguments.seed,
            data=asdict(data),
            progress=_print_progress if sys.stderr.isatty() else None,
        )
    print(f"{cache.tokens} tokens at {cache.bytes_per_token:.1f} bytes in {arguments.output}")


def _entries(arguments: argparse.Namespace) -> dict[str, object]:
    entries = {"temperature": arguments.temperature, "bits": arguments.bits}
    if arguments.sampled == (arguments.k is not None):
        raise CommandError("pass either --k K, for the largest entries, or --sampled")
    if arguments.k is not None:
        for name in ("draws", "proposal_temperature"):
            if getattr(arguments, name) is not None:
                raise CommandError(f"--{name.replace('_', '-')} goes with --sampled alone")
        return {**entries, "k": arguments.k}
    return {
        **entries,
        "draws": arguments.draws or DEFAULT_DRAWS,
        "proposal_temperature": arguments.proposal_temperature or 1.0,
    }


def _print_progress(done: int, samples: int) -> None:
    end = "\n" if done == samples else ""
    print(f"\r{done} of {samples} sequences", end=end, file=sys.stderr, flush=True)


def _info(arguments: argparse.Namespace) -> None:
    cache = open_cache(arguments.directory)
    manifest = cache.manifest
    tokenizer, data = manifest["tokenizer"], manifest["data"] or {}
    if cache.sampled:
        entries = f"{cache.k} sampled at temperature {manifest['proposal_temperature']}"
    else:
        entries = f"the {cache.k} largest"
    rows = [
        ("format", f"version {manifest['format_version']}"),
        ("samples", len(cache)),
        ("tokens", cache.tokens),
        ("entries", f"{entries} of {cache.vocab_size}, at temperature {cache.temperature}"),
        ("bits", manifest["bits"]),
        ("shards", len(manifest["shards"])),
        ("size", f"{cache.nbytes} bytes, {cache.bytes_per_token:.1f} per token"),
        ("teacher", manifest["teacher"]),
        ("dataset", manifest["dataset"]["fingerprint"]),
        ("tokenizer", tokenizer and f"{tokenizer['fingerprint']}, {tokenizer['tokens']} tokens"),
        *data.items(),
    ]
    print(*(f"{name:<17}{value}" for name, value in rows if value is not None), sep="\n")


def _verify(arguments: argparse.Namespace) -> None:
    cache = open_cache(arguments.directory)
    with reporting():
        cache.verify()
    print(f"all {cache.nbytes} bytes of {arguments.directory} are what was written")
