"""The members of linear_kd_loss. Each maps `(student_hidden, student_weight, teacher_hidden,
teacher_weight, labels)` to the loss that kd_loss_peers defines on the logits hidden Wᵀ.
"""

from dataclasses import dataclass, field

import kd_loss_peers
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
from kdfast.ops.linear_kd_loss import BACKENDS


@dataclass(frozen=True)
class LinearCase(Case):
    """A case whose logits come from hidden states of these widths."""

    student_width: int = field(kw_only=True)
    teacher_width: int = field(kw_only=True)

    @property
    def shape(self) -> str:
        return f"{self.rows}×{self.student_width}/{self.teacher_width}×{self.vocab} {self.dtype}"


def kdfast_loss(case: LinearCase) -> Loss:
    def loss(*inputs: Tensor) -> Tensor:
        *heads, labels = inputs
        return kdfast.linear_kd_loss(
            *heads,
            labels if case.alpha < 1 else None,
            divergence=case.divergence,
            beta=case.beta,
            temperature=case.temperature,
            alpha=case.alpha,
        )

    return loss


def bare_products(case: LinearCase, dtype: torch.dtype | None = None) -> Loss:
    """The four matrix products of a step into fresh outputs, with a gradient that is given.

    In the models' dtype, with its rounding, unless another is asked for; the operands are taken to
    that one within the time.
    """
    dtype = dtype or case.torch_dtype
    gradient = torch.randn(case.rows, case.vocab, dtype=dtype, device=case.device)

    @torch.no_grad()
    def products(*inputs: Tensor) -> tuple[Tensor, ...]:
        student_hidden, student_weight, teacher_hidden, teacher_weight = (
            tensor.to(dtype) for tensor in inputs[:4]
        )
        return (
            student_hidden @ student_weight.T,
            teacher_hidden @ teacher_weight.T,
            gradient @ student_weight,
            gradient.T @ student_hidden,
        )

    return products


def eager_loss(case: LinearCase) -> Loss:
    """A training loop without a fused loss: both models' logits, then kd_loss's eager lines."""
    dense_loss = kd_loss_peers.eager_loss(case)

    def loss(
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor,
    ) -> Tensor:
        return dense_loss(
            F.linear(student_hidden, student_weight),
            F.linear(teacher_hidden, teacher_weight),
            labels,
        )

    return loss


def chunked_loss(case: LinearCase) -> Loss:
    """The same lines, compiled for some rows at a time: the logits of the others never exist.

    A chunk's gradients are computed with its loss, as libraries' chunked losses do.
    """
    only(case, divergence="forward_kl", alpha=1.0)
    compiled = torch.compile(eager_loss(case), dynamic=False)

    def loss(
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor,
    ) -> Tensor:
        total = student_hidden.new_zeros((), dtype=torch.float32)
        by_hidden = torch.empty_like(student_hidden)
        by_weight = torch.zeros_like(student_weight, dtype=torch.float32)
        weight = student_weight.detach().requires_grad_()
        chunks = (
            tensor.split(kd_loss_peers.CHUNK_ROWS)
            for tensor in (student_hidden, teacher_hidden, labels, by_hidden)
        )
        for hidden, of_teacher, label, by_chunk in zip(*chunks, strict=True):
            hidden = hidden.detach().requires_grad_()
            share = len(hidden) / len(student_hidden)
            part = compiled(hidden, weight, of_teacher, teacher_weight, label) * share
            found, of_weight = torch.autograd.grad(part, (hidden, weight))
            by_chunk.copy_(found)
            by_weight += of_weight
            total += part.detach()
        gradients = by_hidden, by_weight.to(student_weight.dtype)
        return GivenGradients.apply(total, gradients, student_hidden, student_weight)

    return loss


def rounded_logits_loss(case: LinearCase) -> Loss:
    """Exact but for logits rounded to the models' dtype: what that alone costs."""
    dense_loss = kd_loss_peers.eager_loss(case)

    def logits(hidden: Tensor, weight: Tensor) -> Tensor:
        exact = F.linear(hidden.float(), weight.float())
        rounded = exact.detach().to(case.torch_dtype).float()
        # The rounded value, with the gradient of the exact one: the difference of two such
        # neighbours is a float32 number.
        return exact + (rounded - exact.detach())

    def loss(
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor,
    ) -> Tensor:
        return dense_loss(
            logits(student_hidden, student_weight), logits(teacher_hidden, teacher_weight), labels
        )

    return loss


def liger_chunked_loss(case: LinearCase) -> Loss:
    """Liger's chunked JSD, forward KL at beta=0, which compiles itself.

    It has no T²: here a part of the soft loss's weight, where it costs nothing.
    """
    only(case, divergence="forward_kl")
    module = imported("liger_kernel.chunked_loss", "liger-kernel")
    return module.LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - case.alpha,
        weight_soft_loss=case.alpha * case.temperature**2,
        beta=0.0,
        temperature=case.temperature,
    )


def liger_fused_loss(case: LinearCase) -> Loss:
    """Liger's JSD in Triton, forward KL at beta=0. It has no T²: a factor on the scalar here."""
    needs_cuda(case)
    only(case, divergence="forward_kl", alpha=1.0)
    module = imported("liger_kernel.transformers", "liger-kernel")
    divergence = module.LigerFusedLinearJSD(jsd_beta=0.0, temperature=case.temperature)

    def loss(*inputs: Tensor) -> Tensor:
        # Its labels say only which tokens count.
        return divergence(*inputs[:4], None) * case.temperature**2

    return loss


def liger_kl_div_loss(case: LinearCase) -> Loss:
    """Liger's KL in Triton with a teacher whose probabilities are given: made within the time.

    It has no T²: a factor on the scalar here.
    """
    needs_cuda(case)
    only(case, divergence="forward_kl", alpha=1.0)
    module = imported("liger_kernel.transformers", "liger-kernel")
    divergence = module.LigerFusedLinearKLDivLoss(temperature=case.temperature)
    temperature = case.temperature

    def loss(
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor,
    ) -> Tensor:
        teacher = F.linear(teacher_hidden, teacher_weight) / temperature
        target = F.softmax(teacher, dim=-1, dtype=torch.float32)
        return divergence(student_hidden, student_weight, target) * temperature**2

    return loss


def cut_cross_entropy(case: LinearCase) -> Loss:
    """The hard term alone, of the student alone, with its gradients: what it holds in memory."""
    needs_cuda(case)
    linear_cross_entropy = imported("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy

    def loss(*inputs: Tensor) -> tuple[Tensor, ...]:
        *leaves, _, _, labels = inputs
        with torch.enable_grad():
            return torch.autograd.grad(linear_cross_entropy(*leaves, labels), leaves)

    return loss


def trl_loss(case: LinearCase) -> Loss:
    """TRL's chunked divergence per token, forward KL at beta=0.

    It has no T²: a factor on the scalar here.
    """
    only(case, divergence="forward_kl", alpha=1.0)
    module = imported("trl.kernels.chunked_divergence", "trl")

    def loss(*inputs: Tensor) -> Tensor:
        # Between the two heads and after them stand their biases.
        per_token, _ = module.ChunkedDivergenceFunction.apply(
            *inputs[:2], None, *inputs[2:4], None, 0.0, case.temperature
        )
        return per_token.mean() * case.temperature**2

    return loss


KDFAST = Member("kdfast", kdfast_loss)
PRODUCTS = Member("bare products", bare_products, is_ceiling=True)
# A CPU's products return the dtype that they take: whoever keeps float32 logits pays for these.
PRODUCTS_FLOAT32 = Member(
    "bare products float32", lambda case: bare_products(case, torch.float32), is_ceiling=True
)
EAGER = Member("eager", eager_loss, computes_in_input_dtype=True)
COMPILED = Member("compile", eager_loss, computes_in_input_dtype=True, compiled=True)
COMPILED_CHUNKS = Member("compile chunked", chunked_loss, computes_in_input_dtype=True)
LIGER = Member("liger chunked", liger_chunked_loss, computes_in_input_dtype=True)
TRL = Member("trl", trl_loss)
PEERS = (
    Member("liger fused", liger_fused_loss),
    Member("liger kl_div", liger_kl_div_loss),
    TRL,
)
CUT = Member("cut-cross-entropy", cut_cross_entropy, is_ceiling=True)


def members_of(case: LinearCase) -> tuple[Member, ...]:
    """Everyone who takes part in a case, the products right after kdfast, whose bound they are."""
    half = case.torch_dtype.itemsize < 4
    ceilings = (PRODUCTS, PRODUCTS_FLOAT32) if half and case.device == "cpu" else (PRODUCTS,)
    rounded = (Member(f"{case.dtype} logits", rounded_logits_loss),) if half else ()
    on_gpu = case.device == "cuda"
    compiled = (COMPILED, COMPILED_CHUNKS) if on_gpu else (COMPILED,)
    others = in_both_precisions((EAGER, *compiled, LIGER), case)
    fused = in_both_kernels(KDFAST, case, BACKENDS)
    cut = (CUT,) if on_gpu else ()
    return (*fused, *ceilings, *others, *PEERS, *rounded, *cut)


def strongest_of(case: LinearCase) -> tuple[Member, ...]:
    """Those who matter on a GPU's further shapes."""
    return (
        *in_both_kernels(KDFAST, case, BACKENDS),
        PRODUCTS,
        *in_both_precisions((EAGER, COMPILED_CHUNKS, LIGER), case),
        TRL,
    )
