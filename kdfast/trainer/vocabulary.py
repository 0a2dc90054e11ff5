"""Whether a tokenizer, a student and a teacher speak of the same tokens."""

from transformers import PreTrainedTokenizerBase


def check_same_vocabulary(
    student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Distributions over two vocabularies compare only where every id means the same token.

    Raises:
        ValueError: the vocabularies differ; it says how.

    Example:
        >>> check_same_vocabulary(student_tokenizer, teacher_tokenizer)
    """
    student, teacher = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    different = student.items() ^ teacher.items()
    if different:
        token, _ = min(different, key=lambda entry: (entry[1], entry[0]))
        raise ValueError(
            f"the student's tokenizer ({len(student)} tokens) and the teacher's ({len(teacher)}) "
            f"differ: {token!r} is id {student.get(token)} for the student and id "
            f"{teacher.get(token)} for the teacher"
        )


def check_vocabulary_fits(tokenizer: PreTrainedTokenizerBase, vocab_size: int, owner: str) -> None:
    """Every id that the tokenizer can produce must have an embedding.

    Raises:
        ValueError: the model named by `owner` has too few embeddings.
    """
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > vocab_size:
        raise ValueError(
            f"the tokenizer needs {needed} embeddings and {owner} has vocab_size={vocab_size}"
        )
