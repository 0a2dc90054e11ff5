"""The k largest entries of a softmax: one kernel for `truncated_softmax`."""

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
    row_phase,
    vector_columns,
    walked_columns,
)
from kdfast.kernels.tuning import TRUNCATED_SOFTMAX, row_launch
from torch import Tensor

# The largest k. A block has at least as many places, so that k of them bound the k-th largest.
MOST_ENTRIES = 1024

# The fewest slots of candidates: a warp's worth of work for the smallest k.
FEWEST_SLOTS = 64

# Below the key of -inf: a column that does not exist.
NO_KEY = tl.constexpr(-(2**31))

# Of a key that is packed with a column.
LOWEST_PACKED = tl.constexpr(-(2**63))
LAST_COLUMN = tl.constexpr(2**31 - 1)


@triton.jit
def ordered_key(logits):
    """Integers in the order of the logits, which may be halved and packed. -0 is 0."""
    bits = tl.where(logits == 0, 0.0, logits).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def logit_of(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def halfway(low, high):
    """Their mean, rounded up. Their sum may not fit."""
    return (low | high) - ((low ^ high) >> 1)


@triton.jit
def load_keys(row_ptr, columns, inside):
    logits = tl.load(row_ptr + columns, mask=inside, other=-float("inf")).to(tl.float32)
    return tl.where(inside, ordered_key(logits), NO_KEY)


@triton.jit
def append(slots_ptr, count, values, keep, SLOTS: tl.constexpr):
    """Put the values to keep behind the first `count` slots, in their order; the new count.

    It counts on past SLOTS, but nothing is written there.
    """
    keep_here = keep.to(tl.int32)
    slot = count + tl.cumsum(keep_here, axis=0) - keep_here
    tl.store(slots_ptr + slot, values, mask=keep & (slot < SLOTS))
    return count + tl.sum(keep_here, axis=0)


@triton.jit(do_not_specialize=["inner", "logits_outer_stride", "logits_inner_stride", "k"])
def truncated_softmax_kernel(
    logits_ptr,  # (outer, inner, at least vocab)
    temperature_ptr,  # (rows,), or None for `temperature`
    slots_ptr,  # (rows, 2, SLOTS): places of a block, and columns
    log_probs_ptr,  # (rows, k)
    indices_ptr,  # (rows, k)
    temperature,
    inner,
    logits_outer_stride,
    logits_inner_stride,
    vocab,
    k,
    SKEWED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """The k largest of log softmax(logits / T), and their columns.

    One program per row:

    1. A sweep for max and Σ exp, which keeps the maximum of each place of a block over all blocks.
       At least k logits are as large as the k-th largest of these maxima, and all of them are at
       places whose maximum is.
    2. Bisection for a bound that lets k or a few more places pass, and one look at these places
       alone, BLOCK_V apart, for the candidates: what is at or above the bound.
    3. A sort of the candidates, by logit and then by column.

    Where there are more candidates than slots, many logits are equal or a multiple of BLOCK_V apart
    in the row. Then bisection over the whole row, a sweep per step, narrows them down to the slots,
    or to one value: of what equals it the lower columns are taken.

    Traffic: one read of the row, and from L2 one of 32 bytes per candidate place and block.
    """
    LANES: tl.constexpr = BLOCK_V // VECTOR
    TILE: tl.constexpr = BLOCK_V // 4

    # int64: rows * vocab passes 2**31 at 16k tokens x 128k vocabulary.
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row // inner * logits_outer_stride + row % inner * logits_inner_stride

    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row).to(tl.float32)
    scale = tl.div_rn(LOG2_E, temperature)
    head = head_columns(logits_row, vocab, VECTOR, SKEWED)
    interior = (vocab - head) // BLOCK_V * BLOCK_V

    maxima = tl.full([LANES, VECTOR], -float("inf"), tl.float32)
    lane_max = tl.full([LANES], LOWEST, tl.float32)
    lane_sum = tl.zeros([LANES], tl.float32)
    for EDGE in tl.static_range(2):
        # The next blocks are on their way to shared memory while one is looked at.
        for start in tl.range(
            0, vocab - interior if EDGE else interior, BLOCK_V, num_stages=1 if EDGE else STAGES
        ):
            columns, inside = block_columns(
                start, head, interior, vocab, VECTOR, BLOCK_V, EDGE, SKEWED
            )
            # evict_last: the candidates are read again.
            logits = load_block(
                logits_row, columns, inside, VECTOR, EDGE, not (EDGE and SKEWED), "evict_last"
            )
            maxima = tl.maximum(maxima, logits)
            new_max = tl.maximum(lane_max, tl.max(logits, axis=1))
            # The maximum goes before the scaling, whose product a low temperature makes large.
            lane_sum *= tl.exp2((lane_max - new_max) * scale)
            lane_sum += tl.sum(tl.exp2((logits - new_max[:, None]) * scale), axis=1)
            lane_max = new_max

    row_max = tl.max(lane_max, axis=0)
    lane_sum *= tl.exp2((lane_max - row_max) * scale)
    row_sum = tl.sum(lane_sum.to(tl.float64), axis=0)
    entry = tl.arange(0, SLOTS // 2)
    # NaN, +inf, or nothing but -inf: there is no softmax.
    if not (row_sum > 0):
        tl.store(log_probs_ptr + row * k + entry, float("nan"), mask=entry < k)
        tl.store(indices_ptr + row * k + entry, entry.to(tl.int64), mask=entry < k)
        return

    # The sum is 1 or more, which the maximum adds to it. Near 1 the device's log2 is not exact.
    excess = (row_sum - 1).to(tl.float32)
    log2_sum = tl.where(excess < 1, log2_one_plus(excess), tl.log2(row_sum.to(tl.float32)))

    places_row = slots_ptr + row * (2 * SLOTS)
    columns_row = places_row + SLOTS
    place_keys = ordered_key(maxima)
    low = tl.min(place_keys)
    high = tl.max(place_keys)
    places = BLOCK_V
    # A few more than k end the bisection early. A place may hold more than one candidate, and there
    # are 2 k slots.
    most_places = k + tl.maximum(k // 4, 8)
    while (places > most_places) & (low < high):
        middle = halfway(low, high)
        passed = tl.sum((place_keys >= middle).to(tl.int32))
        if passed >= k:
            low = middle
            places = passed
        else:
            high = middle - 1

    high = tl.max(place_keys)
    count = SLOTS + 1
    if places <= most_places:
        passes = (place_keys >= low).to(tl.int32)
        of_lane = tl.sum(passes, axis=1)
        before = (
            (tl.cumsum(of_lane, axis=0) - of_lane)[:, None] + tl.cumsum(passes, axis=1) - passes
        )
        all_places = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
        tl.store(places_row + before, all_places, mask=passes > 0)
        # What one thread has written, another reads.
        tl.debug_barrier()
        count = 0
        blocks = tl.cdiv(vocab, BLOCK_V)
        for first in range(0, blocks * SLOTS, TILE):
            look = first + tl.arange(0, TILE)
            listed = look % SLOTS < places
            place = tl.load(places_row + look % SLOTS, mask=listed, other=0)
            position = look // SLOTS * BLOCK_V + place
            columns = walked_columns(position, head, interior, SKEWED)
            keys = load_keys(logits_row, columns, listed & (position < vocab))
            count = append(columns_row, count, columns, keys >= low, SLOTS)

    if count > SLOTS:
        at_least = vocab
        # Often the bound is what so many logits are equal to, and nothing above it is left.
        middle = low + 1
        while (at_least > SLOTS) & (low < high):
            passed = tl.zeros([TILE], tl.int32)
            for start in range(0, vocab, TILE):
                columns = start + tl.arange(0, TILE)
                keys = load_keys(logits_row, columns, columns < vocab)
                passed += (keys >= middle).to(tl.int32)
            row_passed = tl.sum(passed, axis=0)
            if row_passed >= k:
                low = middle
                at_least = row_passed
            else:
                high = middle - 1
            middle = halfway(low, high)
        # The slots may have been written to already, by other threads.
        tl.debug_barrier()
        count = 0
        for start in range(0, vocab, TILE):
            columns = start + tl.arange(0, TILE)
            keys = load_keys(logits_row, columns, columns < vocab)
            count = append(columns_row, count, columns, keys > low, SLOTS)
        start = 0
        while (count < k) & (start < vocab):
            columns = start + tl.arange(0, TILE)
            keys = load_keys(logits_row, columns, columns < vocab)
            count = append(columns_row, count, columns, keys == low, SLOTS)
            start += TILE

    tl.debug_barrier()
    slot = tl.arange(0, SLOTS)
    listed = slot < count
    column = tl.load(columns_row + slot, mask=listed, other=0)
    key = load_keys(logits_row, column, listed)
    # Of equal logits the lower column is the larger number.
    packed = (key.to(tl.int64) << 32) | (column ^ LAST_COLUMN)
    packed = tl.topk(tl.where(listed, packed, LOWEST_PACKED), SLOTS // 2)
    column = (packed & LAST_COLUMN) ^ LAST_COLUMN
    distance = logit_of((packed >> 32).to(tl.int32)) - row_max
    log_probs = tl.div_rn(distance, temperature) - log2_sum * LN_2
    tl.store(log_probs_ptr + row * k + entry, log_probs, mask=entry < k)
    tl.store(indices_ptr + row * k + entry, column, mask=entry < k)


def truncated_softmax_rows(
    logits: Tensor, k: int, temperature: float | Tensor, *, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """The k largest log-probabilities of each row's softmax, as kdfast.reference has it.

    Args:
        logits: `[outer, inner, V]`, float32, bfloat16 or float16, unit stride along V and any
            other strides.
        k: at most MOST_ENTRIES, and at most vocab_size.
        temperature: a number, or a tensor `[rows]`; rows = outer · inner.

    Returns:
        `[outer, inner, k]` log-probabilities, float32, largest first, and int64 columns.
    """
    outer, inner, _ = logits.shape
    rows = outer * inner
    log_probs = logits.new_empty((outer, inner, k), dtype=torch.float32)
    indices = logits.new_empty((outer, inner, k), dtype=torch.int64)
    if rows == 0:
        return log_probs, indices
    # Twice k, so that the bound may let a few more than k pass.
    slots = max(FEWEST_SLOTS, triton.next_power_of_2(2 * k))
    per_row = isinstance(temperature, Tensor)
    vector = vector_columns(logits)
    with torch.cuda.device_of(logits):
        truncated_softmax_kernel[(rows,)](
            logits,
            temperature.contiguous() if per_row else None,
            logits.new_empty((rows, 2, slots), dtype=torch.int32),
            log_probs,
            indices,
            1.0 if per_row else temperature,
            inner,
            *logits.stride()[:2],
            vocab_size,
            k,
            SKEWED=any(row_phase(logits, vector)),
            VECTOR=vector,
            SLOTS=slots,
            # Many slots take the launch of a large row.
            **row_launch(TRUNCATED_SOFTMAX, logits.element_size(), max(vocab_size, 8 * slots)),
        )
    return log_probs, indices
