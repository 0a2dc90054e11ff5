"""The members of kd_loss: each maps `(student_logits, teacher_logits, labels)` to the mean over
rows of alpha · T² · D(p, q) + (1 − alpha) · CE(softmax(s), label).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from peers import Case, Loss, Member, imported, in_both_precisions, needs_cuda, only
from torch import Tensor

import kdfast


def kdfast_loss(case: Case, *, overwrite: bool = False) -> Loss:
    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return kdfast.kd_loss(
            student,
            teacher,
            labels if case.alpha < 1 else None,
            divergence=case.divergence,
            beta=case.beta,
            temperature=case.temperature,
            alpha=case.alpha,
            overwrite_student_logits=overwrite,
        )

    return loss


def eager_loss(case: Case, *, log_target: bool = False) -> Loss:
    """The lines that torch's documentation of KLDivLoss, DistilBERT and most trainers contain.

    Half-precision logits are taken to float32 first: without that the gradient is off by percents.
    `log_target` passes the teacher's log-probabilities instead, which fewer people write.
    """
    only(case, divergence="forward_kl")
    temperature, alpha = case.temperature, case.alpha
    teacher_side = F.log_softmax if log_target else F.softmax

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        soft = F.kl_div(
            F.log_softmax(student.float() / temperature, dim=-1),
            teacher_side(teacher.float() / temperature, dim=-1),
            reduction="batchmean",
            log_target=log_target,
        )
        total = alpha * temperature**2 * soft
        if alpha < 1:
            total = total + (1 - alpha) * F.cross_entropy(student.float(), labels)
        return total

    return loss


def trl_loss(case: Case) -> Loss:
    """TRL's generalised JSD, forward KL at beta=0. It has no T²: a factor on the scalar here."""
    only(case, divergence="forward_kl", alpha=1.0)
    trainer = imported("trl.experimental.gkd.gkd_trainer", "trl").GKDTrainer
    temperature = case.temperature

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        divergence = trainer.generalized_jsd_loss(
            student, teacher, beta=0.0, temperature=temperature
        )
        return divergence * temperature**2

    return loss


def liger_chunked_loss(case: Case) -> Loss:
    """The inner function of Liger's chunked distillation, which Liger compiles by default.

    Liger applies the temperature to the logits before this function and divides its sum by the
    number of tokens after it, as is done here; T² it does not have.
    """
    only(case, divergence="forward_kl", alpha=1.0)
    function = imported("liger_kernel.chunked_loss.jsd_loss", "liger-kernel")
    divergence_sum = function.LigerFusedLinearJSDFunction.distillation_loss_fn
    temperature = case.temperature

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        total = divergence_sum(student / temperature, teacher / temperature, beta=0.0)
        return total / student.shape[0] * temperature**2

    return loss


def textbrewer_loss(case: Case) -> Loss:
    """TextBrewer's soft cross-entropy; it has no T²."""
    only(case, divergence="forward_kl", alpha=1.0)
    kd_ce_loss = imported("textbrewer.losses", "textbrewer").kd_ce_loss
    temperature = case.temperature

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return kd_ce_loss(student, teacher, temperature) * temperature**2

    return loss


def liger_kl_div_loss(case: Case) -> Loss:
    """Liger's Triton KL takes log-probabilities: temperature and softmax are the caller's."""
    needs_cuda(case)
    only(case, divergence="forward_kl", alpha=1.0)
    module = imported("liger_kernel.transformers", "liger-kernel")
    kl_div = module.LigerKLDIVLoss(reduction="batchmean", log_target=True)
    return _of_log_probabilities(case, kl_div)


def liger_jsd_loss(case: Case) -> Loss:
    """Liger's Triton JSD, forward KL at beta=0, from log-probabilities too."""
    needs_cuda(case)
    only(case, divergence="forward_kl", alpha=1.0)
    module = imported("liger_kernel.transformers", "liger-kernel")
    return _of_log_probabilities(case, module.LigerJSD(beta=0.0))


def _of_log_probabilities(case: Case, divergence: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    temperature = case.temperature

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        log_q = F.log_softmax(student / temperature, dim=-1, dtype=torch.float32)
        log_p = F.log_softmax(teacher / temperature, dim=-1, dtype=torch.float32)
        return divergence(log_q, log_p) * temperature**2

    return loss


def speculators_loss(case: Case) -> Loss:
    """speculators' Triton KL of `[batch, tokens, V]`, per token and without a temperature."""
    needs_cuda(case)
    only(case, divergence="forward_kl", alpha=1.0)
    kl_div = imported("speculators.losses.fused", "speculators").fused_kl_div_loss
    temperature = case.temperature

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        per_token = kl_div((student / temperature)[None], (teacher / temperature)[None])
        return per_token.mean() * temperature**2

    return loss


KDFAST = Member("kdfast", kdfast_loss)
OVERWRITING = Member(
    "kdfast overwrite", lambda case: kdfast_loss(case, overwrite=True), overwrites_student=True
)
BY_HAND = (
    Member("eager", eager_loss),
    Member("eager log-target", lambda case: eager_loss(case, log_target=True)),
    Member("compile", eager_loss, compiled=True),
    Member("compile log-target", lambda case: eager_loss(case, log_target=True), compiled=True),
)
PEERS = (
    Member("trl", trl_loss, computes_in_input_dtype=True),
    Member("liger chunked", liger_chunked_loss, computes_in_input_dtype=True, compiled=True),
    Member("textbrewer", textbrewer_loss, adds_teacher_entropy=True, computes_in_input_dtype=True),
    Member("liger kl_div", liger_kl_div_loss),
    Member("liger jsd", liger_jsd_loss),
    Member("speculators", speculators_loss),
)


def members_of(case: Case) -> tuple[Member, ...]:
    """Everyone who takes part in a case; some of the peers twice, as they are and upcast."""
    return (KDFAST, *BY_HAND, *in_both_precisions(PEERS, case))
