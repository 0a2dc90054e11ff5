"""Distillation from a truncated teacher: `topk_kd_loss`.

Read from the bottom, like kd_loss.py. The operator puts the teacher's entries in the order of their
columns, so that a backend that walks a row meets them one after the other.
"""

import torch
from torch import Tensor

from kdfast import reference
from kdfast.ops import registry
from kdfast.ops.arguments import (
    check_choice,
    check_detached,
    check_flag,
    check_floating,
    check_same_device,
    check_shape,
    values_are_checked,
)
from kdfast.ops.gradient import LossWithGradient, distinct
from kdfast.ops.rows import Addresses, as_rows, check_overwritable, cpp_kernel, in_rows
from kdfast.ops.tokens import (
    check_values,
    checked_keywords,
    gradient_scale,
    reduce,
    reduced_like,
    result_dtype,
    token_share,
)
from kdfast.ops.truncated_softmax import TruncatedSoftmax
from kdfast.reference import DIVERGENCES, TAIL_DIVERGENCES, TAILS, canonical_divergence


def _cpp_rows(
    student: Tensor,
    log_probs: Tensor,
    indices: Tensor,
    labels: Tensor | None,
    token_weight: Tensor | None,
    temperature: float | Tensor,
    grad_scale: Tensor | None,
    gradient: Tensor | None,
    *,
    tail: str,
    divergence: str,
    beta: float,
    scale_t2: bool,
    alpha: float,
    ignore_index: int,
    vocab_size: int,
    need_hard: bool,
    smallest_bucket: float,
) -> Tensor:
    real = result_dtype(student)
    rows = student.shape[0] * student.shape[1]
    losses = student.new_empty((3, rows), dtype=real)
    # The kernel sees addresses, which `tensors` keeps alive until it has returned.
    tensors = Addresses()
    cpp_kernel("topk_kd_loss_rows", real)(
        student=tensors.matrix(student),
        gradient=tensors.matrix(gradient),
        log_probs=tensors.contiguous(log_probs, real),
        indices=tensors.contiguous(indices, torch.int64),
        outer_rows=student.shape[0],
        inner_rows=student.shape[1],
        width=student.shape[2],
        vocab_size=vocab_size,
        entries=indices.shape[-1],
        labels=tensors.per_row(labels, torch.int64),
        ignore_index=ignore_index,
        token_weight=tensors.per_row(token_weight, real),
        temperature=tensors.per_row(temperature, real),
        grad_scale=tensors.per_row(grad_scale, real),
        losses=losses.data_ptr(),
        tail=TAILS.index(tail),
        divergence=DIVERGENCES.index(divergence),
        beta=beta,
        alpha=alpha,
        scale_t2=scale_t2,
        need_hard=labels is not None and (need_hard or alpha < 1),
        smallest_bucket=smallest_bucket,
    )
    return losses


def _triton_rows(student: Tensor, log_probs: Tensor, *args: object, **options: object) -> Tensor:
    from kdfast.kernels.topk_kd_loss import MOST_ENTRIES, topk_kd_loss_rows

    rows = topk_kd_loss_rows if log_probs.shape[-1] <= MOST_ENTRIES else _torch_rows
    return rows(student, log_probs, *args, **options)


def _torch_rows(
    student: Tensor,
    log_probs: Tensor,
    indices: Tensor,
    *per_row: Tensor | float | None,
    **options: object,
) -> Tensor:
    *per_row, gradient = per_row
    leading = student.shape[:2]
    per_row = [in_rows(values, leading) for values in per_row]
    entries = (x.view(*leading, x.shape[-1]) for x in (log_probs, indices))
    return reference.topk_kd_loss_rows(student, *entries, *per_row, gradient, **options).flatten(1)


BACKENDS = {"cpp": _cpp_rows, "triton": _triton_rows, "torch": _torch_rows}


def sorted_by_column(log_probs: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The entries of each token, `[tokens, k]`, those that do not exist first."""
    entries = indices.shape[-1]
    indices, order = indices.long().reshape(-1, entries).sort(-1)
    return log_probs.reshape(-1, entries).gather(-1, order), indices


def check_indices(
    indices: Tensor, labels: Tensor | None, ignore_index: int, vocab_size: int
) -> None:
    """`[tokens, k]`, ascending. A token that is ignored may have any."""
    previous = indices.roll(1, -1)
    previous[:, 0] = -1
    repeated = (indices == previous) & (indices >= 0)
    wrong = repeated | (indices < -1) | (indices >= vocab_size)
    if labels is not None:
        wrong &= (labels != ignore_index).unsqueeze(-1)
    if wrong.any():
        index = indices[wrong][0].item()
        if -1 <= index < vocab_size:
            raise ValueError(
                f"teacher.indices must be distinct for each token, got {index} more than once"
            )
        raise ValueError(f"teacher.indices must be in [0, {vocab_size}), or −1, got {index}")


registry.library.define(
    "topk_kd_loss_forward(Tensor student_logits, Tensor log_probs, Tensor indices, Tensor? labels, "
    "Tensor? token_weight, Tensor? temperature_per_token, Tensor? num_items, Tensor? incoming, "
    "Tensor(a!)? gradient, *, str tail, str divergence, float beta, float temperature, "
    "bool scale_t2, float alpha, int ignore_index, SymInt vocab_size, str reduction, "
    "bool need_parts) -> (Tensor total, Tensor soft, Tensor hard)"
)


@torch.library.impl(registry.library, "topk_kd_loss_forward", "CompositeExplicitAutograd")
def _topk_kd_loss_forward(
    student_logits: Tensor,
    log_probs: Tensor,
    indices: Tensor,
    labels: Tensor | None,
    token_weight: Tensor | None,
    temperature_per_token: Tensor | None,
    num_items: Tensor | None,
    incoming: Tensor | None,
    gradient: Tensor | None,
    *,
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
) -> tuple[Tensor, Tensor, Tensor]:
    device, tokens = student_logits.device, student_logits.shape[:-1]
    labels, token_weight, temperature_per_token = (
        None if x is None else x.flatten() for x in (labels, token_weight, temperature_per_token)
    )
    log_probs, indices = sorted_by_column(log_probs, indices)
    if values_are_checked(device):
        temperatures = {"temperature": temperature_per_token}
        check_values(labels, temperatures, ignore_index, vocab_size, num_items)
        check_indices(indices, labels, ignore_index, vocab_size)
    rows = registry.select("topk_kd_loss", BACKENDS, student_logits)

    share = token_share(reduction, num_items, labels, ignore_index, tokens, device)
    grad_scale = gradient_scale(share, incoming)
    losses = rows(
        as_rows(student_logits),
        log_probs,
        indices,
        labels,
        token_weight,
        temperature if temperature_per_token is None else temperature_per_token,
        None if grad_scale is None else grad_scale.to(result_dtype(student_logits)),
        None if gradient is None else as_rows(gradient),
        tail=tail,
        divergence=canonical_divergence(divergence, beta),
        beta=beta,
        scale_t2=scale_t2,
        alpha=alpha,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        need_hard=need_parts,
        smallest_bucket=torch.finfo(log_probs.dtype).eps,
    )
    return reduce(losses, share, tokens, need_parts)


@torch.library.register_fake("kdfast::topk_kd_loss_forward", lib=registry.library)
def _(student_logits: Tensor, *args: object, reduction: str, need_parts: bool, **kwargs: object):
    shape = student_logits.shape[:-1] if reduction == "none" else ()
    return reduced_like(student_logits, shape, need_parts)


def topk_kd_loss(
    student_logits: Tensor,
    teacher: TruncatedSoftmax,
    labels: Tensor | None = None,
    *,
    tail: str = "bucket",
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
    overwrite_student_logits: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Distillation loss on the few entries that are kept of a teacher, and on what they leave out.

    With the teacher's p at the columns of its support and q = softmax(s / T) over the vocabulary,
    each token's loss is

        token_weight · (alpha · T² · D(p, q) + (1 − alpha) · CE(softmax(s), label))

    where `tail` says what p and q are in D:

        bucket       p, q on the support, and the rest of each as one more entry: 1 − Σp, 1 − Σq
        renormalize  p / Σp against the full q
        none         p as it is against the full q (Barraza 2019; what `sampled_softmax` needs)
        support      p / Σp against softmax(s / T) over the support alone

    D is KL(p‖q), Σ p · log(p / q); with "bucket" and "support" it may be "reverse_kl" or "jsd" too.
    Only "bucket" has the teacher's own probabilities as its minimum: "renormalize" and "none" push
    all of the student's probability onto the support, and "support" leaves it anywhere between
    (docs/truncated-softmax.md).

    Nothing is lost where Σp or Σq nears 1: 1 − Σp comes from −expm1(log Σp), and 1 − Σq is the sum
    of what lies off the support. Where rounding makes Σp 1 or more the teacher's bucket is 0: it
    contributes nothing to forward KL, and reverse KL takes the rounding of log_probs' dtype for it.
    A support of all columns leaves no bucket on either side.

    Args:
        student_logits: `[..., V]`, float32, bfloat16, float16 or float64. Gradients flow here and
            nowhere else.
        teacher: of `truncated_softmax`, `sampled_softmax` or a cache: `log_probs` and `indices`
            `[..., k]` of the same leading shape, in any order of entries. An index of −1 is an
            entry that does not exist, whatever its log_prob. A token without any is NaN for
            "renormalize" and "support".
        labels: `[...]`, integers. A token labelled `ignore_index` counts for nothing, whatever its
            logits and its teacher hold.
        tail: see above.
        divergence: the soft term, one of those that `tail` has.
        beta: the mixture weight of jsd, in [0, 1].
        temperature: the student's T, a number or one value per token `[...]`. The teacher's was
            chosen when its log_probs were taken, so there is no teacher_temperature here: take the
            same T for both.
        scale_t2: multiply the soft term by T², which keeps its gradients' size independent of T.
        alpha: the soft term's share, in [0, 1]; below 1 it needs labels. The hard term is always
            over the whole vocabulary and at temperature 1.
        ignore_index: the label of tokens that do not count.
        token_weight: `[...]`, multiplies each token's loss; the mean still divides by the number of
            counted tokens.
        vocab_size: the columns that exist. Columns at and beyond it are padding: no probability,
            zero gradient.
        reduction: "mean" over counted tokens, "sum", or "none" for the leading shape.
        num_items: replaces the number of counted tokens as the mean's divisor, for gradient
            accumulation.
        return_parts: return `(total, soft, hard)`; soft is D and hard is CE, reduced like the total
            but without alpha and T², both detached. hard is 0 without labels.
        overwrite_student_logits: let the gradient take the storage of the logits, which are lost: a
            training step then allocates nothing of their size. torch.compile plans memory by itself
            and leaves the logits alone.

    Returns:
        The loss, float32 (float64 for float64 logits): 0-d, or `[...]` for reduction="none". No
        counted token: 0.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected. Indices are
            looked at on the CPU, and on other devices with KDFAST_DEBUG=1.

    Example:
        >>> with torch.no_grad():
        ...     top = kdfast.truncated_softmax(teacher(batch).logits, 64, temperature=2.0)
        >>> loss = kdfast.topk_kd_loss(student_logits, top, labels, temperature=2.0)
        >>> loss.backward()
    """
    check_floating("student_logits", student_logits)
    if student_logits.dim() == 0:
        raise ValueError("student_logits must have a vocabulary dimension, got a 0-d tensor")
    tensors, settings = checked_truncation(
        teacher,
        labels,
        tail,
        vocab_size,
        ("student_logits", student_logits.shape[:-1], student_logits.device),
        (student_logits.shape[-1], "columns"),
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
    check_flag("overwrite_student_logits", overwrite_student_logits)
    overwrite = overwrite_student_logits and not torch.compiler.is_compiling()
    if overwrite:
        check_overwritable(student_logits)

    total, soft, hard = LossWithGradient.apply(
        "topk_kd_loss",
        *distinct(student_logits, *tensors),
        torch.is_grad_enabled() and student_logits.requires_grad,
        overwrite,
        settings,
    )
    return (total, soft, hard) if return_parts else total


def checked_truncation(
    teacher: TruncatedSoftmax,
    labels: Tensor | None,
    tail: str,
    vocab_size: int | None,
    student: tuple[str, torch.Size, torch.device],
    vocabulary: tuple[int, str],
    **keywords: object,
) -> tuple[tuple[Tensor | None, ...], dict[str, object]]:
    """The teacher and the keywords of `topk_kd_loss`, checked, as operators take them.

    Args:
        student: the name, leading shape and device of the tensor that the teacher goes with.
        vocabulary: how many tokens the student has, and what of its tensor they are.

    Returns:
        `(log_probs, indices, labels, token_weight, temperature_per_token, num_items)` and the
        settings by name.
    """
    name, tokens, device = student
    _check_teacher(teacher, name, tokens, device)
    check_choice("tail", tail, TAILS)
    per_token, settings = checked_keywords(
        tokens, device, labels, teacher_temperature=None, **keywords
    )
    if settings["divergence"] not in TAIL_DIVERGENCES[tail]:
        raise ValueError(
            f"divergence must be one of {TAIL_DIVERGENCES[tail]} with tail={tail!r}, "
            f"got {settings['divergence']!r}"
        )
    size, unit = vocabulary
    vocab_size = size if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= size:
        raise ValueError(
            f"vocab_size must be at least 1 and at most the {unit} of {name}, got {vocab_size} for "
            f"{size} {unit}"
        )
    labels, token_weight, temperature_per_token, _, num_items = per_token
    del settings["teacher_temperature"]
    tensors = (*teacher, labels, token_weight, temperature_per_token, num_items)
    return tensors, {**settings, "tail": tail, "vocab_size": vocab_size}


def _check_teacher(
    teacher: TruncatedSoftmax, student: str, tokens: torch.Size, device: torch.device
) -> None:
    if not isinstance(teacher, TruncatedSoftmax):
        raise TypeError(f"teacher must be a TruncatedSoftmax, got {type(teacher).__name__}")
    log_probs, indices = teacher
    check_floating("teacher.log_probs", log_probs)
    check_detached("teacher.log_probs", log_probs)
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int64, torch.int32):
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"teacher.indices must be a tensor of int64 or int32, got {got}")
    if log_probs.dim() == 0 or log_probs.shape[-1] == 0:
        raise ValueError(
            "teacher.log_probs must have a dimension of at least one entry, "
            f"got the shape {tuple(log_probs.shape)}"
        )
    check_shape("teacher.indices", indices, log_probs.shape, "the shape of teacher.log_probs")
    check_shape("teacher.log_probs", log_probs[..., 0], tokens, f"the leading shape of {student}")
    check_same_device("teacher.log_probs", log_probs, device)
    check_same_device("teacher.indices", indices, device)
