"""What the kernels share: the way over a row of logits, and the sums that are taken along it.

A row is walked in blocks of BLOCK_V columns, `[lanes, VECTOR]`, where the VECTOR columns of a lane
are one 16-byte access. Sums are kept per lane and joined after the sweep: its loop has no barrier.
Where rows do not start on a 16-byte boundary (SKEWED: an odd vocabulary in bfloat16), the blocks
start at the first boundary inside the row:

    | head | interior: whole blocks, aligned and unmasked | rest |

The edge, that is the head and the rest, takes masked accesses.
"""

import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# The start of a running maximum: finite, so that a logit of -inf minus it is -inf and never NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def log2_one_plus(r):
    """log2(1 + r) for r in [0, 1], to 2e-7 of its value however small r is."""
    # The minimax polynomial of log2(1 + r) / r.
    ratio = 0.007549182119138041 * r - 0.042567061877061725
    ratio = ratio * r + 0.11285619318382001
    ratio = ratio * r - 0.19711896978576304
    ratio = ratio * r + 0.2756414121728344
    ratio = ratio * r - 0.358408472433635
    ratio = ratio * r + 0.4806929573141008
    ratio = ratio * r - 0.7213402080073492
    ratio = ratio * r + 1.442694997434355
    return ratio * r


@triton.jit
def head_columns(row_ptr, vocab, VECTOR: tl.constexpr, SKEWED: tl.constexpr):
    """How many columns stand before the row's first 16-byte boundary."""
    if not SKEWED:
        return 0
    elements = row_ptr.to(tl.int64) // (row_ptr.dtype.element_ty.primitive_bitwidth // 8)
    return tl.minimum(-elements & (VECTOR - 1), vocab).to(tl.int32)


@triton.jit
def block_columns(
    start,
    head,
    interior,
    vocab,
    VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr,
    EDGE: tl.constexpr,
    SKEWED: tl.constexpr,
    BACKWARD: tl.constexpr = False,
):
    """The columns of a block of the interior or of the edge, and which of them exist."""
    if BACKWARD and not EDGE:
        start = interior - BLOCK_V - start
    lanes = tl.arange(0, BLOCK_V // VECTOR)
    columns = start + lanes[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    if not EDGE:
        return head + columns, columns < interior
    # The edge is the row with its interior cut out.
    past_interior = columns + interior
    inside = past_interior < vocab
    if SKEWED:
        return tl.where(columns < head, columns, past_interior), inside
    return past_interior, inside


@triton.jit
def walked_columns(positions, head, interior, SKEWED: tl.constexpr):
    """The columns at positions of the walk, which takes the interior first and then the edge."""
    if not SKEWED:
        return positions
    past_interior = positions - interior
    edge = tl.where(past_interior < head, past_interior, positions)
    return tl.where(past_interior < 0, head + positions, edge)


@triton.jit
def block_pointers(row_ptr, columns, VECTOR: tl.constexpr, ALIGNED: tl.constexpr):
    pointers = row_ptr + columns
    if ALIGNED:
        # The launcher has seen it in the addresses and strides, where the compiler cannot.
        BYTES: tl.constexpr = VECTOR * row_ptr.dtype.element_ty.primitive_bitwidth // 8
        pointers = tl.multiple_of(pointers, (1, BYTES))
    return pointers


@triton.jit
def load_block(
    row_ptr,
    columns,
    inside,
    VECTOR: tl.constexpr,
    EDGE: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Logits in float32. A column that does not exist holds -inf, and so has no probability."""
    pointers = block_pointers(row_ptr, columns, VECTOR, ALIGNED)
    if EDGE:
        logits = tl.load(pointers, mask=inside, other=-float("inf"), eviction_policy=EVICTION)
    else:
        logits = tl.load(pointers, eviction_policy=EVICTION)
    return logits.to(tl.float32)


@triton.jit
def store_block(
    row_ptr,
    columns,
    inside,
    values,
    VECTOR: tl.constexpr,
    EDGE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Values rounded once, to the row's type."""
    pointers = block_pointers(row_ptr, columns, VECTOR, ALIGNED)
    values = values.to(row_ptr.dtype.element_ty)
    if EDGE:
        tl.store(pointers, values, mask=inside)
    else:
        tl.store(pointers, values)


@triton.jit
def zero_columns(row_ptr, first, last, VECTOR: tl.constexpr, BLOCK_V: tl.constexpr):
    """Zeros in the columns [first, last) of a row."""
    row_ptr += first
    count = last - first
    head = head_columns(row_ptr, count, VECTOR, True)
    interior = (count - head) // BLOCK_V * BLOCK_V
    zeros = tl.zeros([BLOCK_V // VECTOR, VECTOR], tl.float32)
    for EDGE in tl.static_range(2):
        for start in range(0, count - interior if EDGE else interior, BLOCK_V):
            columns, inside = block_columns(
                start, head, interior, count, VECTOR, BLOCK_V, EDGE, True
            )
            store_block(row_ptr, columns, inside, zeros, VECTOR, EDGE, not EDGE)


@triton.jit
def rebase_dot(dot, weight_sum, weight_shift, other_shift):
    """Σ 2^w · (w − o) once w has moved by weight_shift and o by other_shift, both ≤ 0."""
    decay = tl.exp2(weight_shift)
    # Without a weight that survives, the terms may be infinite, and count for nothing.
    counts = decay * weight_sum > 0
    return tl.where(counts, decay * (dot + weight_sum * (weight_shift - other_shift)), 0.0)


def vector_columns(logits: Tensor) -> int:
    """How many columns one 16-byte access takes."""
    return 16 // logits.element_size()


def row_phase(logits: Tensor, vector: int) -> tuple[int, ...]:
    """Where the rows of `[outer, inner, V]` start within a vector of `vector` columns.

    Tensors of the same phase are misaligned alike in every row; zeros mean that none is.
    """
    start = logits.data_ptr() // logits.element_size()
    steps = (
        stride if size > 1 else 0
        for size, stride in zip(logits.shape[:2], logits.stride()[:2], strict=True)
    )
    return tuple(offset % vector for offset in (start, *steps))
