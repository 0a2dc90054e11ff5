"""How each kernel is launched: chosen from the compiled code, not yet measured on any device.

A program walks one row, and L2 should hold the row pairs of all programs that run at once: large
rows get few programs of many warps. A block is one or two 16-byte accesses per thread and row.
"""

# The bytes of an element -> ((largest vocabulary, launch options), ...), from small to large.
Tuning = dict[int, tuple[tuple[float, dict[str, int]], ...]]

# At 64 registers a multiprocessor holds 1024 threads. Left to itself, ptxas spills to hold more.
KD_LOSS: Tuning = {
    2: (
        (2048, {"BLOCK_V": 1024, "num_warps": 4, "maxnreg": 64}),
        (65536, {"BLOCK_V": 4096, "num_warps": 16, "maxnreg": 64}),
        (float("inf"), {"BLOCK_V": 8192, "num_warps": 32, "maxnreg": 64}),
    ),
    4: (
        (2048, {"BLOCK_V": 512, "num_warps": 4, "maxnreg": 64}),
        (32768, {"BLOCK_V": 2048, "num_warps": 16, "maxnreg": 64}),
        (float("inf"), {"BLOCK_V": 4096, "num_warps": 32, "maxnreg": 64}),
    ),
}

# A block has MOST_ENTRIES places or more. A multiprocessor holds two programs of the large rows, so
# that one selects while the other reads.
TRUNCATED_SOFTMAX: Tuning = {
    2: (
        (2048, {"BLOCK_V": 1024, "num_warps": 4, "maxnreg": 64}),
        (float("inf"), {"BLOCK_V": 4096, "num_warps": 16, "maxnreg": 64}),
    ),
    4: (
        (2048, {"BLOCK_V": 1024, "num_warps": 4, "maxnreg": 64}),
        (float("inf"), {"BLOCK_V": 4096, "num_warps": 16, "maxnreg": 64}),
    ),
}

# The support's arithmetic is in float64, which takes registers: a multiprocessor holds three
# programs of 8 warps, or one of 16 where a thread has more than one entry.
TOPK_KD_LOSS: Tuning = {
    2: (
        (2048, {"BLOCK_V": 1024, "num_warps": 4, "maxnreg": 80}),
        (float("inf"), {"BLOCK_V": 4096, "num_warps": 8, "maxnreg": 80}),
    ),
    4: (
        (2048, {"BLOCK_V": 512, "num_warps": 4, "maxnreg": 80}),
        (float("inf"), {"BLOCK_V": 2048, "num_warps": 8, "maxnreg": 80}),
    ),
}

TOPK_KD_LOSS_OF_MANY: Tuning = {
    2: ((float("inf"), {"BLOCK_V": 4096, "num_warps": 16, "maxnreg": 128}),),
    4: ((float("inf"), {"BLOCK_V": 2048, "num_warps": 16, "maxnreg": 128}),),
}

# A tile of a gathered product: entries times hidden columns, some 128-bit accesses per thread.
ENTRY_PRODUCTS = {"BLOCK_K": 16, "BLOCK_H": 256, "num_warps": 4}

SCALE_GRADIENT: Tuning = {
    2: (
        (2048, {"BLOCK_V": 1024, "num_warps": 4, "maxnreg": 64}),
        (float("inf"), {"BLOCK_V": 4096, "num_warps": 8, "maxnreg": 64}),
    ),
    4: (
        (2048, {"BLOCK_V": 512, "num_warps": 4, "maxnreg": 64}),
        (float("inf"), {"BLOCK_V": 2048, "num_warps": 8, "maxnreg": 64}),
    ),
}


def row_launch(tuning: Tuning, element_size: int, vocab: int) -> dict[str, int]:
    """The launch options of the first entry that serves rows of `vocab` columns."""
    return next(launch for largest, launch in tuning[element_size] if vocab <= largest)
