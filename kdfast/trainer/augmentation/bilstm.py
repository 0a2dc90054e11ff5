"""The augmentation of the BiLSTM paper: masks, other words of the same part of speech, n-grams."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from random import Random

from kdfast.ops.arguments import check_count, check_number
from kdfast.trainer.augmentation.rows import Augmentation, Texts

# What each copy in turn changes, of a text and of a pair.
_SIDES = {1: ((0,),), 2: ((0,), (1,), (0, 1))}


def split_words(text: str) -> list[str]:
    """Words, with the apostrophes inside them, and single marks of punctuation.

    Example:
        >>> split_words("It's good, isn't it?")
        ["It's", 'good', ',', "isn't", 'it', '?']
    """
    return re.findall(r"\w+(?:['’]\w+)*|[^\w\s]", text)


class BiLSTMAugmentation(Augmentation):
    """Copies of a text with words masked, words replaced by others of their tag, and n-grams.

    Tang et al. 2019, "Distilling Task-Specific Knowledge from BERT into Simple Neural Networks",
    section 3.3. For each word a number is drawn, uniform in [0, 1). Below `mask_probability` the
    word becomes `mask_token`; below `mask_probability + pos_probability` another word that the
    tagger gave the same tag, drawn as often as it is in the corpus. After that, with
    `ngram_probability`, n of `ngram_sizes` is drawn and all but n consecutive words are dropped.
    Of a pair the first copy changes the first text, the second the second, the third both, and so
    on. The copies carry the row's other columns, but a label may no longer be right: the paper
    takes the teacher's logits of each copy.

    Args:
        tagger: words in, one tag for each out. The paper's is NLTK's:
            `lambda words: [tag for _, tag in nltk.pos_tag(words)]`.
        vocabulary: how often each word has each tag: `{tag: {word: count}}`. `fit` makes one.
        columns: the column with the text, or the two with a pair.
        mask_probability: of a word to be masked.
        pos_probability: of a word to be replaced. Above 0 it needs a tagger and a vocabulary.
        ngram_probability: of a copy to be an n-gram; the published code's default is 0.
        ngram_sizes: what n is drawn from. A text that is not longer stays whole.
        copies: attempts per row; those without a word of the original and those that are there
            already are left out. The paper has 20 for SST-2, 10 for MNLI and QQP.
        mask_token: the teacher's and the student's.
        word_tokenizer: a text in, words out. A copy has them with spaces between.
        seed: a row's copies depend on it and on the row's texts.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Example:
        >>> augment = BiLSTMAugmentation(tagger, columns="sentence").fit(dataset)
        >>> dataset = dataset.map(augment, batched=True, num_proc=4)
    """

    def __init__(
        self,
        tagger: Callable[[list[str]], Sequence[str]] | None = None,
        vocabulary: Mapping[str, Mapping[str, int]] | None = None,
        *,
        columns: str | Sequence[str] = "text",
        mask_probability: float = 0.1,
        pos_probability: float = 0.1,
        ngram_probability: float = 0.25,
        ngram_sizes: Sequence[int] = (1, 2, 3, 4, 5),
        copies: int = 20,
        mask_token: str = "[MASK]",
        word_tokenizer: Callable[[str], list[str]] = split_words,
        seed: int = 42,
    ) -> None:
        super().__init__(columns, copies, seed)
        check_number("mask_probability", mask_probability, 0, 1)
        check_number("pos_probability", pos_probability, 0, 1)
        check_number("ngram_probability", ngram_probability, 0, 1)
        if mask_probability + pos_probability > 1:
            raise ValueError(
                "mask_probability and pos_probability must add up to at most 1, "
                f"got {mask_probability} and {pos_probability}"
            )
        if len(ngram_sizes) == 0:
            raise ValueError("ngram_sizes must have at least one size, got none")
        for size in ngram_sizes:
            check_count("ngram_sizes", size)
        if pos_probability > 0 and tagger is None:
            raise ValueError(
                f"pos_probability is {pos_probability} and there is no tagger: "
                "pass tagger, or pos_probability=0"
            )
        self.tagger = tagger
        self.mask_probability = mask_probability
        self.pos_probability = pos_probability
        self.ngram_probability = ngram_probability
        self.ngram_sizes = tuple(ngram_sizes)
        self.mask_token = mask_token
        self.word_tokenizer = word_tokenizer
        self.vocabulary: dict[str, dict[str, int]] | None = None
        if vocabulary is not None:
            self._take(vocabulary)

    def fit(self, dataset: Iterable[Mapping[str, object]]) -> BiLSTMAugmentation:
        """Count how often each word of a dataset has each tag: one pass.

        Args:
            dataset: rows; a `datasets.Dataset` or `IterableDataset`, or any other iterable.

        Returns:
            This augmentation.

        Raises:
            ValueError: there is no tagger; a column is not there; the dataset has no words.
        """
        if self.tagger is None:
            raise ValueError("fit needs a tagger, got none")
        if hasattr(dataset, "select_columns") and set(self.columns) <= set(
            dataset.column_names or ()
        ):
            dataset = dataset.select_columns(list(self.columns))
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for row in dataset:
            for text in self.texts_of({name: [value] for name, value in row.items()})[0]:
                words = self.word_tokenizer(text)
                for word, tag in zip(words, self._tags(words), strict=True):
                    counts[tag][word] += 1
        if not counts:
            raise ValueError("dataset must have words, got none")
        self._take(counts)
        return self

    def _take(self, vocabulary: Mapping[str, Mapping[str, int]]) -> None:
        # Sorted: equal counts draw equal words, in whatever order they were counted.
        self.vocabulary = {tag: dict(sorted(vocabulary[tag].items())) for tag in sorted(vocabulary)}
        self._draws = {}
        for tag, counts in self.vocabulary.items():
            for word, count in counts.items():
                check_count(f"vocabulary[{tag!r}][{word!r}]", count)
            self._draws[tag] = (list(counts), list(accumulate(counts.values())))

    def _tags(self, words: list[str]) -> Sequence[str]:
        tags = self.tagger(words) if words else []
        if len(tags) != len(words):
            raise ValueError(f"tagger must return {len(words)} tags for {words}, got {tags}")
        return tags

    def _copies(self, texts: Texts, random: Random) -> list[Texts]:
        if self.pos_probability > 0 and self.vocabulary is None:
            raise ValueError("pos_probability needs a vocabulary: call fit(dataset) first")
        words = [self.word_tokenizer(text) for text in texts]
        if not all(words):
            return []
        tags = [self._tags(side) if self.pos_probability > 0 else side for side in words]
        original = tuple(map(" ".join, words))
        seen, copies = {original}, []
        cycle = _SIDES[len(texts)]
        for attempt in range(self.copies):
            changed = {
                side: self._synthesize(words[side], tags[side], random)
                for side in cycle[attempt % len(cycle)]
            }
            if None in changed.values():
                continue
            key = tuple(changed.get(side, text) for side, text in enumerate(original))
            if key not in seen:
                seen.add(key)
                copies.append(tuple(changed.get(side, text) for side, text in enumerate(texts)))
        return copies

    def _synthesize(self, words: list[str], tags: Sequence[str], random: Random) -> str | None:
        """A copy, or None if it kept none of the words."""
        replaceable = self.mask_probability + self.pos_probability
        synthetic, kept = [], False
        for word, tag in zip(words, tags, strict=True):
            roll = random.random()
            if roll < self.mask_probability:
                word = self.mask_token
            elif roll < replaceable:
                word = self._draw(tag, random) or word
            else:
                kept = True
            synthetic.append(word)
        if random.random() < self.ngram_probability:
            size = random.choice(self.ngram_sizes)
            start = random.randrange(max(len(words) - size, 0) + 1)
            synthetic = synthetic[start : start + size]
        return " ".join(synthetic) if kept else None

    def _draw(self, tag: str, random: Random) -> str | None:
        """A word of the tag, in proportion to its count, or None where the corpus had none."""
        if tag not in self._draws:
            return None
        words, cumulative = self._draws[tag]
        return words[bisect_right(cumulative, random.randrange(cumulative[-1]))]
