"""Distillation from a truncated teacher: one kernel for every tail of `topk_kd_loss`."""

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
    row_phase,
    store_block,
    vector_columns,
    zero_columns,
)
from kdfast.kernels.tuning import TOPK_KD_LOSS, TOPK_KD_LOSS_OF_MANY, row_launch
from torch import Tensor

# The most entries of a teacher's support, the most with which a row has a launch of its vocabulary,
# and the fewest that a kernel is compiled for.
MOST_ENTRIES = 1024
FEW_ENTRIES = 256
FEWEST_ENTRIES = 16


@triton.jit
def load_off_support(
    student_row,
    marks_row,
    start,
    head,
    interior,
    vocab,
    VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr,
    EDGE: tl.constexpr,
    SKEWED: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """A block of logits, with -inf in every vector of which the support has a part."""
    columns, inside = block_columns(start, head, interior, vocab, VECTOR, BLOCK_V, EDGE, SKEWED)
    logits = load_block(student_row, columns, inside, VECTOR, EDGE, not (EDGE and SKEWED), EVICTION)
    if EDGE:
        # Behind the head a lane may reach over the end of a vector.
        vectors = (columns - head + VECTOR) // VECTOR
        marks = tl.load(marks_row + vectors // 32, mask=inside, other=0)
    else:
        vectors = (start // VECTOR + 1 + tl.arange(0, BLOCK_V // VECTOR))[:, None]
        marks = tl.load(marks_row + vectors // 32)
    return tl.where((marks >> vectors % 32) & 1 == 0, logits, -float("inf"))


@triton.jit
def entry_terms(p, q, log_p, log_q, beta, student_share, DIVERGENCE: tl.constexpr):
    """f and g = q · ∂f/∂q of an entry of the support, or of the bucket (kd_loss.py has columns)."""
    # p > 0, q > 0: an entry without probability contributes 0, not 0 * inf. NaN stays.
    if DIVERGENCE == "forward_kl":
        return tl.where(p > 0, p * (log_p - log_q), p), -p
    if DIVERGENCE == "reverse_kl":
        f = tl.where(q > 0, q * (log_q - log_p), q)
        return f, f
    if DIVERGENCE == "jsd":
        mixture = beta * p + student_share * q
        log_mixture = tl.log(tl.where(mixture == 0, 1.0, mixture))
        from_p = tl.where(p > 0, p * (log_p - log_mixture), p)
        from_q = tl.where(q > 0, q * (log_q - log_mixture), q)
        # q · log(student_share · q / mixture). In float64 it may be a difference.
        g = student_share * (from_q + q * tl.log(tl.full((), student_share, tl.float64)))
        return beta * from_p + student_share * from_q, g


@triton.jit
def split_softmax(logits, outside_max, outside_sum, inverse_temperature):
    """A softmax in two parts: q of the support's logits, and of all else together.

    outside_sum is Σ exp off the support, relative to outside_max. Returns q and log q of each
    entry, of all else, and log Σ exp((s - base) / T) with its base.
    """
    empty = outside_sum == 0
    base = tl.maximum(tl.max(logits, axis=0), tl.where(empty, LOWEST, outside_max)).to(tl.float64)
    distance = (logits - base) * inverse_temperature
    outside_distance = (outside_max - base) * inverse_temperature
    exponentials = tl.exp(distance)
    # 0 * inf: what is empty has no maximum.
    outside = tl.where(empty, 0.0, outside_sum * tl.exp(outside_distance))
    total = tl.sum(exponentials, axis=0) + outside
    log_total = tl.log(total)
    log_outside = tl.where(empty, -float("inf"), tl.log(outside_sum) + outside_distance - log_total)
    return exponentials / total, distance - log_total, outside / total, log_outside, log_total, base


# None of these changes the code, so none of them compiles it anew.
RUNTIME_ARGUMENTS = [
    "inner",
    "student_outer_stride",
    "student_inner_stride",
    "gradient_outer_stride",
    "gradient_inner_stride",
    "grad_scale_stride",
    "words",
    "k",
    "rows",
    "width",
    "ignore_index",
]


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def topk_kd_loss_kernel(
    student_ptr,  # (outer, inner, width)
    log_probs_ptr,  # (rows, k)
    indices_ptr,  # (rows, k), ascending
    gradient_ptr,  # (outer, inner, width), or None; may be student_ptr
    losses_ptr,  # (3, rows): total, soft and hard
    marks_ptr,  # (rows, words), zeros: a bit for each vector of a row
    labels_ptr,  # (rows,), or None
    token_weight_ptr,  # (rows,), or None
    grad_scale_ptr,  # (rows,) or (1,), or None
    temperature_ptr,  # (rows,), or None for `temperature`
    temperature,
    inner,
    student_outer_stride,
    student_inner_stride,
    gradient_outer_stride,
    gradient_inner_stride,
    grad_scale_stride,
    words,
    k,
    rows,
    vocab,
    width,
    ignore_index,
    beta,
    student_share,
    alpha,
    smallest_bucket,
    TAIL: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    SCALE_T2: tl.constexpr,
    HARD: tl.constexpr,
    TEMPERED: tl.constexpr,
    SKEWED: tl.constexpr,
    GRADIENT_ALIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """total = weight · (alpha · T² · Σ f + (1 − alpha) · hard), and its gradient in the student.

    Σ f goes over the entries of the support and, for the tail "bucket", over one more: the rest.
    Its q is the sum of what lies off the support. As 1 − Σq it would have lost its digits where the
    student is sure, so the sweep leaves the support out: every 16-byte vector of which it has a
    part is marked, passed over, and added without that part.

    One program per row:

    1. The support: log p and the student's logits are gathered, the vectors marked.
    2. A sweep for max and Σ exp off the support.
    3. The entries' f and g, in float64: their sums make 1 − Σp, and the loss.
    4. A sweep that writes q · factor, if a gradient is wanted, and over it the entries' own.

    The tail "support" without a hard term does not sweep: it writes zeros, and the entries.

    Traffic: one read of the row and one write of the gradient; the second sweep reads from L2.
    """
    LANES: tl.constexpr = BLOCK_V // VECTOR
    GRADIENT: tl.constexpr = gradient_ptr is not None
    SWEEP: tl.constexpr = HARD or TAIL != "support"
    # The hard term has exponentials of its own unless the temperature is 1 for every row.
    HARD_EXP: tl.constexpr = HARD and TEMPERED
    FIRST_READ: tl.constexpr = "evict_last" if GRADIENT else "evict_first"

    # int64: rows * vocab passes 2**31 at 16k tokens x 128k vocabulary.
    row = tl.program_id(0).to(tl.int64)
    student_row = student_ptr + row // inner * student_outer_stride
    student_row += row % inner * student_inner_stride
    if GRADIENT:
        gradient_row = gradient_ptr + row // inner * gradient_outer_stride
        gradient_row += row % inner * gradient_inner_stride

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
        label_exists = (label >= 0) & (label < vocab)
        label_logit = tl.load(student_row + label, mask=label_exists, other=float("nan"))
        label = label.to(tl.int32)

    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row).to(tl.float32)
    scale = tl.div_rn(LOG2_E, temperature)
    head = head_columns(student_row, vocab, VECTOR, SKEWED)
    interior = (vocab - head) // BLOCK_V * BLOCK_V

    indices_row = indices_ptr + row * k
    entry = tl.arange(0, ENTRIES)
    column = tl.load(indices_row + entry, mask=entry < k, other=-1).to(tl.int32)
    exists = (column >= 0) & (column < vocab)
    # A column outside the vocabulary makes its row NaN, an entry that does not exist counts for
    # nothing.
    logit = tl.load(student_row + column, mask=exists, other=float("nan")).to(tl.float32)
    logit = tl.where(column < 0, -float("inf"), logit)

    if SWEEP:
        marks_row = marks_ptr + row * words
        # Aligned vectors behind the head, which is number 0.
        vector = (column - head + VECTOR) // VECTOR
        tl.atomic_or(
            marks_row + vector // 32, 1 << vector % 32, mask=exists, sem="relaxed", scope="cta"
        )
        # What one thread has marked, another reads.
        tl.debug_barrier()

        lane_max = tl.full([LANES], LOWEST, tl.float32)
        lane_sum = tl.zeros([LANES], tl.float32)
        hard_lane_sum = tl.zeros([LANES], tl.float32)
        for EDGE in tl.static_range(2):
            for start in range(0, vocab - interior if EDGE else interior, BLOCK_V):
                student = load_off_support(
                    student_row, marks_row, start, head, interior, vocab,
                    VECTOR, BLOCK_V, EDGE, SKEWED, FIRST_READ,
                )  # fmt: skip
                new_max = tl.maximum(lane_max, tl.max(student, axis=1))
                # The maximum goes before the scaling, whose product a low temperature makes large.
                away = student - new_max[:, None]
                lane_sum *= tl.exp2((lane_max - new_max) * scale)
                lane_sum += tl.sum(tl.exp2(away * scale), axis=1)
                if HARD_EXP:
                    hard_lane_sum *= tl.exp2((lane_max - new_max) * LOG2_E)
                    hard_lane_sum += tl.sum(tl.exp2(away * LOG2_E), axis=1)
                lane_max = new_max

        # The marked vectors, each by the first of its entries, without all of its entries.
        previous = tl.load(indices_row + entry - 1, mask=(entry > 0) & (entry < k), other=-1)
        previous = previous.to(tl.int32)
        first = exists & ((previous < 0) | ((previous - head + VECTOR) // VECTOR < vector))
        vector_start = (vector - 1) * VECTOR + head
        taken = tl.zeros([ENTRIES], tl.int32)
        for following in tl.static_range(VECTOR):
            other = tl.load(indices_row + entry + following, mask=entry + following < k, other=-1)
            place = other.to(tl.int32) - vector_start
            bit = 1 << (place & (VECTOR - 1))
            taken |= tl.where((place >= 0) & (place < VECTOR), bit, 0)
        places = tl.arange(0, VECTOR)[None, :]
        beside = vector_start[:, None] + places
        is_beside = first[:, None] & (beside >= 0) & (beside < vocab)
        is_beside &= (taken[:, None] >> places) & 1 == 0
        beside_logits = tl.load(student_row + beside, mask=is_beside, other=-float("inf"))
        beside_logits = beside_logits.to(tl.float32)

        outside_max = tl.maximum(tl.max(lane_max, axis=0), tl.max(beside_logits))
        beside_away = beside_logits - outside_max
        outside_sum = tl.sum((lane_sum * tl.exp2((lane_max - outside_max) * scale)).to(tl.float64))
        outside_sum += tl.sum(tl.exp2(beside_away * scale).to(tl.float64))
        if HARD_EXP:
            hard_lane_sum *= tl.exp2((lane_max - outside_max) * LOG2_E)
            hard_outside_sum = tl.sum(hard_lane_sum.to(tl.float64))
            hard_outside_sum += tl.sum(tl.exp2(beside_away * LOG2_E).to(tl.float64))

    # Of the scale that the exponentials were taken with, which float32 has rounded.
    inverse_temperature = scale.to(tl.float64) * LN_2
    if TAIL == "support":
        soft_outside_sum = tl.full((), 0.0, tl.float64)
        soft_outside_max = LOWEST
    else:
        soft_outside_sum = outside_sum
        soft_outside_max = outside_max
    q, log_q, outside_q, log_outside_q, log_total, _ = split_softmax(
        logit, soft_outside_max, soft_outside_sum, inverse_temperature
    )

    log_p = tl.load(log_probs_ptr + row * k + entry, mask=column >= 0, other=-float("inf"))
    log_p = log_p.to(tl.float64)
    if TAIL == "renormalize" or TAIL == "support":
        # Relative to their maximum they do not all underflow. Without any, p is 0 / 0.
        log_p -= tl.maximum(tl.max(log_p, axis=0), LOWEST)
        p = tl.exp(log_p)
        p_sum = tl.sum(p, axis=0)
        p /= p_sum
        log_p -= tl.log(p_sum)
    else:
        p = tl.exp(log_p)
        p_sum = tl.sum(p, axis=0)

    f, g = entry_terms(p, q, log_p, log_q, beta, student_share, DIVERGENCE)
    soft = tl.sum(f, axis=0)
    g_sum = tl.sum(g, axis=0)
    outside_g = 0.0
    if TAIL == "bucket":
        # What rounding makes 1 or more leaves nothing, and so does a support that leaves no column,
        # or none that the student has: what is left of the teacher there may be rounding too.
        nothing = (p_sum >= 1) | (tl.sum(exists.to(tl.int32), axis=0) == vocab)
        nothing |= (outside_sum == 0) & (1 - p_sum <= k * smallest_bucket)
        rest = tl.where(nothing, 0.0, 1 - p_sum)
        log_rest = tl.log(rest)
        if DIVERGENCE == "reverse_kl":
            log_rest = tl.where(nothing, tl.log(tl.full((), smallest_bucket, tl.float64)), log_rest)
        outside_f, outside_g = entry_terms(
            rest, outside_q, log_rest, log_outside_q, beta, student_share, DIVERGENCE
        )
        soft += outside_f
        g_sum += outside_g
    # Comparisons swallow a NaN of either side, and a row without any probability.
    valid = (p_sum >= 0) & (log_total > -float("inf"))
    soft = tl.where(valid, soft, float("nan")).to(tl.float32)
    g_sum = tl.where(valid, g_sum, float("nan"))
    of_entries = (g - q * g_sum).to(tl.float32)
    # Of all columns off the support together, and so by their exponentials.
    soft_factor = 0.0
    if TAIL != "support":
        of_outside = (outside_g - outside_q * g_sum) / outside_sum
        soft_factor = tl.where(outside_sum == 0, 0.0, of_outside).to(tl.float32)

    weight = 1.0
    if token_weight_ptr is not None:
        weight = tl.load(token_weight_ptr + row).to(tl.float32)
    t2 = temperature * temperature if SCALE_T2 else 1.0
    # alpha > 0, alpha < 1: an infinite term without a share contributes 0, not 0 * inf.
    total = tl.where(alpha > 0, alpha * t2 * soft, 0.0)
    hard = 0.0
    if HARD:
        if HARD_EXP:
            hard_inverse = tl.full((), 1.0, tl.float64)
        else:
            hard_outside_sum = outside_sum
            hard_inverse = inverse_temperature
        hard_q, _, hard_outside_q, _, hard_log_total, hard_base = split_softmax(
            logit, outside_max, hard_outside_sum, hard_inverse
        )
        hard = hard_log_total - (label_logit.to(tl.float64) - hard_base) * hard_inverse
        total += tl.where(alpha < 1, (1 - alpha) * hard, 0.0)
    tl.store(losses_ptr + row, total * weight)
    tl.store(losses_ptr + rows + row, soft * weight)
    tl.store(losses_ptr + 2 * rows + row, hard * weight)

    if GRADIENT:
        if grad_scale_ptr is not None:
            weight *= tl.load(grad_scale_ptr + row * grad_scale_stride).to(tl.float32)
        soft_scale = alpha * weight * t2 / temperature
        hard_scale = (1 - alpha) * weight
        of_entries = tl.where(alpha > 0, of_entries * soft_scale, 0.0)
        if HARD:
            of_label = tl.where(column == label, hard_scale, 0.0)
            of_entries += hard_q.to(tl.float32) * hard_scale - of_label

        # In place of the student, no thread may write before all have gathered.
        tl.debug_barrier()
        if SWEEP:
            soft_factor = tl.where(alpha > 0, soft_factor * soft_scale, 0.0)
            if HARD:
                hard_factor = hard_outside_q / hard_outside_sum
                hard_factor = tl.where(hard_outside_sum == 0, 0.0, hard_factor).to(tl.float32)
                hard_factor *= hard_scale
                if not HARD_EXP:
                    soft_factor += hard_factor
            for EDGE in tl.static_range(2):
                for start in range(0, vocab - interior if EDGE else interior, BLOCK_V):
                    # Against the direction of the first sweep: what was read last is still in L2.
                    columns, inside = block_columns(
                        start, head, interior, vocab, VECTOR, BLOCK_V, EDGE, SKEWED, True
                    )
                    student = load_block(
                        student_row, columns, inside,
                        VECTOR, EDGE, not (EDGE and SKEWED), "evict_first",
                    )  # fmt: skip
                    # Columns of the support may overflow here. They are written again below.
                    away = student - outside_max
                    gradient = tl.exp2(away * scale) * soft_factor
                    if HARD:
                        if HARD_EXP:
                            gradient += tl.exp2(away * LOG2_E) * hard_factor
                        gradient -= tl.where(columns == label, hard_scale, 0.0)
                    store_block(
                        gradient_row, columns, inside, gradient,
                        VECTOR, EDGE, GRADIENT_ALIGNED and not (EDGE and SKEWED),
                    )  # fmt: skip
            zero_columns(gradient_row, vocab, width, VECTOR, BLOCK_V)
        else:
            zero_columns(gradient_row, 0, width, VECTOR, BLOCK_V)
        # The entries' own gradient goes over what other threads have written in their places.
        tl.debug_barrier()
        of_entries = of_entries.to(gradient_ptr.dtype.element_ty)
        tl.store(gradient_row + column, of_entries, mask=exists)


def topk_kd_loss_rows(
    student: Tensor,
    log_probs: Tensor,
    indices: Tensor,
    labels: Tensor | None,
    token_weight: Tensor | None,
    temperature: float | Tensor,
    grad_scale: Tensor | None,
    gradient: Tensor | None,
    *,
    tail: str,
    divergence: str,
    beta: float,
    scale_t2: bool,
    alpha: float,
    ignore_index: int,
    vocab_size: int,
    need_hard: bool,
    smallest_bucket: float,
) -> Tensor:
    """The loss of each row on a truncated teacher, and on request its gradient.

    As kdfast.reference has it, but that an index at or beyond vocab_size makes its row NaN.

    Args:
        student: `[outer, inner, V]`, float32, bfloat16 or float16, unit stride along V and any
            other strides.
        log_probs: `[rows, k]`, floating; rows = outer · inner, k at most MOST_ENTRIES.
        indices: `[rows, k]`, integers, ascending and distinct; below 0 for an entry that does not
            exist.
        labels: `[rows]` integers, or None.
        token_weight: `[rows]`, or None for 1.
        temperature: a number, or a tensor `[rows]`.
        grad_scale: `[1]` or `[rows]`, or None for 1.
        gradient: `[outer, inner, V]`, written; None to leave it out. It may be `student` itself.
        tail: one of kdfast.reference.TAILS.
        divergence: one of kdfast.reference.TAIL_DIVERGENCES[tail], a JSD of one side alone already
            named forward_kl or reverse_kl, as canonical_divergence does.

    Returns:
        `[3, rows]`, float32: total, soft and hard.
    """
    _, inner, width = student.shape
    rows, k = indices.shape
    losses = student.new_empty((3, rows), dtype=torch.float32)
    if rows == 0:
        return losses

    def per_row(values: float | Tensor | None) -> Tensor | None:
        return values.contiguous() if isinstance(values, Tensor) else None

    hard = labels is not None and (need_hard or alpha < 1)
    entries = max(FEWEST_ENTRIES, triton.next_power_of_2(k))
    tuning = TOPK_KD_LOSS if entries <= FEW_ENTRIES else TOPK_KD_LOSS_OF_MANY
    vector = vector_columns(student)
    phase = row_phase(student, vector)
    # A bit for the head, for each vector behind it, and for a part of one.
    words = triton.cdiv(vocab_size // vector + 2, 32)
    sweeps = hard or tail != "support"
    with torch.cuda.device_of(student):
        topk_kd_loss_kernel[(rows,)](
            student,
            log_probs.contiguous(),
            indices.contiguous(),
            gradient,
            losses,
            indices.new_zeros((rows, words), dtype=torch.int32) if sweeps else None,
            per_row(labels),
            per_row(token_weight),
            per_row(grad_scale),
            per_row(temperature),
            1.0 if isinstance(temperature, Tensor) else temperature,
            inner,
            *student.stride()[:2],
            *((0, 0) if gradient is None else gradient.stride()[:2]),
            int(grad_scale is not None and grad_scale.numel() > 1),
            words,
            k,
            rows,
            vocab_size,
            width,
            ignore_index,
            beta,
            1 - beta,
            alpha,
            smallest_bucket,
            TAIL=tail,
            DIVERGENCE=divergence,
            SCALE_T2=scale_t2,
            HARD=hard,
            TEMPERED=isinstance(temperature, Tensor) or temperature != 1,
            SKEWED=any(phase),
            GRADIENT_ALIGNED=gradient is not None and row_phase(gradient, vector) == phase,
            VECTOR=vector,
            ENTRIES=entries,
            # Many entries take the launch of a large row.
            **row_launch(tuning, student.element_size(), max(vocab_size, 32 * entries)),
        )
    return losses
