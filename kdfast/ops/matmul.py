"""Matrix products of a head's size, summed in the precision of what they are written to.

They are PyTorch's, except on processors whose vectors its BLAS does not fill: MKL takes AVX2 code
on other makers' processors, whatever they have.
"""

import functools
import os

import torch
from torch import Tensor

from kdfast.ops import registry
from kdfast.ops.rows import Addresses

CHOICES = ("auto", "cpp", "torch")

# Every element of a factor is packed once for as many terms as there are rows or columns, and every
# element of the product is written once for as many as it is deep. Below this PyTorch's are faster.
SMALLEST = 64


# Before torch 2.10 a GPU's `addmm` of half-precision factors adds to nothing wider.
_ADDS_WIDER = torch.__version__ >= (2, 10)


@functools.cache
def _faster_here() -> bool:
    """Whether the own product is the faster one: a rule, so that every run takes the same."""
    return torch.backends.mkl.is_available() and registry.extension().has_unused_vectors()


def _choice() -> str:
    choice = os.environ.get("KDFAST_MATMUL", "auto")
    if choice not in CHOICES:
        raise ValueError(f"KDFAST_MATMUL must be one of {CHOICES}, got {choice!r}")
    missing = registry.missing("cpp")
    if choice == "cpp" and missing is not None:
        raise RuntimeError(f"KDFAST_MATMUL asks for 'cpp', which does not work here: {missing}")
    return choice if missing is None else "torch"


def _is_own(like: Tensor, dtype: torch.dtype, choice: str) -> bool:
    if choice == "torch" or like.device.type != "cpu" or dtype != torch.float32:
        return False
    if registry.chosen() not in ("auto", "cpp"):
        return False
    return choice == "cpp" or _faster_here()


def takes_half(factor: Tensor, dtype: torch.dtype) -> bool:
    """Whether `multiply` takes a factor in half precision as it is, into sums of `dtype`."""
    return _is_own(factor, dtype, _choice())


def multiply(left: Tensor, right: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """out = left right, or out += left right, accumulated in the precision of `out`.

    Args:
        left: `[rows, depth]`; right: `[depth, columns]`. Of one dtype, unless it `takes_half`.
        out: `[rows, columns]`, dense along one of the two; neither factor.
    """
    choice = _choice()
    large = choice == "cpp" or min(*left.shape, right.shape[1]) >= SMALLEST
    # PyTorch's would need factors of one dtype first.
    mixed = not left.dtype == right.dtype == out.dtype
    own = (large or mixed) and _is_own(out, out.dtype, choice) and 1 in out.stride()
    (_cpp_multiply if own else _torch_multiply)(left, right, out, accumulate)


def _torch_multiply(left: Tensor, right: Tensor, out: Tensor, accumulate: bool) -> None:
    widening = {} if left.dtype == out.dtype else {"out_dtype": out.dtype}
    if accumulate and widening and not _ADDS_WIDER:
        out.add_(torch.mm(left, right, **widening))
    elif accumulate:
        torch.addmm(out, left, right, **widening, out=out)
    else:
        torch.mm(left, right, **widening, out=out)


def _cpp_multiply(left: Tensor, right: Tensor, out: Tensor, accumulate: bool) -> None:
    # An operator, so that a profile shows the product where it would show PyTorch's.
    torch.ops.kdfast.matmul(left, right, out, accumulate=accumulate)


registry.library.define(
    "matmul(Tensor left, Tensor right, Tensor(a!) out, *, bool accumulate) -> ()"
)


@torch.library.impl(registry.library, "matmul", "CPU")
def _matmul(left: Tensor, right: Tensor, out: Tensor, *, accumulate: bool) -> None:
    if out.stride(1) != 1:
        left, right, out = right.T, left.T, out.T
    tensors = Addresses()
    registry.extension().matmul(
        left=tensors.matrix(left),
        right=tensors.matrix(right),
        out=out.data_ptr(),
        out_row=out.stride(0),
        rows=out.shape[0],
        columns=out.shape[1],
        depth=left.shape[1],
        add=accumulate,
        threads=torch.get_num_threads(),
    )
