"""The incoming gradient, applied to a gradient that the forward pass already computed."""

import math

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
)
from kdfast.kernels.tuning import SCALE_GRADIENT, row_launch
from torch import Tensor


@triton.jit(
    do_not_specialize=["inner", "gradient_outer_stride", "gradient_inner_stride", "incoming_stride"]
)
def scale_gradient_kernel(
    gradient_ptr,  # (outer, inner, vocab)
    incoming_ptr,  # (rows,), or () with a stride of 0
    inner,
    gradient_outer_stride,
    gradient_inner_stride,
    incoming_stride,
    vocab,
    SKEWED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """gradient ← incoming · gradient, in float32 and rounded once.

    One program per row, which reads its incoming scalar and, unless that is 1, reads and writes
    the row once.
    """
    # int64: rows * vocab passes 2**31 at 16k tokens x 128k vocabulary.
    row = tl.program_id(0).to(tl.int64)
    incoming = tl.load(incoming_ptr + row * incoming_stride).to(tl.float32)
    if incoming == 1.0:
        return
    gradient_row = gradient_ptr + row // inner * gradient_outer_stride
    gradient_row += row % inner * gradient_inner_stride
    head = head_columns(gradient_row, vocab, VECTOR, SKEWED)
    interior = (vocab - head) // BLOCK_V * BLOCK_V
    for EDGE in tl.static_range(2):
        for start in range(0, vocab - interior if EDGE else interior, BLOCK_V):
            columns, inside = block_columns(
                start, head, interior, vocab, VECTOR, BLOCK_V, EDGE, SKEWED
            )
            gradient = load_block(
                gradient_row, columns, inside, VECTOR, EDGE, not (EDGE and SKEWED), "evict_first"
            )
            gradient *= incoming
            store_block(
                gradient_row, columns, inside, gradient, VECTOR, EDGE, not (EDGE and SKEWED)
            )


def scale_gradient_(gradient: Tensor, incoming: Tensor) -> None:
    """Multiply `gradient` by `incoming` in place; where that is 1, nothing is touched.

    Args:
        gradient: `[..., V]`, float32, bfloat16 or float16, unit stride along V; with more than two
            leading dimensions, contiguous.
        incoming: 0-d, or one value per row `[...]`. It is read on the device, never by the host.
    """
    *leading, vocab = gradient.shape
    inner = leading[-1] if leading else 1
    # A view or an error, never a copy.
    rows = gradient.view(math.prod(leading[:-1]), inner, vocab)
    if rows.numel() == 0:
        return
    incoming = incoming.reshape(-1)
    vector = vector_columns(rows)
    with torch.cuda.device_of(rows):
        scale_gradient_kernel[(rows.shape[0] * inner,)](
            rows,
            incoming,
            inner,
            *rows.stride()[:2],
            incoming.stride(0) if incoming.numel() > 1 else 0,
            vocab,
            SKEWED=any(row_phase(rows, vector)),
            VECTOR=vector,
            **row_launch(SCALE_GRADIENT, rows.element_size(), vocab),
        )
