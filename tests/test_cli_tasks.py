import json
import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    EvalPrediction,
    GPT2Config,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

from kdfast import cli
from kdfast.cli.errors import CommandError
from kdfast.cli.inputs import Data, load_blocks, load_config, load_model, settle_data, task_of
from kdfast.cli.metrics import classification_metrics, regression_metrics, span_metrics
from kdfast.cli.tasks import Prepared, load_classifier, prepare
from kdfast.trainer import BiLSTMConfig, BiLSTMForSequenceClassification, DistillationTrainer
from kdfast.trainer.objective import HardLabels, LogitMSE, Logits, Objective
from kdfast.trainer.outputs import pop_labels
from kdfast.trainer.text import load_rows

WORDS = ["red", "green", "blue", "a", "good", "bad", "film", "play", "is", "the", "what"]
PIECES = ["##s", "##er", "##ish", "##r"]
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
VOCAB_SIZE = len(SPECIAL) + len(WORDS) + len(PIECES)
CLASSES = ("bad", "good", "mixed")
LENGTH = 24


def make_tokenizer(**options: object) -> PreTrainedTokenizerFast:
    """BERT's kind: pieces of words, [CLS] in front, [SEP] behind each text."""
    vocab = {token: i for i, token in enumerate([*SPECIAL.values(), *WORDS, *PIECES])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocab[name]) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{
            **SPECIAL,
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
            **options,
        },
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def bert_config(width: int = 16, **classes: object) -> BertConfig:
    return BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        **classes,
    )


def named(names: tuple[str, ...] = CLASSES, **more: object) -> BertConfig:
    return bert_config(
        id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}, **more
    )


def question_config() -> BertConfig:
    return bert_config(num_labels=2)


@pytest.fixture(autouse=True)
def _dataset_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # As commands do: what is left on stderr is ours.
    datasets.disable_progress_bars()
    logging.disable_progress_bar()


@pytest.fixture
def write(tmp_path) -> Callable[..., Path]:
    def write(rows: list[dict] | Dataset, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        if name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            return path
        rows = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
        rows.to_csv(path) if name.endswith(".csv") else rows.to_parquet(path)
        return path

    return write


@pytest.fixture
def prepared(tokenizer) -> Callable[..., Prepared]:
    """`prepare` with defaults: nothing held out, so that rows stand for themselves."""

    def run(task: str, *files: Path, config: BertConfig | None = None, **changes: object):
        settings = {
            "tokenizer": tokenizer,
            "teacher_config": named() if config is None else config,
            "text_column": None,
            "text_pair_column": None,
            "label_column": "label" if task == "sequence-classification" else None,
            "max_length": LENGTH,
            "eval_fraction": 0,
            "seed": 0,
            **changes,
        }
        return prepare(task, files, **settings)

    return run


def tokens_of(rows: Dataset) -> list[tuple[int, ...]]:
    return [tuple(row["input_ids"]) for row in rows]


TEXTS = ["the film is good", "a bad play", "reds", "greenish films is bluer", "what a film"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("labels", [("good", "bad", "mixed", "bad", "good"), (1, 0, 2, 0, 1)])
def test_sequences_of_every_kind_of_file(prepared, write, tokenizer, suffix, labels):
    rows = [{"body": t, "verdict": v, "id": 7} for t, v in zip(TEXTS, labels, strict=True)]
    path = write(rows, f"rows.{suffix}")
    result = prepared("sequence-classification", path, text_column="body", label_column="verdict")
    assert sorted(result.train.column_names) == [
        "attention_mask",
        "input_ids",
        "labels",
        "token_type_ids",
    ]
    expected = {
        tuple(tokenizer(text).input_ids): label
        for text, label in zip(TEXTS, (1, 0, 2, 0, 1), strict=True)
    }
    assert dict(zip(tokens_of(result.train), result.train["labels"], strict=True)) == expected
    assert len(result.held_out) == 0
    assert (result.metric, result.greater_is_better) == ("accuracy", True)
    assert result.student_settings == {
        "num_labels": 3,
        "id2label": {0: "bad", 1: "good", 2: "mixed"},
        "label2id": {"bad": 0, "good": 1, "mixed": 2},
        "problem_type": "single_label_classification",
    }


def test_pairs_are_cut_and_padded_to_the_longest_of_a_batch(prepared, write, tokenizer):
    pairs = [("a film", "the play is bad"), ("red " * 20, "blue " * 9), ("good", "bad")]
    rows = [{"premise": a, "other": b, "label": 0} for a, b in pairs]
    result = prepared(
        "sequence-classification",
        write(rows),
        text_column="premise",
        text_pair_column="other",
        max_length=12,
    )
    rows = sorted(result.train, key=lambda row: len(row["input_ids"]))
    assert [len(row["input_ids"]) for row in rows] == [5, 9, 12]
    assert rows[0]["token_type_ids"] == [0, 0, 0, 1, 1]
    batch = result.collator(rows[:2])
    assert batch["input_ids"].shape == (2, 9)
    assert batch["attention_mask"].sum(1).tolist() == [5, 9]
    assert batch["labels"].dtype == torch.int64


def test_classes_of_a_file_are_the_teachers_by_name(prepared, write, capfd):
    """The trap of MNLI: data sets and models number the same names in different orders."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["mixed", "good"])})
    rows = Dataset.from_dict({"text": ["a", "the"], "label": [0, 1]}, features=features)
    result = prepared("sequence-classification", write(rows, "rows.parquet"))
    assert sorted(result.train["labels"]) == [1, 2]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("table", ["id2label", "label2id", "both"])
def test_a_config_may_have_one_table_of_its_classes(prepared, write, table):
    config = bert_config(num_labels=3)
    if table != "label2id":
        config.id2label = dict(enumerate(CLASSES))
    if table != "id2label":
        config.label2id = {name: i for i, name in enumerate(CLASSES)}
    path = write([{"text": "a", "label": "good"}])
    result = prepared("sequence-classification", path, config=config)
    assert result.train["labels"][:] == [1]
    assert result.student_settings["id2label"] == dict(enumerate(CLASSES))
    assert result.student_settings["label2id"] == {name: i for i, name in enumerate(CLASSES)}


@pytest.mark.parametrize(
    ("config", "note"),
    [
        (named(), "has the classes no, yes and the teacher bad, good, mixed: taken for the same"),
        (bert_config(num_labels=2), ""),
    ],
)
def test_other_names_of_a_file_are_numbers(prepared, write, capfd, config, note):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_dict({"text": ["a", "the", "is"], "label": [0, 1, 1]}, features=features)
    path = write(rows, "rows.parquet")
    capfd.readouterr()
    result = prepared("sequence-classification", path, config=config)
    assert sorted(result.train["labels"]) == [0, 1, 1]
    error = capfd.readouterr().err
    assert note in error
    assert error.count("\n") == bool(note)


def test_a_teacher_of_one_class_predicts_numbers(prepared, write):
    rows = [{"text": text, "label": i / 4} for i, text in enumerate(TEXTS)]
    result = prepared("sequence-classification", write(rows), config=bert_config(num_labels=1))
    assert sorted(result.train["labels"]) == [0, 0.25, 0.5, 0.75, 1]
    assert result.collator([result.train[0]])["labels"].dtype == torch.float32
    assert (result.metric, result.greater_is_better) == ("mean_squared_error", False)
    assert result.student_settings["problem_type"] == "regression"
    assert result.student_settings["num_labels"] == 1


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.txt"])
def test_without_labels(prepared, write, tmp_path, name):
    if name == "rows.txt":
        (tmp_path / name).write_text("\n\n".join(TEXTS))
    else:
        write([{"text": text} for text in TEXTS])
    result = prepared("sequence-classification", tmp_path / name, label_column=None)
    assert len(result.train) == 5
    assert "labels" not in result.collator([result.train[0], result.train[1]])
    assert (result.metric, result.greater_is_better) == ("loss", False)
    assert result.compute_metrics is None


@pytest.mark.parametrize("name", ["a [1].txt", "b[c]*.jsonl", "[d]/e.csv"])
def test_paths_are_no_patterns(write, tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    content = {"txt": "red film", "csv": "text\nred film\n"}
    path.write_text(content.get(name.rpartition(".")[2], '{"text": "red film"}\n'))
    assert load_rows(path)["text"][:] == ["red film"]
    output = tmp_path / "copies.jsonl"
    augment = ["augment", str(path), "--method", "bilstm", "--pos-probability", "0"]
    assert cli.main([*augment, "--output", str(output)]) == 0
    assert json.loads(output.read_text().splitlines()[0])["text"] == "red film"


def test_rows_without_text_are_left_out(prepared, write, capfd):
    texts = ["red", None, " ", "blue"]
    rows = [{"text": text, "label": "bad" if text and text.strip() else "?"} for text in texts]
    path = write(rows)
    assert len(prepared("sequence-classification", path).train) == 2
    assert capfd.readouterr().err == f"kdfast: left out 2 rows of {path} without text\n"


def test_held_out_rows_are_the_seeds_choice(prepared, write):
    colours = [f"{'red ' * (i % 5 + 1)}{'blue ' * (i // 5 + 1)}" for i in range(20)]
    path = write([{"text": text, "label": 0} for text in colours])

    def parts(seed: int, **changes: object) -> tuple[list, list]:
        result = prepared(
            "sequence-classification", path, **{"seed": seed, "eval_fraction": 0.25, **changes}
        )
        return tokens_of(result.train), tokens_of(result.held_out)

    train, held_out = parts(3)
    assert (len(train), len(held_out)) == (15, 5)
    assert len({*train, *held_out}) == 20
    assert parts(3) == (train, held_out)
    assert set(parts(4)[1]) != set(held_out)
    everything = parts(3, eval_fraction=0)
    assert (len(everything[0]), everything[1]) == (20, [])
    given = write([{"text": "good play", "label": 1}], "other.jsonl")
    train, held_out = parts(3, eval_files=[given])
    assert (len(train), len(held_out)) == (20, 1)


def test_the_first_piece_of_a_word_has_its_label(prepared, write, tokenizer):
    rows = [
        {"tokens": ["reds", "is", "greenisher"], "tags": ["good", -100, 2]},
        {"tokens": ["film"] * 40, "tags": ["bad"] * 40},
        {"tokens": [], "tags": []},
    ]
    result = prepared("token-classification", write(rows))
    short, long = sorted(result.train, key=lambda row: len(row["input_ids"]))
    pieces = tokenizer.convert_ids_to_tokens(short["input_ids"])
    assert list(zip(pieces, short["labels"], strict=True)) == [
        ("[CLS]", -100),
        ("red", 1),
        ("##s", -100),
        ("is", -100),
        ("green", 2),
        ("##ish", -100),
        ("##er", -100),
        ("[SEP]", -100),
    ]
    assert len(long["input_ids"]) == LENGTH
    assert long["labels"] == [-100, *[0] * (LENGTH - 2), -100]
    batch = result.collator([short, long])
    assert batch["labels"].shape == (2, LENGTH)
    assert set(batch["labels"][0, 8:].tolist()) == {-100}


def test_tags_with_a_files_own_names(prepared, write):
    features = Features(
        {"tokens": List(Value("string")), "tags": List(ClassLabel(names=["mixed", "bad"]))}
    )
    rows = Dataset.from_dict({"tokens": [["a", "is"]], "tags": [[0, 1]]}, features=features)
    result = prepared("token-classification", write(rows, "rows.parquet"))
    assert result.train[0]["labels"] == [-100, 2, 0, -100]


QUESTION, CONTEXT = "what is red", "the film is  greenish and the plays is bluer"


def asked(answer: str | None, start: int | None = None, **changes: object) -> dict:
    start = CONTEXT.find(answer or "") if start is None else start
    found = {"text": [], "answer_start": []}
    if answer is not None:
        # Of several answers the first counts.
        found = {"text": [answer, "film"], "answer_start": [start, 4]}
    return {"question": QUESTION, "context": CONTEXT, "answers": found, **changes}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_answers_are_the_tokens_around_them(prepared, write, suffix, padding_side):
    answers = {
        "greenish": ["green", "##ish"],
        # A part of a word is the piece that it is in.
        "een": ["green"],
        "film is  greenish": ["film", "is", "green", "##ish"],
        "  greenish ": ["green", "##ish"],
        "the": ["the"],
        "bluer": ["blue", "##r"],
    }
    tokenizer = make_tokenizer(padding_side=padding_side)
    rows = [asked(answer) for answer in answers] + [
        asked("the", 4 + CONTEXT[4:].find("the"), question="what"),
        asked("  the ", 0, context="  the film "),
    ]
    result = prepared(
        "question-answering",
        write(rows, f"rows.{suffix}"),
        tokenizer=tokenizer,
        config=question_config(),
        # The order of the rows stays.
        eval_files=[write(rows, f"held-out.{suffix}")],
    )
    batch = result.collator([dict(row) for row in result.held_out])
    spans = zip(batch["start_positions"].tolist(), batch["end_positions"].tolist(), strict=True)
    found = [
        tokenizer.convert_ids_to_tokens(ids[start : end + 1].tolist())
        for ids, (start, end) in zip(batch["input_ids"], spans, strict=True)
    ]
    assert found == [*answers.values(), ["the"], ["the"]]
    # The first: [CLS] what is red [SEP]; the second: [CLS] what [SEP] the film is green ##ish and
    assert batch["start_positions"][[4, 6]].tolist() == [5, 9]
    assert (result.metric, result.greater_is_better) == ("f1", True)
    assert tokenizer.padding_side == padding_side


def test_answers_that_are_not_there_count_for_nothing(prepared, write, capfd):
    # [CLS] what is red [SEP] leaves 5 tokens: the film is green ##ish
    rows = {
        "kept": asked("film is"),
        "cut in two": asked("greenish and"),
        "cut off": asked("plays"),
        "absent": asked(None),
        "null": asked(None, answers=None),
        "empty": asked("", 3),
        "elsewhere": asked("film", 5),
        "before": asked("film", -4),
    }
    result = prepared(
        "question-answering",
        write([asked("film is")], "train.jsonl"),
        config=question_config(),
        max_length=11,
        eval_files=[write(list(rows.values()))],
    )
    starts = result.held_out["start_positions"][:]
    assert dict(zip(rows, starts, strict=True)) == {**dict.fromkeys(rows, 11), "kept": 6}
    assert result.held_out["end_positions"][:] == [7] + [11] * 7
    error = capfd.readouterr().err
    assert error.startswith("kdfast: 7 of 8 held-out answers count for nothing: absent, not where")
    assert error.count("\n") == 1

    batch = result.collator(list(result.held_out))
    model = BertForQuestionAnswering(question_config()).eval()
    with torch.no_grad():
        of_all, of_kept = (
            model(**result.collator(list(part))).loss
            for part in (result.held_out, result.held_out.select([0]))
        )
    torch.testing.assert_close(of_all, of_kept)
    labels = pop_labels(dict(batch), shift=False)
    assert labels.tolist() == [[6, 7]] + [[-100, -100]] * 7


CLASSIFY, TAG, ASK = "sequence-classification", "token-classification", "question-answering"


@pytest.mark.parametrize(
    ("task", "rows", "changes", "message"),
    [
        (CLASSIFY, [{"body": "a", "label": 0}], {}, "has no column 'text', it has body, label"),
        (CLASSIFY, [{"text": "a"}], {}, "has no column 'label', it has text"),
        (
            CLASSIFY,
            [{"text": "a", "label": 0}],
            {"text_pair_column": "second"},
            "has no column 'second', it has text, label",
        ),
        (
            CLASSIFY,
            [{"text": "a", "label": "bad"}, {"text": "a", "label": "worse"}],
            {},
            "row 2, column 'label': the teacher has no label 'worse', it has bad, good, mixed",
        ),
        (
            CLASSIFY,
            [{"text": "a", "label": 2}, {"text": "a", "label": 3}],
            {},
            "row 2, column 'label': label 3 is none of the teacher's 3 classes, 0 to 2",
        ),
        (CLASSIFY, [{"text": "a", "label": -1}], {}, "label -1 is none of the teacher's 3"),
        (CLASSIFY, [{"text": "a", "label": 0.5}], {}, "row 1, column 'label' holds 0.5: a label"),
        (
            CLASSIFY,
            [{"text": "a", "label": 1}, {"text": "a", "label": None}],
            {},
            "row 2, column 'label' is empty: give it a label, or leave the row out",
        ),
        (CLASSIFY, [{"text": 5, "label": 1}], {}, "row 1, column 'text' holds 5, not text"),
        (CLASSIFY, [], {}, "holds no rows"),
        (CLASSIFY, [{"text": " ", "label": 1}], {}, "no text in there"),
        (
            CLASSIFY,
            [{"text": "a", "label": "high"}],
            {"config": bert_config(num_labels=1)},
            "row 1, column 'label' holds 'high': the teacher predicts a number",
        ),
        (
            CLASSIFY,
            [{"text": "a", "label": 1}, {"text": "a", "label": None}],
            {"config": bert_config(num_labels=1)},
            "row 2, column 'label' is empty: give it a number",
        ),
        (
            CLASSIFY,
            [{"text": "a", "label": 1}],
            {"config": named(problem_type="multi_label_classification")},
            "problem_type is multi_label_classification with 3 labels",
        ),
        (
            CLASSIFY,
            [{"text": "a", "label": 1}],
            {"config": named(problem_type="regression")},
            "problem_type is regression with 3 labels",
        ),
        (
            CLASSIFY,
            [{"text": "a", "label": "n"}],
            {"config": named(tuple(f"class-{i}" for i in range(11)))},
            "class-6, class-7 and 3 more: rename it, or give the classes' numbers",
        ),
        (TAG, [{"words": ["a"], "tags": [0]}], {}, "has no column 'tokens', it has words, tags"),
        (TAG, [{"tokens": ["a"]}], {}, "has no column 'tags', it has tokens"),
        (
            TAG,
            [{"tokens": ["a"], "tags": [0]}, {"tokens": ["a", "is"], "tags": [1]}],
            {},
            "row 2 has 2 words in 'tokens' and 1 labels in 'tags': each word needs one",
        ),
        (
            TAG,
            [{"tokens": ["a", "is"], "tags": ["good", "verb"]}],
            {},
            "row 1, column 'tags': the teacher has no label 'verb'",
        ),
        (TAG, [{"tokens": "a film", "tags": [0]}], {}, "'tokens' holds 'a film', not a list"),
        (TAG, [{"tokens": ["a", None], "tags": [0, 0]}], {}, "'tokens' holds ['a', None], not"),
        (TAG, [{"tokens": ["a"], "tags": "bad"}], {}, "'tags' holds 'bad', not a list of labels"),
        (TAG, [{"tokens": ["a"], "tags": [5]}], {}, "label 5 is none of the teacher's 3 classes"),
        (TAG, [{"tokens": ["a"], "tags": [0]}], {"text_pair_column": "b"}, "--text-pair-column"),
        (ASK, [{"question": "a", "answers": None}], {}, "has no column 'context', it has question"),
        (ASK, [asked("film", answers="film")], {}, "'answers' holds 'film', not SQuAD's"),
        (
            ASK,
            [asked("film", answers=[{"text": "film", "answer_start": 4}])],
            {},
            "row 1, column 'answers' holds [{",
        ),
        (
            ASK,
            [asked("film", answers={"text": ["film"], "answer_start": [4, 5]})],
            {},
            "row 1, column 'answers' has 1 in its text and 2 in its answer_start",
        ),
        (
            ASK,
            [asked("film", answers={"text": ["film"], "answer_start": ["4"]})],
            {},
            "an answer is a text and a number, got 'film', '4'",
        ),
        (
            ASK,
            [asked("film"), asked("film", question="red " * 30)],
            {},
            "row 2, column 'question': a question of 30 tokens leaves no room for its context",
        ),
        (ASK, [asked(None)] * 2, {}, "the answers of all 2 training questions are absent"),
    ],
)
def test_errors_name_the_place_and_what_to_do(prepared, write, task, rows, changes, message):
    path = write(rows)
    with pytest.raises(CommandError) as caught:
        prepared(task, path, **changes)
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    if "problem_type" not in text and "--" not in text and "of all" not in text:
        assert str(path) in text


def test_errors_of_the_second_file_name_it(prepared, write):
    first = write([{"text": "a", "label": 0}] * 3, "first.jsonl")
    second = write([{"text": "a", "label": 0}, {"text": "a", "label": 9}], "second.jsonl")
    with pytest.raises(CommandError, match=r"second\.jsonl, row 2, column 'label': label 9"):
        prepared("sequence-classification", first, second)
    with pytest.raises(CommandError, match=r"second\.jsonl, row 2, column 'label': label 9"):
        prepared("sequence-classification", first, eval_files=[second])


@pytest.mark.parametrize("task", [CLASSIFY, TAG, ASK])
def test_a_tokenizer_without_padding_is_an_error(prepared, write, task):
    bare = make_tokenizer(pad_token=None)
    with pytest.raises(CommandError, match=f"{task} needs a tokenizer with a padding token"):
        prepared(task, write([]), tokenizer=bare)


@pytest.mark.parametrize(
    ("name", "text"), [("a.jsonl", ""), ("a.csv", ""), ("a.csv", "text,label\n"), ("a.json", "[]")]
)
def test_a_file_without_rows_is_an_error(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{name} holds no rows"):
        load_rows(path)


@pytest.mark.parametrize(
    ("name", "text"), [("a.jsonl", '{"text":\n'), ("a.csv", 'text\n"good'), ("a.parquet", "PAR1")]
)
def test_a_damaged_file_is_one_line(prepared, tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(CommandError) as caught:
        prepared("sequence-classification", path)
    error = str(caught.value)
    assert error.startswith(f"cannot read the dataset: {path}: ")
    assert "\n" not in error
    assert "while generating" not in error


def test_blocks_are_for_language_models(tmp_path, tokenizer):
    (tmp_path / "text.txt").write_text("a film")
    data = Data("token-classification", "tokens", 8, None, 0, 0)
    with pytest.raises(CommandError, match="and the teacher is for token-classification; pass"):
        load_blocks([tmp_path / "text.txt"], data, tokenizer)


def test_every_task_has_its_text_column(tokenizer):
    names = ("text_column", "block_size", "mlm_probability", "eval_fraction")
    for task, column in (
        ("causal-lm", "text"),
        ("sequence-classification", "text"),
        ("token-classification", "tokens"),
        ("question-answering", "question"),
    ):
        arguments = Namespace(task=task, **dict.fromkeys(names))
        assert settle_data(arguments, 0, tokenizer, named()).text_column == column
        arguments.text_column = "body"
        assert settle_data(arguments, 0, tokenizer, named()).text_column == "body"


@pytest.mark.parametrize("per_token", [False, True])
def test_classification_metrics_against_counting(per_token):
    rng = np.random.default_rng(0)
    shape = (40, 7) if per_token else (200,)
    # Class 4 is no label and class 3 no prediction: both count in the mean, and class 5 does not.
    labels = rng.integers(0, 4, shape)
    logits = rng.normal(size=(*shape, 6))
    logits[..., 3] = logits[..., 5] = -9
    if per_token:
        labels[rng.random(shape) < 0.3] = -100
        logits[labels == -100] = -100
    counted = [
        (int(label), int(row.argmax()))
        for label, row in zip(labels.ravel(), logits.reshape(-1, 6), strict=True)
        if label != -100
    ]
    scores = []
    for c in range(5):
        true = sum(label == c and guess == c for label, guess in counted)
        precision = true / max(1, sum(guess == c for _, guess in counted))
        recall = true / max(1, sum(label == c for label, _ in counted))
        scores.append(2 * precision * recall / (precision + recall) if true else 0.0)
    result = classification_metrics(EvalPrediction((logits, "hidden states"), labels))
    assert 0.1 < result["accuracy"] < 0.5
    assert result == {
        "accuracy": pytest.approx(sum(a == b for a, b in counted) / len(counted)),
        "f1": pytest.approx(sum(scores) / 5),
    }


def test_regression_metrics_against_torch():
    labels, noise = torch.randn(50), torch.randn(50)
    predictions = 0.4 * labels + noise
    result = regression_metrics(EvalPrediction(predictions[:, None].numpy(), labels.numpy()))
    assert result == {
        "mean_squared_error": pytest.approx(((labels - predictions) ** 2).mean().item()),
        "pearson": pytest.approx(
            torch.corrcoef(torch.stack([labels, predictions]))[0, 1].item(), rel=1e-5
        ),
    }
    constant = regression_metrics(EvalPrediction(np.ones((50, 1)), labels.numpy()))
    assert constant["pearson"] == 0


def test_span_metrics_against_every_span():
    rng = np.random.default_rng(1)
    length, rows = 40, 30
    starts = rng.integers(0, length, rows)
    ends = np.minimum(starts + rng.integers(0, 6, rows), length - 1)
    start_logits, end_logits = rng.normal(size=(2, rows, length))
    every = np.arange(rows)
    start_logits[every, starts] += 2
    end_logits[every, ends] += 2
    # The ends of the likeliest span are too far from each other for an answer.
    start_logits[0, 0] = end_logits[0, 39] = 9
    scores, exact = [], 0
    for row in range(rows):
        spans = [(s, e) for s in range(length) for e in range(s, min(s + 30, length))]
        best = max(spans, key=lambda span: start_logits[row, span[0]] + end_logits[row, span[1]])
        predicted = set(range(best[0], best[1] + 1))
        answer = set(range(starts[row], ends[row] + 1))
        shared = len(predicted & answer)
        exact += predicted == answer
        precision, recall = shared / len(predicted), shared / len(answer)
        scores.append(2 * precision * recall / (precision + recall) if shared else 0.0)
    expected = {
        "exact_match": pytest.approx(exact / rows),
        "f1": pytest.approx(sum(scores) / rows),
    }
    assert 0 < exact < rows
    assert span_metrics(EvalPrediction((start_logits, end_logits), (starts, ends))) == expected
    # Longer batches fill the logits up with −100; questions without an answer count for nothing.
    filled = [
        np.pad(np.vstack([logits, logits[:2]]), ((0, 0), (0, 5)), constant_values=-100)
        for logits in (start_logits, end_logits)
    ]
    labels = np.append(starts, [64, -100]), np.append(ends, [64, -100])
    assert span_metrics(EvalPrediction((*filled, "hidden states"), labels)) == expected


def test_metrics_of_nothing_are_0():
    nothing = np.full((2, 3), -100)
    assert classification_metrics(EvalPrediction(np.zeros((2, 3, 4)), nothing)) == {
        "accuracy": 0,
        "f1": 0,
    }
    spans = EvalPrediction((np.zeros((2, 3)),) * 2, (np.array([3, 3]),) * 2)
    assert span_metrics(spans) == {"exact_match": 0, "f1": 0}


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("GPT2LMHeadModel", "causal-lm"),
        ("BertForMaskedLM", "masked-lm"),
        ("BertForSequenceClassification", "sequence-classification"),
        ("BiLSTMForSequenceClassification", "sequence-classification"),
        ("RobertaForTokenClassification", "token-classification"),
        ("DistilBertForQuestionAnswering", "question-answering"),
    ],
)
def test_what_a_teacher_is_for(architecture, task):
    assert task_of(BertConfig(architectures=[architecture])) == task


@pytest.mark.parametrize("architectures", [["BertModel"], None])
def test_a_teacher_that_is_for_nothing(architectures):
    name = "BertModel" if architectures else "no architecture named"
    with pytest.raises(CommandError, match=rf"the teacher \({name}\) is for none of causal-lm, "):
        task_of(BertConfig(architectures=architectures))


SETTINGS = {
    "num_labels": 3,
    "id2label": dict(enumerate(CLASSES)),
    "label2id": {name: i for i, name in enumerate(CLASSES)},
    "problem_type": "single_label_classification",
}


@pytest.mark.parametrize(
    ("task", "model"),
    [(CLASSIFY, BertForSequenceClassification), (TAG, BertForTokenClassification)],
)
def test_students_get_the_teachers_classes(tmp_path, capfd, task, model):
    path = tmp_path / "student.json"
    bert_config(8).to_json_file(path)
    config = load_config("student", path)
    student = load_classifier("student", path, config, task, SETTINGS)
    assert type(student) is model
    assert student.num_labels == 3
    assert student.config.label2id == SETTINGS["label2id"]
    assert type(load_classifier("student", None, config, task, SETTINGS)) is model
    assert capfd.readouterr().err == ""

    # A student that has learnt something else gets a new head.
    start = BertForMaskedLM(bert_config(8))
    start.save_pretrained(tmp_path / "language")
    config = load_config("student", tmp_path / "language")
    student = load_classifier("student", tmp_path / "language", config, task, SETTINGS)
    assert student.classifier.weight.shape == (3, 8)
    embeddings = student.get_input_embeddings().weight
    assert torch.equal(embeddings, start.get_input_embeddings().weight)
    note = capfd.readouterr().err
    assert note.startswith("kdfast: the student starts with random ")
    assert note.endswith("classifier.bias, classifier.weight\n")

    # And one that has learnt the task before goes on, under the teacher's names.
    student.save_pretrained(tmp_path / "trained")
    config = load_config("student", tmp_path / "trained")
    again = load_classifier("student", tmp_path / "trained", config, task, SETTINGS)
    assert torch.equal(again.classifier.weight, student.classifier.weight)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (bert_config(8, num_labels=2), "has 2 classes and the teacher 3"),
        (
            named(("good", "bad", "mixed")),
            "has the classes good, bad, mixed and the teacher bad, good, mixed",
        ),
    ],
)
def test_a_trained_student_has_to_have_the_teachers_classes(tmp_path, config, message):
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(CommandError, match=message):
        load_classifier("student", tmp_path, load_config("student", tmp_path), CLASSIFY, SETTINGS)


@pytest.mark.parametrize("task", [CLASSIFY, TAG, ASK])
def test_a_teacher_without_its_head_is_an_error(tmp_path, task):
    BertModel(bert_config(8)).save_pretrained(tmp_path)
    head = "qa_outputs" if task == ASK else "classifier"
    message = f"the teacher in {tmp_path} has no weights for {head}.bias of a {task}"
    with pytest.raises(CommandError) as caught:
        load_classifier("teacher", tmp_path, load_config("teacher", tmp_path), task)
    assert str(caught.value) == message


def test_bilstm_students_classify_sequences_alone(tmp_path):
    path = tmp_path / "student.json"
    BiLSTMConfig(vocab_size=VOCAB_SIZE, embedding_size=4, hidden_size=3).to_json_file(path)
    config = load_config("student", path)
    student = load_classifier("student", path, config, CLASSIFY, SETTINGS)
    assert type(student) is BiLSTMForSequenceClassification
    assert student.classifier.out_features == 3
    with pytest.raises(CommandError, match=r"cannot load the student from .*student\.json: "):
        load_classifier("student", path, config, TAG, SETTINGS)


def test_teachers_stay_in_their_dtype_and_students_are_float32(tmp_path):
    BertForSequenceClassification(named()).bfloat16().save_pretrained(tmp_path)
    config = load_config("teacher", tmp_path)
    assert load_classifier("teacher", tmp_path, config, CLASSIFY).dtype == torch.bfloat16
    config = load_config("student", tmp_path)
    assert load_classifier("student", tmp_path, config, CLASSIFY, SETTINGS).dtype == torch.float32
    GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1).to_json_file(tmp_path / "gpt2.json")
    config = load_config("student", tmp_path / "gpt2.json")
    assert load_model("student", None, config, "causal-lm").dtype == torch.float32


def train(prepared: Prepared, teacher, student, objective: Objective, folder: Path) -> dict:
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=3,
        eval_strategy="steps",
        eval_steps=1,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
    )
    trainer = DistillationTrainer(
        student,
        arguments,
        teacher=teacher,
        objective=objective,
        train_dataset=prepared.train,
        eval_dataset=prepared.held_out,
        data_collator=prepared.collator,
        compute_metrics=prepared.compute_metrics,
    )
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [1, 2]
    assert all(math.isfinite(entry["eval_loss"]) for entry in evaluations)
    plain = Trainer(
        teacher,
        arguments,
        eval_dataset=prepared.held_out,
        data_collator=prepared.collator,
        compute_metrics=prepared.compute_metrics,
    )
    return {
        "student": evaluations[-1][f"eval_{prepared.metric}"],
        "teacher": plain.evaluate()[f"eval_{prepared.metric}"],
    }


def literal(model, prepared: Prepared, score: Callable[..., list[float]]) -> float:
    """The mean of what a model scores on each held-out row, by itself and without padding."""
    names = ("labels", "start_positions", "end_positions")
    scores = []
    for row in prepared.held_out:
        inputs = {k: torch.tensor([v]) for k, v in row.items() if k not in names}
        if "token_type_ids" in inputs and isinstance(model, BiLSTMForSequenceClassification):
            del inputs["token_type_ids"]
        with torch.no_grad():
            outputs = model.eval()(**inputs)
        scores += score(outputs, row)
    return sum(scores) / len(scores)


@pytest.mark.parametrize("kind", ["bert", "bilstm"])
def test_sequences_train_and_are_evaluated(prepared, write, tmp_path, kind):
    rows = [{"text": f"{TEXTS[i % 5]} {WORDS[i % 11]}", "label": i % 3} for i in range(24)]
    data = prepared("sequence-classification", write(rows), eval_fraction=0.4)
    teacher = BertForSequenceClassification(named()).eval()
    config = bert_config(8)
    if kind == "bilstm":
        config = BiLSTMConfig(vocab_size=VOCAB_SIZE, embedding_size=4, hidden_size=3)
    student = load_classifier("student", None, config, CLASSIFY, data.student_settings)
    objective = Objective([Logits(0.5), HardLabels(0.5)])
    result = train(data, teacher, student, objective, tmp_path / "out")

    def right(outputs, row) -> list[float]:
        return [float(outputs.logits.argmax() == row["labels"])]

    assert result["student"] == pytest.approx(literal(student, data, right))
    assert result["teacher"] == pytest.approx(literal(teacher, data, right))


def test_numbers_train_and_are_evaluated(prepared, write, tmp_path):
    rows = [{"text": f"{TEXTS[i % 5]} {WORDS[i % 11]}", "label": i / 10} for i in range(12)]
    config = bert_config(num_labels=1)
    data = prepared("sequence-classification", write(rows), config=config, eval_fraction=0.4)
    teacher = BertForSequenceClassification(config).eval()
    student = load_classifier("student", None, bert_config(8), CLASSIFY, data.student_settings)
    objective = Objective([LogitMSE(0.5), HardLabels(0.5)])
    result = train(data, teacher, student, objective, tmp_path / "out")

    def error(outputs, row) -> list[float]:
        return [(outputs.logits.item() - row["labels"]) ** 2]

    assert result["student"] == pytest.approx(literal(student, data, error), rel=1e-4)
    assert result["teacher"] == pytest.approx(literal(teacher, data, error), rel=1e-4)


def test_tokens_train_and_are_evaluated(prepared, write, tmp_path):
    rows = [
        {"tokens": (words := TEXTS[i % 5].split()), "tags": [(i + len(w)) % 3 for w in words]}
        for i in range(15)
    ]
    data = prepared("token-classification", write(rows), eval_fraction=0.4)
    teacher = BertForTokenClassification(named()).eval()
    student = load_classifier("student", None, bert_config(8), TAG, data.student_settings)
    objective = Objective([Logits(0.5), HardLabels(0.5)])
    result = train(data, teacher, student, objective, tmp_path / "out")

    def right(outputs, row) -> list[float]:
        guesses = outputs.logits[0].argmax(-1).tolist()
        return [
            float(g == label)
            for g, label in zip(guesses, row["labels"], strict=True)
            if label != -100
        ]

    assert result["student"] == pytest.approx(literal(student, data, right))
    assert result["teacher"] == pytest.approx(literal(teacher, data, right))


def test_questions_train_and_are_evaluated(prepared, write, tmp_path, capfd):
    answers = ["film", "greenish and", "plays", None, "the plays", "film is  greenish"]
    rows = [asked(answers[i % 6], question=f"what {WORDS[i % 11]}") for i in range(18)]
    data = prepared("question-answering", write(rows), config=question_config(), eval_fraction=0.5)
    assert "count for nothing" in capfd.readouterr().err
    teacher = BertForQuestionAnswering(question_config()).eval()
    student = load_classifier("student", None, bert_config(8), ASK, data.student_settings)
    objective = Objective([Logits(0.5), HardLabels(0.5)])
    result = train(data, teacher, student, objective, tmp_path / "out")

    def overlap(outputs, row) -> list[float]:
        if row["start_positions"] == LENGTH:
            return []
        scores = outputs.start_logits[0][:, None] + outputs.end_logits[0]
        best = scores.triu().where(torch.ones_like(scores).triu() > 0, -math.inf).argmax()
        start, end = divmod(int(best), scores.shape[1])
        predicted = set(range(start, end + 1))
        answer = set(range(row["start_positions"], row["end_positions"] + 1))
        return [2 * len(predicted & answer) / (len(predicted) + len(answer))]

    # A span may be in a batch's padding, which a row by itself does not have: here there is none.
    assert len({len(row["input_ids"]) for row in data.held_out}) == 1
    assert result["student"] == pytest.approx(literal(student, data, overlap))
    assert result["teacher"] == pytest.approx(literal(teacher, data, overlap))
