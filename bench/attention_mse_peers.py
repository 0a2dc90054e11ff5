"""The members of attention_mse: each maps `(student_query, student_key, teacher_query, teacher_key,
mask)` to the mean squared difference of the two models' scores before the softmax. `mask` says
which tokens count.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peers import Absent, Loss, Member, imported, in_both_precisions, only
from torch import Tensor

import kdfast

# What TinyBERT adds to the scores of keys that do not count, and from where on it takes a score for
# one of them.
PADDING, PADDED_FROM = -10000.0, -1e2


@dataclass(frozen=True)
class AttentionCase:
    """What every member of a group computes, and on what.

    With `padded`, the mean is TinyBERT's: keys that do not count are left out of the sum, and not
    of the divisor.
    """

    batch: int
    heads: int
    tokens: int
    width: int
    teacher_width: int
    dtype: str
    device: str = "cpu"
    causal: bool = False
    padded: bool = False

    @property
    def shape(self) -> str:
        widths = f"{self.width}"
        if self.teacher_width != self.width:
            widths += f"/{self.teacher_width}"
        return f"{self.batch}×{self.heads}×{self.tokens}×{widths} {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def kdfast_loss(case: AttentionCase, *, method: str = "auto") -> Loss:
    def loss(*inputs: Tensor) -> Tensor:
        *tensors, mask = inputs
        return kdfast.attention_mse(
            *tensors,
            key_mask=mask if case.padded else None,
            causal=case.causal,
            reduction="tinybert" if case.padded else "mean",
            method=method,
        )

    return loss


def _scores(query: Tensor, key: Tensor) -> Tensor:
    return torch.matmul(query, key.transpose(-1, -2)) / query.shape[-1] ** 0.5


def eager_loss(case: AttentionCase) -> Loss:
    """What people write: both maps of scores, and their mean squared error."""
    only(case, padded=False)

    def loss(
        student_query: Tensor,
        student_key: Tensor,
        teacher_query: Tensor,
        teacher_key: Tensor,
        mask: Tensor,
    ) -> Tensor:
        student = _scores(student_query, student_key)
        teacher = _scores(teacher_query, teacher_key)
        if not case.causal:
            return F.mse_loss(student, teacher)
        sum_of_squares = F.mse_loss(student.tril(), teacher.tril(), reduction="sum")
        maps, length = student.shape[:2].numel(), student.shape[-1]
        return sum_of_squares / (maps * length * (length + 1) // 2)

    return loss


def tinybert_loss(case: AttentionCase) -> Loss:
    """TinyBERT's: scores with the mask added, those that it made small set to 0, and their MSE."""
    only(case, causal=False)

    def compared(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
        scores = _scores(query, key)
        if case.padded:
            scores = scores + (1.0 - mask[:, None, None, :].to(scores.dtype)) * PADDING
        return torch.where(scores <= PADDED_FROM, torch.zeros_like(scores), scores)

    def loss(
        student_query: Tensor,
        student_key: Tensor,
        teacher_query: Tensor,
        teacher_key: Tensor,
        mask: Tensor,
    ) -> Tensor:
        return F.mse_loss(
            compared(student_query, student_key, mask), compared(teacher_query, teacher_key, mask)
        )

    return loss


def textbrewer_loss(case: AttentionCase) -> Loss:
    """TextBrewer's, on maps of scores and a mask for queries and keys.

    Without a mask it would set every score of -0.001 or below to 0.
    """
    if case.causal or case.padded:
        raise Absent("its masks leave out whole tokens, on both sides")
    att_mse_loss = imported("textbrewer.losses", "textbrewer").att_mse_loss

    def loss(
        student_query: Tensor,
        student_key: Tensor,
        teacher_query: Tensor,
        teacher_key: Tensor,
        mask: Tensor,
    ) -> Tensor:
        return att_mse_loss(
            _scores(student_query, student_key), _scores(teacher_query, teacher_key), mask
        )

    return loss


KDFAST = Member("kdfast", kdfast_loss)
METHODS = tuple(
    Member(f"kdfast {method}", lambda case, method=method: kdfast_loss(case, method=method))
    for method in ("gram", "tiled")
)
EAGER = Member("eager", eager_loss, computes_in_input_dtype=True)
COMPILED = Member("compile", eager_loss, compiled=True, computes_in_input_dtype=True)
PEERS = (
    Member("tinybert", tinybert_loss, computes_in_input_dtype=True),
    Member("textbrewer", textbrewer_loss, computes_in_input_dtype=True),
)


def members_of(case: AttentionCase) -> tuple[Member, ...]:
    """Everyone who takes part in a case; those that round half precision also upcast."""
    return (KDFAST, *METHODS, *in_both_precisions((EAGER, COMPILED, *PEERS), case))
