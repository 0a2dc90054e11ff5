"""Every operation in plain PyTorch: the executable specification.

Nothing here is fast, and everything here may be differentiated: the fused backends are tested
against these functions in float64, and a device that no fused backend serves is served by them.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")


def canonical_divergence(divergence: str, beta: float) -> str:
    """What `divergence` is at this `beta`: a mixture that holds one side alone makes a plain KL."""
    endpoints = {
        ("jsd", 0.0): "forward_kl",
        ("jsd", 1.0): "reverse_kl",
        ("skew_forward_kl", 0.0): "forward_kl",
        ("skew_reverse_kl", 0.0): "reverse_kl",
    }
    # A share that float32 cannot hold is none.
    beta = 0.0 if beta < torch.finfo(torch.float32).tiny else float(beta)
    return endpoints.get((divergence, beta), divergence)


def _weighted(weight: Tensor, log_ratio: Tensor) -> Tensor:
    """weight · log_ratio, with 0 · inf = 0 in the value and in the gradient."""
    return weight * torch.where(weight > 0, log_ratio, 0.0)


def divergence_terms(
    divergence: str, log_p: Tensor, log_q: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Per entry, f(log p, log q) and g = q · ∂f/∂q.

    The divergence of a token is Σ f, and its gradient with respect to the student's scaled logits
    is g − q · Σ g. That does not see a constant in ∂f/∂q: it is chosen so that ∂f/∂q vanishes where
    p does (reverse KL's is unbounded there), which keeps the gradient from being the small
    difference of large terms.

    Args:
        divergence: one of `DIVERGENCES`.
        log_p: teacher log-probabilities, `[..., V]`.
        log_q: student log-probabilities, `[..., V]`.
        beta: the mixture weight of jsd and the skewed divergences.
    """
    p, q = log_p.exp(), log_q.exp()
    divergence = canonical_divergence(divergence, beta)
    if divergence == "forward_kl":
        return _weighted(p, log_p - log_q), -p
    if divergence == "reverse_kl":
        f = _weighted(q, log_q - log_p)
        return f, f
    if divergence == "tvd":
        return 0.5 * (p - q).abs(), -q * ((p > q).to(q) + 0.5 * (p == q))
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {DIVERGENCES}, got {divergence!r}")

    teacher_share = 1 - beta if divergence == "skew_reverse_kl" else beta
    student_share = 1 - teacher_share
    mixture = teacher_share * p + student_share * q
    mixture = torch.where(mixture == 0, 1.0, mixture)
    log_mixture = mixture.log()
    # log(student_share · q / mixture). Below the smallest normal number q is nothing: p / q would
    # overflow.
    counts = q >= torch.finfo(q.dtype).tiny
    log_part = -torch.where(counts, teacher_share * p / (student_share * q), 0.0).log1p()
    from_p = _weighted(p, log_p - log_mixture)
    from_q = _weighted(q, log_q - log_mixture)
    if divergence == "jsd":
        return teacher_share * from_p + student_share * from_q, student_share * q * log_part
    if divergence == "skew_forward_kl":
        return from_p, -student_share * p * q / mixture
    return from_q, q * (log_part + teacher_share * p / mixture)


def _widest(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.device.type in ("cpu", "cuda") else torch.float32


def _scaled(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """(logits − max) / temperature."""
    # The maximum is subtracted before the division: logits / T rounds by ulp(max / T), which a
    # small T makes large.
    if isinstance(temperature, Tensor):
        temperature = temperature.to(logits.dtype).unsqueeze(-1)
    return (logits - logits.detach().amax(-1, keepdim=True)) / temperature


def _log_softmax(logits: Tensor, temperature: float | Tensor) -> Tensor:
    return _scaled(logits, temperature).log_softmax(-1)


def _loss_rows(
    soft_term: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    student_logits: Tensor,
    labels: Tensor | None,
    token_weight: Tensor | None,
    temperature: float | Tensor,
    grad_scale: Tensor | None,
    gradient: Tensor | None,
    *,
    scale_t2: bool,
    alpha: float,
    ignore_index: int,
    vocab_size: int | None,
    need_hard: bool,
) -> Tensor:
    """What a soft term becomes: `[3, ...]`, and the gradient where there is a buffer for it.

    `soft_term` maps the student's logits `[..., V]` and which tokens count `[...]` to the term per
    token and its gradient with respect to the logits divided by the temperature.
    """
    width = student_logits.shape[-1]
    vocab_size = width if vocab_size is None else vocab_size
    real = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    counted = torch.ones(student_logits.shape[:-1], dtype=torch.bool, device=student_logits.device)
    if labels is not None:
        counted = labels != ignore_index
    # Ignored rows may hold NaN: they are emptied before anything is computed, so that no 0 · NaN
    # survives.
    student = torch.where(counted.unsqueeze(-1), student_logits[..., :vocab_size].to(real), 0.0)
    weight = (
        counted.to(real)
        if token_weight is None
        else torch.where(counted, token_weight.to(real), 0.0)
    )
    t2 = temperature**2 if scale_t2 else 1.0

    soft, by_scaled_logit = soft_term(student, counted)
    soft = torch.where(counted, soft, 0.0)
    total = alpha * t2 * soft if alpha > 0 else torch.zeros_like(soft)
    hard = torch.zeros_like(soft)
    need_hard = labels is not None and (need_hard or alpha < 1)
    if need_hard:
        hard_log_q = _log_softmax(student, 1.0)
        target = torch.where(counted, labels, 0).long().unsqueeze(-1)
        hard = torch.where(counted, -hard_log_q.gather(-1, target).squeeze(-1), 0.0)
        if alpha < 1:
            total = total + (1 - alpha) * hard

    if gradient is not None:
        with torch.no_grad():
            scale = weight if grad_scale is None else weight * grad_scale
            soft_scale = alpha * scale * t2 / temperature
            by_logit = torch.zeros_like(student)
            if alpha > 0:
                by_logit = soft_scale.unsqueeze(-1) * by_scaled_logit
            if need_hard and alpha < 1:
                by_label = hard_log_q.exp().scatter_add(
                    -1, target, torch.full_like(target, -1, dtype=real)
                )
                by_logit = by_logit + ((1 - alpha) * scale).unsqueeze(-1) * by_label
            gradient.zero_()
            gradient[..., :vocab_size] = torch.where(counted.unsqueeze(-1), by_logit, 0.0)
    return torch.stack([torch.where(counted, weight * total, 0.0), weight * soft, weight * hard])


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """softcap(scale · (hidden Wᵀ + bias)), the logits whose `kd_loss_rows` is `linear_kd_loss`.

    Args:
        hidden: `[..., H]`; weight: `[V, H]`; bias: `[V]`. In float32, or float64 for float64.
        softcap: c of c · tanh(x / c), or None.
    """
    real = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.to(real) @ weight.to(real).T
    if bias is not None:
        logits = logits + bias.to(real)
    logits = scale * logits
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def kd_loss_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    token_weight: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    grad_scale: Tensor | None = None,
    gradient: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    scale_t2: bool = True,
    alpha: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    need_hard: bool = True,
) -> Tensor:
    """The distillation loss of each token, and on request its gradient.

    This is the contract of every backend of `kd_loss`. total = weight · (alpha · T² · soft + (1 −
    alpha) · hard).

    Args:
        student_logits: `[..., V_s]`, any floating dtype; computed in float32, or float64 for
            float64.
        teacher_logits: `[..., V_t]`.
        labels: `[...]` integers, or None. A token labelled `ignore_index` has no loss and no
            gradient.
        token_weight: `[...]`, or None for 1.
        temperature, teacher_temperature: a number, or a tensor `[...]`.
        grad_scale: a tensor that broadcasts to `[...]` and multiplies the gradient before it is
            rounded.
        gradient: `[..., V_s]`, filled with ∂ Σ (grad_scale · total) / ∂ student_logits; None to
            leave it out. It may be `student_logits` itself.
        vocab_size: the columns that exist; the others have no probability and a zero gradient.
        need_hard: whether the hard term is wanted although alpha is 1.

    Returns:
        `[3, ...]`: total, soft and hard per token.
    """
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature

    def soft_term(student: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        # Ignored rows may hold NaN on this side too.
        teacher = teacher_logits[..., : student.shape[-1]].to(student.dtype)
        teacher = torch.where(counted.unsqueeze(-1), teacher, 0.0)
        log_q = _log_softmax(student, temperature)
        log_p = _log_softmax(teacher, teacher_temperature)
        f, g = divergence_terms(divergence, log_p, log_q, beta)
        return f.sum(-1), g - log_q.exp() * g.sum(-1, keepdim=True)

    return _loss_rows(
        soft_term,
        student_logits,
        labels,
        token_weight,
        temperature,
        grad_scale,
        gradient,
        scale_t2=scale_t2,
        alpha=alpha,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        need_hard=need_hard,
    )


TAILS = ("bucket", "renormalize", "none", "support")

# Off the support the full student has probability and a teacher that is cut off has none: only
# forward KL, which asks for q where p is, is finite there.
TAIL_DIVERGENCES = {
    "bucket": ("forward_kl", "reverse_kl", "jsd"),
    "renormalize": ("forward_kl",),
    "none": ("forward_kl",),
    "support": ("forward_kl", "reverse_kl", "jsd"),
}


def truncated_softmax_rows(
    logits: Tensor, k: int, temperature: float | Tensor = 1.0, *, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest log-probabilities of the full softmax, and where they stand.

    This is the contract of every backend of `truncated_softmax`.

    Args:
        logits: `[..., V]`, any floating dtype; computed in float32, or float64 for float64.
        k: how many; at most the columns that exist.
        temperature: a number, or a tensor `[...]`.
        vocab_size: the columns that exist.

    Returns:
        `[..., k]` log-probabilities, largest first, and `[..., k]` int64 indices; of equal logits
        the one with the lower index comes first. A row that has no softmax (it holds NaN or +inf,
        or -inf alone) has log-probabilities of NaN and the indices 0 … k − 1.
    """
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logits = logits[..., :vocab_size].to(real)
    log_p = _log_softmax(logits, temperature)
    indices = logits.argsort(dim=-1, descending=True, stable=True)[..., :k]
    first = torch.arange(k, device=logits.device)
    indices = torch.where(log_p[..., :1].isnan(), first, indices)
    return log_p.gather(-1, indices), indices


def topk_kd_loss_rows(
    student_logits: Tensor,
    log_probs: Tensor,
    indices: Tensor,
    labels: Tensor | None = None,
    token_weight: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    grad_scale: Tensor | None = None,
    gradient: Tensor | None = None,
    *,
    tail: str = "bucket",
    divergence: str = "forward_kl",
    beta: float = 0.5,
    scale_t2: bool = True,
    alpha: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    need_hard: bool = True,
    smallest_bucket: float = torch.finfo(torch.float32).eps,
) -> Tensor:
    """The distillation loss of each token on a truncated teacher, and on request its gradient.

    This is the contract of every backend of `topk_kd_loss`; what is not said here is as in
    `kd_loss_rows`.

    Args:
        student_logits: `[..., V]`.
        log_probs: `[..., k]`, the teacher's log-probabilities at the columns of its support.
        indices: `[..., k]` int64, the columns, ascending and distinct; below 0 for an entry that
            does not exist, whatever its log-probability holds.
        tail: one of `TAILS`.
        divergence: one of `TAIL_DIVERGENCES[tail]`.
        smallest_bucket: what reverse KL takes for the teacher's bucket where rounding left it
            nothing: the size of that rounding.

    Returns:
        `[3, ...]`: total, soft and hard per token.
    """

    def soft_term(student: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        vocab = student.shape[-1]
        # An entry that does not exist stands in a column behind the last, which nobody has.
        listed = (indices >= 0) & counted.unsqueeze(-1)
        column = torch.where(listed, indices, vocab)
        # What Σp leaves of 1 is a difference: the few entries are computed in the widest type.
        log_p = torch.where(listed, log_probs.to(_widest(student)), -torch.inf)
        log_mass = log_p.logsumexp(-1, keepdim=True)
        looked_at = torch.cat([student, torch.full_like(student[..., :1], -torch.inf)], -1)
        if tail == "support":
            entries = _scaled(looked_at.gather(-1, column), temperature).to(log_p.dtype)
        else:
            # What lies off the support is one entry more.
            scaled = _scaled(looked_at, temperature)
            outside = scaled.scatter(-1, column, -torch.inf)
            entries = torch.cat([scaled.gather(-1, column), outside.logsumexp(-1, True)], -1)
            entries = entries.to(log_p.dtype)
        log_q = entries.log_softmax(-1)

        if tail in ("renormalize", "support"):
            log_p = log_p - log_mass
        if tail == "bucket":
            # log(1 − Σp). What rounding makes 1 or more leaves nothing, and so does a support that
            # leaves no column, or none that the student has: what is left of the teacher there may
            # be rounding too.
            rest = -log_mass.expm1()
            rounded = rest <= indices.shape[-1] * smallest_bucket
            rounded &= entries[..., -1:] == -torch.inf
            nothing = (log_mass >= 0) | (listed.sum(-1, keepdim=True) == vocab) | rounded
            log_rest = torch.where(nothing, 1.0, rest).log()
            nothing_of = math.log(smallest_bucket) if divergence == "reverse_kl" else -torch.inf
            log_p = torch.cat([log_p, torch.where(nothing, nothing_of, log_rest)], -1)
        elif tail != "support":
            log_p = torch.cat([log_p, torch.full_like(log_mass, -torch.inf)], -1)

        f, g = divergence_terms(divergence, log_p, log_q, beta)
        by_entry = (g - log_q.exp() * g.sum(-1, keepdim=True)).to(student.dtype)
        if tail == "support":
            by_column = student.new_zeros(*student.shape[:-1], vocab + 1)
        else:
            # Each column takes its part of what is asked of all; of no columns none does.
            parts = torch.where(outside == -torch.inf, 0.0, outside.softmax(-1))
            by_column = parts * by_entry[..., -1:]
        by_column = by_column.scatter(-1, column, by_entry[..., : column.shape[-1]])
        # 0 · log Z: the loss of a student that holds NaN is NaN, whatever the teacher lists.
        soft = f.sum(-1) + 0 * entries.logsumexp(-1)
        return soft.to(student.dtype), by_column[..., :vocab]

    return _loss_rows(
        soft_term,
        student_logits,
        labels,
        token_weight,
        temperature,
        grad_scale,
        gradient,
        scale_t2=scale_t2,
        alpha=alpha,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        need_hard=need_hard,
    )


def attention_mse_sums(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    head_map: Tensor | None = None,
    *,
    causal: bool = False,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
) -> Tensor:
    """Σ E² over the counted cells of each sample, E = a_s · Q_s K_sᵀ − a_t · Q_t K_tᵀ.

    This is the contract of every backend of `attention_mse`. It builds both maps whole, as nothing
    else does.

    Args:
        student_query: `[B, H_s, S, d_s]`, any floating dtype; computed in float32, or float64 for
            float64.
        student_key: `[B, G_s, S, d_s]`; query head h takes key head ⌊h · G_s / H_s⌋.
        teacher_query, teacher_key: `[B, H_t, S, d_t]`, `[B, G_t, S, d_t]`.
        key_mask, query_mask: `[B, S]`, bool. A cell counts if its query and its key do, whatever
            the others hold.
        head_map: `[H_s, H_t]`; the map of student head h is compared with Σ_j head_map[h, j] times
            the teacher's of head j. None compares head h with head h.
        causal: a cell counts if its key does not stand behind its query.
        student_scale, teacher_scale: a_s, a_t; None for d_s^-½, d_t^-½.

    Returns:
        `[B]`.
    """
    real = torch.float64 if student_query.dtype == torch.float64 else torch.float32

    def scores(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
        # A row that does not count may hold NaN: it is emptied, so that no 0 · NaN survives.
        if query_mask is not None:
            query = torch.where(query_mask[:, None, :, None], query, 0)
        if key_mask is not None:
            key = torch.where(key_mask[:, None, :, None], key, 0)
        key = key.to(real).repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        return (query.shape[-1] ** -0.5 if scale is None else scale) * (query.to(real) @ key.mT)

    student = scores(student_query, student_key, student_scale)
    teacher = scores(teacher_query, teacher_key, teacher_scale)
    if head_map is not None:
        teacher = torch.einsum("hj,bjqk->bhqk", head_map.to(real), teacher)
    squares = (student - teacher).square()
    # Where a row is empty on both sides, its cells are 0 already.
    return (squares.tril() if causal else squares).sum((1, 2, 3))


# The least norm of a vector that a cosine divides by, as in nn.functional.cosine_similarity.
COSINE_EPS = 1e-8


def hidden_mse_rows(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The squared error of each token's hidden states, averaged over the features.

    This is the contract of `hidden_mse`.

    Args:
        student: `[..., D_s]`, any floating dtype; computed in float32, or float64 for float64.
        teacher: `[..., D_t]`.
        weight: `[D_t, D_s]` and bias: `[D_t]`, of the projection student Wᵀ + bias; None for none.
        mask: `[...]` bool. A token that is False has no loss and no gradient, whatever it holds.
    """
    real = torch.float64 if student.dtype == torch.float64 else torch.float32
    student, teacher = _counted(student.to(real), mask), _counted(teacher.to(real), mask)
    if weight is not None:
        student = head_logits(student, weight, bias)
    losses = (student - teacher).square().mean(-1)
    return losses if mask is None else torch.where(mask, losses, 0.0)


def hidden_cosine_rows(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """One minus the cosine between each token's hidden states.

    This is the contract of `hidden_cosine`: 1 − s·t / (max(‖s‖, ε) · max(‖t‖, ε)), ε = COSINE_EPS.

    Args:
        student, teacher: `[..., D]`, any floating dtype; computed in float32, or float64 for
            float64.
        mask: `[...]` bool. A token that is False has no loss and no gradient, whatever it holds.
    """
    real = torch.float64 if student.dtype == torch.float64 else torch.float32
    student, teacher = _counted(student.to(real), mask), _counted(teacher.to(real), mask)
    norms = (
        torch.linalg.vector_norm(side, dim=-1).clamp_min(COSINE_EPS) for side in (student, teacher)
    )
    losses = 1 - (student * teacher).sum(-1) / math.prod(norms)
    return losses if mask is None else torch.where(mask, losses, 0.0)


def _counted(states: Tensor, mask: Tensor | None) -> Tensor:
    # A token that does not count may hold NaN, which no 0 · NaN may carry into a gradient.
    return states if mask is None else torch.where(mask.unsqueeze(-1), states, 0.0)
