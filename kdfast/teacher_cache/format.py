"""The bytes of a teacher cache: a manifest in JSON, and shards in Parquet."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdfast import files

FORMAT = "kdfast teacher cache"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"

# A sample is read with the row group that it stands in: 280 KB at 4.3 bytes per entry.
ROW_GROUP_ENTRIES = 65536

# 8 bits: 0 … 254 are steps below the largest log-prob, 255 is −inf.
CODE_STEPS = 254
CODE_INF = 255
# One entry far below the others (a masked token's logit of −1e4) must not widen everybody's steps;
# exp(−64) is below float32's resolution of any probability.
WIDEST_RANGE = 64.0
SMALLEST = float(np.finfo(np.float16).min)


class TeacherCacheError(ValueError):
    """A cache that is damaged, incomplete, or of something else; the message names the file."""


class OtherRowsError(TeacherCacheError):
    """Rows of a dataset that are not the cache's samples."""


@dataclass(frozen=True)
class Layout:
    """How a token's entries are stored.

    Args:
        k: entries per token.
        vocab_size: ids lie in [0, vocab_size).
        bits: of a log-prob, 8 or 16.
    """

    k: int
    vocab_size: int
    bits: int

    @property
    def id_dtype(self) -> np.dtype:
        """The smallest that holds the ids and, as its maximum, an entry that does not exist."""
        return np.dtype(np.uint16 if self.vocab_size <= 65535 else np.uint32)

    @property
    def no_entry(self) -> int:
        return np.iinfo(self.id_dtype).max

    @property
    def schema(self) -> pa.Schema:
        columns = {
            "sample_hash": pa.uint64(),
            "indices": pa.list_(pa.from_numpy_dtype(self.id_dtype)),
        }
        if self.bits == 16:
            columns["log_probs"] = pa.list_(pa.float16())
        else:
            columns["codes"] = pa.list_(pa.uint8())
            columns["largest"] = pa.list_(pa.float16())
            columns["range"] = pa.list_(pa.float16())
        return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])

    def encode(self, log_probs: np.ndarray, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Columns of a sample, flat.

        Args:
            log_probs: `[tokens, k]`, float32, largest first.
            indices: `[tokens, k]`, int64, −1 for an entry that does not exist.
        """
        ids = np.where(indices < 0, self.no_entry, indices).astype(self.id_dtype)
        columns = {"indices": ids.ravel()}
        # −inf is what had no probability, not what is too small for float16.
        exists = np.isfinite(log_probs)
        half = np.where(exists, np.maximum(log_probs, SMALLEST), log_probs).astype(np.float16)
        if self.bits == 16:
            return {**columns, "log_probs": half.ravel()}

        largest = half[:, 0]
        # A token without any probability has no steps to count.
        top = np.where(exists[:, 0], largest, 0).astype(np.float32)[:, None]
        below = np.where(exists, top - log_probs, 0).clip(0, WIDEST_RANGE)
        width = below.max(-1).astype(np.float16)
        steps = np.rint(below * (CODE_STEPS / np.maximum(width, 1e-4, dtype=np.float32)[:, None]))
        codes = np.where(exists, steps.clip(0, CODE_STEPS), CODE_INF).astype(np.uint8)
        return {**columns, "codes": codes.ravel(), "largest": largest, "range": width}

    def decode(self, columns: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The inverse of `encode`: `(log_probs float32, indices int64)`, both `[tokens, k]`."""
        ids = columns["indices"].reshape(-1, self.k)
        exists = ids != self.no_entry
        if self.bits == 16:
            log_probs = columns["log_probs"].reshape(-1, self.k).astype(np.float32)
        else:
            codes = columns["codes"].reshape(-1, self.k)
            step = columns["range"].astype(np.float32) / CODE_STEPS
            log_probs = columns["largest"].astype(np.float32)[:, None] - codes * step[:, None]
            log_probs[codes == CODE_INF] = -math.inf
        return log_probs, np.where(exists, ids.astype(np.int64), -1)


class ShardWriter:
    """Samples into one Parquet file, a row group as soon as it is full.

    At the end of its `with` block the file is whole and on the disk; after an exception it is left
    as it is.

    Args:
        path: of the file, which is overwritten.
        cache_id, number: written into the file, so that it cannot stand in for another.

    Raises:
        TeacherCacheError: the file cannot be written.
    """

    def __init__(self, path: Path, layout: Layout, cache_id: str, number: int) -> None:
        self.layout = layout
        self.tokens = 0
        self._path = path
        self._hashes: list[int] = []
        self._samples: list[dict[str, np.ndarray]] = []
        self._entries = 0
        self._schema = layout.schema.with_metadata(shard_metadata(cache_id, number))
        names = [field.name for field in layout.schema]
        # Parquet's smallest integer has 32 bits: packed deltas keep ids in 17 or 18 of them, and
        # codes in 9, without a compressor that every read would have to undo.
        packed = {f"{name}.list.element" for name in ("indices", "codes") if name in names}
        rest = {"sample_hash"} | {
            f"{name}.list.element" for name in ("log_probs", "largest", "range") if name in names
        }
        with writing(path):
            # Closed by __exit__.
            self._file = open(path, "wb")  # noqa: SIM115
        self._writer = pq.ParquetWriter(
            self._file,
            self._schema,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
            column_encoding={
                **dict.fromkeys(packed, "DELTA_BINARY_PACKED"),
                **dict.fromkeys(rest, "PLAIN"),
            },
            # A changed byte is an error at the read that meets it.
            write_page_checksum=True,
        )

    def add(self, sample_hash: int, log_probs: np.ndarray, indices: np.ndarray) -> None:
        self._hashes.append(sample_hash)
        self._samples.append(self.layout.encode(log_probs, indices))
        self.tokens += len(indices)
        self._entries += indices.size
        if self._entries >= ROW_GROUP_ENTRIES:
            self._flush()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                if self._hashes:
                    self._flush()
                with writing(self._path):
                    self._writer.close()
                    self._file.flush()
                    os.fsync(self._file.fileno())
        finally:
            # Or it would try again when it is collected, and complain of a closed file.
            self._writer.is_open = False
            # What is still in its buffer belongs to a file that will not be used.
            with suppress(OSError):
                self._file.close()

    def _flush(self) -> None:
        columns = [pa.array(self._hashes, pa.uint64())]
        for field in list(self._schema)[1:]:
            parts = [sample[field.name] for sample in self._samples]
            offsets = np.cumsum([0, *map(len, parts)]).astype(np.int32)
            columns.append(
                pa.ListArray.from_arrays(offsets, np.concatenate(parts), type=field.type)
            )
        with writing(self._path):
            self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))
        self._hashes, self._samples, self._entries = [], [], 0


def shard_metadata(cache_id: str, number: int) -> dict[str, str]:
    return {"kdfast.cache": cache_id, "kdfast.shard": str(number)}


def shard_name(number: int) -> str:
    return f"shard-{number:05}.parquet"


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


# What a cache is of and how it is stored; the rest of a manifest says what is there already.
SETTINGS = (
    "teacher",
    "tokenizer",
    "dataset",
    "data",
    "k",
    "draws",
    "temperature",
    "proposal_temperature",
    "bits",
    "vocab_size",
    "samples_per_shard",
    "seed",
)


# What it says of each shard.
ENTRY = {"file": str, "samples": int, "tokens": int, "bytes": int, "sha256": str}


def cache_id(manifest: dict) -> str:
    """What two caches have in common only if they are the same: a hash of their settings."""
    settings = {name: manifest[name] for name in SETTINGS}
    text = json.dumps([FORMAT, FORMAT_VERSION, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def layout_of(manifest: dict) -> Layout:
    k = manifest["draws"] if manifest["k"] is None else manifest["k"]
    return Layout(k, manifest["vocab_size"], manifest["bits"])


def shard_samples(manifest: dict, number: int) -> range:
    start = number * manifest["samples_per_shard"]
    stop = min(start + manifest["samples_per_shard"], manifest["dataset"]["samples"])
    return range(start, stop)


def shard_count(manifest: dict) -> int:
    return math.ceil(manifest["dataset"]["samples"] / manifest["samples_per_shard"])


def write_manifest(directory: Path, manifest: dict) -> None:
    text = json.dumps(manifest, indent=1) + "\n"
    path = directory / MANIFEST
    with writing(path):
        files.write(path, text.encode())


def read_manifest(directory: Path) -> dict:
    """The manifest, checked.

    Raises:
        TeacherCacheError: there is none, it is no manifest or a newer one, it was edited.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TeacherCacheError(f"{directory} holds no teacher cache: {path} is missing") from None
    except OSError as error:
        raise TeacherCacheError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise TeacherCacheError(f"{path} is damaged: it is no JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise TeacherCacheError(f"{path} is not the manifest of a {FORMAT}")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise TeacherCacheError(
            f"{path} has format version {version!r}, and this kdfast reads {FORMAT_VERSION}"
        )
    missing = {*SETTINGS, "id", "shards"} - manifest.keys()
    if missing:
        raise TeacherCacheError(f"{path} is damaged: it has no {', '.join(sorted(missing))}")
    if manifest["id"] != cache_id(manifest):
        raise TeacherCacheError(f"{path} is damaged: its settings are not those of its id")
    shards = manifest["shards"]
    if not isinstance(shards, list) or not all(map(_is_entry, shards)):
        raise TeacherCacheError(
            f"{path} is damaged: its shards are no list of entries with {', '.join(ENTRY)}"
        )
    return manifest


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(entry.get(name), kind) for name, kind in ENTRY.items()
    )


def check_size(path: Path, entry: dict) -> None:
    """A shard is there, as long as the manifest says.

    Raises:
        TeacherCacheError: it is not.
    """
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise TeacherCacheError(
            f"{path} is missing: the manifest lists it, and only a build that was interrupted and "
            "is run again brings it back"
        ) from None
    except OSError as error:
        raise TeacherCacheError(f"{path} cannot be read: {error.strerror}") from error
    if size != entry["bytes"]:
        raise TeacherCacheError(
            f"{path} is damaged: it has {size} bytes, and the manifest says {entry['bytes']}"
        )


def check_checksum(path: Path, entry: dict) -> None:
    """A shard's bytes are those that were written.

    Raises:
        TeacherCacheError: they are not.
    """
    check_size(path, entry)
    if sha256_of(path) != entry["sha256"]:
        raise TeacherCacheError(
            f"{path} is damaged: its SHA-256 is not the one that the manifest lists"
        )


def rename(temporary: Path, path: Path) -> None:
    """The whole file or the one before, after a power failure too."""
    with writing(path):
        files.rename(temporary, path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A disk that is full, a directory that may not be written: one error that names the file."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise TeacherCacheError(f"cannot write {path}: {reason}") from error


def differences(expected: dict, found: dict, names: Sequence[str]) -> str:
    """Which of the settings differ, and how."""
    return "; ".join(
        f"{name} is {found[name]!r} there and {expected[name]!r} here"
        for name in names
        if expected[name] != found[name]
    )
