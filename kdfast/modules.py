"""The operations as modules: settings at construction, tensors at the call."""

import inspect

import torch.distributed as dist
from torch import Tensor, nn

from kdfast.ops.attention_mse import attention_mse
from kdfast.ops.hidden import hidden_cosine, hidden_mse
from kdfast.ops.kd_loss import kd_loss
from kdfast.ops.linear_kd_loss import linear_kd_loss
from kdfast.ops.linear_topk_kd_loss import linear_topk_kd_loss
from kdfast.ops.topk_kd_loss import topk_kd_loss
from kdfast.ops.truncated_softmax import TruncatedSoftmax


class _Settings(nn.Module):
    """What an operation is called with, kept as attributes of the keywords' names."""

    _names: tuple[str, ...]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # A class that somebody derives has the settings of the one here.
        if cls.__module__ == __name__:
            cls._names = tuple(inspect.signature(cls.__init__).parameters)[1:]

    def settings(self) -> dict[str, object]:
        """The keywords that the function is called with."""
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())


class KDLoss(_Settings):
    """`kdfast.kd_loss` as a module; every keyword means what it means there.

    Example:
        >>> distill = kdfast.KDLoss(temperature=2.0, alpha=0.5)
        >>> loss = distill(student_logits, teacher_logits, labels)
    """

    def __init__(
        self,
        *,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        temperature: float | Tensor = 1.0,
        teacher_temperature: float | Tensor | None = None,
        scale_t2: bool = True,
        alpha: float = 1.0,
        ignore_index: int = -100,
        vocab_size: int | None = None,
        reduction: str = "mean",
        return_parts: bool = False,
        overwrite_student_logits: bool = False,
    ) -> None:
        super().__init__()
        self.divergence = divergence
        self.beta = beta
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature
        self.scale_t2 = scale_t2
        self.alpha = alpha
        self.ignore_index = ignore_index
        self.vocab_size = vocab_size
        self.reduction = reduction
        self.return_parts = return_parts
        self.overwrite_student_logits = overwrite_student_logits

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        token_weight: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        return kd_loss(
            student_logits,
            teacher_logits,
            labels,
            token_weight=token_weight,
            num_items=num_items,
            **self.settings(),
        )


class LinearKDLoss(_Settings):
    """`kdfast.linear_kd_loss` as a module; every keyword means what it means there.

    Example:
        >>> distill = kdfast.LinearKDLoss(temperature=2.0, alpha=0.5)
        >>> loss = distill(
        ...     student_hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight
        ... )
    """

    def __init__(
        self,
        *,
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
        vocab_size: int | None = None,
        reduction: str = "mean",
        return_parts: bool = False,
    ) -> None:
        super().__init__()
        self.student_logit_scale = student_logit_scale
        self.teacher_logit_scale = teacher_logit_scale
        self.student_softcap = student_softcap
        self.teacher_softcap = teacher_softcap
        self.chunk_size = chunk_size
        self.process_group = process_group
        self.divergence = divergence
        self.beta = beta
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature
        self.scale_t2 = scale_t2
        self.alpha = alpha
        self.ignore_index = ignore_index
        self.vocab_size = vocab_size
        self.reduction = reduction
        self.return_parts = return_parts

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        token_weight: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        return linear_kd_loss(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            token_weight=token_weight,
            num_items=num_items,
            **self.settings(),
        )


class TopKKDLoss(_Settings):
    """`kdfast.topk_kd_loss` as a module; every keyword means what it means there.

    Example:
        >>> distill = kdfast.TopKKDLoss(temperature=2.0, alpha=0.5)
        >>> loss = distill(student_logits, kdfast.truncated_softmax(t, 64, temperature=2.0), labels)
    """

    def __init__(
        self,
        *,
        tail: str = "bucket",
        divergence: str = "forward_kl",
        beta: float = 0.5,
        temperature: float | Tensor = 1.0,
        scale_t2: bool = True,
        alpha: float = 1.0,
        ignore_index: int = -100,
        vocab_size: int | None = None,
        reduction: str = "mean",
        return_parts: bool = False,
        overwrite_student_logits: bool = False,
    ) -> None:
        super().__init__()
        self.tail = tail
        self.divergence = divergence
        self.beta = beta
        self.temperature = temperature
        self.scale_t2 = scale_t2
        self.alpha = alpha
        self.ignore_index = ignore_index
        self.vocab_size = vocab_size
        self.reduction = reduction
        self.return_parts = return_parts
        self.overwrite_student_logits = overwrite_student_logits

    def forward(
        self,
        student_logits: Tensor,
        teacher: TruncatedSoftmax,
        labels: Tensor | None = None,
        *,
        token_weight: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        return topk_kd_loss(
            student_logits,
            teacher,
            labels,
            token_weight=token_weight,
            num_items=num_items,
            **self.settings(),
        )


class LinearTopKKDLoss(_Settings):
    """`kdfast.linear_topk_kd_loss` as a module; every keyword means what it means there.

    Example:
        >>> distill = kdfast.LinearTopKKDLoss(tail="support", temperature=2.0)
        >>> loss = distill(student_hidden, student.lm_head.weight, top)
    """

    def __init__(
        self,
        *,
        tail: str = "bucket",
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
        vocab_size: int | None = None,
        reduction: str = "mean",
        return_parts: bool = False,
    ) -> None:
        super().__init__()
        self.tail = tail
        self.student_logit_scale = student_logit_scale
        self.student_softcap = student_softcap
        self.chunk_size = chunk_size
        self.sparse_weight_grad = sparse_weight_grad
        self.divergence = divergence
        self.beta = beta
        self.temperature = temperature
        self.scale_t2 = scale_t2
        self.alpha = alpha
        self.ignore_index = ignore_index
        self.vocab_size = vocab_size
        self.reduction = reduction
        self.return_parts = return_parts

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher: TruncatedSoftmax,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        token_weight: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        return linear_topk_kd_loss(
            student_hidden,
            student_weight,
            teacher,
            labels,
            student_bias=student_bias,
            token_weight=token_weight,
            num_items=num_items,
            **self.settings(),
        )


class HiddenMSE(_Settings):
    """`kdfast.hidden_mse` as a module; every keyword means what it means there.

    The projection is an argument of the call: an `nn.Linear` of the student's own trains with it.

    Example:
        >>> match = kdfast.HiddenMSE()
        >>> loss = match(student_hidden, teacher_hidden, weight=projection.weight)
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        return hidden_mse(student, teacher, weight=weight, bias=bias, mask=mask, **self.settings())


class HiddenCosine(_Settings):
    """`kdfast.hidden_cosine` as a module; every keyword means what it means there.

    Example:
        >>> match = kdfast.HiddenCosine()
        >>> loss = match(student_hidden, teacher_hidden, mask=attention_mask.bool())
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return hidden_cosine(student, teacher, mask=mask, **self.settings())


class AttentionMSE(_Settings):
    """`kdfast.attention_mse` as a module; every keyword means what it means there.

    `head_map` moves with the module, and is not part of its state.

    Example:
        >>> compare = kdfast.AttentionMSE(reduction="tinybert")
        >>> loss = compare(q_student, k_student, q_teacher, k_teacher, key_mask=mask)
    """

    def __init__(
        self,
        *,
        causal: bool = False,
        student_scale: float | None = None,
        teacher_scale: float | None = None,
        head_map: Tensor | None = None,
        reduction: str = "mean",
        method: str = "auto",
    ) -> None:
        super().__init__()
        self.causal = causal
        self.student_scale = student_scale
        self.teacher_scale = teacher_scale
        self.register_buffer("head_map", head_map, persistent=False)
        self.reduction = reduction
        self.method = method

    def forward(
        self,
        student_query: Tensor,
        student_key: Tensor,
        teacher_query: Tensor,
        teacher_key: Tensor,
        *,
        key_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
    ) -> Tensor:
        return attention_mse(
            student_query,
            student_key,
            teacher_query,
            teacher_key,
            key_mask=key_mask,
            query_mask=query_mask,
            **self.settings(),
        )
