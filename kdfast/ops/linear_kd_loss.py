"""Distillation straight from hidden states: `linear_kd_loss`.

Read from the bottom: the public function checks its arguments, the autograd function keeps the
gradients that the forward pass computed, and the operator takes the rows in chunks: the logits of
both heads, the row kernel of `kd_loss` in place, the two products of the gradient.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast.ops import registry, vocab_parallel
from kdfast.ops.arguments import (
    check_count,
    check_detached,
    checked_vocab_size,
    values_are_checked,
)
from kdfast.ops.gradient import LinearLossWithGradients, distinct
from kdfast.ops.head import (
    Head,
    HeadGradients,
    checked_head,
    chunk_budget,
    chunks_of,
    head_gradient_scale,
    largest,
    logits_buffer,
    product_dtype,
    rows_of,
    rows_within,
    sweep,
    wide_dtype,
)
from kdfast.ops.kd_loss import BACKENDS
from kdfast.ops.tokens import (
    check_values,
    checked_keywords,
    gradient_scale,
    reduce,
    reduced_like,
    token_share,
)
from kdfast.reference import canonical_divergence

registry.library.define(
    "linear_kd_loss_forward(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, "
    "Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, Tensor? labels, "
    "Tensor? token_weight, Tensor? temperature_per_token, Tensor? teacher_temperature_per_token, "
    "Tensor? num_items, Tensor? incoming, Tensor(a!)? hidden_gradient, Tensor(b!)? weight_gradient,"
    " Tensor(c!)? bias_gradient, *, str divergence, float beta, float temperature, "
    "float teacher_temperature, bool scale_t2, float alpha, int ignore_index, SymInt vocab_size, "
    "str reduction, bool need_parts, float student_logit_scale, float teacher_logit_scale, "
    "float? student_softcap, float? teacher_softcap, SymInt? chunk_size, SymInt chunk_bytes, "
    "ScalarType? autocast, str? group, SymInt vocab_offset, SymInt widest_shard"
    ") -> (Tensor total, Tensor soft, Tensor hard)"
)


@torch.library.impl(registry.library, "linear_kd_loss_forward", "CompositeExplicitAutograd")
def _linear_kd_loss_forward(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    token_weight: Tensor | None,
    temperature_per_token: Tensor | None,
    teacher_temperature_per_token: Tensor | None,
    num_items: Tensor | None,
    incoming: Tensor | None,
    hidden_gradient: Tensor | None,
    weight_gradient: Tensor | None,
    bias_gradient: Tensor | None,
    *,
    divergence: str,
    beta: float,
    temperature: float,
    teacher_temperature: float,
    scale_t2: bool,
    alpha: float,
    ignore_index: int,
    vocab_size: int,
    reduction: str,
    need_parts: bool,
    student_logit_scale: float,
    teacher_logit_scale: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
    chunk_size: int | None,
    chunk_bytes: int,
    autocast: torch.dtype | None,
    group: str | None,
    vocab_offset: int,
    widest_shard: int,
) -> tuple[Tensor, Tensor, Tensor]:
    device, tokens = student_hidden.device, student_hidden.shape[:-1]
    if values_are_checked(device):
        temperatures = {
            "temperature": temperature_per_token,
            "teacher_temperature": teacher_temperature_per_token,
        }
        check_values(labels, temperatures, ignore_index, vocab_size, num_items)
    dtype = product_dtype(student_hidden, student_weight, autocast)
    # The columns that exist, of this shard if the vocabulary is cut into shards.
    vocab = max(0, min(len(student_weight), vocab_size - vocab_offset))

    def head(hidden, weight, bias, scale, softcap):
        bias = None if bias is None else bias[:vocab]
        hidden = hidden.reshape(tokens.numel(), hidden.shape[-1])
        return Head(hidden, weight[:vocab], bias, scale, softcap, dtype)

    student = head(
        student_hidden, student_weight, student_bias, student_logit_scale, student_softcap
    )
    teacher = head(
        teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap
    )
    gradients = HeadGradients(hidden_gradient, weight_gradient, bias_gradient, vocab)

    labels, token_weight, temperature_per_token, teacher_temperature_per_token = (
        None if per_token is None else per_token.flatten()
        for per_token in (
            labels,
            token_weight,
            temperature_per_token,
            teacher_temperature_per_token,
        )
    )
    if temperature_per_token is not None:
        temperature = temperature_per_token
    if teacher_temperature_per_token is not None:
        teacher_temperature = teacher_temperature_per_token
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

    options = {
        "divergence": canonical_divergence(divergence, beta),
        "beta": beta,
        "scale_t2": scale_t2,
        "alpha": alpha,
        "ignore_index": ignore_index,
        "vocab_size": vocab,
        "need_hard": need_parts,
    }
    if group is None:
        row_losses = registry.select("linear_kd_loss", BACKENDS, student_hidden)
        temporaries = 0
    else:
        row_losses, temporaries = vocab_parallel.kd_loss_rows, vocab_parallel.TEMPORARIES
        options |= {"group": group, "vocab_offset": vocab_offset}
    # Ranks whose shards differ in size take the same chunks: they meet in each.
    size = chunk_size or rows_within(chunk_bytes, widest_shard, dtype, 2 + temporaries)
    with torch.autocast(device.type, enabled=False):
        losses = _swept(
            student,
            teacher,
            (labels, token_weight, temperature, teacher_temperature, grad_scale),
            gradients,
            chunks_of(tokens.numel(), size, labels, ignore_index),
            partial(row_losses, **options),
            # On the CPU an ignored row is in no chunk.
            None if labels is None or device.type == "cpu" else labels != ignore_index,
        )
    if group is not None and hidden_gradient is not None:
        vocab_parallel.add_shards_(hidden_gradient, group)
    if headroom is not None:
        for gradient in gradients.wanted():
            gradient.div_(headroom)
    return reduce(losses, share, tokens, need_parts)


def _swept(
    student: Head,
    teacher: Head,
    per_token: tuple[float | Tensor | None, ...],
    gradients: HeadGradients,
    chunks: tuple[slice | Tensor, ...],
    row_losses: Callable[..., Tensor],
    counted: Tensor | None,
) -> Tensor:
    """`sweep` with the logits of two heads; `per_token` is what `row_losses` takes beside them."""
    vocab, wide = len(teacher.weight), wide_dtype(teacher.dtype)
    teacher_buffer = logits_buffer(
        largest(chunks, len(teacher.hidden)), vocab, wide, teacher.hidden.device
    )

    def chunk_losses(chunk: slice | Tensor, logits: Tensor, gradient: Tensor | None) -> Tensor:
        rows = teacher.hidden[chunk].to(teacher.dtype)
        teacher_logits = teacher.logits(rows, teacher_buffer[: len(rows)])
        return row_losses(logits, teacher_logits[None], *rows_of(per_token, chunk), gradient)

    return sweep(student, chunk_losses, gradients, chunks, counted, spare=teacher_buffer)


@torch.library.register_fake("kdfast::linear_kd_loss_forward", lib=registry.library)
def _(student_hidden: Tensor, student_weight: Tensor, *args: object, **settings: object):
    shape = student_hidden.shape[:-1] if settings["reduction"] == "none" else ()
    dtype = torch.promote_types(student_hidden.dtype, student_weight.dtype)
    return reduced_like(student_hidden.to(dtype), shape, settings["need_parts"])


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    chunk_size: int | None = None,
    process_group: "dist.ProcessGroup | None" = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    scale_t2: bool = True,
    alpha: float = 1.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    return_parts: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`kd_loss` of logits that never exist, from the hidden states in front of both output heads.

    The logits are those of the two heads,

        logits = softcap(logit_scale · (hidden Wᵀ + bias)),   softcap(x) = c · tanh(x / c),

    and the loss, with every keyword that is not described here, is that of `kdfast.kd_loss`. Rows
    are taken in chunks, and gradients are computed in the forward pass: a training step is four
    matrix products of the head's size, and holds one chunk's logits besides its gradients. Logits
    are kept in float32 within a chunk and the weight's gradient is accumulated in float32, whatever
    the precision of the models.

    Args:
        student_hidden: `[..., H_s]`, float32, bfloat16, float16 or float64.
        student_weight: `[V, H_s]`, as in `nn.Linear`. Gradients go to `student_hidden`,
            `student_weight` and `student_bias`, to each if it requires grad. A DTensor, as FSDP2
            shards it, is gathered, and its gradient averaged over the ranks.
        teacher_hidden: `[..., H_t]`, the same leading shape and device.
        teacher_weight: `[V_t, H_t]`.
        labels: `[...]`, integers, aligned with the rows: no position is shifted.
        student_bias, teacher_bias: `[V]`, `[V_t]`.
        student_logit_scale, teacher_logit_scale: above 0.
        student_softcap, teacher_softcap: c, above 0; None for no cap.
        chunk_size: rows of a chunk. None takes as many as fit into the environment variable
            KDFAST_CHUNK_BYTES, by default 128 MiB on the CPU and 1 GiB elsewhere, at 8 bytes per
            logit (16 where the products are of half precision, and in float64).
        process_group: weights and biases are this rank's shard of the vocabulary, in the order of
            the ranks and both models cut alike; everything else is the same on every rank. Labels
            and `vocab_size` count the whole vocabulary. The loss and `student_hidden`'s gradient
            come out whole on every rank. Where one rank's arguments are refused, all raise. Breaks
            the graph of `torch.compile`.
        vocab_size: rows of the weights at and beyond it do not exist: they take part in no product,
            and their gradient is 0.
        reduction: with "none" and a weight or bias that requires grad, the gradients wait for the
            backward pass, and the step is six products.

    Returns:
        The loss, as `kdfast.kd_loss` returns it.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Example:
        >>> loss = kdfast.linear_kd_loss(
        ...     student_hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight
        ... )
        >>> loss.backward()
    """
    prepare = partial(
        _prepared,
        (student_hidden, student_weight, student_bias, student_logit_scale, student_softcap),
        (teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap),
        labels,
        vocab_size=vocab_size,
        chunk_size=chunk_size,
        sharded=process_group is not None,
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        scale_t2=scale_t2,
        alpha=alpha,
        ignore_index=ignore_index,
        token_weight=token_weight,
        reduction=reduction,
        num_items=num_items,
        return_parts=return_parts,
    )
    if process_group is None:
        tensors, needed, settings = prepare()
    else:
        tensors, needed, settings = vocab_parallel.agreed(prepare, process_group)
    total, soft, hard = LinearLossWithGradients.apply(
        "linear_kd_loss", *distinct(*tensors), needed, settings
    )
    return (total, soft, hard) if return_parts else total


def _prepared(
    student: tuple,
    teacher: tuple,
    labels: Tensor | None,
    *,
    vocab_size: int | None,
    chunk_size: int | None,
    sharded: bool,
    **keywords: object,
) -> tuple[tuple, tuple[bool, ...], dict[str, object]]:
    """The arguments, checked, as the operator takes them."""
    device = student[0].device if isinstance(student[0], Tensor) else None
    student = checked_head("student", *student, device, sharded)
    teacher = checked_head("teacher", *teacher, device, sharded)
    for name, tensor in zip(("hidden", "weight", "bias"), teacher, strict=False):
        check_detached(f"teacher_{name}", tensor)
    tokens = student[0].shape[:-1]
    if teacher[0].shape[:-1] != tokens:
        raise ValueError(
            f"teacher_hidden must have the student's leading shape {tuple(tokens)}, "
            f"got {tuple(teacher[0].shape[:-1])}"
        )
    per_token, settings = checked_keywords(tokens, device, labels, **keywords)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    if not sharded:
        vocab_size = checked_vocab_size(
            vocab_size,
            len(student[1]),
            len(teacher[1]),
            ("student_weight", "teacher_weight"),
            "rows",
        )
    needed = tuple(
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in student[:3]
    )
    autocast = None
    if torch.is_autocast_enabled(device.type):
        autocast = torch.get_autocast_dtype(device.type)
    settings |= {
        "vocab_size": vocab_size,
        "student_logit_scale": student[3],
        "teacher_logit_scale": teacher[3],
        "student_softcap": student[4],
        "teacher_softcap": teacher[4],
        "chunk_size": chunk_size,
        "chunk_bytes": chunk_budget(device),
        "autocast": autocast,
        "group": None,
        "vocab_offset": 0,
        "widest_shard": vocab_size,
    }
    return (*student[:3], *teacher[:3], *per_token), needed, settings
