"""Distillation between hidden states: a kernel for `hidden_mse` and one for `hidden_cosine`."""

import torch
import triton
import triton.language as tl
from kdfast.kernels.primitives import (
    block_columns,
    head_columns,
    load_block,
    row_phase,
    store_block,
    vector_columns,
    zero_columns,
)
from kdfast.kernels.tuning import HIDDEN_COSINE, HIDDEN_MSE, Tuning, row_launch
from torch import Tensor


@triton.jit
def load_states(
    row_ptr,
    columns,
    inside,
    VECTOR: tl.constexpr,
    EDGE: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """States in float32, and 0 where there is no column."""
    states = load_block(row_ptr, columns, inside, VECTOR, EDGE, ALIGNED, EVICTION)
    if EDGE:
        states = tl.where(inside, states, 0.0)
    return states


@triton.jit
def load_pair(
    student_row,
    teacher_row,
    start,
    head,
    interior,
    width,
    VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr,
    EDGE: tl.constexpr,
    SKEWED: tl.constexpr,
    TEACHER_ALIGNED: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """A block of both rows, its columns, and which of them exist."""
    columns, inside = block_columns(start, head, interior, width, VECTOR, BLOCK_V, EDGE, SKEWED)
    ALIGNED: tl.constexpr = not (EDGE and SKEWED)
    student = load_states(student_row, columns, inside, VECTOR, EDGE, ALIGNED, EVICTION)
    BOTH_ALIGNED: tl.constexpr = ALIGNED and TEACHER_ALIGNED
    teacher = load_states(teacher_row, columns, inside, VECTOR, EDGE, BOTH_ALIGNED, EVICTION)
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
]


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def hidden_mse_kernel(
    student_ptr,  # (outer, inner, width)
    teacher_ptr,  # (outer, inner, width)
    gradient_ptr,  # (outer, inner, width), or None; may be student_ptr
    losses_ptr,  # (rows,)
    mask_ptr,  # (rows,), or None
    grad_scale_ptr,  # (rows,) or (), or None
    bias_ptr,  # (width,), or None
    inner,
    student_outer_stride,
    student_inner_stride,
    teacher_outer_stride,
    teacher_inner_stride,
    gradient_outer_stride,
    gradient_inner_stride,
    grad_scale_stride,
    width,
    WHOLE: tl.constexpr,
    SKEWED: tl.constexpr,
    TEACHER_ALIGNED: tl.constexpr,
    GRADIENT_ALIGNED: tl.constexpr,
    BIAS_ALIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """‖student + bias − teacher‖² / width, and its gradient in the student.

    One program per row, which it sweeps once. Traffic: one read of both rows and one write of the
    gradient; the bias is in L2. A row that does not count is not read.
    """
    LANES: tl.constexpr = BLOCK_V // VECTOR
    GRADIENT: tl.constexpr = gradient_ptr is not None
    if WHOLE:
        # The launcher has seen it, and the compiler now does: the edge's accesses stay wide.
        width = width // VECTOR * VECTOR

    # int64: rows * width passes 2**31 at 512k tokens x 4096 features.
    row = tl.program_id(0).to(tl.int64)
    outer_row = row // inner
    inner_row = row % inner
    student_row = student_ptr + outer_row * student_outer_stride + inner_row * student_inner_stride
    teacher_row = teacher_ptr + outer_row * teacher_outer_stride + inner_row * teacher_inner_stride
    if GRADIENT:
        gradient_row = gradient_ptr + outer_row * gradient_outer_stride
        gradient_row += inner_row * gradient_inner_stride

    if mask_ptr is not None:
        counts = tl.load(mask_ptr + row)
        if not counts:
            tl.store(losses_ptr + row, 0.0)
            if GRADIENT:
                zero_columns(gradient_row, 0, width, VECTOR, BLOCK_V)
            return

    share = tl.div_rn(1.0, tl.maximum(width, 1).to(tl.float32))
    # ∂ (s − t)² / ∂s = 2 (s − t).
    factor = 2 * share
    if grad_scale_ptr is not None:
        factor *= tl.load(grad_scale_ptr + row * grad_scale_stride).to(tl.float32)
    head = head_columns(student_row, width, VECTOR, SKEWED)
    interior = (width - head) // BLOCK_V * BLOCK_V

    squares = tl.zeros([LANES], tl.float32)
    for EDGE in tl.static_range(2):
        for start in range(0, width - interior if EDGE else interior, BLOCK_V):
            student, teacher, columns, inside = load_pair(
                student_row, teacher_row, start, head, interior, width,
                VECTOR, BLOCK_V, EDGE, SKEWED, TEACHER_ALIGNED, "evict_first",
            )  # fmt: skip
            if bias_ptr is not None:
                student += load_states(
                    bias_ptr, columns, inside,
                    VECTOR, EDGE, BIAS_ALIGNED and not (EDGE and SKEWED), "evict_last",
                )  # fmt: skip
            difference = student - teacher
            squares += tl.sum(difference * difference, axis=1)
            if GRADIENT:
                store_block(
                    gradient_row, columns, inside, difference * factor,
                    VECTOR, EDGE, GRADIENT_ALIGNED and not (EDGE and SKEWED),
                )  # fmt: skip
    tl.store(losses_ptr + row, tl.sum(squares, axis=0) * share)


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def hidden_cosine_kernel(
    student_ptr,  # (outer, inner, width)
    teacher_ptr,  # (outer, inner, width)
    gradient_ptr,  # (outer, inner, width), or None
    losses_ptr,  # (rows,)
    mask_ptr,  # (rows,), or None
    grad_scale_ptr,  # (rows,) or (), or None
    epsilon,
    inner,
    student_outer_stride,
    student_inner_stride,
    teacher_outer_stride,
    teacher_inner_stride,
    gradient_outer_stride,
    gradient_inner_stride,
    grad_scale_stride,
    width,
    WHOLE: tl.constexpr,
    SKEWED: tl.constexpr,
    TEACHER_ALIGNED: tl.constexpr,
    GRADIENT_ALIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """1 − a·b with a = s / max(‖s‖, ε) and b = t / max(‖t‖, ε), and its gradient in the student.

    It is ½ ‖a − b‖² + ½ (1 − ‖a‖²) + ½ (1 − ‖b‖²), which keeps its digits where student and teacher
    agree. The last two are 0 unless a norm is below ε, and a − b is (s − ratio · t) / ‖s‖, which is
    exactly 0 for equal rows.

    One program per row, which it sweeps three times: for the norms, for ‖a − b‖², and for the
    gradient (a − b − L · a) / ‖s‖, if one is wanted.

    Traffic: one read of both rows and one write of the gradient. The later sweeps read from the
    cache: rows of hidden states are short.
    """
    LANES: tl.constexpr = BLOCK_V // VECTOR
    GRADIENT: tl.constexpr = gradient_ptr is not None
    if WHOLE:
        # The launcher has seen it, and the compiler now does: the edge's accesses stay wide.
        width = width // VECTOR * VECTOR

    # int64: rows * width passes 2**31 at 512k tokens x 4096 features.
    row = tl.program_id(0).to(tl.int64)
    outer_row = row // inner
    inner_row = row % inner
    student_row = student_ptr + outer_row * student_outer_stride + inner_row * student_inner_stride
    teacher_row = teacher_ptr + outer_row * teacher_outer_stride + inner_row * teacher_inner_stride
    if GRADIENT:
        gradient_row = gradient_ptr + outer_row * gradient_outer_stride
        gradient_row += inner_row * gradient_inner_stride

    if mask_ptr is not None:
        counts = tl.load(mask_ptr + row)
        if not counts:
            tl.store(losses_ptr + row, 0.0)
            if GRADIENT:
                zero_columns(gradient_row, 0, width, VECTOR, BLOCK_V)
            return

    head = head_columns(student_row, width, VECTOR, SKEWED)
    interior = (width - head) // BLOCK_V * BLOCK_V

    student_squares = tl.zeros([LANES], tl.float32)
    teacher_squares = tl.zeros([LANES], tl.float32)
    for EDGE in tl.static_range(2):
        for start in range(0, width - interior if EDGE else interior, BLOCK_V):
            student, teacher, columns, inside = load_pair(
                student_row, teacher_row, start, head, interior, width,
                VECTOR, BLOCK_V, EDGE, SKEWED, TEACHER_ALIGNED, "evict_last",
            )  # fmt: skip
            student_squares += tl.sum(student * student, axis=1)
            teacher_squares += tl.sum(teacher * teacher, axis=1)
    student_norm = tl.sqrt_rn(tl.sum(student_squares, axis=0))
    teacher_norm = tl.sqrt_rn(tl.sum(teacher_squares, axis=0))
    student_length = tl.div_rn(student_norm, epsilon)
    teacher_length = tl.div_rn(teacher_norm, epsilon)
    # Comparisons that keep NaN. 1 − ‖a‖² would be rounding where a is of length 1.
    student_missing = tl.where(student_norm < epsilon, 1 - student_length * student_length, 0.0)
    teacher_missing = tl.where(teacher_norm < epsilon, 1 - teacher_length * teacher_length, 0.0)
    student_norm = tl.where(student_norm < epsilon, epsilon, student_norm)
    teacher_norm = tl.where(teacher_norm < epsilon, epsilon, teacher_norm)

    ratio = tl.div_rn(student_norm, teacher_norm)
    inverse_norm = tl.div_rn(1.0, student_norm)
    squares = tl.zeros([LANES], tl.float32)
    for EDGE in tl.static_range(2):
        for start in range(0, width - interior if EDGE else interior, BLOCK_V):
            student, teacher, columns, inside = load_pair(
                student_row, teacher_row, start, head, interior, width,
                VECTOR, BLOCK_V, EDGE, SKEWED, TEACHER_ALIGNED,
                "evict_last" if GRADIENT else "evict_first",
            )  # fmt: skip
            difference = student - ratio * teacher
            squares += tl.sum(difference * difference, axis=1)
    distance = tl.sum(squares, axis=0) * inverse_norm * inverse_norm
    loss = (distance + student_missing + teacher_missing) * 0.5
    tl.store(losses_ptr + row, loss)

    if GRADIENT:
        # A norm below ε is a constant.
        shrink = tl.where(student_missing > 0, 1.0, loss)
        factor = inverse_norm * inverse_norm
        if grad_scale_ptr is not None:
            factor *= tl.load(grad_scale_ptr + row * grad_scale_stride).to(tl.float32)
        for EDGE in tl.static_range(2):
            for start in range(0, width - interior if EDGE else interior, BLOCK_V):
                student, teacher, columns, inside = load_pair(
                    student_row, teacher_row, start, head, interior, width,
                    VECTOR, BLOCK_V, EDGE, SKEWED, TEACHER_ALIGNED, "evict_first",
                )  # fmt: skip
                gradient = (student - ratio * teacher - shrink * student) * factor
                store_block(
                    gradient_row, columns, inside, gradient,
                    VECTOR, EDGE, GRADIENT_ALIGNED and not (EDGE and SKEWED),
                )  # fmt: skip


def _launch(
    kernel: triton.JITFunction,
    tuning: Tuning,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    grad_scale: Tensor | None,
    gradient: Tensor | None,
    last: Tensor | float | None,
    **alignment: bool,
) -> Tensor:
    """The losses of a kernel, with the `last` of its leading arguments."""
    outer, inner, width = student.shape
    losses = student.new_empty((outer * inner,), dtype=torch.float32)
    if losses.numel() == 0:
        return losses
    vector = _vector(student, teacher)
    phase = row_phase(student, vector)
    with torch.cuda.device_of(student):
        kernel[(losses.numel(),)](
            student,
            teacher,
            gradient,
            losses,
            None if mask is None else mask.contiguous(),
            None if grad_scale is None else grad_scale.contiguous(),
            last,
            inner,
            *student.stride()[:2],
            *teacher.stride()[:2],
            *((0, 0) if gradient is None else gradient.stride()[:2]),
            int(grad_scale is not None and grad_scale.numel() > 1),
            width,
            WHOLE=width % vector == 0,
            SKEWED=any(phase),
            TEACHER_ALIGNED=row_phase(teacher, vector) == phase,
            GRADIENT_ALIGNED=gradient is not None and row_phase(gradient, vector) == phase,
            **alignment,
            VECTOR=vector,
            **row_launch(tuning, 16 // vector, width),
        )
    return losses


def _vector(student: Tensor, teacher: Tensor) -> int:
    """The columns of a lane: one 16-byte access of the narrower side, more of the other."""
    return max(vector_columns(student), vector_columns(teacher))


def hidden_mse_rows(
    student: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    grad_scale: Tensor | None,
    gradient: Tensor | None,
) -> Tensor:
    """‖student + bias − teacher‖² / D of each row, and on request its gradient in the student.

    Args:
        student: `[outer, inner, D]`, float32, bfloat16 or float16, unit stride along D and any
            other strides.
        teacher: `[outer, inner, D]`, likewise; its dtype may differ.
        bias: `[D]` of any floating dtype, or None.
        mask: `[rows]` bool, or None; rows = outer · inner. A row that is False has a loss and a
            gradient of 0, whatever it holds.
        grad_scale: 0-d or `[rows]`, or None for 1.
        gradient: `[outer, inner, D]`, written; None to leave it out. It may be `student` itself.

    Returns:
        `[rows]`, float32.
    """
    bias = None if bias is None else bias.contiguous()
    vector = _vector(student, teacher)
    aligned = bias is not None and row_phase(bias[None, None], vector) == row_phase(student, vector)
    return _launch(
        hidden_mse_kernel,
        HIDDEN_MSE,
        student,
        teacher,
        mask,
        grad_scale,
        gradient,
        bias,
        BIAS_ALIGNED=aligned,
    )


def hidden_cosine_rows(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    grad_scale: Tensor | None,
    gradient: Tensor | None,
    *,
    epsilon: float,
) -> Tensor:
    """1 − cos of each row, and on request its gradient in the student.

    Args:
        student, teacher, mask, grad_scale: as hidden_mse_rows takes them.
        gradient: `[outer, inner, D]`, written; None to leave it out. It must not be `student`.
        epsilon: the least that a norm counts as.

    Returns:
        `[rows]`, float32.
    """
    return _launch(
        hidden_cosine_kernel, HIDDEN_COSINE, student, teacher, mask, grad_scale, gradient, epsilon
    )
