"""What an evaluation says of classifiers, in numbers that need no other package."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from transformers import EvalPrediction

from kdfast.trainer.head import IGNORE_INDEX

Metrics = Callable[[EvalPrediction], dict[str, float]]

# Of an answer, as in BERT's run_squad.py.
MAX_ANSWER_TOKENS = 30


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, and F1: of each class, and then the mean over the classes.

    Classes count that are a label or a prediction, each as much as any other ("macro"). Labels of
    −100 count for nothing.

    Args:
        prediction: logits `[N, C]` and labels `[N]`, or `[N, S, C]` and `[N, S]`.
    """
    labels = np.asarray(prediction.label_ids)
    counted = labels != IGNORE_INDEX
    labels, predicted = labels[counted], _logits(prediction)[0].argmax(-1)[counted]
    classes = np.union1d(labels, predicted)
    # Of a class, F1 = 2 · right / (labelled + predicted).
    f1 = [
        2
        * np.sum((labels == c) & (predicted == c))
        / (np.sum(labels == c) + np.sum(predicted == c))
        for c in classes
    ]
    return {"accuracy": _mean(labels == predicted), "f1": _mean(f1)}


def regression_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The mean squared error, and Pearson's correlation: 0 where either side is constant.

    Args:
        prediction: `[N, 1]` and labels `[N]`.
    """
    labels = np.asarray(prediction.label_ids, dtype=np.float64).ravel()
    predicted = _logits(prediction)[0].astype(np.float64).ravel()
    a, b = labels - _mean(labels), predicted - _mean(predicted)
    norm = math.sqrt(float((a * a).sum() * (b * b).sum()))
    return {
        "mean_squared_error": _mean((labels - predicted) ** 2),
        "pearson": float((a * b).sum()) / norm if norm > 0 else 0.0,
    }


def span_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Of answers, the share that is found exactly, and the F1 of their tokens.

    The answer is the best span of at most 30 tokens, wherever in the sequence it stands. F1 is that
    of the tokens of both spans, by position, a mean over the questions; SQuAD's own script compares
    words, without articles and punctuation, with the best of several answers. Questions without an
    answer count for nothing.

    Args:
        prediction: logits of the start and of the end, each `[N, S]`, and the positions of both,
            each `[N]`.
    """
    start_logits, end_logits = _logits(prediction)[:2]
    starts, ends = (np.asarray(positions).ravel() for positions in prediction.label_ids)
    length = start_logits.shape[1]
    counted = (starts >= 0) & (starts < length) & (ends >= 0) & (ends < length)
    starts, ends = starts[counted], ends[counted]
    found, found_ends = _best_spans(start_logits[counted], end_logits[counted])
    shared = np.minimum(ends, found_ends) - np.maximum(starts, found) + 1
    tokens = (ends - starts + 1) + (found_ends - found + 1)
    return {
        "exact_match": _mean((starts == found) & (ends == found_ends)),
        "f1": _mean(2 * shared.clip(0) / tokens),
    }


def _best_spans(start_logits: np.ndarray, end_logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last token of the likeliest span of each row."""
    rows, length = start_logits.shape
    every = np.arange(rows)
    best = np.full(rows, -np.inf)
    starts, ends = np.zeros((2, rows), dtype=np.int64)
    for extra in range(min(MAX_ANSWER_TOKENS, length)):
        scores = start_logits[:, : length - extra] + end_logits[:, extra:]
        at = scores.argmax(1)
        better = scores[every, at] > best
        best = np.where(better, scores[every, at], best)
        starts, ends = np.where(better, at, starts), np.where(better, at + extra, ends)
    return starts, ends


def _logits(prediction: EvalPrediction) -> tuple[np.ndarray, ...]:
    """The logits first, of a model that returns other things behind them."""
    predictions = prediction.predictions
    return predictions if isinstance(predictions, tuple) else (predictions,)


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else 0.0
