"""Students of other tasks than language: sequences, tokens, answers, and numbers."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from training import (
    LENGTH,
    assert_same_gradients,
    bert,
    gradients,
    gradients_of,
    padded_rows,
    trainer_of,
)
from transformers import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    default_data_collator,
)

from kdfast.trainer import (
    HardLabels,
    HiddenMSE,
    LogitMSE,
    Logits,
    TruncatedLogits,
    tinybert_intermediate,
)

CLASSES = 3

sequences = partial(bert, cls=BertForSequenceClassification, num_labels=CLASSES)
numbers = partial(bert, cls=BertForSequenceClassification, num_labels=1)
tokens = partial(bert, cls=BertForTokenClassification, num_labels=CLASSES)
answers = partial(bert, cls=BertForQuestionAnswering)


@pytest.fixture
def make_trainer(tmp_path):
    return partial(trainer_of, tmp_path)


def classified(count: int) -> list[dict[str, Tensor]]:
    return [{**r, "labels": torch.tensor(i % CLASSES)} for i, r in enumerate(padded_rows(count))]


def measured(count: int) -> list[dict[str, Tensor]]:
    return [{**row, "labels": torch.randn(())} for row in padded_rows(count)]


def tagged(count: int) -> list[dict[str, Tensor]]:
    """A tag for the first piece of each word, of which row i has another number."""
    rows = padded_rows(count, labels=True)
    for i, row in enumerate(rows):
        pieces = torch.rand(LENGTH) < 0.1 * (i % 5)
        row["labels"] = torch.where(row["labels"] == -100, -100, row["labels"] % CLASSES)
        row["labels"][pieces] = -100
    return rows


def answered(count: int) -> list[dict[str, Tensor]]:
    """Questions, some of whose answers were cut off with the text."""
    rows = []
    for i, row in enumerate(padded_rows(count)):
        start = torch.tensor(i % 4 if i % 3 else LENGTH + 2)
        rows.append({**row, "start_positions": start, "end_positions": start + 2})
    return rows


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL at a temperature, of each row."""
    own, other = ((x / temperature).log_softmax(-1) for x in (student, teacher))
    return kl_div(own, other, reduction="none", log_target=True).sum(-1)


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    outputs = model(**{k: batch[k] for k in ("input_ids", "attention_mask")})
    if "logits" in outputs:
        return outputs.logits
    return torch.stack([outputs.start_logits, outputs.end_logits], 1)


@pytest.mark.parametrize(
    ("make", "rows"), [(sequences, classified), (tokens, tagged), (answers, answered)]
)
def test_soft_and_hard_labels_are_the_literal_ones(make_trainer, make, rows):
    student, teacher = make(8, 1), make(16, 2)
    own, batch = copy.deepcopy(student), default_data_collator(rows(7))
    trainer = make_trainer(student, teacher, [Logits(0.7, temperature=2.0), HardLabels(0.3)])
    found = gradients(trainer, batch)

    if make is answers:
        labels = torch.stack([batch["start_positions"], batch["end_positions"]], 1)
        counted = labels < LENGTH
        assert not counted.all()
    else:
        labels = batch["labels"]
        counted = labels != -100
    logits = logits_of(own, batch)
    with torch.no_grad():
        other = logits_of(teacher, batch)
    soft = soft_loss(logits, other, 2.0)[counted].mean()
    hard = nn.CrossEntropyLoss()(logits[counted], labels[counted])
    (0.7 * 4 * soft + 0.3 * hard).backward()
    assert trainer._terms.keys() == {"soft_loss", "hard_loss"}
    torch.testing.assert_close(trainer._terms["soft_loss"], soft.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(trainer._terms["hard_loss"], hard.detach(), rtol=1e-5, atol=1e-7)
    assert_same_gradients(found, gradients_of(own))


@pytest.mark.parametrize(
    ("make", "rows"), [(sequences, classified), (tokens, tagged), (answers, answered)]
)
def test_the_hard_loss_is_the_students_own(make_trainer, make, rows):
    """Of answers, where all or none of both ends is there: transformers averages the two ends."""
    student, batch = make(8, 1).eval(), default_data_collator(rows(7))
    trainer = make_trainer(student, make(16, 1), [Logits(), HardLabels()])
    with torch.no_grad():
        trainer.compute_loss(student, dict(batch))
        torch.testing.assert_close(
            trainer._terms["hard_loss"], student(**batch).loss, rtol=1e-5, atol=0
        )


def test_sequences_without_labels(make_trainer):
    student, teacher = sequences(8, 1), sequences(16, 2)
    own, batch = copy.deepcopy(student), default_data_collator(padded_rows(5))
    for objective in ([Logits()], [LogitMSE()]):
        found = gradients(make_trainer(student, teacher, objective), batch)
        logits = logits_of(own, batch)
        with torch.no_grad():
            other = logits_of(teacher, batch)
        own.zero_grad()
        soft = soft_loss(logits, other, 1.0).mean()
        (soft if isinstance(objective[0], Logits) else nn.MSELoss()(logits, other)).backward()
        assert_same_gradients(found, gradients_of(own))


def test_a_truncated_teacher_of_classes(make_trainer):
    student, teacher = sequences(8, 1), sequences(16, 2)
    batch = default_data_collator(classified(5))
    trainer = make_trainer(student, teacher, [TruncatedLogits(k=2, tail="bucket")])
    loss = trainer.compute_loss(student.train(), dict(batch))
    with torch.no_grad():
        # Two of three classes and a bucket are all three.
        expected = soft_loss(logits_of(student, batch), logits_of(teacher, batch), 1.0).mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "rows"), [(sequences, classified), (tokens, tagged), (answers, answered)]
)
def test_the_error_of_logits_is_of_what_counts(make_trainer, make, rows):
    student, teacher = make(8, 1), make(16, 2)
    own, batch = copy.deepcopy(student), default_data_collator(rows(7))
    if make is sequences:
        batch["labels"][2] = -100
    found = gradients(make_trainer(student, teacher, [LogitMSE(3.0)]), batch)
    if make is answers:
        counted = torch.stack([batch["start_positions"], batch["end_positions"]], 1) < LENGTH
    else:
        counted = batch["labels"] != -100
    logits = logits_of(own, batch)
    with torch.no_grad():
        other = logits_of(teacher, batch)
    (3.0 * nn.MSELoss()(logits[counted], other[counted])).backward()
    assert_same_gradients(found, gradients_of(own))


def test_a_truncated_teacher_has_its_logits_still(make_trainer):
    student, teacher = sequences(8, 1), sequences(16, 2)
    batch = default_data_collator(classified(5))
    trainer = make_trainer(student, teacher, [TruncatedLogits(k=2), LogitMSE()])
    trainer.compute_loss(student.train(), dict(batch))
    with torch.no_grad():
        expected = nn.MSELoss()(logits_of(student, batch), logits_of(teacher, batch))
    torch.testing.assert_close(trainer._terms["logit_loss"], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("values", [1, 2])
def test_a_regression_is_the_literal_one(make_trainer, values):
    make = partial(numbers, num_labels=values, problem_type="regression")
    student, teacher = make(8, 1), make(16, 2)
    own, batch = copy.deepcopy(student), default_data_collator(measured(6))
    if values == 2:
        batch["labels"] = torch.randn(6, 2)
    trainer = make_trainer(student, teacher, [LogitMSE(0.6), HardLabels(0.4)])
    found = gradients(trainer, batch)
    # With the step's number of labels, as in training.
    student.zero_grad()
    trainer.compute_loss(
        student, dict(batch), num_items_in_batch=torch.tensor(batch["labels"].numel())
    ).backward()
    assert_same_gradients(gradients_of(student), found)

    logits = logits_of(own, batch)
    with torch.no_grad():
        other = logits_of(teacher, batch)
    mse, hard = (
        nn.MSELoss()(logits, other),
        nn.MSELoss()(logits.view_as(batch["labels"]), batch["labels"]),
    )
    (0.6 * mse + 0.4 * hard).backward()
    torch.testing.assert_close(trainer._terms["logit_loss"], mse.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(trainer._terms["hard_loss"], hard.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(hard, own(**batch).loss, rtol=1e-5, atol=0)
    assert_same_gradients(found, gradients_of(own))


@pytest.mark.parametrize(
    ("make", "rows", "terms"),
    [
        (sequences, classified, [Logits(0.5), HardLabels(0.5)]),
        (numbers, measured, [LogitMSE(0.5), HardLabels(0.5)]),
        (tokens, tagged, [Logits(0.5), LogitMSE(0.1), HardLabels(0.5)]),
    ],
)
def test_accumulated_gradients_equal_those_of_one_batch(make_trainer, make, rows, terms):
    rows, student, teacher, norms = rows(8), make(8, 1), make(16, 2), []
    for accumulation in (1, 4):
        trainer = make_trainer(
            copy.deepcopy(student),
            teacher,
            terms,
            rows,
            max_steps=1,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        log = trainer.state.log_history[0]
        norms.append([log[k] for k in sorted(log) if "loss" in k or k == "grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def accuracy(prediction) -> dict[str, float]:
    """Of classes, tags or both ends."""
    predictions, labels = prediction.predictions, prediction.label_ids
    if isinstance(predictions, tuple):
        predictions, labels = np.stack(predictions, 1), np.stack(labels, 1)
    right = predictions.argmax(-1) == labels
    return {"accuracy": right[labels != -100].mean()}


@pytest.mark.parametrize(
    ("make", "rows", "shape"),
    [
        (sequences, classified, (CLASSES,)),
        (tokens, tagged, (LENGTH, CLASSES)),
        (answers, answered, (LENGTH,)),
    ],
)
def test_metrics_during_training(make_trainer, make, rows, shape):
    rows = rows(12)
    trainer = make_trainer(
        make(16, 1),
        make(16, 2),
        [Logits(0.2), HardLabels(0.8)],
        rows,
        {"eval_dataset": rows[:6], "compute_metrics": accuracy},
        num_train_epochs=6,
        eval_strategy="epoch",
        learning_rate=2e-2,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert len(logs) == 6
    assert max(entry["eval_accuracy"] for entry in logs) > logs[0]["eval_accuracy"]
    for entry in logs:
        parts = 0.2 * entry["eval_soft_loss"] + 0.8 * entry["eval_hard_loss"]
        assert entry["eval_loss"] == pytest.approx(parts, rel=1e-5)

    predictions = trainer.predict(rows[:5]).predictions
    if make is answers:
        assert [ends.shape for ends in predictions] == [(5, *shape)] * 2
    else:
        assert predictions.shape == (5, *shape)


@pytest.mark.parametrize(
    ("make", "shape"), [(sequences, (CLASSES,)), (tokens, (LENGTH, CLASSES)), (answers, (LENGTH,))]
)
def test_predictions_without_labels(make_trainer, make, shape):
    predictions = make_trainer(make(8, 1), make(16, 1), [Logits()]).predict(padded_rows(5))
    found = predictions.predictions
    assert [x.shape for x in (found if isinstance(found, tuple) else (found,))] == [(5, *shape)] * (
        2 if make is answers else 1
    )


@pytest.mark.parametrize(
    ("make", "rows"), [(sequences, classified), (tokens, tagged), (answers, answered)]
)
def test_the_inside_of_any_task(make_trainer, make, rows):
    """TinyBERT's intermediate step needs no labels, and leaves them alone."""
    rows = rows(8)
    trainer = make_trainer(
        make(8, 2), make(16, 4), tinybert_intermediate().objective, rows, max_steps=2
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert {"attention_loss", "hidden_loss", "embedding_loss"} <= logged.keys()
    assert not {"soft_loss", "hard_loss"} & logged.keys()
    both = make_trainer(make(8, 2), make(16, 4), [HiddenMSE(), Logits(), HardLabels()], rows)
    metrics = both.evaluate(rows)
    assert {"eval_soft_loss", "eval_hard_loss", "eval_hidden_loss"} <= metrics.keys()


@pytest.mark.parametrize(
    ("student", "teacher", "terms", "change", "error", "message"),
    [
        (sequences, partial(sequences, num_labels=2), [Logits()], {}, ValueError, "has 3 classes"),
        (sequences, partial(sequences, num_labels=2), [LogitMSE()], {}, ValueError, "3 classes"),
        (sequences, tokens, [Logits()], {}, ValueError, "the student's leading shape"),
        (sequences, tokens, [LogitMSE()], {}, ValueError, "the student's leading shape"),
        (answers, sequences, [Logits()], {}, ValueError, "the batch has no labels: they say"),
        (
            sequences,
            sequences,
            [Logits(), HardLabels()],
            {},
            ValueError,
            "the objective needs them",
        ),
        (tokens, tokens, [Logits()], {}, ValueError, "the batch has no labels: they say which"),
        (sequences, sequences, [TruncatedLogits(k=9)], {}, ValueError, "k must be at most the 3"),
        (
            sequences,
            sequences,
            [LogitMSE(), HardLabels()],
            {"labels": torch.tensor([0, 1, 7, 2])},
            ValueError,
            r"labels must be in \[0, 3\).*got 7",
        ),
        (
            sequences,
            sequences,
            [LogitMSE(), HardLabels()],
            {"labels": torch.zeros(4, LENGTH, dtype=torch.int64)},
            ValueError,
            "labels must have the logits' leading shape",
        ),
        (
            sequences,
            sequences,
            [LogitMSE(), HardLabels()],
            {"labels": torch.zeros(4)},
            ValueError,
            "labels of a regression must be as many",
        ),
        (numbers, numbers, [Logits()], {}, ValueError, "the student has one class"),
        (
            sequences,
            sequences,
            [Logits(), HardLabels()],
            {"labels": torch.zeros(4, CLASSES)},
            TypeError,
            "labels must be classes where the objective has Logits, got torch.float32",
        ),
        (
            answers,
            answers,
            [Logits()],
            {"start_positions": torch.zeros(4, dtype=torch.int64)},
            ValueError,
            "the batch must have both of",
        ),
    ],
)
def test_bad_batches_are_one_clear_line(
    make_trainer, student, teacher, terms, change, error, message
):
    student = student(8, 1)
    trainer = make_trainer(student, teacher(16, 1), terms)
    with pytest.raises(error, match=message) as raised:
        trainer.compute_loss(student.train(), default_data_collator(padded_rows(4)) | change)
    assert "\n" not in str(raised.value)


def test_several_labels_are_refused(make_trainer):
    student = sequences(8, 1, problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="must not be 'multi_label_classification'"):
        make_trainer(student, sequences(16, 1), [Logits()])
