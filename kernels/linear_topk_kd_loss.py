"""Products of a head with the few entries that each token keeps: tail "support" of
`linear_topk_kd_loss`, which needs no other logits.

Each of the three gathers rows, accumulates in float32, and adds in the same order every run.
"""

import torch
import triton
import triton.language as tl
from kdfast.kernels.tuning import ENTRY_PRODUCTS
from torch import Tensor


@triton.jit
def load_rows(ptr, rows, row_stride, columns, row_mask, width):
    """`[rows, columns]` in float32, 0 where there is none."""
    # int64: rows * width passes 2**31 at 512k rows x 4096 hidden columns.
    pointers = ptr + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    mask = row_mask[:, None] & (columns < width)[None, :]
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["k"])
def entry_logits_kernel(
    hidden_ptr,  # (rows, width)
    weight_ptr,  # (vocab, width)
    indices_ptr,  # (rows, k)
    logits_ptr,  # (rows, k)
    hidden_stride,
    weight_stride,
    k,
    width,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """logits[r, j] = hidden[r] · weight[indices[r, j]].

    One program per row and BLOCK_K entries. Traffic: one read of k rows of the weight per token.
    """
    row = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    index = tl.load(indices_ptr + row * k + entry, mask=entry < k, other=-1)
    products = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
    for start in range(0, width, BLOCK_H):
        columns = start + tl.arange(0, BLOCK_H)
        hidden = tl.load(
            hidden_ptr + row * hidden_stride + columns, mask=columns < width, other=0.0
        )
        weight = load_rows(weight_ptr, index, weight_stride, columns, index >= 0, width)
        products += weight * hidden.to(tl.float32)[None, :]
    tl.store(logits_ptr + row * k + entry, tl.sum(products, axis=1), mask=entry < k)


@triton.jit(do_not_specialize=["k"])
def entry_hidden_gradient_kernel(
    gradient_ptr,  # (rows, k)
    weight_ptr,  # (vocab, width)
    indices_ptr,  # (rows, k)
    out_ptr,  # (rows, width)
    weight_stride,
    out_stride,
    k,
    width,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """out[r] = Σ_j gradient[r, j] · weight[indices[r, j]].

    One program per row and BLOCK_H columns. Traffic: one read of k rows of the weight per token.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    products = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
    for start in range(0, k, BLOCK_K):
        entry = start + tl.arange(0, BLOCK_K)
        index = tl.load(indices_ptr + row * k + entry, mask=entry < k, other=-1)
        # The gradient of an entry that does not exist may be anything.
        gradient = tl.load(gradient_ptr + row * k + entry, mask=index >= 0, other=0.0)
        weight = load_rows(weight_ptr, index, weight_stride, columns, index >= 0, width)
        products += gradient[:, None] * weight
    out = tl.sum(products, axis=0)
    tl.store(out_ptr + row * out_stride + columns, out, mask=columns < width)


@triton.jit(do_not_specialize=["k"])
def entry_weight_gradient_kernel(
    gradient_ptr,  # (rows, k)
    hidden_ptr,  # (rows, width)
    order_ptr,  # (entries,)
    offsets_ptr,  # (segments + 1,)
    out_ptr,  # (segments, width)
    hidden_stride,
    out_stride,
    k,
    width,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """out[i] = Σ gradient[e] · hidden[e // k] over the entries e of segment i.

    One program per segment and BLOCK_H columns: no other adds to them, so none needs an atomic.
    Traffic: one read of a hidden row per entry, most of them from L2.
    """
    segment = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    first = tl.load(offsets_ptr + segment)
    last = tl.load(offsets_ptr + segment + 1)
    products = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
    for start in range(first, last, BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        entry = tl.load(order_ptr + place, mask=place < last, other=0)
        gradient = tl.load(gradient_ptr + entry, mask=place < last, other=0.0)
        hidden = load_rows(hidden_ptr, entry // k, hidden_stride, columns, place < last, width)
        products += gradient[:, None] * hidden
    out = tl.sum(products, axis=0)
    tl.store(out_ptr + segment * out_stride + columns, out, mask=columns < width)


def entry_logits(hidden: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    """hidden[r] · weight[indices[r, j]], and 0 where the index is below 0.

    Args:
        hidden: `[rows, H]`, float32, bfloat16 or float16, unit stride along H.
        weight: `[V, H]`, likewise; its dtype may differ.
        indices: `[rows, k]`, integers below V.

    Returns:
        `[rows, k]`, float32.
    """
    rows, k = indices.shape
    logits = hidden.new_empty((rows, k), dtype=torch.float32)
    if logits.numel() == 0:
        return logits
    with torch.cuda.device_of(hidden):
        entry_logits_kernel[(rows, triton.cdiv(k, ENTRY_PRODUCTS["BLOCK_K"]))](
            hidden,
            weight,
            indices.contiguous(),
            logits,
            hidden.stride(0),
            weight.stride(0),
            k,
            hidden.shape[1],
            **ENTRY_PRODUCTS,
        )
    return logits


def entry_hidden_gradient(gradient: Tensor, weight: Tensor, indices: Tensor, out: Tensor) -> None:
    """out[r] = Σ_j gradient[r, j] · weight[indices[r, j]] over the indices that are not below 0.

    Args:
        gradient: `[rows, k]`, float32.
        weight: `[V, H]`, float32, bfloat16 or float16, unit stride along H.
        indices: `[rows, k]`, integers below V.
        out: `[rows, H]`, float32, unit stride along H; written.
    """
    rows, k = indices.shape
    width = weight.shape[1]
    if out.numel() == 0:
        return
    with torch.cuda.device_of(weight):
        entry_hidden_gradient_kernel[(rows, triton.cdiv(width, ENTRY_PRODUCTS["BLOCK_H"]))](
            gradient.contiguous(),
            weight,
            indices.contiguous(),
            out,
            weight.stride(0),
            out.stride(0),
            k,
            width,
            **ENTRY_PRODUCTS,
        )


def entry_weight_gradient(
    gradient: Tensor, hidden: Tensor, order: Tensor, offsets: Tensor, out: Tensor
) -> None:
    """out[i] = Σ gradient.flatten()[e] · hidden[e // k] over e in order[offsets[i]:offsets[i + 1]].

    Args:
        gradient: `[rows, k]`, float32.
        hidden: `[rows, H]`, float32, bfloat16 or float16, unit stride along H.
        order: `[entries]`, int64, places in the flattened gradient, segment behind segment.
        offsets: `[segments + 1]`, int64, ascending, where the segments of `order` begin and end.
        out: `[segments, H]`, float32, unit stride along H; written, 0 for an empty segment.
    """
    segments, width = out.shape
    if out.numel() == 0:
        return
    with torch.cuda.device_of(hidden):
        entry_weight_gradient_kernel[(segments, triton.cdiv(width, ENTRY_PRODUCTS["BLOCK_H"]))](
            gradient.contiguous(),
            hidden,
            order.contiguous(),
            offsets.contiguous(),
            out,
            hidden.stride(0),
            out.stride(0),
            gradient.shape[1],
            width,
            **ENTRY_PRODUCTS,
        )
