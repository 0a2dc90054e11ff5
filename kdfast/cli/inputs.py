"""What commands read: models, tokenizers, a teacher's cache, and datasets made into blocks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kdfast.cli.errors import CommandError, need, reporting
from kdfast.cli.options import LANGUAGE_TASKS, MAX_DEFAULT_BLOCK, TASKS

# Imported by the functions that need them: `kdfast env` works without.
if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from kdfast.teacher_cache import TeacherCache

DEFAULT_EVAL_FRACTION = 0.05

# transformers' classes of a task's models.
AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
}

# The column that a task's text is in, of tasks where it is not called `text`.
TEXT_COLUMNS = {"token-classification": "tokens", "question-answering": "question"}

# What a saved tokenizer consists of, by the names that its kinds give it.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def check_model(owner: str, path: Path) -> None:
    """That there is a teacher with weights, or a student with at least a config."""
    if not path.exists():
        raise CommandError(f"--{owner} {path} does not exist")
    if owner == "teacher" and not path.is_dir():
        raise CommandError(f"--teacher {path} is not a directory")
    if path.is_dir() and not (path / "config.json").is_file():
        raise CommandError(f"--{owner} {path} holds no config.json")
    if owner == "teacher" and not has_weights(path):
        raise CommandError(f"--teacher {path} holds no weights")


def check_dataset(files: Sequence[Path], flag: str = "--dataset") -> None:
    for path in files:
        if not path.is_file():
            raise CommandError(
                f"{flag} {path} {'is not a file' if path.exists() else 'does not exist'}"
            )


def has_weights(path: Path) -> bool:
    names = ("model.safetensors", "pytorch_model.bin")
    return any((path / f"{name}{end}").exists() for name in names for end in ("", ".index.json"))


def load_config(owner: str, path: Path) -> PreTrainedConfig:
    from transformers import AutoConfig

    # Makes the BiLSTM known to the auto classes.
    import kdfast.trainer.lstm  # noqa: F401

    with reporting(f"cannot load the {owner}'s config from {path}"):
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    if not isinstance(getattr(config, "vocab_size", None), int):
        raise CommandError(f"--{owner} {path} reads no tokens: its config has no vocab_size")
    return config


def load_model(
    owner: str, path: Path | None, config: PreTrainedConfig, task: str
) -> PreTrainedModel:
    """A checkpoint, or a fresh model where there is a config alone."""
    import transformers

    auto = getattr(transformers, AUTO_CLASSES[task])
    with reporting(f"cannot load the {owner}" + (f" from {path}" if path is not None else "")):
        if path is None or not has_weights(path):
            return auto.from_config(config, dtype=torch.float32)
        model, info = auto.from_pretrained(
            path,
            config=config,
            # A teacher stays as it was saved; a student's weights must resolve small updates.
            dtype="auto" if owner == "teacher" else torch.float32,
            local_files_only=True,
            output_loading_info=True,
        )
    if missing := sorted(info["missing_keys"]):
        if owner == "teacher":
            raise CommandError(f"the teacher in {path} has no weights for {missing[0]} of a {task}")
        print(f"kdfast: the student starts with random {', '.join(missing)}", file=sys.stderr)
    return model


def load_tokenizer(owner: str, path: Path) -> PreTrainedTokenizerBase | None:
    """The one beside a model; None if there is none."""
    from transformers import AutoTokenizer

    # Without any of them, transformers makes up an empty tokenizer.
    if not any((path / name).exists() for name in TOKENIZER_FILES):
        return None
    with reporting(f"cannot load the {owner}'s tokenizer from {path}"):
        return AutoTokenizer.from_pretrained(path, local_files_only=True)


def teachers_tokenizer(path: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    from kdfast.trainer.vocabulary import check_vocabulary_fits

    tokenizer = load_tokenizer("teacher", path)
    if tokenizer is None:
        raise CommandError(f"--teacher {path} holds no tokenizer")
    with reporting():
        check_vocabulary_fits(tokenizer, vocab_size, "the teacher")
    return tokenizer


def cached_tokenizer(cache: TeacherCache) -> PreTrainedTokenizerBase:
    from kdfast.teacher_cache.format import TOKENIZER

    path = cache.directory / TOKENIZER
    tokenizer = load_tokenizer("teacher cache", path)
    if tokenizer is None:
        raise CommandError(f"{path} holds no tokenizer")
    with reporting(str(path)):
        cache.check_tokenizer(tokenizer)
    return tokenizer


def check_other_teacher(path: Path, vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """That one more teacher reads the first one's tokens, in its own tokenizer if it has one."""
    from kdfast.trainer.vocabulary import check_vocabulary_fits

    own = load_tokenizer("teacher", path)
    if own is not None and own.get_vocab() != tokenizer.get_vocab():
        raise CommandError(
            f"--teacher {path} has other tokens than the first teacher: a mean of probabilities "
            "needs one vocabulary"
        )
    with reporting():
        check_vocabulary_fits(tokenizer, vocab_size, f"the teacher in {path}")


def students_tokenizer(
    own: PreTrainedTokenizerBase | None, vocab_size: int, teachers: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    """The student's own, or else the teacher's."""
    from kdfast.trainer.vocabulary import check_same_vocabulary, check_vocabulary_fits

    with reporting():
        if own is not None:
            check_same_vocabulary(own, teachers)
        tokenizer = own or teachers
        check_vocabulary_fits(tokenizer, vocab_size, "the student")
    return tokenizer


def open_cache(directory: Path) -> TeacherCache:
    need("a teacher cache", "pyarrow")
    from kdfast.teacher_cache import TeacherCache, TeacherCacheError

    try:
        return TeacherCache(directory)
    except TeacherCacheError as error:
        raise CommandError(str(error)) from error


@dataclass(frozen=True)
class Data:
    """How files become blocks: what a cache and the training from it must have in common."""

    task: str
    text_column: str
    block_size: int
    # Of masked language models alone.
    mlm_probability: float | None
    eval_fraction: float
    seed: int


def settle_data(
    arguments: argparse.Namespace,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    *configs: PreTrainedConfig,
) -> Data:
    """What the flags say, and defaults for the rest; the task is what the last config is for."""
    task = arguments.task or task_of(configs[-1])
    masked = task == "masked-lm"
    if masked and tokenizer.mask_token is None:
        raise CommandError("masked-lm needs a tokenizer with a mask token, and this one has none")

    def chosen(name: str, default: object) -> object:
        given = getattr(arguments, name)
        return default if given is None else given

    return Data(
        task,
        chosen("text_column", TEXT_COLUMNS.get(task, "text")),
        _block_size(arguments.block_size, tokenizer, *configs),
        chosen("mlm_probability", 0.15) if masked else None,
        chosen("eval_fraction", DEFAULT_EVAL_FRACTION),
        seed,
    )


def task_of(config: PreTrainedConfig) -> str:
    """What a teacher was trained for."""
    for task in TASKS:
        if is_for(config, task):
            return task
    raise CommandError(
        f"the teacher ({', '.join(config.architectures or ['no architecture named'])}) is for none "
        f"of {', '.join(TASKS)}; pass --task if its config is wrong"
    )


def is_for(config: PreTrainedConfig, task: str) -> bool:
    """Whether a checkpoint's config names an architecture of the task."""
    from transformers.models.auto import modeling_auto

    from kdfast.trainer.lstm import BiLSTMForSequenceClassification

    table = f"MODEL_FOR_{task.replace('-', '_').upper()}_MAPPING_NAMES"
    names = {*getattr(modeling_auto, table).values()}
    if task == "sequence-classification":
        names.add(BiLSTMForSequenceClassification.__name__)
    return not names.isdisjoint(config.architectures or ())


def architecture_for(owner: str, config: PreTrainedConfig, task: str) -> str:
    """The name of the model of a config's kind that is for the task."""
    import transformers

    models = getattr(transformers, AUTO_CLASSES[task])._model_mapping
    if type(config) not in models:
        raise CommandError(f"the {owner} is a {config.model_type}, and none of these is for {task}")
    return models[type(config)].__name__


def _block_size(
    asked: int | None, tokenizer: PreTrainedTokenizerBase, *configs: PreTrainedConfig
) -> int:
    # A tokenizer without a limit says 10**30.
    limit = tokenizer.model_max_length
    for config in configs:
        limit = min(limit, getattr(config, "max_position_embeddings", None) or limit)
    if asked is not None and asked > limit:
        raise CommandError(
            f"--block-size {asked} is longer than the {limit} tokens that the models take"
        )
    return asked or min(limit, MAX_DEFAULT_BLOCK)


def split(rows: Dataset, eval_fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Rows to train on and held-out ones, by chance; of a fraction of 0, or one row, none is."""
    rows = rows.shuffle(seed=seed)
    held_out = 0
    if eval_fraction > 0:
        held_out = min(max(1, round(eval_fraction * len(rows))), len(rows) - 1)
    return rows.select(range(held_out, len(rows))), rows.select(range(held_out))


def load_blocks(
    files: Sequence[Path], data: Data, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset]:
    """Blocks to train on, and held-out ones, of which there may be none."""
    from kdfast.trainer.text import load_documents, pack

    if data.task not in LANGUAGE_TASKS:
        raise CommandError(
            f"blocks of text are for {' and '.join(LANGUAGE_TASKS)}, and the teacher is for "
            f"{data.task}; pass --task if its config is wrong"
        )
    with reporting("cannot read the dataset"):
        documents = load_documents(files, data.text_column)
    parts = split(documents, data.eval_fraction, data.seed)
    train_blocks, eval_blocks = (
        pack(part, tokenizer, data.block_size, masked=data.task == "masked-lm") for part in parts
    )
    if len(train_blocks) == 0:
        raise CommandError(
            f"the dataset's {len(parts[0])} training documents do not fill one block "
            f"of {data.block_size} tokens: lower --block-size"
        )
    if data.eval_fraction > 0 and len(eval_blocks) == 0:
        print(
            f"kdfast: the {len(parts[1])} held-out documents do not fill one block of "
            f"{data.block_size} tokens: no evaluation",
            file=sys.stderr,
        )
    return train_blocks, eval_blocks


def fixed_blocks(
    train: Dataset, held_out: Dataset, data: Data, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset]:
    """The blocks as the teacher of a cache sees them: for masked language models, masked."""
    from kdfast.trainer.text import mask_once

    if data.task == "causal-lm":
        return train, held_out
    return (
        mask_once(train, tokenizer, data.mlm_probability, data.seed),
        mask_once(held_out, tokenizer, data.mlm_probability, data.seed, start=len(train)),
    )
