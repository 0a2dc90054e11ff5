"""Distillation from a truncated teacher, straight from hidden states: `linear_topk_kd_loss`.

Read from the bottom, like linear_kd_loss.py. Most tails need every logit of the student, in chunks
of rows. A softmax over the support needs k of them per token: the rows of the weight that make
them are looked up, and nothing is as large as the vocabulary but the weight's own gradient.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.ops import registry
from kdfast.ops.arguments import check_count, check_flag, values_are_checked
from kdfast.ops.gradient import LinearLossWithGradients, distinct
from kdfast.ops.head import (
    BLOCK_BYTES,
    Head,
    HeadGradients,
    checked_head,
    chunk_budget,
    chunks_of,
    head_gradient_scale,
    is_dtensor,
    product_dtype,
    rows_of,
    rows_within,
    sweep,
    wide_dtype,
)
from kdfast.ops.rows import Addresses, cpp_kernel
from kdfast.ops.tokens import (
    check_values,
    gradient_scale,
    reduce,
    reduced_like,
    token_share,
)
from kdfast.ops.topk_kd_loss import BACKENDS as ROW_BACKENDS
from kdfast.ops.topk_kd_loss import check_indices, checked_truncation, sorted_by_column
from kdfast.ops.truncated_softmax import TruncatedSoftmax
from kdfast.reference import canonical_divergence


class Entries(NamedTuple):
    """What a backend does with the rows of the weight that `indices` `[rows, k]` name.

    An index below 0 is an entry that does not exist. Sums are in float32, or float64.

    Args:
        logits: (hidden `[rows, H]`, weight `[V, H]`, indices) → hidden[r] · weight[indices[r, j]],
            `[rows, k]`, and 0 for what does not exist.
        hidden_gradient: (gradient `[rows, k]`, weight, indices, out `[rows, H]`): out[r] = Σ_j
            gradient[r, j] · weight[indices[r, j]].
        weight_gradient: (gradient, hidden, order, offsets `[R + 1]`, out `[R, H]`): out[i] = Σ
            gradient[e] · hidden[e // k] over the entries e in order[offsets[i] : offsets[i + 1]],
            in that order.
    """

    logits: Callable[[Tensor, Tensor, Tensor], Tensor]
    hidden_gradient: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    weight_gradient: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


def _cpp_logits(hidden: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    tensors = Addresses()
    logits = hidden.new_empty(indices.shape, dtype=wide_dtype(hidden.dtype))
    cpp_kernel("entry_logits", logits.dtype)(
        hidden=tensors.matrix(hidden[None]),
        weight=tensors.matrix(weight[None]),
        indices=tensors.contiguous(indices, torch.int64),
        rows=len(indices),
        entries=indices.shape[1],
        width=hidden.shape[1],
        logits=logits.data_ptr(),
    )
    return logits


def _cpp_hidden_gradient(gradient: Tensor, weight: Tensor, indices: Tensor, out: Tensor) -> None:
    tensors = Addresses()
    cpp_kernel("entry_hidden_gradient", out.dtype)(
        gradient=tensors.contiguous(gradient, out.dtype),
        weight=tensors.matrix(weight[None]),
        indices=tensors.contiguous(indices, torch.int64),
        rows=len(indices),
        entries=indices.shape[1],
        width=out.shape[1],
        out=out.data_ptr(),
    )


def _cpp_weight_gradient(
    gradient: Tensor, hidden: Tensor, order: Tensor, offsets: Tensor, out: Tensor
) -> None:
    tensors = Addresses()
    cpp_kernel("entry_weight_gradient", out.dtype)(
        gradient=tensors.contiguous(gradient, out.dtype),
        hidden=tensors.matrix(hidden[None]),
        order=tensors.contiguous(order, torch.int64),
        offsets=tensors.contiguous(offsets, torch.int64),
        entries=gradient.shape[1],
        width=out.shape[1],
        out_rows=len(out),
        out=out.data_ptr(),
    )


def _triton_logits(*tensors: Tensor) -> Tensor:
    from kdfast.kernels.linear_topk_kd_loss import entry_logits

    return entry_logits(*tensors)


def _triton_hidden_gradient(*tensors: Tensor) -> None:
    from kdfast.kernels.linear_topk_kd_loss import entry_hidden_gradient

    entry_hidden_gradient(*tensors)


def _triton_weight_gradient(*tensors: Tensor) -> None:
    from kdfast.kernels.linear_topk_kd_loss import entry_weight_gradient

    entry_weight_gradient(*tensors)


def _gathered_rows(weight: Tensor, indices: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The weight's rows of some tokens at a time, `[tokens, k, H]`; an absent entry's are 0."""
    wide = wide_dtype(weight.dtype)
    entries, width = indices.shape[1], weight.shape[1]
    step = max(1, BLOCK_BYTES // (entries * width * wide.itemsize))
    for begin in range(0, len(indices), step):
        part = slice(begin, begin + step)
        rows = weight[indices[part].clamp_min(0)].to(wide)
        yield part, torch.where(indices[part].unsqueeze(-1) >= 0, rows, 0)


def _torch_logits(hidden: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    logits = hidden.new_empty(indices.shape, dtype=wide_dtype(hidden.dtype))
    for part, rows in _gathered_rows(weight, indices):
        logits[part] = (rows @ hidden[part].to(rows.dtype).unsqueeze(-1)).squeeze(-1)
    # Hidden states of a token without entries may hold NaN.
    return logits.masked_fill_(indices < 0, 0)


def _torch_hidden_gradient(gradient: Tensor, weight: Tensor, indices: Tensor, out: Tensor) -> None:
    for part, rows in _gathered_rows(weight, indices):
        out[part] = (gradient[part].unsqueeze(1) @ rows).squeeze(1)


def _torch_weight_gradient(
    gradient: Tensor, hidden: Tensor, order: Tensor, offsets: Tensor, out: Tensor
) -> None:
    token, factor = order // gradient.shape[1], gradient.flatten()[order].unsqueeze(-1)
    # Some columns at a time: all terms of a sum stand in memory at once.
    step = max(1, BLOCK_BYTES // (max(1, len(order)) * out.itemsize))
    for begin in range(0, out.shape[1], step):
        columns = slice(begin, begin + step)
        terms = factor * hidden[:, columns].to(out.dtype)[token]
        out[:, columns] = torch.segment_reduce(terms, "sum", offsets=offsets, initial=0)


BACKENDS = {
    "cpp": Entries(_cpp_logits, _cpp_hidden_gradient, _cpp_weight_gradient),
    "triton": Entries(_triton_logits, _triton_hidden_gradient, _triton_weight_gradient),
    "torch": Entries(_torch_logits, _torch_hidden_gradient, _torch_weight_gradient),
}


registry.library.define(
    "linear_topk_kd_loss_forward(Tensor student_hidden, Tensor student_weight, "
    "Tensor? student_bias, Tensor log_probs, Tensor indices, Tensor? labels, "
    "Tensor? token_weight, Tensor? temperature_per_token, Tensor? num_items, Tensor? incoming, "
    "Tensor(a!)? hidden_gradient, Tensor(b!)? weight_gradient, Tensor(c!)? bias_gradient, *, "
    "Tensor? weight_rows, str tail, str divergence, float beta, float temperature, "
    "bool scale_t2, float alpha, int ignore_index, SymInt vocab_size, str reduction, "
    "bool need_parts, float student_logit_scale, float? student_softcap, SymInt? chunk_size, "
    "SymInt chunk_bytes, ScalarType? autocast) -> (Tensor total, Tensor soft, Tensor hard)"
)


@torch.library.impl(registry.library, "linear_topk_kd_loss_forward", "CompositeExplicitAutograd")
def _linear_topk_kd_loss_forward(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    log_probs: Tensor,
    indices: Tensor,
    labels: Tensor | None,
    token_weight: Tensor | None,
    temperature_per_token: Tensor | None,
    num_items: Tensor | None,
    incoming: Tensor | None,
    hidden_gradient: Tensor | None,
    weight_gradient: Tensor | None,
    bias_gradient: Tensor | None,
    *,
    weight_rows: Tensor | None,
    tail: str,
    divergence: str,
    beta: float,
    temperature: float,
    scale_t2: bool,
    alpha: float,
    ignore_index: int,
    vocab_size: int,
    reduction: str,
    need_parts: bool,
    student_logit_scale: float,
    student_softcap: float | None,
    chunk_size: int | None,
    chunk_bytes: int,
    autocast: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    device, tokens = student_hidden.device, student_hidden.shape[:-1]
    labels, token_weight, temperature_per_token = (
        None if x is None else x.flatten() for x in (labels, token_weight, temperature_per_token)
    )
    log_probs, indices = sorted_by_column(log_probs, indices)
    if values_are_checked(device):
        temperatures = {"temperature": temperature_per_token}
        check_values(labels, temperatures, ignore_index, vocab_size, num_items)
        check_indices(indices, labels, ignore_index, vocab_size)
    if temperature_per_token is not None:
        temperature = temperature_per_token

    on_support = _is_on_support(tail, alpha, labels is not None and need_parts)
    # A few entries of the weight are read as they are, and summed in wide precision.
    dtype = wide_dtype(student_hidden.dtype, student_weight.dtype)
    if not on_support:
        dtype = product_dtype(student_hidden, student_weight, autocast)
    share = token_share(reduction, num_items, labels, ignore_index, tokens, device)
    grad_scale, headroom = head_gradient_scale(
        gradient_scale(share, incoming),
        student_logit_scale,
        dtype,
        device,
        token_weight=token_weight,
        temperature=temperature,
        scale_t2=scale_t2,
        alpha=alpha,
    )

    row_losses = partial(
        registry.select("linear_topk_kd_loss", ROW_BACKENDS, student_hidden),
        tail=tail,
        divergence=canonical_divergence(divergence, beta),
        beta=beta,
        scale_t2=scale_t2,
        alpha=alpha,
        ignore_index=ignore_index,
        need_hard=need_parts and not on_support,
        smallest_bucket=torch.finfo(log_probs.dtype).eps,
    )
    per_token = (
        log_probs,
        indices,
        labels,
        token_weight,
        temperature,
        grad_scale,
    )
    student = Head(
        student_hidden.reshape(tokens.numel(), student_hidden.shape[-1]),
        student_weight if on_support else student_weight[:vocab_size],
        student_bias if on_support or student_bias is None else student_bias[:vocab_size],
        student_logit_scale,
        student_softcap,
        dtype,
    )
    gradients = HeadGradients(hidden_gradient, weight_gradient, bias_gradient, vocab_size)
    with torch.autocast(device.type, enabled=False):
        if on_support:
            losses = _from_support(student, row_losses, per_token, gradients, weight_rows)
        else:
            # The logits, and their gradient where it cannot take their place.
            tensors = 1 if student_softcap is None else 2
            size = chunk_size or rows_within(chunk_bytes, vocab_size, dtype, tensors)
            losses = sweep(
                student,
                lambda chunk, logits, gradient: row_losses(
                    logits, *rows_of(per_token, chunk), gradient, vocab_size=vocab_size
                ),
                gradients,
                chunks_of(tokens.numel(), size, labels, ignore_index),
                None if labels is None or device.type == "cpu" else labels != ignore_index,
            )
    if headroom is not None:
        for gradient in gradients.wanted():
            gradient.div_(headroom)
    return reduce(losses, share, tokens, need_parts)


def _is_on_support(tail: str, alpha: float, needs_hard: bool) -> bool:
    """Whether no logit off the support is looked at."""
    return tail == "support" and alpha == 1 and not needs_hard


def _from_support(
    student: Head,
    row_losses: Callable[..., Tensor],
    per_token: tuple[float | Tensor | None, ...],
    gradients: HeadGradients,
    weight_rows: Tensor | None,
) -> Tensor:
    """Total, soft and hard of every row, `[3, rows]`, from the logits of its support alone."""
    log_probs, indices, labels, token_weight, temperature, grad_scale = per_token
    entries = registry.select("linear_topk_kd_loss", BACKENDS, student.hidden)
    if labels is not None:
        # What a token that does not count holds must not meet its gradient of 0.
        ignore_index = row_losses.keywords["ignore_index"]
        indices = torch.where((labels == ignore_index).unsqueeze(-1), -1, indices)
    hidden, weight = (_readable(x, student.dtype) for x in (student.hidden, student.weight))

    logits = entries.logits(hidden, weight, indices)
    if student.bias is not None:
        logits += student.bias[indices.clamp_min(0)]
    student.cap(logits)
    # The support is a vocabulary of its own, of which the entries are all there is.
    columns = torch.arange(indices.shape[1], device=indices.device)
    gradient = torch.empty_like(logits) if gradients.wanted() else None
    losses = row_losses(
        logits[None],
        log_probs,
        torch.where(indices < 0, -1, columns),
        labels,
        token_weight,
        temperature,
        grad_scale,
        None if gradient is None else gradient[None],
        vocab_size=indices.shape[1],
    )
    if gradient is None:
        return losses
    if student.softcap is not None:
        student.uncap(gradient, logits)
    if gradients.hidden is not None:
        out = gradients.hidden.view(student.hidden.shape)
        entries.hidden_gradient(gradient, weight, indices, out)
    if gradients.weight is not None or gradients.bias is not None:
        order, offsets = _by_column(indices, len(student.weight), weight_rows)
        if gradients.weight is not None:
            entries.weight_gradient(gradient, hidden, order, offsets, gradients.weight)
        if gradients.bias is not None:
            if weight_rows is not None:
                order, offsets = _by_column(indices, len(student.weight), None)
            ones = hidden.new_ones(len(hidden), 1)
            out = gradients.bias.unsqueeze(-1)
            entries.weight_gradient(gradient, ones, order, offsets, out)
    return losses


def _readable(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of unit stride, as they are unless float64 is computed in."""
    tensor = tensor.to(dtype) if dtype == torch.float64 else tensor
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _by_column(indices: Tensor, vocab: int, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """The entries in the order of their columns, and where each column's begin, and the last's end.

    Args:
        columns: those that are asked for, ascending; None for all.
    """
    by_column, order = indices.flatten().sort(stable=True)
    if columns is None:
        ends = torch.arange(vocab + 1, device=indices.device)
    else:
        ends = torch.cat([columns, columns.new_full((1,), vocab)])
    return order, torch.searchsorted(by_column, ends)


@torch.library.register_fake("kdfast::linear_topk_kd_loss_forward", lib=registry.library)
def _(student_hidden: Tensor, student_weight: Tensor, *args: object, **settings: object):
    shape = student_hidden.shape[:-1] if settings["reduction"] == "none" else ()
    dtype = torch.promote_types(student_hidden.dtype, student_weight.dtype)
    return reduced_like(student_hidden.to(dtype), shape, settings["need_parts"])


def linear_topk_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: TruncatedSoftmax,
    labels: Tensor | None = None,
    *,
    tail: str = "bucket",
    student_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    chunk_size: int | None = None,
    sparse_weight_grad: bool = False,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    scale_t2: bool = True,
    alpha: float = 1.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    return_parts: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`topk_kd_loss` of logits that never exist, from the hidden states in front of the head.

    The logits are softcap(logit_scale · (hidden Wᵀ + bias)), as in `kdfast.linear_kd_loss`, and the
    loss, with every keyword that is not described here, is that of `kdfast.topk_kd_loss`. What it
    takes depends on what the loss looks at:

        tail="support", no hard term   k rows of the weight per token: N · k · H operations a
                                       product instead of N · V · H, and no chunk
        everything else                all logits, in chunks of rows: three matrix products a
                                       training step, and one chunk's logits

    The weight's gradient is summed in a fixed order, in float32: the same bits every run.

    Args:
        student_hidden: `[..., H]`, float32, bfloat16, float16 or float64.
        student_weight: `[V, H]`, as in `nn.Linear`. Gradients go to `student_hidden`,
            `student_weight` and `student_bias`, to each if it requires grad. A DTensor, as FSDP2
            shards it, is gathered, and its gradient averaged over the ranks.
        teacher: `log_probs` and `indices` `[..., k]`, as for `topk_kd_loss`.
        labels: `[...]`, integers, aligned with the rows: no position is shifted.
        student_bias: `[V]`.
        student_logit_scale: above 0.
        student_softcap: c of c · tanh(x / c), above 0; None for no cap.
        chunk_size: rows of a chunk, where there are chunks. None takes as many as fit into the
            environment variable KDFAST_CHUNK_BYTES, as in `linear_kd_loss`.
        sparse_weight_grad: give the weight a sparse COO gradient of the rows that some token's
            support holds, each once, instead of a dense one that is 0 elsewhere. For optimisers
            that take it (`torch.optim.SparseAdam`, `SGD`); needs tail="support" and no hard term;
            waits for a GPU, to know how many rows there are; not under torch.compile.
        reduction: with "none" and a weight or bias that requires grad, the gradients wait for the
            backward pass, which computes the logits once more.

    Returns:
        The loss, as `kdfast.topk_kd_loss` returns it.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Example:
        >>> top = kdfast.TruncatedSoftmax(log_probs, indices)  # of a teacher, or a cache
        >>> loss = kdfast.linear_topk_kd_loss(student_hidden, student.lm_head.weight, top)
        >>> loss.backward()
    """
    device = student_hidden.device if isinstance(student_hidden, Tensor) else None
    *student, scale, softcap = checked_head(
        "student",
        student_hidden,
        student_weight,
        student_bias,
        student_logit_scale,
        student_softcap,
        device,
        False,
    )
    tensors, settings = checked_truncation(
        teacher,
        labels,
        tail,
        vocab_size,
        ("student_hidden", student_hidden.shape[:-1], device),
        (len(student[1]), "rows of student_weight"),
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        scale_t2=scale_t2,
        alpha=alpha,
        ignore_index=ignore_index,
        token_weight=token_weight,
        reduction=reduction,
        num_items=num_items,
        return_parts=return_parts,
    )
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    needed = tuple(
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in student
    )
    weight_rows = None
    check_flag("sparse_weight_grad", sparse_weight_grad)
    if sparse_weight_grad:
        if not _is_on_support(tail, alpha, labels is not None and return_parts):
            raise ValueError(
                "sparse_weight_grad needs tail='support' and no hard term (alpha=1.0, and no labels"
                f" with return_parts): every row of the weight has a gradient otherwise, got "
                f"tail={tail!r}, alpha={alpha}"
            )
        if is_dtensor(student_weight):
            raise ValueError("sparse_weight_grad needs a plain student_weight, got a DTensor")
        weight_rows = _rows_with_gradient(teacher.indices, labels, ignore_index)
    autocast = None
    if torch.is_autocast_enabled(device.type):
        autocast = torch.get_autocast_dtype(device.type)
    settings |= {
        "weight_rows": weight_rows,
        "student_logit_scale": scale,
        "student_softcap": softcap,
        "chunk_size": chunk_size,
        "chunk_bytes": chunk_budget(device),
        "autocast": autocast,
    }
    total, soft, hard = LinearLossWithGradients.apply(
        "linear_topk_kd_loss", *distinct(*student, *tensors), needed, settings
    )
    return (total, soft, hard) if return_parts else total


def _rows_with_gradient(indices: Tensor, labels: Tensor | None, ignore_index: int) -> Tensor:
    """The columns that some token's support holds, ascending."""
    listed = indices >= 0
    if labels is not None:
        listed &= (labels != ignore_index).unsqueeze(-1)
    return indices[listed].long().unique()
