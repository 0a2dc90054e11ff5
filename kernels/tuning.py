"""How each kernel is launched: chosen from the compiled code, except where a table says otherwise.

A program walks one row, and L2 should hold the row pairs of all programs that run at once: large
rows get few programs of many warps. A block is one or two 16-byte accesses per thread and row.
"""

from collections.abc import Mapping
from typing import Any

import torch

# (The largest vocabulary or width, launch options), from small to large.
Rows = tuple[tuple[float, dict[str, Any]], ...]


class Tuning(dict[int, Rows]):
    """Launches by the bytes of an element.

    Args:
        chosen: for every device.
        measured: by compute capability, those that `make gpu-tune` found faster there;
            bench/results/tuning-DEVICE.json has the measurements.
    """

    def __init__(
        self,
        chosen: Mapping[int, Rows],
        measured: Mapping[tuple[int, int], Mapping[int, Rows]] | None = None,
    ) -> None:
        super().__init__(chosen)
        self.measured = dict(measured or {})

    def __getitem__(self, element_size: int) -> Rows:
        # The current device is the tensors': launchers see to that. Without a GPU nothing was
        # measured, and nobody may be made to look for one.
        if self.measured and torch.cuda.is_initialized():
            rows = self.measured.get(torch.cuda.get_device_capability(), {})
            if element_size in rows:
                return rows[element_size]
        return super().__getitem__(element_size)


# At 64 registers a multiprocessor holds 1024 threads. Left to itself, ptxas spills to hold more.
KD_LOSS = Tuning(
    {
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
)

# A block has MOST_ENTRIES places or more. A multiprocessor holds two programs of the large rows, so
# that one selects while the other reads. Of one block each it would have 16 KiB on their way in
# bfloat16, where the rate of a copy times the latency of memory is 25: three are.
TRUNCATED_SOFTMAX = Tuning(
    {
        2: (
            (2048, {"BLOCK_V": 1024, "num_warps": 4, "STAGES": 1, "maxnreg": 64}),
            (float("inf"), {"BLOCK_V": 4096, "num_warps": 16, "STAGES": 4, "maxnreg": 64}),
        ),
        4: (
            (2048, {"BLOCK_V": 1024, "num_warps": 4, "STAGES": 1, "maxnreg": 64}),
            (float("inf"), {"BLOCK_V": 4096, "num_warps": 16, "STAGES": 3, "maxnreg": 64}),
        ),
    }
)

# The support's arithmetic is in float64, which takes registers: a multiprocessor holds three
# programs of 8 warps, or one of 16 where a thread has more than one entry.
TOPK_KD_LOSS = Tuning(
    {
        2: (
            (2048, {"BLOCK_V": 1024, "num_warps": 4, "maxnreg": 80}),
            (float("inf"), {"BLOCK_V": 4096, "num_warps": 8, "maxnreg": 80}),
        ),
        4: (
            (2048, {"BLOCK_V": 512, "num_warps": 4, "maxnreg": 80}),
            (float("inf"), {"BLOCK_V": 2048, "num_warps": 8, "maxnreg": 80}),
        ),
    }
)

TOPK_KD_LOSS_OF_MANY = Tuning(
    {
        2: ((float("inf"), {"BLOCK_V": 4096, "num_warps": 16, "maxnreg": 128}),),
        4: ((float("inf"), {"BLOCK_V": 2048, "num_warps": 16, "maxnreg": 128}),),
    }
)

# A tile of a gathered product: entries times hidden columns, some 128-bit accesses per thread.
ENTRY_PRODUCTS = {"BLOCK_K": 16, "BLOCK_H": 256, "num_warps": 4}

# Rows of hidden states are short: one warp or four take one, so that many are on their way at once.
HIDDEN_MSE = Tuning(
    {
        2: (
            (512, {"BLOCK_V": 512, "num_warps": 1, "maxnreg": 64}),
            (2048, {"BLOCK_V": 1024, "num_warps": 4, "maxnreg": 64}),
            (float("inf"), {"BLOCK_V": 4096, "num_warps": 8, "maxnreg": 64}),
        ),
        4: (
            (512, {"BLOCK_V": 256, "num_warps": 1, "maxnreg": 64}),
            (2048, {"BLOCK_V": 512, "num_warps": 4, "maxnreg": 64}),
            (float("inf"), {"BLOCK_V": 2048, "num_warps": 8, "maxnreg": 64}),
        ),
    }
)

# The compiler unrolls its sweeps, which takes registers, and the more the smaller their blocks are.
HIDDEN_COSINE = Tuning(
    {
        2: (
            (512, {"BLOCK_V": 512, "num_warps": 1, "maxnreg": 80}),
            (2048, {"BLOCK_V": 1024, "num_warps": 4, "maxnreg": 80}),
            (float("inf"), {"BLOCK_V": 4096, "num_warps": 8, "maxnreg": 80}),
        ),
        4: (
            (512, {"BLOCK_V": 512, "num_warps": 1, "maxnreg": 80}),
            (2048, {"BLOCK_V": 512, "num_warps": 4, "maxnreg": 80}),
            (float("inf"), {"BLOCK_V": 4096, "num_warps": 8, "maxnreg": 80}),
        ),
    }
)

# Bytes of an element -> (columns of both heads, padded; launches of Gram matrices, of products with
# them, of squares of scores, and of all that Gram matrices take in one program), from small to
# large. float32 must not go to the tensor cores: for capability 10.0, Triton 3.7 takes a product of
# 64 rows there as TF32, whatever precision it is asked for, so blocks and slabs have fewer.
ATTENTION_MSE = Tuning(
    {
        2: (
            (
                128,
                {
                    "grams": {"BLOCK": 64, "SLAB": 64, "num_warps": 8, "num_stages": 2},
                    "products": {"BLOCK": 64, "STEP": 32, "num_warps": 8, "num_stages": 2},
                    "scores": {"BLOCK": 32, "STEP": 32, "num_warps": 4, "num_stages": 2},
                    "fused": {"BLOCK": 32, "STEP": 32, "SLAB": 32, "num_warps": 8, "num_stages": 2},
                },
            ),
            (
                float("inf"),
                {
                    "grams": {"BLOCK": 32, "SLAB": 64, "num_warps": 8, "num_stages": 2},
                    "products": {"BLOCK": 64, "STEP": 32, "num_warps": 8, "num_stages": 2},
                    "scores": {"BLOCK": 32, "STEP": 32, "num_warps": 8, "num_stages": 2},
                    "fused": {"BLOCK": 32, "STEP": 32, "SLAB": 32, "num_warps": 8, "num_stages": 2},
                },
            ),
        ),
        4: (
            (
                128,
                {
                    "grams": {"BLOCK": 16, "SLAB": 32, "num_warps": 8, "num_stages": 2},
                    "products": {"BLOCK": 32, "STEP": 16, "num_warps": 4, "num_stages": 2},
                    "scores": {"BLOCK": 32, "STEP": 16, "num_warps": 8, "num_stages": 2},
                    "fused": {"BLOCK": 16, "STEP": 16, "SLAB": 16, "num_warps": 8, "num_stages": 2},
                },
            ),
            (
                float("inf"),
                {
                    "grams": {"BLOCK": 16, "SLAB": 16, "num_warps": 8, "num_stages": 2},
                    "products": {"BLOCK": 32, "STEP": 16, "num_warps": 4, "num_stages": 2},
                    "scores": {"BLOCK": 16, "STEP": 32, "num_warps": 8, "num_stages": 2},
                    "fused": {"BLOCK": 16, "STEP": 16, "SLAB": 16, "num_warps": 8, "num_stages": 2},
                },
            ),
        ),
    }
)

# One program for the whole sequence of a head pays where there are some for each multiprocessor,
# and where the rows of all that run stay in L2.
FEWEST_FUSED_PROGRAMS = 528
MOST_FUSED_CHUNKS = 4

SCALE_GRADIENT = Tuning(
    {
        2: (
            (2048, {"BLOCK_V": 1024, "num_warps": 4, "maxnreg": 64}),
            (float("inf"), {"BLOCK_V": 4096, "num_warps": 8, "maxnreg": 64}),
        ),
        4: (
            (2048, {"BLOCK_V": 512, "num_warps": 4, "maxnreg": 64}),
            (float("inf"), {"BLOCK_V": 2048, "num_warps": 8, "maxnreg": 64}),
        ),
    }
)


def row_launch(tuning: Tuning, element_size: int, vocab: int) -> dict[str, int]:
    """The launch options of the first entry that serves rows of `vocab` columns."""
    return next(launch for largest, launch in tuning[element_size] if vocab <= largest)
