"""Classification of sequences and tokens, and question answering: from files to a trainer's data.

What a file has to hold, by task, under names that can be chosen:

    sequence-classification   a text, perhaps a second one; perhaps a label
    token-classification      `tokens`, a list of words; `tags`, as many labels
    question-answering        `question`, `context`, and `answers` as SQuAD has them:
                              {"text": [...], "answer_start": [...]}, of which the first counts

Labels are names that the teacher's config knows, or numbers of its classes; of a teacher with one
class, the number to predict.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import (
    DataCollator,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from kdfast.cli.errors import CommandError, reporting
from kdfast.cli.inputs import TEXT_COLUMNS, has_weights, is_for, load_model, split
from kdfast.cli.metrics import (
    Metrics,
    classification_metrics,
    regression_metrics,
    span_metrics,
)
from kdfast.trainer.head import IGNORE_INDEX
from kdfast.trainer.text import load_rows

# The usual columns, of tasks that need them.
LABEL_COLUMNS = {"token-classification": "tags", "question-answering": "answers"}
CONTEXT_COLUMN = "context"

# Of the classes that an error lists.
LISTED = 8

# Of which a student's classes have to be the teacher's.
CLASSIFICATIONS = ("sequence-classification", "token-classification")

Batch = dict[str, list]


@dataclass(frozen=True)
class Prepared:
    """What a trainer needs besides models.

    Args:
        train: tokenized rows.
        held_out: the same to evaluate on; there may be none.
        collator: pads a batch to its longest row.
        metric: what models are compared by: one of the keys of `compute_metrics`, or else the loss.
        greater_is_better: whether a larger one is a better one.
        compute_metrics: of `transformers.Trainer`; None for the loss alone.
        student_settings: what a student's config has to say of the classes.
        callbacks: of `transformers.Trainer`, that the collator needs.
    """

    train: Dataset
    held_out: Dataset
    collator: DataCollator
    metric: str
    greater_is_better: bool
    compute_metrics: Metrics | None
    student_settings: dict[str, object]
    callbacks: tuple[TrainerCallback, ...] = ()


def prepare(
    task: str,
    files: Sequence[Path],
    *,
    tokenizer: PreTrainedTokenizerBase,
    teacher_config: PreTrainedConfig,
    text_column: str | None,
    text_pair_column: str | None,
    label_column: str | None,
    max_length: int,
    eval_fraction: float,
    seed: int,
    eval_files: Sequence[Path] | None = None,
) -> Prepared:
    """Files as a trainer takes them.

    Rows without text are left out, with a note on stderr.

    Args:
        task: one of `kdfast.cli.options.TASKS` that is not of language models.
        files: .json, .jsonl, .csv or .parquet.
        tokenizer: of teacher and student.
        teacher_config: it says what the classes are.
        text_column: None takes the task's usual one.
        text_pair_column: of sequence classification, the second text, if there is one; of question
            answering, the one with the context, where None takes the usual.
        label_column: of sequence classification, None is to distil without labels; of the other
            tasks, None takes the usual.
        max_length: what is longer is cut, in tokens; of a question with its context, the context.
        eval_fraction: share of the rows to hold out.
        seed: of that choice.
        eval_files: what to evaluate on, instead of a part of `files`.

    Raises:
        CommandError: what there is to put right, with the file, the row (the first is 1) and the
            column.
    """
    kind = KINDS[task]
    if tokenizer.pad_token_id is None:
        raise CommandError(f"{task} needs a tokenizer with a padding token, and this one has none")
    if kind is not _Sequences and not tokenizer.is_fast:
        raise CommandError(
            f"{task} needs a tokenizer that says where in the text a token stands, one with a "
            "tokenizer.json"
        )
    columns = (
        text_column or TEXT_COLUMNS.get(task, "text"),
        text_pair_column,
        label_column or LABEL_COLUMNS.get(task),
    )
    rows_of = kind(tokenizer, teacher_config, columns, max_length)
    train = rows_of.load(files)
    if eval_files:
        held_out = rows_of.load(eval_files)
    else:
        train, held_out = split(train, eval_fraction, seed)
    with reporting("cannot tokenize the dataset"):
        train, held_out = (
            part.map(
                rows_of.tokenize,
                batched=True,
                remove_columns=part.column_names,
                # What is cached knows the settings, and not the code that they went through.
                load_from_cache_file=False,
            )
            for part in (train, held_out)
        )
    rows_of.check(train, held_out)
    return Prepared(
        train=train,
        held_out=held_out,
        collator=rows_of.collator,
        metric=rows_of.metric,
        greater_is_better=rows_of.metric not in ("loss", "mean_squared_error"),
        compute_metrics=rows_of.compute_metrics,
        student_settings=rows_of.student_settings,
    )


def load_classifier(
    owner: str,
    path: Path | None,
    config: PreTrainedConfig,
    task: str,
    student_settings: dict[str, object] | None = None,
) -> PreTrainedModel:
    """As `kdfast.cli.inputs.load_model`, a teacher or a student with the teacher's classes.

    Args:
        student_settings: of `prepare`, for a student, whose config gets them. One that was trained
            for the task before has its classes already, which must be the same.
    """
    if student_settings is not None:
        if path is not None and has_weights(path):
            check_same_classes(f"the student in {path}", config, task, student_settings)
        for name, value in student_settings.items():
            setattr(config, name, value)
    return load_model(owner, path, config, task)


def check_same_classes(
    whose: str,
    config: PreTrainedConfig,
    task: str,
    settings: dict[str, object],
    others: str = "the teacher",
) -> None:
    """That a model which was trained for the task has the classes that a teacher has.

    Args:
        whose: the model's, for the error; `config` is its config.
        settings: `Prepared.student_settings`, made of the config of the one called `others`.
    """
    if task not in CLASSIFICATIONS or not is_for(config, task):
        return
    own, wanted = _Classes.of(config), _Classes(settings["num_labels"], settings["label2id"])
    if own.count != wanted.count:
        raise CommandError(f"{whose} has {own.count} classes and {others} {wanted.count}")
    if own.numbers != wanted.numbers and not own.generic and not wanted.generic:
        raise CommandError(f"{whose} has the classes {own.listed} and {others} {wanted.listed}")


@dataclass(frozen=True)
class _Classes:
    """A teacher's classes: how many there are, and the number of each name."""

    count: int
    numbers: dict[str, int]

    @classmethod
    def of(cls, config: PreTrainedConfig) -> _Classes:
        classes = cls(config.num_labels, dict(config.label2id or {}))
        # A config may have been given the other table alone.
        if classes.generic:
            classes = cls(classes.count, {name: number for number, name in config.id2label.items()})
        return classes

    @property
    def listed(self) -> str:
        """Their names, for errors."""
        return _listed(sorted(self.numbers, key=self.numbers.get))

    @property
    def generic(self) -> bool:
        """Whether they have no names but those that transformers makes up."""
        return self.numbers.keys() <= {f"LABEL_{number}" for number in range(self.count)}

    def number(self, label: object, where: str) -> int:
        if isinstance(label, str):
            if label not in self.numbers:
                raise CommandError(
                    f"{where}: the teacher has no label {label!r}, it has {self.listed}: "
                    "rename it, or give the classes' numbers"
                )
            label = self.numbers[label]
        # A column of integers with a gap in it is read as one of floats.
        if isinstance(label, float) and label.is_integer():
            label = int(label)
        if label is None:
            raise CommandError(f"{where} is empty: give it a label, or leave the row out")
        if not isinstance(label, int):
            raise CommandError(f"{where} holds {label!r:.40}: a label is a name or a whole number")
        if not 0 <= label < self.count:
            raise CommandError(
                f"{where}: label {label} is none of the teacher's {self.count} classes, "
                f"0 to {self.count - 1}"
            )
        return int(label)


class _Rows:
    """How a task's files become rows of tokens.

    Attributes:
        columns: those of a file that are read, labels last.
        features: of what `convert` returns.
        classes: those of the labels, where these may be names.
        collator, metric, compute_metrics, student_settings: of `Prepared`.
    """

    metric: str = "accuracy"
    columns: tuple[str, ...]
    features: Features
    classes: _Classes | None
    collator: DataCollator
    compute_metrics: Metrics | None
    student_settings: dict[str, object]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        columns: tuple[str, str | None, str | None],
        max_length: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.columns = tuple(name for name in columns if name is not None)
        self.classes = _Classes.of(config)
        self.compute_metrics = classification_metrics
        self.student_settings = {
            "num_labels": config.num_labels,
            "id2label": {
                **config.id2label,
                **{number: name for name, number in self.classes.numbers.items()},
            },
            "label2id": self.classes.numbers,
        }

    def convert(self, where: str, *values: object) -> tuple | None:
        """What is kept of a row's values, None of a row without text; errors name the place."""
        raise NotImplementedError

    def tokenize(self, batch: Batch) -> Batch:
        """A batch of what is kept, as a model takes it."""
        raise NotImplementedError

    def check(self, *parts: Dataset) -> None:
        """What can be said of the tokenized rows alone."""

    def load(self, files: Sequence[Path]) -> Dataset:
        """What is kept of the rows of all files."""
        rows = concatenate_datasets([self._read(path) for path in files])
        if len(rows) == 0:
            raise CommandError(f"{', '.join(map(str, files))}: no text in there")
        return rows

    def _read(self, path: Path) -> Dataset:
        with reporting("cannot read the dataset"):
            rows = load_rows(path)
        for name in self.columns:
            if name not in rows.column_names:
                raise CommandError(
                    f"{path} has no column {name!r}, it has {', '.join(rows.column_names)}"
                )
        names = self._names(rows, path)

        def convert(batch: Batch, indices: list[int]) -> Batch:
            values = [batch[name] for name in self.columns]
            if names is not None:
                values[-1] = [_named(label, names) for label in values[-1]]
            kept = [
                converted
                for index, *row in zip(indices, *values, strict=True)
                if (converted := self.convert(f"{path}, row {index + 1}", *row)) is not None
            ]
            return {name: [row[i] for row in kept] for i, name in enumerate(self.features)}

        with reporting(f"cannot read {path}"):
            converted = rows.map(
                convert,
                batched=True,
                with_indices=True,
                remove_columns=rows.column_names,
                features=self.features,
                load_from_cache_file=False,
            )
        if left_out := len(rows) - len(converted):
            print(f"kdfast: left out {left_out} rows of {path} without text", file=sys.stderr)
        return converted

    def _names(self, rows: Dataset, path: Path) -> list[str] | None:
        """A file's own names of its numbers, if they are the teacher's, in whatever order."""
        feature = rows.features[self.columns[-1]]
        names = getattr(getattr(feature, "feature", feature), "names", None)
        if names is None or self.classes is None:
            return None
        if not self.classes.numbers.keys().isdisjoint(names):
            return names
        if not self.classes.generic:
            print(
                f"kdfast: {path} has the classes {_listed(names)} and the teacher "
                f"{self.classes.listed}: taken for the same by their numbers",
                file=sys.stderr,
            )
        return None


class _Sequences(_Rows):
    """A text or two, with a class, a number, or nothing to predict."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        columns: tuple[str, str | None, str | None],
        max_length: int,
    ) -> None:
        super().__init__(tokenizer, config, columns, max_length)
        self.collator = DataCollatorWithPadding(tokenizer)
        problem = config.problem_type
        regression = problem == "regression" or (problem is None and config.num_labels == 1)
        if problem == "multi_label_classification" or (regression and config.num_labels > 1):
            raise CommandError(
                f"the teacher's problem_type is {problem} with {config.num_labels} labels: a text "
                "has one class here, or one number"
            )
        self.student_settings["problem_type"] = (
            "regression" if regression else "single_label_classification"
        )
        *texts, label = columns
        self.texts = tuple(name for name in texts if name is not None)
        self.labelled = label is not None
        features = dict.fromkeys(("first", "second")[: len(self.texts)], Value("string"))
        if not self.labelled:
            self.classes = None
            self.metric, self.compute_metrics = "loss", None
        elif regression:
            self.classes = None
            self.metric, self.compute_metrics = "mean_squared_error", regression_metrics
        if self.labelled:
            features["labels"] = Value("float32" if regression else "int64")
        self.features = Features(features)

    def convert(self, where: str, *values: object) -> tuple | None:
        texts = _texts(values, where, self.texts)
        if texts is None or not self.labelled:
            return texts
        number = _number if self.classes is None else self.classes.number
        return *texts, number(values[-1], f"{where}, column {self.columns[-1]!r}")

    def tokenize(self, batch: Batch) -> Batch:
        encoded = self.tokenizer(
            batch["first"], batch.get("second"), truncation=True, max_length=self.max_length
        )
        return {**encoded, **({"labels": batch["labels"]} if self.labelled else {})}


class _Tokens(_Rows):
    """Words, each with a class, which the first token of the word is to have."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        columns: tuple[str, str | None, str | None],
        max_length: int,
    ) -> None:
        if columns[1] is not None:
            raise CommandError("--text-pair-column is for two texts, and words are one")
        super().__init__(tokenizer, config, columns, max_length)
        self.collator = DataCollatorForTokenClassification(tokenizer)
        self.features = Features({"words": List(Value("string")), "labels": List(Value("int64"))})

    def convert(self, where: str, words: object, tags: object) -> tuple | None:
        words_column, tags_column = self.columns
        if words is None or words == []:
            return None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise CommandError(
                f"{where}, column {words_column!r} holds {words!r:.40}, not a list of words"
            )
        place = f"{where}, column {tags_column!r}"
        if not isinstance(tags, list):
            raise CommandError(f"{place} holds {tags!r:.40}, not a list of labels")
        if len(tags) != len(words):
            raise CommandError(
                f"{where} has {len(words)} words in {words_column!r} and {len(tags)} labels in "
                f"{tags_column!r}: each word needs one"
            )
        return words, [
            tag if tag == IGNORE_INDEX else self.classes.number(tag, place) for tag in tags
        ]

    def tokenize(self, batch: Batch) -> Batch:
        encoded = self.tokenizer(
            batch["words"], is_split_into_words=True, truncation=True, max_length=self.max_length
        )
        labels = []
        for row, tags in enumerate(batch["labels"]):
            words = encoded.word_ids(row)
            labels.append(
                [
                    IGNORE_INDEX if word is None or word == before else tags[word]
                    for before, word in zip([None, *words], words, strict=False)
                ]
            )
        return {**encoded, "labels": labels}


class _Questions(_Rows):
    """Questions whose answers are to be found in a context.

    Of an answer that is not there, both ends are `max_length`: a position behind every sequence
    counts for nothing, in transformers' models and in `kdfast.trainer.outputs`.
    """

    metric = "f1"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        columns: tuple[str, str | None, str | None],
        max_length: int,
    ) -> None:
        question, context, answers = columns
        columns = (question, context or CONTEXT_COLUMN, answers)
        super().__init__(tokenizer, config, columns, max_length)
        self.classes = None
        self.compute_metrics = span_metrics
        # Tokens in front of a text would move its answer.
        padded_behind = copy.copy(tokenizer)
        padded_behind.padding_side = "right"
        self.collator = DataCollatorWithPadding(padded_behind)
        self.special_tokens = tokenizer.num_special_tokens_to_add(pair=True)
        self.features = Features(
            {
                "question": Value("string"),
                "context": Value("string"),
                "start": Value("int64"),
                "end": Value("int64"),
            }
        )

    def convert(
        self, where: str, question: object, context: object, answers: object
    ) -> tuple | None:
        texts = _texts((question, context), where, self.columns)
        if texts is None:
            return None
        self._check_room(question, f"{where}, column {self.columns[0]!r}")
        return *texts, *_first_answer(answers, context, f"{where}, column {self.columns[2]!r}")

    def _check_room(self, question: str, where: str) -> None:
        room = self.max_length - self.special_tokens
        # Few are so long that their tokens have to be counted.
        if len(question.encode()) < room:
            return
        tokens = len(self.tokenizer(question, add_special_tokens=False, verbose=False).input_ids)
        if tokens >= room:
            raise CommandError(
                f"{where}: a question of {tokens} tokens leaves no room for its context in "
                f"{self.max_length}: take more tokens, or leave the row out"
            )

    def tokenize(self, batch: Batch) -> Batch:
        encoded = self.tokenizer(
            batch["question"],
            batch["context"],
            truncation="only_second",
            max_length=self.max_length,
            return_offsets_mapping=True,
        )
        offsets = encoded.pop("offset_mapping")
        spans = [
            _tokens_between(start, end, offsets[row], encoded.sequence_ids(row))
            or (self.max_length, self.max_length)
            for row, (start, end) in enumerate(zip(batch["start"], batch["end"], strict=True))
        ]
        starts, ends = zip(*spans, strict=True)
        return {**encoded, "start_positions": list(starts), "end_positions": list(ends)}

    def check(self, *parts: Dataset) -> None:
        for name, part in zip(("training", "held-out"), parts, strict=True):
            if len(part) == 0:
                continue
            lost = int((np.array(part["start_positions"][:]) == self.max_length).sum())
            if not lost:
                continue
            reasons = (
                f"absent, not where answer_start says, or cut off behind {self.max_length} tokens"
            )
            if name == "training" and lost == len(part):
                raise CommandError(f"the answers of all {lost} {name} questions are {reasons}")
            print(
                f"kdfast: {lost} of {len(part)} {name} answers count for nothing: {reasons}",
                file=sys.stderr,
            )


KINDS = {
    "sequence-classification": _Sequences,
    "token-classification": _Tokens,
    "question-answering": _Questions,
}


def _named(label: object, names: list[str]) -> object:
    if isinstance(label, list):
        return [_named(entry, names) for entry in label]
    return names[label] if isinstance(label, int) and 0 <= label < len(names) else label


def _listed(names: Sequence[str]) -> str:
    listed = ", ".join(names[:LISTED])
    return listed if len(names) <= LISTED else f"{listed} and {len(names) - LISTED} more"


def _texts(values: Sequence[object], where: str, columns: Sequence[str]) -> tuple[str, ...] | None:
    """The texts in a row, or None where one is missing."""
    texts = values[: len(columns)]
    for text, column in zip(texts, columns, strict=False):
        if text is not None and not isinstance(text, str):
            raise CommandError(f"{where}, column {column!r} holds {text!r:.40}, not text")
    return tuple(texts) if all(text and text.strip() for text in texts) else None


def _number(label: object, where: str) -> float:
    if label is None:
        raise CommandError(f"{where} is empty: give it a number, or leave the row out")
    if not isinstance(label, (int, float)) or not math.isfinite(label):
        raise CommandError(
            f"{where} holds {label!r:.40}: the teacher predicts a number, so a label is one"
        )
    return float(label)


def _first_answer(answers: object, context: str, where: str) -> tuple[int, int]:
    """Where the first answer begins and ends in its context; −1 where it does not stand there."""
    if answers is None:
        return -1, -1
    lists = (
        [answers.get(name) for name in ("text", "answer_start")]
        if isinstance(answers, dict)
        else [None]
    )
    if not all(isinstance(entries, list) for entries in lists):
        raise CommandError(
            f'{where} holds {answers!r:.60}, not SQuAD\'s {{"text": [...], "answer_start": [...]}}'
        )
    texts, starts = lists
    if len(texts) != len(starts):
        raise CommandError(
            f"{where} has {len(texts)} in its text and {len(starts)} in its answer_start: each "
            "answer needs both"
        )
    if not texts:
        return -1, -1
    text, start = texts[0], starts[0]
    if not isinstance(text, str) or not isinstance(start, int):
        raise CommandError(f"{where}: an answer is a text and a number, got {text!r}, {start!r}")
    if not text.strip() or start < 0 or context[start : start + len(text)] != text:
        return -1, -1
    # Tokens need not reach around the spaces at its ends.
    start += len(text) - len(text.lstrip())
    return start, start + len(text.strip())


def _tokens_between(
    start: int, end: int, offsets: Sequence[tuple[int, int]], sequences: Sequence[int | None]
) -> tuple[int, int] | None:
    """The first and the last token of the context's characters from `start` to `end`."""
    context = [token for token, sequence in enumerate(sequences) if sequence == 1]
    if not context or start < offsets[context[0]][0] or end > offsets[context[-1]][1]:
        return None
    inside = [t for t in context if offsets[t][0] < end and offsets[t][1] > start]
    return (inside[0], inside[-1]) if inside else None
