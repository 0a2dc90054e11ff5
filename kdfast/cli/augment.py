"""`kdfast augment`: a data set's rows and altered copies of them, to distil on."""

from __future__ import annotations

import argparse
import glob
import hashlib
import importlib
import json
import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kdfast.cli.errors import CommandError, need, reporting, silence_libraries
from kdfast.cli.inputs import TOKENIZER_FILES
from kdfast.cli.options import AddArgument, add_device, add_seed, bounded, check_device

# Imported by the functions that need them: `kdfast env` works without.
if TYPE_CHECKING:
    from datasets import IterableDataset
    from pyarrow import Schema

    from kdfast.trainer.augmentation.rows import Augmentation

Batch = dict[str, list]

# Rows that are read, augmented and written at a time; with their copies a row group of Parquet.
BATCH_ROWS = 256

# A column for --deduplicate alone: which row a copy is of. No file's column has that name.
ROW = "\0row"

# What `datasets` reads a file with.
READERS = {
    ".txt": ("text", {"sample_by": "paragraph"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
    ".parquet": ("parquet", {}),
}

# The options of one method alone, and what the other says to them.
TINYBERT = ("model", "embeddings", "replace_probability", "candidates", "batch_size", "device")
BILSTM = (
    "tagger",
    "word_tokenizer",
    "mask_probability",
    "pos_probability",
    "ngram_probability",
    "ngram_sizes",
    "mask_token",
)


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "augment",
        help="add altered copies of a data set's rows, to distil on",
        description="Write a data set's rows, each followed by altered copies of it. The output "
        "appears under its name when it is whole.",
    )
    parser.set_defaults(run=_augment)
    add = parser.add_argument
    count, share = bounded(int, 1), bounded(float, 0, 1)
    add(
        "files",
        type=Path,
        nargs="+",
        metavar="FILE",
        help=".txt (a blank line ends a document), or .json, .jsonl, .csv, .parquet (one per row)",
    )
    add("--method", required=True, choices=("tinybert", "bilstm"), help="whose augmentation")
    add("--output", required=True, type=Path, metavar="FILE", help="a new .jsonl or .parquet")
    add(
        "--text-column",
        nargs="+",
        default=["text"],
        metavar="NAME",
        help="the column with the text, or the two with a pair (default: text)",
    )
    add("--copies", type=count, metavar="N", help="attempts per text (default: 20)")
    add(
        "--deduplicate",
        action="store_true",
        help="leave out copies that equal any row before them, not their own row's alone",
    )
    add("--num-proc", type=count, default=1, metavar="N", help="processes (default: 1)")
    add_seed(add)
    _add_tinybert_options(parser.add_argument_group("tinybert").add_argument, count, share)
    _add_bilstm_options(parser.add_argument_group("bilstm").add_argument, count, share)


def _add_tinybert_options(add: AddArgument, count: Callable, share: Callable) -> None:
    add("--model", type=Path, metavar="PATH", help="a masked language model with its tokenizer")
    add(
        "--embeddings",
        type=Path,
        metavar="FILE",
        help="GloVe's text format, for words of several pieces (default: the model's own table)",
    )
    add("--replace-probability", type=share, metavar="P", help="of each word (default: 0.4)")
    add("--candidates", type=count, metavar="N", help="to choose from, per word (default: 15)")
    add("--batch-size", type=count, metavar="N", help="masked texts per forward (default: 32)")
    add_device(add)


def _add_bilstm_options(add: AddArgument, count: Callable, share: Callable) -> None:
    add(
        "--tagger",
        metavar="MODULE:FUNCTION",
        help="a list of words in, a list of their parts of speech out",
    )
    add(
        "--word-tokenizer",
        metavar="MODULE:FUNCTION",
        help="a text in, a list of words out (default: words and punctuation)",
    )
    add("--mask-probability", type=share, metavar="P", help="of each word (default: 0.1)")
    add(
        "--pos-probability",
        type=share,
        metavar="P",
        help="of each word; 0 needs no --tagger (default: 0.1)",
    )
    add("--ngram-probability", type=share, metavar="P", help="of each copy (default: 0.25)")
    add("--ngram-sizes", type=count, nargs="+", metavar="N", help="default: 1 2 3 4 5")
    add("--mask-token", metavar="TOKEN", help="default: [MASK]")


def _augment(arguments: argparse.Namespace) -> None:
    need("kdfast augment", "transformers", "datasets", "pyarrow")
    silence_libraries()
    _check(arguments)
    sources = [_read(path) for path in arguments.files]
    schema = _check_columns(arguments, sources)
    with reporting():
        augment = _build(arguments)
        if arguments.method == "bilstm" and augment.pos_probability > 0:
            augment.fit(chain.from_iterable(sources))
    batches = chain.from_iterable(source.iter(batch_size=BATCH_ROWS) for source in sources)
    if arguments.deduplicate:
        batches = (
            {**batch, ROW: list(range(len(batch[arguments.text_column[0]])))} for batch in batches
        )
    augmented = _augmented(batches, arguments, augment)
    if arguments.deduplicate:
        augmented = _without_duplicates(augmented, augment)
    with reporting():
        written = _write(augmented, schema, arguments.output)
    print(f"{written} rows in {arguments.output}")


def _check(arguments: argparse.Namespace) -> None:
    for path in arguments.files:
        if not path.is_file():
            raise CommandError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
        if path.suffix.lower() not in READERS:
            raise CommandError(f"{path} must end in one of {', '.join(READERS)}")
    output = arguments.output
    if output.suffix.lower() not in WRITERS:
        raise CommandError(f"--output {output} must end in one of {', '.join(WRITERS)}")
    if output.exists():
        raise CommandError(f"--output {output} exists already: pass another name")
    if not output.parent.is_dir():
        raise CommandError(f"--output {output}: {output.parent} is not a directory")
    others = BILSTM if arguments.method == "tinybert" else TINYBERT
    for name in others:
        if getattr(arguments, name) is not None:
            method = "bilstm" if arguments.method == "tinybert" else "tinybert"
            raise CommandError(f"--{name.replace('_', '-')} goes with --method {method} alone")
    if arguments.method == "tinybert":
        _check_tinybert(arguments)


def _check_tinybert(arguments: argparse.Namespace) -> None:
    path = arguments.model
    if path is None:
        raise CommandError("--method tinybert needs --model, a masked language model")
    if not (path / "config.json").is_file():
        raise CommandError(f"--model {path} is not a directory with a config.json")
    if not any((path / name).exists() for name in TOKENIZER_FILES):
        raise CommandError(f"--model {path} holds no tokenizer")
    if arguments.embeddings is not None and not arguments.embeddings.is_file():
        raise CommandError(f"--embeddings {arguments.embeddings} is not a file")
    check_device(arguments.device)
    if arguments.num_proc > 1 and arguments.device == "cuda":
        raise CommandError("--num-proc goes with --device cpu: one process keeps a GPU busy")


def _read(path: Path) -> IterableDataset:
    from datasets import load_dataset

    reader, options = READERS[path.suffix.lower()]
    with reporting(f"cannot read {path}"):
        # A pattern, for datasets.
        files = glob.escape(str(path))
        return load_dataset(reader, data_files=files, split="train", streaming=True, **options)


def _check_columns(arguments: argparse.Namespace, sources: list[IterableDataset]) -> Schema:
    """The columns and their types, which all the files have."""
    import pyarrow

    schema = None
    for path, source in zip(arguments.files, sources, strict=True):
        with reporting(f"cannot read {path}"):
            # As Arrow, for the types of a whole block of the file, which one row does not show.
            table = next(iter(source.with_format("arrow").iter(batch_size=1)), None)
        if table is None:
            raise CommandError(f"{path} holds no rows")
        schema, names = schema or table.schema, table.column_names
        if set(schema.names) != set(names):
            raise CommandError(
                f"{path} has the columns {', '.join(names)} and {arguments.files[0]} has "
                f"{', '.join(schema.names)}: augment them one by one"
            )
        for name in arguments.text_column:
            if name not in names:
                raise CommandError(f"{path} has no column {name!r}, it has {', '.join(names)}")
        with reporting(f"{path} does not fit the files before it"):
            # An integer column and a float one make a float one.
            schema = pyarrow.unify_schemas([schema, table.schema], promote_options="permissive")
    return schema.remove_metadata()


def _build(
    arguments: argparse.Namespace, vocabulary: dict[str, dict[str, int]] | None = None
) -> Augmentation:
    from kdfast.trainer.augmentation import BiLSTMAugmentation, TinyBERTAugmentation

    def given(*names: str) -> dict[str, object]:
        values = {name: getattr(arguments, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    common = {"columns": arguments.text_column, "seed": arguments.seed, **given("copies")}
    if arguments.method == "tinybert":
        model, tokenizer = _load_masked_model(arguments)
        names = ("embeddings", "replace_probability", "candidates", "batch_size")
        return TinyBERTAugmentation(model, tokenizer, **common, **given(*names))
    functions = {
        name: _function(name, getattr(arguments, name))
        for name in given("tagger", "word_tokenizer")
    }
    numbers = given(
        "mask_probability", "pos_probability", "ngram_probability", "ngram_sizes", "mask_token"
    )
    if arguments.tagger is None and arguments.pos_probability != 0:
        raise CommandError(
            "--method bilstm replaces words by others of their part of speech: pass --tagger "
            "MODULE:FUNCTION, or --pos-probability 0"
        )
    return BiLSTMAugmentation(vocabulary=vocabulary, **common, **functions, **numbers)


def _load_masked_model(arguments: argparse.Namespace) -> tuple:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    path = arguments.model
    with reporting(f"cannot load the tokenizer from {path}"):
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    with reporting(f"cannot load the model from {path}"):
        model, info = AutoModelForMaskedLM.from_pretrained(
            path, local_files_only=True, output_loading_info=True
        )
    if missing := sorted(info["missing_keys"]):
        raise CommandError(f"the model in {path} has no weights for {missing[0]} of a masked-lm")
    alone = arguments.num_proc == 1 and torch.cuda.is_available()
    return model.to(arguments.device or ("cuda" if alone else "cpu")), tokenizer


def _function(name: str, place: str) -> Callable:
    flag = f"--{name.replace('_', '-')} {place}"
    module, separator, attribute = place.partition(":")
    if not (module and separator and attribute):
        raise CommandError(f"{flag} must be MODULE:FUNCTION")
    # As for a script: modules beside the user's files are found.
    sys.path.insert(0, os.getcwd())
    try:
        with reporting(flag):
            function = getattr(importlib.import_module(module), attribute)
    finally:
        sys.path.pop(0)
    if not callable(function):
        raise CommandError(f"{flag} is not a function")
    return function


def _augmented(
    batches: Iterable[Batch], arguments: argparse.Namespace, augment: Augmentation
) -> Iterator[Batch]:
    """Augmented batches in their order; no more of them in memory than the processes need."""
    if arguments.num_proc == 1:
        yield from map(augment, batches)
        return
    vocabulary = getattr(augment, "vocabulary", None)
    waiting: deque = deque()
    pool = ProcessPoolExecutor(
        arguments.num_proc,
        # Not forked: OpenMP's threads do not survive it, and Windows has no fork.
        multiprocessing.get_context("spawn"),
        _start_worker,
        (arguments, vocabulary),
    )
    try:
        for batch in batches:
            waiting.append(pool.submit(_augment_in_worker, batch))
            if len(waiting) > 2 * arguments.num_proc:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


_worker: Augmentation


def _start_worker(arguments: argparse.Namespace, vocabulary: dict | None) -> None:
    global _worker
    # A killed parent ends its workers, which would wait for work for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    silence_libraries()
    _worker = _build(arguments, vocabulary)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _augment_in_worker(batch: Batch) -> Batch:
    return _worker(batch)


def _without_duplicates(batches: Iterable[Batch], augment: Augmentation) -> Iterator[Batch]:
    seen: set[bytes] = set()
    for batch in batches:
        kept, last = [], None
        for row, (texts, number) in enumerate(
            zip(augment.texts_of(batch), batch[ROW], strict=True)
        ):
            digest = hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).digest()
            # The first of a number is the row itself.
            if number != last or digest not in seen:
                seen.add(digest)
                kept.append(row)
            last = number
        yield {name: [values[row] for row in kept] for name, values in batch.items()}


def _write(batches: Iterable[Batch], schema: Schema, output: Path) -> int:
    """The number of rows. The file has its name once it is whole, and on the disk."""
    from kdfast.files import fsync, temporary_of
    from kdfast.teacher_cache.format import rename, writing

    temporary, written = temporary_of(output), 0
    try:
        with ExitStack() as stack:
            with writing(output):
                writer = stack.enter_context(WRITERS[output.suffix.lower()](temporary, schema))
            for batch in batches:
                with writing(output):
                    writer.write(batch)
                written += len(next(iter(batch.values())))
                if sys.stderr.isatty():
                    print(f"\r{written} rows ", end="", file=sys.stderr, flush=True)
        with writing(output):
            fsync(temporary)
        rename(temporary, output)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return written


class _JsonLines(AbstractContextManager):
    def __init__(self, path: Path, schema: Schema) -> None:
        self._names = schema.names
        self._file = path.open("w", encoding="utf-8", newline="\n")

    def write(self, batch: Batch) -> None:
        for row in zip(*(batch[name] for name in self._names), strict=True):
            line = dict(zip(self._names, row, strict=True))
            try:
                text = json.dumps(line, ensure_ascii=False)
            except TypeError as error:
                raise ValueError(f"{error}: write .parquet") from error
            self._file.write(text + "\n")

    def __exit__(self, *exception: object) -> None:
        self._file.close()


class _Parquet(AbstractContextManager):
    def __init__(self, path: Path, schema: Schema) -> None:
        from pyarrow.parquet import ParquetWriter

        self._writer = ParquetWriter(path, schema)

    def write(self, batch: Batch) -> None:
        import pyarrow

        schema = self._writer.schema
        try:
            # A cast checks what giving `table` the schema would truncate: 1.5 to an integer.
            table = pyarrow.table({name: batch[name] for name in schema.names}).cast(schema)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, NotImplementedError) as error:
            raise ValueError(
                f"the types of the first rows do not fit later ones ({error}): write .jsonl"
            ) from error
        self._writer.write_table(table)

    def __exit__(self, *exception: object) -> None:
        self._writer.close()


WRITERS = {".jsonl": _JsonLines, ".parquet": _Parquet}
