"""The matrix products of a step: PyTorch's, and those that the extension takes in their place."""

from collections.abc import Callable, Iterator
from math import prod

import torch

import kdfast

NAMES = ("aten::mm", "aten::addmm", "kdfast::matmul")
# What KDFAST_MATMUL may be here.
CHOICES = [name for name in ("torch", "cpp") if name in kdfast.available_backends()]


def products(step: Callable[[], object]) -> Iterator[tuple[str, int]]:
    """The name of each product that a step takes and its floating-point operations."""
    with torch.profiler.profile(record_shapes=True) as profile:
        step()
    for event in profile.events():
        if event.name in NAMES:
            # addmm has its summand before the factors.
            left, right = event.input_shapes[event.name == "aten::addmm" :][:2]
            yield event.name, 2 * prod(left) * right[1]


def product_flops(step: Callable[[], object]) -> int:
    return sum(flops for _, flops in products(step))
