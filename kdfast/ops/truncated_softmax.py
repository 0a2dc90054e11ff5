"""The largest probabilities of a softmax, and where they stand: `truncated_softmax`."""

from typing import NamedTuple

import torch
from torch import Tensor

from kdfast import reference
from kdfast.ops import registry
from kdfast.ops.arguments import (
    check_count,
    check_detached,
    check_floating,
    values_are_checked,
)
from kdfast.ops.rows import Addresses, as_rows, cpp_kernel, in_rows
from kdfast.ops.tokens import check_values, result_dtype, split_temperature


class TruncatedSoftmax(NamedTuple):
    """A few entries of a softmax per token, largest first: what a teacher leaves of itself.

    Args:
        log_probs: `[..., k]`, floating, log p under the softmax over the whole vocabulary.
        indices: `[..., k]`, int64, their columns, distinct; −1 for an entry that does not exist.
    """

    log_probs: Tensor
    indices: Tensor


def _cpp_rows(
    logits: Tensor, k: int, temperature: float | Tensor, *, vocab_size: int
) -> tuple[Tensor, Tensor]:
    real = result_dtype(logits)
    log_probs = logits.new_empty((*logits.shape[:2], k), dtype=real)
    indices = logits.new_empty((*logits.shape[:2], k), dtype=torch.int64)
    # The kernel sees addresses, which `tensors` keeps alive until it has returned.
    tensors = Addresses()
    cpp_kernel("truncated_softmax_rows", real)(
        logits=tensors.matrix(logits),
        outer_rows=logits.shape[0],
        inner_rows=logits.shape[1],
        vocab_size=vocab_size,
        k=k,
        temperature=tensors.per_row(temperature, real),
        log_probs=log_probs.data_ptr(),
        indices=indices.data_ptr(),
    )
    return log_probs, indices


def _triton_rows(
    logits: Tensor, k: int, temperature: float | Tensor, *, vocab_size: int
) -> tuple[Tensor, Tensor]:
    from kdfast.kernels.truncated_softmax import MOST_ENTRIES, truncated_softmax_rows

    if k > MOST_ENTRIES:
        return _torch_rows(logits, k, temperature, vocab_size=vocab_size)
    return truncated_softmax_rows(logits, k, temperature, vocab_size=vocab_size)


def _torch_rows(
    logits: Tensor, k: int, temperature: float | Tensor, *, vocab_size: int
) -> tuple[Tensor, Tensor]:
    temperature = in_rows(temperature, logits.shape[:2])
    return reference.truncated_softmax_rows(logits, k, temperature, vocab_size=vocab_size)


BACKENDS = {"cpp": _cpp_rows, "triton": _triton_rows, "torch": _torch_rows}


registry.library.define(
    "truncated_softmax(Tensor logits, Tensor? temperature_per_token, *, SymInt k, "
    "float temperature, SymInt vocab_size) -> (Tensor log_probs, Tensor indices)"
)


@torch.library.impl(registry.library, "truncated_softmax", "CompositeExplicitAutograd")
def _truncated_softmax(
    logits: Tensor,
    temperature_per_token: Tensor | None,
    *,
    k: int,
    temperature: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    if values_are_checked(logits.device):
        check_values(None, {"temperature": temperature_per_token}, 0, vocab_size)
    rows = registry.select("truncated_softmax", BACKENDS, logits)
    log_probs, indices = rows(
        as_rows(logits),
        k,
        temperature if temperature_per_token is None else temperature_per_token.flatten(),
        vocab_size=vocab_size,
    )
    shape = (*logits.shape[:-1], k)
    return log_probs.reshape(shape), indices.reshape(shape)


@torch.library.register_fake("kdfast::truncated_softmax", lib=registry.library)
def _(logits: Tensor, temperature_per_token: Tensor | None, *, k: int, **settings: object):
    shape = (*logits.shape[:-1], k)
    return (
        logits.new_empty(shape, dtype=result_dtype(logits)),
        logits.new_empty(shape, dtype=torch.int64),
    )


def truncated_softmax(
    logits: Tensor,
    k: int,
    *,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
) -> TruncatedSoftmax:
    """The k largest probabilities of softmax(logits / temperature), from one read of the logits.

    They are probabilities under the softmax over the whole vocabulary: they sum to less than 1, and
    what they leave out is what `topk_kd_loss` calls the tail.

    Args:
        logits: `[..., V]`, float32, bfloat16, float16 or float64. Made for a teacher: logits that
            require grad are an error.
        k: how many entries to keep, at most the columns that exist.
        temperature: a number, or one value per token `[...]`.
        vocab_size: the columns that exist; those at and beyond it are padding.

    Returns:
        `TruncatedSoftmax(log_probs, indices)`, both `[..., k]`, the largest probability first; of
        equal logits the one with the lower index comes first. log_probs is float32 (float64 for
        float64 logits). A logit of −inf is listed with −inf when there are not enough others. A row
        that has no softmax (it holds NaN or +inf, or −inf alone) has log_probs of NaN and the
        indices 0 … k − 1.

        On CUDA devices the fused kernel serves k up to 1024; more is served by plain PyTorch, which
        sorts whole rows.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Example:
        >>> with torch.no_grad():
        ...     top = kdfast.truncated_softmax(teacher(batch).logits, 64)
        >>> loss = kdfast.topk_kd_loss(student(batch).logits, top)
    """
    check_floating("logits", logits)
    check_detached("logits", logits)
    if logits.dim() == 0:
        raise ValueError("logits must have a vocabulary dimension, got a 0-d tensor")
    width = logits.shape[-1]
    vocab_size = width if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= width:
        raise ValueError(
            f"vocab_size must be at least 1 and at most the width of the logits, got {vocab_size} "
            f"for logits of {width} columns"
        )
    check_count("k", k)
    if k > vocab_size:
        raise ValueError(f"k must be at most the {vocab_size} columns that exist, got {k}")
    temperature, temperature_per_token = split_temperature(
        "temperature", temperature, logits.shape[:-1], logits.device
    )
    return TruncatedSoftmax(
        *torch.ops.kdfast.truncated_softmax(
            logits, temperature_per_token, k=k, temperature=temperature, vocab_size=vocab_size
        )
    )
