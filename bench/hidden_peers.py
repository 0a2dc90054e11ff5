"""The members of hidden_mse and hidden_cosine. Each maps `(student, teacher, mask, weight, bias)`,
without the last two where nothing is projected, to the mean of the loss over the tokens that count.
`mask` says which do in a case that is masked; otherwise all do.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peers import Absent, Loss, Member, imported, in_both_precisions
from torch import Tensor

import kdfast


@dataclass(frozen=True)
class HiddenCase:
    """What every member of a group computes, and on what. Widths that differ are projected."""

    operation: str
    rows: int
    student_width: int
    teacher_width: int
    dtype: str
    device: str = "cpu"
    masked: bool = False

    @property
    def projected(self) -> bool:
        return self.student_width != self.teacher_width

    @property
    def shape(self) -> str:
        widths = f"{self.student_width}" + (f"→{self.teacher_width}" if self.projected else "")
        return f"{self.rows}×{widths} {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def kdfast_loss(case: HiddenCase) -> Loss:
    def loss(
        student: Tensor,
        teacher: Tensor,
        mask: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        counted = mask if case.masked else None
        if case.operation == "hidden_cosine":
            return kdfast.hidden_cosine(student, teacher, mask=counted)
        return kdfast.hidden_mse(student, teacher, weight=weight, bias=bias, mask=counted)

    return loss


def _of_projected(case: HiddenCase, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """What people write: the tokens that count, projected, then a loss of the two."""

    def loss(
        student: Tensor,
        teacher: Tensor,
        mask: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        if case.masked:
            student, teacher = student[mask], teacher[mask]
        if weight is not None:
            student = F.linear(student, weight, bias)
        return loss_of(student, teacher)

    return loss


def _cosine_embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    return F.cosine_embedding_loss(student, teacher, student.new_ones(len(student)))


def eager_loss(case: HiddenCase) -> Loss:
    cosine = case.operation == "hidden_cosine"
    return _of_projected(case, _cosine_embedding_loss if cosine else F.mse_loss)


def textbrewer_loss(case: HiddenCase) -> Loss:
    """TextBrewer's losses behind its `proj`, a linear layer of the distiller."""
    losses = imported("textbrewer.losses", "textbrewer")
    if case.operation == "hidden_cosine":
        if case.masked:
            raise Absent("its cosine does not run with a mask")
        return _of_projected(case, losses.cos_loss)

    def loss(
        student: Tensor,
        teacher: Tensor,
        mask: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        if weight is not None:
            student = F.linear(student, weight, bias)
        return losses.hid_mse_loss(student, teacher, mask if case.masked else None)

    return loss


def bare_products(case: HiddenCase, dtype: torch.dtype | None = None) -> Loss:
    """The three matrix products of a step into fresh outputs, with a gradient that is given.

    In the models' dtype, with its rounding, unless another is asked for; the operands are taken to
    that one within the time. Of the tokens that count alone.
    """
    dtype = dtype or case.torch_dtype
    gradient = torch.randn(case.rows, case.teacher_width, dtype=dtype, device=case.device)

    @torch.no_grad()
    def products(
        student: Tensor, teacher: Tensor, mask: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, ...]:
        student, weight = student.to(dtype), weight.to(dtype)
        given = gradient
        if case.masked:
            student, given = student[mask], gradient[mask]
        return student @ weight.T, given @ weight, given.T @ student

    return products


KDFAST = Member("kdfast", kdfast_loss)
PRODUCTS = Member("bare products", bare_products, is_ceiling=True)
# A CPU's products return the dtype that they take: whoever keeps a float32 difference pays for
# these.
PRODUCTS_FLOAT32 = Member(
    "bare products float32", lambda case: bare_products(case, torch.float32), is_ceiling=True
)
EAGER = Member("eager", eager_loss, computes_in_input_dtype=True)
COMPILED = Member("compile", eager_loss, computes_in_input_dtype=True, compiled=True)
TEXTBREWER = Member("textbrewer", textbrewer_loss, computes_in_input_dtype=True)


def members_of(case: HiddenCase) -> tuple[Member, ...]:
    """Everyone who takes part in a case, the products right after kdfast, whose bound they are."""
    half = case.torch_dtype.itemsize < 4
    ceilings = ()
    if case.projected:
        ceilings = (PRODUCTS, PRODUCTS_FLOAT32) if half and case.device == "cpu" else (PRODUCTS,)
    return (KDFAST, *ceilings, *in_both_precisions((EAGER, COMPILED, TEXTBREWER), case))
