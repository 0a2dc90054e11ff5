"""Liger's losses from hidden states whose definition is a divergence of kdfast: its two JSDs."""

import torch
from torch import Tensor, nn

from kdfast.ops.arguments import check_floating, check_number
from kdfast.ops.linear_kd_loss import linear_kd_loss
from kdfast.ops.tokens import checked_labels

# For labels that only say which tokens count.
IGNORED = -100


class LigerFusedLinearJSDLoss(nn.Module):
    """`liger_kernel.chunked_loss.LigerFusedLinearJSDLoss`, computed by `kdfast.linear_kd_loss`.

    With N counted tokens, p the teacher's probabilities and q the student's,

        (weight_hard_loss · Σ CE(softmax(s), label) + weight_soft_loss · Σ JSD(p, q)) / max(N, 1)
        JSD(p, q) = β·KL(p‖m) + (1−β)·KL(q‖m),   m = βp + (1−β)q

    The JSD is at `temperature`, the cross entropy at 1, and there is no T². β = 0 is KL(p‖q), β = 1
    is KL(q‖p). Nothing is shifted. The teacher is a constant: parameters of its head may require
    grad, and get none.

    Liger has logits, and the soft loss on them, in the precision of its inputs; here both are
    float32. Two of its results are not reproduced. A teacher head with more rows than the student's
    is padded to the vocabulary of a larger model: Liger gives the student probability there, with
    logits of 0, and here those rows do not exist. And the soft and hard loss that
    `return_soft_hard_loss` adds are detached here; Liger's have a graph, whose gradient is 0.

    Args:
        weight_hard_loss, weight_soft_loss: at least 0; they need not add up to 1.
        beta: in [0, 1].
        ignore_index: the label of tokens that do not count.
        temperature: above 0.
        compiled: without meaning: nothing here is compiled at run time.
        chunk_size: without meaning: a chunk is as large as KDFAST_CHUNK_BYTES allows.
        return_soft_hard_loss: return `(loss, soft_loss, hard_loss)`, the last two without weights.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Example:
        >>> distill = LigerFusedLinearJSDLoss(temperature=2.0)
        >>> loss = distill(student_hidden, student.weight, teacher_hidden, teacher.weight, labels)
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        check_number("weight_hard_loss", weight_hard_loss, 0)
        check_number("weight_soft_loss", weight_soft_loss, 0)
        check_number("beta", beta, 0, 1)
        check_number("temperature", temperature, 0, open_low=True)
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The loss of `[tokens, H_s]` and `[tokens, H_t]`, float32, 0-d.

        Args:
            student_input, teacher_input: the hidden states. kdfast's own errors call them
                `student_hidden` and `teacher_hidden`.
            student_weight, teacher_weight: `[V, H_s]` and `[V, H_t]`, as in `nn.Linear`.
            true_labels: `[tokens]`, integers, aligned with the rows.
            student_bias, teacher_bias: `[V]`.
        """
        teacher = _constant_teacher(
            student_input, student_weight, teacher_input, teacher_weight, teacher_bias
        )
        rows, teacher_rows = len(student_weight), len(teacher["teacher_weight"])
        if rows > teacher_rows:
            raise ValueError(
                f"student_weight must have at most the {teacher_rows} rows of teacher_weight, "
                f"got {rows}"
            )
        true_labels = checked_labels(
            "true_labels", true_labels, student_input.shape[:-1], student_input.device
        )
        ignore_index = self.ignore_index
        if self.weight_hard_loss == 0 and not self.return_soft_hard_loss:
            true_labels, ignore_index = _counted(true_labels, ignore_index), IGNORED
        weight = self.weight_hard_loss + self.weight_soft_loss
        losses = linear_kd_loss(
            student_input,
            student_weight,
            labels=true_labels,
            student_bias=student_bias,
            **teacher,
            divergence="jsd",
            beta=self.beta,
            temperature=self.temperature,
            scale_t2=False,
            alpha=self.weight_soft_loss / weight if weight > 0 else 1.0,
            ignore_index=ignore_index,
            vocab_size=rows,
            return_parts=self.return_soft_hard_loss,
        )
        if not self.return_soft_hard_loss:
            return losses * weight
        loss, soft_loss, hard_loss = losses
        return loss * weight, soft_loss, hard_loss


class LigerFusedLinearJSD(nn.Module):
    """`liger_kernel.transformers.LigerFusedLinearJSD`, computed by `kdfast.linear_kd_loss`.

    The mean over the counted tokens of

        β·KL(p‖m) + (1−β)·KL(q‖m),   m = βp + (1−β)q

    with both sides at `temperature` and no T²; β = 0 is KL(p‖q), β = 1 is KL(q‖p). The teacher is a
    constant: a weight that requires grad gets none.

    Args:
        jsd_beta: β, in [0, 1].
        ignore_index: the label of tokens that do not count.
        temperature: above 0.
        accum_dtype: without meaning: the weight's gradient is always accumulated in float32, or in
            float64 where that is its own.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Example:
        >>> distill = LigerFusedLinearJSD(jsd_beta=0.1, temperature=2.0)
        >>> loss = distill(student_hidden, student.weight, teacher_hidden, teacher.weight, labels)
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_number("jsd_beta", jsd_beta, 0, 1)
        check_number("temperature", temperature, 0, open_low=True)
        self.jsd_beta = jsd_beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None,
    ) -> Tensor:
        """The loss of `[tokens, H_s]` and `[tokens, H_t]`, float32, 0-d.

        Args:
            student_input, teacher_input: the hidden states. kdfast's own errors call them
                `student_hidden` and `teacher_hidden`.
            student_weight, teacher_weight: `[V, H_s]` and `[V, H_t]`, as in `nn.Linear`.
            shift_labels: `[tokens]`, integers, which say which tokens count and nothing else; None
                counts all.
        """
        teacher = _constant_teacher(student_input, student_weight, teacher_input, teacher_weight)
        rows, teacher_rows = len(student_weight), len(teacher["teacher_weight"])
        if rows != teacher_rows:
            raise ValueError(
                f"teacher_weight must have student_weight's {rows} rows, got {teacher_rows}"
            )
        if shift_labels is not None:
            shift_labels = checked_labels(
                "shift_labels", shift_labels, student_input.shape[:-1], student_input.device
            )
            shift_labels = _counted(shift_labels, self.ignore_index)
        return linear_kd_loss(
            student_input,
            student_weight,
            labels=shift_labels,
            **teacher,
            divergence="jsd",
            beta=self.jsd_beta,
            temperature=self.temperature,
            scale_t2=False,
            ignore_index=IGNORED,
        )


def _constant_teacher(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None = None,
) -> dict[str, Tensor | None]:
    """The teacher's arguments of `linear_kd_loss`; what is wrong is named as Liger names it."""
    tensors = {
        "student_input": student_input,
        "student_weight": student_weight,
        "teacher_input": teacher_input,
        "teacher_weight": teacher_weight,
    }
    for name, tensor in tensors.items():
        check_floating(name, tensor)
    for owner in ("student", "teacher"):
        hidden, weight = tensors[f"{owner}_input"], tensors[f"{owner}_weight"]
        if hidden.dim() < 2 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
            raise ValueError(
                f"{owner}_input must be [tokens, hidden] and {owner}_weight [vocabulary, hidden], "
                f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
            )
    if teacher_input.shape[:-1] != student_input.shape[:-1]:
        raise ValueError(
            f"teacher_input must have the {tuple(student_input.shape[:-1])} tokens of "
            f"student_input, got {tuple(teacher_input.shape[:-1])}"
        )
    if teacher_bias is not None:
        check_floating("teacher_bias", teacher_bias)
        teacher_bias = teacher_bias.detach()
    return {
        "teacher_hidden": teacher_input.detach(),
        "teacher_weight": teacher_weight.detach(),
        "teacher_bias": teacher_bias,
    }


def _counted(labels: Tensor, ignore_index: int) -> Tensor:
    """Labels that say which tokens count, where no hard term takes them for entries."""
    return torch.where(labels == ignore_index, IGNORED, 0)
