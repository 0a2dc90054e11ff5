"""Text files into blocks of tokens."""

import glob
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from datasets.exceptions import DatasetGenerationError
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

_READERS = {
    ".txt": Dataset.from_text,
    ".json": Dataset.from_json,
    ".jsonl": Dataset.from_json,
    ".csv": Dataset.from_csv,
    ".parquet": Dataset.from_parquet,
}


def load_rows(path: str | Path) -> Dataset:
    """A file's rows, with the columns that it has.

    Args:
        path: .json, .jsonl, .csv or .parquet; or .txt, whose paragraphs are rows with a column
            `text`.

    Raises:
        ValueError: a suffix that is none of these, a file that is damaged, no row at all.

    Example:
        >>> load_rows("reviews.csv").column_names
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path} must end in one of {', '.join(_READERS)}")
    options = {"sample_by": "paragraph"} if reader is Dataset.from_text else {}
    rows = ()
    try:
        # datasets has a different error for each kind of empty file.
        if path.stat().st_size > 0:
            # A pattern, for datasets.
            rows = reader(glob.escape(str(path)), **options)
    except (DatasetGenerationError, ValueError) as error:
        if "corresponds to no data" not in str(error):
            # A DatasetGenerationError says no more than that there was one.
            reason = error.__cause__ if isinstance(error, DatasetGenerationError) else error
            raise ValueError(f"{path}: {reason}") from error
    if len(rows) == 0:
        raise ValueError(f"{path} holds no rows")
    return rows


def load_documents(paths: Sequence[str | Path], text_column: str = "text") -> Dataset:
    """One row per document, in a column `text`.

    Args:
        paths: .txt, where a blank line ends a document; .json, .jsonl, .csv or .parquet, where a
            row is a document.
        text_column: the column that holds the text. Empty documents are dropped.

    Raises:
        ValueError: a suffix that is none of these, a column that is missing or holds no text, no
            document at all.

    Example:
        >>> load_documents(["notes.txt", "articles.jsonl"])[0]["text"]
    """
    parts = []
    for path in map(Path, paths):
        documents = load_rows(path)
        if path.suffix.lower() != ".txt":
            documents = _text_column(documents, text_column, path)
        parts.append(
            documents.filter(lambda text: bool(text and text.strip()), input_columns="text")
        )
    documents = concatenate_datasets(parts)
    if len(documents) == 0:
        raise ValueError(f"{', '.join(map(str, paths))}: no text in there")
    return documents


def _text_column(rows: Dataset, name: str, path: Path) -> Dataset:
    if name not in rows.column_names:
        raise ValueError(f"{path} has no column {name!r}, it has {', '.join(rows.column_names)}")
    dtype = getattr(rows.features[name], "dtype", None)
    if dtype not in ("string", "large_string"):
        raise ValueError(f"{path}: column {name!r} holds {dtype or 'no text'}, not text")
    rows = rows.select_columns(name)
    return rows if name == "text" else rows.rename_column(name, "text")


def pack(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, block_size: int, *, masked: bool = False
) -> Dataset:
    """All documents behind each other, cut into blocks of `block_size` tokens; the rest is dropped.

    Args:
        documents: rows with a column `text`.
        masked: for masked language models, whose collator masks the blocks. Otherwise a document
            ends with the end-of-sequence token, and `labels` are the tokens themselves.

    Returns:
        Rows of `input_ids` and `labels`, or of `input_ids` and `special_tokens_mask`, each
        `block_size` long.

    Example:
        >>> blocks = pack(load_documents(["notes.txt"]), tokenizer, 512)
    """
    eos = tokenizer.eos_token_id

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        # Documents longer than the model are what the packing is for: no warning about them.
        columns = tokenizer(batch["text"], return_special_tokens_mask=masked, verbose=False)
        if masked:
            return {key: columns[key] for key in ("input_ids", "special_tokens_mask")}
        ends = [[] if eos is None or ids[-1:] == [eos] else [eos] for ids in columns["input_ids"]]
        return {
            "input_ids": [ids + end for ids, end in zip(columns["input_ids"], ends, strict=True)]
        }

    def cut(batch: dict[str, list]) -> dict[str, list]:
        columns = {key: list(chain.from_iterable(rows)) for key, rows in batch.items()}
        count = len(columns["input_ids"]) // block_size
        blocks = {
            key: [row[i * block_size : (i + 1) * block_size] for i in range(count)]
            for key, row in columns.items()
        }
        return blocks if masked else {**blocks, "labels": blocks["input_ids"]}

    tokens = documents.map(tokenize, batched=True, remove_columns=documents.column_names)
    # A batch of documents drops its own rest, so batches are large.
    return tokens.map(cut, batched=True, batch_size=10_000, remove_columns=tokens.column_names)


def mask_once(
    blocks: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    probability: float,
    seed: int,
    *,
    start: int = 0,
) -> Dataset:
    """Blocks for masked language models with their masks fixed, the same for every epoch.

    What a teacher said once of a masked text holds for that mask alone. So a teacher cache needs
    masks that come back: they depend on the seed and a block's number. Of the chosen tokens 80 %
    become the mask token, 10 % a random one, and 10 % stay, as in BERT (Devlin et al. 2018,
    "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding").

    Args:
        blocks: of `pack(..., masked=True)`.
        probability: of each token that is not special to be chosen.
        start: the first block's number, where the blocks are a part of more.

    Returns:
        Rows of `input_ids` and of `labels`, −100 where no token was chosen.

    Example:
        >>> masked = mask_once(pack(documents, tokenizer, 512, masked=True), tokenizer, 0.15, 42)
    """

    def mask(row: dict[str, list[int]], number: int) -> dict[str, np.ndarray]:
        special = np.array(row["special_tokens_mask"]) == 1
        seeds = (seed, start + number)
        return _mask(np.array(row["input_ids"]), special, tokenizer, probability, seeds)

    return blocks.map(mask, with_indices=True, remove_columns=["special_tokens_mask"])


class EpochMasks(TrainerCallback):
    """A data collator that masks blocks for masked language models, in every epoch anew.

    As `mask_once` does it, but by the seed, the epoch and the block's own tokens. So the masks are
    nobody else's random numbers: a training that is resumed has those of one that was not, which
    `transformers.DataCollatorForLanguageModeling` has not, and neither the batch nor the number of
    processes changes them. Blocks of the same tokens have the same masks.

    It learns the epoch as one of the trainer's callbacks. Persistent workers of a data loader
    (`dataloader_persistent_workers`) do not see it change.

    Args:
        tokenizer: with a mask token.
        probability: of each token that is not special to be chosen.
        seed: of the masks.

    Example:
        >>> masks = EpochMasks(tokenizer, 0.15, 42)
        >>> DistillationTrainer(..., data_collator=masks, callbacks=[masks])
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float, seed: int) -> None:
        self.tokenizer = tokenizer
        self.probability = probability
        self.seed = seed
        self.epoch = 0

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        # Resumed within an epoch, it is a fraction of one.
        self.epoch = int(state.epoch or 0)

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """A batch of `input_ids` and `labels`, `[B, S]` int64, of rows with `input_ids`."""
        masked = []
        for row in rows:
            ids = np.asarray(row["input_ids"], dtype=np.int64)
            digest = blake2b(ids.tobytes(), digest_size=8).digest()
            seeds = (self.seed, self.epoch, int.from_bytes(digest, "little"))
            # Trainer hands on no column that no model names, `special_tokens_mask` among them.
            special = np.isin(ids, self.tokenizer.all_special_ids)
            masked.append(_mask(ids, special, self.tokenizer, self.probability, seeds))
        return {
            name: torch.from_numpy(np.stack([row[name] for row in masked]))
            for name in ("input_ids", "labels")
        }


def _mask(
    ids: np.ndarray,
    special: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    probability: float,
    seeds: tuple[int, ...],
) -> dict[str, np.ndarray]:
    """BERT's masks of one block, which the seeds determine."""
    random = np.random.default_rng(seeds)
    chosen = (random.random(len(ids)) < probability) & ~special
    fate = random.random(len(ids))
    others = random.integers(len(tokenizer), size=len(ids))
    masked = np.where(fate < 0.8, tokenizer.mask_token_id, np.where(fate < 0.9, others, ids))
    return {
        "input_ids": np.where(chosen, masked, ids),
        "labels": np.where(chosen, ids, -100),
    }
