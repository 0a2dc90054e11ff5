"""TinyBERT's augmentation: words that a masked language model or an embedding table suggests."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdfast.ops.arguments import check_count, check_number
from kdfast.trainer.augmentation.rows import Augmentation, Texts
from kdfast.trainer.augmentation.word_vectors import WordVectors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The source's list, which has no question words. Its entries with an apostrophe are left out: a
# word that is not all letters is never replaced anyway.
_STOP_WORDS = """
a about above after again against ain all am an and any are aren as at be because been before being
below between both but by can couldn d did didn do does doesn doing don down during each few for
from further had hadn has hasn have haven having he her here hers herself him himself his i if in
into is isn it its itself just ll m ma me mightn more most mustn my myself needn no nor not now o of
off on once only or other our ours ourselves out over own re s same shan she should shouldn so some
such t than that the their theirs them themselves then there these they this those through to too
under until up ve very was wasn we were weren while will with won wouldn y you your yours yourself
yourselves
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())


class TinyBERTAugmentation(Augmentation):
    """Copies of a text in which each word is replaced with `replace_probability`.

    Jiao et al. 2020, "TinyBERT: Distilling BERT for Natural Language Understanding", algorithm 1,
    as `data_augmentation.py` of huawei-noah/Pretrained-Language-Model has it. A word that is one
    piece is replaced by one of the `candidates` most probable pieces in its place, of which those
    that continue a word are dropped: the model reads `[CLS] text with a mask [SEP] text [SEP]`. A
    word of several pieces is replaced by one of its nearest neighbours in an embedding table. Stop
    words and what is not all letters a to z stays. Of a pair the copies of the first text come
    with the original second text, and then the other way round.

    Args:
        model: a masked language model; it is put into eval mode, and runs on its device.
        tokenizer: the model's, a WordPiece one such as BERT's. Its words, lower-cased if it does
            so, are those of the copies, with spaces between.
        columns: the column with the text, or the two with a pair.
        replace_probability: of each word in each copy.
        candidates: words to choose from, for each word.
        copies: attempts per text; those that are there already are left out. The paper has 20; the
            code 30 for CoLA, MRPC, RTE and STS-B, 20 for SST-2 and QNLI, 10 for MNLI and QQP.
        embeddings: a `WordVectors` or the path of a GloVe text file, the source's choice. None
            takes the model's own input embeddings: a word is the mean of its pieces there, and its
            neighbours are the vocabulary's whole words.
        stop_words: what is never replaced, in lower case.
        batch_size: masked copies of a text per forward pass.
        seed: a row's copies depend on it and on the row's texts.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Example:
        >>> augment = TinyBERTAugmentation(model, tokenizer, embeddings="glove.6B.300d.txt")
        >>> dataset = dataset.map(augment, batched=True)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        columns: str | Sequence[str] = "text",
        replace_probability: float = 0.4,
        candidates: int = 15,
        copies: int = 20,
        embeddings: WordVectors | str | Path | None = None,
        stop_words: Collection[str] = STOP_WORDS,
        batch_size: int = 32,
        seed: int = 42,
    ) -> None:
        super().__init__(columns, copies, seed)
        check_number("replace_probability", replace_probability, 0, 1)
        check_count("candidates", candidates)
        check_count("batch_size", batch_size)
        if isinstance(stop_words, str):
            raise TypeError(f"stop_words must be a collection of words, got {stop_words!r}")
        _check_word_piece(tokenizer)
        _check_masked_model(model, tokenizer)
        if isinstance(embeddings, (str, Path)):
            embeddings = WordVectors.load(embeddings)
        elif not isinstance(embeddings, (WordVectors, type(None))):
            raise TypeError(
                f"embeddings must be a WordVectors, a path or None, got {type(embeddings).__name__}"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.replace_probability = replace_probability
        self.candidates = candidates
        self.embeddings = embeddings
        # Unlike a frozenset's, a set's order does not change what `datasets` keys its cache with.
        self.stop_words = set(stop_words)
        self.batch_size = batch_size
        self._takes_segments = "token_type_ids" in inspect.signature(model.forward).parameters
        self._limit = min(
            getattr(model.config, "max_position_embeddings", sys.maxsize),
            tokenizer.model_max_length,
        )
        self._find_words()

    def _find_words(self) -> None:
        tokenizer = self.tokenizer
        prefix = tokenizer.backend_tokenizer.model.continuing_subword_prefix
        special = set(tokenizer.all_special_ids)
        self._words = {
            row: token
            for token, row in tokenizer.get_vocab().items()
            if row not in special and not token.startswith(prefix)
        }
        width = self.model.get_output_embeddings().weight.shape[0]
        known = set(tokenizer.get_vocab().values()) - special
        # Special tokens and padding columns are no candidates.
        self._never = torch.tensor(sorted(set(range(width)) - known), dtype=torch.int64)
        self._most = min(self.candidates, width - len(self._never))
        # Rows of the model's own table that stand for whole words, and their vectors' lengths.
        self._whole = torch.tensor([i for i, word in self._words.items() if word.isalpha()])
        if self.embeddings is None:
            if len(self._whole) == 0:
                raise ValueError("tokenizer must have whole words of letters, got none")
            table = self.model.get_input_embeddings().weight.detach().float()
            self._lengths = table.norm(dim=1).cpu()[self._whole].clamp_min(1e-12)

    def candidate_words(self, text: str) -> list[tuple[str, list[str]]]:
        """The words of a text, and for each what may stand in its place, the likeliest first.

        Args:
            text: one text; of a pair each is on its own.

        Returns:
            As many entries as the text has words. A word that is never replaced has no candidates;
            one that nothing was found for has itself.

        Example:
            >>> augment.candidate_words("a gripping film")
        """
        words = self._split(text)
        pieces = [piece for _, word_pieces in words for piece in word_pieces]
        found: list[list[str]] = [[] for _ in words]
        masked: dict[int, int] = {}
        start = 1
        for i, (word, word_pieces) in enumerate(words):
            if re.fullmatch("[a-z]+", word.lower()) and word.lower() not in self.stop_words:
                found[i] = [word]
                if len(word_pieces) > 1:
                    found[i] = self._neighbours(word, word_pieces) or [word]
                elif start < self._limit:
                    masked[i] = start
            start += len(word_pieces)
        if masked:
            suggested = self._predict(pieces, list(masked.values()))
            for i, suggestions in zip(masked, suggested, strict=True):
                found[i] = suggestions or found[i]
        return [(word, candidates) for (word, _), candidates in zip(words, found, strict=True)]

    def _copies(self, texts: Texts, random: Random) -> list[Texts]:
        copies = []
        for side, text in enumerate(texts):
            for new in self._copies_of(text, random):
                copies.append((*texts[:side], new, *texts[side + 1 :]))
        return copies

    def _copies_of(self, text: str, random: Random) -> list[str]:
        words = self.candidate_words(text)
        # Sorted: a choice among them is uniform anyway, and must not hang on how two nearly equal
        # scores were rounded.
        words = [(word, sorted(candidates)) for word, candidates in words]
        seen, copies = {text}, []
        for _ in range(self.copies):
            new = []
            for word, candidates in words:
                if candidates:
                    candidate = random.choice(candidates)
                    if random.random() < self.replace_probability:
                        word = candidate
                new.append(word)
            copy = " ".join(new)
            if copy not in seen:
                seen.add(copy)
                copies.append(copy)
        return copies

    def _split(self, text: str) -> list[tuple[str, list[int]]]:
        """Words as BERT's BasicTokenizer splits them, and the ids of their pieces."""
        backend = self.tokenizer.backend_tokenizer
        special = self.tokenizer.all_special_tokens
        words = []
        for part in re.split(f"({'|'.join(map(re.escape, special))})", text):
            if part in special:
                words.append((part, [self.tokenizer.convert_tokens_to_ids(part)]))
                continue
            normalised = backend.normalizer.normalize_str(part) if backend.normalizer else part
            for word, _ in backend.pre_tokenizer.pre_tokenize_str(normalised):
                words.append((word, [piece.id for piece in backend.model.tokenize(word)]))
        return words

    def _predict(self, pieces: list[int], positions: list[int]) -> list[list[str]]:
        """For each masked position the most probable pieces that begin a word."""
        tokenizer, device = self.tokenizer, self.model.device
        cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        row = torch.tensor([cls, *pieces, sep, *pieces, sep][: self._limit])
        # The masked text and its separator are the first segment.
        segments = (torch.arange(len(row)) >= len(pieces) + 2).long()
        found: list[list[str]] = []
        with torch.inference_mode(), _one_thread_in_workers():
            for chunk in torch.tensor(positions).split(self.batch_size):
                rows = torch.arange(len(chunk))
                batch = row.repeat(len(chunk), 1)
                batch[rows, chunk] = tokenizer.mask_token_id
                inputs = {"input_ids": batch}
                if self._takes_segments:
                    inputs["token_type_ids"] = segments.expand_as(batch)
                inputs = {name: value.to(device) for name, value in inputs.items()}
                with self._head_at(rows, chunk):
                    logits = self.model(**inputs).logits.float()
                logits[:, self._never.to(device)] = -torch.inf
                best = logits.topk(self._most).indices.tolist()
                found += [[self._words[i] for i in ids if i in self._words] for ids in best]
        return found

    @contextmanager
    def _head_at(self, rows: Tensor, positions: Tensor) -> Iterator[None]:
        """Logits `[masks, V]` of the masks alone: a head over all positions would take longer."""
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][rows, positions],))
        try:
            yield
        finally:
            hook.remove()

    def _neighbours(self, word: str, pieces: list[int]) -> list[str]:
        if self.embeddings is not None:
            words = self.embeddings.nearest(word, self.candidates)
        else:
            table = self.model.get_input_embeddings().weight
            with torch.inference_mode(), _one_thread_in_workers():
                # The cosines, up to the length of the word's own vector.
                scores = (table @ table[pieces].mean(0)).float().cpu()[self._whole] / self._lengths
                best = scores.topk(min(self.candidates, len(scores))).indices
            words = [self._words[i] for i in self._whole[best].tolist()]
        return [near.title() for near in words] if word.istitle() else words


def _check_word_piece(tokenizer: PreTrainedTokenizerBase) -> None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kind = type(getattr(backend, "model", None)).__name__
    if kind != "WordPiece":
        raise ValueError(
            "tokenizer must be a fast WordPiece tokenizer such as BERT's: pieces that continue a "
            f"word are told by their prefix; got {type(tokenizer).__name__} ({kind})"
        )
    for name in ("cls_token", "sep_token", "mask_token"):
        if getattr(tokenizer, name) is None:
            raise ValueError(f"tokenizer must have a {name}, got none")


def _check_masked_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    masked = set(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
    if masked.isdisjoint(kind.__name__ for kind in type(model).__mro__):
        raise ValueError(f"model must be a masked language model, got {type(model).__name__}")
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"model must name its output embeddings, and {type(model).__name__} does not"
        )
    needed = max(tokenizer.get_vocab().values()) + 1
    have = min(
        model.get_input_embeddings().weight.shape[0], model.get_output_embeddings().weight.shape[0]
    )
    if needed > have:
        raise ValueError(f"model must have the tokenizer's {needed} embeddings, got {have}")


@contextmanager
def _one_thread_in_workers() -> Iterator[None]:
    """In a process of a pool, torch computes on one thread.

    The pool has the other cores, and a forked process whose parent has run OpenMP's threads hangs
    when it starts its own. `datasets` forks with a module of its own, multiprocess.
    """
    modules = (sys.modules.get(name) for name in ("multiprocessing", "multiprocess"))
    if all(module is None or module.parent_process() is None for module in modules):
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
