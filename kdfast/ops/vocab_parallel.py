"""The vocabulary cut into shards, one per rank: what crosses the wire, and what each rank does.

A rank has the logits of its own columns. Softmax and divergence are sums over all columns, and
three numbers per row and rank make them whole.
"""

from collections.abc import Callable
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast.ops.arguments import checked_vocab_size, values_are_checked
from kdfast.ops.tokens import check_values
from kdfast.reference import divergence_terms

# How many tensors of the logits' size `kd_loss_rows` holds at once besides its arguments.
TEMPORARIES = 8

Prepared = tuple[tuple[Tensor | None, ...], tuple[bool, ...], dict[str, object]]


def agreed(prepare: Callable[[], Prepared], group: "dist.ProcessGroup") -> Prepared:
    """What `prepare` returns on this rank, with its shard's place in the vocabulary.

    Every rank hears of the others' arguments before any goes to work: where one would raise alone
    and leave the others waiting, all of them raise.
    """
    refusal = None
    try:
        tensors, needed, settings = prepare()
        mine = _facts(tensors, needed, settings)
    except (TypeError, ValueError) as error:
        refusal, mine = error, {"refusal": f"{type(error).__name__}: {error}"}
    facts: list[dict] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(facts, mine, group=group)
    if refusal is not None:
        raise refusal
    for rank, theirs in enumerate(facts):
        if "refusal" in theirs:
            raise ValueError(
                f"process_group: rank {rank} refused its arguments: {theirs['refusal']}"
            )
        for name in ("shape", "gradients", "settings"):
            if theirs[name] != mine[name]:
                raise ValueError(
                    f"process_group: all ranks must have the same {name}, "
                    f"got {mine[name]} here and {theirs[name]} on rank {rank}"
                )

    student_sizes, teacher_sizes = (
        [theirs[side] for theirs in facts] for side in ("student", "teacher")
    )
    names = "student_weight of all ranks", "teacher_weight of all ranks"
    vocab_size = checked_vocab_size(
        settings["vocab_size"], sum(student_sizes), sum(teacher_sizes), names, "rows"
    )
    cuts = [
        [min(end, vocab_size) for end in accumulate(sizes)]
        for sizes in (student_sizes, teacher_sizes)
    ]
    if cuts[0] != cuts[1]:
        raise ValueError(
            "process_group: student_weight and teacher_weight must be cut alike, "
            f"got shards of {student_sizes} and {teacher_sizes} rows for vocab_size={vocab_size}"
        )
    for theirs in facts:
        check_values(theirs["labels"], {}, settings["ignore_index"], vocab_size)
    place = {
        "vocab_size": vocab_size,
        "widest_shard": max(student_sizes),
        "vocab_offset": sum(student_sizes[: dist.get_rank(group)]),
        "group": group.group_name,
    }
    return tensors, needed, {**settings, **place}


def _facts(tensors: tuple, needed: tuple[bool, ...], settings: dict[str, object]) -> dict:
    student_hidden, student_weight, _, _, teacher_weight, _, labels, _, *temperatures, _ = tensors
    extremes = None
    if values_are_checked(student_hidden.device):
        names = "temperature", "teacher_temperature"
        check_values(None, dict(zip(names, temperatures, strict=True)), 0, 0)
        if labels is not None and labels.numel() > 0:
            counted = labels[labels != settings["ignore_index"]]
            extremes = torch.stack(counted.aminmax()) if counted.numel() else None
    return {
        "shape": tuple(student_hidden.shape[:-1]),
        "gradients": needed,
        "settings": settings,
        "student": len(student_weight),
        "teacher": len(teacher_weight),
        "labels": extremes,
    }


def _resolved(name: str) -> "dist.ProcessGroup":
    # Imported here: there are builds of torch without it.
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)


def _gathered(numbers: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """`[ranks, ...]`: what every rank has in `numbers`."""
    gathered = numbers.new_empty((dist.get_world_size(group), *numbers.shape))
    dist.all_gather(list(gathered), numbers, group=group)
    return gathered


def kd_loss_rows(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    token_weight: Tensor | None,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    grad_scale: Tensor | None,
    gradient: Tensor | None,
    *,
    divergence: str,
    beta: float,
    scale_t2: bool,
    alpha: float,
    ignore_index: int,
    vocab_size: int,
    need_hard: bool,
    group: str,
    vocab_offset: int,
) -> Tensor:
    """`kdfast.reference.kd_loss_rows` of the whole rows, from one shard of their columns.

    With ℓ the log-sum-exp of a shard's scaled logits and L that of all of them,

        KL(p‖q) = Σ_r exp(ℓ_r(t) − L(t)) · d_r − L(t) + L(s),   d = Σ softmax(t) · (t − s)

    where each rank r knows ℓ_r of either side and d_r: three numbers per row. The reverse KL is the
    same with its sides swapped. The other divergences are no function of such sums: for them ℓ of
    either side is gathered, and then Σ f and Σ g. The hard term adds the label's logit, and at
    another temperature than 1 the log-sum-exp at 1.

    Args:
        student, teacher: `[1, rows, V_r]`, this rank's logits, in the precision of the computation.
        gradient: `[1, rows, V_r]`, written.
        vocab_size: V_r.
        group: the process group's name.
        vocab_offset: the first column of this shard.
        Everything else: as there, the same on every rank.
    """
    group = _resolved(group)
    student, teacher = student[0], teacher[0]
    counted = torch.ones(len(student), dtype=torch.bool, device=student.device)
    if labels is not None:
        counted = labels != ignore_index
        student, teacher = (torch.where(counted[:, None], x, 0) for x in (student, teacher))
    need_hard = labels is not None and (need_hard or alpha < 1)
    hard_is_soft = not isinstance(temperature, Tensor) and temperature == 1
    temperature, teacher_temperature = (
        torch.as_tensor(t, dtype=student.dtype, device=student.device).expand(len(student))
        for t in (temperature, teacher_temperature)
    )

    x, x_lse = _log_softmax(student, temperature)
    y, y_lse = _log_softmax(teacher, teacher_temperature)
    numbers = [x_lse, y_lse]
    if divergence == "forward_kl":
        numbers.append(_mean_difference(y, y_lse, x, x_lse))
    if divergence == "reverse_kl":
        numbers.append(_mean_difference(x, x_lse, y, y_lse))
    if need_hard:
        label = labels.long() - vocab_offset
        here = (label >= 0) & (label < vocab_size)
        h, h_lse = (
            (x, x_lse) if hard_is_soft else _log_softmax(student, torch.ones_like(temperature))
        )
        numbers += [] if hard_is_soft else [h_lse]
        numbers.append(_at(student, label, here))
    shards = _gathered(torch.stack(numbers), group).unbind(1)

    x_whole, y_whole = shards[0].logsumexp(0), shards[1].logsumexp(0)
    log_q = _rebased(x, x_lse, x_whole)
    f, g = divergence_terms(divergence, _rebased(y, y_lse, y_whole), log_q, beta)
    if divergence == "forward_kl":
        soft = _expected(shards[1] - y_whole, shards[2]) - y_whole + x_whole
        g_sum = torch.full_like(soft, -1)
    elif divergence == "reverse_kl":
        soft = g_sum = _expected(shards[0] - x_whole, shards[2]) - x_whole + y_whole
    else:
        sums = torch.stack([f.sum(-1, dtype=torch.float64), g.sum(-1, dtype=torch.float64)])
        soft, g_sum = _gathered(sums, group).sum(0)
    hard = torch.zeros_like(soft)
    if need_hard:
        h_whole = x_whole if hard_is_soft else shards[-2].logsumexp(0)
        hard = h_whole - shards[-1].amax(0)

    weight = counted.to(soft)
    if token_weight is not None:
        weight = torch.where(counted, token_weight.to(soft), 0)
    t2 = temperature.to(soft) ** 2 if scale_t2 else 1
    total = alpha * t2 * soft if alpha > 0 else torch.zeros_like(soft)
    if alpha < 1:
        total = total + (1 - alpha) * hard
    if gradient is not None:
        scale = weight if grad_scale is None else weight * grad_scale
        soft_scale = (alpha * scale * t2 / temperature).to(x)[:, None]
        by_logit = soft_scale * (g - log_q.exp() * g_sum.to(x)[:, None])
        if alpha < 1:
            probability = _rebased(h, h_lse, h_whole).exp()
            rows = here.nonzero().squeeze(1)
            probability[rows, label[rows]] -= 1
            by_logit += ((1 - alpha) * scale).to(x)[:, None] * probability
        gradient[0] = torch.where(counted[:, None], by_logit, 0)
    losses = torch.stack([total, soft, hard])
    return torch.where(counted, weight * losses, 0).to(x)


def _log_softmax(logits: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """The shard's log-softmax at T, and its log-sum-exp in float64; that of nothing is -inf."""
    top = torch.zeros_like(temperature)
    if logits.shape[-1] > 0:
        # A row of -inf keeps its -inf.
        top = logits.amax(-1).clamp_min(torch.finfo(logits.dtype).min)
    scaled = (logits - top[:, None]) / temperature[:, None]
    lse = scaled.logsumexp(-1)
    normalised = scaled - torch.where(lse > -torch.inf, lse, 0)[:, None]
    return normalised, top.double() / temperature.double() + lse


def _mean_difference(own: Tensor, own_lse: Tensor, other: Tensor, other_lse: Tensor) -> Tensor:
    """Σ softmax(own) · (own − other) of the scaled logits, from the shard's normalised ones."""
    share = own.exp()
    mean = (share * torch.where(share > 0, own - other, 0)).sum(-1, dtype=torch.float64)
    own_lse, other_lse = (torch.where(lse > -torch.inf, lse, 0) for lse in (own_lse, other_lse))
    return mean + own_lse - other_lse


def _expected(log_share: Tensor, numbers: Tensor) -> Tensor:
    """Σ over ranks of share · number; a shard without a share says nothing."""
    share = log_share.exp()
    return torch.where(share == 0, 0, share * numbers).sum(0)


def _rebased(log_probability: Tensor, lse: Tensor, whole: Tensor) -> Tensor:
    """A shard's log-probabilities as part of the whole."""
    shift = torch.where(lse > -torch.inf, lse, 0) - whole
    return log_probability + shift.to(log_probability)[:, None]


def _at(logits: Tensor, label: Tensor, here: Tensor) -> Tensor:
    """The label's logit where it is in this shard, -inf elsewhere."""
    if logits.shape[-1] == 0:
        return torch.full_like(label, -torch.inf, dtype=torch.float64)
    value = logits.gather(1, torch.where(here, label, 0)[:, None]).squeeze(1)
    return torch.where(here, value.double(), -torch.inf)


def add_shards_(gradient: Tensor, group: str) -> None:
    """The sum over the ranks of what each one's columns contribute, in place."""
    dist.all_reduce(gradient, group=_resolved(group))
