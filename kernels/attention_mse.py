"""Attention maps compared without being built: the kernels of `attention_mse`.

Everything is up to a_s, the student's scale: E = Q_s K_sᵀ − ρ Q_t K_tᵀ, ρ = a_t / a_s. The rows of
both models stand side by side, Q = [A_q, σ B_q] and K = [A_k, B_k], so that E = Q Kᵀ:

    plain:        A_q = Q_s           B_q = Q_t   σ = −ρ   A_k = K_s   B_k = K_t
    differences:  A_q = Q_s − ρ Q_t   B_q = Q_t   σ = ρ    A_k = K_s   B_k = K_s − K_t

The second needs heads of one size. Its parts are small where the models agree, and nothing cancels:
it is for float32, whose products are float32's. σ is multiplied to products, never to rows: rows of
half precision stay what they are, and go to the tensor cores, where each of their terms is exact.

Query heads that share the key heads of both models are a group, and rows of one matrix. A Gram
matrix AᵀA, AᵀB, BᵀB is kept for each chunk of tokens, padded to powers of two. With differences
A_qᵀ Q_s and Q_sᵀ B_q are kept besides, for the gradient of the keys. With Q_s = A_q + σ B_q they
are sums of the others; but where the student is smaller than its teacher, these sums cancel.
docs/attention-mse.md says why that is all the loss and its gradients need.
"""

import math

import torch
import triton
import triton.language as tl
from kdfast.kernels.tuning import ATTENTION_MSE, FEWEST_FUSED_PROGRAMS, MOST_FUSED_CHUNKS
from torch import Tensor

# The widest head: of wider ones, the three Gram matrices do not fit into registers.
WIDEST_HEAD = 128

# Tokens that a Gram matrix adds up in float32; further on, sums are float64. A causal query meets
# its own chunk's keys in scores, and those before it in a Gram matrix.
CHUNK = 256

# A square of Gram matrices that is joined at a time.
TILE = tl.constexpr(32)

# The interpreter has no product of bfloat16, nor one by parts: it takes float32 throughout.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Of products with an operand in float32, by the widest input's bytes. Half precision takes two
# parts of each operand to the tensor cores. Those truncate their sums, which float32's accuracy
# does not survive, however many the parts.
PRECISION = {2: "bf16x3", 4: "ieee"}


@triton.jit
def counted(mask_ptr, sample, tokens, length):
    """Which of the tokens exist and count."""
    counts = tokens < length
    if mask_ptr is not None:
        counts &= tl.load(mask_ptr + sample * length + tokens, mask=counts, other=0) != 0
    return counts


@triton.jit
def load_tokens(
    source,  # (pointer, strides of samples, of heads and of tokens)
    sample,
    head,
    tokens,
    counts,
    first,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some columns of tokens' rows, in their own type. What does not count is 0 and is not read."""
    columns = first + tl.arange(0, COLUMNS)
    inside = counts[:, None]
    if WIDTH < PADDED:
        inside = inside & (columns < WIDTH)[None, :]
    row = source[0] + sample * source[1] + head * source[2]
    rows = tl.load(row + tokens[:, None] * source[3] + columns[None, :], mask=inside, other=0.0)
    return rows.to(tl.float32) if INTERPRETED else rows


@triton.jit
def product(left, right, PRECISION: tl.constexpr):
    """left · right, in float32. Rows of half precision are taken as they are: terms are exact."""
    if left.dtype == right.dtype and left.dtype != tl.float32:
        return tl.dot(left, right)
    return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision=PRECISION)


@triton.jit
def sided(student, teacher, ratio, QUERIES: tl.constexpr, DIFFERENCES: tl.constexpr):
    """A and B of queries or of keys."""
    if DIFFERENCES:
        if QUERIES:
            student = student.to(tl.float32) - ratio * teacher.to(tl.float32)
        else:
            teacher = student.to(tl.float32) - teacher.to(tl.float32)
    return student, teacher


@triton.jit
def load_sides(
    student, teacher, sample, student_head, teacher_head, tokens, counts, ratio,
    QUERIES: tl.constexpr, DIFFERENCES: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr, TEACHER_WIDTH: tl.constexpr,
    STUDENT_COLUMNS: tl.constexpr, TEACHER_COLUMNS: tl.constexpr,
):  # fmt: skip
    """A and B of some tokens."""
    of_student = load_tokens(
        student, sample, student_head, tokens, counts, 0,
        STUDENT_WIDTH, STUDENT_COLUMNS, STUDENT_COLUMNS,
    )  # fmt: skip
    of_teacher = load_tokens(
        teacher, sample, teacher_head, tokens, counts, 0,
        TEACHER_WIDTH, TEACHER_COLUMNS, TEACHER_COLUMNS,
    )  # fmt: skip
    return sided(of_student, of_teacher, ratio, QUERIES, DIFFERENCES)


@triton.jit
def load_some(
    student, teacher, sample, student_head, teacher_head, tokens, counts, ratio, first,
    OF_A: tl.constexpr, QUERIES: tl.constexpr, DIFFERENCES: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr, TEACHER_WIDTH: tl.constexpr,
    STUDENT_COLUMNS: tl.constexpr, TEACHER_COLUMNS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some columns of A or of B, from the first on."""
    # One side of differences is the difference, the other is a model's own rows.
    BOTH: tl.constexpr = DIFFERENCES and OF_A == QUERIES
    if OF_A or BOTH:
        of_student = load_tokens(
            student, sample, student_head, tokens, counts, first,
            STUDENT_WIDTH, STUDENT_COLUMNS, COLUMNS,
        )  # fmt: skip
    if not OF_A or BOTH:
        of_teacher = load_tokens(
            teacher, sample, teacher_head, tokens, counts, first,
            TEACHER_WIDTH, TEACHER_COLUMNS, COLUMNS,
        )  # fmt: skip
    if BOTH:
        a, b = sided(of_student, of_teacher, ratio, QUERIES, DIFFERENCES)
        rows = a if OF_A else b
    else:
        rows = of_student if OF_A else of_teacher
    return rows


@triton.jit
def write_grams(
    grams_ptr,  # of this chunk and side
    student,
    teacher,
    mask_ptr,
    sample,
    student_head,
    teacher_head,
    group,
    begin,
    length,
    ratio,
    QUERIES: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    STUDENT_COLUMNS: tl.constexpr,
    TEACHER_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    SLAB: tl.constexpr,
):
    """AᵀA, AᵀB and BᵀB of a chunk of tokens of `group` heads.

    In one sweep over the tokens where registers hold all three. Else in one for each SLAB of their
    rows; the later sweeps read from L2.
    """
    blocks = tl.cdiv(tl.minimum(length - begin, CHUNK), BLOCK).to(tl.int32)
    student_columns = tl.arange(0, STUDENT_COLUMNS)[None, :]
    teacher_columns = tl.arange(0, TEACHER_COLUMNS)[None, :]
    cross_ptr = grams_ptr + STUDENT_COLUMNS * STUDENT_COLUMNS
    rest_ptr = cross_ptr + STUDENT_COLUMNS * TEACHER_COLUMNS
    STUDENT_SLAB: tl.constexpr = min(SLAB, STUDENT_COLUMNS)
    TEACHER_SLAB: tl.constexpr = min(SLAB, TEACHER_COLUMNS)
    ONE_SWEEP: tl.constexpr = STUDENT_SLAB == STUDENT_COLUMNS and TEACHER_SLAB == TEACHER_COLUMNS
    student_rows = tl.arange(0, STUDENT_SLAB)[:, None]
    teacher_rows = tl.arange(0, TEACHER_SLAB)[:, None]

    for first in range(0, STUDENT_COLUMNS, STUDENT_SLAB):
        own = tl.zeros([STUDENT_SLAB, STUDENT_COLUMNS], tl.float32)
        cross = tl.zeros([STUDENT_SLAB, TEACHER_COLUMNS], tl.float32)
        rest = tl.zeros([TEACHER_SLAB, TEACHER_COLUMNS], tl.float32)
        for index in range(0, group * blocks):
            tokens = begin + index % blocks * BLOCK + tl.arange(0, BLOCK)
            counts = counted(mask_ptr, sample, tokens, length)
            a, b = load_sides(
                student, teacher, sample, student_head + index // blocks,
                teacher_head + index // blocks, tokens, counts, ratio, QUERIES, DIFFERENCES,
                STUDENT_WIDTH, TEACHER_WIDTH, STUDENT_COLUMNS, TEACHER_COLUMNS,
            )  # fmt: skip
            if ONE_SWEEP:
                slab = a
                rest += product(tl.trans(b), b, PRECISION)
            else:
                slab = load_some(
                    student, teacher, sample, student_head + index // blocks,
                    teacher_head + index // blocks, tokens, counts, ratio, first, True, QUERIES,
                    DIFFERENCES, STUDENT_WIDTH, TEACHER_WIDTH, STUDENT_COLUMNS, TEACHER_COLUMNS,
                    STUDENT_SLAB,
                )  # fmt: skip
            own += product(tl.trans(slab), a, PRECISION)
            cross += product(tl.trans(slab), b, PRECISION)
        rows = first + student_rows
        tl.store(grams_ptr + rows * STUDENT_COLUMNS + student_columns, own)
        tl.store(cross_ptr + rows * TEACHER_COLUMNS + teacher_columns, cross)
        if ONE_SWEEP:
            tl.store(rest_ptr + teacher_rows * TEACHER_COLUMNS + teacher_columns, rest)

    if not ONE_SWEEP:
        for first in range(0, TEACHER_COLUMNS, TEACHER_SLAB):
            rest = tl.zeros([TEACHER_SLAB, TEACHER_COLUMNS], tl.float32)
            for index in range(0, group * blocks):
                tokens = begin + index % blocks * BLOCK + tl.arange(0, BLOCK)
                counts = counted(mask_ptr, sample, tokens, length)
                _, b = load_sides(
                    student, teacher, sample, student_head + index // blocks,
                    teacher_head + index // blocks, tokens, counts, ratio, QUERIES, DIFFERENCES,
                    STUDENT_WIDTH, TEACHER_WIDTH, STUDENT_COLUMNS, TEACHER_COLUMNS,
                )  # fmt: skip
                slab = load_some(
                    student, teacher, sample, student_head + index // blocks,
                    teacher_head + index // blocks, tokens, counts, ratio, first, False, QUERIES,
                    DIFFERENCES, STUDENT_WIDTH, TEACHER_WIDTH, STUDENT_COLUMNS, TEACHER_COLUMNS,
                    TEACHER_SLAB,
                )  # fmt: skip
                rest += product(tl.trans(slab), b, PRECISION)
            rows = first + teacher_rows
            tl.store(rest_ptr + rows * TEACHER_COLUMNS + teacher_columns, rest)


@triton.jit
def write_student_products(
    products_ptr,  # of this chunk
    student,
    teacher,
    mask_ptr,
    sample,
    head,
    group,
    begin,
    length,
    ratio,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    SLAB: tl.constexpr,
):
    """A_qᵀ Q_s and Q_sᵀ B_q of a chunk of tokens of `group` heads, for differences.

    One sweep over the tokens for each SLAB of their rows.
    """
    blocks = tl.cdiv(tl.minimum(length - begin, CHUNK), BLOCK).to(tl.int32)
    columns = tl.arange(0, COLUMNS)[None, :]
    ROWS: tl.constexpr = min(SLAB, COLUMNS)
    for first in range(0, COLUMNS, ROWS):
        of_difference = tl.zeros([ROWS, COLUMNS], tl.float32)
        of_teacher = tl.zeros([ROWS, COLUMNS], tl.float32)
        for index in range(0, group * blocks):
            tokens = begin + index % blocks * BLOCK + tl.arange(0, BLOCK)
            counts = counted(mask_ptr, sample, tokens, length)
            of_head = head + index // blocks
            s = load_tokens(student, sample, of_head, tokens, counts, 0, WIDTH, COLUMNS, COLUMNS)
            t = load_tokens(teacher, sample, of_head, tokens, counts, 0, WIDTH, COLUMNS, COLUMNS)
            s_slab = load_tokens(
                student, sample, of_head, tokens, counts, first, WIDTH, COLUMNS, ROWS
            )
            t_slab = load_tokens(
                teacher, sample, of_head, tokens, counts, first, WIDTH, COLUMNS, ROWS
            )
            a_slab, _ = sided(s_slab, t_slab, ratio, True, True)
            of_difference += product(tl.trans(a_slab), s, PRECISION)
            of_teacher += product(tl.trans(s_slab), t, PRECISION)
        rows = first + tl.arange(0, ROWS)[:, None]
        tl.store(products_ptr + rows * COLUMNS + columns, of_difference)
        tl.store(products_ptr + (COLUMNS + rows) * COLUMNS + columns, of_teacher)


@triton.jit
def load_gram_tile(
    grams_ptr, rows, columns, STUDENT_COLUMNS: tl.constexpr, TEACHER_COLUMNS: tl.constexpr
):
    """A tile of each of AᵀA, AᵀB and BᵀB, in float64; 0 where a matrix ends before it."""
    student_row = rows < STUDENT_COLUMNS
    teacher_row = rows < TEACHER_COLUMNS
    student_column = columns < STUDENT_COLUMNS
    teacher_column = columns < TEACHER_COLUMNS
    own = tl.load(
        grams_ptr + rows * STUDENT_COLUMNS + columns, mask=student_row & student_column, other=0.0
    )
    grams_ptr += STUDENT_COLUMNS * STUDENT_COLUMNS
    cross = tl.load(
        grams_ptr + rows * TEACHER_COLUMNS + columns, mask=student_row & teacher_column, other=0.0
    )
    grams_ptr += STUDENT_COLUMNS * TEACHER_COLUMNS
    rest = tl.load(
        grams_ptr + rows * TEACHER_COLUMNS + columns, mask=teacher_row & teacher_column, other=0.0
    )
    return own.to(tl.float64), cross.to(tl.float64), rest.to(tl.float64)


@triton.jit
def load_product_tile(products_ptr, rows, columns, COLUMNS: tl.constexpr):
    """A tile of A_qᵀ Q_s and one of Q_sᵀ B_q, in float64; 0 where a matrix ends before it."""
    inside = (rows < COLUMNS) & (columns < COLUMNS)
    one = tl.load(products_ptr + rows * COLUMNS + columns, mask=inside, other=0.0)
    products_ptr += COLUMNS * COLUMNS
    two = tl.load(products_ptr + rows * COLUMNS + columns, mask=inside, other=0.0)
    return one.to(tl.float64), two.to(tl.float64)


@triton.jit
def store_matrix_tile(
    matrix_ptr, top, bottom, rows, columns,
    STUDENT_COLUMNS: tl.constexpr, TEACHER_COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of the upper matrix, and one of the lower, which is given transposed."""
    student_row = rows < STUDENT_COLUMNS
    tl.store(
        matrix_ptr + rows * STUDENT_COLUMNS + columns,
        top.to(tl.float32),
        mask=student_row & (columns < STUDENT_COLUMNS),
    )
    tl.store(
        matrix_ptr + (STUDENT_COLUMNS + columns) * STUDENT_COLUMNS + rows,
        bottom.to(tl.float32),
        mask=student_row & (columns < TEACHER_COLUMNS),
    )


@triton.jit
def join_tile(
    grams_ptr,  # (chunks, 2, SIZE): of queries and of keys
    products_ptr,  # (chunks, 2, COLUMNS, COLUMNS), or None
    matrices_ptr,  # (1, or chunks if CAUSAL; 2; STUDENT + TEACHER_COLUMNS, STUDENT_COLUMNS)
    loss_ptr,
    tile_row,
    tile_column,
    chunks,
    ratio,
    CAUSAL: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    STUDENT_COLUMNS: tl.constexpr,
    TEACHER_COLUMNS: tl.constexpr,
):
    """A tile's part of ⟨QᵀQ, KᵀK⟩, and of what Q and K are multiplied with.

    [A_q, B_q] · [AᵀA; σ BᵀA] of the keys is E K_s, and [A_k, B_k] · [AᵀA; σ BᵀA] of the queries is
    Eᵀ A_q. Where that is not Eᵀ Q_s, `products_ptr` has A_qᵀ Q_s and Q_sᵀ B_q of the chunks.
    CAUSAL: of the keys before a chunk, and of the queries behind it.
    """
    SIZE: tl.constexpr = (
        STUDENT_COLUMNS * STUDENT_COLUMNS
        + STUDENT_COLUMNS * TEACHER_COLUMNS
        + TEACHER_COLUMNS * TEACHER_COLUMNS
    )
    MATRIX: tl.constexpr = (STUDENT_COLUMNS + TEACHER_COLUMNS) * STUDENT_COLUMNS
    rows = tile_row * TILE + tl.arange(0, TILE)[:, None]
    columns = tile_column * TILE + tl.arange(0, TILE)[None, :]
    # In float64 before it is squared: a rounding more of ρ² than of ρ would not cancel.
    ratio = tl.zeros([1, 1], tl.float64) + ratio
    sign = ratio if DIFFERENCES else -ratio

    own = tl.zeros([TILE, TILE], tl.float64)
    cross = tl.zeros([TILE, TILE], tl.float64)
    rest = tl.zeros([TILE, TILE], tl.float64)
    loss = tl.zeros([TILE, TILE], tl.float64)
    chunk_ptr = grams_ptr
    matrix_ptr = matrices_ptr
    if not CAUSAL:
        for _ in range(0, chunks):
            one, two, three = load_gram_tile(
                chunk_ptr + SIZE, rows, columns, STUDENT_COLUMNS, TEACHER_COLUMNS
            )
            own += one
            cross += two
            rest += three
            chunk_ptr += 2 * SIZE
        chunk_ptr = grams_ptr
        if matrices_ptr is not None:
            store_matrix_tile(
                matrix_ptr, own, sign * cross, rows, columns, STUDENT_COLUMNS, TEACHER_COLUMNS
            )
    for _ in range(0, chunks):
        one, two, three = load_gram_tile(chunk_ptr, rows, columns, STUDENT_COLUMNS, TEACHER_COLUMNS)
        loss += own * one + 2 * sign * (cross * two) + ratio * ratio * (rest * three)
        if CAUSAL:
            if matrices_ptr is not None:
                store_matrix_tile(
                    matrix_ptr, own, sign * cross, rows, columns, STUDENT_COLUMNS, TEACHER_COLUMNS
                )
                matrix_ptr += 2 * MATRIX
            one, two, three = load_gram_tile(
                chunk_ptr + SIZE, rows, columns, STUDENT_COLUMNS, TEACHER_COLUMNS
            )
            own += one
            cross += two
            rest += three
        chunk_ptr += 2 * SIZE
    tl.store(loss_ptr, tl.sum(tl.sum(loss, axis=1), axis=0))

    if matrices_ptr is not None:
        own = tl.zeros([TILE, TILE], tl.float64)
        cross = tl.zeros([TILE, TILE], tl.float64)
        matrix_ptr += MATRIX
        if products_ptr is not None:
            products_ptr += chunks * 2 * STUDENT_COLUMNS * STUDENT_COLUMNS
        for _ in range(0, chunks):
            if CAUSAL:
                matrix_ptr -= 2 * MATRIX
                store_matrix_tile(
                    matrix_ptr, own, sign * cross, rows, columns, STUDENT_COLUMNS, TEACHER_COLUMNS
                )
            if products_ptr is not None:
                products_ptr -= 2 * STUDENT_COLUMNS * STUDENT_COLUMNS
                one, two = load_product_tile(products_ptr, rows, columns, STUDENT_COLUMNS)
            else:
                chunk_ptr -= 2 * SIZE
                one, two, _ = load_gram_tile(
                    chunk_ptr, rows, columns, STUDENT_COLUMNS, TEACHER_COLUMNS
                )
            own += one
            cross += two
        if not CAUSAL:
            store_matrix_tile(
                matrix_ptr, own, sign * cross, rows, columns, STUDENT_COLUMNS, TEACHER_COLUMNS
            )


@triton.jit
def add_matrix_product(
    total,
    matrix_ptr,
    student,
    teacher,
    sample,
    student_head,
    teacher_head,
    tokens,
    counts,
    ratio,
    QUERIES: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    STUDENT_COLUMNS: tl.constexpr,
    TEACHER_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    STEP: tl.constexpr,
):
    """total + [A, B] · a matrix that join_tile has left, STEP columns of [A, B] at a time."""
    STUDENT_STEP: tl.constexpr = min(STEP, STUDENT_COLUMNS)
    TEACHER_STEP: tl.constexpr = min(STEP, TEACHER_COLUMNS)
    places = tl.arange(0, STUDENT_COLUMNS)[None, :]
    for first in range(0, STUDENT_COLUMNS, STUDENT_STEP):
        a = load_some(
            student, teacher, sample, student_head, teacher_head, tokens, counts, ratio, first,
            True, QUERIES, DIFFERENCES, STUDENT_WIDTH, TEACHER_WIDTH, STUDENT_COLUMNS,
            TEACHER_COLUMNS, STUDENT_STEP,
        )  # fmt: skip
        rows = (first + tl.arange(0, STUDENT_STEP))[:, None]
        total += product(a, tl.load(matrix_ptr + rows * STUDENT_COLUMNS + places), PRECISION)
    matrix_ptr += STUDENT_COLUMNS * STUDENT_COLUMNS
    for first in range(0, TEACHER_COLUMNS, TEACHER_STEP):
        b = load_some(
            student, teacher, sample, student_head, teacher_head, tokens, counts, ratio, first,
            False, QUERIES, DIFFERENCES, STUDENT_WIDTH, TEACHER_WIDTH, STUDENT_COLUMNS,
            TEACHER_COLUMNS, TEACHER_STEP,
        )  # fmt: skip
        rows = (first + tl.arange(0, TEACHER_STEP))[:, None]
        total += product(b, tl.load(matrix_ptr + rows * STUDENT_COLUMNS + places), PRECISION)
    return total


@triton.jit
def store_gradient(
    target,  # (pointer, strides of samples, of heads and of tokens)
    factor_ptr,
    factor_stride,
    gradient,
    sample,
    head,
    tokens,
    length,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Scaled in float32, and rounded as it is written."""
    factor = tl.load(factor_ptr + sample * factor_stride)
    columns = tl.arange(0, COLUMNS)
    inside = (tokens < length)[:, None]
    if COLUMNS > WIDTH:
        inside = inside & (columns < WIDTH)[None, :]
    row = target[0] + sample * target[1] + head * target[2]
    values = (factor * gradient).to(target[0].dtype.element_ty)
    tl.store(row + tokens[:, None] * target[3] + columns[None, :], values, mask=inside)


# None of these changes the code, so none of them compiles it anew.
RUNTIME_ARGUMENTS = [
    "heads",
    "student_key_heads",
    "teacher_key_heads",
    "matrices",
    "length",
    "chunks",
    "factor_stride",
]


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def gram_kernel(
    student_query,  # (pointer, strides): (samples, heads, length, width), as all four
    student_key,
    teacher_query,
    teacher_key,
    query_mask_ptr,  # (samples, length), or None
    key_mask_ptr,  # (samples, length), or None
    grams_ptr,  # (samples, matrices, chunks, 2, SIZE)
    products_ptr,  # (samples, matrices, chunks, 2, COLUMNS, COLUMNS), or None
    heads,
    student_key_heads,
    teacher_key_heads,
    matrices,
    length,
    chunks,
    ratio,
    DIFFERENCES: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    STUDENT_COLUMNS: tl.constexpr,
    TEACHER_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    SLAB: tl.constexpr,
):
    """The Gram matrices of each chunk, A and B of queries and of keys.

    One program per matrix, chunk and side. Traffic: one read of all inputs, and three quarters of
    D × D float32 written per chunk and side. A third program per chunk takes the products with Q_s,
    which is another read of the queries and half of D × D. No atomics: the same bits every run.
    """
    SIZE: tl.constexpr = (
        STUDENT_COLUMNS * STUDENT_COLUMNS
        + STUDENT_COLUMNS * TEACHER_COLUMNS
        + TEACHER_COLUMNS * TEACHER_COLUMNS
    )
    # int64: a position times a stride passes 2**31.
    place = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1).to(tl.int64)
    sample = place // matrices
    group = heads // matrices
    head = place % matrices * group
    grams_ptr += (place * chunks + chunk) * (2 * SIZE)
    if tl.program_id(2) == 0:
        write_grams(
            grams_ptr, student_query, teacher_query, query_mask_ptr, sample, head, head, group,
            chunk * CHUNK, length, ratio, True, DIFFERENCES, STUDENT_WIDTH, TEACHER_WIDTH,
            STUDENT_COLUMNS, TEACHER_COLUMNS, PRECISION, CHUNK, BLOCK, SLAB,
        )  # fmt: skip
    elif tl.program_id(2) == 1:
        write_grams(
            grams_ptr + SIZE, student_key, teacher_key, key_mask_ptr, sample,
            head * student_key_heads // heads, head * teacher_key_heads // heads, 1,
            chunk * CHUNK, length, ratio, False, DIFFERENCES, STUDENT_WIDTH, TEACHER_WIDTH,
            STUDENT_COLUMNS, TEACHER_COLUMNS, PRECISION, CHUNK, BLOCK, SLAB,
        )  # fmt: skip
    else:
        if products_ptr is not None:
            products_ptr += (place * chunks + chunk) * (2 * STUDENT_COLUMNS * STUDENT_COLUMNS)
            write_student_products(
                products_ptr, student_query, teacher_query, query_mask_ptr, sample, head, group,
                chunk * CHUNK, length, ratio, STUDENT_WIDTH, STUDENT_COLUMNS, PRECISION, CHUNK,
                BLOCK, SLAB,
            )  # fmt: skip


@triton.jit(do_not_specialize=["chunks"])
def join_kernel(
    grams_ptr,  # (samples · matrices, chunks, 2, SIZE)
    products_ptr,  # (samples · matrices, chunks, 2, COLUMNS, COLUMNS), or None
    matrices_ptr,  # (samples · matrices, 1 or chunks, 2, both COLUMNS, STUDENT_COLUMNS), or None
    losses_ptr,  # (samples · matrices, tiles)
    chunks,
    ratio,
    CAUSAL: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    STUDENT_COLUMNS: tl.constexpr,
    TEACHER_COLUMNS: tl.constexpr,
):
    """⟨QᵀQ, KᵀK⟩ and the matrices of the gradients, from all chunks in their order, in float64.

    One program per tile of the Gram matrices. Traffic: two reads of what gram_kernel wrote, three
    if CAUSAL, and one write of the gradients' matrices.
    """
    SIZE: tl.constexpr = (
        STUDENT_COLUMNS * STUDENT_COLUMNS
        + STUDENT_COLUMNS * TEACHER_COLUMNS
        + TEACHER_COLUMNS * TEACHER_COLUMNS
    )
    MATRIX: tl.constexpr = (STUDENT_COLUMNS + TEACHER_COLUMNS) * STUDENT_COLUMNS
    ACROSS: tl.constexpr = (max(STUDENT_COLUMNS, TEACHER_COLUMNS) + TILE - 1) // TILE
    place = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    if matrices_ptr is not None:
        matrices_ptr += place * (2 * MATRIX) * (chunks if CAUSAL else 1)
    if products_ptr is not None:
        products_ptr += place * chunks * (2 * STUDENT_COLUMNS * STUDENT_COLUMNS)
    join_tile(
        grams_ptr + place * chunks * (2 * SIZE), products_ptr, matrices_ptr,
        losses_ptr + place * (ACROSS * ACROSS) + tile, tile // ACROSS, tile % ACROSS,
        chunks, ratio, CAUSAL, DIFFERENCES, STUDENT_COLUMNS, TEACHER_COLUMNS,
    )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def query_kernel(
    student_query,  # (pointer, strides): (samples, heads, length, width), as all four
    student_key,
    teacher_query,
    teacher_key,
    query_mask_ptr,  # (samples, length), or None
    key_mask_ptr,  # (samples, length), or None
    matrices_ptr,  # (samples, matrices, 1 or chunks, 2, both COLUMNS, STUDENT_COLUMNS), or None
    gradient,  # (pointer, strides), like student_query, or None
    factor_ptr,  # (samples,) or ()
    losses_ptr,  # (samples, heads, blocks), or None
    heads,
    student_key_heads,
    teacher_key_heads,
    matrices,
    length,
    chunks,
    factor_stride,
    ratio,
    GRAM: tl.constexpr,
    SCORES: tl.constexpr,
    CAUSAL: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    STUDENT_COLUMNS: tl.constexpr,
    TEACHER_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """∂/∂Q_s = E K_s, times the factor, and Σ E² over the scores that it forms.

    One program per head and block of queries. GRAM: a Gram matrix serves all keys, or, if CAUSAL,
    those before the block's chunk. SCORES: scores are formed for the rest, or for all.
    Traffic: one read of the queries, one write, and for SCORES one read of these keys, from L2.
    """
    MATRIX: tl.constexpr = (STUDENT_COLUMNS + TEACHER_COLUMNS) * STUDENT_COLUMNS
    place = tl.program_id(0).to(tl.int64)
    sample = place // heads
    head = place % heads
    begin = tl.program_id(1).to(tl.int64) * BLOCK
    tokens = begin + tl.arange(0, BLOCK)
    counts = counted(query_mask_ptr, sample, tokens, length)
    total = tl.zeros([BLOCK, STUDENT_COLUMNS], tl.float32)

    first = begin * 0
    if GRAM:
        matrix = sample * matrices + head * matrices // heads
        if CAUSAL:
            first = begin // CHUNK * CHUNK
            matrix = matrix * chunks + begin // CHUNK
        if gradient is not None:
            total = add_matrix_product(
                total, matrices_ptr + matrix * (2 * MATRIX), student_query, teacher_query, sample,
                head, head, tokens, counts, ratio, True, DIFFERENCES, STUDENT_WIDTH, TEACHER_WIDTH,
                STUDENT_COLUMNS, TEACHER_COLUMNS, PRECISION, STEP,
            )  # fmt: skip

    if SCORES:
        student = load_tokens(
            student_query,
            sample,
            head,
            tokens,
            counts,
            0,
            STUDENT_WIDTH,
            STUDENT_COLUMNS,
            STUDENT_COLUMNS,
        )
        teacher = load_tokens(
            teacher_query,
            sample,
            head,
            tokens,
            counts,
            0,
            TEACHER_WIDTH,
            TEACHER_COLUMNS,
            TEACHER_COLUMNS,
        )
        a_query, b_query = sided(student, teacher, ratio, True, DIFFERENCES)
        sign = ratio if DIFFERENCES else -ratio
        last = tl.minimum(begin + BLOCK, length) if CAUSAL else length
        squares = tl.zeros([BLOCK], tl.float64)
        for start in range(first, last, BLOCK):
            keys = start + tl.arange(0, BLOCK)
            seen = counted(key_mask_ptr, sample, keys, length)
            student = load_tokens(
                student_key, sample, head * student_key_heads // heads, keys, seen,
                0, STUDENT_WIDTH, STUDENT_COLUMNS, STUDENT_COLUMNS,
            )  # fmt: skip
            teacher = load_tokens(
                teacher_key, sample, head * teacher_key_heads // heads, keys, seen,
                0, TEACHER_WIDTH, TEACHER_COLUMNS, TEACHER_COLUMNS,
            )  # fmt: skip
            a_key, b_key = sided(student, teacher, ratio, False, DIFFERENCES)
            scores = product(a_query, tl.trans(a_key), PRECISION)
            scores += sign * product(b_query, tl.trans(b_key), PRECISION)
            if CAUSAL:
                scores = tl.where(keys[None, :] <= tokens[:, None], scores, 0.0)
            squares += tl.sum(scores * scores, axis=1).to(tl.float64)
            if gradient is not None:
                total += product(scores, student, PRECISION)
        tl.store(
            losses_ptr + place * tl.num_programs(1) + tl.program_id(1), tl.sum(squares, axis=0)
        )

    if gradient is not None:
        store_gradient(
            gradient, factor_ptr, factor_stride, total, sample, head, tokens, length,
            STUDENT_WIDTH, STUDENT_COLUMNS,
        )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def key_kernel(
    student_query,  # (pointer, strides): (samples, heads, length, width), as all four
    student_key,
    teacher_query,
    teacher_key,
    query_mask_ptr,  # (samples, length), or None
    key_mask_ptr,  # (samples, length), or None
    matrices_ptr,  # (samples, matrices, 1 or chunks, 2, both COLUMNS, STUDENT_COLUMNS), or None
    gradient,  # (pointer, strides), like student_key
    factor_ptr,  # (samples,) or ()
    heads,
    student_key_heads,
    teacher_key_heads,
    matrices,
    length,
    chunks,
    factor_stride,
    ratio,
    GRAM: tl.constexpr,
    SCORES: tl.constexpr,
    CAUSAL: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    STUDENT_COLUMNS: tl.constexpr,
    TEACHER_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """∂/∂K_s = Eᵀ Q_s, times the factor.

    One program per key head of the student and block of keys, which adds up the query heads that
    share it, or their matrices, in order. GRAM, SCORES and traffic: as in query_kernel.
    """
    MATRIX: tl.constexpr = (STUDENT_COLUMNS + TEACHER_COLUMNS) * STUDENT_COLUMNS
    place = tl.program_id(0).to(tl.int64)
    sample = place // student_key_heads
    head = place % student_key_heads
    begin = tl.program_id(1).to(tl.int64) * BLOCK
    tokens = begin + tl.arange(0, BLOCK)
    counts = counted(key_mask_ptr, sample, tokens, length)
    total = tl.zeros([BLOCK, STUDENT_COLUMNS], tl.float32)

    last = length
    if GRAM:
        share = matrices // student_key_heads
        for index in range(0, share):
            of_matrix = head * share + index
            matrix = sample * matrices + of_matrix
            if CAUSAL:
                matrix = matrix * chunks + begin // CHUNK
            total = add_matrix_product(
                total, matrices_ptr + matrix * (2 * MATRIX) + MATRIX, student_key, teacher_key,
                sample, head, of_matrix * teacher_key_heads // matrices, tokens, counts, ratio,
                False, DIFFERENCES, STUDENT_WIDTH, TEACHER_WIDTH,
                STUDENT_COLUMNS, TEACHER_COLUMNS, PRECISION, STEP,
            )  # fmt: skip
        if CAUSAL:
            last = tl.minimum(begin // CHUNK * CHUNK + CHUNK, length)

    if SCORES:
        student = load_tokens(
            student_key,
            sample,
            head,
            tokens,
            counts,
            0,
            STUDENT_WIDTH,
            STUDENT_COLUMNS,
            STUDENT_COLUMNS,
        )
        sign = ratio if DIFFERENCES else -ratio
        # A block of keys is seen by the queries from its own on.
        first = begin if CAUSAL else begin * 0
        blocks = tl.cdiv(last - first, BLOCK).to(tl.int32)
        share = heads // student_key_heads
        for index in range(0, share * blocks):
            query_head = head * share + index // blocks
            queries = first + index % blocks * BLOCK + tl.arange(0, BLOCK)
            seeing = counted(query_mask_ptr, sample, queries, length)
            teacher = load_tokens(
                teacher_key, sample, query_head * teacher_key_heads // heads, tokens, counts,
                0, TEACHER_WIDTH, TEACHER_COLUMNS, TEACHER_COLUMNS,
            )  # fmt: skip
            a_key, b_key = sided(student, teacher, ratio, False, DIFFERENCES)
            of_student = load_tokens(
                student_query, sample, query_head, queries, seeing,
                0, STUDENT_WIDTH, STUDENT_COLUMNS, STUDENT_COLUMNS,
            )  # fmt: skip
            of_teacher = load_tokens(
                teacher_query, sample, query_head, queries, seeing,
                0, TEACHER_WIDTH, TEACHER_COLUMNS, TEACHER_COLUMNS,
            )  # fmt: skip
            a_query, b_query = sided(of_student, of_teacher, ratio, True, DIFFERENCES)
            scores = product(a_key, tl.trans(a_query), PRECISION)
            scores += sign * product(b_key, tl.trans(b_query), PRECISION)
            if CAUSAL:
                scores = tl.where(tokens[:, None] <= queries[None, :], scores, 0.0)
            total += product(scores, of_student, PRECISION)

    store_gradient(
        gradient, factor_ptr, factor_stride, total, sample, head, tokens, length,
        STUDENT_WIDTH, STUDENT_COLUMNS,
    )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def fused_gram_kernel(
    student_query,  # (pointer, strides): (samples, heads, length, width), as all four
    student_key,
    teacher_query,
    teacher_key,
    query_mask_ptr,  # (samples, length), or None
    key_mask_ptr,  # (samples, length), or None
    grams_ptr,  # (samples, matrices, chunks, 2, SIZE)
    products_ptr,  # (samples, matrices, chunks, 2, COLUMNS, COLUMNS), or None
    matrices_ptr,  # (samples, matrices, 2, both COLUMNS, STUDENT_COLUMNS), or None
    query_gradient,  # (pointer, strides), like student_query, or None
    key_gradient,  # (pointer, strides), like student_key, or None
    factor_ptr,  # (samples,) or ()
    losses_ptr,  # (samples, matrices, tiles)
    heads,
    student_key_heads,
    teacher_key_heads,
    matrices,
    length,
    chunks,
    factor_stride,
    ratio,
    DIFFERENCES: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    STUDENT_COLUMNS: tl.constexpr,
    TEACHER_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    SLAB: tl.constexpr,
    STEP: tl.constexpr,
):
    """gram_kernel, join_kernel and both gradients of one matrix, for a sequence that L2 holds.

    One program per matrix, which must have a key head of the student to itself. Sums are taken
    chunk by chunk, as in the kernels apart. Traffic: one read of all inputs and one write of the
    gradients; the second read, and that of the Gram matrices, come from L2.
    """
    SIZE: tl.constexpr = (
        STUDENT_COLUMNS * STUDENT_COLUMNS
        + STUDENT_COLUMNS * TEACHER_COLUMNS
        + TEACHER_COLUMNS * TEACHER_COLUMNS
    )
    MATRIX: tl.constexpr = (STUDENT_COLUMNS + TEACHER_COLUMNS) * STUDENT_COLUMNS
    ACROSS: tl.constexpr = (max(STUDENT_COLUMNS, TEACHER_COLUMNS) + TILE - 1) // TILE
    place = tl.program_id(0).to(tl.int64)
    sample = place // matrices
    group = heads // matrices
    head = place % matrices * group
    student_head = head * student_key_heads // heads
    teacher_head = head * teacher_key_heads // heads
    grams_ptr += place * chunks * (2 * SIZE)
    for chunk in range(0, chunks):
        chunk_ptr = grams_ptr + chunk * (2 * SIZE)
        begin = (place * 0 + chunk) * CHUNK
        write_grams(
            chunk_ptr, student_query, teacher_query, query_mask_ptr, sample, head, head, group,
            begin, length, ratio, True, DIFFERENCES, STUDENT_WIDTH, TEACHER_WIDTH,
            STUDENT_COLUMNS, TEACHER_COLUMNS, PRECISION, CHUNK, BLOCK, SLAB,
        )  # fmt: skip
        write_grams(
            chunk_ptr + SIZE, student_key, teacher_key, key_mask_ptr, sample, student_head,
            teacher_head, 1, begin, length, ratio, False, DIFFERENCES, STUDENT_WIDTH, TEACHER_WIDTH,
            STUDENT_COLUMNS, TEACHER_COLUMNS, PRECISION, CHUNK, BLOCK, SLAB,
        )  # fmt: skip
    if products_ptr is not None:
        products_ptr += place * chunks * (2 * STUDENT_COLUMNS * STUDENT_COLUMNS)
        # In a loop of its own, where it takes no registers from the other.
        for chunk in range(0, chunks):
            write_student_products(
                products_ptr + chunk * (2 * STUDENT_COLUMNS * STUDENT_COLUMNS), student_query,
                teacher_query, query_mask_ptr, sample, head, group, (place * 0 + chunk) * CHUNK,
                length, ratio, STUDENT_WIDTH, STUDENT_COLUMNS, PRECISION, CHUNK, BLOCK, SLAB,
            )  # fmt: skip
    # What one thread has written, another reads.
    tl.debug_barrier()
    if matrices_ptr is not None:
        matrices_ptr += place * (2 * MATRIX)
    losses_ptr += place * (ACROSS * ACROSS)
    for tile_row in range(0, ACROSS):
        for tile_column in range(0, ACROSS):
            join_tile(
                grams_ptr, products_ptr, matrices_ptr, losses_ptr, tile_row, tile_column, chunks,
                ratio, False, DIFFERENCES, STUDENT_COLUMNS, TEACHER_COLUMNS,
            )  # fmt: skip
            losses_ptr += 1
    tl.debug_barrier()
    blocks = tl.cdiv(length, BLOCK)
    if query_gradient is not None:
        # Backwards: the last tokens' rows are the likeliest to be in L2.
        for index in range(0, group * blocks):
            index = group * blocks - 1 - index
            begin = (place * 0 + index % blocks) * BLOCK
            tokens = begin + tl.arange(0, BLOCK)
            total = add_matrix_product(
                tl.zeros([BLOCK, STUDENT_COLUMNS], tl.float32), matrices_ptr, student_query,
                teacher_query, sample, head + index // blocks, head + index // blocks, tokens,
                counted(query_mask_ptr, sample, tokens, length), ratio, True, DIFFERENCES,
                STUDENT_WIDTH, TEACHER_WIDTH, STUDENT_COLUMNS, TEACHER_COLUMNS, PRECISION, STEP,
            )  # fmt: skip
            store_gradient(
                query_gradient, factor_ptr, factor_stride, total, sample, head + index // blocks,
                tokens, length, STUDENT_WIDTH, STUDENT_COLUMNS,
            )  # fmt: skip
    if key_gradient is not None:
        for index in range(0, blocks):
            begin = (place * 0 + blocks - 1 - index) * BLOCK
            tokens = begin + tl.arange(0, BLOCK)
            total = add_matrix_product(
                tl.zeros([BLOCK, STUDENT_COLUMNS], tl.float32), matrices_ptr + MATRIX, student_key,
                teacher_key, sample, student_head, teacher_head, tokens,
                counted(key_mask_ptr, sample, tokens, length), ratio, False, DIFFERENCES,
                STUDENT_WIDTH, TEACHER_WIDTH, STUDENT_COLUMNS, TEACHER_COLUMNS, PRECISION, STEP,
            )  # fmt: skip
            store_gradient(
                key_gradient, factor_ptr, factor_stride, total, sample, student_head, tokens,
                length, STUDENT_WIDTH, STUDENT_COLUMNS,
            )  # fmt: skip


def _source(tensor: Tensor | None) -> tuple[Tensor, int, int, int] | None:
    return None if tensor is None else (tensor, *tensor.stride()[:3])


def cheaper_method(
    queries: tuple[Tensor, Tensor],
    keys: tuple[Tensor, Tensor],
    gradients: tuple[Tensor | None, Tensor | None],
    *,
    causal: bool,
) -> str:
    """The method with fewer operations; scores are formed once for the loss and for the keys."""
    _, heads, length, width = queries[0].shape
    teacher_width = queries[1].shape[-1]
    both = width + teacher_width
    matrices = heads // _group(queries, keys)
    of_query, of_key = (gradient is not None for gradient in gradients)
    per_score = both * (1 + of_key) + width * (of_query + of_key)
    tiled = heads * per_score * (length / 2 if causal else length)
    gram = (heads + matrices) * (width * both + teacher_width**2)
    gram += (heads * of_query + matrices * of_key) * both * width
    if _takes_differences(queries, keys):
        gram += heads * of_key * both * width
    if causal:
        gram += heads * per_score * min(length, CHUNK) / 2
    return "tiled" if tiled <= gram else "gram"


def _takes_differences(queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor]) -> bool:
    width, teacher_width = (query.shape[-1] for query in queries)
    is_float32 = any(tensor.dtype == torch.float32 for tensor in (*queries, *keys))
    return width == teacher_width and is_float32


def _group(queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor]) -> int:
    """How many consecutive query heads share the key heads of both models."""
    heads = queries[0].shape[1]
    return math.gcd(*(heads // key.shape[1] for key in keys))


def attention_mse_sums(
    queries: tuple[Tensor, Tensor],
    keys: tuple[Tensor, Tensor],
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    gradients: tuple[Tensor | None, Tensor | None],
    factor: Tensor,
    *,
    causal: bool,
    ratio: float,
    method: str,
) -> Tensor:
    """Σ E² / a_s² of each sample, and the gradients of queries and keys.

    Args:
        queries: the student's and the teacher's, `[B, H, S, d]` of float32, bfloat16 or float16,
            d at most WIDEST_HEAD and of unit stride, any other strides.
        keys: `[B, G, S, d]`, likewise.
        query_mask, key_mask: `[B, S]`, bool, or None.
        gradients: like the student's query and key, written; None to leave one out.
        factor: what they are multiplied by, float32: one number `[]`, or one per sample `[B]`.
        ratio: ρ = a_t / a_s.
        method: "gram", "tiled", or "auto" for the one with fewer operations.

    Returns:
        `[B]`, float64.
    """
    samples, heads, length, width = queries[0].shape
    teacher_width = queries[1].shape[-1]
    device = queries[0].device
    if method == "auto":
        method = cheaper_method(queries, keys, gradients, causal=causal)
    matrices = heads // _group(queries, keys)
    chunks = triton.cdiv(length, CHUNK)
    element_size = max(tensor.element_size() for tensor in (*queries, *keys))
    # A product is of 16 columns or more.
    columns = [max(16, triton.next_power_of_2(size)) for size in (width, teacher_width)]
    shape = {
        "DIFFERENCES": _takes_differences(queries, keys),
        "STUDENT_COLUMNS": columns[0],
        "TEACHER_COLUMNS": columns[1],
    }
    rows = shape | {
        "STUDENT_WIDTH": width,
        "TEACHER_WIDTH": teacher_width,
        "PRECISION": "ieee" if INTERPRETED.value else PRECISION[element_size],
        "CHUNK": CHUNK,
    }
    inputs = [_source(tensor) for pair in zip(queries, keys, strict=True) for tensor in pair] + [
        None if mask is None else mask.contiguous().view(torch.uint8)
        for mask in (query_mask, key_mask)
    ]
    sizes = heads, keys[0].shape[1], keys[1].shape[1], matrices, length, chunks
    factor_stride = factor.stride(0) if factor.dim() else 0
    wanted = any(gradient is not None for gradient in gradients)
    launches = next(
        launches for widest, launches in ATTENTION_MSE[element_size] if sum(columns) <= widest
    )
    form_scores = causal or method == "tiled"
    launch = launches["scores" if form_scores else "products"]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    with torch.cuda.device_of(queries[0]):
        losses, by_matrix = [], None
        if method == "gram":
            both = sum(columns)
            size = columns[0] ** 2 + columns[0] * columns[1] + columns[1] ** 2
            grams = empty(samples, matrices, chunks, 2, size)
            of_student = None
            if shape["DIFFERENCES"] and gradients[1] is not None:
                of_student = empty(samples, matrices, chunks, 2, columns[0] ** 2)
            if wanted:
                kept = chunks if causal else 1
                by_matrix = empty(samples, matrices, kept, 2, both, columns[0])
            tiles = triton.cdiv(max(columns), TILE.value) ** 2
            losses.append(empty(samples, matrices * tiles, dtype=torch.float64))
            # A program writes the gradient of a key head of the student that no other adds to.
            fused = not causal and chunks <= MOST_FUSED_CHUNKS and matrices == keys[0].shape[1]
            if fused and samples * matrices >= FEWEST_FUSED_PROGRAMS:
                fused_gram_kernel[(samples * matrices,)](
                    *inputs, grams, of_student, by_matrix, *map(_source, gradients), factor,
                    losses[0], *sizes, factor_stride, ratio, **rows, **launches["fused"],
                )  # fmt: skip
                return losses[0].sum(1).clamp_min(0)
            sides = 2 if of_student is None else 3
            gram_kernel[(samples * matrices, chunks, sides)](
                *inputs, grams, of_student, *sizes, ratio, **rows, **launches["grams"]
            )
            join_kernel[(samples * matrices, tiles)](
                grams, of_student, by_matrix, losses[0], chunks, ratio,
                **shape, CAUSAL=causal, num_warps=4,
            )  # fmt: skip
        rows |= {"GRAM": method == "gram", "SCORES": form_scores, "CAUSAL": causal}
        blocks = triton.cdiv(length, launch["BLOCK"])
        if form_scores:
            losses.append(empty(samples, heads * blocks, dtype=torch.float64))
        if form_scores or gradients[0] is not None:
            query_kernel[(samples * heads, blocks)](
                *inputs, by_matrix, _source(gradients[0]), factor,
                losses[-1] if form_scores else None, *sizes, factor_stride, ratio,
                **rows, **launch,
            )  # fmt: skip
        if gradients[1] is not None:
            key_kernel[(samples * keys[0].shape[1], blocks)](
                *inputs, by_matrix, _source(gradients[1]), factor, *sizes, factor_stride, ratio,
                **rows, **launch,
            )  # fmt: skip
    return sum(loss.sum(1) for loss in losses).clamp_min(0)
