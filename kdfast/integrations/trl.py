"""TRL's `generalized_jsd_loss`: the loss of its GKD, GOLD and IW-OPD trainers."""

import torch
from torch import Tensor

from kdfast.ops.arguments import check_floating, check_number
from kdfast.ops.kd_loss import kd_loss
from kdfast.ops.tokens import checked_labels

# What TRL's collators put where a token does not count.
IGNORED = -100

REDUCTIONS = ("batchmean", "sum", "mean")


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: float | Tensor | None = None,
    *,
    logits_are_probs: bool = False,
    top_k: int = 0,
    add_tail: bool = True,
) -> Tensor:
    """The generalised Jensen-Shannon divergence as TRL's trainers call it, in one operation.

    With p = softmax(t / T) and q = softmax(s / T), summed over the counted tokens,

        β·KL(p‖m) + (1−β)·KL(q‖m),   m = βp + (1−β)q

    after Agarwal et al. 2024, "On-Policy Distillation of Language Models", in TRL's direction:
    β = 0 is KL(p‖q) and β = 1 is KL(q‖p). There is no T². The arguments up to `num_items_in_batch`
    are those of `GKDTrainer.generalized_jsd_loss`; the ones after it belong to GOLD and IW-OPD,
    which pass them by keyword.

    Two things differ. TRL computes in the logits' own precision and returns a loss of it; this one
    computes in float32. And the mean of no counted token at all is 0 here, NaN there.

    Args:
        student_logits: `[..., tokens, V]`, float32, bfloat16, float16 or float64. Nothing is
            shifted: TRL's trainers do that before the call.
        teacher_logits: the same shape, without grad.
        labels: `[..., tokens]`, integers. They say which tokens count, those that are not −100, and
            nothing else. None counts all.
        beta: in [0, 1].
        temperature: of both sides, above 0.
        reduction: what the sum is divided by: "batchmean" by the counted tokens, or without labels
            by the size of the first dimension; "mean" by counted tokens times V; "sum" by 1.
        num_items_in_batch: the divisor, whatever `reduction` says.
        logits_are_probs: GOLD's, for its cross-tokenizer loss: not served.
        top_k: IW-OPD's. Not served where it is smaller than V: `kdfast.topk_kd_loss` compares a few
            entries.
        add_tail: IW-OPD's, without meaning where `top_k` leaves nothing out.

    Returns:
        The loss, 0-d, float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Example:
        >>> class FusedGKDTrainer(GKDTrainer):
        ...     generalized_jsd_loss = staticmethod(kdfast.integrations.trl.generalized_jsd_loss)
    """
    check_floating("student_logits", student_logits)
    check_floating("teacher_logits", teacher_logits)
    if student_logits.dim() < 2 or teacher_logits.shape != student_logits.shape:
        raise ValueError(
            "student_logits and teacher_logits must have one shape [..., tokens, vocabulary], "
            f"got {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    *tokens, vocab_size = student_logits.shape
    if logits_are_probs:
        raise ValueError("logits_are_probs=True is not served: pass logits, as GKDTrainer does")
    if 0 < top_k < vocab_size:
        raise ValueError(
            f"top_k must be 0, or at least the vocabulary of {vocab_size}, got {top_k}: "
            "kdfast.topk_kd_loss compares a few entries of the teacher"
        )
    if num_items_in_batch is None and reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction must be one of {REDUCTIONS}, got {reduction!r}: no value per entry of the "
            "vocabulary exists here. kdfast.kd_loss(..., reduction='none') gives one per token"
        )
    if num_items_in_batch is not None and not isinstance(num_items_in_batch, Tensor):
        check_number("num_items_in_batch", num_items_in_batch, 0, open_low=True)
    if labels is not None:
        labels = checked_labels("labels", labels, tuple(tokens), student_logits.device)
        # There is no hard term, so a label need not be an entry of the vocabulary.
        labels = torch.where(labels == IGNORED, IGNORED, 0)

    divisor = num_items_in_batch
    if divisor is None and reduction == "mean":
        # Of the divergence's entries, as many per token as there are in the vocabulary.
        counted = None if labels is None else (labels != IGNORED).sum()
        divisor = max(1, student_logits.numel()) if counted is None else counted * vocab_size
    elif divisor is None and reduction == "batchmean" and labels is None:
        divisor = max(1, student_logits.shape[0])
    return kd_loss(
        student_logits,
        teacher_logits,
        labels,
        divergence="jsd",
        beta=beta,
        temperature=temperature,
        scale_t2=False,
        ignore_index=IGNORED,
        reduction="sum" if divisor is None and reduction == "sum" else "mean",
        num_items=divisor,
    )
