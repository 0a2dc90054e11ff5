"""Tables of word vectors and the nearest neighbours in them."""

from __future__ import annotations

import math
from array import array
from collections.abc import Container, Sequence
from pathlib import Path

import numpy as np

from kdfast.ops.arguments import check_count

# TinyBERT reads no more of GloVe: files are sorted by frequency.
DEFAULT_LIMIT = 100_000


class WordVectors:
    """Words and their vectors, compared by cosine. Takes 4 bytes a number.

    Args:
        words: n of them, all different.
        vectors: `[n, dimension]`, finite. A vector of zeros points nowhere: its word is left out.

    Example:
        >>> WordVectors.load("glove.6B.300d.txt").nearest("film", 3)
    """

    def __init__(self, words: Sequence[str], vectors: np.ndarray) -> None:
        vectors = np.array(vectors, dtype=np.float32)
        if vectors.ndim != 2 or len(vectors) != len(words):
            raise ValueError(
                f"vectors must be [{len(words)}, dimension], one for each word, "
                f"got {list(vectors.shape)}"
            )
        if not np.isfinite(vectors).all():
            raise ValueError("vectors must be finite, got NaN or infinity")
        # Not np.linalg.norm, which squares the whole table into a second one.
        lengths = np.sqrt(np.einsum("wd,wd->w", vectors, vectors, dtype=np.float64))
        if not lengths.all():
            words = [word for word, length in zip(words, lengths, strict=True) if length > 0]
            vectors, lengths = vectors[lengths > 0], lengths[lengths > 0]
        self.words = list(words)
        self._rows = {word: row for row, word in enumerate(self.words)}
        if len(self._rows) != len(self.words):
            raise ValueError("words must all be different, got some of them twice")
        # In place: the table is large.
        vectors /= lengths.astype(np.float32)[:, None]
        self._directions = vectors

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: str) -> bool:
        return word in self._rows

    def nearest(self, word: str, count: int) -> list[str]:
        """The `count` words of the largest cosine to `word`, largest first, without itself.

        Returns:
            An empty list for a word without a vector.
        """
        row = self._rows.get(word)
        if row is None:
            return []
        cosines = self._directions @ self._directions[row]
        cosines[row] = -np.inf
        count = min(count, len(self) - 1)
        near = np.argpartition(-cosines, count)[:count]
        return [self.words[i] for i in near[np.argsort(-cosines[near], kind="stable")]]

    @classmethod
    def load(cls, path: str | Path, *, limit: int = DEFAULT_LIMIT) -> WordVectors:
        """Read a file as `read_vectors` does.

        Args:
            path: the file, UTF-8.
            limit: read no more than so many lines.

        Raises:
            ValueError: naming the file, the line and what is wrong with it.
        """
        check_count("limit", limit)
        words, vectors = read_vectors(path, limit=limit)
        if not words:
            raise ValueError(f"{path} holds no word vectors")
        return cls(words, vectors)


def read_vectors(
    path: str | Path, *, limit: float = math.inf, only: Container[str] | None = None
) -> tuple[list[str], np.ndarray]:
    """Read GloVe's text format: a line is a word and its numbers, with spaces between.

    A first line of two numbers, as word2vec and fastText write it, is skipped, and so is `<unk>`.
    Of a word that is there twice the first vector counts. A word may hold spaces, as some of
    GloVe's do.

    Args:
        path: the file, UTF-8.
        limit: read no more than so many lines.
        only: the words to keep; numbers of others are not looked at. None keeps all.

    Returns:
        The words, and their vectors as they stand there, `[words, dimension]` float32.

    Raises:
        ValueError: naming the file, the line and what is wrong with it.
    """
    path = Path(path)
    rows: dict[str, int] = {}
    numbers = array("f")
    dimension = None
    with path.open(encoding="utf-8", newline="\n") as lines:
        try:
            for number, line in enumerate(lines, 1):
                items = line.rstrip("\r\n ").split(" ")
                if number == 1 and len(items) == 2 and all(map(str.isdecimal, items)):
                    limit += 1
                    continue
                if number > limit:
                    break
                if dimension is None:
                    dimension = len(items) - 1
                unwanted = only is not None and " ".join(items[:-dimension]) not in only
                # Too few numbers are an error of every line.
                if unwanted and 0 < dimension < len(items):
                    continue
                word, vector = _parse(items, dimension, f"{path}, line {number}")
                if word != "<unk>" and word not in rows:
                    rows[word] = len(rows)
                    numbers.frombytes(vector.tobytes())
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error.reason}") from error
    vectors = np.frombuffer(numbers, np.float32).reshape(len(rows), dimension or 0)
    return list(rows), vectors


def _parse(items: list[str], dimension: int, place: str) -> tuple[str, np.ndarray]:
    found = len(items) - 1
    # A word with spaces looks like too many numbers, unless its last part is one.
    if (
        found < dimension
        or dimension == 0
        or (found > dimension and _is_number(items[-dimension - 1]))
    ):
        expected = dimension or "at least 1"
        raise ValueError(f"{place}: expected a word and {expected} numbers, got {found} numbers")
    try:
        # What overflows becomes infinite, and is an error below.
        with np.errstate(over="ignore"):
            vector = np.array(items[-dimension:], dtype=np.float32)
    except ValueError:
        wrong = next(item for item in items[-dimension:] if not _is_number(item))
        raise ValueError(f"{place}: expected {dimension} numbers, got {wrong!r}") from None
    if not np.isfinite(vector).all():
        raise ValueError(f"{place}: expected finite numbers, got NaN or infinity")
    return " ".join(items[:-dimension]), vector


def _is_number(item: str) -> bool:
    try:
        return not math.isnan(float(item))
    except ValueError:
        return False
