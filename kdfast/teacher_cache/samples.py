"""Rows of a dataset, and what tells one teacher, tokenizer or dataset from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import nn

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Row = dict[str, np.ndarray]
# Of a Hugging Face dataset, read at once.
ROWS_AT_ONCE = 1000
# Of a configuration: what changes while the model stays the same.
VOLATILE = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"}


def is_table(dataset: object) -> bool:
    """Whether a dataset is a `datasets.Dataset` (which is not imported to find that out)."""
    return hasattr(dataset, "with_format") and hasattr(dataset, "add_column")


def columns_of(dataset: Dataset | Sequence[Mapping[str, object]]) -> list[str]:
    """The names of a row's columns.

    Raises:
        TypeError: it is neither a `datasets.Dataset` nor a sequence of mappings.
        ValueError: no rows, no `input_ids`.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            "dataset must be a datasets.Dataset or a sequence of mappings, got "
            f"{type(dataset).__name__}"
        )
    if len(dataset) == 0:
        raise ValueError("dataset must have rows, got none")
    row = dataset[0]
    if not isinstance(row, Mapping) or "input_ids" not in row:
        raise ValueError("dataset must have rows with input_ids")
    return list(row)


def rows_of(
    dataset: Dataset | Sequence[Mapping[str, object]], columns: Sequence[str], part: range
) -> Iterator[Row]:
    """The chosen columns of consecutive rows, as arrays, without the padding.

    Where `attention_mask` is among the columns, it is taken out of the row, and what has a value
    per token keeps those where the mask is 1.
    """
    if is_table(dataset) and dataset.format["type"] != "custom":
        rows = _table_rows(dataset, columns, part)
    else:
        rows = (
            {name: np.asarray(row[name]) for name in columns}
            for row in map(dataset.__getitem__, part)
        )
    for row in rows:
        mask = row.pop("attention_mask", None)
        if mask is not None:
            real = mask.astype(bool)
            row = {
                name: values[real] if values.shape[:1] == real.shape else values
                for name, values in row.items()
            }
        yield row


def _table_rows(dataset: Dataset, columns: Sequence[str], part: range) -> Iterator[Row]:
    formatted = dataset.with_format("arrow", columns=list(columns))
    for start in range(part.start, part.stop, ROWS_AT_ONCE):
        table = formatted[start : min(start + ROWS_AT_ONCE, part.stop)]
        parts = [_split(table.column(name).combine_chunks()) for name in columns]
        for values in zip(*parts, strict=True):
            yield dict(zip(columns, values, strict=True))


def _split(column: pa.Array) -> Sequence[np.ndarray]:
    if not pa.types.is_nested(column.type):
        return column.to_numpy(zero_copy_only=False)
    values = pc.list_flatten(column)
    if pa.types.is_nested(values.type):
        return [np.asarray(value) for value in column.to_pylist()]
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    ends = np.cumsum(lengths)
    values = values.to_numpy(zero_copy_only=False)
    return [values[end - n : end] for end, n in zip(ends, lengths, strict=True)]


def sample_hash(input_ids: np.ndarray) -> int:
    """8 bytes of what the teacher saw of a sample."""
    digest = hashlib.blake2b(input_ids.astype("<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def dataset_fingerprint(
    dataset: Dataset | Sequence[Mapping[str, object]], columns: Sequence[str]
) -> str:
    """Of the rows, their order, and every column that the teacher sees."""
    digest = hashlib.sha256()
    for row in rows_of(dataset, columns, range(len(dataset))):
        for name in sorted(row):
            digest.update(f"{name} {row[name].shape}".encode())
            digest.update(np.ascontiguousarray(row[name]).astype("<f8").tobytes())
    return digest.hexdigest()


def teacher_fingerprint(teacher: nn.Module) -> str:
    """Of the weights, and of what a configuration says beside its class's defaults."""
    digest = hashlib.sha256(type(teacher).__name__.encode())
    config = getattr(teacher, "config", None)
    if hasattr(config, "to_diff_dict"):
        settings = {k: v for k, v in config.to_diff_dict().items() if k not in VOLATILE}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(teacher.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of which id means which token. How text is cut shows in the samples' own hashes."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()
