"""The members of linear_topk_kd_loss. Each maps `(student_hidden, student_weight, log_probs,
indices, labels)` to the loss that topk_kd_loss_peers defines on the logits hidden Wᵀ.
"""

from dataclasses import dataclass, field

import topk_kd_loss_peers
import torch
import torch.nn.functional as F
from peers import Loss, Member, in_both_precisions
from topk_kd_loss_peers import TopKCase
from torch import Tensor

import kdfast


@dataclass(frozen=True)
class LinearTopKCase(TopKCase):
    """A case whose logits come from hidden states of this width."""

    width: int = field(kw_only=True)

    @property
    def shape(self) -> str:
        return f"{self.rows}×{self.width}×{self.vocab} {self.dtype} k={self.k} {self.tail}"


def kdfast_loss(case: LinearTopKCase, *, sparse: bool = False) -> Loss:
    def loss(
        hidden: Tensor, weight: Tensor, log_probs: Tensor, indices: Tensor, labels: Tensor
    ) -> Tensor:
        return kdfast.linear_topk_kd_loss(
            hidden,
            weight,
            kdfast.TruncatedSoftmax(log_probs, indices),
            tail=case.tail,
            temperature=case.temperature,
            sparse_weight_grad=sparse,
        )

    return loss


def of_logits(case: LinearTopKCase, *, fused: bool) -> Loss:
    """The whole head, then a loss on its logits: kdfast's in their place, or the eager lines."""
    dense_loss = (
        topk_kd_loss_peers.kdfast_loss(case, overwrite=True)
        if fused
        else topk_kd_loss_peers.eager_loss(case)
    )

    def loss(hidden: Tensor, weight: Tensor, *teacher_and_labels: Tensor) -> Tensor:
        return dense_loss(F.linear(hidden, weight), *teacher_and_labels)

    return loss


def gathered_loss(case: LinearTopKCase, *, sparse: bool = False) -> Loss:
    """The rows of the weight that each token needs, and nothing else: for tail="support".

    They are so few that half precision is taken to float32 before the products.
    """
    divergence = topk_kd_loss_peers.truncated_kl(case.tail)
    temperature = case.temperature

    def loss(
        hidden: Tensor, weight: Tensor, log_probs: Tensor, indices: Tensor, labels: Tensor
    ) -> Tensor:
        # (rows, k, width), as an embedding has it: its gradient may be sparse.
        rows = F.embedding(indices, weight, sparse=sparse)
        logits = torch.einsum("nh,nkh->nk", hidden.float(), rows.float())
        return divergence(log_probs, logits / temperature).mean() * temperature**2

    return loss


def bare_products(case: LinearTopKCase) -> Loss:
    """The three matrix products of a step on all logits, with a gradient that is given."""
    gradient = torch.randn(case.rows, case.vocab, dtype=case.torch_dtype, device=case.device)

    @torch.no_grad()
    def products(hidden: Tensor, weight: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return hidden @ weight.T, gradient @ weight, gradient.T @ hidden

    return products


KDFAST = Member("kdfast", kdfast_loss)
SPARSE = Member("kdfast sparse gradient", lambda case: kdfast_loss(case, sparse=True))
FULL_HEAD = Member(
    "full head + topk_kd_loss",
    lambda case: of_logits(case, fused=True),
    computes_in_input_dtype=True,
)
PRODUCTS = Member("bare products", bare_products, is_ceiling=True)
EAGER_HEAD = Member(
    "eager full head",
    lambda case: of_logits(case, fused=False),
    computes_in_input_dtype=True,
)
COMPILED_HEAD = Member(
    "compile full head",
    lambda case: of_logits(case, fused=False),
    computes_in_input_dtype=True,
    compiled=True,
)
GATHERED = (
    Member("eager", gathered_loss),
    Member("eager sparse gradient", lambda case: gathered_loss(case, sparse=True)),
    Member("compile", gathered_loss, compiled=True),
)


def members_of(case: LinearTopKCase) -> tuple[Member, ...]:
    """Everyone who takes part in a case; no library has this loss from hidden states."""
    if case.tail == "support":
        heads = in_both_precisions((FULL_HEAD, EAGER_HEAD), case)
        return (KDFAST, SPARSE, *GATHERED, *heads)
    heads = in_both_precisions((FULL_HEAD, EAGER_HEAD, COMPILED_HEAD), case)
    return (KDFAST, PRODUCTS, *heads)
