"""Memory that an operation is about to fill."""

import torch
from torch import Tensor

from kdfast.ops import registry


def fresh(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`, in large pages on the CPU.

    A fresh page costs more than the arithmetic that fills it: see docs/performance.md.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    # First of all whether this is traced: nothing behind it can be.
    if (
        not torch.compiler.is_compiling()
        and device.type == "cpu"
        and registry.missing("cpp") is None
    ):
        registry.extension().prefer_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor
