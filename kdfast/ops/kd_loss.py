"""Distillation between two dense sets of logits: `kd_loss`.

Read from the bottom: the public function checks its arguments, the autograd function keeps the
gradient that the forward pass computed, the operator normalises layouts and reduces, and a backend
sweeps the rows.
"""

import functools

import torch
from torch import Tensor

from kdfast import reference
from kdfast.ops import registry
from kdfast.ops.arguments import (
    check_detached,
    check_flag,
    check_floating,
    check_same_device,
    checked_vocab_size,
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
from kdfast.reference import DIVERGENCES, canonical_divergence


def _cpp_rows(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    token_weight: Tensor | None,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    grad_scale: Tensor | None,
    gradient: Tensor | None,
    *,
    divergence: str,
    beta: float,
    scale_t2: bool,
    alpha: float,
    ignore_index: int,
    vocab_size: int,
    need_hard: bool,
) -> Tensor:
    real = torch.float64 if student.dtype == torch.float64 else torch.float32
    rows = student.shape[0] * student.shape[1]
    losses = student.new_empty((3, rows), dtype=real)

    if (teacher.dtype == torch.float64) != (student.dtype == torch.float64):
        teacher = teacher.to(real)
    # The kernel sees addresses, which `tensors` keeps alive until it has returned.
    tensors = Addresses()
    cpp_kernel("kd_loss_rows", real)(
        student=tensors.matrix(student),
        teacher=tensors.matrix(teacher),
        gradient=tensors.matrix(gradient),
        outer_rows=student.shape[0],
        inner_rows=student.shape[1],
        width=student.shape[2],
        vocab_size=vocab_size,
        labels=tensors.per_row(labels, torch.int64),
        ignore_index=ignore_index,
        token_weight=tensors.per_row(token_weight, real),
        temperature=tensors.per_row(temperature, real),
        teacher_temperature=tensors.per_row(teacher_temperature, real),
        grad_scale=tensors.per_row(grad_scale, real),
        losses=losses.data_ptr(),
        divergence=DIVERGENCES.index(divergence),
        beta=beta,
        alpha=alpha,
        scale_t2=scale_t2,
        need_hard=labels is not None and (need_hard or alpha < 1),
    )
    return losses


def _triton_rows(student: Tensor, *args: object, **kwargs: object) -> Tensor:
    from kdfast.kernels.kd_loss import kd_loss_rows

    return kd_loss_rows(student, *args, **kwargs)


@functools.cache
def _cluster_blocks(
    device: int, vocab_size: int, student: str, teacher: str, divergence: int
) -> tuple[int, str]:
    """How many blocks share a row, or 0 and the reason why it has no place on this device."""
    return registry.extension().plan_kd_loss_cluster(
        device, vocab_size, student, teacher, divergence
    )


def _cuda_rows(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    token_weight: Tensor | None,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    grad_scale: Tensor | None,
    gradient: Tensor | None,
    *,
    divergence: str,
    beta: float,
    scale_t2: bool,
    alpha: float,
    ignore_index: int,
    vocab_size: int,
    need_hard: bool,
) -> Tensor:
    if teacher.dtype == torch.float64:
        teacher = teacher.float()
    device, kind = student.get_device(), DIVERGENCES.index(divergence)
    tensors = Addresses()
    student_rows, teacher_rows = tensors.matrix(student), tensors.matrix(teacher)
    blocks, reason = _cluster_blocks(device, vocab_size, student_rows[-1], teacher_rows[-1], kind)
    if blocks == 0:
        if registry.chosen() == "cuda":
            raise RuntimeError(f"kd_loss: the backend 'cuda' cannot serve this call: {reason}")
        return _triton_rows(
            student, teacher, labels, token_weight, temperature, teacher_temperature, grad_scale,
            gradient, divergence=divergence, beta=beta, scale_t2=scale_t2, alpha=alpha,
            ignore_index=ignore_index, vocab_size=vocab_size, need_hard=need_hard,
        )  # fmt: skip

    def row_values(values: float | Tensor | None) -> tuple[int, int, float]:
        """Address and step of one value per row, or without an address the value of all rows."""
        if not isinstance(values, Tensor):
            return 0, 0, 1.0 if values is None else values
        return tensors.contiguous(values, torch.float32), int(values.numel() > 1), 1.0

    rows = student.shape[0] * student.shape[1]
    losses = student.new_empty((3, rows), dtype=torch.float32)
    # The launch is on the current device, whose streams alone it may use.
    with torch.cuda.device_of(student):
        registry.extension().kd_loss_rows_cuda(
            student=student_rows,
            teacher=teacher_rows,
            gradient=tensors.matrix(gradient),
            rows=rows,
            inner_rows=student.shape[1],
            width=student.shape[2],
            vocab_size=vocab_size,
            labels=0 if labels is None else tensors.contiguous(labels, torch.int64),
            ignore_index=ignore_index,
            token_weight=row_values(token_weight),
            temperature=row_values(temperature),
            teacher_temperature=row_values(teacher_temperature),
            grad_scale=row_values(grad_scale),
            losses=losses.data_ptr(),
            divergence=kind,
            beta=beta,
            alpha=alpha,
            scale_t2=scale_t2,
            need_hard=labels is not None and (need_hard or alpha < 1),
            hard_is_soft=not isinstance(temperature, Tensor) and temperature == 1,
            blocks=blocks,
            device=device,
            stream=torch.cuda.current_stream(student.device).cuda_stream,
        )
    return losses


def _torch_rows(
    student: Tensor, teacher: Tensor, *per_row: Tensor | float | None, **options: object
) -> Tensor:
    *per_row, gradient = per_row
    per_row = [in_rows(values, student.shape[:2]) for values in per_row]
    return reference.kd_loss_rows(student, teacher, *per_row, gradient, **options).flatten(1)


BACKENDS = {"cuda": _cuda_rows, "triton": _triton_rows, "cpp": _cpp_rows, "torch": _torch_rows}


registry.library.define(
    "kd_loss_forward(Tensor student_logits, Tensor teacher_logits, Tensor? labels, "
    "Tensor? token_weight, Tensor? temperature_per_token, Tensor? teacher_temperature_per_token, "
    "Tensor? num_items, Tensor? incoming, Tensor(a!)? gradient, *, str divergence, float beta, "
    "float temperature, float teacher_temperature, bool scale_t2, float alpha, int ignore_index, "
    "SymInt vocab_size, str reduction, bool need_parts"
    ") -> (Tensor total, Tensor soft, Tensor hard)"
)


@torch.library.impl(registry.library, "kd_loss_forward", "CompositeExplicitAutograd")
def _kd_loss_forward(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    token_weight: Tensor | None,
    temperature_per_token: Tensor | None,
    teacher_temperature_per_token: Tensor | None,
    num_items: Tensor | None,
    incoming: Tensor | None,
    gradient: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor]:
    device, leading = student_logits.device, student_logits.shape[:-1]
    if values_are_checked(device):
        temperatures = {
            "temperature": temperature_per_token,
            "teacher_temperature": teacher_temperature_per_token,
        }
        check_values(labels, temperatures, ignore_index, vocab_size, num_items)
    rows = registry.select("kd_loss", BACKENDS, student_logits)

    share = token_share(reduction, num_items, labels, ignore_index, leading, device)
    grad_scale = gradient_scale(share, incoming)
    losses = rows(
        as_rows(student_logits),
        as_rows(teacher_logits),
        *(None if x is None else x.flatten() for x in (labels, token_weight)),
        temperature if temperature_per_token is None else temperature_per_token.flatten(),
        teacher_temperature
        if teacher_temperature_per_token is None
        else teacher_temperature_per_token.flatten(),
        None if grad_scale is None else grad_scale.to(result_dtype(student_logits)),
        None if gradient is None else as_rows(gradient),
        divergence=canonical_divergence(divergence, beta),
        beta=beta,
        scale_t2=scale_t2,
        alpha=alpha,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        need_hard=need_parts,
    )
    return reduce(losses, share, leading, need_parts)


@torch.library.register_fake("kdfast::kd_loss_forward", lib=registry.library)
def _(student_logits: Tensor, *args: object, reduction: str, need_parts: bool, **kwargs: object):
    shape = student_logits.shape[:-1] if reduction == "none" else ()
    return reduced_like(student_logits, shape, need_parts)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
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
    overwrite_student_logits: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Distillation loss between two sets of logits, the hard-label term from the same sweep.

    With p = softmax(t / T_t), q = softmax(s / T) over the vocabulary, each token's loss is

        token_weight · (alpha · T² · D(p, q) + (1 − alpha) · CE(softmax(s), label))

    after Hinton et al. 2015, "Distilling the Knowledge in a Neural Network". D is chosen by
    `divergence`:

        forward_kl       KL(p‖q)
        reverse_kl       KL(q‖p)
        jsd              β·KL(p‖m) + (1−β)·KL(q‖m), m = βp + (1−β)q
                         (Agarwal et al. 2024; β = 0 is forward and β = 1 reverse KL)
        skew_forward_kl  KL(p‖βp + (1−β)q)  (Ko et al. 2024, DistiLLM)
        skew_reverse_kl  KL(q‖(1−β)p + βq)
        tvd              ½ Σ |p − q|

    Args:
        student_logits: `[..., V_s]`, float32, bfloat16, float16 or float64. Gradients flow here and
            nowhere else.
        teacher_logits: `[..., V_t]`, the same leading shape and device; its dtype may differ.
        labels: `[...]`, integers. A token labelled `ignore_index` counts for nothing, whatever its
            logits hold.
        divergence: the soft term, see above.
        beta: the mixture weight of jsd and the skewed divergences, in [0, 1].
        temperature: the student's T, a number or one value per token `[...]`.
        teacher_temperature: the teacher's T_t; None takes the student's.
        scale_t2: multiply the soft term by T², which keeps its gradients' size independent of T.
        alpha: the soft term's share, in [0, 1]; below 1 it needs labels. The hard term is always at
            temperature 1.
        ignore_index: the label of tokens that do not count.
        token_weight: `[...]`, multiplies each token's loss; the mean still divides by the number of
            counted tokens.
        vocab_size: the columns that exist. Columns at and beyond it are padding on either side: no
            probability, zero gradient. Needed when V_s and V_t differ.
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
        TypeError, ValueError: naming the argument, what came and what was expected.

    Example:
        >>> loss = kdfast.kd_loss(student_logits, teacher_logits, labels, temperature=2.0)
        >>> loss.backward()
    """
    check_floating("student_logits", student_logits)
    check_floating("teacher_logits", teacher_logits)
    check_detached("teacher_logits", teacher_logits)
    device, tokens = student_logits.device, student_logits.shape[:-1]
    check_same_device("teacher_logits", teacher_logits, device)
    if student_logits.dim() == 0 or teacher_logits.dim() == 0:
        raise ValueError(
            "student_logits and teacher_logits must have a vocabulary dimension, got a 0-d tensor"
        )
    if teacher_logits.shape[:-1] != tokens:
        raise ValueError(
            f"teacher_logits must have the student's leading shape {tuple(tokens)}, "
            f"got {tuple(teacher_logits.shape[:-1])}"
        )
    vocab_size = checked_vocab_size(
        vocab_size,
        student_logits.shape[-1],
        teacher_logits.shape[-1],
        ("student_logits", "teacher_logits"),
        "columns",
    )
    per_token, settings = checked_keywords(
        tokens,
        device,
        labels,
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
    check_flag("overwrite_student_logits", overwrite_student_logits)
    overwrite = overwrite_student_logits and not torch.compiler.is_compiling()
    if overwrite:
        check_overwritable(student_logits)

    total, soft, hard = LossWithGradient.apply(
        "kd_loss",
        *distinct(student_logits, teacher_logits, *per_token),
        torch.is_grad_enabled() and student_logits.requires_grad,
        overwrite,
        {**settings, "vocab_size": vocab_size},
    )
    return (total, soft, hard) if return_parts else total
