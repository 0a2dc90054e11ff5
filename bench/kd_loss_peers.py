"""The members of kd_loss: each maps `(student_logits, teacher_logits, labels)` to the mean over
rows of alpha · T² · D(p, q) + (1 − alpha) · CE(softmax(s), label).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from peers import (
    Case,
    GivenGradients,
    Loss,
    Member,
    imported,
    in_both_kernels,
    in_both_precisions,
    needs_cuda,
    only,
)
from torch import Tensor

import kdfast
from kdfast.ops.kd_loss import BACKENDS

# Rows that torch.compile sees at once where a batch is cut into pieces.
CHUNK_ROWS = 1024


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


def chunked_loss(case: Case) -> Loss:
    """The same lines, compiled for some rows at a time: the temporaries of the others never exist.

    A chunk's gradient is computed with its loss, as libraries' chunked losses do.
    """
    only(case, divergence="forward_kl", alpha=1.0, backward=True)
    compiled = torch.compile(eager_loss(case), dynamic=False)

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        total = student.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(student)
        chunks = (tensor.split(CHUNK_ROWS) for tensor in (student, teacher, labels, gradient))
        for s, t, label, by_logit in zip(*chunks, strict=True):
            s = s.detach().requires_grad_()
            part = compiled(s, t, label) * (len(s) / len(student))
            by_logit.copy_(torch.autograd.grad(part, s)[0])
            total += part.detach()
        return GivenGradients.apply(total, (gradient,), student)

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


def quack_softmax(case: Case) -> Loss:
    """Quack's softmax of one side, forward alone: the bandwidth that a GPU's best kernels reach."""
    needs_cuda(case)
    softmax = imported("quack.softmax", "quack-kernels").softmax
    return lambda student, teacher, labels: softmax(student.detach())


def quack_cross_entropy(case: Case) -> Loss:
    """Quack's cross-entropy and its gradient in one kernel, of the student alone."""
    needs_cuda(case)
    cross_entropy_fwd = imported("quack.cross_entropy", "quack-kernels").cross_entropy_fwd

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return cross_entropy_fwd(student.detach(), labels, return_dx=True)

    return loss


KDFAST = Member("kdfast", kdfast_loss)
OVERWRITING = Member(
    "kdfast overwrite", lambda case: kdfast_loss(case, overwrite=True), overwrites_student=True
)
EAGER = Member("eager", eager_loss)
COMPILED = Member("compile", eager_loss, compiled=True)
COMPILED_CHUNKS = Member("compile chunked", chunked_loss)
BY_HAND = (
    EAGER,
    Member("eager log-target", lambda case: eager_loss(case, log_target=True)),
    COMPILED,
    Member("compile log-target", lambda case: eager_loss(case, log_target=True), compiled=True),
)
SPECULATORS = Member("speculators", speculators_loss)
PEERS = (
    Member("trl", trl_loss, computes_in_input_dtype=True),
    Member("liger chunked", liger_chunked_loss, computes_in_input_dtype=True, compiled=True),
    Member("textbrewer", textbrewer_loss, adds_teacher_entropy=True, computes_in_input_dtype=True),
    Member("liger kl_div", liger_kl_div_loss),
    Member("liger jsd", liger_jsd_loss),
    SPECULATORS,
)
YARDSTICKS = (
    Member("quack softmax", quack_softmax, is_ceiling=True, passes=2),
    Member("quack cross-entropy", quack_cross_entropy, is_ceiling=True, passes=2),
)


def kdfast_members(case: Case) -> tuple[Member, ...]:
    return in_both_kernels(KDFAST, case, BACKENDS)


def members_of(case: Case) -> tuple[Member, ...]:
    """Everyone who takes part in a case; some of the peers twice, as they are and upcast."""
    on_gpu = (COMPILED_CHUNKS, *YARDSTICKS) if case.device == "cuda" else ()
    return (*kdfast_members(case), *BY_HAND, *on_gpu, *in_both_precisions(PEERS, case))


def strongest_of(case: Case) -> tuple[Member, ...]:
    """Those who matter on a GPU's further shapes."""
    return (*kdfast_members(case), EAGER, COMPILED, COMPILED_CHUNKS, SPECULATORS)
