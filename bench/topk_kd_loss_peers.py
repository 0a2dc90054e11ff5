"""The members of topk_kd_loss: each maps `(student_logits, log_probs, indices, labels)`, the two in
the middle a teacher's k entries, to the mean over rows of alpha · T² · KL(p‖q) + (1 − alpha) ·
CE(softmax(s), label), with the p and q of the case's tail.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from peers import Absent, Case, Loss, Member, imported, in_both_precisions, only
from torch import Tensor

import kdfast

# Of a teacher's log-probabilities at its support and the student's there, the divergence per token.
Divergence = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TopKCase(Case):
    """A case whose teacher is cut off after k entries."""

    k: int = field(kw_only=True)
    tail: str = "bucket"

    @property
    def shape(self) -> str:
        return f"{super().shape} k={self.k} {self.tail}"


def kdfast_loss(case: TopKCase, *, overwrite: bool = False) -> Loss:
    def loss(student: Tensor, log_probs: Tensor, indices: Tensor, labels: Tensor) -> Tensor:
        return kdfast.topk_kd_loss(
            student,
            kdfast.TruncatedSoftmax(log_probs, indices),
            labels if case.alpha < 1 else None,
            tail=case.tail,
            temperature=case.temperature,
            alpha=case.alpha,
            overwrite_student_logits=overwrite,
        )

    return loss


def _with_bucket(log_probs: Tensor) -> Tensor:
    rest = torch.log1p(-log_probs.exp().sum(-1, keepdim=True))
    return torch.cat([log_probs, rest], -1)


def truncated_kl(tail: str) -> Divergence:
    """Forward KL on what a tail compares, in the lines that its definition asks for."""

    def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
        if tail == "bucket":
            log_p, log_q = _with_bucket(log_p), _with_bucket(log_q)
        if tail in ("renormalize", "support"):
            log_p = log_p.log_softmax(-1)
        if tail == "support":
            log_q = log_q.log_softmax(-1)
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)

    return divergence


def eager_loss(case: TopKCase, *, every_log_probability: bool = True) -> Loss:
    """What people write: the student's log-softmax, its entries at the support, the divergence.

    Half-precision logits are taken to float32 first. Without `every_log_probability` the entries
    are gathered from the logits and normalised by their log-sum-exp, which fewer people write; a
    student that is normalised over the support alone has no use for the others at all.
    """
    temperature, alpha, tail = case.temperature, case.alpha, case.tail
    divergence = truncated_kl(tail)

    def loss(student: Tensor, log_probs: Tensor, indices: Tensor, labels: Tensor) -> Tensor:
        if alpha < 1:
            # Once for both terms, so that their gradients are added before they are rounded.
            student = student.float()
        if tail == "support":
            log_q = student.gather(-1, indices).float() / temperature
        elif every_log_probability:
            log_q = (student.float() / temperature).log_softmax(-1).gather(-1, indices)
        else:
            scaled = student.float() / temperature
            log_q = scaled.gather(-1, indices) - scaled.logsumexp(-1, keepdim=True)
        total = alpha * temperature**2 * divergence(log_probs, log_q).mean()
        if alpha < 1:
            total = total + (1 - alpha) * F.cross_entropy(student, labels)
        return total

    return loss


def trl_loss(case: TopKCase) -> Loss:
    """TRL's loss on the entries that a teacher's server sends, its `loss_add_tail` or without.

    A method that looks at two attributes of its trainer. Temperature and log-softmax stand where
    it is called; it has no T²: a factor on the scalar here.
    """
    only(case, alpha=1.0)
    if case.tail not in ("bucket", "support"):
        raise Absent("serves tail=bucket and tail=support alone")
    module = imported("trl.experimental.server_distillation.server_distillation_trainer", "trl")
    trainer = module.ServerDistillationTrainer
    settings = SimpleNamespace(
        loss_add_tail=case.tail == "bucket",
        _reduce_divergence_loss=trainer._reduce_divergence_loss,
    )
    temperature = case.temperature

    def loss(student: Tensor, log_probs: Tensor, indices: Tensor, labels: Tensor) -> Tensor:
        soft = trainer._compute_server_forward_kl_loss(
            settings,
            {"topk_logprobs": log_probs, "topk_token_ids": indices},
            F.log_softmax(student / temperature, dim=-1),
            labels,
        )
        return soft * temperature**2

    return loss


def distillkit_loss(case: TopKCase) -> Loss:
    """DistillKit's divergence with a sparse teacher, of `[batch, tokens, V]` and summed.

    It has no T² in this function and divides where it is called. Log-probabilities that were taken
    at the temperature of the loss are left as they are.
    """
    only(case, alpha=1.0)
    missing = {"bucket": "SYMMETRIC_UNIFORM", "renormalize": "ZERO"}.get(case.tail)
    if missing is None:
        raise Absent("serves tail=bucket and tail=renormalize alone")
    module = imported("distillkit.lossfuncs.kl", "distillkit")
    temperature = case.temperature

    def loss(student: Tensor, log_probs: Tensor, indices: Tensor, labels: Tensor) -> Tensor:
        total = module.sparse_kl_div(
            student[None],
            indices[None],
            log_probs[None],
            missing=module.MissingProbabilityHandling[missing],
            temperature=temperature,
            target_generation_temperature=temperature,
        )
        return total / student.shape[0] * temperature**2

    return loss


KDFAST = Member("kdfast", kdfast_loss)
OVERWRITING = Member(
    "kdfast overwrite", lambda case: kdfast_loss(case, overwrite=True), overwrites_student=True
)
EAGER = Member("eager", eager_loss)
COMPILED = Member("compile", eager_loss, compiled=True)
BY_LOGSUMEXP = (
    Member("eager logsumexp", lambda case: eager_loss(case, every_log_probability=False)),
    Member(
        "compile logsumexp",
        lambda case: eager_loss(case, every_log_probability=False),
        compiled=True,
    ),
)
PEERS = (
    Member("trl", trl_loss, computes_in_input_dtype=True),
    Member("distillkit", distillkit_loss, computes_in_input_dtype=True),
)


def members_of(case: TopKCase) -> tuple[Member, ...]:
    """Everyone who takes part in a case; some of the peers twice, as they are and upcast."""
    by_hand = (EAGER, COMPILED) if case.tail == "support" else (EAGER, COMPILED, *BY_LOGSUMEXP)
    return (KDFAST, OVERWRITING, *by_hand, *in_both_precisions(PEERS, case))
