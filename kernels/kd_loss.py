"""Distillation between dense logits: one kernel for the six divergences of `kd_loss`.

A divergence is its two terms, `divergence_terms`; docs/math.md derives them. The sweeps over a row,
the columns that do not exist, the hard term and the scaling are written once.
"""

import torch
import triton
import triton.language as tl
from kdfast.kernels.primitives import (
    LN_2,
    LOG2_E,
    LOWEST,
    block_columns,
    head_columns,
    load_block,
    log2_one_plus,
    rebase_dot,
    row_phase,
    store_block,
    vector_columns,
    zero_columns,
)
from kdfast.kernels.tuning import KD_LOSS, row_launch
from torch import Tensor

# In bits: float32 does not see a probability beside another that is 2**WIDEST times larger.
WIDEST = tl.constexpr(120.0)


@triton.jit
def log2_parts(gap):
    """log2 of 1 / (1 + 2**gap) and of 2**gap / (1 + 2**gap), each to its last digits."""
    gap = tl.maximum(gap, -WIDEST)
    # NaN: both sides are -inf, and neither has weight.
    gap = tl.where(gap < WIDEST, gap, WIDEST)
    log2_whole = log2_one_plus(tl.exp2(-tl.abs(gap)))
    return -tl.maximum(gap, 0.0) - log2_whole, tl.minimum(gap, 0.0) - log2_whole


@triton.jit
def divergence_terms(p, q, gap, beta, DIVERGENCE: tl.constexpr):
    """f and g = q · ∂f/∂q per column, g up to a multiple of q; gap = log2(q / p).

    The divergence is Σ f, and its gradient in the student's scaled logits g − q · Σ g. Of the g
    that serve, these vanish where q is far above p: a student who is sure loses no digits there.
    """
    if DIVERGENCE == "tvd":
        return 0.5 * tl.abs(p - q), tl.where(q > p, 0.0, tl.where(q < p, -q, -0.5 * q))
    # Without weight there is no term, however large its logarithm: 0 * inf = 0.
    if DIVERGENCE == "forward_kl":
        return p * tl.where(p > 0, -gap, 0.0) * LN_2, -p
    if DIVERGENCE == "reverse_kl":
        f = q * tl.where(q > 0, gap, 0.0) * LN_2
        return f, f

    # By the parts of the mixture m = teacher_share · p + student_share · q: their logarithms come
    # without log m, which would lose the digits that log(p / m) is made of. Those of the shares are
    # taken alike, so that log(p / m) = 0 where p = q.
    teacher_share = 1 - beta if DIVERGENCE == "skew_reverse_kl" else beta
    student_share = 1 - teacher_share
    shares_gap = tl.log2(student_share) - tl.log2(teacher_share)
    log2_teacher_share, log2_student_share = log2_parts(shares_gap)
    log2_p_part, log2_q_part = log2_parts(gap + shares_gap)
    log2_p_over_m = log2_p_part - log2_teacher_share
    log2_q_over_m = log2_q_part - log2_student_share
    if DIVERGENCE == "jsd":
        f_p = p * log2_p_over_m * (teacher_share * LN_2)
        f_q = q * log2_q_over_m * (student_share * LN_2)
        return f_p + f_q, q * log2_q_part * (student_share * LN_2)
    if DIVERGENCE == "skew_forward_kl":
        return p * log2_p_over_m * LN_2, -p * tl.exp2(log2_q_part)
    if DIVERGENCE == "skew_reverse_kl":
        g = q * (log2_q_part * LN_2 + tl.exp2(log2_p_part))
        return q * log2_q_over_m * LN_2, g


@triton.jit
def join_sums(student_sum, teacher_sum):
    """Σ exp of both sides over all lanes, and log2 of the teacher's by the student's.

    A divergence near 0 is the small difference of large logarithms, so their ratio is what must be
    exact: it is taken from the difference of the sums, which are joined in float64.
    """
    s_sum = tl.sum(student_sum.to(tl.float64), axis=0)
    t_sum = tl.sum(teacher_sum.to(tl.float64), axis=0)
    excess = tl.abs(t_sum - s_sum).to(tl.float32)
    t_larger = t_sum > s_sum
    s_sum = s_sum.to(tl.float32)
    t_sum = t_sum.to(tl.float32)
    excess = tl.div_rn(excess, tl.minimum(s_sum, t_sum))
    log2_ratio = tl.where(excess < 1, log2_one_plus(excess), tl.log2(1 + excess))
    return s_sum, t_sum, tl.where(t_larger, log2_ratio, -log2_ratio)


@triton.jit
def load_pair(
    student_row,
    teacher_row,
    start,
    head,
    interior,
    vocab,
    VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr,
    EDGE: tl.constexpr,
    SKEWED: tl.constexpr,
    TEACHER_ALIGNED: tl.constexpr,
    BACKWARD: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """A block of both rows, its columns, and which of them exist."""
    columns, inside = block_columns(
        start, head, interior, vocab, VECTOR, BLOCK_V, EDGE, SKEWED, BACKWARD
    )
    ALIGNED: tl.constexpr = not (EDGE and SKEWED)
    student = load_block(student_row, columns, inside, VECTOR, EDGE, ALIGNED, EVICTION)
    BOTH_ALIGNED: tl.constexpr = ALIGNED and TEACHER_ALIGNED
    teacher = load_block(teacher_row, columns, inside, VECTOR, EDGE, BOTH_ALIGNED, EVICTION)
    return student, teacher, columns, inside


# None of these changes the code, so none of them compiles it anew.
RUNTIME_ARGUMENTS = [
    "inner",
    "student_outer_stride",
    "student_inner_stride",
    "teacher_outer_stride",
    "teacher_inner_stride",
    "gradient_outer_stride",
    "gradient_inner_stride",
    "grad_scale_stride",
    "rows",
    "width",
    "ignore_index",
]


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def kd_loss_kernel(
    student_ptr,  # (outer, inner, width)
    teacher_ptr,  # (outer, inner, at least vocab)
    gradient_ptr,  # (outer, inner, width), or None; may be student_ptr
    losses_ptr,  # (3, rows): total, soft and hard
    labels_ptr,  # (rows,), or None
    token_weight_ptr,  # (rows,), or None
    grad_scale_ptr,  # (rows,) or (1,), or None
    temperature_ptr,  # (rows,), or None for `temperature`
    teacher_temperature_ptr,  # (rows,), or None for `teacher_temperature`
    temperature,
    teacher_temperature,
    inner,
    student_outer_stride,
    student_inner_stride,
    teacher_outer_stride,
    teacher_inner_stride,
    gradient_outer_stride,
    gradient_inner_stride,
    grad_scale_stride,
    rows,
    vocab,
    width,
    ignore_index,
    beta,
    alpha,
    DIVERGENCE: tl.constexpr,
    SCALE_T2: tl.constexpr,
    HARD: tl.constexpr,
    TEMPERED: tl.constexpr,
    SKEWED: tl.constexpr,
    TEACHER_ALIGNED: tl.constexpr,
    GRADIENT_ALIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """total = weight · (alpha · T² · Σ f + (1 − alpha) · hard), and its gradient in the student.

    One program per row, which it sweeps up to three times:

    1. for max and Σ exp of both sides; for forward_kl and reverse_kl with the dot product
       Σ exp(t) · (t − s), which makes the loss;
    2. for Σ f and Σ g of the other divergences;
    3. for g − q · Σ g, if a gradient is wanted. Σ g is −1 for forward_kl and Σ f for reverse_kl.

    Traffic: one read of both rows and one write of the gradient, while L2 holds the row pairs of
    all programs that run; the later sweeps read from there. Each walks the interior against the
    direction of the one before, to begin with what was read last: of rows that are too large, a
    part is still there.
    """
    LANES: tl.constexpr = BLOCK_V // VECTOR
    GRADIENT: tl.constexpr = gradient_ptr is not None
    ONE_SWEEP: tl.constexpr = DIVERGENCE == "forward_kl" or DIVERGENCE == "reverse_kl"
    # The hard term has exponentials of its own unless the temperature is 1 for every row.
    HARD_EXP: tl.constexpr = HARD and TEMPERED
    # A block that will be read again is kept in L2 before one that will not.
    FIRST_READ: tl.constexpr = "evict_first" if ONE_SWEEP and not GRADIENT else "evict_last"
    SECOND_READ: tl.constexpr = "evict_last" if GRADIENT else "evict_first"

    # int64: rows * vocab passes 2**31 at 16k tokens x 128k vocabulary.
    row = tl.program_id(0).to(tl.int64)
    outer_row = row // inner
    inner_row = row % inner
    student_row = student_ptr + outer_row * student_outer_stride + inner_row * student_inner_stride
    teacher_row = teacher_ptr + outer_row * teacher_outer_stride + inner_row * teacher_inner_stride
    if GRADIENT:
        gradient_row = gradient_ptr + outer_row * gradient_outer_stride
        gradient_row += inner_row * gradient_inner_stride

    if labels_ptr is not None:
        label = tl.load(labels_ptr + row).to(tl.int64)
        if label == ignore_index:
            tl.store(losses_ptr + row, 0.0)
            tl.store(losses_ptr + rows + row, 0.0)
            tl.store(losses_ptr + 2 * rows + row, 0.0)
            if GRADIENT:
                zero_columns(gradient_row, 0, width, VECTOR, BLOCK_V)
            return
    if HARD:
        # Read before the gradient overwrites it. A label outside the vocabulary makes its row NaN.
        exists = (label >= 0) & (label < vocab)
        label_logit = tl.load(student_row + label, mask=exists, other=float("nan")).to(tl.float32)
        label = label.to(tl.int32)

    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row).to(tl.float32)
    if teacher_temperature_ptr is not None:
        teacher_temperature = tl.load(teacher_temperature_ptr + row).to(tl.float32)
    student_scale = tl.div_rn(LOG2_E, temperature)
    teacher_scale = tl.div_rn(LOG2_E, teacher_temperature)
    head = head_columns(student_row, vocab, VECTOR, SKEWED)
    interior = (vocab - head) // BLOCK_V * BLOCK_V

    student_max = tl.full([LANES], LOWEST, tl.float32)
    teacher_max = tl.full([LANES], LOWEST, tl.float32)
    student_sum = tl.zeros([LANES], tl.float32)
    teacher_sum = tl.zeros([LANES], tl.float32)
    hard_sum = tl.zeros([LANES], tl.float32)
    dot = tl.zeros([LANES], tl.float32)
    for EDGE in tl.static_range(2):
        for start in range(0, vocab - interior if EDGE else interior, BLOCK_V):
            student, teacher, columns, inside = load_pair(
                student_row, teacher_row, start, head, interior, vocab,
                VECTOR, BLOCK_V, EDGE, SKEWED, TEACHER_ALIGNED, False, FIRST_READ,
            )  # fmt: skip
            new_student_max = tl.maximum(student_max, tl.max(student, axis=1))
            new_teacher_max = tl.maximum(teacher_max, tl.max(teacher, axis=1))
            # The maximum goes before the scaling, whose product a low temperature makes large.
            s = (student - new_student_max[:, None]) * student_scale
            t = (teacher - new_teacher_max[:, None]) * teacher_scale
            student_shift = (student_max - new_student_max) * student_scale
            teacher_shift = (teacher_max - new_teacher_max) * teacher_scale
            student_exp = tl.exp2(s)
            teacher_exp = tl.exp2(t)

            # exp > 0: a logit of -inf contributes 0, not 0 * inf.
            if DIVERGENCE == "forward_kl":
                terms = tl.where(teacher_exp > 0, teacher_exp * (t - s), 0.0)
                dot = rebase_dot(dot, teacher_sum, teacher_shift, student_shift)
                dot += tl.sum(terms, axis=1)
            if DIVERGENCE == "reverse_kl":
                terms = tl.where(student_exp > 0, student_exp * (s - t), 0.0)
                dot = rebase_dot(dot, student_sum, student_shift, teacher_shift)
                dot += tl.sum(terms, axis=1)

            student_sum = student_sum * tl.exp2(student_shift) + tl.sum(student_exp, axis=1)
            teacher_sum = teacher_sum * tl.exp2(teacher_shift) + tl.sum(teacher_exp, axis=1)
            if HARD_EXP:
                hard_exp = tl.exp2((student - new_student_max[:, None]) * LOG2_E)
                hard_shift = (student_max - new_student_max) * LOG2_E
                hard_sum = hard_sum * tl.exp2(hard_shift) + tl.sum(hard_exp, axis=1)
            student_max = new_student_max
            teacher_max = new_teacher_max

    # The lanes joined: s_ and t_ are the whole row's.
    s_max = tl.max(student_max, axis=0)
    t_max = tl.max(teacher_max, axis=0)
    student_shift = (student_max - s_max) * student_scale
    teacher_shift = (teacher_max - t_max) * teacher_scale
    s_sum, t_sum, log2_ratio = join_sums(
        student_sum * tl.exp2(student_shift), teacher_sum * tl.exp2(teacher_shift)
    )
    q_weight = tl.div_rn(1.0, s_sum)
    p_weight = tl.div_rn(1.0, t_sum)
    h_sum = s_sum
    if HARD_EXP:
        h_sum = tl.sum(hard_sum * tl.exp2((student_max - s_max) * LOG2_E), axis=0)
    h_weight = tl.div_rn(1.0, h_sum)

    if DIVERGENCE == "forward_kl":
        dot = tl.sum(rebase_dot(dot, teacher_sum, teacher_shift, student_shift), axis=0)
        soft = (tl.div_rn(dot, t_sum) - log2_ratio) * LN_2
        g_sum = -1.0
    if DIVERGENCE == "reverse_kl":
        dot = tl.sum(rebase_dot(dot, student_sum, student_shift, teacher_shift), axis=0)
        soft = (tl.div_rn(dot, s_sum) + log2_ratio) * LN_2
        g_sum = soft
    if not ONE_SWEEP:
        f_sums = tl.zeros([LANES], tl.float32)
        g_sums = tl.zeros([LANES], tl.float32)
        for EDGE in tl.static_range(2):
            for start in range(0, vocab - interior if EDGE else interior, BLOCK_V):
                student, teacher, columns, inside = load_pair(
                    student_row, teacher_row, start, head, interior, vocab,
                    VECTOR, BLOCK_V, EDGE, SKEWED, TEACHER_ALIGNED, True, SECOND_READ,
                )  # fmt: skip
                s = (student - s_max) * student_scale
                t = (teacher - t_max) * teacher_scale
                q = tl.exp2(s) * q_weight
                p = tl.exp2(t) * p_weight
                f, g = divergence_terms(p, q, s - t + log2_ratio, beta, DIVERGENCE)
                f_sums += tl.sum(f, axis=1)
                g_sums += tl.sum(g, axis=1)
        # Comparisons swallow a NaN. The sums keep it, and are 0 for a row of -inf.
        valid = (s_sum > 0) & (t_sum > 0)
        soft = tl.where(valid, tl.sum(f_sums, axis=0), float("nan"))
        g_sum = tl.where(valid, tl.sum(g_sums, axis=0), float("nan"))

    weight = 1.0
    if token_weight_ptr is not None:
        weight = tl.load(token_weight_ptr + row).to(tl.float32)
    t2 = temperature * temperature if SCALE_T2 else 1.0
    # alpha > 0, alpha < 1: an infinite term without a share contributes 0, not 0 * inf.
    total = tl.where(alpha > 0, alpha * t2 * soft, 0.0)
    hard = 0.0
    if HARD:
        hard = s_max - label_logit + tl.log2(h_sum) * LN_2
        total += tl.where(alpha < 1, (1 - alpha) * hard, 0.0)
    tl.store(losses_ptr + row, total * weight)
    tl.store(losses_ptr + rows + row, soft * weight)
    tl.store(losses_ptr + 2 * rows + row, hard * weight)

    if GRADIENT:
        scale = weight
        if grad_scale_ptr is not None:
            scale *= tl.load(grad_scale_ptr + row * grad_scale_stride).to(tl.float32)
        soft_scale = alpha * scale * t2 / temperature
        hard_scale = (1 - alpha) * scale
        for EDGE in tl.static_range(2):
            for start in range(0, vocab - interior if EDGE else interior, BLOCK_V):
                student, teacher, columns, inside = load_pair(
                    student_row, teacher_row, start, head, interior, vocab,
                    VECTOR, BLOCK_V, EDGE, SKEWED, TEACHER_ALIGNED, ONE_SWEEP, "evict_first",
                )  # fmt: skip
                s = (student - s_max) * student_scale
                t = (teacher - t_max) * teacher_scale
                q = tl.exp2(s) * q_weight
                p = tl.exp2(t) * p_weight
                f, g = divergence_terms(p, q, s - t + log2_ratio, beta, DIVERGENCE)
                gradient = tl.where(alpha > 0, (g - q * g_sum) * soft_scale, 0.0)
                if HARD:
                    h = q
                    if HARD_EXP:
                        h = tl.exp2((student - s_max) * LOG2_E) * h_weight
                    gradient += (h - tl.where(columns == label, 1.0, 0.0)) * hard_scale
                store_block(
                    gradient_row, columns, inside, gradient,
                    VECTOR, EDGE, GRADIENT_ALIGNED and not (EDGE and SKEWED),
                )  # fmt: skip
        zero_columns(gradient_row, vocab, width, VECTOR, BLOCK_V)


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
) -> Tensor:
    """The distillation loss of each row, and on request its gradient, as kdfast.reference has it.

    Args:
        student: `[outer, inner, V_s]`, float32, bfloat16 or float16, unit stride along V_s and any
            other strides.
        teacher: `[outer, inner, V_t]`, likewise; its dtype may differ.
        labels: `[rows]` integers, or None; rows = outer · inner.
        token_weight: `[rows]`, or None for 1.
        temperature, teacher_temperature: a number, or a tensor `[rows]`.
        grad_scale: `[1]` or `[rows]`, or None for 1.
        gradient: `[outer, inner, V_s]`, written; None to leave it out. It may be `student` itself.
        divergence: one of kdfast.reference.DIVERGENCES, a mixture of one side alone already named
            forward_kl or reverse_kl, as canonical_divergence does.

    Returns:
        `[3, rows]`, float32: total, soft and hard.
    """
    outer, inner, width = student.shape
    rows = outer * inner
    losses = student.new_empty((3, rows), dtype=torch.float32)
    if rows == 0:
        return losses

    def per_row(values: float | Tensor | None) -> Tensor | None:
        return values.contiguous() if isinstance(values, Tensor) else None

    def number(value: float | Tensor) -> float:
        return 1.0 if isinstance(value, Tensor) else value

    vector = vector_columns(student)
    phase = row_phase(student, vector)
    with torch.cuda.device_of(student):
        kd_loss_kernel[(rows,)](
            student,
            teacher,
            gradient,
            losses,
            per_row(labels),
            per_row(token_weight),
            per_row(grad_scale),
            per_row(temperature),
            per_row(teacher_temperature),
            number(temperature),
            number(teacher_temperature),
            inner,
            *student.stride()[:2],
            *teacher.stride()[:2],
            *((0, 0) if gradient is None else gradient.stride()[:2]),
            int(grad_scale is not None and grad_scale.numel() > 1),
            rows,
            vocab_size,
            width,
            ignore_index,
            beta,
            alpha,
            DIVERGENCE=divergence,
            SCALE_T2=scale_t2,
            HARD=labels is not None and (need_hard or alpha < 1),
            TEMPERED=isinstance(temperature, Tensor) or temperature != 1,
            SKEWED=any(phase),
            TEACHER_ALIGNED=row_phase(teacher, vector) == phase,
            GRADIENT_ALIGNED=gradient is not None and row_phase(gradient, vector) == phase,
            VECTOR=vector,
            **row_launch(KD_LOSS, student.element_size(), vocab_size),
        )
    return losses
