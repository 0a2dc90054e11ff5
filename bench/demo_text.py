"""The text of both demos: what Python's own library says, and tokenizers trained on it."""

import ast
import random
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.implementations import BertWordPieceTokenizer
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
BERT_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (ast.Module, ast.ClassDef, *FUNCTIONS)


class Module(NamedTuple):
    """A file of the library: the package that it is in or is itself, its text, and its tree."""

    package: str
    source: str
    tree: ast.Module


class Function(NamedTuple):
    """A function of the library: its package, and the lines behind its `def`."""

    package: str
    body: list[str]


def library_modules() -> Iterator[Module]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        # What pip installed is no part of Python, and tests hold little prose.
        if {"site-packages", "dist-packages", "test", "tests"} & set(parts):
            continue
        try:
            # In the encoding that the file names.
            with tokenize.open(path) as file:
                source = file.read()
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            # Among them lib2to3's samples of what Python cannot parse.
            continue
        yield Module(parts[0].removesuffix(".py"), source, tree)


def collect_documents() -> list[list[str]]:
    """Python's language reference, a topic a document, and its library's docstrings, by module."""
    documents = [topics[name].split("\n\n") for name in sorted(topics)]
    for module in library_modules():
        docstrings = (
            ast.get_docstring(node)
            for node in ast.walk(module.tree)
            if isinstance(node, DOCUMENTED)
        )
        documents.append([text for text in docstrings if text])
    return documents


def collect_functions() -> list[Function]:
    """The library's functions of three lines or more, none of them twice."""
    functions: dict[str, Function] = {}
    for module in library_modules():
        lines = module.source.splitlines()
        for node in ast.walk(module.tree):
            if isinstance(node, FUNCTIONS) and node.end_lineno - node.lineno >= 3:
                body = textwrap.dedent("\n".join(lines[node.lineno : node.end_lineno]))
                functions.setdefault(body, Function(module.package, body.splitlines()))
    return list(functions.values())


def split_documents(
    documents: list[list[str]], held_out_share: float, seed: int
) -> tuple[list[str], list[str]]:
    """Training and held-out texts: whole documents, and no paragraph twice anywhere."""
    seen: set[str] = set()
    texts = []
    for paragraphs in documents:
        new = [text for text in dict.fromkeys(paragraphs) if text not in seen]
        seen.update(new)
        if new:
            texts.append("\n\n".join(new))
    random.Random(seed).shuffle(texts)
    count = round(held_out_share * len(texts))
    return texts[count:], texts[:count]


def train_bpe(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)


def train_wordpiece(texts: list[str], vocab: int, max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer as BERT's, uncased."""
    trained = BertWordPieceTokenizer()
    trained.train_from_iterator(
        texts, vocab_size=vocab, special_tokens=BERT_TOKENS, show_progress=False
    )
    # Training numbers the same pieces differently each time.
    pieces = sorted(trained.get_vocab().keys() - set(BERT_TOKENS))
    numbered = {piece: number for number, piece in enumerate([*BERT_TOKENS, *pieces])}
    tokenizer = BertWordPieceTokenizer(numbered)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.to_str()),
        model_max_length=max_length,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
