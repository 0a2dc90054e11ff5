"""TinyBERT's augmentation and the BiLSTM paper's, against transcriptions of what was published."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from datetime import datetime
from pathlib import Path
from random import Random

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Value
from datasets.fingerprint import Hasher
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertTokenizer,
    DistilBertConfig,
    DistilBertForMaskedLM,
    PreTrainedTokenizerFast,
)
from transformers.models.bert.tokenization_bert_legacy import BasicTokenizer

from kdfast import cli
from kdfast.cli import augment as cli_augment
from kdfast.trainer import BiLSTMAugmentation, TinyBERTAugmentation, WordVectors
from kdfast.trainer.augmentation.bilstm import split_words
from kdfast.trainer.augmentation.tinybert import STOP_WORDS
from kdfast.trainer.augmentation.word_vectors import read_vectors

pytestmark = pytest.mark.usefixtures("one_thread")

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WHOLE_WORDS = (
    "the a film is story plot actor play moving music slow good bad great dull scene end begin "
    "laugh cry watch hear see night day . , ! ' - s cafe 1 2"
)
WHOLE = WHOLE_WORDS.split()
PIECES = ["##ing", "##s", "##ed", "##er", "##ly", "##2"]
VOCABULARY = [*SPECIAL, *WHOLE, *PIECES]
LIMIT = 48

SENTENCES = [
    "The film is a slow, moving story.",
    "Great plot -- watching the actors play music!",
    "it's the Café's dullest scene of the 12 nights",
    "hearing, SEEING and crying",
    "good",
    "the is a",
    "",
    "unknownword zzz playings",
    "The story begins [SEP] the story ended",
    "a   film\twith\nspaces 22",
]
LONG = " ".join(["film story plot watching slow actors"] * 12)


def make_tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab={token: i for i, token in enumerate(VOCABULARY)})


def bert_config(**changes: int) -> BertConfig:
    return BertConfig(
        **{
            "vocab_size": len(VOCABULARY),
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": LIMIT,
            **changes,
        }
    )


def make_model() -> BertForMaskedLM:
    torch.manual_seed(1)
    model = BertForMaskedLM(bert_config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        # A trained model suggests no special token, and the source does not look.
        model.cls.predictions.bias[: len(SPECIAL)] = -1e4
    return model


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model() -> BertForMaskedLM:
    return make_model()


@pytest.fixture(scope="module")
def vectors() -> WordVectors:
    # "hearing", "seeing" and "unknownword" are there, "watching" is not.
    words = ["hearing", "seeing", "unknownword", "playings", *WHOLE, "nights", "actors"]
    return WordVectors(words, np.random.default_rng(0).normal(size=(len(words), 8)))


@pytest.fixture(autouse=True)
def _dataset_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def tag(words: list[str]) -> list[str]:
    """A tagger: what a word ends in."""
    return [re.sub("[^a-z]", "?", word.lower()[-1]) for word in words]


def rows(count: int = 30) -> list[dict[str, object]]:
    return [
        {"text": f"{SENTENCES[i % len(SENTENCES)]} {i}", "label": i, "weight": i / 2}
        for i in range(count)
    ]


def pairs(count: int = 20) -> list[dict[str, object]]:
    size = len(SENTENCES)
    return [
        {"a": SENTENCES[i % size], "b": f"{SENTENCES[(3 * i + 1) % size]} {i}", "label": i % 3}
        for i in range(count)
    ]


def columns_of(table: list[dict[str, object]]) -> dict[str, list]:
    return {name: [row[name] for row in table] for name in table[0]}


# TinyBERT's, as published.


class PublishedTinyBERT:
    """DataAugmentor of TinyBERT/data_augmentation.py, step by step, one mask a forward pass.

    The choice among candidates is made from a sorted list; the source's is in the model's order.
    """

    def __init__(self, model, tokenizer, table, *, count, copies, probability, random):
        self.model, self.tokenizer, self.table = model, tokenizer, table
        self.count, self.copies, self.probability = count, copies, probability
        self.random = random

    def neighbours(self, word: str) -> list[str]:
        words, matrix = self.table
        if word not in words:
            return []
        normed = (matrix.T / np.sum(matrix**2, 1) ** 0.5).T
        cosines = normed @ normed[words.index(word)]
        cosines[words.index(word)] = -np.inf
        near = [words[i] for i in np.argsort(-cosines)[: self.count]][: len(words) - 1]
        return [each.title() for each in near] if word.istitle() else near

    def predicted(self, sentence: str, pieces: list[str], mask: int) -> list[str]:
        if mask >= LIMIT:
            return []
        tokens = ["[CLS]", *self.tokenizer.tokenize(sentence)]
        length = len(tokens)
        tokens = [*pieces, "[SEP]", *tokens[1:], "[SEP]"]
        if len(tokens) > LIMIT:
            tokens = tokens[:LIMIT]
            length = min(length, LIMIT - 1)
        ids = self.tokenizer.convert_tokens_to_ids(tokens)
        segments = [0] * (length + 1) + [1] * (len(tokens) - length - 1)
        with torch.no_grad():
            logits = self.model(
                torch.tensor([ids]), token_type_ids=torch.tensor([segments])
            ).logits[0, mask]
        best = torch.argsort(logits, descending=True)[: self.count].tolist()
        best = self.tokenizer.convert_ids_to_tokens(best)
        return [piece for piece in best if not piece.startswith("##")]

    def candidates(self, sentence: str, index: int, word: str) -> list[str]:
        pieces = ["[CLS]", *self.tokenizer.tokenize(sentence)]
        current, of_word = -1, []
        for i in range(1, len(pieces)):
            current += "##" not in pieces[i]
            if current == index:
                of_word.append(i)
        if len(of_word) == 1:
            pieces[of_word[0]] = "[MASK]"
            found = self.predicted(sentence, pieces, of_word[0])
        else:
            found = self.neighbours(word)
        return found or [word]

    def augment(self, sentence: str) -> list[str]:
        # With what its BertTokenizer never splits.
        words = BasicTokenizer(never_split=SPECIAL).tokenize(sentence)
        candidates = {
            i: self.candidates(sentence, i, word)
            for i, word in enumerate(words)
            if not re.search("[^a-z]", word.lower()) and word.lower() not in STOP_WORDS
        }
        sentences = [sentence]
        for _ in range(self.copies):
            new = list(words)
            for i in candidates:
                candidate = self.random.choice(sorted(candidates[i]))
                if self.random.random() < self.probability:
                    new[i] = candidate
            if " ".join(new) not in sentences:
                sentences.append(" ".join(new))
        return sentences


@pytest.mark.parametrize(("count", "copies", "probability"), [(15, 20, 0.4), (3, 5, 1.0)])
def test_tinybert_is_what_was_published(model, tokenizer, vectors, count, copies, probability):
    augment = TinyBERTAugmentation(
        model,
        tokenizer,
        embeddings=vectors,
        candidates=count,
        copies=copies,
        replace_probability=probability,
        batch_size=4,
        seed=7,
    )
    lengths = []
    for text in [*SENTENCES, LONG]:
        published = PublishedTinyBERT(
            model,
            tokenizer,
            (vectors.words, vectors._directions.astype(np.float64)),
            count=count,
            copies=copies,
            probability=probability,
            random=augment._random((text,)),
        )
        expected = published.augment(text)
        assert augment({"text": [text]}) == {"text": expected}
        lengths.append(len(expected))
    assert max(lengths) == copies + 1
    assert min(lengths) < copies


def test_tinybert_defaults_are_the_papers(model, tokenizer):
    augment = TinyBERTAugmentation(model, tokenizer)
    assert (augment.replace_probability, augment.candidates, augment.copies) == (0.4, 15, 20)


def test_tinybert_candidates_by_kind_of_word(model, tokenizer, vectors):
    augment = TinyBERTAugmentation(model, tokenizer, embeddings=vectors, candidates=5)
    text = "The film 's hearing watching 12 ! zzz [MASK]"
    candidates = dict(augment.candidate_words(text))
    # Stop words, punctuation, numbers, special tokens.
    for word in ("the", "'", "s", "12", "!", "[MASK]"):
        assert candidates[word] == []
    assert candidates["hearing"] == vectors.nearest("hearing", 5)
    assert len(candidates["hearing"]) == 5
    # Several pieces, and not in the table.
    assert candidates["watching"] == ["watching"]
    for word in ("film", "zzz"):
        assert 1 <= len(candidates[word]) <= 5
        assert set(candidates[word]) <= set(WHOLE)


def test_special_tokens_and_padding_columns_are_never_candidates(tokenizer):
    torch.manual_seed(0)
    wide = BertForMaskedLM(bert_config(vocab_size=len(VOCABULARY) + 9))
    with torch.no_grad():
        wide.cls.predictions.bias[: len(SPECIAL)] = 100
        wide.cls.predictions.bias[len(VOCABULARY) :] = 100
    augment = TinyBERTAugmentation(wide, tokenizer, candidates=1000)
    assert sorted(dict(augment.candidate_words("slow film"))["film"]) == sorted(WHOLE)


def test_own_table_gives_the_nearest_whole_words(model, tokenizer):
    table = model.get_input_embeddings().weight.detach().double().numpy()
    pieces = [VOCABULARY.index(piece) for piece in ("play", "##ing", "##s")]
    word = table[pieces].mean(0)
    letters = [VOCABULARY.index(token) for token in WHOLE if token.isalpha()]
    cosines = table[letters] @ word / np.linalg.norm(table[letters], axis=1)
    expected = [VOCABULARY[letters[i]] for i in np.argsort(-cosines)[:6]]
    augment = TinyBERTAugmentation(model, tokenizer, candidates=6)
    assert augment.candidate_words("playings") == [("playings", expected)]


def test_own_table_keeps_a_title_in_a_cased_vocabulary(model):
    cased = BertTokenizer(vocab={t: i for i, t in enumerate(VOCABULARY)}, do_lower_case=False)
    ((_, lower),) = TinyBERTAugmentation(model, cased).candidate_words("plotss")
    vocabulary = {t: i for i, t in enumerate(VOCABULARY)}
    vocabulary["Plot"] = vocabulary.pop("plot")
    titled = BertTokenizer(vocab=vocabulary, do_lower_case=False)
    ((_, upper),) = TinyBERTAugmentation(model, titled).candidate_words("Plotss")
    assert [word.title() for word in lower] == upper


def test_a_model_without_segments(tokenizer):
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=len(VOCABULARY), dim=16, hidden_dim=32, n_layers=1, n_heads=2
    )
    model = DistilBertForMaskedLM(config).eval()
    augment = TinyBERTAugmentation(model, tokenizer, candidates=4)
    ids = tokenizer.convert_tokens_to_ids(
        ["[CLS]", "[MASK]", "plot", "[SEP]", "slow", "plot", "[SEP]"]
    )
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, 1]
    logits[: len(SPECIAL)] = -torch.inf
    best = [VOCABULARY[i] for i in logits.argsort(descending=True)[:4]]
    expected = [token for token in best if not token.startswith("##")]
    assert augment.candidate_words("slow plot")[0] == ("slow", expected)


def test_tinybert_forward_passes_are_few_and_their_head_narrow(model, tokenizer):
    batches, widths = [], []
    hooks = [
        model.register_forward_pre_hook(
            lambda _, args, inputs: batches.append(tuple(inputs["input_ids"].shape)),
            with_kwargs=True,
        ),
        model.register_forward_hook(lambda _, args, output: widths.append(output.logits.shape)),
    ]
    text = " ".join(["film", "story", "plot", "slow", "good"] * 2)
    TinyBERTAugmentation(model, tokenizer, batch_size=8).candidate_words(text)
    for hook in hooks:
        hook.remove()
    assert batches == [(8, 23), (2, 23)]
    assert widths == [(8, len(VOCABULARY)), (2, len(VOCABULARY))]
    # The head is whole again.
    assert model(torch.tensor([[2, 6, 3]])).logits.shape == (1, 3, len(VOCABULARY))


def test_tinybert_replaces_at_the_rate_that_was_asked_for(model, tokenizer):
    text = " ".join(["film", "story", "plot", "slow", "good", "great"] * 3)
    augment = TinyBERTAugmentation(model, tokenizer, copies=300, stop_words=())
    words = augment.candidate_words(text)
    changed = trials = 0
    for copy in augment({"text": [text]})["text"][1:]:
        for (word, candidates), new in zip(words, copy.split(), strict=True):
            # What is left of the word's own share of the candidates looks like no replacement.
            share = 1 - (word in candidates) / len(candidates)
            changed += (new != word) / share
            trials += 1
    assert trials > 4000
    assert changed / trials == pytest.approx(0.4, abs=4 * math.sqrt(0.24 / trials))


def test_tinybert_pairs_change_one_text_at_a_time(model, tokenizer):
    augment = TinyBERTAugmentation(model, tokenizer, columns=("a", "b"), copies=6)
    original = ("a slow film", "The plot is good")
    output = augment({"a": [original[0]], "b": [original[1]], "label": [3]})
    found = list(zip(output["a"], output["b"], strict=True))
    assert found[0] == original
    assert len(set(found)) == len(found)
    first = [pair for pair in found[1:] if pair[1] == original[1]]
    second = [pair for pair in found[1:] if pair[0] == original[0]]
    assert found[1:] == first + second
    assert first
    assert second
    assert output["label"] == [3] * len(found)


# The BiLSTM paper's.


class PublishedBiLSTM:
    """Section 3.3 of the paper; lists of every tagged word, as the published code keeps them.

    Two of the code's rules are not in the paper: a copy that keeps none of its words is left out,
    and so is one that is there already after words are joined with spaces.
    """

    def __init__(self, corpus: list[tuple[str, ...]], mask, pos, ngram, copies):
        self.mask, self.pos, self.ngram, self.copies = mask, pos, ngram, copies
        self.words_of = defaultdict(list)
        for texts in corpus:
            for text in texts:
                words = split_words(text)
                for word, its_tag in zip(words, tag(words), strict=True):
                    self.words_of[its_tag].append(word)

    def synthesise(self, text: str, random: Random) -> str | None:
        words = split_words(text)
        new, replaced = [], 0
        for word, its_tag in zip(words, tag(words), strict=True):
            uniform = random.random()
            if uniform < self.mask:
                new.append("[MASK]")
                replaced += 1
            elif uniform < self.mask + self.pos:
                new.append(random.choice(sorted(self.words_of[its_tag])))
                replaced += 1
            else:
                new.append(word)
        if random.random() < self.ngram:
            n = random.choice((1, 2, 3, 4, 5))
            if n < len(new):
                start = random.randrange(len(new) - n + 1)
                new = new[start : start + n]
            else:
                random.randrange(1)
        return None if replaced == len(words) else " ".join(new)

    def augment(self, texts: tuple[str, ...], random: Random) -> list[tuple[str, ...]]:
        if not all(text.strip() for text in texts):
            return [texts]
        joined = tuple(" ".join(split_words(text)) for text in texts)
        seen, found = {joined}, [texts]
        for attempt in range(self.copies):
            # The first sentence only, the second only, and both.
            sides = [[0]] if len(texts) == 1 else [[0], [1], [0, 1]]
            sides = sides[attempt % len(sides)]
            new = {side: self.synthesise(texts[side], random) for side in sides}
            if None in new.values():
                continue
            key = tuple(new.get(side, text) for side, text in enumerate(joined))
            if key not in seen:
                seen.add(key)
                found.append(tuple(new.get(side, text) for side, text in enumerate(texts)))
        return found


@pytest.mark.parametrize("columns", [("a",), ("a", "b")])
@pytest.mark.parametrize("probabilities", [(0.1, 0.1, 0.25), (0.4, 0.5, 0.7), (0, 1, 0)])
def test_bilstm_is_what_was_published(columns, probabilities):
    table = pairs()
    corpus = [tuple(row[name] for name in columns) for row in table]
    published = PublishedBiLSTM(corpus, *probabilities, copies=20)
    mask, pos, ngram = probabilities
    augment = BiLSTMAugmentation(
        tag,
        columns=columns,
        mask_probability=mask,
        pos_probability=pos,
        ngram_probability=ngram,
        seed=3,
    ).fit(table)
    expected = [
        copy for texts in corpus for copy in published.augment(texts, augment._random(texts))
    ]
    output = augment(columns_of(table))
    assert list(zip(*(output[name] for name in columns), strict=True)) == expected
    # With no word kept there is no copy.
    assert (len(expected) > 2 * len(table)) == (probabilities != (0, 1, 0))


def test_bilstm_defaults_are_the_papers():
    augment = BiLSTMAugmentation(tag)
    probabilities = (augment.mask_probability, augment.pos_probability, augment.ngram_probability)
    assert probabilities == (0.1, 0.1, 0.25)
    assert augment.ngram_sizes == (1, 2, 3, 4, 5)
    assert augment.copies == 20


def test_bilstm_rates_and_the_distribution_of_words():
    vocabulary = {"x": {"one": 1, "two": 2, "seven": 7}, "y": {"other": 1}}
    words = [f"w{i}" for i in range(50)]
    augment = BiLSTMAugmentation(
        lambda words: ["x"] * len(words), vocabulary, ngram_probability=0, copies=400
    )
    copies = augment({"text": [" ".join(words)]})["text"][1:]
    counts = Counter(word for copy in copies for word in copy.split())
    total = sum(counts.values())
    assert total == 50 * 400

    def expect(count: int, share: float, of: int = total) -> None:
        assert count / of == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / of))

    expect(counts["[MASK]"], 0.1)
    drawn = [counts[word] for word in ("one", "two", "seven")]
    expect(sum(drawn), 0.1)
    for count, share in zip(drawn, (0.1, 0.2, 0.7), strict=True):
        expect(count, share, sum(drawn))
    assert counts["other"] == 0


def test_ngrams_are_windows_of_every_size_and_place():
    words = [f"w{i}" for i in range(7)]
    augment = BiLSTMAugmentation(
        pos_probability=0, mask_probability=0, ngram_probability=1, copies=2000
    )
    copies = augment({"text": [" ".join(words)]})["text"][1:]
    windows = {" ".join(words[i : i + n]) for n in range(1, 6) for i in range(8 - n)}
    assert set(copies) == windows


def test_an_ngram_longer_than_the_text_keeps_it_whole():
    augment = BiLSTMAugmentation(
        pos_probability=0, mask_probability=0.5, ngram_probability=1, ngram_sizes=[3], copies=50
    )
    assert set(augment({"text": ["a b c"]})["text"][1:]) == {
        " ".join(words)
        for words in np.stack(np.meshgrid(*(["[MASK]", w] for w in "abc")), -1).reshape(-1, 3)
        if 0 < sum(word == "[MASK]" for word in words) < 3
    }


def test_words_of_a_tag_that_the_corpus_never_had_stay():
    augment = BiLSTMAugmentation(
        tag, {"q": {"q": 1}}, mask_probability=0, pos_probability=0.5, ngram_probability=0
    )
    assert augment({"text": ["some film"]})["text"] == ["some film"]


def test_vocabulary_that_fit_counted_can_be_given():
    fitted = BiLSTMAugmentation(tag).fit(rows())
    streamed = BiLSTMAugmentation(tag).fit(Dataset.from_list(rows()[::-1]).to_iterable_dataset())
    given = BiLSTMAugmentation(tag, fitted.vocabulary)
    batch = columns_of(rows())
    assert fitted(batch) == streamed(batch) == given(batch)
    assert len(fitted(batch)["text"]) > 300
    assert fitted.vocabulary["e"]["the"] == sum(
        split_words(row["text"]).count("the") for row in rows()
    )


# What both do.


@pytest.fixture(params=["tinybert", "bilstm"])
def augment(request, model, tokenizer):
    if request.param == "tinybert":
        return TinyBERTAugmentation(model, tokenizer, copies=5, seed=9)
    return BiLSTMAugmentation(tag, copies=5, seed=9).fit(rows())


def test_copies_do_not_depend_on_batches_processes_or_streaming(augment):
    table = Dataset.from_list(rows())
    expected = augment(table[:])
    assert expected["text"][0] == rows()[0]["text"]
    assert len(expected["text"]) > 3 * len(table)
    # A parent whose threads have run: its forked workers must not start threads of their own.
    torch.set_num_threads(2)
    torch.nn.functional.gelu(torch.ones(1000, 1000))
    for options in ({"batch_size": 1}, {"batch_size": 7}, {"num_proc": 2, "batch_size": 4}):
        mapped = table.map(augment, batched=True, load_from_cache_file=False, **options)
        assert mapped[:] == expected
    streamed = table.to_iterable_dataset().map(augment, batched=True, batch_size=8)
    assert columns_of(list(streamed)) == expected
    torch.set_num_threads(1)


def test_copies_follow_their_row_and_carry_its_columns(augment):
    output = augment(columns_of(rows()))
    assert output["weight"] == [label / 2 for label in output["label"]]
    assert output["label"] == sorted(output["label"])
    for row in rows():
        texts = [
            text
            for text, label in zip(output["text"], output["label"], strict=True)
            if label == row["label"]
        ]
        assert texts[0] == row["text"]
        assert len(set(texts)) == len(texts) <= 6


def test_copies_depend_on_the_row_and_the_seed_alone(augment):
    batch = columns_of(rows())
    expected = augment(batch)
    backwards = augment({name: values[::-1] for name, values in batch.items()})
    order = np.argsort(backwards["label"], kind="stable")
    assert [backwards["text"][i] for i in order] == expected["text"]
    augment.seed = 10
    try:
        assert augment(batch)["text"] != expected["text"]
    finally:
        augment.seed = 9


def test_a_second_text_makes_other_copies_of_the_first(tokenizer, model):
    augment = TinyBERTAugmentation(model, tokenizer, columns=("a", "b"))
    one, two = (set(augment({"a": [SENTENCES[0]], "b": [other]})["a"]) for other in ("good", "bad"))
    assert one != two


def test_datasets_knows_an_augmentation_again(augment):
    before = Hasher.hash(augment)
    augment(columns_of(rows(3)))
    assert Hasher.hash(augment) == before


def test_empty_texts_have_no_copies(augment):
    assert augment({"text": ["", " "], "label": [1, 2]})["text"][:2] == ["", " "][:2]
    assert augment({"text": [""], "label": [1]}) == {"text": [""], "label": [1]}
    assert augment({"text": [], "label": []}) == {"text": [], "label": []}


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"sentence": ["x"]}, ValueError, "of those that there are (sentence), got 'text'"),
        ({"text": "a row"}, TypeError, "call map with batched=True"),
        ({"text": ["x", None]}, TypeError, "column 'text' must hold text, got NoneType (None)"),
    ],
)
def test_batches_that_do_not_fit(augment, batch, error, message):
    with pytest.raises(error, match=re.escape(message)):
        augment(batch)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"replace_probability": 1.5}, ValueError, "replace_probability must be at least 0 and"),
        ({"candidates": 0}, ValueError, "candidates must be at least 1, got 0"),
        ({"copies": 2.0}, TypeError, "copies must be a whole number, got float"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"stop_words": "the"}, TypeError, "stop_words must be a collection of words, got 'the'"),
        ({"embeddings": 3}, TypeError, "embeddings must be a WordVectors, a path or None, got int"),
        ({"columns": ("a", "a")}, ValueError, "columns must be one name or two different ones"),
        ({"columns": ()}, ValueError, "columns must be one name or two different ones, got ()"),
        ({"seed": -1}, ValueError, "seed must be a whole number at least 0, got -1"),
    ],
)
def test_tinybert_bad_options(model, tokenizer, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        TinyBERTAugmentation(model, tokenizer, **options)


def test_tinybert_models_and_tokenizers_that_do_not_fit(model, tokenizer):
    from tokenizers import Tokenizer, models

    classifier = BertForSequenceClassification(bert_config())
    with pytest.raises(ValueError, match="masked language model, got BertForSequenceClassific"):
        TinyBERTAugmentation(classifier, tokenizer)
    small = BertForMaskedLM(bert_config(vocab_size=20))
    with pytest.raises(ValueError, match=f"tokenizer's {len(VOCABULARY)} embeddings, got 20"):
        TinyBERTAugmentation(small, tokenizer)
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(ValueError, match="must be a fast WordPiece tokenizer"):
        TinyBERTAugmentation(model, other)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "pos_probability is 0.1 and there is no tagger: pass tagger, or"),
        ({"mask_probability": -0.1}, ValueError, "mask_probability must be at least 0"),
        (
            {"tagger": tag, "mask_probability": 0.6, "pos_probability": 0.6},
            ValueError,
            "must add up to at most 1, got 0.6 and 0.6",
        ),
        ({"tagger": tag, "ngram_sizes": ()}, ValueError, "ngram_sizes must have at least one"),
        ({"tagger": tag, "ngram_sizes": (0,)}, ValueError, "ngram_sizes must be at least 1, got 0"),
        (
            {"tagger": tag, "vocabulary": {"x": {"word": 0}}},
            ValueError,
            "vocabulary['x']['word'] must be at least 1, got 0",
        ),
    ],
)
def test_bilstm_bad_options(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        BiLSTMAugmentation(**options)


def test_bilstm_taggers_and_data_that_do_not_fit():
    with pytest.raises(ValueError, match="call fit"):
        BiLSTMAugmentation(tag)({"text": ["a film"]})
    with pytest.raises(ValueError, match="fit needs a tagger, got none"):
        BiLSTMAugmentation(pos_probability=0).fit(rows())
    with pytest.raises(ValueError, match="dataset must have words, got none"):
        BiLSTMAugmentation(tag).fit([{"text": ""}])
    with pytest.raises(ValueError, match="got 'text'"):
        BiLSTMAugmentation(tag).fit([{"sentence": ""}])
    short = BiLSTMAugmentation(lambda words: words[1:])
    with pytest.raises(ValueError, match=r"tagger must return 2 tags for \['a', 'film'\]"):
        short.fit([{"text": "a film"}])


# Tables of word vectors.


def test_nearest_words_by_cosine():
    random = np.random.default_rng(0)
    words = [f"w{i}" for i in range(200)]
    vectors = random.normal(size=(200, 16)) * random.exponential(size=(200, 1))
    table = WordVectors(words, vectors)
    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for i in (0, 57, 199):
        cosines = directions @ directions[i]
        expected = [words[j] for j in np.argsort(-cosines) if j != i]
        for count in (1, 15, 199, 500):
            assert table.nearest(words[i], count) == expected[:count]
    assert table.nearest("unknown", 3) == []
    assert WordVectors(["one"], [[1.0]]).nearest("one", 3) == []


def test_a_file_of_word_vectors(tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_text(
        "the 1 0\n"
        "<unk> 5 5\n"
        "film 0.5 0.5e0 \n"
        "at name@domain.com 0 2\n"
        "film 9 9\r\n"
        "zero 0 0\n"
        "caf\u00e9 -1 0.25\n",
        encoding="utf-8",
    )
    table = WordVectors.load(path)
    assert table.words == ["the", "film", "at name@domain.com", "café"]
    expected = WordVectors(table.words, [[1, 0], [0.5, 0.5], [0, 2], [-1, 0.25]])
    assert np.array_equal(table._directions, expected._directions)
    assert table._directions.dtype == np.float32
    assert WordVectors.load(path, limit=3).words == ["the", "film"]
    path.write_text("2 3\nthe 1 0 0\nfilm 0 1 0\n")
    assert WordVectors.load(path, limit=1).words == ["the"]
    assert len(WordVectors.load(path)) == 2
    assert "film" in WordVectors.load(path)


def test_some_words_of_a_file(tmp_path):
    path = tmp_path / "vectors.txt"
    # Numbers that nobody asked for are not looked at.
    path.write_text("the 3 4\nplay 1 two\nat a.com 0 2\nzero 0 0\nfilm 5 12\nfilm 9 9\n")
    words, vectors = read_vectors(path, only={"film", "at a.com", "zero", "absent"})
    assert words == ["at a.com", "zero", "film"]
    # As they stand there: an embedding is no direction.
    assert vectors.tolist() == [[0, 2], [0, 0], [5, 12]]
    assert vectors.dtype == np.float32
    assert read_vectors(path, only={"absent"})[0] == []
    with pytest.raises(ValueError, match="line 2: expected 2 numbers, got 'two'"):
        read_vectors(path, only={"play"})
    path.write_text("the 3 4\nfilm 1\n")
    with pytest.raises(ValueError, match="line 2: expected a word and 2 numbers, got 1 numbers"):
        read_vectors(path, only={"film"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no word vectors"),
        (b"3 2\n", "holds no word vectors"),
        (b"the 1 2\nfilm 1\n", "line 2: expected a word and 2 numbers, got 1 numbers"),
        (b"the 1 2\nfilm 1 2 3\n", "line 2: expected a word and 2 numbers, got 3 numbers"),
        (b"the 1 2\n\nfilm 1 2\n", "line 2: expected a word and 2 numbers, got 0 numbers"),
        (b"the\n", "line 1: expected a word and at least 1 numbers, got 0 numbers"),
        (b"the 1 2\nfilm 1 two\n", "line 2: expected 2 numbers, got 'two'"),
        (b"the 1 nan\n", "line 1: expected finite numbers"),
        (b"the 1 1e99\n", "line 1: expected finite numbers"),
        (b"the 1 2\n\xff\xfe 1 2\n", "is not UTF-8 text"),
    ],
)
def test_files_that_are_no_word_vectors(tmp_path, content, message):
    path = tmp_path / "vectors.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        WordVectors.load(path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "vectors", "message"),
    [
        (["a", "b"], [[1.0]], "vectors must be [2, dimension], one for each word, got [1, 1]"),
        (["a"], [[math.inf]], "vectors must be finite"),
        (["a", "a"], [[1.0], [2.0]], "words must all be different"),
    ],
)
def test_words_and_vectors_that_do_not_fit(words, vectors, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        WordVectors(words, vectors)


# The command.


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    BertForSequenceClassification(bert_config()).save_pretrained(folder / "classifier")
    make_tokenizer().save_pretrained(folder / "classifier")
    bert_config().save_pretrained(folder / "no-tokenizer")
    for name, table in (("rows", rows()), ("pairs", pairs()), ("many", rows(600))):
        lines = "".join(json.dumps(row) + "\n" for row in table)
        (folder / f"{name}.jsonl").write_text(lines)
    Dataset.from_list(rows()).to_csv(folder / "rows.csv")
    Dataset.from_list(rows()).to_parquet(folder / "rows.parquet")
    typed = Dataset.from_list(rows(3)).add_column("when", [datetime(2020, 1, i) for i in (1, 2, 3)])
    typed = typed.add_column("tags", [["a"], [], None]).cast_column("weight", Value("float32"))
    typed = typed.add_column("class", [0, 1, 0]).cast_column("class", ClassLabel(names=["x", "y"]))
    typed.to_parquet(folder / "typed.parquet")
    (folder / "rows.txt").write_text("\n\n".join(row["text"] for row in rows()))
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text("{")
    (folder / "numbers.jsonl").write_text('{"text": 3}\n')
    # Read in blocks of 10000 rows, each with types of its own.
    (folder / "mixed.csv").write_text("text,x\n" + "film,1\n" * 10_000 + "film,1.5\n")
    for value in ("null", "2", '"two"'):
        (folder / f"{value[-1]}.jsonl").write_text(f'{{"text": "a film", "x": {value}}}\n')
    (folder / "vectors.txt").write_text("the 1 0\nfilm\n")
    (folder / "taggers.py").write_text(TAGGERS)
    return folder


TAGGERS = """
import multiprocessing
import os
import signal
import time

calls = 0
number = 3


def tag(words):
    return [word[-1].lower() for word in words]


def killed(words):
    # In the second pass, when a part of the output is on the disk.
    global calls
    calls += 1
    if calls == 600 + 560:
        os.kill(os.getpid(), signal.SIGKILL)
    return tag(words)


def kills_its_parent(words):
    if multiprocessing.parent_process() is not None:
        with open("worker", "w") as file:
            file.write(str(os.getpid()))
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    return tag(words)
"""


@pytest.fixture
def command(assets, tmp_path, monkeypatch):
    """Runs `kdfast augment` in this process beside taggers.py; keywords replace flags."""
    monkeypatch.chdir(assets)
    monkeypatch.delitem(sys.modules, "taggers", raising=False)

    def run(*files: str, **changes: object) -> int:
        return cli.main(["augment", *argv(assets, tmp_path, *files, **changes)])

    return run


def argv(assets: Path, folder: Path, *files: str, **changes: object) -> list[str]:
    settings = {"method": "bilstm", "output": folder / "out.jsonl", **changes}
    if settings["method"] == "bilstm":
        settings = {"tagger": "taggers:tag", **settings}
    elif settings["method"] == "tinybert":
        settings = {"model": assets / "model", **settings}
    flags = []
    for name, value in settings.items():
        if value is not None and value is not False:
            flags.append(f"--{name.replace('_', '-')}")
            flags += [] if value is True else map(str, value if type(value) is list else [value])
    return [*(str(assets / file) for file in files), *flags]


def read(path: Path) -> list[dict[str, object]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_command_writes_what_the_augmentation_says(command, model, tokenizer, tmp_path, capfd):
    expected = BiLSTMAugmentation(lambda words: [word[-1].lower() for word in words])
    expected = expected.fit(rows())(columns_of(rows()))
    assert command("rows.jsonl") == 0
    assert columns_of(read(tmp_path / "out.jsonl")) == expected
    count = len(expected["text"])
    assert capfd.readouterr().out == f"{count} rows in {tmp_path / 'out.jsonl'}\n"

    options = {"copies": 4, "candidates": 7, "replace_probability": 0.7, "seed": 5}
    expected = TinyBERTAugmentation(model, tokenizer, columns=("a", "b"), **options)
    flags = {"method": "tinybert", "text_column": ["a", "b"], "device": "cpu"}
    assert command("pairs.jsonl", **flags, **options, output=tmp_path / "pairs.parquet") == 0
    assert columns_of(read(tmp_path / "pairs.parquet")) == expected(columns_of(pairs()))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "out.jsonl",
        "pairs.parquet",
    ]


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.txt"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_command_reads_and_writes_every_kind_of_file(command, tmp_path, name, suffix):
    for file, output in (("rows.jsonl", "expected"), (name, "result")):
        assert command(file, output=tmp_path / f"{output}.{suffix}", copies=3) == 0
    expected, result = (read(tmp_path / f"{each}.{suffix}") for each in ("expected", "result"))
    if name == "rows.txt":
        expected = [{"text": row["text"]} for row in expected]
    assert result == expected


def test_command_with_several_processes_and_files(command, tmp_path):
    files = ("many.jsonl", "rows.parquet")
    for processes in (1, 2):
        output = tmp_path / f"{processes}.jsonl"
        assert command(*files, num_proc=processes, output=output, copies=2) == 0
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()
    assert len(read(tmp_path / "1.jsonl")) > 1300


def test_command_takes_a_columns_type_from_all_files(command, tmp_path):
    output = tmp_path / "out.parquet"
    assert command("l.jsonl", "2.jsonl", output=output, copies=1) == 0
    assert {row["x"] for row in read(output)} == {None, 2}


def test_command_keeps_the_types_of_a_parquet_file(command, assets, tmp_path):
    output = tmp_path / "out.parquet"
    assert command("typed.parquet", output=output) == 0
    source, result = (pq.read_table(path) for path in (assets / "typed.parquet", output))
    assert result.schema.equals(source.schema)
    rows_of = {row["label"]: row for row in source.to_pylist()}
    for row in result.to_pylist():
        assert {**rows_of[row["label"]], "text": row["text"]} == row


def test_command_leaves_duplicates_out_when_asked(command, tmp_path):
    options = {"pos_probability": 0, "tagger": None, "ngram_probability": 0.9}
    # The second file's rows are there already, and stay; their copies do not.
    files = ("rows.jsonl", "rows.jsonl")
    assert command(*files, **options) == 0
    everything = read(tmp_path / "out.jsonl")
    assert command(*files, **options, deduplicate=True, output=tmp_path / "d.jsonl") == 0
    expected, seen, last = [], set(), None
    for row in everything:
        if row["label"] != last or row["text"] not in seen:
            expected.append(row)
        seen.add(row["text"])
        last = row["label"]
    assert read(tmp_path / "d.jsonl") == expected
    assert expected[-30:] == rows()
    assert len(expected) < len(everything) / 2 + 30


@pytest.mark.parametrize(
    ("files", "changes", "message"),
    [
        (["none.jsonl"], {}, "none.jsonl does not exist"),
        (["model"], {}, "model is not a file"),
        (["taggers.py"], {}, "taggers.py must end in one of .txt, .json"),
        (["empty.jsonl"], {}, "empty.jsonl"),
        (["broken.jsonl"], {}, "cannot read "),
        (["numbers.jsonl"], {}, "column 'text' must hold text, got int (3)"),
        (["rows.jsonl"], {"text_column": "body"}, "has no column 'body', it has text, label, we"),
        (["rows.jsonl"], {"text_column": ["text", "text"]}, "two different ones"),
        (["rows.jsonl", "pairs.jsonl"], {}, "pairs.jsonl has the columns a, b, label and"),
        (["rows.jsonl"], {"output": "out.csv"}, "out.csv must end in one of .jsonl, .parquet"),
        (["rows.jsonl"], {"output": "rows.jsonl"}, "rows.jsonl exists already"),
        (["rows.jsonl"], {"output": "no/out.jsonl"}, "no is not a directory"),
        (["mixed.csv"], {"output": "mixed.parquet", "copies": 1}, "write .jsonl"),
        (["typed.parquet"], {}, "datetime is not JSON serializable: write .parquet"),
        (["2.jsonl", '".jsonl'], {}, '".jsonl does not fit the files before it: '),
        (["rows.jsonl"], {"method": "eda"}, "argument --method: invalid choice: 'eda'"),
        (["rows.jsonl"], {"copies": 0}, "--copies: must be a whole number at least 1, got '0'"),
        (["rows.jsonl"], {"tagger": None}, "pass --tagger MODULE:FUNCTION, or --pos-probability"),
        (["rows.jsonl"], {"tagger": "taggers"}, "--tagger taggers must be MODULE:FUNCTION"),
        (["rows.jsonl"], {"tagger": "nowhere:tag"}, "--tagger nowhere:tag: No module named"),
        (["rows.jsonl"], {"tagger": "taggers:no"}, "--tagger taggers:no: module 'taggers' has no"),
        (["rows.jsonl"], {"tagger": "taggers:number"}, "taggers:number is not a function"),
        (["rows.jsonl"], {"model": "model"}, "--model goes with --method tinybert alone"),
        (["rows.jsonl"], {"mask_probability": 0.95}, "must add up to at most 1, got 0.95 and 0.1"),
        (
            ["rows.jsonl"],
            {"method": "tinybert", "tagger": "taggers:tag"},
            "--tagger goes with --method bilstm alone",
        ),
        (["rows.jsonl"], {"method": "tinybert", "model": None}, "tinybert needs --model"),
        (
            ["rows.jsonl"],
            {"method": "tinybert", "model": "rows.csv"},
            "--model rows.csv is not a directory with a config.json",
        ),
        (
            ["rows.jsonl"],
            {"method": "tinybert", "model": "no-tokenizer"},
            "--model no-tokenizer holds no tokenizer",
        ),
        (
            ["rows.jsonl"],
            {"method": "tinybert", "model": "classifier"},
            "the model in classifier has no weights for cls.",
        ),
        (
            ["rows.jsonl"],
            {"method": "tinybert", "embeddings": "none.txt"},
            "--embeddings none.txt is not a file",
        ),
        (
            ["rows.jsonl"],
            {"method": "tinybert", "embeddings": "vectors.txt"},
            "vectors.txt, line 2: expected a word and 2 numbers, got 0 numbers",
        ),
    ],
)
def test_command_errors_are_one_line(command, assets, tmp_path, capfd, files, changes, message):
    before = sorted(path.name for path in assets.iterdir())
    assert command(*files, **changes) == 2
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1, output.err
    assert output.err.startswith("kdfast: error: ")
    assert message in output.err
    assert not (tmp_path / "out.jsonl").exists()
    left = {path.name for path in assets.iterdir()} - {"__pycache__"}
    assert left == set(before) - {"__pycache__"}


def test_command_says_that_the_disk_is_full(command, tmp_path, capfd, monkeypatch):
    write = cli_augment._JsonLines.write

    def full(self, batch):
        write(self, batch)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli_augment._JsonLines, "write", full)
    assert command("rows.jsonl") == 2
    message = f"kdfast: error: cannot write {tmp_path / 'out.jsonl'}: No space left on device\n"
    assert capfd.readouterr().err == message
    assert not list(tmp_path.glob("out*"))


def run_alone(assets: Path, tmp_path: Path, **changes: object) -> int:
    flags = argv(assets, tmp_path, "many.jsonl", **changes)
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    return subprocess.run(
        [sys.executable, "-m", "kdfast.cli", "augment", *flags],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(assets)},
        stderr=subprocess.DEVNULL,
        timeout=120,
        check=False,
    ).returncode


def test_a_killed_command_leaves_nothing_under_the_final_name(command, assets, tmp_path):
    assert run_alone(assets, tmp_path, tagger="taggers:killed") == -signal.SIGKILL
    assert (tmp_path / "out.jsonl.tmp").stat().st_size > 10_000
    assert not (tmp_path / "out.jsonl").exists()
    # The next run is not disturbed by what is left.
    assert command("many.jsonl") == 0
    assert len({row["label"] for row in read(tmp_path / "out.jsonl")}) == 600
    assert not (tmp_path / "out.jsonl.tmp").exists()


def test_a_killed_commands_processes_end(assets, tmp_path):
    status = run_alone(assets, tmp_path, tagger="taggers:kills_its_parent", num_proc=2)
    assert status == -signal.SIGKILL
    assert not (tmp_path / "out.jsonl").exists()
    worker = int((tmp_path / "worker").read_text())
    for _ in range(200):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        state = Path(f"/proc/{worker}/stat")
        if state.exists() and state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived the command")
