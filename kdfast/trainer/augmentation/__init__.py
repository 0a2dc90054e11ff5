"""More text to distil on: TinyBERT's data augmentation and the BiLSTM paper's.

    rows.py          what the two share: rows in, the same rows and their copies out, seeds
    tinybert.py      words replaced by what a masked language model or an embedding table suggests
    bilstm.py        words masked or replaced by others of their part of speech, n-grams
    word_vectors.py  tables of word vectors, such as GloVe's files

docs/augmentation.md says where the sources differ from each other and from this.
"""

from kdfast.trainer.augmentation.bilstm import BiLSTMAugmentation
from kdfast.trainer.augmentation.tinybert import TinyBERTAugmentation
from kdfast.trainer.augmentation.word_vectors import WordVectors

__all__ = ["BiLSTMAugmentation", "TinyBERTAugmentation", "WordVectors"]
