"""What augmentations share: rows in, the same rows and their copies out."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from random import Random

from kdfast.ops.arguments import check_count

# A row's texts: one, or a pair.
Texts = tuple[str, ...]


class Augmentation(ABC):
    """A function for `dataset.map(augment, batched=True)`.

    A row's copies depend on the seed and on the row's own texts. So they are the same whatever the
    batch size, the number of processes and the order of the rows, and rows with equal texts have
    equal copies.

    Args:
        columns: the column with the text, or the two with a pair.
        copies: attempts per row.
        seed: at least 0.
    """

    def __init__(self, columns: str | Sequence[str], copies: int, seed: int) -> None:
        self.columns = (columns,) if isinstance(columns, str) else tuple(columns)
        if len(set(self.columns)) != len(self.columns) or len(self.columns) not in (1, 2):
            raise ValueError(f"columns must be one name or two different ones, got {columns!r}")
        check_count("copies", copies)
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed must be a whole number at least 0, got {seed!r}")
        self.copies = copies
        self.seed = seed

    def __call__(self, batch: Mapping[str, Sequence]) -> dict[str, list]:
        """Rows and their copies.

        Args:
            batch: columns of equal length.

        Returns:
            The same columns. Each row is followed by its copies, which keep what its other columns
            hold.

        Raises:
            ValueError: a column is not there.
            TypeError: a column holds something else than text.
        """
        sources: list[int] = []
        texts: list[Texts] = []
        for row, original in enumerate(self.texts_of(batch)):
            variants = [original, *self._copies(original, self._random(original))]
            sources += [row] * len(variants)
            texts += variants
        rows = {name: [batch[name][row] for row in sources] for name in batch}
        return rows | {name: [text[i] for text in texts] for i, name in enumerate(self.columns)}

    def texts_of(self, batch: Mapping[str, Sequence]) -> list[Texts]:
        for name in self.columns:
            if name not in batch:
                raise ValueError(
                    f"columns must be of those that there are ({', '.join(batch)}), got {name!r}"
                )
            if isinstance(batch[name], str):
                raise TypeError(
                    f"column {name!r} must be a list, got a text: call map with batched=True"
                )
            for text in batch[name]:
                if not isinstance(text, str):
                    raise TypeError(
                        f"column {name!r} must hold text, got {type(text).__name__} ({text!r})"
                    )
        return list(zip(*(batch[name] for name in self.columns), strict=True))

    def _random(self, texts: Texts) -> Random:
        # Not Python's hash(), which every process salts differently.
        key = json.dumps([self.seed, *texts]).encode()
        return Random(int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "little"))

    @abstractmethod
    def _copies(self, texts: Texts, random: Random) -> list[Texts]:
        """At most `copies` of them, none twice, none equal to the row."""
