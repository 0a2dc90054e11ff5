"""A teacher's outputs into shards: `build_cache`."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from kdfast.files import fsync_all, temporary_of
from kdfast.ops.arguments import check_choice, check_count, check_number
from kdfast.ops.sampled_softmax import sampled_softmax
from kdfast.ops.truncated_softmax import TruncatedSoftmax, truncated_softmax
from kdfast.teacher_cache.format import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    SETTINGS,
    TOKENIZER,
    ShardWriter,
    TeacherCacheError,
    cache_id,
    check_checksum,
    check_size,
    differences,
    layout_of,
    read_manifest,
    rename,
    sha256_of,
    shard_count,
    shard_name,
    shard_samples,
    write_manifest,
    writing,
)
from kdfast.teacher_cache.read import TeacherCache
from kdfast.teacher_cache.samples import (
    Row,
    columns_of,
    dataset_fingerprint,
    rows_of,
    sample_hash,
    teacher_fingerprint,
    tokenizer_fingerprint,
)

try:
    import fcntl
except ImportError:  # Windows, where nobody is kept from building twice at a time.
    fcntl = None

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def build_cache(
    teacher: nn.Module,
    dataset: Dataset | Sequence[Mapping[str, object]],
    output: str | Path,
    *,
    k: int | None = None,
    draws: int | None = None,
    temperature: float = 1.0,
    proposal_temperature: float = 1.0,
    bits: int = 16,
    vocab_size: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_fingerprint: str | None = None,
    batch_size: int = 8,
    samples_per_shard: int = 1024,
    seed: int = 0,
    data: dict[str, object] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TeacherCache:
    """Run a teacher over a dataset once, and keep a few entries of its softmax per token.

    Where a build was interrupted, at whatever moment, the same call goes on at the shard that was
    not finished, and ends with the same bytes as one that was not interrupted. A finished cache is
    returned at once, after a check that it is of the same teacher, dataset and settings.

    Args:
        teacher: a language model that returns `logits` `[B, S, V]`. It runs on its device, in its
            dtype, in eval mode.
        dataset: a `datasets.Dataset` or a sequence of mappings; a row is a sample, with `input_ids`
            `[S]`, `attention_mask` `[S]` where it is padded, and what else the teacher's forward
            names, except labels. Inputs of masked language models are masked already.
        output: a directory: new, empty, or with the cache to go on with.
        k: keep the k largest entries (`kdfast.truncated_softmax`).
        draws: sample instead (`kdfast.sampled_softmax`). Exactly one of the two is given.
        temperature: the teacher's T.
        proposal_temperature: of the draws.
        bits: of a log-prob, 16 or 8.
        vocab_size: columns of the logits at and beyond it are padding. None takes them all.
        tokenizer: saved beside the cache, and its vocabulary's fingerprint in it.
        teacher_fingerprint: what tells this teacher from others, if hashing its weights is not
            wanted.
        batch_size: samples per forward. Other sizes round differently, so an interrupted build
            keeps its bytes only with its own.
        samples_per_shard: an interruption costs the work on one shard.
        seed: of the draws, which depend on it and the shard's number alone.
        data: JSON that says how the dataset was made, kept in the manifest, compared on resuming.
        progress: is called with how many samples are done, and of how many, after each batch.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; an
            encoder-decoder, whose tokens are not those of `input_ids`; a sample with tokens that
            the teacher does not have, or more of them than it takes.
        TeacherCacheError: `output` holds something else or a damaged shard, is being written by
            another build, cannot be written; the teacher's outputs are NaN. It names the file.

    Example:
        >>> cache = build_cache(teacher, blocks, "cache", k=64, tokenizer=tokenizer)
        >>> trainer = DistillationTrainer(student, teacher_cache=cache, train_dataset=blocks)
    """
    if (k is None) == (draws is None):
        raise ValueError(f"exactly one of k and draws must be given, got k={k} and draws={draws}")
    for name, count in (("k", k), ("draws", draws)):
        if count is not None:
            check_count(name, count)
    check_count("batch_size", batch_size)
    check_count("samples_per_shard", samples_per_shard)
    check_number("temperature", temperature, 0, open_low=True)
    check_number("proposal_temperature", proposal_temperature, 0, open_low=True)
    check_choice("bits", bits, (8, 16))

    runner = _Teacher(teacher, columns_of(dataset))
    with runner.in_eval_mode():
        width = runner.width(dataset)
        vocab_size = width if vocab_size is None else vocab_size
        if not 1 <= vocab_size <= width:
            raise ValueError(
                f"vocab_size must be at least 1 and at most the teacher's {width}, got {vocab_size}"
            )
        if k is not None and k > vocab_size:
            raise ValueError(f"k must be at most the {vocab_size} columns that exist, got {k}")
        settings = {
            "teacher": teacher_fingerprint or runner.fingerprint(),
            "tokenizer": None
            if tokenizer is None
            else {"fingerprint": tokenizer_fingerprint(tokenizer), "tokens": len(tokenizer)},
            "dataset": {
                "fingerprint": dataset_fingerprint(dataset, runner.columns),
                "samples": len(dataset),
            },
            "data": data,
            "k": k,
            "draws": draws,
            "temperature": float(temperature),
            "proposal_temperature": float(proposal_temperature),
            "bits": bits,
            "vocab_size": vocab_size,
            "samples_per_shard": samples_per_shard,
            "seed": seed,
        }
        # As they come back out of a manifest: tuples are lists there.
        settings = json.loads(json.dumps(settings))
        directory = Path(output)
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        with _sole_builder(directory):
            manifest = _start_or_resume(directory, settings)
            _save_tokenizer(directory, tokenizer)
            samples = manifest["dataset"]["samples"]
            for number in range(len(manifest["shards"]), shard_count(manifest)):
                _build_shard(directory, manifest, number, runner, dataset, batch_size, progress)
            if progress is not None:
                progress(samples, samples)
    return TeacherCache(directory)


def _start_or_resume(directory: Path, settings: dict) -> dict:
    """The manifest of a directory whose listed shards are all in their places."""
    path = directory / MANIFEST
    if not path.exists():
        strangers = sorted(
            {entry.name for entry in directory.iterdir()} - {temporary_of(path).name}
        )
        if strangers:
            raise TeacherCacheError(
                f"{directory / strangers[0]} is in the way: the directory of a new cache is empty"
            )
        manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, **settings}
        manifest |= {"id": cache_id(manifest), "shards": []}
        write_manifest(directory, manifest)
        return manifest

    manifest = read_manifest(directory)
    if found := differences(settings, manifest, SETTINGS):
        raise TeacherCacheError(f"{path} is of another cache: {found}")
    _finish_last_shard(directory, manifest)
    # What was written before the interruption will not be looked at again for a long time.
    finished = len(manifest["shards"]) == shard_count(manifest)
    check = check_size if finished else check_checksum
    for number, entry in enumerate(manifest["shards"]):
        check(directory / shard_name(number), entry)
    return manifest


def _finish_last_shard(directory: Path, manifest: dict) -> None:
    """Give the last shard its name, if the build was interrupted between listing and renaming."""
    if not manifest["shards"]:
        return
    path = directory / shard_name(len(manifest["shards"]) - 1)
    if not path.exists() and temporary_of(path).exists():
        check_checksum(temporary_of(path), manifest["shards"][-1])
        rename(temporary_of(path), path)


def _save_tokenizer(directory: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    path = directory / TOKENIZER
    if tokenizer is None or path.exists():
        return
    temporary = temporary_of(path)
    with writing(temporary):
        tokenizer.save_pretrained(temporary)
        fsync_all(temporary)
    rename(temporary, path)


def _build_shard(
    directory: Path,
    manifest: dict,
    number: int,
    runner: _Teacher,
    dataset: Dataset | Sequence[Mapping[str, object]],
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    path = directory / shard_name(number)
    if path.exists():
        raise TeacherCacheError(
            f"{path} is in the way: it is the next shard's name, and the manifest does not list it"
        )
    temporary = temporary_of(path)
    part = shard_samples(manifest, number)
    generator = _generator(runner.device, manifest["seed"], number)
    with ShardWriter(temporary, layout_of(manifest), manifest["id"], number) as writer:
        for start in range(part.start, part.stop, batch_size):
            batch = range(start, min(start + batch_size, part.stop))
            outputs = runner.outputs(dataset, batch, manifest, generator)
            for sample, (row, top) in zip(batch, outputs, strict=True):
                if top.log_probs.isnan().any():
                    raise TeacherCacheError(
                        f"the teacher's outputs are NaN in sample {sample} of the dataset"
                    )
                writer.add(sample_hash(row["input_ids"]), *(entries.numpy() for entries in top))
            if progress is not None:
                progress(batch.stop, manifest["dataset"]["samples"])
    entry = {
        "file": path.name,
        "samples": len(part),
        "tokens": writer.tokens,
        "bytes": temporary.stat().st_size,
        "sha256": sha256_of(temporary),
    }
    # Listed before it has its name: an unlisted file of that name is never ours, and what is
    # listed can be checked, whichever name it has.
    manifest["shards"].append(entry)
    write_manifest(directory, manifest)
    rename(temporary, path)


def _generator(device: torch.device, seed: int, number: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


@contextmanager
def _sole_builder(directory: Path) -> Iterator[None]:
    """Two builds in one directory would write the same temporary names."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TeacherCacheError(f"{directory} is being written by another build") from None
        except OSError as error:
            raise TeacherCacheError(
                f"{directory} is on a file system that cannot lock it: {error.strerror}"
            ) from error
        yield
    finally:
        # The lock goes with the descriptor, and with the process.
        os.close(descriptor)


class _Teacher:
    """What a teacher says of a dataset's rows."""

    def __init__(self, model: nn.Module, dataset_columns: Sequence[str]) -> None:
        self.model = model
        names = inspect.signature(model.forward).parameters
        if "decoder_input_ids" in names:
            raise ValueError(
                f"teacher must be no encoder-decoder, got {type(model).__name__}: a cache is of "
                "the tokens in input_ids"
            )
        self._takes_mask = "attention_mask" in names or any(
            parameter.kind is parameter.VAR_KEYWORD for parameter in names.values()
        )
        self._options = {"use_cache": False} if "use_cache" in names else {}
        # The mask decides which tokens there are, whether or not the teacher takes one.
        self.columns = [
            name
            for name in dataset_columns
            if name in ("input_ids", "attention_mask") or (name in names and name != "labels")
        ]
        tensor = next(chain(model.parameters(), model.buffers()), None)
        self.device = torch.device("cpu") if tensor is None else tensor.device

    @contextmanager
    def in_eval_mode(self) -> Iterator[None]:
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            for module in training:
                module.training = True

    def fingerprint(self) -> str:
        return teacher_fingerprint(self.model)

    def width(self, dataset: Dataset | Sequence[Mapping[str, object]]) -> int:
        """Of the logits, by the first row that has tokens."""
        for sample, row in enumerate(rows_of(dataset, self.columns, range(len(dataset)))):
            if len(row["input_ids"]) > 0:
                return self._logits([row], sample).shape[-1]
        raise ValueError("dataset must have tokens, got rows that are all padding")

    def outputs(
        self,
        dataset: Dataset | Sequence[Mapping[str, object]],
        batch: range,
        manifest: dict,
        generator: torch.Generator,
    ) -> Iterator[tuple[Row, TruncatedSoftmax]]:
        rows = list(rows_of(dataset, self.columns, batch))
        lengths = [len(row["input_ids"]) for row in rows]
        if max(lengths) > 0:
            top = self._select(self._logits(rows, batch.start), manifest, generator)
        else:
            # Padding alone, which no model takes.
            k = layout_of(manifest).k
            top = TruncatedSoftmax(
                torch.empty(len(rows), 0, k), torch.empty(len(rows), 0, k, dtype=torch.int64)
            )
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            yield row, TruncatedSoftmax(*(entries[i, :length] for entries in top))

    def _select(
        self, logits: Tensor, manifest: dict, generator: torch.Generator
    ) -> TruncatedSoftmax:
        vocab_size, temperature = manifest["vocab_size"], manifest["temperature"]
        if manifest["draws"] is None:
            top = truncated_softmax(
                logits, manifest["k"], temperature=temperature, vocab_size=vocab_size
            )
        else:
            top = sampled_softmax(
                logits[..., :vocab_size],
                manifest["draws"],
                temperature=temperature,
                proposal_temperature=manifest["proposal_temperature"],
                generator=generator,
            )
        return TruncatedSoftmax(top.log_probs.float().cpu(), top.indices.cpu())

    def _logits(self, rows: list[Row], first: int) -> Tensor:
        """Of rows that are the dataset's from number `first` on."""
        self._check_tokens(rows, first)
        lengths = [len(row["input_ids"]) for row in rows]
        inputs = {name: self._batched([row[name] for row in rows], lengths) for name in rows[0]}
        if min(lengths) < max(lengths):
            if not self._takes_mask:
                raise ValueError(
                    "batch_size must be 1 for a teacher whose forward takes no attention_mask, "
                    f"got samples of {min(lengths)} and {max(lengths)} tokens in one batch"
                )
            inputs["attention_mask"] = self._batched(
                [np.ones(n, np.int64) for n in lengths], lengths
            )
        try:
            outputs = self.model(**inputs, **self._options)
        except (IndexError, RuntimeError) as error:
            # A table of positions that has come to its end fails in one of these ways, and its
            # size is not always what the configuration says.
            longest = max(lengths)
            limit = getattr(getattr(self.model, "config", None), "max_position_embeddings", None)
            if isinstance(error, IndexError) or (limit is not None and longest > limit):
                raise ValueError(
                    f"the teacher fails on samples {first} to {first + len(rows) - 1} of the "
                    f"dataset, of which {first + lengths.index(longest)} is the longest with "
                    f"{longest} tokens (max_position_embeddings: {limit}): {error}"
                ) from error
            raise
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        if logits.shape[:-1] != (len(rows), max(lengths)):
            raise ValueError(
                f"teacher must return logits [{len(rows)}, {max(lengths)}, vocabulary], got "
                f"{tuple(logits.shape)}"
            )
        return logits

    def _check_tokens(self, rows: list[Row], first: int) -> None:
        try:
            tokens = getattr(self.model.get_input_embeddings(), "num_embeddings", None)
        except (AttributeError, NotImplementedError):
            return
        if tokens is None:
            return
        for sample, row in enumerate(rows, first):
            ids = row["input_ids"]
            wrong = ids[(ids < 0) | (ids >= tokens)]
            if len(wrong):
                raise ValueError(
                    f"sample {sample} of the dataset has token {wrong[0]}, and the teacher has "
                    f"{tokens} tokens"
                )

    def _batched(self, values: list[np.ndarray], lengths: list[int]) -> Tensor:
        # On the right: what stands in front of a token is what it depends on.
        if all(value.shape[:1] == (n,) for value, n in zip(values, lengths, strict=True)):
            batch = np.zeros((len(values), max(lengths), *values[0].shape[1:]), values[0].dtype)
            for row, value in zip(batch, values, strict=True):
                row[: len(value)] = value
        else:
            batch = np.stack(values)
        return torch.from_numpy(batch).to(self.device)
