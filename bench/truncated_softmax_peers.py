"""The members of truncated_softmax: each maps `(logits,)` to the k largest log-probabilities of
softmax(logits), the largest first, and to their columns, `(rows, k)` each.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from peers import Case, Member, in_both_precisions
from torch import Tensor

import kdfast

Selection = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TruncatedCase(Case):
    """A case that keeps k entries of a row, at the temperature that people leave out."""

    k: int = field(kw_only=True)
    temperature: float = 1.0

    @property
    def shape(self) -> str:
        return f"{super().shape} k={self.k}"


def kdfast_selection(case: TruncatedCase) -> Selection:
    return lambda logits: kdfast.truncated_softmax(logits, case.k)


def eager_selection(case: TruncatedCase) -> Selection:
    """The two calls that scripts for a teacher's outputs contain: every log-probability, then k."""
    return lambda logits: logits.log_softmax(-1).topk(case.k)


def logsumexp_selection(case: TruncatedCase) -> Selection:
    """The same without every log-probability: k logits, and the sum that makes them of them."""

    def select(logits: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = logits.topk(case.k)
        return values - logits.logsumexp(-1, keepdim=True), indices

    return select


def bare_topk(case: TruncatedCase) -> Selection:
    return lambda logits: torch.topk(logits, case.k)


KDFAST = Member("kdfast", kdfast_selection)
TOPK = Member("torch.topk alone", bare_topk, is_ceiling=True)
BY_HAND = (
    Member("eager", eager_selection, computes_in_input_dtype=True),
    Member("eager logsumexp", logsumexp_selection, computes_in_input_dtype=True),
    Member("compile", eager_selection, computes_in_input_dtype=True, compiled=True),
    Member("compile logsumexp", logsumexp_selection, computes_in_input_dtype=True, compiled=True),
)


def members_of(case: TruncatedCase) -> tuple[Member, ...]:
    """Everyone who takes part in a case; no library selects and normalises in one operation."""
    return (KDFAST, TOPK, *in_both_precisions(BY_HAND, case))
