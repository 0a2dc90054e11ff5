"""Shards into `TruncatedSoftmax`: `TeacherCache`."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from kdfast.ops.truncated_softmax import TruncatedSoftmax
from kdfast.teacher_cache.format import (
    MANIFEST,
    Layout,
    OtherRowsError,
    TeacherCacheError,
    check_checksum,
    check_size,
    layout_of,
    read_manifest,
    shard_count,
    shard_metadata,
    shard_name,
    shard_samples,
)
from kdfast.teacher_cache.samples import (
    columns_of,
    is_table,
    rows_of,
    sample_hash,
    tokenizer_fingerprint,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# What Arrow raises for bytes that were changed: in a footer, anything that follows from them.
DAMAGE = (OSError, ValueError, KeyError, AttributeError, pa.ArrowException)

# An open shard is its footer, about 100 KB; a row group is below 1 MB, or one long sample.
SHARDS_KEPT = 32
ROW_GROUPS_KEPT = 8


class TeacherCache:
    """A teacher's truncated outputs per token, from disk.

    Opening reads the manifest and the shards' sizes, none of their data. A sample is read with its
    row group, out of a file that is mapped into memory; what was read last is kept, and no more.
    Instances can be pickled and used from several threads and processes, data loader workers among
    them: each process opens the shards again.

    Args:
        directory: what `build_cache` or `kdfast cache build` wrote.

    Raises:
        TeacherCacheError: no manifest or one of a newer format, a shard that is missing or has
            another size, a build that was not finished. It names the file. A shard whose bytes were
            changed, or that is of another cache, is such an error when it is read, and in `verify`.

    Example:
        >>> cache = TeacherCache("cache")
        >>> top = cache[0]  # TruncatedSoftmax, [tokens, k]
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        """The manifest, as docs/teacher-cache.md describes it."""
        shards, count = self.manifest["shards"], shard_count(self.manifest)
        if len(shards) != count:
            raise TeacherCacheError(
                f"{self.directory / MANIFEST} lists {len(shards)} of {count} shards: the build was "
                "not finished; run it again and it goes on"
            )
        for path, entry in self._shards():
            check_size(path, entry)
        self._layout = layout_of(self.manifest)
        self._readers: _Readers | None = None

    def __reduce__(self) -> tuple:
        return TeacherCache, (self.directory,)

    def __repr__(self) -> str:
        return (
            f"TeacherCache({str(self.directory)!r}: {len(self)} samples, {self.tokens} tokens, "
            f"{'sampled ' if self.sampled else ''}k={self.k}, {self.bytes_per_token:.1f} bytes "
            "per token)"
        )

    @property
    def k(self) -> int:
        """Entries per token: `k`, or the draws of a sampled cache."""
        return self._layout.k

    @property
    def sampled(self) -> bool:
        """Whether the entries were drawn (`kdfast.sampled_softmax`) and not the largest."""
        return self.manifest["draws"] is not None

    @property
    def temperature(self) -> float:
        """The teacher's, of the softmax that the entries are of."""
        return self.manifest["temperature"]

    @property
    def vocab_size(self) -> int:
        """The columns that the softmax was over."""
        return self._layout.vocab_size

    @property
    def tokens(self) -> int:
        return sum(entry["tokens"] for entry in self.manifest["shards"])

    @property
    def nbytes(self) -> int:
        """Of all shards on disk, the manifest and the tokenizer not counted."""
        return sum(entry["bytes"] for entry in self.manifest["shards"])

    @property
    def bytes_per_token(self) -> float:
        return self.nbytes / max(self.tokens, 1)

    def __len__(self) -> int:
        """Samples."""
        return self.manifest["dataset"]["samples"]

    def __getitem__(self, sample: int) -> TruncatedSoftmax:
        """A sample's tokens: those whose attention mask was 1, in their order, not shifted.

        Returns:
            `TruncatedSoftmax(log_probs, indices)`, `[tokens, k]`, float32 and int64, on the CPU.
            Row t is the teacher's distribution at position t.

        Raises:
            IndexError: there is no such sample.
            TeacherCacheError: its shard is damaged or of another cache.
        """
        return self._sample(sample)[0]

    def _sample(self, sample: int) -> tuple[TruncatedSoftmax, int]:
        """What the teacher said of a sample, and the hash of what it saw."""
        sample = int(sample)
        if not -len(self) <= sample < len(self):
            raise IndexError(f"sample {sample} of a teacher cache of {len(self)}")
        number, row = divmod(sample % len(self), self.manifest["samples_per_shard"])
        columns, seen = self._reader().sample(number, row)
        log_probs, indices = self._layout.decode(columns)
        return TruncatedSoftmax(torch.from_numpy(log_probs), torch.from_numpy(indices)), seen

    def rows(
        self,
        samples: Sequence[int] | Tensor,
        positions: Tensor,
        input_ids: Tensor | None = None,
    ) -> TruncatedSoftmax:
        """Several samples, where a padded batch has their tokens.

        Args:
            samples: `[B]`, integers.
            positions: `[B, S]`, bool, True where the sample's tokens stand: its attention mask.
            input_ids: `[B, S]`, to be compared with the hash of what the teacher saw of each
                sample. None trusts that these are its samples.

        Returns:
            `TruncatedSoftmax`, `[B, S, k]`, float32 and int64, on the CPU; −inf and −1 where
            `positions` is False.

        Raises:
            IndexError: there is no such sample.
            TypeError, ValueError: `positions` is no such mask, or has another number of tokens than
                a sample.
            OtherRowsError: `input_ids` are not the tokens that the teacher saw.
            TeacherCacheError: as for a sample.
        """
        if positions.dtype != torch.bool:
            raise TypeError(f"positions must be bool, got {positions.dtype}")
        if positions.dim() != 2 or len(positions) != len(samples):
            raise ValueError(
                f"positions must be [{len(samples)}, S], a row per sample, got the shape "
                f"{tuple(positions.shape)}"
            )
        positions = positions.cpu()
        if input_ids is not None:
            if input_ids.shape != positions.shape:
                raise ValueError(
                    f"input_ids must be {tuple(positions.shape)}, as positions are, got "
                    f"{tuple(input_ids.shape)}"
                )
            input_ids = input_ids.cpu()
        # A tensor's list is Python numbers, without a synchronisation for each of them.
        numbers = samples.tolist() if isinstance(samples, Tensor) else list(samples)
        shape = (*positions.shape, self.k)
        log_probs = torch.full(shape, -torch.inf)
        indices = torch.full(shape, -1, dtype=torch.int64)
        for i, sample in enumerate(numbers):
            top, seen = self._sample(sample)
            counted = int(positions[i].sum())
            if len(top.indices) != counted:
                raise ValueError(
                    f"sample {sample} has {len(top.indices)} tokens in the teacher cache and "
                    f"{counted} in the batch"
                )
            if input_ids is not None and sample_hash(input_ids[i, positions[i]].numpy()) != seen:
                raise OtherRowsError(
                    f"the batch has other tokens than the teacher saw of sample {sample} of "
                    f"{self.directory}"
                )
            log_probs[i, positions[i]] = top.log_probs
            indices[i, positions[i]] = top.indices
        return TruncatedSoftmax(log_probs, indices)

    def attach(
        self, dataset: Dataset | Sequence[Mapping[str, object]], start: int = 0
    ) -> Dataset | list[dict[str, object]]:
        """The dataset with a column `teacher_sample`: which of the cache's samples a row is.

        Every row is compared with the hash of what the teacher saw, so that another order,
        tokenizer or masking is an error here and not a student that learns from the wrong rows.

        Args:
            dataset: as for `build_cache`; its rows are the samples from `start` on.
            start: the sample of the first row.

        Returns:
            A `datasets.Dataset` for one, otherwise a list of dicts.

        Raises:
            TypeError: no such dataset.
            OtherRowsError: more rows than the cache has samples, or a row that is not the sample:
                it names the shard and the row.
            TeacherCacheError: as for a sample.

        Example:
            >>> train, held_out = cache.attach(train, 0), cache.attach(held_out, len(train))
        """
        names = columns_of(dataset)
        if not (start >= 0 and start + len(dataset) <= len(self)):
            raise OtherRowsError(
                f"dataset must have at most {max(0, len(self) - start)} rows, the cache's samples "
                f"from {start} on, got {len(dataset)}"
            )
        columns = [name for name in ("input_ids", "attention_mask") if name in names]
        rows = rows_of(dataset, columns, range(len(dataset)))
        hashes: np.ndarray | None = None
        for sample, row in enumerate(rows, start):
            number, place = divmod(sample, self.manifest["samples_per_shard"])
            if hashes is None or place == 0:
                hashes = self._reader().hashes(number)
            if sample_hash(row["input_ids"]) != hashes[place]:
                raise OtherRowsError(
                    f"{self.directory / shard_name(number)}, row {place}: the teacher saw other "
                    f"tokens than row {sample - start} of the dataset has; was it made with "
                    "another tokenizer, order, masking or text?"
                )
        numbers = range(start, start + len(dataset))
        if is_table(dataset):
            return dataset.add_column("teacher_sample", np.array(numbers, np.int64))
        return [{**dataset[i], "teacher_sample": number} for i, number in enumerate(numbers)]

    def verify(self) -> None:
        """Read every byte of every shard and compare checksums.

        Raises:
            TeacherCacheError: naming the first shard that is not what was written.
        """
        for path, entry in self._shards():
            check_checksum(path, entry)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """The cache was built with a tokenizer of the same vocabulary.

        Raises:
            TeacherCacheError: it was not, or without any.
        """
        built_with = self.manifest["tokenizer"]
        path = self.directory / MANIFEST
        if built_with is None:
            raise TeacherCacheError(f"{path} names no tokenizer: the cache was built without one")
        if tokenizer_fingerprint(tokenizer) != built_with["fingerprint"]:
            raise TeacherCacheError(
                f"{path} is of another tokenizer: it had {built_with['tokens']} tokens and this "
                f"one has {len(tokenizer)}, or some of them have other ids"
            )

    def _shards(self) -> list[tuple[Path, dict]]:
        return [
            (self.directory / shard_name(number), entry)
            for number, entry in enumerate(self.manifest["shards"])
        ]

    def _reader(self) -> _Readers:
        # A fork copies locks as they are, held ones too, and file positions: start afresh.
        if self._readers is None or self._readers.process != os.getpid():
            self._readers = _Readers(self.directory, self.manifest, self._layout)
        return self._readers


class _Shard(NamedTuple):
    file: pq.ParquetFile
    # Of each row group the first row, and behind the last the count.
    first_rows: list[int]


class _Group(NamedTuple):
    # By column, all samples' values, and where each sample's begin.
    columns: dict[str, tuple[np.ndarray, np.ndarray]]
    hashes: np.ndarray


class _Recent:
    """What was asked for last, up to a count."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[Hashable, object] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], object]) -> object:
        if key not in self._kept:
            self._kept[key] = make()
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


class _Readers:
    """One process's open shards and the row groups that it read last."""

    def __init__(self, directory: Path, manifest: dict, layout: Layout) -> None:
        self.process = os.getpid()
        self._directory = directory
        self._manifest = manifest
        self._schema = layout.schema
        self._names = [field.name for field in layout.schema if field.name != "sample_hash"]
        self._shards = _Recent(SHARDS_KEPT)
        self._groups = _Recent(ROW_GROUPS_KEPT)
        self._lock = Lock()

    def sample(self, number: int, row: int) -> tuple[dict[str, np.ndarray], int]:
        """The columns of one row of a shard, and its hash."""
        # One reader at a time: a ParquetFile does not serve two.
        with self._lock:
            shard = self._shards.get(number, lambda: self._open(number))
            index = bisect_right(shard.first_rows, row) - 1
            group = self._groups.get((number, index), lambda: self._read(shard, number, index))
        place = row - shard.first_rows[index]
        columns = {
            name: values[starts[place] : starts[place + 1]]
            for name, (values, starts) in group.columns.items()
        }
        return columns, int(group.hashes[place])

    def hashes(self, number: int) -> np.ndarray:
        with self._lock:
            shard = self._shards.get(number, lambda: self._open(number))
            try:
                table = shard.file.read(["sample_hash"], use_threads=False)
                hashes = table.column("sample_hash").to_numpy()
            except DAMAGE as error:
                raise self._damaged(number, error) from error
        if len(hashes) != shard.first_rows[-1]:
            raise self._damaged(number, ValueError(f"it has {len(hashes)} hashes"))
        return hashes

    def _open(self, number: int) -> _Shard:
        path = self._directory / shard_name(number)
        try:
            file = pq.ParquetFile(
                path, memory_map=True, pre_buffer=False, page_checksum_verification=True
            )
            schema, found = file.schema_arrow, file.metadata.metadata or {}
        except DAMAGE as error:
            raise self._damaged(number, error) from error
        expected = shard_metadata(self._manifest["id"], number)
        if any(found.get(key.encode()) != value.encode() for key, value in expected.items()):
            raise TeacherCacheError(f"{path} is of another cache, or another of its shards")
        if not schema.equals(self._schema):
            raise self._damaged(number, ValueError("its columns are not those of the manifest"))
        groups = range(file.metadata.num_row_groups)
        first_rows = list(
            accumulate((file.metadata.row_group(i).num_rows for i in groups), initial=0)
        )
        if first_rows[-1] != len(shard_samples(self._manifest, number)):
            raise TeacherCacheError(f"{path} is damaged: it has {first_rows[-1]} samples")
        return _Shard(file, first_rows)

    def _read(self, shard: _Shard, number: int, index: int) -> _Group:
        try:
            # On this thread: Arrow's own pool does not survive a fork.
            table = shard.file.read_row_group(index, use_threads=False)
            columns = [table.column(name).combine_chunks() for name in self._names]
            return _Group(
                {
                    name: (column.values.to_numpy(), column.offsets.to_numpy())
                    for name, column in zip(self._names, columns, strict=True)
                },
                table.column("sample_hash").to_numpy(),
            )
        except DAMAGE as error:
            raise self._damaged(number, error) from error

    def _damaged(self, number: int, error: Exception) -> TeacherCacheError:
        reason = str(error).strip().partition("\n")[0]
        return TeacherCacheError(
            f"{self._directory / shard_name(number)} is damaged or cannot be read: {reason}"
        )
